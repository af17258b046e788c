//! Which grains of a snapshot its readers have released: a bit for each, in pages that are made when they
//! are first needed.
//!
//! Invariant: a bit is set after its record is written, and never cleared.
//! Absent: who may release, and what becomes of the slots ([`crate::release`]).

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// Bits of a word.
const BITS: u64 = u64::BITS as u64;
/// Words of a page, which is 4 KiB and stands for 128 MiB of the disk.
const PAGE_WORDS: usize = 512;
const WORDS: u64 = PAGE_WORDS as u64;

type Page = [AtomicU64; PAGE_WORDS];

/// The grains of one snapshot that are released.
///
/// Costs nothing until the first; then 16 bytes for each 128 MiB of the disk, and a bit for each grain in
/// those of these parts that have any: at most some 32 MiB for 1 TiB.
pub(crate) struct Released {
    grains: u64,
    pages: OnceLock<Box<[OnceLock<Box<Page>>]>>,
    /// A release was begun: there may be bits soon.
    begun: AtomicBool,
    count: AtomicU64,
}

impl Released {
    /// None yet, of a snapshot of so many grains.
    pub(crate) fn new(grains: u64) -> Self {
        Self { grains, pages: OnceLock::new(), begun: AtomicBool::new(false), count: AtomicU64::new(0) }
    }

    /// Grains that there are, released or not.
    pub(crate) fn grains(&self) -> u64 {
        self.grains
    }

    /// Grains that are released.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(SeqCst)
    }

    /// From now on some may be.
    pub(crate) fn begin(&self) {
        self.begun.store(true, SeqCst);
    }

    /// Whether some are, or may be soon.
    pub(crate) fn is_begun(&self) -> bool {
        self.begun.load(SeqCst)
    }

    /// Whether `grain` is released.
    pub(crate) fn has(&self, grain: u64) -> bool {
        self.pages.get().is_some() && self.word(grain / BITS) & bit(grain) != 0
    }

    /// The first of `grains` that is released.
    pub(crate) fn first(&self, grains: Range<u64>) -> Option<u64> {
        self.pages.get()?;
        self.find(grains, true)
    }

    /// Runs of `grains` that are not released, in order.
    pub(crate) fn missing(&self, grains: Range<u64>) -> Vec<Range<u64>> {
        let mut runs = Vec::new();
        let mut at = grains.start;
        while let Some(start) = self.find(at..grains.end, false) {
            at = self.find(start..grains.end, true).unwrap_or(grains.end);
            runs.push(start..at);
        }
        runs
    }

    /// Notes that `grains` are released, whose record is written.
    ///
    /// # Panics
    /// If there are not so many grains.
    pub(crate) fn set(&self, grains: Range<u64>) {
        assert!(grains.end <= self.grains, "grains of the snapshot are released");
        self.begin();
        let mut at = grains.start;
        while at < grains.end {
            let end = grains.end.min((at / BITS + 1) * BITS);
            let mask = (at..end).fold(0, |mask, grain| mask | bit(grain));
            let before = self.page(at / BITS / WORDS)[place(at / BITS % WORDS)].fetch_or(mask, SeqCst);
            self.count.fetch_add(u64::from((mask & !before).count_ones()), SeqCst);
            at = end;
        }
    }

    /// The first of `grains` whose bit is as `set` says.
    fn find(&self, grains: Range<u64>, set: bool) -> Option<u64> {
        let mut at = grains.start;
        while at < grains.end {
            let word = self.word(at / BITS);
            let fits = (if set { word } else { !word }) >> (at % BITS);
            if fits != 0 {
                return Some(at + u64::from(fits.trailing_zeros())).filter(|&found| found < grains.end);
            }
            at = (at / BITS + 1) * BITS;
        }
        None
    }

    fn word(&self, word: u64) -> u64 {
        let page = self.pages.get().and_then(|pages| pages.get(place(word / WORDS))?.get());
        page.map_or(0, |page| page[place(word % WORDS)].load(SeqCst))
    }

    fn page(&self, page: u64) -> &Page {
        let pages = self.pages.get_or_init(|| {
            let count = self.grains.div_ceil(BITS * WORDS);
            (0..count).map(|_| OnceLock::new()).collect()
        });
        pages[place(page)].get_or_init(|| Box::new([const { AtomicU64::new(0) }; PAGE_WORDS]))
    }
}

fn bit(grain: u64) -> u64 {
    1 << (grain % BITS)
}

fn place(n: u64) -> usize {
    usize::try_from(n).expect("a bit for each grain fits in memory")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_is_made_until_it_is_needed() {
        let released = Released::new(1 << 40);
        assert!(!released.has(5) && !released.is_begun());
        assert_eq!((released.first(0..u64::MAX), released.count()), (None, 0));
        assert!(released.pages.get().is_none());
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_grains(steps in prop::collection::vec((0u64..100_000, 1u64..70_000), 1..8)) {
            let released = Released::new(100_000);
            let mut plain = BTreeSet::new();
            for (start, len) in steps {
                let run = start..(start + len).min(100_000);
                released.set(run.clone());
                plain.extend(run.clone());
                prop_assert_eq!(released.count(), plain.len() as u64);
                let near = run.start.saturating_sub(70)..(run.end + 70).min(100_000);
                prop_assert_eq!(released.first(near.clone()), plain.range(near.clone()).next().copied());
                for grain in near.clone() {
                    prop_assert_eq!(released.has(grain), plain.contains(&grain));
                }
                let missing: Vec<u64> = released.missing(near.clone()).into_iter().flatten().collect();
                let expected: Vec<u64> = near.filter(|grain| !plain.contains(grain)).collect();
                prop_assert_eq!(missing, expected);
            }
        }
    }
}
