//! The configuration space of a block device, byte by byte (`struct virtio_blk_config`, VIRTIO 1.2 §5.2.4).
//!
//! Invariant: only `writeback` ever changes. Any part of 256 bytes may be read; what is beyond the
//! structure is zero.

use cow_engine::cbt::SECTOR_BYTES;

use crate::options::{DiscardMode, Options};
use crate::request::{MAX_RANGE_SECTORS, MAX_RANGES};

/// Bytes that a front end may read; those behind the structure are zero.
const SPACE_BYTES: usize = 256;

/// Bytes of the structure up to the write-zeroes fields.
const STRUCT_BYTES: usize = 60;

/// Data segments that one request should have at most, as qemu-storage-daemon says: with header and
/// status that fills a queue of 128.
const SEG_MAX: u32 = 126;

/// Bytes that one segment should have at most.
const SIZE_MAX: u32 = 256 << 10;

/// Where the `writeback` byte is.
const WRITEBACK_AT: usize = 32;

/// A request for bytes that are not there or may not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {offset}..+{len} of the configuration space cannot be read or changed so")]
pub(crate) struct ConfigError {
    offset: u32,
    len: usize,
}

/// The configuration space, built when asked for.
pub(crate) fn bytes(options: &Options, capacity: u64, writeback: bool) -> [u8; STRUCT_BYTES] {
    let block = options.logical_block.bytes();
    let physical = options.physical_block.max(block);
    let exponent = u8::try_from((physical / block).checked_ilog2().unwrap_or(0)).unwrap_or(0);
    let blocks_per_physical = u16::try_from(physical / block).unwrap_or(1);
    let unmap = !options.read_only && options.discard == DiscardMode::Unmap;
    let zeroes = !options.read_only;
    let range = |offered: bool| if offered { MAX_RANGE_SECTORS } else { 0 };
    let ranges = |offered: bool| if offered { u32::from(MAX_RANGES) } else { 0 };
    let alignment_sectors = u32::try_from(u64::from(physical) / SECTOR_BYTES).unwrap_or(1);

    let mut config = [0; STRUCT_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(capacity / SECTOR_BYTES).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    // 16..20 is the geometry, which is not offered.
    put(20, &block.to_le_bytes());
    put(24, &[exponent, 0]);
    put(26, &blocks_per_physical.to_le_bytes());
    put(28, &u32::from(blocks_per_physical).to_le_bytes());
    put(WRITEBACK_AT, &[u8::from(writeback)]);
    put(34, &options.queues.to_le_bytes());
    put(36, &range(unmap).to_le_bytes());
    put(40, &ranges(unmap).to_le_bytes());
    put(44, &if unmap { alignment_sectors } else { 0 }.to_le_bytes());
    put(48, &range(zeroes).to_le_bytes());
    put(52, &ranges(zeroes).to_le_bytes());
    put(56, &[u8::from(unmap)]);
    config
}

/// `len` bytes at `offset` of the space (`VHOST_USER_GET_CONFIG`).
pub(crate) fn read(config: &[u8; STRUCT_BYTES], offset: u32, len: u32) -> Result<Vec<u8>, ConfigError> {
    let mut space = [0; SPACE_BYTES];
    space[..STRUCT_BYTES].copy_from_slice(config);
    let (start, len) = (offset as usize, len as usize);
    let error = ConfigError { offset, len };
    let end = start.checked_add(len).ok_or(error)?;
    Ok(space.get(start..end).ok_or(error)?.to_vec())
}

/// What `writeback` becomes by a store of `bytes` at `offset` (`VHOST_USER_SET_CONFIG`).
pub(crate) fn written(offset: u32, bytes: &[u8]) -> Result<bool, ConfigError> {
    let error = ConfigError { offset, len: bytes.len() };
    let at = WRITEBACK_AT.checked_sub(offset as usize).ok_or(error)?;
    match bytes.get(at) {
        Some(0) => Ok(false),
        Some(1) => Ok(true),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::LogicalBlock;

    const MIB: u64 = 1 << 20;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let options = Options { queues: 5, logical_block: LogicalBlock::B512, ..Options::default() };
        let config = bytes(&options, 3 * MIB, true);
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(config[..8], (3 * MIB / 512).to_le_bytes());
        assert_eq!((u32_at(8), u32_at(12), u32_at(16), u32_at(20)), (256 << 10, 126, 0, 512));
        assert_eq!(config[24..34], [3, 0, 8, 0, 8, 0, 0, 0, 1, 0]);
        assert_eq!(config[34..36], [5, 0]);
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (131_072, 16, 8));
        assert_eq!((u32_at(48), u32_at(52), config[56]), (131_072, 16, 1));
        assert_eq!(config[57..], [0, 0, 0]);
    }

    #[test]
    fn what_is_not_offered_is_zero() {
        let keep = Options { discard: DiscardMode::Ignore, ..Options::default() };
        let config = bytes(&keep, MIB, false);
        assert_eq!((config[WRITEBACK_AT], &config[36..48], config[56]), (0, &[0; 12][..], 0));
        assert_ne!(config[48..52], [0; 4]);
        let fixed = Options { read_only: true, ..Options::default() };
        assert_eq!(bytes(&fixed, MIB, true)[36..], [0; 24]);
    }

    #[test]
    fn any_part_may_be_read_and_the_rest_is_zero() {
        let config = bytes(&Options::default(), MIB, true);
        assert_eq!(read(&config, 0, 57).unwrap(), config[..57]);
        assert_eq!(read(&config, 20, 4).unwrap(), 512u32.to_le_bytes());
        assert_eq!(read(&config, 56, 8).unwrap(), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read(&config, 0, 256).unwrap().len(), 256);
        for (offset, len) in [(0, 257), (256, 1), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(read(&config, offset, len).is_err());
        }
    }

    #[test]
    fn only_writeback_can_be_written() {
        assert_eq!(written(32, &[0]), Ok(false));
        assert_eq!(written(32, &[1]), Ok(true));
        assert_eq!(written(0, &[1; 60]), Ok(true));
        for (offset, bytes) in [(32, &[2][..]), (33, &[1]), (0, &[1; 32]), (32, &[]), (u32::MAX, &[1])] {
            assert!(written(offset, bytes).is_err());
        }
    }
}
