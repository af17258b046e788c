//! Reverts: a disk becomes one of its snapshots again.
//!
//! A revert is a change of every sector that had one since the snapshot's instant, to what the snapshot's view
//! shows there. What must be so:
//! - Answered, it holds and is durable. Cut off by a crash, it is there wholly or not at all. Answered with an
//!   error it is not there; after a power cut it may be, if the error could not be undone.
//! - A change that overlaps it in time may come before or after it.
//! - What it changes counts as changed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::{Change, End, Entry, GRAIN, Oracle, SECTOR, Stamp, Verdict};

/// Grains that are preserved together at most.
const STRETCH: u64 = 16;

/// A revert of a disk that was commanded.
#[derive(Clone, Debug)]
pub(super) struct Revert {
    disk: usize,
    group: usize,
    issued: u64,
    /// Its changes: one for each value.
    changes: Vec<usize>,
    values: BTreeMap<u64, Stamp>,
    /// What was in flight when it was commanded.
    racing: Vec<(usize, Range<u64>)>,
    state: State,
    /// Where it is known to be there, and where not to be.
    sides: [Option<u64>; 2],
}

/// How a revert was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It holds.
    Done,
    /// It did not begin.
    Refused,
    /// It failed: it does not hold, but after a power cut it may.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// A crash came first; nobody has looked since.
    Cut,
    Answered,
}

impl Oracle {
    /// Grains of a snapshot's view that must be read before it is known what a revert to it makes of them.
    pub fn undetermined(&self, group: usize, disk: usize) -> BTreeSet<u64> {
        let end = self.disks[disk].capacity / SECTOR as u64;
        let sectors = self.disks[disk].sectors.range(..end).map(|(sector, _)| sector);
        let unknown = sectors.filter(|&&sector| self.shown(group, disk, sector).is_none());
        unknown.map(|sector| sector * SECTOR as u64 / GRAIN).collect()
    }

    /// What a view shows in a sector, if only one thing may be there or it was seen.
    fn shown(&self, group: usize, disk: usize, sector: u64) -> Option<Stamp> {
        let held = &self.groups[group];
        if let Some(&seen) = held.members[&disk].seen.get(&sector) {
            return Some(seen);
        }
        match &self.window(disk, sector, held.begin, held.end.unwrap_or(u64::MAX))[..] {
            [one] => Some(self.value(one)),
            _ => None,
        }
    }

    /// A revert of `disk` to the snapshot is commanded; its number. `None` if it is not known what that shows.
    pub fn begin_revert(&mut self, group: usize, disk: usize) -> Option<usize> {
        let since = self.groups[group].begin;
        let issued = self.now();
        let mut values = BTreeMap::new();
        let mut kinds: BTreeMap<(Stamp, bool), Vec<u64>> = BTreeMap::new();
        let end = self.disks[disk].capacity / SECTOR as u64;
        for (&sector, history) in self.disks[disk].sectors.range(..end) {
            let late = |entry: &Entry| self.change(entry).end.is_none_or(|(end, _)| end >= since);
            if !history.iter().any(late) {
                continue;
            }
            let value = self.shown(group, disk, sector)?;
            let before = self.window(disk, sector, issued, issued);
            let differs = before.len() == 1 && self.value(&before[0]) != value;
            values.insert(sector, value);
            kinds.entry((value, differs)).or_default().push(sector);
        }
        let mut changes = Vec::new();
        for ((value, differs), sectors) in kinds {
            let number = self.changes.len();
            // Where it may be no change at all, nobody must be told of one.
            self.changes.push(Change {
                value,
                issued,
                end: None,
                durable: false,
                settled: !differs,
                only_power: false,
            });
            changes.push(number);
            for sector in sectors {
                let entry = Entry { change: number, seen: None };
                self.disks[disk].sectors.entry(sector).or_default().push(entry);
                self.disks[disk].by_grain.entry(sector * SECTOR as u64 / GRAIN).or_default().push(number);
            }
        }
        // What had no effect (a discard that the medium cannot do) was preserved, and is copied back all the same.
        let is_late = |&number: &usize| self.changes[number].end.is_none_or(|(end, _)| end >= since);
        let grains = self.disks[disk].by_grain.iter();
        let grains: Vec<u64> =
            grains.filter(|(_, all)| all.iter().any(is_late)).map(|(&grain, _)| grain).collect();
        let number = self.changes.len();
        self.changes.push(Change::perhaps(0, issued));
        for grain in grains {
            self.disks[disk].by_grain.entry(grain).or_default().push(number);
        }
        let racing = self.disks[disk].in_flight.clone();
        let (state, sides) = (State::Open, [None; 2]);
        self.reverts.push(Revert { disk, group, issued, changes, values, racing, state, sides });
        Some(self.reverts.len() - 1)
    }

    /// A revert was answered.
    pub fn reverted(&mut self, revert: usize, outcome: Outcome) {
        let ok = outcome == Outcome::Done;
        let now = self.now();
        if ok {
            self.overlap(revert, now);
        }
        let revert = &mut self.reverts[revert];
        revert.state = State::Answered;
        let Revert { disk, changes, values, .. } = revert.clone();
        let durable = self.disks[disk].tainted == 0;
        for &number in &changes {
            let change = &mut self.changes[number];
            change.end = Some((now, if ok { End::Held } else { End::Failed }));
            (change.durable, change.only_power) = (ok && durable, !ok);
        }
        if outcome == Outcome::Refused {
            for sector in values.keys() {
                let entries = self.disks[disk].sectors.entry(*sector).or_default();
                entries.retain(|entry| !changes.contains(&entry.change));
            }
            self.reverts.pop();
        }
    }

    /// Of what overlapped a revert either may have come later.
    fn overlap(&mut self, revert: usize, now: u64) {
        let Revert { disk, group, issued, values, racing, .. } = self.reverts[revert].clone();
        let mut late: Vec<(u64, Stamp)> = Vec::new();
        for (&sector, entries) in &self.disks[disk].sectors {
            let is_after = |entry: &&Entry| self.change(entry).issued > issued;
            if entries.iter().any(|entry| is_after(&entry)) {
                let value = values.get(&sector).copied().or_else(|| self.shown(group, disk, sector));
                late.extend(value.map(|value| (sector, value)));
            }
            for (number, _) in racing.iter().filter(|(_, sectors)| sectors.contains(&sector)) {
                if entries.iter().any(|entry| entry.change == *number) {
                    late.push((sector, self.changes[*number].value));
                }
            }
        }
        for (sector, value) in late {
            let entry = Entry { change: self.changes.len(), seen: None };
            self.disks[disk].sectors.entry(sector).or_default().push(entry);
            self.changes.push(Change::perhaps(value, now));
        }
    }

    /// Everything in flight was cut off.
    pub(super) fn cut_reverts(&mut self, now: u64) {
        for at in 0..self.reverts.len() {
            if self.reverts[at].state == State::Open {
                self.overlap(at, now);
            }
        }
        for revert in &mut self.reverts {
            match revert.state {
                State::Open => {
                    revert.state = State::Cut;
                    for &number in &revert.changes {
                        self.changes[number].end = Some((now, End::Cut));
                    }
                }
                State::Cut => revert.state = State::Answered,
                State::Answered => {}
            }
        }
    }

    /// Judges whether what was found after a crash, where `others` might have been, is on the same side of a
    /// revert that was cut off as what was found before.
    pub(super) fn check_side(
        &mut self,
        disk: usize,
        sector: u64,
        found: Stamp,
        others: &[Option<Entry>],
    ) -> Verdict {
        let is_cut = |revert: &Revert| revert.disk == disk && revert.state == State::Cut;
        let Some(at) = self.reverts.iter().position(is_cut) else { return Ok(()) };
        let revert = &self.reverts[at];
        let Some(&value) = revert.values.get(&sector) else { return Ok(()) };
        let history = &self.disks[disk].sectors[&sector];
        let last = history.last().is_some_and(|entry| revert.changes.contains(&entry.change));
        if !last || revert.racing.iter().any(|(_, sectors)| sectors.contains(&sector)) {
            return Ok(());
        }
        let is_other =
            |entry: &&Option<Entry>| entry.is_none_or(|entry| !revert.changes.contains(&entry.change));
        let elsewhere = others.iter().filter(is_other).any(|entry| self.value(entry) == found);
        let sides = &mut self.reverts[at].sides;
        match (found == value, elsewhere) {
            (true, false) => sides[0] = Some(sector),
            (false, _) => sides[1] = Some(sector),
            (true, true) => {}
        }
        match *sides {
            [Some(there), Some(not)] => Err(format!(
                "disk {disk}: a revert that was cut off is there in sector {there} and not in {not}"
            )),
            _ => Ok(()),
        }
    }

    /// A new generation begins on a disk, in which what a rewind still copies counts as changed.
    pub(super) fn touch_reverted(&mut self, disk: usize, now: u64) {
        let of_disk = self.reverts.iter().filter(|revert| revert.disk == disk);
        let Some(since) = of_disk.map(|revert| self.groups[revert.group].begin).min() else { return };
        // Also what was written between the command and the instant at which it took effect.
        let is_late = |&number: &usize| self.changes[number].end.is_none_or(|(end, _)| end >= since);
        let grains = self.disks[disk].by_grain.iter();
        let grains: Vec<u64> =
            grains.filter(|(_, all)| all.iter().any(is_late)).map(|(&grain, _)| grain).collect();
        // With the neighbours that were preserved along, as far as the blocks went that were tracked then.
        let stretch = |grain: &u64| grain / STRETCH * STRETCH..(grain / STRETCH + 1) * STRETCH;
        let grains: BTreeSet<u64> = grains.iter().flat_map(stretch).collect();
        let number = self.changes.len();
        // In no sector: it only excuses what is told.
        self.changes.push(Change::perhaps(0, now));
        for grain in grains {
            self.disks[disk].by_grain.entry(grain).or_default().push(number);
        }
    }
}

impl Change {
    /// One that may be there from `now` on, and need not.
    pub(super) fn perhaps(value: Stamp, now: u64) -> Self {
        let end = Some((now, End::Failed));
        Self { value, issued: now, end, durable: false, settled: true, only_power: false }
    }
}
