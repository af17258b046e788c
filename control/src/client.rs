//! A blocking QMP client, for the command line and for tests.
//!
//! What always holds: a call ends, with an answer or an error, by the timeout given at
//! [`Client::connect`]; events that arrive before an answer are kept for
//! [`Client::next_event`]; an error says what a person can do about it.
//!
//! Absent: reconnection, and several calls in flight.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::Timeout;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::commands::{ChangedBlocks, Command, QmpCapabilities, QueryChangedBlocks, Timestamp};
use crate::events::Event;
use crate::service::ErrorClass;
use crate::wire;

/// The longest line read from a server, in bytes.
const MAX_LINE_BYTES: usize = 16 << 20;

/// Events kept while nobody asks for them; the oldest go first.
const MAX_EVENTS_KEPT: usize = 4096;

/// An error that the daemon answered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct RemoteError {
    /// QEMU's class.
    pub class: ErrorClass,
    /// The stable code, see [`reason`](crate::service::reason); empty from a server without.
    #[serde(rename = "x-reason", default)]
    pub reason: String,
    /// One sentence for people.
    pub desc: String,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens at the path.
    #[error(
        "no daemon listens on {}: start one with `ebbtide serve`, or name its socket with --control or EBBTIDE_CONTROL",
        path.display()
    )]
    NoDaemon {
        /// The socket's path.
        path: PathBuf,
    },
    /// The socket belongs to someone else.
    #[error("not allowed to connect to {}: run this as the daemon's user", path.display())]
    NotAllowed {
        /// The socket's path.
        path: PathBuf,
    },
    /// No connection for another reason.
    #[error("cannot connect to {}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The daemon answered with an error.
    #[error(transparent)]
    Remote(RemoteError),
    /// No answer in time. The verb may still run; this client is of no further use.
    #[error("no answer from the daemon within {} s", timeout.as_secs_f32())]
    TimedOut {
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The daemon hung up.
    #[error("the daemon closed the connection")]
    Closed,
    /// What arrived is not what Ebbtide's daemon says.
    #[error("not understood: {what}; is this Ebbtide's control socket?")]
    Protocol {
        /// What was wrong.
        what: String,
    },
    /// The connection failed.
    #[error("the connection to the daemon failed")]
    Io {
        /// How.
        source: io::Error,
    },
}

/// An event as it arrived; it may be one that this version does not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventMessage {
    /// Its name, such as `SNAPSHOT_CREATED`.
    pub event: String,
    /// Its data.
    #[serde(default)]
    pub data: Value,
    /// When it happened.
    pub timestamp: Timestamp,
}

impl EventMessage {
    /// The event in its type, unless this version does not know it.
    pub fn typed(&self) -> Option<Event> {
        let value = serde_json::json!({ "event": self.event, "data": self.data });
        serde_json::from_value(value).ok()
    }
}

/// A connection to the daemon, past its negotiation.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    timeout: Duration,
    received: Vec<u8>,
    /// How much of `received` was searched for the end of a line.
    searched: usize,
    events: VecDeque<EventMessage>,
    last_id: u64,
}

/// Any line of the server.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Box<RawValue>>,
    error: Option<RemoteError>,
    id: Option<Value>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
    timestamp: Option<Timestamp>,
}

#[derive(Serialize)]
struct Call<'a, T> {
    execute: &'a str,
    arguments: &'a T,
    id: u64,
}

impl Client {
    /// Connects to the daemon at `path` and negotiates.
    ///
    /// `timeout` holds for this and for every later call.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let stream = open(path, timeout).map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NoDaemon { path },
                io::ErrorKind::PermissionDenied => ClientError::NotAllowed { path },
                io::ErrorKind::WouldBlock => ClientError::TimedOut { timeout },
                _ => ClientError::Connect { path, source },
            }
        })?;
        let mut client =
            Self { stream, timeout, received: Vec::new(), searched: 0, events: VecDeque::new(), last_id: 0 };
        let greeting = client.message(client.deadline())?;
        if let Some(error) = greeting.error {
            return Err(ClientError::Remote(error));
        }
        if greeting.greeting.is_none() {
            return Err(protocol("the first line is no QMP greeting"));
        }
        client.call(&QmpCapabilities::default())?;
        Ok(client)
    }

    /// Runs a verb.
    ///
    /// # Errors
    /// See [`ClientError`]; after any but `Remote`, the client is of no further use.
    pub fn call<C: Command>(&mut self, command: &C) -> Result<C::Answer, ClientError> {
        let answer = self.raw_call(C::NAME, command)?;
        serde_json::from_str(answer.get())
            .map_err(|error| protocol(&format!("the answer to {}: {error}", C::NAME)))
    }

    /// Runs a verb by name, and returns its answer as the daemon wrote it: nothing that a newer
    /// daemon adds is lost.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn call_value(&mut self, name: &str, arguments: &Value) -> Result<Value, ClientError> {
        let answer = self.raw_call(name, arguments)?;
        serde_json::from_str(answer.get())
            .map_err(|error| protocol(&format!("the answer to {name}: {error}")))
    }

    /// Reads all pages of the changed blocks, from `query.offset` to the end of the disk.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn changed_blocks(&mut self, query: &QueryChangedBlocks) -> Result<ChangedBlocks, ClientError> {
        let mut all = self.call(query)?;
        let mut reached = query.offset;
        while let Some(offset) = all.next_offset {
            if offset <= reached {
                return Err(protocol("the next page does not begin behind the last"));
            }
            reached = offset;
            let page = self.call(&QueryChangedBlocks { offset, ..query.clone() })?;
            all.ranges.extend(page.ranges);
            all.next_offset = page.next_offset;
        }
        Ok(all)
    }

    /// Waits for an event, at most `patience` if given, else for ever. `None` if none came.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn next_event(&mut self, patience: Option<Duration>) -> Result<Option<EventMessage>, ClientError> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        while self.events.is_empty() {
            match self.message(deadline) {
                Ok(message) => self.keep_event(message)?,
                Err(ClientError::TimedOut { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(self.events.pop_front())
    }

    /// Events as they come, until the daemon goes or the connection fails.
    pub fn events(&mut self) -> impl Iterator<Item = Result<EventMessage, ClientError>> {
        let mut failed = false;
        std::iter::from_fn(move || {
            if failed {
                return None;
            }
            match self.next_event(None) {
                Ok(event) => event.map(Ok),
                Err(ClientError::Closed) => None,
                Err(error) => {
                    failed = true;
                    Some(Err(error))
                }
            }
        })
    }

    fn raw_call(&mut self, name: &str, arguments: &impl Serialize) -> Result<Box<RawValue>, ClientError> {
        let deadline = self.deadline();
        self.last_id += 1;
        let call = Call { execute: name, arguments, id: self.last_id };
        let line = wire::line(&call).map_err(|error| protocol(&error.to_string()))?;
        self.stream.write_all(&line).map_err(|source| self.failed(source))?;
        loop {
            let message = self.message(deadline)?;
            if message.event.is_some() {
                self.keep_event(message)?;
                continue;
            }
            if message.id != Some(Value::from(self.last_id)) {
                return match message.error {
                    Some(error) => Err(ClientError::Remote(error)),
                    None => Err(protocol("an answer to something else")),
                };
            }
            return match (message.answer, message.error) {
                (Some(answer), None) => Ok(answer),
                (None, Some(error)) => Err(ClientError::Remote(error)),
                _ => Err(protocol("neither an answer nor an error")),
            };
        }
    }

    fn keep_event(&mut self, message: Message) -> Result<(), ClientError> {
        let (Some(event), Some(timestamp)) = (message.event, message.timestamp) else {
            return Err(protocol("an answer to nothing"));
        };
        if self.events.len() == MAX_EVENTS_KEPT {
            self.events.pop_front();
        }
        self.events.push_back(EventMessage { event, data: message.data, timestamp });
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        Some(Instant::now() + self.timeout)
    }

    /// The next line of the server.
    fn message(&mut self, deadline: Option<Instant>) -> Result<Message, ClientError> {
        loop {
            let end = self.received[self.searched..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end {
                let rest = self.received.split_off(self.searched + end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                self.searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(|error| protocol(&error.to_string()));
            }
            self.searched = self.received.len();
            if self.searched > MAX_LINE_BYTES {
                return Err(protocol("a line longer than 16 MiB"));
            }
            self.receive(deadline)?;
        }
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<(), ClientError> {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(ClientError::TimedOut { timeout: self.timeout });
        }
        self.stream.set_read_timeout(left).map_err(|source| ClientError::Io { source })?;
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(ClientError::Closed),
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn failed(&self, source: io::Error) -> ClientError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                ClientError::TimedOut { timeout: self.timeout }
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
            _ => ClientError::Io { source },
        }
    }
}

/// Connects in bounded time: a daemon that hangs has a full backlog, and the kernel would
/// wait for room in it for ever.
fn open(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    rustix::net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn protocol(what: &str) -> ClientError {
    ClientError::Protocol { what: what.to_owned() }
}
