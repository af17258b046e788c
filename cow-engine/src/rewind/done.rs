//! Which grains of a rewind are back: a bit for each, by ordinal, in three copies.
//!
//! The one in memory is what this process goes by. The mapped one survives this process: a bit is there for the
//! next one the moment it is set, unless the kernel cannot write its page back. Such a page is clean all the same and
//! may leave memory, and who reads it then finds fewer bits. Were that copy the only one, a grain that a guest has
//! written since would be the slot's again, and the copier would write over it. After the host has stopped it proves
//! nothing, since the kernel may have written it before the image. The synced copy is written only with bits that
//! were set before a flush of the image began which then succeeded. So its bits are true in every boot, and whoever
//! takes the mapped ones up adds them: what a flush had covered is not lost with a page. The others are lost as
//! what is in the page cache may be, and as there the next flush says so: the first one of a process that took
//! bits up flushes the mapped copy, too.
//!
//! Invariant: a bit is set after what makes it true was written to the image, and never cleared.

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};

use cbt::{CELLS_PER_PAGE, Cells};

use crate::error::Error;
use crate::format::PAGE;
use crate::memory::{Source, Target};
use crate::storage::Storage;

const BITS: u64 = u32::BITS as u64;
const PER_PAGE: u64 = BITS * CELLS_PER_PAGE as u64;

/// See the module.
pub(super) struct Done<S: Storage> {
    bits: Box<[AtomicU32]>,
    cells: S::Cells,
    synced: S::File,
    /// Nothing that an earlier process set is missing, as far as the kernel tells.
    whole: AtomicBool,
    left: AtomicU64,
    /// For each page how often it was changed, and what that was when it was last synced.
    changed: Box<[AtomicU32]>,
    saved: Box<[AtomicU32]>,
}

/// Pages with bits that a flush of the image will cover.
pub(super) type Captured = Vec<(usize, u32, Box<[u8; PAGE]>)>;

/// Cells that `grains` bits need, whole pages of them.
pub(super) fn cells_needed(grains: u64) -> usize {
    let cells = usize::try_from(grains.div_ceil(BITS)).expect("a bit for each grain fits in memory");
    cells.max(1).next_multiple_of(CELLS_PER_PAGE)
}

/// Bytes of a file of them.
pub(crate) fn bytes_needed(grains: u64) -> u64 {
    (cells_needed(grains) * size_of::<u32>()) as u64
}

impl<S: Storage> Done<S> {
    /// No grain is back. `cells` has no bit, and `synced` need not have the bytes.
    pub(super) fn new(cells: S::Cells, synced: S::File, grains: u64) -> Self {
        let bits = cells.cells().iter().map(|_| AtomicU32::new(0)).collect();
        Self::of_parts(bits, cells, synced, grains, true)
    }

    /// What the synced copy says, and `cells`, which are of an earlier process or empty if they are `new`.
    pub(super) async fn load(
        io: &S,
        cells: S::Cells,
        synced: S::File,
        grains: u64,
        new: bool,
    ) -> Result<Self, Error> {
        let mut bits = Vec::with_capacity(cells.cells().len());
        let mut bytes = [0; PAGE];
        for (page, cells) in cells.cells().chunks(CELLS_PER_PAGE).enumerate() {
            let read = io.read(&synced, (page * PAGE) as u64, Target::of(&mut bytes)).await;
            read.map_err(Error::io("reading what a rewind has brought back"))?;
            for (cell, bytes) in cells.iter().zip(bytes.as_chunks::<4>().0) {
                let synced = u32::from_le_bytes(*bytes);
                bits.push(AtomicU32::new(cell.fetch_or(synced, Relaxed) | synced));
            }
        }
        Ok(Self::of_parts(bits.into(), cells, synced, grains, new))
    }

    fn of_parts(bits: Box<[AtomicU32]>, cells: S::Cells, synced: S::File, grains: u64, whole: bool) -> Self {
        let set: u64 = bits.iter().map(|cell| u64::from(cell.load(Relaxed).count_ones())).sum();
        let pages = bits.len() / CELLS_PER_PAGE;
        let numbers = |first: u32| (0..pages).map(|_| AtomicU32::new(first)).collect();
        Self {
            bits,
            cells,
            synced,
            whole: AtomicBool::new(whole),
            left: AtomicU64::new(grains.saturating_sub(set)),
            changed: numbers(1),
            saved: numbers(0),
        }
    }

    /// Grains that are not back yet.
    pub(super) fn left(&self) -> u64 {
        self.left.load(SeqCst)
    }

    pub(super) fn has(&self, ordinal: u64) -> bool {
        self.bits[cell_of(ordinal)].load(Acquire) & bit(ordinal) != 0
    }

    /// Whether the first of `ordinals` is back, and where that ends.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn run(&self, ordinals: Range<u64>) -> (bool, u64) {
        let has = self.has(ordinals.start);
        let whole = if has { u32::MAX } else { 0 };
        let mut at = ordinals.start + 1;
        while at < ordinals.end {
            let cell = self.bits[cell_of(at)].load(Acquire);
            if at.is_multiple_of(BITS) && cell == whole {
                at += BITS;
            } else if (cell & bit(at) != 0) == has {
                at += 1;
            } else {
                break;
            }
        }
        (has, at.min(ordinals.end))
    }

    /// Grains that are back: what is in the image is theirs.
    pub(super) fn set(&self, ordinals: Range<u64>) {
        let mut at = ordinals.start;
        while at < ordinals.end {
            let end = ordinals.end.min((at / BITS + 1) * BITS);
            let mask = (at..end).fold(0, |mask, ordinal| mask | bit(ordinal));
            // For the next process first: nobody goes by a bit that it would not find.
            self.cells.cells()[cell_of(at)].fetch_or(mask, Release);
            let before = self.bits[cell_of(at)].fetch_or(mask, Release);
            self.left.fetch_sub(u64::from((mask & !before).count_ones()), SeqCst);
            // After the bit: who captures reads this first.
            self.changed[cell_of(at) / CELLS_PER_PAGE].fetch_add(1, Release);
            at = end;
        }
    }

    /// The pages that changed since they were synced. Before the flush of the image that covers them.
    pub(super) fn capture(&self) -> Captured {
        let mut captured = Captured::new();
        for page in 0..self.changed.len() {
            let changed = self.changed[page].load(Acquire);
            if self.saved[page].load(Acquire) == changed {
                continue;
            }
            let mut bytes = Box::new([0; PAGE]);
            let cells = &self.bits[page * CELLS_PER_PAGE..(page + 1) * CELLS_PER_PAGE];
            for (cell, out) in cells.iter().zip(bytes.chunks_exact_mut(size_of::<u32>())) {
                out.copy_from_slice(&cell.load(Acquire).to_le_bytes());
            }
            captured.push((page, changed, bytes));
        }
        captured
    }

    /// Makes what was captured durable, after the flush of the image. An error, too, if bits are lost that an earlier
    /// process had set: what was written to their grains is.
    pub(super) async fn save(&self, io: &S, captured: &Captured) -> Result<(), Error> {
        if !self.whole.load(Acquire) {
            let told = io.sync_cells(&self.cells);
            told.map_err(Error::io("flushing what a rewind had brought back"))?;
            self.whole.store(true, Release);
        }
        if captured.is_empty() {
            return Ok(());
        }
        let fail = || Error::io("noting durably what a rewind has brought back");
        for (page, _, bytes) in captured {
            let at = (page * PAGE) as u64;
            let written = io.write(&self.synced, at, Source::of(&bytes[..])).await;
            written.map_err(fail())?;
        }
        io.sync(&self.synced).await.map_err(fail())?;
        for (page, changed, _) in captured {
            self.saved[*page].store(*changed, Release);
        }
        Ok(())
    }
}

fn cell_of(ordinal: u64) -> usize {
    usize::try_from(ordinal / BITS).unwrap_or(usize::MAX)
}

fn bit(ordinal: u64) -> u32 {
    1 << (ordinal % BITS)
}

const _: () = assert!(PER_PAGE == PAGE as u64 * 8, "a page of cells is a page of the file");
