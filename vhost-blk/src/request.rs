//! What a chain asks for: the only reader of what a guest puts into its descriptors.
//!
//! Invariant: a [`Request`] that comes out of [`parse`] is within the disk, in whole blocks, and of
//! a kind that was offered. Whatever else a guest writes is a [`RequestError`] and its status.
//! Absent: doing it. Lists are lent by the caller and reused, so that nothing is allocated per request.

use cbt::{ByteRange, SECTOR_BYTES, Sector};
use cow_engine::Zeroing;
use cow_engine::cbt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD as T_DISCARD, VIRTIO_BLK_T_FLUSH as T_FLUSH, VIRTIO_BLK_T_GET_ID as T_GET_ID,
    VIRTIO_BLK_T_IN as T_IN, VIRTIO_BLK_T_OUT as T_OUT, VIRTIO_BLK_T_WRITE_ZEROES as T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as FLAG_UNMAP,
};

use crate::ring::{Chain, ChainError};

/// `VIRTIO_BLK_S_OK`.
pub(crate) const STATUS_OK: u8 = 0;
/// `VIRTIO_BLK_S_IOERR`.
pub(crate) const STATUS_IOERR: u8 = 1;
/// `VIRTIO_BLK_S_UNSUPP`.
pub(crate) const STATUS_UNSUPP: u8 = 2;

/// Bytes in `struct virtio_blk_req` before its data: type, reserved, sector.
const HEADER_BYTES: usize = 16;
/// Bytes in `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;

/// Bytes of a serial (`VIRTIO_BLK_ID_BYTES`).
pub(crate) const ID_BYTES: usize = 20;
/// Ranges that one discard or write-zeroes may have.
pub(crate) const MAX_RANGES: u16 = 16;
/// Sectors that one such range may have: 64 MiB.
pub(crate) const MAX_RANGE_SECTORS: u32 = 64 << 11;
/// Bytes that one transfer may have. Firmware reads up to 1 GiB at once and knows no `seg_max`.
const MAX_TRANSFER_BYTES: u64 = 1 << 30;

/// Why a request is refused. The guest's mistake: it gets [`RequestError::status`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RequestError {
    /// Its chain is broken.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// There is no byte for a status, so that only the chain can be returned.
    #[error("a request without room for its status")]
    NoStatus,
    /// Fewer than 16 bytes of header.
    #[error("a request with a header of {0} bytes")]
    ShortHeader(u64),
    /// A type that we do not know, or that was not negotiated.
    #[error("a request of type {0}, which is not offered")]
    Unsupported(u32),
    /// A change to a read-only disk.
    #[error("a request to change a read-only disk")]
    ReadOnly,
    /// Data where there must be some, and is none, or too much.
    #[error("a request with {0} bytes of data")]
    DataLength(u64),
    /// Not whole blocks.
    #[error("{len} bytes at sector {first}, which are not whole blocks", first = first.get())]
    Unaligned {
        /// First sector.
        first: Sector,
        /// Bytes.
        len: u64,
    },
    /// Past the end of the disk.
    #[error("{len} bytes at sector {first}, past the end of the disk", first = first.get())]
    PastEnd {
        /// First sector.
        first: Sector,
        /// Bytes.
        len: u64,
    },
    /// More sectors than `max_discard_sectors` or `max_write_zeroes_sectors`.
    #[error("a range of {0} sectors, more than {MAX_RANGE_SECTORS}")]
    RangeTooLong(u32),
    /// Flags that the request may not have.
    #[error("a range with the flags {0:#x}")]
    Flags(u32),
}

impl RequestError {
    /// The status that the guest gets.
    pub(crate) fn status(self) -> u8 {
        match self {
            // VIRTIO 1.2 §5.2.6.2: unknown flags, and unmap in a discard, are UNSUPP.
            Self::Unsupported(_) | Self::Flags(_) => STATUS_UNSUPP,
            _ => STATUS_IOERR,
        }
    }
}

/// What a disk lets a request do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// The disk's size in bytes.
    pub(crate) capacity: u64,
    /// Bytes in a logical block: requests are of whole ones.
    pub(crate) block_bytes: u64,
    /// Nothing may change it.
    pub(crate) read_only: bool,
    /// Discard was negotiated.
    pub(crate) discard: bool,
    /// Write-zeroes was negotiated.
    pub(crate) write_zeroes: bool,
    /// Space may be given back.
    pub(crate) unmap: bool,
}

impl Rules {
    /// The bytes of the disk that a request names, if they are whole blocks of it.
    fn range(&self, first: Sector, len: u64) -> Result<ByteRange, RequestError> {
        let past_end = RequestError::PastEnd { first, len };
        let start = first.bytes().ok_or(past_end)?;
        let range = ByteRange::at(start, len).ok_or(past_end)?;
        if range.end() > self.capacity {
            return Err(past_end);
        }
        if !start.is_multiple_of(self.block_bytes) || !len.is_multiple_of(self.block_bytes) {
            return Err(RequestError::Unaligned { first, len });
        }
        Ok(range)
    }

    fn transfer(&self, first: Sector, len: u64) -> Result<u64, RequestError> {
        if len == 0 || len > MAX_TRANSFER_BYTES {
            return Err(RequestError::DataLength(len));
        }
        Ok(self.range(first, len)?.start())
    }
}

/// A range to make read as zeros, or to give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroRange {
    /// Which bytes.
    pub(crate) range: ByteRange,
    /// Whether its space is given back; of no meaning in a discard.
    pub(crate) zeroing: Zeroing,
}

/// A request that may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Fill what is left of the chain's writable part from byte `at` of the disk.
    Read { at: u64 },
    /// Write what is left of the chain's readable part at byte `at`.
    Write { at: u64 },
    /// Make all answered writes durable.
    Flush,
    /// The contents of the ranges are not needed any more.
    Discard,
    /// Make the ranges read as zeros.
    WriteZeroes,
    /// Tell the serial.
    GetId,
}

/// Reads what `chain` asks for. Takes the header off its readable and the status byte off its
/// writable part, so that what is left is data; `ranges` receives those of a discard or write-zeroes.
///
/// After an error the status byte has been split off if there is one.
pub(crate) fn parse(
    chain: &mut Chain,
    rules: &Rules,
    ranges: &mut Vec<ZeroRange>,
) -> Result<Request, RequestError> {
    ranges.clear();
    let status = chain.writable.split_last();
    if let Some(fault) = chain.fault {
        return Err(fault.into());
    }
    if !status {
        return Err(RequestError::NoStatus);
    }
    let mut header = [0; HEADER_BYTES];
    let have = chain.readable.len();
    if !chain.readable.take_front(&mut header) {
        return Err(RequestError::ShortHeader(have));
    }
    let [t0, t1, t2, t3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let first = Sector::new(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]));
    let changes = || if rules.read_only { Err(RequestError::ReadOnly) } else { Ok(()) };
    match kind {
        T_IN => Ok(Request::Read { at: rules.transfer(first, chain.writable.len())? }),
        T_OUT => {
            changes()?;
            Ok(Request::Write { at: rules.transfer(first, chain.readable.len())? })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID if chain.writable.len() > 0 => Ok(Request::GetId),
        T_GET_ID => Err(RequestError::DataLength(0)),
        T_DISCARD if rules.discard => {
            changes()?;
            read_ranges(chain, rules, 0, ranges)?;
            Ok(Request::Discard)
        }
        T_WRITE_ZEROES if rules.write_zeroes => {
            changes()?;
            read_ranges(chain, rules, FLAG_UNMAP, ranges)?;
            Ok(Request::WriteZeroes)
        }
        _ => Err(RequestError::Unsupported(kind)),
    }
}

/// Reads and checks the ranges of a discard or write-zeroes; all are good, or none is done.
fn read_ranges(
    chain: &mut Chain,
    rules: &Rules,
    flags_allowed: u32,
    ranges: &mut Vec<ZeroRange>,
) -> Result<(), RequestError> {
    let len = chain.readable.len();
    let whole = len.is_multiple_of(RANGE_BYTES as u64);
    if len == 0 || !whole || len > u64::from(MAX_RANGES) * RANGE_BYTES as u64 {
        return Err(RequestError::DataLength(len));
    }
    let mut bytes = [0; RANGE_BYTES];
    while chain.readable.take_front(&mut bytes) {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = bytes;
        let first = Sector::new(u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]));
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        if flags & !flags_allowed != 0 {
            return Err(RequestError::Flags(flags));
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(RequestError::RangeTooLong(sectors));
        }
        let range = rules.range(first, u64::from(sectors) * SECTOR_BYTES)?;
        let unmap = flags & FLAG_UNMAP != 0 && rules.unmap;
        ranges.push(ZeroRange { range, zeroing: if unmap { Zeroing::Unmap } else { Zeroing::Keep } });
    }
    Ok(())
}

#[cfg(test)]
#[path = "request/tests.rs"]
mod tests;
