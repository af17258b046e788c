//! From pages of cells to ranges of bytes that changed between two instants.
//!
//! Invariant: ranges come in ascending order, apart from each other, cut at the disk's end.
//! Absent: where a page comes from (frozen with a snapshot, or live); the engine reads it.

use crate::Epoch;
use crate::bulk::{self, TOGETHER};
use crate::map::{CELLS_PER_PAGE, PAGE_BYTES, PageIndex};
use crate::units::{BlockGrid, ByteRange};

/// Collects the ranges that changed after `since`, page by page.
///
/// The pages are those of the later instant, so no upper bound is needed: they hold nothing later,
/// and were they ever to, it would be reported rather than missed.
#[derive(Debug)]
pub struct Changes {
    grid: BlockGrid,
    capacity: u64,
    since: Epoch,
    open: Option<ByteRange>,
}

impl Changes {
    /// Changes after `since`, exclusive, of a disk of `capacity` bytes.
    pub fn new(grid: BlockGrid, capacity: u64, since: Epoch) -> Self {
        Self { grid, capacity, since, open: None }
    }

    /// Takes in one page of little-endian cells; pages come in ascending order, and a page that is
    /// left out has no change. Ranges that are complete go to `emit`.
    pub fn page(&mut self, index: PageIndex, cells: &[u8; PAGE_BYTES], mut emit: impl FnMut(ByteRange)) {
        let since = self.since.get();
        let mut block = index * CELLS_PER_PAGE as u64;
        for together in cells.as_chunks::<{ 4 * TOGETHER }>().0 {
            let mut changed = bulk::above(together, since);
            while changed != 0 {
                self.add(block + u64::from(changed.trailing_zeros()), &mut emit);
                changed &= changed - 1;
            }
            block += TOGETHER as u64;
        }
    }

    /// The last range, if one is open.
    pub fn finish(self, mut emit: impl FnMut(ByteRange)) {
        if let Some(open) = self.open {
            emit(open);
        }
    }

    fn add(&mut self, block: u64, emit: &mut impl FnMut(ByteRange)) {
        let range = self.grid.range(block..block + 1, self.capacity);
        if range.is_empty() {
            return;
        }
        self.open = Some(match self.open {
            Some(open) if open.end() == range.start() => ByteRange::new(open.start(), range.end()),
            Some(open) => {
                emit(open);
                range
            }
            None => range,
        });
    }
}
