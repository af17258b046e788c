//! Which slots of a difference store are taken.
//!
//! Invariant: a slot is taken by one owner, from [`Slots::take`] or [`Slots::claim`] until it is given
//! back. Absent: what is in a slot, and the files; [`crate::store`] has them.

use std::ops::Range;

/// Slots of one area, numbered from zero.
///
/// A bit per slot up to the highest that was ever taken: 32 KiB for each GiB of old content.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    taken: Vec<u64>,
    /// Slots that the area can have.
    count: u32,
    /// Every slot from here on was never taken.
    high: u32,
    /// Slots below `high` that are free.
    holes: u32,
    /// Where to look for holes next.
    cursor: u32,
}

impl Slots {
    /// `count` slots, all free.
    pub(crate) fn new(count: u32) -> Self {
        Self { count, ..Self::default() }
    }

    /// Slots that are taken.
    pub(crate) fn taken(&self) -> u32 {
        self.high - self.holes
    }

    /// Slots from here on were never taken.
    pub(crate) fn high(&self) -> u32 {
        self.high
    }

    /// Takes a run of free slots, at most `most` long; `None` if there is none.
    ///
    /// Fresh slots come before holes, since runs of them are long, until the holes are a quarter.
    pub(crate) fn take(&mut self, most: u32) -> Option<Range<u32>> {
        let fresh = self.count - self.high;
        if most == 0 {
            return None;
        }
        if fresh > 0 && self.holes <= self.high / 4 {
            let run = self.high..self.high + most.min(fresh);
            self.high = run.end;
            self.set(run.clone());
            return Some(run);
        }
        if self.holes == 0 {
            return None;
        }
        let start = self.next_hole(self.cursor..self.high).or_else(|| self.next_hole(0..self.cursor))?;
        let limit = self.high.min(start.saturating_add(most));
        let end = (start + 1..limit).find(|&slot| self.is_taken(slot)).unwrap_or(limit);
        self.holes -= end - start;
        self.cursor = end;
        self.set(start..end);
        Some(start..end)
    }

    /// Takes a slot that a record names. Answers `false` if the area has no such slot.
    pub(crate) fn claim(&mut self, slot: u32) -> bool {
        if slot >= self.count {
            return false;
        }
        if slot >= self.high {
            self.holes += slot - self.high;
            self.high = slot + 1;
        } else if self.is_taken(slot) {
            return true;
        } else {
            self.holes -= 1;
        }
        self.set(slot..slot + 1);
        true
    }

    /// Gives slots back, which are all taken.
    pub(crate) fn give(&mut self, run: Range<u32>) {
        for slot in run {
            debug_assert!(self.is_taken(slot), "slot {slot} is given back once");
            self.taken[word(slot)] &= !bit(slot);
            self.holes += 1;
        }
        if self.taken() == 0 {
            // Nothing is left: begin at the start again.
            *self = Self::new(self.count);
        }
    }

    /// Runs of free slots below `high`, ascending.
    pub(crate) fn free_runs(&self) -> Vec<Range<u32>> {
        let mut runs = Vec::new();
        let mut at = 0;
        while let Some(start) = self.next_hole(at..self.high) {
            let end = (start + 1..self.high).find(|&slot| self.is_taken(slot)).unwrap_or(self.high);
            runs.push(start..end);
            at = end;
        }
        runs
    }

    fn next_hole(&self, within: Range<u32>) -> Option<u32> {
        let mut slot = within.start;
        while slot < within.end {
            let free = !self.taken[word(slot)] >> (slot % 64);
            if free != 0 {
                let found = slot + free.trailing_zeros();
                return (found < within.end).then_some(found);
            }
            slot = (slot / 64 + 1).checked_mul(64)?;
        }
        None
    }

    fn is_taken(&self, slot: u32) -> bool {
        self.taken.get(word(slot)).is_some_and(|word| word & bit(slot) != 0)
    }

    fn set(&mut self, run: Range<u32>) {
        let words = word(run.end.max(1) - 1) + 1;
        if self.taken.len() < words {
            self.taken.resize(words, 0);
        }
        for slot in run {
            self.taken[word(slot)] |= bit(slot);
        }
    }
}

fn word(slot: u32) -> usize {
    slot as usize / 64
}

fn bit(slot: u32) -> u64 {
    1 << (slot % 64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fresh_slots_come_in_order_and_end() {
        let mut slots = Slots::new(10);
        assert_eq!(slots.take(4), Some(0..4));
        assert_eq!(slots.take(9), Some(4..10));
        assert_eq!(slots.take(1), None);
        slots.give(3..5);
        assert_eq!(slots.free_runs().into_iter().flatten().collect::<Vec<_>>(), [3, 4]);
        assert_eq!(slots.take(1), Some(3..4));
        assert_eq!(slots.take(7), Some(4..5));
        assert_eq!(slots.take(7), None);
        slots.give(0..10);
        assert_eq!((slots.taken(), slots.high()), (0, 0));
    }

    proptest! {
        #[test]
        fn a_slot_has_one_owner(count in 1u32..300, steps in prop::collection::vec((0u8..4, 0u32..300), 1..200)) {
            let mut slots = Slots::new(count);
            let mut model = BTreeSet::new();
            for (what, n) in steps {
                match what {
                    0 | 1 => {
                        let free = (0..count).filter(|slot| !model.contains(slot)).count();
                        match slots.take(n % 40) {
                            Some(run) => for slot in run {
                                prop_assert!(slot < count && model.insert(slot));
                            },
                            None => prop_assert!(free == 0 || n % 40 == 0),
                        }
                    }
                    2 => prop_assert_eq!(slots.claim(n), n < count && { model.insert(n); true }),
                    _ => {
                        let run = model.iter().copied().skip(n as usize % 7).take(1).next();
                        if let Some(slot) = run {
                            model.remove(&slot);
                            slots.give(slot..slot + 1);
                        }
                    }
                }
                prop_assert_eq!(slots.taken() as usize, model.len());
                let free: Vec<u32> = slots.free_runs().into_iter().flatten().collect();
                let expected: Vec<u32> = (0..slots.high()).filter(|slot| !model.contains(slot)).collect();
                prop_assert_eq!(free, expected);
            }
        }
    }
}
