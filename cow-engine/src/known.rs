//! Grains that somebody has found in a snapshot's index already: a guest that writes the same places again and again
//! asks here first, in a few pages of memory instead of three distant places of the index.
//!
//! Invariant: what is known is in the index, or was released, and stays so for as long as the snapshot lives.
//! Absent: completeness. A word that two groups of grains share knows those of the one that was noted last; who
//! finds nothing here asks the index.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Words, 128 KiB of them: they cover 2 GiB of neighbouring grains.
const WORDS: u64 = 1 << 14;

/// Grains of a word: its lower half has a bit for each.
const GROUP: u64 = 32;

/// See the module. Costs memory only where something was noted.
#[derive(Default)]
pub(crate) struct Known {
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Known {
    /// Whether `grain` was noted and not forgotten since.
    pub(crate) fn has(&self, grain: u64) -> bool {
        let Some((word, tag, bit)) = self.place(grain) else { return false };
        // One load of both halves. Whoever sees the bit sees what was published before it was set.
        let now = word.load(Acquire);
        now >> 32 == tag && now & bit != 0
    }

    /// How many of `grains` were noted and not forgotten since. They are of one word: within 32 grains from a multiple
    /// of 32 on.
    pub(crate) fn count(&self, grains: Range<u64>) -> u32 {
        let Some((word, tag, first)) = self.place(grains.start) else { return 0 };
        let now = word.load(Relaxed);
        let bits = ((1 << (grains.end - grains.start)) - 1) * first;
        if now >> 32 == tag { (now & bits).count_ones() } else { 0 }
    }

    /// Notes that the snapshot has `grain`.
    pub(crate) fn note(&self, grain: u64) {
        self.words.get_or_init(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect());
        let Some((word, tag, bit)) = self.place(grain) else { return };
        let now = word.load(Relaxed);
        let same = if now >> 32 == tag { now & u64::from(u32::MAX) } else { 0 };
        // If another thread comes between, a bit is lost, which costs a look at the index.
        word.store(tag << 32 | same | bit, Release);
    }

    /// The word of a grain, the upper half that says it is this group's, and the grain's bit.
    fn place(&self, grain: u64) -> Option<(&AtomicU64, u64, u64)> {
        let group = grain / GROUP;
        // Zero is nobody's. A disk of 256 PiB has numbers that do not fit.
        let tag = group / WORDS + 1;
        let words = self.words.get().filter(|_| tag <= u32::MAX.into())?;
        let word = words.get(usize::try_from(group % WORDS).ok()?)?;
        Some((word, tag, 1 << (grain % GROUP)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_noted_is_known() {
        let known = Known::default();
        let grains =
            [0, 1, 31, 32, GROUP * WORDS - 1, GROUP * WORDS + 5, 1 << 34, (1 << 44) + 7, u64::MAX / 2];
        for (nth, &grain) in grains.iter().enumerate() {
            assert!(!known.has(grain));
            known.note(grain);
            assert_eq!(known.has(grain), grain < 1 << 50, "grain {grain}, number {nth}");
            assert!(!known.has(grain + 1), "the neighbour of {grain}");
            let group = grain / GROUP * GROUP;
            assert_eq!(
                known.count(group..group + GROUP) > 0,
                known.has(grain),
                "{grain} among its neighbours"
            );
        }
        // Those that share a word with a later one are forgotten, the others are not.
        assert!(!known.has(0) && !known.has(1) && known.has(32) && known.has(GROUP * WORDS - 1));
    }

    #[test]
    fn nobody_learns_from_others_what_is_not_so() {
        let known = Known::default();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let known = &known;
                // All write the same words: each only even grains of a part of its own.
                scope.spawn(move || {
                    for n in 0..50_000 {
                        let grain = thread * GROUP * WORDS + n * 2 % 512;
                        known.note(grain);
                        assert!(!known.has(grain + 1) && !known.has(grain + 4 * GROUP * WORDS));
                    }
                });
            }
        });
    }
}
