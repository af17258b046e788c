//! The change map: for each block the epoch of its last write.
//!
//! Invariant: cells only grow within a generation, and are marked before the data is submitted.
//! Absent: the current epoch and who may freeze a page; the engine's `Tracker` owns both.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::units::{BlockGrid, ByteRange};
use crate::{Cells, Epoch};

/// Bytes of the map that are frozen together.
pub const PAGE_BYTES: usize = 4096;

/// Blocks whose cells share a page of the map.
pub const CELLS_PER_PAGE: usize = PAGE_BYTES / size_of::<u32>();

/// A page of the map: [`CELLS_PER_PAGE`] cells that are frozen together.
pub type PageIndex = u64;

/// An epoch per block of one disk.
///
/// Costs 4 bytes a block: 64 MiB for 1 TiB of 64 KiB blocks, in the file's page cache and
/// resident only where touched.
///
/// Analogue: blksnap's `cbt_map`, which keeps one byte a block, twice, in kernel memory.
#[derive(Debug)]
pub struct Map<C> {
    cells: C,
    grid: BlockGrid,
    capacity: u64,
}

impl<C: Cells> Map<C> {
    /// Cells that a disk of `capacity` bytes needs, rounded up to whole pages.
    ///
    /// # Panics
    /// If the cells would not fit in this machine's address space.
    pub fn cells_needed(grid: BlockGrid, capacity: u64) -> usize {
        let pages = grid.count(capacity).div_ceil(CELLS_PER_PAGE as u64).max(1);
        usize::try_from(pages).expect("pages fit in memory") * CELLS_PER_PAGE
    }

    /// A map over `cells`, for a disk of `capacity` bytes.
    ///
    /// # Panics
    /// If there are fewer cells than [`Map::cells_needed`].
    pub fn new(cells: C, grid: BlockGrid, capacity: u64) -> Self {
        assert!(cells.cells().len() >= Self::cells_needed(grid, capacity));
        Self { cells, grid, capacity }
    }

    /// The grid of blocks.
    pub fn grid(&self) -> BlockGrid {
        self.grid
    }

    /// Bytes of the disk that the map covers.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The memory behind the map.
    pub fn cells(&self) -> &C {
        &self.cells
    }

    /// Pages in the map.
    pub fn pages(&self) -> u64 {
        (Self::cells_needed(self.grid, self.capacity) / CELLS_PER_PAGE) as u64
    }

    /// The pages that hold the cells of `range`.
    pub fn pages_of(&self, range: ByteRange) -> std::ops::Range<PageIndex> {
        let blocks = self.grid.covering(range);
        let per_page = CELLS_PER_PAGE as u64;
        (blocks.start / per_page)..blocks.end.div_ceil(per_page)
    }

    /// Marks the blocks touched by `range` as changed in `epoch`.
    ///
    /// `range` is in bytes, half-open, within the disk; it is rounded out to whole blocks.
    /// Call before the data is written: a stop in between may over-report, never under-report.
    ///
    /// # Panics
    /// If `range` passes the end of the disk; requests were checked where they entered.
    ///
    /// Analogue: blksnap's `cbt_map_set`.
    pub fn mark(&self, range: ByteRange, epoch: Epoch) {
        for cell in self.cells_of(range) {
            // A hot block's line stays shared between the queues' processors: no store if it holds.
            if cell.load(Relaxed) != epoch.get() {
                cell.store(epoch.get(), Relaxed);
            }
        }
    }

    /// Whether [`Map::mark`] would change nothing. What is loaded after this is not older than the marks.
    ///
    /// # Panics
    /// As [`Map::mark`].
    pub fn is_marked(&self, range: ByteRange, epoch: Epoch) -> bool {
        self.cells_of(range).iter().all(|cell| cell.load(Acquire) == epoch.get())
    }

    /// The cells of all blocks that `range` touches.
    fn cells_of(&self, range: ByteRange) -> &[AtomicU32] {
        assert!(range.end() <= self.capacity, "{range} passes the disk's end at {}", self.capacity);
        let blocks = self.grid.covering(range);
        // Both ends are below the number of cells, which is a usize.
        &self.cells.cells()[to_index(blocks.start)..to_index(blocks.end)]
    }

    /// Copies a page's cells into `out`, as they are now.
    pub fn copy_page(&self, page: PageIndex, out: &mut [u8; PAGE_BYTES]) {
        let first = to_index(page) * CELLS_PER_PAGE;
        crate::bulk::copy(&self.cells.cells()[first..first + CELLS_PER_PAGE], out);
    }

    /// Sets every cell of a page to [`Epoch::NEVER`], for the start of a new generation.
    pub fn clear_page(&self, page: PageIndex) {
        let first = to_index(page) * CELLS_PER_PAGE;
        for cell in &self.cells.cells()[first..first + CELLS_PER_PAGE] {
            // Also where it is zero: a page that could not be written is clean, and only a store has it written again.
            cell.store(0, Relaxed);
        }
    }
}

fn to_index(n: u64) -> usize {
    usize::try_from(n).expect("an index of a cell in memory")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::Changes;

    fn map_of(capacity: u64, block: u64) -> Map<Box<[AtomicU32]>> {
        let grid = BlockGrid::new(block).unwrap();
        let cells =
            (0..Map::<Box<[AtomicU32]>>::cells_needed(grid, capacity)).map(|_| AtomicU32::new(0)).collect();
        Map::new(cells, grid, capacity)
    }

    fn changes(map: &Map<Box<[AtomicU32]>>, since: u32) -> Vec<(u64, u64)> {
        let mut changes = Changes::new(map.grid(), map.capacity(), Epoch::new(since));
        let mut out = Vec::new();
        let mut page = Box::new([0; PAGE_BYTES]);
        for index in 0..map.pages() {
            map.copy_page(index, &mut page);
            changes.page(index, &page, |range| out.push((range.start(), range.end())));
        }
        changes.finish(|range| out.push((range.start(), range.end())));
        out
    }

    #[test]
    fn a_write_marks_every_block_it_touches() {
        let map = map_of(1 << 20, 4096);
        map.mark(ByteRange::new(4095, 4097), Epoch::FIRST);
        assert_eq!(changes(&map, 0), [(0, 8192)]);
    }

    #[test]
    fn the_last_block_is_cut_at_the_end_of_the_disk() {
        let map = map_of(65536 + 512, 65536);
        map.mark(ByteRange::new(65536, 65536 + 512), Epoch::FIRST);
        assert_eq!(changes(&map, 0), [(65536, 65536 + 512)]);
    }

    #[test]
    #[should_panic(expected = "passes the disk's end")]
    fn marking_past_the_end_is_refused() {
        map_of(65536, 4096).mark(ByteRange::new(65536, 65537), Epoch::FIRST);
    }

    #[test]
    fn ranges_join_across_pages_of_the_map() {
        let map = map_of(4096 * 3 * CELLS_PER_PAGE as u64, 4096);
        let border = 4096 * CELLS_PER_PAGE as u64;
        map.mark(ByteRange::new(border - 1, border + 1), Epoch::FIRST);
        assert_eq!(changes(&map, 0), [(border - 4096, border + 4096)]);
    }

    proptest! {
        #[test]
        fn the_map_answers_as_a_model_does(
            writes in prop::collection::vec((0u64..2_000_000, 1u64..300_000, 1u32..9), 0..60),
            since in 0u32..9,
        ) {
            let capacity = 2_400_000 / 512 * 512;
            let map = map_of(capacity, 4096);
            let mut model = BTreeMap::new();
            let mut sorted = writes;
            sorted.sort_by_key(|w| w.2);
            for (start, len, epoch) in sorted {
                let range = ByteRange::new(start, (start + len).min(capacity));
                map.mark(range, Epoch::new(epoch));
                prop_assert!(map.is_marked(range, Epoch::new(epoch)));
                prop_assert!(range.is_empty() || !map.is_marked(range, Epoch::new(epoch + 1)));
                for block in map.grid().covering(range) {
                    model.insert(block, epoch);
                }
            }
            let mut got = std::collections::BTreeSet::new();
            let mut last_end = None;
            for (start, end) in changes(&map, since) {
                prop_assert!(last_end.is_none_or(|last| last < start), "ranges are apart and ascending");
                last_end = Some(end);
                got.extend(map.grid().covering(ByteRange::new(start, end)));
            }
            let want = model.into_iter().filter(|&(_, e)| e > since).map(|(b, _)| b).collect();
            prop_assert_eq!(got, want);
        }
    }
}
