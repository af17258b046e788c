//! Views: what a snapshot's view may show, what its readers have released, and whether it is one instant.
//!
//! Invariant: what was read once is remembered in the member, and is the only answer from then on.
//!
//! Absent: which snapshots there are; and what must be so: the head of the module `oracle` tells it under "Views",
//! "Holes" and "Releases".

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use cow_engine::cbt::ByteRange;

use super::{End, GRAIN, Oracle, SECTOR, Verdict, read_stamp};

impl Oracle {
    /// Judges what a view answered.
    pub fn view_read(&mut self, group: usize, disk: usize, at: u64, bytes: &[u8]) -> Verdict {
        let (begin, end) = (self.groups[group].begin, self.groups[group].end.unwrap_or(u64::MAX));
        let what = format!("view {} of disk {disk}", self.groups[group].name);
        for (sector, bytes) in (at / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            let found = read_stamp(disk, sector, bytes).map_err(|why| format!("{what}: {why}"))?;
            match self.groups[group].members[&disk].seen.get(&sector) {
                Some(&before) if before == found => continue,
                Some(before) => {
                    return Err(format!("{what} sector {sector}: change {found}, before it was {before}"));
                }
                None => {}
            }
            if self.disks[disk].sectors.contains_key(&sector) {
                let window = self.window(disk, sector, begin, end);
                self.expect(&what, sector, found, &window)?;
                self.member(group, disk).seen.insert(sector, found);
            } else if found != 0 {
                return Err(format!("{what} sector {sector}: change {found} was never made there"));
            }
        }
        Ok(())
    }

    /// Judges a hole that a view told of, of which it was read that it is zeros or not.
    pub fn view_hole(&self, group: usize, disk: usize, range: ByteRange) -> Verdict {
        let member = &self.groups[group].members[&disk];
        let sectors = range.start() / SECTOR as u64..range.end().div_ceil(SECTOR as u64);
        match member.seen.range(sectors).find(|(_, value)| **value != 0) {
            None => Ok(()),
            Some((sector, value)) => Err(format!(
                "view {} of disk {disk}: sector {sector} is in a hole and holds change {value}",
                self.groups[group].name
            )),
        }
    }

    /// A reader begins to release grains; those that may be from now on.
    pub fn begin_release(&mut self, group: usize, disk: usize, grains: Range<u64>) -> Vec<u64> {
        self.member(group, disk).may_be_released = true;
        let released = &mut self.member(group, disk).released;
        let new: Vec<u64> = grains.filter(|grain| !released.contains_key(grain)).collect();
        released.extend(new.iter().map(|&grain| (grain, false)));
        new
    }

    /// A release was answered: it holds for `grains`.
    pub fn released(&mut self, group: usize, disk: usize, grains: Range<u64>) {
        self.member(group, disk).released.extend(grains.map(|grain| (grain, true)));
    }

    /// A release had no effect, and nobody else had asked for these grains.
    pub fn not_released(&mut self, group: usize, disk: usize, grains: &[u64]) {
        self.member(group, disk).released.retain(|grain, held| *held || !grains.contains(grain));
    }

    /// Whether a release was ever begun.
    pub fn has_released(&self, group: usize, disk: usize) -> bool {
        self.groups[group].members[&disk].may_be_released
    }

    /// Grains of `range` that are released for certain.
    pub fn lost(&self, group: usize, disk: usize, range: ByteRange) -> BTreeSet<u64> {
        let grains = range.start() / GRAIN..range.end().div_ceil(GRAIN);
        let member = &self.groups[group].members[&disk];
        member.released.range(grains).filter(|(_, held)| **held).map(|(&grain, _)| grain).collect()
    }

    /// Judges an answer that byte `at` of a view was released, when `range` was asked for.
    pub fn view_lost(&self, group: usize, disk: usize, range: ByteRange, at: u64) -> Verdict {
        let group = &self.groups[group];
        let what = format!("view {} of disk {disk}: byte {at}", group.name);
        if at < range.start() || at >= range.end() {
            return Err(format!("{what} was not asked for, {range} was"));
        }
        match group.members[&disk].released.get(&(at / GRAIN)) {
            Some(_) => Ok(()),
            None => Err(format!("{what} was never released")),
        }
    }

    /// Judges whether what was seen of a group's views is one instant.
    pub fn check_instant(&self, group: usize) -> Verdict {
        let group = &self.groups[group];
        let end = group.end.unwrap_or(u64::MAX);
        let (mut inside, mut outside) = (BTreeMap::new(), BTreeMap::new());
        for (&disk, member) in &group.members {
            for (&sector, &value) in &member.seen {
                let window = self.window(disk, sector, group.begin, end);
                if window.len() < 2 {
                    continue;
                }
                let mut fits = window.iter().enumerate().filter(|(_, entry)| self.value(entry) == value);
                let (Some((place, _)), None) = (fits.next(), fits.next()) else { continue };
                for (at, entry) in window.iter().enumerate() {
                    let Some(entry) = entry else { continue };
                    if matches!(self.change(entry).end, Some((_, End::Failed))) {
                        continue;
                    }
                    let side = if at <= place { &mut inside } else { &mut outside };
                    side.insert(entry.change, (disk, sector));
                }
            }
        }
        for (change, here) in &inside {
            if let Some(there) = outside.get(change) {
                return Err(format!(
                    "snapshot {}: change {} is in it at {here:?} and not at {there:?} (disk, sector)",
                    group.name,
                    change + 1
                ));
            }
        }
        let last = inside.keys().max_by_key(|&&change| self.changes[change].issued);
        let answered = |change: usize| self.changes[change].end.map_or(u64::MAX, |(end, _)| end);
        let first = outside.keys().min_by_key(|&&change| answered(change));
        if let (Some(&last), Some(&first)) = (last, first)
            && answered(first) < self.changes[last].issued
        {
            return Err(format!(
                "snapshot {}: change {} is in it at {:?}, and {} is not at {:?}, which had been answered before",
                group.name,
                last + 1,
                inside[&last],
                first + 1,
                outside[&first]
            ));
        }
        Ok(())
    }
}
