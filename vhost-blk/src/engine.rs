//! The engine's disks behind a device.
//!
//! Absent: anything of snapshots; a device's requests are all that passes here.

use std::sync::Arc;

use cow_engine::cbt::ByteRange;
use cow_engine::host::HostStorage;
use cow_engine::memory::{Source, Target};
use cow_engine::{Disk, Durability, Error, Lane, Zeroing};

use crate::backend::Backend;

impl Backend for Arc<Disk<HostStorage>> {
    type Lane = Lane;
    type Error = Error;

    fn capacity(&self) -> u64 {
        Disk::capacity(self)
    }

    fn lane(&self) -> Lane {
        Disk::lane(self)
    }

    fn hurry(&self, hurry: bool) {
        Disk::hurry(self, hurry);
    }

    async fn read(&self, io: &HostStorage, _lane: Lane, at: u64, into: Target<'_>) -> Result<(), Error> {
        Disk::read(self, io, at, into).await
    }

    async fn write(
        &self,
        io: &HostStorage,
        lane: Lane,
        at: u64,
        from: Source<'_>,
        durability: Durability,
    ) -> Result<(), Error> {
        Disk::write(self, io, lane, at, from, durability).await
    }

    async fn flush(&self, io: &HostStorage, _lane: Lane) -> Result<(), Error> {
        Disk::flush(self, io).await
    }

    async fn discard(&self, io: &HostStorage, lane: Lane, range: ByteRange) -> Result<(), Error> {
        Disk::discard(self, io, lane, range).await
    }

    async fn write_zeroes(
        &self,
        io: &HostStorage,
        lane: Lane,
        range: ByteRange,
        zeroing: Zeroing,
        durability: Durability,
    ) -> Result<(), Error> {
        Disk::write_zeroes(self, io, lane, range, zeroing, durability).await
    }
}
