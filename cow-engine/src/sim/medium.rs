//! Files and directories of the simulated host: what readers see, and what would outlive a power cut.
//!
//! Invariant: a sector that is neither dirty nor lost is the same in the cache and on the medium.
//! Absent: time. Every function here acts at once; the scheduler decides when it is called.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use cbt::CELLS_PER_PAGE;

use super::FileKind;
use super::random::Random;

pub(super) const PAGE: usize = 4096;
pub(super) const SECTOR: usize = 512;

/// A page of a file. Its sectors are the bits of the masks.
#[derive(Clone)]
struct Page {
    data: Box<[u8; PAGE]>,
    /// On the medium, for sectors that are dirty or lost.
    old: Option<Box<[u8; PAGE]>>,
    /// Written since the last sync.
    dirty: u8,
    /// Dirty when a sync failed: the kernel does not write them again, so no later sync helps.
    lost: u8,
    hole: bool,
}

impl Page {
    fn hole() -> Self {
        Self { data: Box::new([0; PAGE]), old: None, dirty: 0, lost: 0, hole: true }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        let mask = mask_of(at..at + bytes.len());
        let fresh = mask & !(self.dirty | self.lost);
        if fresh != 0 {
            let old = self.old.get_or_insert_with(|| self.data.clone());
            for sector in sectors_of(fresh) {
                old[sector.clone()].copy_from_slice(&self.data[sector]);
            }
        }
        self.dirty |= mask;
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes what is from `rest` on from `other`.
    fn take_rest(&mut self, other: &Self, rest: usize) {
        let mask = mask_of(rest..PAGE);
        self.data[rest..].copy_from_slice(&other.data[rest..]);
        if let Some(theirs) = &other.old {
            let old = self.old.get_or_insert_with(|| self.data.clone());
            old[rest..].copy_from_slice(&theirs[rest..]);
        }
        self.dirty = self.dirty & !mask | other.dirty & mask;
        self.lost = self.lost & !mask | other.lost & mask;
    }

    fn clean(&mut self, mask: u8) {
        self.dirty &= !mask;
        self.lost &= !mask;
        if self.dirty | self.lost == 0 {
            self.old = None;
        }
    }
}

fn mask_of(bytes: Range<usize>) -> u8 {
    (bytes.start / SECTOR..bytes.end.div_ceil(SECTOR)).fold(0, |mask, sector| mask | 1 << sector)
}

fn sectors_of(mask: u8) -> impl Iterator<Item = Range<usize>> {
    (0..PAGE / SECTOR)
        .filter(move |sector| mask & (1 << sector) != 0)
        .map(|sector| sector * SECTOR..(sector + 1) * SECTOR)
}

/// The parts of a range of bytes in each page: page, place in the page, place in the range.
fn parts(at: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let here = at + done as u64;
        let skip = usize::try_from(here % PAGE as u64).unwrap_or(0);
        let n = (PAGE - skip).min(len - done);
        let part = (here / PAGE as u64, skip..skip + n, done..done + n);
        done += n;
        Some(part)
    })
}

/// Cells that a file may have at least before its memory would have to move.
const RESERVE: usize = 1 << 14;

/// The mapping of a file of cells: the same memory for every process of one boot.
struct Mapped {
    cells: Arc<[AtomicU32]>,
    synced: Vec<u32>,
    /// Pages that a sync failed to write, as they were: until they change no sync will.
    lost: BTreeMap<usize, Vec<u32>>,
}

impl Mapped {
    fn new(values: Vec<u32>) -> Self {
        let cells = values.iter().map(|&value| AtomicU32::new(value)).collect();
        Self { cells, synced: values, lost: BTreeMap::new() }
    }

    /// Whether a page of the first `count` cells has what a sync would write.
    fn is_dirty(&self, page: usize, count: usize) -> bool {
        let (first, now) = (page * CELLS_PER_PAGE, self.page(page, count));
        self.synced[first..first + now.len()] != now && self.lost.get(&page) != Some(&now)
    }

    /// The cells of a page of the first `count`, as they are.
    fn page(&self, page: usize, count: usize) -> Vec<u32> {
        let cells = &self.cells[page * CELLS_PER_PAGE..count.min((page + 1) * CELLS_PER_PAGE)];
        cells.iter().map(|cell| cell.load(SeqCst)).collect()
    }
}

/// Pages, and their sectors, that a sync has to make durable.
pub(super) type Captured = Vec<(u64, u8)>;

pub(super) struct File {
    pub(super) kind: FileKind,
    pub(super) len: u64,
    durable_len: u64,
    /// Lengths that it was given since the last sync, in this order: the medium may have come to any of them.
    lens: Vec<u64>,
    pub(super) mtime: u64,
    durable_mtime: u64,
    pub(super) failed_syncs: u64,
    /// A sync failed and nobody was told: the next one is.
    pub(super) untold_failure: bool,
    /// The kernel could not write back a page of the mapping by itself: the next sync of it is told.
    pub(super) untold_loss: bool,
    /// By itself or in a sync it could not, since the boot began.
    pub(super) has_lost: bool,
    /// Pages of the mapping, from its first on, that the process keeps in memory.
    pub(super) held: usize,
    pages: BTreeMap<u64, Page>,
    /// What a power cut may bring back: pages as they were when the file was cut, which no sync has made durable.
    cut_off: BTreeMap<u64, Page>,
    mapped: Option<Mapped>,
}

impl File {
    pub(super) fn new(kind: FileKind, len: u64) -> Self {
        Self {
            kind,
            len,
            durable_len: if kind == FileKind::Image { len } else { 0 },
            lens: Vec::new(),
            mtime: 0,
            durable_mtime: 0,
            failed_syncs: 0,
            untold_failure: false,
            untold_loss: false,
            has_lost: false,
            held: 0,
            pages: BTreeMap::new(),
            cut_off: BTreeMap::new(),
            mapped: None,
        }
    }

    pub(super) fn read(&self, at: u64, out: &mut [u8]) {
        for (page, place, part) in parts(at, out.len()) {
            match self.pages.get(&page) {
                Some(page) => out[part].copy_from_slice(&page.data[place]),
                None => out[part].fill(0),
            }
        }
    }

    /// As [`File::read`], through the mapping if there is one.
    pub(super) fn read_mapped(&self, at: u64, out: &mut [u8]) {
        self.read(at, out);
        let Some(mapped) = &self.mapped else { return };
        for (at, byte) in (at..).zip(out) {
            let cell = usize::try_from(at / 4).ok().and_then(|cell| mapped.cells.get(cell));
            let bytes = cell.map_or([0; 4], |cell| cell.load(SeqCst).to_le_bytes());
            *byte = bytes[usize::try_from(at % 4).unwrap_or(0)];
        }
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8], now: u64) {
        for (page, place, part) in parts(at, bytes.len()) {
            let page = self.pages.entry(page).or_insert_with(Page::hole);
            page.hole = false;
            page.write(place.start, &bytes[part]);
        }
        self.len = self.len.max(at + bytes.len() as u64);
        self.mtime = now;
    }

    /// Zeros a range; whole pages become holes if `unmap`.
    pub(super) fn zero(&mut self, at: u64, len: usize, unmap: bool, now: u64) {
        for (index, place, _) in parts(at, len) {
            if unmap && !self.pages.contains_key(&index) {
                continue;
            }
            let page = self.pages.entry(index).or_insert_with(Page::hole);
            page.write(place.start, &[0; PAGE][..place.len()]);
            page.hole = (page.hole || place.len() == PAGE) && unmap;
        }
        self.mtime = now;
    }

    /// Whether the page of byte `at` is a hole. What was stored through a mapping is seen once it was synced: there
    /// are file systems of which more cannot be said.
    pub(super) fn is_hole(&self, at: u64) -> bool {
        if let Some(mapped) = &self.mapped {
            let page = usize::try_from(at / PAGE as u64).unwrap_or(usize::MAX);
            let cells = mapped.synced.chunks(CELLS_PER_PAGE).nth(page);
            return cells.is_none_or(|cells| cells.iter().all(|&cell| cell == 0));
        }
        self.pages.get(&(at / PAGE as u64)).is_none_or(|page| page.hole)
    }

    /// Bytes of pages that are no holes.
    pub(super) fn allocated(&self) -> u64 {
        self.pages.values().filter(|page| !page.hole).count() as u64 * PAGE as u64
    }

    /// What a sync that begins now has to make durable.
    pub(super) fn capture(&self) -> Captured {
        let dirty = self.pages.iter().filter(|(_, page)| page.dirty != 0);
        dirty.map(|(&index, page)| (index, page.dirty)).collect()
    }

    pub(super) fn finish_sync(&mut self, captured: &Captured) {
        for (index, mask) in captured {
            if let Some(page) = self.pages.get_mut(index) {
                // Lost sectors stay lost unless they were written again.
                let dirty = page.dirty & mask;
                page.clean(dirty);
            }
        }
        self.durable_len = self.len;
        self.lens.clear();
        self.durable_mtime = self.mtime;
        self.cut_off.clear();
    }

    /// A sync failed: what it should have written counts as clean, and may or may not be there.
    pub(super) fn fail_sync(&mut self, captured: &Captured) {
        for (index, mask) in captured {
            if let Some(page) = self.pages.get_mut(index) {
                page.lost |= page.dirty & mask;
                page.dirty &= !mask;
            }
        }
        self.failed_syncs += 1;
    }

    /// This range is on the medium.
    fn settle(&mut self, at: u64, len: usize) {
        for (index, place, _) in parts(at, len) {
            if let Some(page) = self.pages.get_mut(&index) {
                page.clean(mask_of(place));
            }
        }
    }

    pub(super) fn allocate(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    pub(super) fn set_len(&mut self, len: u64, now: u64) {
        if len < self.len {
            let cut = self.cut_to(len);
            if len < self.durable_len {
                self.cut_off = cut;
            }
        }
        self.len = len;
        self.lens.push(len);
        self.mtime = now;
        if let Some(mapped) = &mut self.mapped {
            let count = usize::try_from(len / 4).unwrap_or(usize::MAX).min(mapped.synced.len());
            mapped.cells[count..].iter().for_each(|cell| cell.store(0, SeqCst));
            mapped.synced[count..].fill(0);
        }
    }

    /// The mapping's cells, and room for more; made of the file's bytes the first time.
    pub(super) fn map(&mut self, count: usize) -> Arc<[AtomicU32]> {
        if let Some(mapped) = self.mapped.as_ref().filter(|mapped| mapped.cells.len() >= count) {
            return mapped.cells.clone();
        }
        assert!(self.mapped.is_none(), "a simulated map has room for {RESERVE} cells");
        let mapped = Mapped::new(vec![0; count.max(RESERVE)]);
        let cells = mapped.cells.clone();
        self.mapped = Some(mapped);
        cells
    }

    pub(super) fn is_mapped_as(&self, cells: &Arc<[AtomicU32]>) -> bool {
        self.mapped.as_ref().is_some_and(|mapped| Arc::ptr_eq(&mapped.cells, cells))
    }

    /// The first `count` cells are durable.
    pub(super) fn sync_cells(&mut self, count: usize) {
        if let Some(mapped) = &mut self.mapped {
            for page in 0..count.div_ceil(CELLS_PER_PAGE) {
                let now = mapped.page(page, count);
                // Whoever clears a page stores zeros over zeros, too: it is dirty, though nobody sees a difference.
                if mapped.lost.get(&page) != Some(&now) || now.iter().all(|&cell| cell == 0) {
                    mapped.lost.remove(&page);
                    let first = page * CELLS_PER_PAGE;
                    mapped.synced[first..first + now.len()].copy_from_slice(&now);
                }
            }
        }
        self.durable_len = self.len;
        self.lens.clear();
    }

    /// A sync of the first `count` cells has failed: what had changed is clean, and not durable.
    pub(super) fn lose_cells(&mut self, count: usize) {
        let Some(mapped) = &mut self.mapped else { return };
        for page in 0..count.div_ceil(CELLS_PER_PAGE) {
            let now = mapped.page(page, count);
            let first = page * CELLS_PER_PAGE;
            if mapped.synced[first..first + now.len()] != now {
                mapped.lost.insert(page, now);
                self.has_lost = true;
            }
        }
    }

    /// The kernel fails to write back a page by itself. It is clean, and may leave memory if nobody holds it.
    pub(super) fn fail_write_back(&mut self, random: &mut Random) {
        let Some(mapped) = &self.mapped else { return };
        let (pages, count) = (mapped.cells.len().div_ceil(CELLS_PER_PAGE), mapped.cells.len());
        let dirty: Vec<usize> = (0..pages).filter(|&page| mapped.is_dirty(page, count)).collect();
        if !dirty.is_empty() {
            self.lose_page(*random.pick(&dirty));
        }
        if random.one_in(2) {
            self.forget_lost_cells();
        }
    }

    /// A page of the mapping, if it is dirty, is clean and not durable; the next sync is told.
    pub(super) fn lose_page(&mut self, page: usize) {
        let Some(mapped) = &mut self.mapped else { return };
        let count = mapped.cells.len();
        if mapped.is_dirty(page, count) {
            mapped.lost.insert(page, mapped.page(page, count));
            (self.untold_loss, self.has_lost) = (true, true);
        }
    }

    /// Whether a sync of the cells has to tell that the kernel had lost some. It tells it once.
    pub(super) fn tells_loss(&mut self) -> bool {
        std::mem::take(&mut self.untold_loss)
    }

    /// What is lost, and clean, leaves memory too, if nobody holds it: what the medium has is read from now on.
    pub(super) fn forget_lost_cells(&mut self) {
        let Some(mapped) = &mut self.mapped else { return };
        let lost = std::mem::take(&mut mapped.lost);
        for (page, then) in lost {
            let at = page * CELLS_PER_PAGE;
            // What was stored since made the page dirty again: it stays.
            if page < self.held || mapped.page(page, at + then.len()) != then {
                mapped.lost.insert(page, then);
                continue;
            }
            for nth in at..at + then.len() {
                mapped.cells[nth].store(mapped.synced[nth], SeqCst);
            }
        }
    }

    /// The cells as they are, to be put back by [`File::restore_cells`].
    pub(super) fn cells_now(&self) -> Option<Vec<u32>> {
        self.mapped.as_ref().map(|mapped| mapped.cells.iter().map(|cell| cell.load(SeqCst)).collect())
    }

    pub(super) fn restore_cells(&mut self, then: &[u32]) {
        if let Some(mapped) = &mut self.mapped {
            for (cell, then) in mapped.cells.iter().zip(then) {
                cell.store(*then, SeqCst);
            }
        }
    }

    /// What was not synced is, sector by sector, there or not.
    pub(super) fn power_cut(&mut self, random: &mut Random) {
        let keep = Keep::random(random);
        let len = match keep {
            Keep::All => self.len,
            Keep::None => self.durable_len,
            Keep::Some(_) => {
                let ends = [self.durable_len, self.len].into_iter();
                *random.pick(&ends.chain(self.lens.drain(..)).collect::<Vec<_>>())
            }
        };
        self.lens.clear();
        if len > self.len {
            self.bring_back(len);
        }
        self.cut_off.clear();
        for page in self.pages.values_mut() {
            let unsynced = page.dirty | page.lost;
            if let Some(old) = &page.old {
                for sector in sectors_of(unsynced) {
                    if !keep.flip(random) {
                        page.data[sector.clone()].copy_from_slice(&old[sector]);
                        page.hole = false;
                    }
                }
            }
            page.clean(unsynced);
        }
        if len < self.len {
            self.cut_to(len);
        }
        self.durable_len = self.len;
        if !keep.flip(random) {
            self.mtime = self.durable_mtime;
        }
        self.durable_mtime = self.mtime;
        if let Some(mapped) = self.mapped.take() {
            let keep = Keep::random(random);
            let mut values: Vec<u32> = mapped.cells.iter().map(|cell| cell.load(SeqCst)).collect();
            for (now, then) in values.chunks_mut(CELLS_PER_PAGE).zip(mapped.synced.chunks(CELLS_PER_PAGE)) {
                if !keep.flip(random) {
                    now.copy_from_slice(then);
                }
            }
            let count = usize::try_from(self.len / 4).unwrap_or(usize::MAX).min(values.len());
            values[count..].fill(0);
            if count > 0 {
                // New memory: whoever still held the old mapping is gone.
                self.mapped = Some(Mapped::new(values));
            }
        }
    }

    /// Cuts the file off at `len` bytes, durably.
    pub(super) fn cut(&mut self, len: u64) {
        if len >= self.len {
            return;
        }
        self.cut_to(len);
        self.durable_len = len;
        if let Some(mapped) = self.mapped.take() {
            let count = usize::try_from(len / 4).unwrap_or(usize::MAX).min(mapped.cells.len());
            let mut values: Vec<u32> = mapped.cells[..count].iter().map(|cell| cell.load(SeqCst)).collect();
            // There is room for all that the file may have again.
            values.resize(mapped.cells.len(), 0);
            self.mapped = Some(Mapped::new(values));
        }
    }

    /// Changes up to `len` bytes from `at` on that the file has, in the cache and on the medium.
    pub(super) fn change(&mut self, at: u64, len: usize, change: impl FnOnce(&mut [u8])) {
        let len = len.min(usize::try_from(self.len.saturating_sub(at)).unwrap_or(len));
        if len == 0 {
            return;
        }
        let mut bytes = vec![0; len];
        self.read_mapped(at, &mut bytes);
        change(&mut bytes);
        if let Some(mapped) = &mut self.mapped {
            for (at, byte) in (at..).zip(bytes) {
                let cell = usize::try_from(at / 4).ok().filter(|&cell| cell < mapped.synced.len());
                let Some(cell) = cell else { return };
                let mut word = mapped.cells[cell].load(SeqCst).to_le_bytes();
                word[usize::try_from(at % 4).unwrap_or(0)] = byte;
                mapped.cells[cell].store(u32::from_le_bytes(word), SeqCst);
                mapped.synced[cell] = u32::from_le_bytes(word);
            }
            return;
        }
        let now = self.mtime;
        self.write(at, &bytes, now);
        self.settle(at, len);
    }

    /// Answers the pages that went, also the one that went in part.
    fn cut_to(&mut self, len: u64) -> BTreeMap<u64, Page> {
        self.len = len;
        let (whole, rest) = (len / PAGE as u64, usize::try_from(len % PAGE as u64).unwrap_or(0));
        let beyond = self.pages.split_off(&whole);
        if let Some(page) = beyond.get(&whole).filter(|_| rest != 0) {
            let mut page = page.clone();
            page.data[rest..].fill(0);
            self.pages.insert(whole, page);
        }
        beyond
    }

    /// The file has a length again that it had, and what was cut off; anything else is zeros.
    fn bring_back(&mut self, len: u64) {
        let rest = usize::try_from(self.len % PAGE as u64).unwrap_or(0);
        for (index, cut) in std::mem::take(&mut self.cut_off) {
            match self.pages.get_mut(&index) {
                Some(page) => page.take_rest(&cut, rest),
                None => drop(self.pages.insert(index, cut)),
            }
        }
        self.len = self.durable_len.max(self.len);
        if len < self.len {
            self.cut_to(len);
        }
        self.len = len;
    }
}

/// How much of what was not synced a power cut leaves.
#[derive(Clone, Copy)]
enum Keep {
    All,
    None,
    Some(u64),
}

impl Keep {
    fn random(random: &mut Random) -> Self {
        match random.below(6) {
            0 => Self::All,
            1 => Self::None,
            n => Self::Some(n),
        }
    }

    fn flip(self, random: &mut Random) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Some(of) => random.below(7) < of,
        }
    }
}

enum Change {
    Made(String, u64),
    Removed(String),
}

/// A directory: its names now, and its names on the medium.
#[derive(Default)]
pub(super) struct Dir {
    pub(super) names: BTreeMap<String, u64>,
    durable: BTreeMap<String, u64>,
    pending: Vec<Change>,
}

impl Dir {
    pub(super) fn add(&mut self, name: &str, file: u64) {
        self.names.insert(name.to_owned(), file);
        self.pending.push(Change::Made(name.to_owned(), file));
    }

    pub(super) fn remove(&mut self, name: &str) -> bool {
        let was = self.names.remove(name).is_some();
        if was {
            self.pending.push(Change::Removed(name.to_owned()));
        }
        was
    }

    /// Whether a name leads to `file`, or would after a power cut.
    pub(super) fn holds(&self, file: u64) -> bool {
        let made = |change: &Change| matches!(change, Change::Made(_, made) if *made == file);
        self.names.values().chain(self.durable.values()).any(|&named| named == file)
            || self.pending.iter().any(made)
    }

    pub(super) fn sync(&mut self) {
        self.durable.clone_from(&self.names);
        self.pending.clear();
    }

    /// Of the changes since the last sync, a random beginning is kept: a journal keeps their order.
    pub(super) fn power_cut(&mut self, random: &mut Random) {
        // Nothing of it more often than by chance.
        let keep = if random.one_in(4) { 0 } else { random.index(self.pending.len() + 1) };
        for change in self.pending.drain(..).take(keep) {
            match change {
                Change::Made(name, file) => {
                    self.durable.insert(name, file);
                }
                Change::Removed(name) => {
                    self.durable.remove(&name);
                }
            }
        }
        self.names.clone_from(&self.durable);
    }
}
