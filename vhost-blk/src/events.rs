//! Event descriptors that a front end hands over, and how often its mistakes are told.
//!
//! Invariant: only an anonymous inode, as an eventfd is, is taken for an event descriptor. A file or
//! a socket would fire for ever or block the thread that signals it.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fstat};

/// The bits of a mode that tell the type of a file; an anonymous inode has none.
const TYPE_BITS: u32 = 0o170_000;

/// An event descriptor of the front end.
#[derive(Clone)]
pub(crate) struct Event {
    fd: Arc<OwnedFd>,
    /// A write may block until the other side reads.
    may_block: bool,
}

impl Event {
    /// Takes a descriptor that came with a message, if it can be an event descriptor.
    pub(crate) fn of(file: File) -> Option<Self> {
        let fd = OwnedFd::from(file);
        let anonymous = fstat(&fd).ok()?.st_mode & TYPE_BITS == 0;
        let flags = fcntl_getfl(&fd).ok()?;
        anonymous.then(|| Self { fd: Arc::new(fd), may_block: !flags.contains(OFlags::NONBLOCK) })
    }

    /// The descriptor, to wait for.
    pub(crate) fn fd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// Signals the other side. A full counter is a signal that it has not taken yet.
    pub(crate) fn signal(&self) {
        if self.may_block {
            let mut polled = [PollFd::new(&*self.fd, PollFlags::OUT)];
            if !matches!(poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1)) {
                return;
            }
        }
        #[allow(clippy::host_endian_bytes, reason = "an eventfd counts in the host's byte order")]
        let _ = rustix::io::write(&*self.fd, &1u64.to_ne_bytes());
    }
}

/// Lets one message a second through.
#[derive(Default)]
pub(crate) struct Quiet {
    last: Cell<Option<Instant>>,
    held: Cell<u64>,
}

impl Quiet {
    /// How many messages were held back since the last one that passed, if one may pass now.
    pub(crate) fn pass(&self) -> Option<u64> {
        let now = Instant::now();
        if self.last.get().is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.held.set(self.held.get() + 1);
            return None;
        }
        self.last.set(Some(now));
        Some(self.held.replace(0))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn only_an_eventfd_is_taken() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Event::of(File::from(OwnedFd::from(socket))).is_none());
        assert!(Event::of(File::open("/dev/zero").unwrap()).is_none());
        assert!(Event::of(tempfile::tempfile().unwrap()).is_none());
        assert!(Event::of(File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap())).is_some());
    }

    #[test]
    fn a_full_counter_blocks_nobody() {
        for flags in [EventfdFlags::CLOEXEC, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK] {
            let event = Event::of(File::from(eventfd(0, flags).unwrap())).unwrap();
            let full = u64::MAX - 1;
            rustix::io::write(&*event.fd(), &full.to_le_bytes()).unwrap();
            event.signal();
        }
    }

    #[test]
    fn messages_are_held_back() {
        let quiet = Quiet::default();
        assert_eq!(quiet.pass(), Some(0));
        assert_eq!(quiet.pass(), None);
        assert_eq!(quiet.held.get(), 1);
    }
}
