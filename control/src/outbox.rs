//! What waits to be sent to one client: replies from its reader, events from anyone, one
//! writer that sends them, so that lines never interleave.
//!
//! What always holds: posting an event takes one short lock and never waits for the client; a
//! reply waits for its place, so a client that sends without reading stops being read; memory
//! is bounded by [`MAX_REPLIES`] replies and the limit of events.
//!
//! A client whose events pile up is cut off rather than left with a gap: events are how a
//! backup program learns that a snapshot broke, and one missed in silence is a lie.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, Shutdown};

/// Replies that may wait before the client's next request is read.
const MAX_REPLIES: usize = 4;

/// Bytes given to the kernel at once.
const SEND_BYTES: usize = 64 << 10;

/// The client is gone, or was cut off.
#[derive(Debug)]
pub(crate) struct Gone;

/// The lines for one client, and its socket.
#[derive(Debug)]
pub(crate) struct Outbox {
    client: u64,
    stream: UnixStream,
    max_events: usize,
    write_timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Line>,
    replies: usize,
    events: usize,
    /// A line was taken and is not yet sent.
    sending: bool,
    /// Events are wanted.
    negotiated: bool,
    /// Nothing more is accepted; what waits is still sent.
    finishing: bool,
    /// Nothing more is sent.
    closed: bool,
}

#[derive(Debug)]
enum Line {
    Reply(Vec<u8>),
    Event(Arc<[u8]>),
}

impl Outbox {
    pub(crate) fn new(
        client: u64,
        stream: UnixStream,
        max_events: usize,
        write_timeout: Duration,
    ) -> io::Result<Self> {
        stream.set_write_timeout(Some(write_timeout))?;
        Ok(Self {
            client,
            stream,
            max_events,
            write_timeout,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The client's socket, for its reader.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Makes the reader see the end of input behind what has arrived already.
    pub(crate) fn stop_reading(&self) {
        // Already disconnected is as good.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Read);
    }

    /// Adds an event; cuts the client off if too many wait already.
    pub(crate) fn event(&self, line: &Arc<[u8]>) {
        let mut state = self.lock();
        if !state.negotiated || state.finishing || state.closed {
            return;
        }
        if state.events == self.max_events {
            log::warn!(
                "client {} does not read: {} events wait, disconnecting it",
                self.client,
                state.events
            );
            self.close_locked(&mut state);
            return;
        }
        state.events += 1;
        state.lines.push_back(Line::Event(Arc::clone(line)));
        self.changed.notify_all();
    }

    /// Adds a reply, when there is room for it.
    pub(crate) fn reply(&self, line: Vec<u8>) -> Result<(), Gone> {
        self.add_reply(line, false)
    }

    /// Adds the reply that ends the negotiation. Events are dropped before it and kept after
    /// it: qemu.qmp takes the first line for the reply, whatever it is, and a client that has
    /// read the reply misses nothing.
    pub(crate) fn reply_negotiated(&self, line: Vec<u8>) -> Result<(), Gone> {
        self.add_reply(line, true)
    }

    fn add_reply(&self, line: Vec<u8>, negotiated: bool) -> Result<(), Gone> {
        let mut state = self.lock();
        while state.replies == MAX_REPLIES && !state.closed && !state.finishing {
            state = self.wait(state);
        }
        if state.closed || state.finishing {
            return Err(Gone);
        }
        state.replies += 1;
        state.negotiated |= negotiated;
        state.lines.push_back(Line::Reply(line));
        self.changed.notify_all();
        Ok(())
    }

    /// Waits until everything is sent. False if the client is gone or the time is up.
    pub(crate) fn sent(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while !state.closed && (state.sending || !state.lines.is_empty()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        !state.closed
    }

    /// Lets the writer send what waits and then close.
    pub(crate) fn finish(&self) {
        self.lock().finishing = true;
        self.changed.notify_all();
    }

    /// Disconnects the client now; its reader and writer return from whatever they wait for.
    pub(crate) fn close(&self) {
        self.close_locked(&mut self.lock());
    }

    /// True once the client is cut off.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Sends lines until the client is gone or all is finished. The writer's whole life.
    pub(crate) fn send_all(&self) {
        while let Some(line) = self.take() {
            let bytes: &[u8] = match &line {
                Line::Reply(bytes) => bytes,
                Line::Event(bytes) => bytes,
            };
            if let Err(error) = self.send(bytes) {
                log::debug!("client {}: {error}", self.client);
                break;
            }
        }
        self.close();
    }

    fn take(&self) -> Option<Line> {
        let mut state = self.lock();
        state.sending = false;
        self.changed.notify_all();
        loop {
            if state.closed {
                return None;
            }
            if let Some(line) = state.lines.pop_front() {
                match line {
                    Line::Reply(_) => state.replies -= 1,
                    Line::Event(_) => state.events -= 1,
                }
                state.sending = true;
                self.changed.notify_all();
                return Some(line);
            }
            if state.finishing {
                return None;
            }
            state = self.wait(state);
        }
    }

    /// One line has `write_timeout` to leave, however slowly the client reads.
    fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + self.write_timeout;
        while !bytes.is_empty() {
            // In pieces, because the kernel's timeout starts anew with every buffer it fills.
            let piece = &bytes[..bytes.len().min(SEND_BYTES)];
            match rustix::net::send(&self.stream, piece, SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !bytes.is_empty() && Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    fn close_locked(&self, state: &mut State) {
        state.closed = true;
        state.lines.clear();
        self.changed.notify_all();
        // Already disconnected is as good.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
