//! The engine's overlays behind a device: a frozen disk that a guest may write to.
//!
//! Absent: the disk that the overlay stands on; nothing that passes here reaches it.

use cow_engine::cbt::ByteRange;
use cow_engine::host::HostStorage;
use cow_engine::memory::{Source, Target};
use cow_engine::{Durability, Error, Lane, Overlay, Zeroing};

use crate::backend::Backend;

impl Backend for Overlay<HostStorage> {
    type Lane = Lane;
    type Error = Error;

    fn capacity(&self) -> u64 {
        Overlay::capacity(self)
    }

    fn lane(&self) -> Lane {
        Overlay::lane(self)
    }

    async fn read(&self, io: &HostStorage, _lane: Lane, at: u64, into: Target<'_>) -> Result<(), Error> {
        Overlay::read(self, io, at, into).await
    }

    async fn write(
        &self,
        io: &HostStorage,
        lane: Lane,
        at: u64,
        from: Source<'_>,
        durability: Durability,
    ) -> Result<(), Error> {
        Overlay::write(self, io, lane, at, from, durability).await
    }

    async fn flush(&self, io: &HostStorage, _lane: Lane) -> Result<(), Error> {
        Overlay::flush(self, io).await
    }

    async fn discard(&self, io: &HostStorage, lane: Lane, range: ByteRange) -> Result<(), Error> {
        Overlay::discard(self, io, lane, range).await
    }

    async fn write_zeroes(
        &self,
        io: &HostStorage,
        lane: Lane,
        range: ByteRange,
        zeroing: Zeroing,
        durability: Durability,
    ) -> Result<(), Error> {
        Overlay::write_zeroes(self, io, lane, range, zeroing, durability).await
    }
}
