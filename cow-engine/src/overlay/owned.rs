//! Which grains are the overlay's own: a bit for each, in memory and in a shared mapping.
//!
//! Invariant: a bit is set after its grain is whole in the overlay's data, and never cleared; so who
//! finds it set may read and write the grain there without asking again. The mapping is allocated in
//! full: a bit survives this process the moment it is set, without an I/O that could fail.
//!
//! A page of the mapping that the kernel could not write back is clean all the same and may leave memory; who reads it
//! then finds fewer bits. So this process goes by those in memory. The next one takes up what is in the mapping: a
//! grain may be the view's again whose bit no flush had covered, as what is in the page cache may be lost when it
//! cannot be written. As there the next flush says so, once: the first one of a process flushes the mapping, whatever it
//! has set itself ([`super::layer`]).
//! Absent: the data, and who may work on a grain whose bit is not set ([`super::layer`]).

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};

use cbt::{CELLS_PER_PAGE, Cells};

use crate::format::GRAIN;

/// Cells before the bits: one page of words that must survive without being written.
const CONTROL_CELLS: usize = CELLS_PER_PAGE;
const FLUSH_FAILED: usize = 0;
const BITS: u64 = u32::BITS as u64;

/// See the module.
pub(super) struct Owned<C> {
    /// The same as in the mapping, if nothing was lost there.
    bits: Box<[AtomicU32]>,
    cells: C,
    count: AtomicU64,
}

impl<C: Cells> Owned<C> {
    /// Cells that an overlay of `capacity` bytes needs, whole pages of them.
    pub(super) fn cells_needed(capacity: u64) -> usize {
        let grains = capacity.div_ceil(GRAIN as u64);
        let bits = usize::try_from(grains.div_ceil(BITS)).expect("a map of the disk fits in memory");
        CONTROL_CELLS + bits.next_multiple_of(CELLS_PER_PAGE)
    }

    /// The bits as they are in `cells`.
    pub(super) fn new(cells: C) -> Self {
        let bits = cells.cells()[CONTROL_CELLS..].iter().map(|cell| AtomicU32::new(cell.load(Relaxed)));
        let bits: Box<[_]> = bits.collect();
        let count = bits.iter().map(|cell| u64::from(cell.load(Relaxed).count_ones())).sum();
        Self { bits, cells, count: AtomicU64::new(count) }
    }

    pub(super) fn cells(&self) -> &C {
        &self.cells
    }

    /// Grains that are the overlay's.
    pub(super) fn count(&self) -> u64 {
        self.count.load(SeqCst)
    }

    /// Whether a flush of the overlay has failed since the host was started.
    pub(super) fn flush_failed(&self) -> bool {
        self.cells.cells()[FLUSH_FAILED].load(SeqCst) != 0
    }

    /// Notes whether a flush of the overlay has failed, at once and without fail.
    pub(super) fn note_flush_failed(&self, failed: bool) {
        self.cells.cells()[FLUSH_FAILED].store(failed.into(), SeqCst);
    }

    /// Whether the overlay has `grain`.
    pub(super) fn has(&self, grain: u64) -> bool {
        self.cell(grain).load(Acquire) & bit(grain) != 0
    }

    /// Whether the overlay has all of `grains`.
    pub(super) fn has_all(&self, grains: Range<u64>) -> bool {
        grains.is_empty() || self.run(grains.clone()) == (true, grains.end)
    }

    /// Whether the overlay has the first of `grains`, and where that ends.
    ///
    /// # Panics
    /// If there is none.
    pub(super) fn run(&self, grains: Range<u64>) -> (bool, u64) {
        let has = self.has(grains.start);
        let whole = if has { u32::MAX } else { 0 };
        let mut at = grains.start + 1;
        while at < grains.end {
            let cell = self.cell(at).load(Acquire);
            if at.is_multiple_of(BITS) && cell == whole {
                at += BITS;
            } else if (cell & bit(at) != 0) == has {
                at += 1;
            } else {
                break;
            }
        }
        (has, at.min(grains.end))
    }

    /// Makes `grains` the overlay's, whose data is whole.
    pub(super) fn publish(&self, grains: Range<u64>) {
        let mut at = grains.start;
        while at < grains.end {
            let end = grains.end.min((at / BITS + 1) * BITS);
            let mask = (at..end).fold(0, |mask, grain| mask | bit(grain));
            // For the next process first: nobody goes by a bit that it would not find.
            self.cells.cells()[CONTROL_CELLS + index(at)].fetch_or(mask, Release);
            let before = self.cell(at).fetch_or(mask, Release);
            self.count.fetch_add(u64::from((mask & !before).count_ones()), SeqCst);
            at = end;
        }
    }

    fn cell(&self, grain: u64) -> &AtomicU32 {
        &self.bits[index(grain)]
    }
}

/// The cell of a grain's bit.
fn index(grain: u64) -> usize {
    usize::try_from(grain / BITS).unwrap_or(usize::MAX - CONTROL_CELLS)
}

fn bit(grain: u64) -> u32 {
    1 << (grain % BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(grains: u64) -> Owned<Box<[AtomicU32]>> {
        let count = Owned::<Box<[AtomicU32]>>::cells_needed(grains * GRAIN as u64);
        Owned::new((0..count).map(|_| AtomicU32::new(0)).collect())
    }

    #[test]
    fn runs_end_where_the_bits_change() {
        let owned = owned(1000);
        owned.publish(30..200);
        owned.publish(100..210);
        assert_eq!(owned.count(), 180);
        assert_eq!(owned.run(0..1000), (false, 30));
        assert_eq!(owned.run(30..1000), (true, 210));
        assert_eq!(owned.run(31..64), (true, 64));
        assert_eq!(owned.run(210..1000), (false, 1000));
        assert!(owned.has_all(30..210) && !owned.has_all(29..210) && !owned.has_all(30..211));
    }

    #[test]
    fn runs_are_those_of_a_plain_walk() {
        let owned = owned(512);
        let mut plain = vec![false; 512];
        for (start, end) in [(0, 1), (31, 33), (64, 96), (97, 130), (160, 320), (511, 512)] {
            owned.publish(start..end);
            plain[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()].fill(true);
        }
        for start in 0..512 {
            let has = plain[start];
            let end = plain[start..].iter().position(|&other| other != has).map_or(512, |n| start + n);
            assert_eq!(owned.run(start as u64..512), (has, end as u64), "from {start}");
        }
    }

    #[test]
    fn bits_are_counted_again_when_taken_up() {
        let owned = owned(100);
        owned.publish(3..40);
        let again = Owned::new(owned.cells);
        assert_eq!((again.count(), again.has(39), again.has(40)), (37, true, false));
    }

    #[test]
    fn control_words_are_no_grains() {
        let owned = owned(8);
        owned.note_flush_failed(true);
        assert!(owned.flush_failed() && !owned.has(0));
        assert_eq!(Owned::new(owned.cells).count(), 0);
    }
}
