//! Which grains a rewind brings back, and in which slot each is.
//!
//! Invariant: runs are sorted by grain and apart from each other; each grain has an *ordinal*, its place
//! among all of them, by which it is counted as done.

use std::ops::Range;

use crate::index::Slot;

/// Grains one after the other, in slots one after the other (or all zeros).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first.
    pub(super) grain: u64,
    pub(super) count: u32,
    /// Of the first.
    pub(super) slot: Slot,
    /// Of the first.
    pub(super) ordinal: u64,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.grain + u64::from(self.count)
    }

    /// Where the content of `grain`, one of the run, is.
    pub(super) fn slot_of(&self, grain: u64) -> Slot {
        match self.slot {
            Slot::Zero => Slot::Zero,
            // Within the run, whose last slot has a number.
            Slot::At(first) => Slot::At(first + u32::try_from(grain - self.grain).unwrap_or(0)),
        }
    }

    pub(super) fn ordinals(&self, grains: &Range<u64>) -> Range<u64> {
        self.ordinal + (grains.start - self.grain)..self.ordinal + (grains.end - self.grain)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    runs: Vec<Run>,
    grains: u64,
}

impl Plan {
    /// A plan of grains in any order; of two entries of one grain the one with the lower rank counts.
    pub(super) fn of_entries(mut entries: Vec<(u64, u32, Slot)>) -> Self {
        entries.sort_unstable_by_key(|&(grain, rank, _)| (grain, rank));
        entries.dedup_by_key(|&mut (grain, ..)| grain);
        let mut runs: Vec<(u64, u32, Slot)> = Vec::new();
        for (grain, _, slot) in entries {
            if let Some((first, count, held)) = runs.last_mut()
                && *first + u64::from(*count) == grain
                && *count < u32::MAX
                && match (*held, slot) {
                    (Slot::Zero, Slot::Zero) => true,
                    (Slot::At(held), Slot::At(slot)) => held.checked_add(*count) == Some(slot),
                    _ => false,
                }
            {
                *count += 1;
            } else {
                runs.push((grain, 1, slot));
            }
        }
        Self::of_runs(runs)
    }

    /// A plan of runs that are sorted and apart.
    pub(super) fn of_runs(runs: Vec<(u64, u32, Slot)>) -> Self {
        let mut grains = 0;
        let run = |(grain, count, slot): (u64, u32, Slot)| {
            let ordinal = grains;
            grains += u64::from(count);
            Run { grain, count, slot, ordinal }
        };
        let runs = runs.into_iter().map(run).collect();
        Self { runs, grains }
    }

    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Grains in all runs.
    pub(super) fn grains(&self) -> u64 {
        self.grains
    }

    /// The run that `grain` is in, or else where the next one begins (`u64::MAX` if there is none).
    pub(super) fn find(&self, grain: u64) -> Result<&Run, u64> {
        let next = self.runs.partition_point(|run| run.end() <= grain);
        match self.runs.get(next) {
            Some(run) if run.grain <= grain => Ok(run),
            Some(run) => Err(run.grain),
            None => Err(u64::MAX),
        }
    }

    /// The run of the grain with this ordinal, and the grain.
    pub(super) fn nth(&self, ordinal: u64) -> Option<(&Run, u64)> {
        let next = self.runs.partition_point(|run| run.ordinal <= ordinal);
        let run = self.runs.get(next.checked_sub(1)?)?;
        let skip = ordinal - run.ordinal;
        (skip < u64::from(run.count)).then_some((run, run.grain + skip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_become_runs_and_the_lower_rank_counts() {
        let plan = Plan::of_entries(vec![
            (7, 1, Slot::At(90)),
            (6, 0, Slot::At(3)),
            (5, 0, Slot::At(2)),
            (7, 0, Slot::At(4)),
            (8, 2, Slot::Zero),
            (9, 0, Slot::Zero),
            (20, 0, Slot::At(5)),
        ]);
        let runs: Vec<_> =
            plan.runs().iter().map(|run| (run.grain, run.count, run.slot, run.ordinal)).collect();
        assert_eq!(runs, [(5, 3, Slot::At(2), 0), (8, 2, Slot::Zero, 3), (20, 1, Slot::At(5), 5),]);
        assert_eq!(plan.grains(), 6);
        assert_eq!(plan.find(6).map(|run| run.slot_of(6)), Ok(Slot::At(3)));
        assert_eq!(plan.find(4).map(|run| run.grain), Err(5));
        assert_eq!(plan.find(10).map(|run| run.grain), Err(20));
        assert_eq!(plan.find(21).map(|run| run.grain), Err(u64::MAX));
        let places: Vec<_> = (0..7).map(|ordinal| plan.nth(ordinal).map(|(_, grain)| grain)).collect();
        assert_eq!(places, [Some(5), Some(6), Some(7), Some(8), Some(9), Some(20), None]);
    }
}
