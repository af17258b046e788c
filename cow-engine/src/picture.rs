//! A summary of the change map, for pictures: how recently, and how much, each part of a disk has changed.
//!
//! Computed from the live map in bounded time: at most [`LOOKS`] pages of it are read, and one for each cell
//! besides, and no page in which nothing was ever marked. Guests go on; what they mark meanwhile may be in it
//! or not, so it is no answer for a backup.
//!
//! The map knows the last change of each block only. So "busy" can mean one thing here: how many blocks of a
//! part have changed since an instant. How often they were written nobody knows.

use cbt::{BlockGrid, CELLS_PER_PAGE, Epoch, PAGE_BYTES};

use crate::disk::Disk;
use crate::error::Error;
use crate::storage::Storage;

/// Newest epochs that are told apart.
pub const RECENT: usize = 8;

/// Pages of the map that are read, spread evenly: those of 1 TiB with blocks of 64 KiB.
const LOOKS: u64 = 16_384;

/// A summary; see the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// The disk's size in bytes.
    pub capacity: u64,
    /// The blocks that are tracked.
    pub grid: BlockGrid,
    /// The epoch in which changes are marked now.
    pub epoch: Epoch,
    /// The instant after which [`Cell::since`] counts.
    pub since: Epoch,
    /// Cells that the disk is cut into.
    pub cells: u64,
    /// Blocks of a cell; the last may have fewer.
    pub cell_blocks: u64,
    /// The cells in which something has changed, in order.
    pub changed: Vec<Cell>,
    /// Whether every page was read; if not, the numbers of blocks are estimates.
    pub exact: bool,
}

/// A part of the disk in which something has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// Which; the first is 0.
    pub index: u64,
    /// The newest epoch of its blocks.
    pub newest: Epoch,
    /// Blocks that have changed in the generation.
    pub blocks: u64,
    /// Blocks that have changed after the instant in question.
    pub since: u64,
    /// Blocks that changed last in the current epoch, in the one before, and so on.
    pub recent: [u64; RECENT],
}

/// A cell while pages are looked at.
#[derive(Clone, Copy, Default)]
struct Tally {
    cell: Cell,
    /// Blocks of its newest epoch.
    of_newest: u64,
    /// Pages that begin in it, and those of them that were read.
    pages: u64,
    read: u64,
}

impl<S: Storage> Disk<S> {
    /// Summarises the change map in at most `cells` cells of whole blocks. Blocks the thread for
    /// some milliseconds.
    ///
    /// With `since` each cell tells how many blocks changed after that instant; without, after the newest
    /// instant after which anything changed.
    ///
    /// # Errors
    /// [`Error::NotTracked`].
    pub async fn picture(&self, io: &S, cells: u64, since: Option<Epoch>) -> Result<Picture, Error> {
        let untracked = || Error::NotTracked { disk: self.name().to_owned() };
        // First: whatever tracker is in use later covers it.
        let capacity = self.capacity();
        let tracker = self.marking().ok_or_else(untracked)?;
        self.look_for_marks_in(io, &tracker).await;
        let (grid, epoch) = (tracker.grid(), self.history.epoch());
        let blocks = grid.count(capacity);
        let cell_blocks = blocks.div_ceil(cells.max(1)).max(1);
        let pages = blocks.div_ceil(CELLS_PER_PAGE as u64);
        let runs = || tracker.marked().runs(0..pages);
        let touched: u64 = runs().map(|run| run.end - run.start).sum();
        let step = touched.div_ceil(LOOKS).max(1);
        let mut tallies = vec![Tally::default(); usize::try_from(blocks.div_ceil(cell_blocks)).unwrap_or(0)];
        let look = Look { epoch, since: since.unwrap_or(Epoch::LAST), cell_blocks, blocks };
        let mut content = Box::new([0; PAGE_BYTES]);
        for (nth, page) in (0..).zip(runs().flatten()) {
            let cell = usize::try_from(page * CELLS_PER_PAGE as u64 / cell_blocks).unwrap_or(usize::MAX);
            let first_of_cell = tallies[cell].pages == 0;
            tallies[cell].pages += 1;
            if u64::is_multiple_of(nth, step) || first_of_cell {
                tallies[cell].read += 1;
                tracker.copy_page(page, &mut content);
                look.page(page, &content, &mut tallies);
            }
        }
        let newest = tallies.iter().map(|tally| tally.cell.newest).max().unwrap_or(Epoch::NEVER);
        let counted = since.unwrap_or_else(|| newest.previous());
        let changed = (0..)
            .zip(&tallies)
            .filter(|(_, tally)| tally.cell.blocks > 0)
            .map(|(index, tally)| {
                let mut cell = Cell { index, ..tally.cell };
                if since.is_none() {
                    cell.since = if cell.newest == newest { tally.of_newest } else { 0 };
                }
                let most = (blocks - index * cell_blocks).min(cell_blocks);
                tally.scale(&mut cell, most);
                cell
            })
            .collect();
        let exact = step == 1;
        let cells = tallies.len() as u64;
        Ok(Picture { capacity, grid, epoch, since: counted, cells, cell_blocks, changed, exact })
    }
}

struct Look {
    epoch: Epoch,
    since: Epoch,
    cell_blocks: u64,
    blocks: u64,
}

impl Look {
    /// Counts the blocks of a page.
    fn page(&self, page: u64, content: &[u8; PAGE_BYTES], tallies: &mut [Tally]) {
        let first = page * CELLS_PER_PAGE as u64;
        let end = self.blocks.min(first + CELLS_PER_PAGE as u64);
        let marks = content.as_chunks::<4>().0;
        let mut block = first;
        while block < end {
            let cell = block / self.cell_blocks;
            let stop = end.min((cell + 1) * self.cell_blocks);
            let Some(tally) = usize::try_from(cell).ok().and_then(|cell| tallies.get_mut(cell)) else {
                return;
            };
            let within = |block: u64| usize::try_from(block - first).unwrap_or(0);
            // Neighbours mostly changed together.
            for run in marks[within(block)..within(stop)].chunk_by(|one, next| one == next) {
                let mark = Epoch::new(u32::from_le_bytes(run[0]));
                if mark != Epoch::NEVER {
                    tally.count(mark, run.len() as u64, self);
                }
            }
            block = stop;
        }
    }
}

impl Tally {
    /// Counts blocks that changed last in `mark`.
    fn count(&mut self, mark: Epoch, blocks: u64, look: &Look) {
        let cell = &mut self.cell;
        cell.blocks += blocks;
        cell.since += if mark > look.since { blocks } else { 0 };
        if mark > cell.newest {
            (cell.newest, self.of_newest) = (mark, 0);
        }
        self.of_newest += if mark == cell.newest { blocks } else { 0 };
        let age = look.epoch.get().saturating_sub(mark.get()) as usize;
        if let Some(count) = cell.recent.get_mut(age) {
            *count += blocks;
        }
    }

    /// Estimates a whole cell from the pages of it that were read.
    fn scale(&self, cell: &mut Cell, most: u64) {
        if self.read >= self.pages || self.read == 0 {
            return;
        }
        let whole = |count: u64| (count * self.pages / self.read).min(most);
        cell.blocks = whole(cell.blocks);
        cell.since = whole(cell.since);
        cell.recent = cell.recent.map(whole);
    }
}
