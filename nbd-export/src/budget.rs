//! Memory for the data of all connections of a server together.
//!
//! Each connection has [`OWN_BYTES`] to itself, which nobody counts; what it takes beyond them is taken from the one
//! budget. A connection that is refused waits for its own requests only, and with none in hand goes on with its own
//! bytes: a long read or write is carried out piece by piece then. So clients that take no answers stop nobody else.
//!
//! Invariant: what is taken never exceeds the limit. Absent: a queue of those that wait, since nobody waits for another
//! client; memory, which is [`crate::buffer`]'s.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What a connection may have at any time, in bytes; a piece of a request that finds no more.
pub const OWN_BYTES: usize = 1 << 20;

/// See the module. Numbers only: nothing else is ordered by them.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    taken: AtomicUsize,
}

impl Budget {
    /// A budget of `limit` bytes, besides what each connection has to itself.
    pub fn new(limit: usize) -> Self {
        Self { limit, taken: AtomicUsize::new(0) }
    }

    /// Takes `bytes`, or nothing if there are not so many.
    pub(crate) fn take(&self, bytes: usize) -> bool {
        let more = |taken: usize| taken.checked_add(bytes).filter(|&taken| taken <= self.limit);
        bytes == 0 || self.taken.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    /// Gives back what was taken.
    pub(crate) fn give(&self, bytes: usize) {
        if bytes > 0 {
            self.taken.fetch_sub(bytes, Relaxed);
        }
    }

    /// Whether buffers are better given back than kept for the next request. So what idle clients keep is never more
    /// than half.
    pub(crate) fn is_short(&self) -> bool {
        self.taken.load(Relaxed) > self.limit / 2
    }

    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Relaxed)
    }
}
