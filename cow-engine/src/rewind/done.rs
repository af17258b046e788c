//! Which grains of a rewind are back: a bit for each, by ordinal, in two copies.
//!
//! The mapped copy is exact: a bit survives this process the moment it is set. After the host has
//! stopped it proves nothing, since the kernel may have written it before the image. The synced copy is
//! written only with bits that were set before a flush of the image began which then succeeded.
//!
//! Invariant: a bit is set after what makes it true was written to the image, and never cleared.

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

use cbt::{CELLS_PER_PAGE, Cells};

use crate::error::Error;
use crate::format::PAGE;
use crate::memory::{Source, Target};
use crate::storage::{Durability, Storage};

const BITS: u64 = u32::BITS as u64;
const PER_PAGE: u64 = BITS * CELLS_PER_PAGE as u64;

/// See the module.
pub(super) struct Done<S: Storage> {
    cells: S::Cells,
    synced: S::File,
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
    /// The bits as they are in `cells`, none of which need be in `synced`.
    pub(super) fn new(cells: S::Cells, synced: S::File, grains: u64) -> Self {
        let set: u64 = cells.cells().iter().map(|cell| u64::from(cell.load(Relaxed).count_ones())).sum();
        let pages = cells.cells().len() / CELLS_PER_PAGE;
        let numbers = |first: u32| (0..pages).map(|_| AtomicU32::new(first)).collect();
        Self {
            cells,
            synced,
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
        self.cells.cells()[cell_of(ordinal)].load(Acquire) & bit(ordinal) != 0
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
            let cell = self.cells.cells()[cell_of(at)].load(Acquire);
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
            let before = self.cells.cells()[cell_of(at)].fetch_or(mask, Release);
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
            let cells = &self.cells.cells()[page * CELLS_PER_PAGE..(page + 1) * CELLS_PER_PAGE];
            for (cell, out) in cells.iter().zip(bytes.chunks_exact_mut(size_of::<u32>())) {
                out.copy_from_slice(&cell.load(Acquire).to_le_bytes());
            }
            captured.push((page, changed, bytes));
        }
        captured
    }

    /// Makes what was captured durable, after the flush of the image.
    pub(super) async fn save(&self, io: &S, captured: &Captured) -> Result<(), Error> {
        if captured.is_empty() {
            return Ok(());
        }
        let fail = || Error::io("noting durably what a rewind has brought back");
        for (page, _, bytes) in captured {
            let at = (page * PAGE) as u64;
            let written = io.write(&self.synced, at, Source::of(&bytes[..]), Durability::Cached).await;
            written.map_err(fail())?;
        }
        io.sync(&self.synced).await.map_err(fail())?;
        for (page, changed, _) in captured {
            self.saved[*page].store(*changed, Release);
        }
        Ok(())
    }
}

/// Sets the cells to what the synced copy says: of the mapped one nothing is believed.
pub(super) async fn restore<S: Storage>(io: &S, cells: &S::Cells, synced: &S::File) -> Result<(), Error> {
    let mut bytes = [0; PAGE];
    for (page, cells) in cells.cells().chunks(CELLS_PER_PAGE).enumerate() {
        let read = io.read(synced, (page * PAGE) as u64, Target::of(&mut bytes)).await;
        read.map_err(Error::io("reading what a rewind has brought back"))?;
        for (cell, bytes) in cells.iter().zip(bytes.as_chunks::<4>().0) {
            cell.store(u32::from_le_bytes(*bytes), Relaxed);
        }
    }
    Ok(())
}

fn cell_of(ordinal: u64) -> usize {
    usize::try_from(ordinal / BITS).unwrap_or(usize::MAX)
}

fn bit(ordinal: u64) -> u32 {
    1 << (ordinal % BITS)
}

const _: () = assert!(PER_PAGE == PAGE as u64 * 8, "a page of cells is a page of the file");
