//! The seam to what is behind a disk: the engine, or memory in a test.
//!
//! Calls are dispatched statically. Futures stay on the thread that made them.
//! Absent: any check of the guest's; a [`crate::Device`] calls this with ranges inside the disk.

use std::fmt::Display;
use std::future::Future;

use cow_engine::cbt::ByteRange;
use cow_engine::host::HostStorage;
use cow_engine::memory::{Source, Target};
use cow_engine::{Durability, Zeroing};

/// What serves a disk's requests, for all of its queues at once.
///
/// A request that fails is answered to the guest as an I/O error, so a backend answers only with
/// failures that the guest has to know.
pub trait Backend: Send + Sync + 'static {
    /// What a queue's thread brings along to each request.
    type Lane: Copy + 'static;
    /// A failure, as the log tells it.
    type Error: Display;

    /// Size in bytes, which only grows. Asked for each request.
    fn capacity(&self) -> u64;

    /// A lane for one more thread.
    fn lane(&self) -> Self::Lane;

    /// While a thread of the disk's has said `true` once more than `false`, no request waits for what only an
    /// operator could give: the thread is about to stop its queue and waits for what is in flight.
    fn hurry(&self, hurry: bool) {
        let _ = hurry;
    }

    /// Fills `into` from byte `at`.
    fn read(
        &self,
        io: &HostStorage,
        lane: Self::Lane,
        at: u64,
        into: Target<'_>,
    ) -> impl Future<Output = Result<(), Self::Error>>;

    /// Writes `from` at byte `at`.
    fn write(
        &self,
        io: &HostStorage,
        lane: Self::Lane,
        at: u64,
        from: Source<'_>,
        durability: Durability,
    ) -> impl Future<Output = Result<(), Self::Error>>;

    /// Makes all answered writes durable.
    fn flush(&self, io: &HostStorage, lane: Self::Lane) -> impl Future<Output = Result<(), Self::Error>>;

    /// Gives a range back. What it reads as afterwards is the backend's choice.
    fn discard(
        &self,
        io: &HostStorage,
        lane: Self::Lane,
        range: ByteRange,
    ) -> impl Future<Output = Result<(), Self::Error>>;

    /// Makes a range read as zeros.
    fn write_zeroes(
        &self,
        io: &HostStorage,
        lane: Self::Lane,
        range: ByteRange,
        zeroing: Zeroing,
        durability: Durability,
    ) -> impl Future<Output = Result<(), Self::Error>>;
}
