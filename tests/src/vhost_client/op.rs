//! Requests to the disk as values, and their ends.

use super::{Error, Result};
use crate::virtio::{request, status};

/// A request to the disk, and how its buffers lie in guest memory.
#[derive(Clone, Debug, Default)]
pub struct Op {
    /// The queue to use.
    pub queue: usize,
    /// One of [`request`], or anything else.
    pub kind: u32,
    /// First sector.
    pub sector: u64,
    /// Bytes that the device reads after the header.
    pub output: Vec<u8>,
    /// Bytes that the device writes before the status.
    pub input: u32,
    /// Bytes of each data segment; what they do not cover is one more. Empty: one segment.
    pub segments: Vec<u32>,
    /// Bytes by which each data segment is off its 512-byte boundary.
    pub misalign: u64,
    /// Pass the chain by an indirect table.
    pub indirect: bool,
}

impl Op {
    /// Reads `bytes` from `sector` on.
    pub fn read(sector: u64, bytes: u32) -> Self {
        Self { kind: request::IN, sector, input: bytes, ..Self::default() }
    }

    /// Writes `data` from `sector` on.
    pub fn write(sector: u64, data: &[u8]) -> Self {
        Self { kind: request::OUT, sector, output: data.to_vec(), ..Self::default() }
    }

    /// Flushes.
    pub fn flush() -> Self {
        Self { kind: request::FLUSH, ..Self::default() }
    }

    /// Asks for the serial.
    pub fn get_id() -> Self {
        Self { kind: request::GET_ID, input: request::ID_BYTES, ..Self::default() }
    }

    /// Discards ranges, each (first sector, sectors, flags).
    pub fn discard(ranges: &[(u64, u32, u32)]) -> Self {
        Self { kind: request::DISCARD, output: range_bytes(ranges), ..Self::default() }
    }

    /// Writes zeroes to ranges, each (first sector, sectors, flags).
    pub fn write_zeroes(ranges: &[(u64, u32, u32)]) -> Self {
        Self { kind: request::WRITE_ZEROES, output: range_bytes(ranges), ..Self::default() }
    }
}

fn range_bytes(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &(sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

/// A request that the device holds.
#[derive(Debug)]
#[must_use = "a ticket is redeemed by Client::finish"]
pub struct Ticket {
    pub(super) queue: usize,
    pub(super) head: u16,
    pub(super) kind: u32,
    pub(super) input: Vec<(u64, u32)>,
    pub(super) status: u64,
    /// Memory to give back.
    pub(super) owned: Vec<(u64, u64)>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The status byte, [`UNTOUCHED`](super::UNTOUCHED) if the device did not write it.
    pub status: u8,
    /// The data segments that the device could write.
    pub data: Vec<u8>,
    /// Bytes that the device says it wrote, status included.
    pub used: u32,
}

impl Reply {
    /// The data, if the status is OK.
    ///
    /// # Errors
    /// [`Error::Status`] otherwise.
    pub fn ok(self) -> Result<Vec<u8>> {
        if self.status == status::OK { Ok(self.data) } else { Err(Error::Status(self.status)) }
    }
}
