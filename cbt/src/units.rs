//! Units in which a disk is measured: bytes, sectors, and grids of equal cells.
//!
//! A plain integer at a wire becomes one of these on the next line. Ranges are half-open.
//! Absent: arithmetic that can wrap. What can overflow answers `None` or is an assertion.

use std::fmt;

/// Bytes in a sector: always 512, whatever the disk's logical block size (VIRTIO 1.2 §5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A position on a disk in sectors of 512 bytes (VIRTIO 1.2 §5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(u64);

impl Sector {
    /// The sector with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number as it stands on the wire.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The sector's first byte, or `None` past 2^64 bytes.
    pub fn bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_BYTES)
    }
}

/// A half-open range of bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The bytes from `start` up to, not including, `end`.
    ///
    /// # Panics
    /// If `start` is past `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        assert!(start <= end, "a range must not end before it starts");
        Self { start, end }
    }

    /// `len` bytes from `start`, or `None` if the end passes 2^64.
    pub fn at(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len).map(|end| Self { start, end })
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range has no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The bytes that both ranges have; empty (at the later start) if there are none.
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }

    /// Whether every byte of `other` is in this range.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {}..{}", self.start, self.end)
    }
}

/// A grid of equal cells laid over a disk: blocks of tracking, grains of preserving.
///
/// The cell size is a power of two in bytes; the last cell may reach past the disk's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGrid {
    shift: u32,
}

/// Why a cell size was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a block size must be a power of two from {min} to {max} bytes, not {got}", min = BlockGrid::MIN_BYTES, max = BlockGrid::MAX_BYTES)]
pub struct GridError {
    /// The size that was asked for, in bytes.
    pub got: u64,
}

impl BlockGrid {
    /// Smallest cell in bytes: 4 KiB.
    pub const MIN_BYTES: u64 = 4 << 10;
    /// Largest cell in bytes: 64 MiB.
    pub const MAX_BYTES: u64 = 64 << 20;

    /// A grid of cells of `bytes` each.
    pub fn new(bytes: u64) -> Result<Self, GridError> {
        if bytes.is_power_of_two() && (Self::MIN_BYTES..=Self::MAX_BYTES).contains(&bytes) {
            Ok(Self { shift: bytes.trailing_zeros() })
        } else {
            Err(GridError { got: bytes })
        }
    }

    /// Bytes in a cell.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// Cells that cover a disk of `capacity` bytes.
    pub const fn count(self, capacity: u64) -> u64 {
        capacity.div_ceil(1 << self.shift)
    }

    /// Indexes of the cells that `range` touches: rounded out, for marking and preserving.
    pub const fn covering(self, range: ByteRange) -> std::ops::Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        (range.start >> self.shift)..range.end.div_ceil(1 << self.shift)
    }

    /// Indexes of the cells that lie wholly in `range`: rounded in, for freeing.
    pub const fn contained(self, range: ByteRange) -> std::ops::Range<u64> {
        let first = range.start.div_ceil(1 << self.shift);
        let end = range.end >> self.shift;
        if end < first { first..first } else { first..end }
    }

    /// The bytes of cells `first..end`, cut at `capacity`.
    pub fn range(self, cells: std::ops::Range<u64>, capacity: u64) -> ByteRange {
        let start = (cells.start << self.shift).min(capacity);
        ByteRange::new(start, (cells.end << self.shift).min(capacity).max(start))
    }

    /// The cell that holds byte `at`.
    pub const fn index_of(self, at: u64) -> u64 {
        at >> self.shift
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_rounds_out_and_contained_rounds_in() {
        let grid = BlockGrid::new(4096).unwrap();
        let range = ByteRange::new(4095, 12289);
        assert_eq!(grid.covering(range), 0..4);
        assert_eq!(grid.contained(range), 1..3);
    }

    #[test]
    fn an_empty_range_touches_nothing() {
        let grid = BlockGrid::new(65536).unwrap();
        assert!(grid.covering(ByteRange::new(70000, 70000)).is_empty());
        assert!(grid.contained(ByteRange::new(70000, 70001)).is_empty());
    }

    #[test]
    fn the_last_cell_is_cut_at_the_capacity() {
        let grid = BlockGrid::new(65536).unwrap();
        assert_eq!(grid.count(65537), 2);
        assert_eq!(grid.range(0..2, 65537), ByteRange::new(0, 65537));
    }

    #[test]
    fn odd_block_sizes_are_refused_by_name() {
        assert_eq!(BlockGrid::new(65537), Err(GridError { got: 65537 }));
        assert!(BlockGrid::new(2048).is_err());
        assert!(BlockGrid::new(128 << 20).is_err());
    }

    #[test]
    fn ranges_at_the_end_of_the_number_line_do_not_wrap() {
        assert!(ByteRange::at(u64::MAX, 1).is_none());
        assert!(Sector::new(u64::MAX).bytes().is_none());
        let grid = BlockGrid::new(4096).unwrap();
        assert_eq!(grid.covering(ByteRange::new(u64::MAX - 1, u64::MAX)).end, 1 << 52);
    }
}
