//! Page cache that a difference store may take: what was written long ago goes to its medium and out of
//! the cache, so that a terabyte of first touches does not drive out everything else of the host.
//!
//! Invariant: what is told to [`Behind::note`] is written. A range may since have been given back or be
//! another's: writing it back early, or forgetting clean pages of it, changes nothing that anyone reads.
//! Absent: durability. A flush makes durable; this only bounds memory.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cbt::ByteRange;

use crate::storage::Storage;

/// Bytes on their way to the medium at a time when there are too many. A guest's request may come behind all of
/// them.
const UNDER_WAY: u64 = 8 << 20;

/// Bytes that one step waits for.
const STEP: u64 = 1 << 20;

/// How many of its bytes one of `count` may leave in the cache, if `all` have together so many and may have `kept`: what
/// is too much goes from those that have more than an even part.
///
/// What stays is worth it: a snapshot that is gone before has cost no transfer to the medium.
pub fn cache_share(kept: u64, all: u64, own: u64, count: usize) -> u64 {
    own.saturating_sub(all.saturating_sub(kept)).max(kept / count.max(1) as u64)
}

/// What is left to be written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backlog {
    /// Nothing that is due.
    Nothing,
    /// Something, which has time: the medium is the guests' first.
    Some,
    /// More than the host's memory should hold.
    TooMuch,
}

/// Ranges, oldest first, and how many bytes they have.
#[derive(Debug, Default)]
struct Queue {
    runs: VecDeque<ByteRange>,
    bytes: u64,
}

/// What was written to one file and is still in the cache.
#[derive(Debug, Default)]
pub(crate) struct Behind {
    written: Mutex<Queue>,
    /// On its way to the medium.
    begun: Mutex<Queue>,
    /// On the medium.
    clean: Mutex<Queue>,
}

impl Behind {
    /// Notes that `range` was written.
    pub(crate) fn note(&self, range: ByteRange) {
        lock(&self.written).push(range);
    }

    /// Bytes in the cache, as far as anyone here knows.
    pub(crate) fn cached(&self) -> u64 {
        lock(&self.written).bytes + lock(&self.clean).bytes
    }

    /// Does a bounded part of what is due if `kept` bytes may stay, and may wait for the medium; what is left then.
    ///
    /// # Errors
    /// Those of the medium: what was written is lost, and no later flush will say so.
    pub(crate) fn step<S: Storage>(&self, io: &S, file: &S::File, kept: u64) -> io::Result<Backlog> {
        let written = lock(&self.written).bytes;
        let clean = lock(&self.clean).pop_above(kept.saturating_sub(written), STEP);
        if let Some(run) = clean {
            io.drop_behind(file, run)?;
            return Ok(Backlog::of(written, kept).max(Backlog::Some));
        }
        // One that has time is waited for alone: behind it a guest's request waits least.
        let under_way = match Backlog::of(written, kept) {
            Backlog::TooMuch => UNDER_WAY,
            Backlog::Nothing | Backlog::Some => STEP,
        };
        while lock(&self.begun).bytes < under_way
            && let Some(run) = lock(&self.written).pop_above(kept, STEP)
        {
            io.write_behind(file, run)?;
            lock(&self.begun).push(run);
        }
        let Some(due) = lock(&self.begun).pop_above(0, STEP) else { return Ok(Backlog::Nothing) };
        io.drop_behind(file, due)?;
        Ok(Backlog::of(lock(&self.written).bytes, kept).max(Backlog::Some))
    }

    /// Writes a little back that is not due yet, and waits for that; whether there was something. A flush that
    /// comes when there is nothing more has little left to do at once, which guests would feel.
    ///
    /// # Errors
    /// As of [`Behind::step`].
    pub(crate) fn ease<S: Storage>(&self, io: &S, file: &S::File) -> io::Result<bool> {
        let oldest = lock(&self.written).pop_above(0, STEP);
        if let Some(run) = oldest {
            io.write_out(file, run)?;
            lock(&self.clean).push(run);
        }
        Ok(oldest.is_some())
    }
}

impl Backlog {
    /// Half as much again as may stay is too much: guests wait for the medium then rather than the host for its memory.
    fn of(written: u64, kept: u64) -> Self {
        if written > kept.saturating_add(kept / 2) {
            Self::TooMuch
        } else if written > kept {
            Self::Some
        } else {
            Self::Nothing
        }
    }
}

impl Queue {
    fn push(&mut self, range: ByteRange) {
        self.bytes += range.len();
        match self.runs.back_mut() {
            Some(last) if last.end() == range.start() => *last = ByteRange::new(last.start(), range.end()),
            _ => self.runs.push_back(range),
        }
    }

    /// Takes the oldest bytes, at most `most`, if there are more than `kept`.
    fn pop_above(&mut self, kept: u64, most: u64) -> Option<ByteRange> {
        if self.bytes <= kept {
            return None;
        }
        let first = self.runs.pop_front()?;
        let taken = ByteRange::new(first.start(), first.end().min(first.start() + most));
        if taken.end() < first.end() {
            self.runs.push_front(ByteRange::new(taken.end(), first.end()));
        }
        self.bytes -= taken.len();
        Some(taken)
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_more_than_an_even_part_gives_way() {
        assert_eq!(cache_share(1000, 900, 900, 1), 1000);
        assert_eq!(cache_share(1000, 1200, 1200, 1), 1000);
        // Idle ones leave their parts to one that is busy.
        assert_eq!(cache_share(1000, 900, 900, 10), 900);
        assert_eq!(cache_share(1000, 1200, 1100, 10), 900);
        assert_eq!(cache_share(1000, 1200, 60, 10), 100);
        assert_eq!(cache_share(1000, 2000, 1000, 2), 500);
    }

    #[test]
    fn the_oldest_goes_first_and_what_is_kept_stays() {
        let mut queue = Queue::default();
        queue.push(ByteRange::new(0, STEP));
        queue.push(ByteRange::new(STEP, 2 * STEP + 4096));
        queue.push(ByteRange::new(100 * STEP, 101 * STEP));
        assert_eq!(queue.runs.len(), 2, "neighbours are one run");
        assert_eq!(queue.pop_above(0, STEP), Some(ByteRange::new(0, STEP)));
        assert_eq!(queue.pop_above(STEP, STEP), Some(ByteRange::new(STEP, 2 * STEP)));
        assert_eq!(queue.pop_above(STEP, STEP), Some(ByteRange::new(2 * STEP, 2 * STEP + 4096)));
        assert_eq!(queue.pop_above(STEP, STEP), None);
        assert_eq!(queue.bytes, STEP);
    }
}
