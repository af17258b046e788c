//! A disk's history at run time: generation, epoch, the change map, and which of its pages the
//! newest snapshot has seen for the last time.
//!
//! Invariant: a page of the map is in the newest snapshot's store, published, before a block of it
//! is marked in a later epoch than the snapshot's; so a snapshot's changes are frozen at its instant
//! without copying the map.
//! Absent: where frozen pages go ([`crate::snapshot`]) and who freezes them ([`crate::disk`]).

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, fence};

use arc_swap::ArcSwap;
use cbt::{BlockGrid, ByteRange, CELLS_PER_PAGE, Cells, Epoch, Generation, Map, PAGE_BYTES, PageIndex};

use crate::format::checksum;
use crate::marked::Marked;

/// What tells one image from another, and whether it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device that holds the image (`st_dev`). Numbers may differ after a reboot.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change of content, in nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// Words in the first page of the map file: what must survive the process without an I/O that
/// could fail.
pub(crate) struct Control<C> {
    cells: Arc<C>,
}

/// Cells before the map's: one page.
pub(crate) const CONTROL_CELLS: usize = CELLS_PER_PAGE;
/// Pages of the map's file before its own.
pub(crate) const CONTROL_PAGES: u64 = 1;
const BROKEN_UP_TO: usize = 0;
const FLUSH_FAILED: usize = 1;
const REWIND_VOID: usize = 2;
pub(crate) const LOG_DOUBT: usize = 3;
pub(crate) const MAP_DOUBT: usize = 4;
const WORDS_LOST: usize = 5;
pub(crate) const MAP_FAILURES: usize = 6;
// 16 and 24 to 37 are the sign of life: see `away::note`.
/// From here on a word per snapshot, by its number.
const RECORDS: usize = 64;

/// Snapshots that a disk may have at a time, deleted ones that are being merged included.
pub(crate) const MAX_SNAPSHOTS: usize = CONTROL_CELLS - RECORDS;

impl<C: Cells> Control<C> {
    pub(crate) fn new(cells: Arc<C>) -> Self {
        Self { cells }
    }

    pub(crate) fn cells(&self) -> &Arc<C> {
        &self.cells
    }

    /// All snapshots up to this number are broken, unless their heads say so themselves; 0 for none.
    pub(crate) fn broken_up_to(&self) -> u32 {
        self.word(BROKEN_UP_TO).load(SeqCst)
    }

    /// Notes that `sequence` is broken, at once and without fail. Answers what was noted before.
    pub(crate) fn note_broken(&self, sequence: u32) -> u32 {
        self.word(BROKEN_UP_TO).fetch_max(sequence, SeqCst)
    }

    /// The snapshot's head says that it is broken: the note of `sequence` is not needed any more.
    pub(crate) fn forget_broken(&self, sequence: u32) {
        // Another one that broke meanwhile has a note of its own, which stays.
        let _ = self.word(BROKEN_UP_TO).compare_exchange(sequence, 0, SeqCst, SeqCst);
    }

    /// Whether a flush of the image has failed since the host was started.
    pub(crate) fn flush_failed(&self) -> bool {
        self.word(FLUSH_FAILED).load(SeqCst) != 0
    }

    /// Notes whether a flush of the image has failed, at once and without fail.
    pub(crate) fn note_flush_failed(&self, failed: bool) {
        self.word(FLUSH_FAILED).store(failed.into(), SeqCst);
    }

    /// Whether the rewind that the superblock may name had failed, and is none.
    pub(crate) fn rewind_void(&self) -> bool {
        self.word(REWIND_VOID).load(SeqCst) != 0
    }

    /// Notes whether the rewind that the superblock may name is none, at once and without fail.
    pub(crate) fn note_rewind_void(&self, void: bool) {
        self.word(REWIND_VOID).store(void.into(), SeqCst);
    }

    /// Whether the intent log may lack regions since `boot` began.
    pub(crate) fn log_in_doubt(&self, boot: &[u8; 16]) -> bool {
        self.word(LOG_DOUBT).load(SeqCst) == tag_of(boot)
    }

    /// Notes that the intent log may lack regions, at once and without fail; or that it does not.
    pub(crate) fn note_log_in_doubt(&self, boot: &[u8; 16], doubt: bool) {
        self.word(LOG_DOUBT).store(if doubt { tag_of(boot) } else { 0 }, SeqCst);
    }

    /// Whether marks may be missing on the medium that no flush will write any more, since `boot` began.
    pub(crate) fn map_in_doubt(&self, boot: &[u8; 16]) -> bool {
        self.word(MAP_DOUBT).load(SeqCst) == tag_of(boot)
    }

    /// Notes that a flush of the map has failed, at once and without fail.
    pub(crate) fn note_map_in_doubt(&self, boot: &[u8; 16]) {
        self.word(MAP_DOUBT).store(tag_of(boot), SeqCst);
        self.write_again();
    }

    /// Has this page written again by the next flush: it may have been what the last one could not write.
    pub(crate) fn write_again(&self) {
        // Another value each time.
        self.word(MAP_FAILURES).fetch_add(1, SeqCst);
    }

    /// A new generation begins: what was marked before does not count.
    pub(crate) fn forget_map_in_doubt(&self) {
        self.word(MAP_DOUBT).store(0, SeqCst);
    }

    /// Whether words of `boot` may be older than what was noted.
    pub(crate) fn words_lost(&self, boot: &[u8; 16]) -> bool {
        self.word(WORDS_LOST).load(SeqCst) == tag_of(boot)
    }

    /// Notes that words of `boot` may be older than what was noted, at once and without fail.
    pub(crate) fn note_words_lost(&self, boot: &[u8; 16]) {
        self.word(WORDS_LOST).store(tag_of(boot), SeqCst);
        self.note_map_in_doubt(boot);
    }

    /// All words are as they should be again.
    pub(crate) fn forget_words_lost(&self) {
        self.word(WORDS_LOST).store(0, SeqCst);
    }

    /// Notes that `count` more records of a snapshot are written, before they are published.
    pub(crate) fn note_records(&self, sequence: u32, count: u32) {
        self.records_word(sequence).fetch_add(count, SeqCst);
    }

    /// Notes how many records of a snapshot are written.
    pub(crate) fn set_records(&self, sequence: u32, count: u32) {
        self.records_word(sequence).store(count, SeqCst);
    }

    /// How many records of a snapshot are written at least, modulo 2^32.
    pub(crate) fn records(&self, sequence: u32) -> u32 {
        self.records_word(sequence).load(SeqCst)
    }

    fn records_word(&self, sequence: u32) -> &AtomicU32 {
        self.word(RECORDS + sequence as usize % MAX_SNAPSHOTS)
    }

    pub(crate) fn word(&self, index: usize) -> &AtomicU32 {
        &self.cells.cells()[index]
    }
}

/// The control words of a map that is only looked at.
pub(crate) struct WordsOf(Box<[AtomicU32]>);

impl WordsOf {
    /// From the map's first page.
    pub(crate) fn from_page(page: &[u8; PAGE_BYTES]) -> Self {
        let words = page.as_chunks::<4>().0.iter();
        Self(words.map(|&word| AtomicU32::new(u32::from_le_bytes(word))).collect())
    }
}

impl Cells for WordsOf {
    fn cells(&self) -> &[AtomicU32] {
        &self.0
    }
}

/// Tells one boot from others; never 0. Two that have the same cost a full backup, and nothing else.
fn tag_of(boot: &[u8; 16]) -> u32 {
    checksum(&[b"boot", boot]).get() | 1
}

/// The map's cells: all but the control page.
pub(crate) struct MapCells<C>(Arc<C>);

impl<C: Cells> Cells for MapCells<C> {
    fn cells(&self) -> &[AtomicU32] {
        &self.0.cells()[CONTROL_CELLS..]
    }
}

/// The change map of a disk that is tracked.
pub(crate) struct Tracker<C> {
    map: Map<MapCells<C>>,
    /// For each page of the map the epoch in which it may be marked.
    opened: Box<[AtomicU32]>,
    marked: Marked,
}

impl<C: Cells> Tracker<C> {
    /// Cells that a map file needs, its control page included.
    pub(crate) fn cells_needed(grid: BlockGrid, capacity: u64) -> usize {
        CONTROL_CELLS + Map::<MapCells<C>>::cells_needed(grid, capacity)
    }

    pub(crate) fn new(cells: Arc<C>, grid: BlockGrid, capacity: u64) -> Self {
        let map = Map::new(MapCells(cells), grid, capacity);
        let opened = (0..map.pages()).map(|_| AtomicU32::new(0)).collect();
        let marked = Marked::new(map.pages());
        Self { map, opened, marked }
    }

    /// The same history for a disk that has grown to `capacity` bytes, over a mapping of the same file that
    /// is long enough: pages that are open stay so.
    pub(crate) fn grown(&self, cells: Arc<C>, capacity: u64) -> Self {
        let mut grown = Self::new(cells, self.grid(), capacity);
        // Shared: changes that are on their way mark through this one.
        grown.marked = self.marked.grown(grown.page_count());
        for (new, old) in grown.opened.iter().zip(&self.opened) {
            new.store(old.load(Acquire), Release);
        }
        grown
    }

    /// The mapping of the map's file, its control page included.
    pub(crate) fn cells(&self) -> &Arc<C> {
        &self.map.cells().0
    }

    pub(crate) fn grid(&self) -> BlockGrid {
        self.map.grid()
    }

    /// Pages of the map, without its control page.
    pub(crate) fn page_count(&self) -> u64 {
        self.map.pages()
    }

    pub(crate) fn pages_of(&self, range: ByteRange) -> std::ops::Range<PageIndex> {
        self.map.pages_of(range)
    }

    /// Whether all pages of `range` may be marked in `epoch`.
    pub(crate) fn is_open(&self, range: ByteRange, epoch: Epoch) -> bool {
        self.pages_of(range).all(|page| self.is_page_open(page, epoch))
    }

    pub(crate) fn is_page_open(&self, page: PageIndex, epoch: Epoch) -> bool {
        self.opened(page).load(Acquire) == epoch.get()
    }

    /// The page is preserved, or nobody will ask for it: it may be marked in `epoch`.
    pub(crate) fn open_page(&self, page: PageIndex, epoch: Epoch) {
        self.opened(page).store(epoch.get(), Release);
    }

    fn opened(&self, page: PageIndex) -> &AtomicU32 {
        // A page's index is below the number of pages, which is a usize.
        &self.opened[usize::try_from(page).unwrap_or(usize::MAX)]
    }

    /// Marks the blocks of `range`. When this returns, everybody sees the marks before what the caller looks at next.
    ///
    /// A look that came before the marks were seen could find a region hot after whoever makes it cold has made the
    /// map durable without them: see [`crate::intent`]. A mark of our own is behind a fence. One that was found stands
    /// without: most processors show a store to all others at once, so what was loaded everybody sees, and what this
    /// thread stored itself lies behind the fence of that time.
    pub(crate) fn mark(&self, range: ByteRange, epoch: Epoch) {
        // What is marked already was noted by whoever did it, or was there before the map was mapped.
        if !self.map.is_marked(range, epoch) {
            // First: who finds the mark finds its page.
            self.marked.note(self.pages_of(range));
            self.map.mark(range, epoch);
        } else if SHOWN_AT_ONCE {
            return;
        }
        fence(SeqCst);
    }

    /// The pages that may hold marks.
    pub(crate) fn marked(&self) -> &Marked {
        &self.marked
    }

    pub(crate) fn copy_page(&self, page: PageIndex, out: &mut [u8; PAGE_BYTES]) {
        self.map.copy_page(page, out);
    }

    pub(crate) fn clear_page(&self, page: PageIndex) {
        self.map.clear_page(page);
    }
}

/// Whether a store that one processor has seen all see ("multi-copy atomicity").
const SHOWN_AT_ONCE: bool =
    cfg!(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"));

/// Generation and epoch of a disk.
pub(crate) struct History {
    generation: ArcSwap<Generation>,
    epoch: AtomicU32,
}

impl History {
    pub(crate) fn new(generation: Generation, epoch: Epoch) -> Self {
        Self { generation: ArcSwap::from_pointee(generation), epoch: AtomicU32::new(epoch.get()) }
    }

    /// The unbroken history that now runs.
    pub(crate) fn generation(&self) -> Generation {
        **self.generation.load()
    }

    /// Begins a generation with `epoch`. The gate is closed. Who looks meanwhile without a pass may see it
    /// with the old epoch, which is an instant before its beginning: more than what changed.
    pub(crate) fn begin_generation(&self, generation: Generation, epoch: Epoch) {
        self.generation.store(Arc::new(generation));
        self.begin(epoch);
    }

    /// The epoch in which changes are marked now. Changes inside the gate see one value.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch::new(self.epoch.load(Relaxed))
    }

    /// Begins `epoch`. The gate is closed; its opening publishes this.
    pub(crate) fn begin(&self, epoch: Epoch) {
        self.epoch.store(epoch.get(), SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    const ROUNDS: usize = 200_000;
    const BLOCK: u64 = 4096;

    /// Lets two threads go on at the same time, as far as there are processors.
    fn meet(mine: &AtomicUsize, other: &AtomicUsize, round: usize) {
        mine.store(round, Release);
        for spins in 1_u32.. {
            if other.load(Acquire) >= round {
                return;
            }
            if spins.is_multiple_of(1000) {
                std::thread::yield_now();
            }
        }
    }

    /// The two looks of [`crate::intent`], each round at a block and a region of its own.
    #[test]
    fn a_mark_is_seen_before_the_next_look() {
        let grid = BlockGrid::new(BLOCK).expect("a grid");
        let capacity = ROUNDS as u64 * BLOCK;
        let count = Tracker::<Box<[AtomicU32]>>::cells_needed(grid, capacity);
        let cells: Box<[AtomicU32]> = (0..count).map(|_| AtomicU32::new(0)).collect();
        let tracker = Tracker::new(Arc::new(cells), grid, capacity);
        let hot: Vec<_> = (0..ROUNDS).map(|_| AtomicBool::new(true)).collect();
        let (at_marker, at_cooler) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let block = |round: usize| ByteRange::new(round as u64 * BLOCK, (round as u64 + 1) * BLOCK);
        let (found_hot, found_marked) = std::thread::scope(|scope| {
            let marker = scope.spawn(|| {
                let round = |round: usize| {
                    meet(&at_marker, &at_cooler, round + 1);
                    tracker.mark(block(round), Epoch::FIRST);
                    hot[round].load(Acquire)
                };
                (0..ROUNDS).map(round).collect::<Vec<_>>()
            });
            let cooler = scope.spawn(|| {
                let round = |round: usize| {
                    meet(&at_cooler, &at_marker, round + 1);
                    hot[round].store(false, Release);
                    fence(SeqCst);
                    tracker.map.is_marked(block(round), Epoch::FIRST)
                };
                (0..ROUNDS).map(round).collect::<Vec<_>>()
            });
            (marker.join().expect("the marker"), cooler.join().expect("the cooler"))
        });
        for (round, (hot, marked)) in found_hot.into_iter().zip(found_marked).enumerate() {
            assert!(marked || !hot, "round {round}: neither saw the other");
        }
    }
}
