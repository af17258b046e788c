//! What a disk has done, counted where it is done and added up where it is asked for.
//!
//! Invariant: each queue's thread stores to its own [`QueueCounters`] only, so that counting costs no
//! locked instruction and no shared cache line.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a disk's queues have done since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that succeeded.
    pub reads: u64,
    /// Bytes they read.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Bytes they wrote.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Discards that succeeded, each of one or several ranges.
    pub discards: u64,
    /// Bytes they gave back.
    pub discarded_bytes: u64,
    /// Write-zeroes that succeeded, each of one or several ranges.
    pub write_zeroes: u64,
    /// Requests that the storage failed.
    pub errors: u64,
    /// Requests that were refused as the guest's mistake.
    pub refused: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// Interrupts sent.
    pub interrupts: u64,
}

/// One number, written by one thread.
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// Adds `n`; only the owning thread may.
    pub(crate) fn add(&self, n: u64) {
        self.set(self.get().wrapping_add(n));
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The numbers of one queue, on cache lines of their own.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct QueueCounters {
    pub(crate) reads: Count,
    pub(crate) read_bytes: Count,
    pub(crate) writes: Count,
    pub(crate) written_bytes: Count,
    pub(crate) flushes: Count,
    pub(crate) discards: Count,
    pub(crate) discarded_bytes: Count,
    pub(crate) write_zeroes: Count,
    pub(crate) errors: Count,
    pub(crate) refused: Count,
    pub(crate) in_flight: Count,
    pub(crate) interrupts: Count,
}

impl QueueCounters {
    pub(crate) fn add_to(&self, sum: &mut Counters) {
        sum.reads += self.reads.get();
        sum.read_bytes += self.read_bytes.get();
        sum.writes += self.writes.get();
        sum.written_bytes += self.written_bytes.get();
        sum.flushes += self.flushes.get();
        sum.discards += self.discards.get();
        sum.discarded_bytes += self.discarded_bytes.get();
        sum.write_zeroes += self.write_zeroes.get();
        sum.errors += self.errors.get();
        sum.refused += self.refused.get();
        sum.in_flight += self.in_flight.get();
        sum.interrupts += self.interrupts.get();
    }
}
