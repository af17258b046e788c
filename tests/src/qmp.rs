//! A control client of the suites' own: lines of JSON over a socket, as any QMP client sends them.
//!
//! Always: a call ends within [`PATIENCE`]; events that come before an answer are kept in order.
//! Absent: types of verbs. Answers are JSON values, so that no name is shared with the daemon's code.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::raw::readable;
use crate::server::reach;
use crate::vhost_client::PATIENCE;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon answered with an error.
    #[error("{reason}: {desc}")]
    Refused {
        /// QEMU's class of it.
        class: String,
        /// The stable code, `x-reason` on the wire.
        reason: String,
        /// The sentence for people.
        desc: String,
    },
    /// The connection failed or ended.
    #[error("control: {0}")]
    Io(#[from] std::io::Error),
    /// What came is not QMP.
    #[error("control: not understood: {0}")]
    Protocol(String),
}

impl Error {
    /// The stable code of a refusal; empty for anything else.
    pub fn reason(&self) -> &str {
        match self {
            Self::Refused { reason, .. } => reason,
            _ => "",
        }
    }
}

/// A result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A connection past its negotiation.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the control socket at `path` and negotiates.
    ///
    /// # Errors
    /// If nobody answers there as QMP does.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = reach(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        let greeting = client.line()?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol(greeting.to_string()));
        }
        client.call("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs a verb and returns what it answered.
    ///
    /// # Errors
    /// [`Error::Refused`] if the daemon does not want to.
    pub fn call(&mut self, verb: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": verb, "arguments": arguments });
        self.reader.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut message = self.line()?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                let (class, reason, desc) = (text("class"), text("x-reason"), text("desc"));
                return Err(Error::Refused { class, reason, desc });
            } else if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            } else {
                return Err(Error::Protocol(message.to_string()));
            }
        }
    }

    /// The next event of any kind, waiting for it at most `limit`.
    ///
    /// # Errors
    /// If the connection ends.
    pub fn event_within(&mut self, limit: Duration) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        if self.reader.buffer().is_empty() && !readable(self.reader.get_ref(), limit)? {
            return Ok(None);
        }
        let message = self.line()?;
        if message.get("event").is_none() {
            return Err(Error::Protocol(message.to_string()));
        }
        Ok(Some(message))
    }

    /// The next event of any kind.
    ///
    /// # Errors
    /// If none comes within [`PATIENCE`].
    pub fn wait_for_any_event(&mut self) -> Result<Value> {
        self.event_within(PATIENCE)?.ok_or_else(|| Error::Protocol("no event in time".into()))
    }

    /// The data of the next event `name`; others before it are dropped.
    ///
    /// # Errors
    /// If [`PATIENCE`] passes without any event.
    pub fn wait_for_event(&mut self, name: &str) -> Result<Value> {
        loop {
            let mut event = self.wait_for_any_event()?;
            if event["event"] == name {
                return Ok(event["data"].take());
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(Error::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&line).map_err(|error| Error::Protocol(format!("{error}: {line}")))
    }
}
