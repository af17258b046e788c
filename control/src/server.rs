//! The QMP server: clients, their threads, and the end of both.
//!
//! Two threads per client, one that reads and runs requests, one that writes. DESIGN's
//! `event-manager` could carry this on one thread, but then a verb that takes its time (a
//! snapshot waits for its gate, its answer for a flush) would need threads or state machines
//! behind it anyway; there are few clients, and blocking code says in order what happens. The
//! price is address space for two stacks per client, [`Options::max_clients`] of them at most.
//!
//! What always holds: requests of one client are served one after another, in order; nothing
//! a client does or leaves undone holds up another client, the daemon, or [`Server::stop`].
//!
//! Absent: signals. The daemon blocks them in all threads.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::commands::VersionInfo;
use crate::dispatch::{self, After};
use crate::events::EventHub;
use crate::listener::Listener;
use crate::outbox::{Gone, Outbox};
use crate::request;
use crate::service::{Answer, CommandError, Service, reason};
use crate::wire::{self, Framer};

/// How patient the server is. The defaults are right for a daemon.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Clients served at once; one more is told so and disconnected.
    pub max_clients: usize,
    /// Events that may wait for one client; when one more comes it is disconnected.
    pub max_events: usize,
    /// How long a client may take to read one line.
    pub write_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_clients: 64, max_events: 1024, write_timeout: Duration::from_secs(10) }
    }
}

/// How long the answer to `quit` may take to leave before the daemon stops regardless.
const QUIT_PATIENCE: Duration = Duration::from_secs(1);

/// A running server.
///
/// Dropping it stops it without waiting.
pub struct Server {
    shared: Arc<Shared>,
}

impl Server {
    /// Serves the clients of `listener` until [`stop`](Self::stop).
    ///
    /// # Errors
    /// If the thread that accepts clients cannot be started.
    pub fn start(
        listener: Listener,
        service: Arc<dyn Service>,
        events: EventHub,
        options: Options,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            listener,
            service,
            events,
            options,
            clients: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        thread::Builder::new().name("control".to_owned()).spawn(move || accepting.accept())?;
        Ok(Self { shared })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        self.shared.listener.path()
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.shared.lock().connected.len()
    }

    /// Stops: removes the socket, accepts no more, sends what waits, disconnects everyone.
    ///
    /// Returns when all clients are gone, after `grace` at the latest: a verb that still runs
    /// then runs on without a client. Calling it again is harmless.
    pub fn stop(&self, grace: Duration) {
        self.shared.stop(grace);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop(Duration::ZERO);
    }
}

struct Shared {
    listener: Listener,
    service: Arc<dyn Service>,
    events: EventHub,
    options: Options,
    clients: Mutex<Clients>,
    changed: Condvar,
}

#[derive(Default)]
struct Clients {
    stopping: bool,
    last: u64,
    connected: HashMap<u64, Arc<Outbox>>,
}

#[derive(Serialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Serialize)]
struct GreetingBody {
    version: VersionInfo,
    capabilities: [&'static str; 0],
}

#[derive(Serialize)]
struct Reply<'a> {
    #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
    answer: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a CommandError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a RawValue>,
}

fn reply_line<T: AsRef<RawValue>>(answer: &Answer<T>, id: Option<&RawValue>) -> Vec<u8> {
    let reply = Reply { answer: answer.as_ref().ok().map(AsRef::as_ref), error: answer.as_ref().err(), id };
    // Texts and raw JSON only: there is nothing in it that could fail.
    wire::line(&reply).unwrap_or_default()
}

impl Shared {
    fn accept(self: Arc<Self>) {
        loop {
            let error = match self.listener.socket().accept() {
                Ok((stream, _)) => match self.welcome(stream) {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if self.lock().stopping {
                return;
            }
            match Errno::from_io_error(&error) {
                Some(Errno::INTR | Errno::CONNABORTED) => {}
                _ => {
                    // Out of descriptors, memory or threads: others may give some back.
                    log::warn!("cannot serve a control client: {error}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Gives a client its threads.
    fn welcome(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let mut clients = self.lock();
        if clients.stopping {
            return Ok(());
        }
        if clients.connected.len() >= self.options.max_clients {
            drop(clients);
            self.turn_away(&stream);
            return Ok(());
        }
        clients.last += 1;
        let number = clients.last;
        if log::log_enabled!(log::Level::Debug)
            && let Ok(peer) = rustix::net::sockopt::socket_peercred(&stream)
        {
            log::debug!("client {number}: process {:?} of user {}", peer.pid, peer.uid.as_raw());
        }
        let outbox =
            Arc::new(Outbox::new(number, stream, self.options.max_events, self.options.write_timeout)?);
        clients.connected.insert(number, Arc::clone(&outbox));
        drop(clients);

        let client = Client { shared: Arc::clone(self), number, outbox };
        // If the thread cannot start, the closure is dropped and the client with it.
        thread::Builder::new().name(format!("control-{number}")).spawn(move || client.serve())?;
        Ok(())
    }

    fn turn_away(&self, stream: &UnixStream) {
        let max = self.options.max_clients;
        log::warn!("a control client is turned away: {max} are connected");
        let error: Answer<Box<RawValue>> = Err(CommandError::generic(
            reason::TOO_MANY_CLIENTS,
            format!("{max} clients are connected already; disconnect one and try again"),
        ));
        // A new socket has room for a line; if not, the client learns it from the end.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = rustix::net::send(stream, &reply_line(&error, None), flags);
    }

    fn stop(&self, grace: Duration) {
        let deadline = Instant::now() + grace;
        let mut clients = self.lock();
        if !std::mem::replace(&mut clients.stopping, true) {
            self.listener.remove();
            // Wakes the thread in accept(), which then sees that we stop.
            let _ = rustix::net::shutdown(self.listener.socket(), Shutdown::Read);
        }
        for outbox in clients.connected.values() {
            // The reader sees the end of input when the verb it runs, if any, has its answer.
            outbox.stop_reading();
        }
        while !clients.connected.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            clients = self.changed.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        for outbox in clients.connected.values() {
            outbox.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client in the reader's hands.
struct Client {
    shared: Arc<Shared>,
    number: u64,
    outbox: Arc<Outbox>,
}

impl Client {
    /// The reader's whole life.
    fn serve(self) {
        let outbox = Arc::clone(&self.outbox);
        let writer =
            thread::Builder::new().name(format!("control-{}w", self.number)).spawn(move || outbox.send_all());
        match writer {
            Ok(writer) => {
                if let Err(Gone) = self.converse() {
                    log::debug!("client {}: disconnected", self.number);
                }
                self.outbox.finish();
                // It ends by itself: everything sent, or the write timeout.
                let _ = writer.join();
            }
            Err(error) => log::warn!("cannot serve client {}: {error}", self.number),
        }
    }

    fn converse(&self) -> Result<(), Gone> {
        let greeting = Greeting { qmp: GreetingBody { version: VersionInfo::current(), capabilities: [] } };
        self.outbox.reply(wire::line(&greeting).map_err(|_| Gone)?)?;
        let mut negotiated = false;
        let mut framer = Framer::new();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let received = self.receive(&mut buffer)?;
            if received == 0 {
                // The client sends no more, and may still read.
                return Ok(());
            }
            let mut input = &buffer[..received];
            while let Some(value) = framer.next(&mut input) {
                if self.shared.lock().stopping {
                    return Ok(());
                }
                self.handle(value, &mut negotiated)?;
            }
        }
    }

    fn handle(&self, value: Result<Vec<u8>, wire::FrameError>, negotiated: &mut bool) -> Result<(), Gone> {
        let (line, after) = match &value {
            Err(error) => {
                let refused: Answer<Box<RawValue>> =
                    Err(CommandError::generic(reason::BAD_JSON, error.to_string()));
                (reply_line(&refused, None), After::Nothing)
            }
            Ok(bytes) => {
                let (id, request) = request::parse(bytes);
                let service = &*self.shared.service;
                let (answer, after) = match request {
                    Ok(request) => dispatch::run(service, *negotiated, &request, self.number),
                    Err(refused) => (Err(refused), After::Nothing),
                };
                (reply_line(&answer, id), after)
            }
        };
        match after {
            After::Nothing => self.outbox.reply(line)?,
            After::Negotiated => {
                *negotiated = true;
                self.shared.events.subscribe(&self.outbox);
                self.outbox.reply_negotiated(line)?;
            }
            After::Quit => {
                self.outbox.reply(line)?;
                log::info!("client {} asks the daemon to quit", self.number);
                self.outbox.sent(QUIT_PATIENCE);
                self.shared.service.quit();
            }
        }
        Ok(())
    }

    fn receive(&self, buffer: &mut [u8]) -> Result<usize, Gone> {
        loop {
            match self.outbox.stream().read(buffer) {
                Ok(received) => return Ok(received),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    log::debug!("client {}: {error}", self.number);
                    return Err(Gone);
                }
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.events.unsubscribe(&self.outbox);
        self.outbox.close();
        self.shared.lock().connected.remove(&self.number);
        self.shared.changed.notify_all();
    }
}
