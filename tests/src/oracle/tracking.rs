//! Changes told: which sectors the answer about a snapshot must name, and which blocks it may.
//!
//! Invariant: an answer that was accepted is remembered in the member, and is the only one from then on.
//!
//! Absent: which instants a disk has told; and what must be so: the head of the module `oracle` tells it under
//! "Changes".

use cow_engine::cbt::{ByteRange, Epoch};

use super::{DiskModel, End, Entry, GRAIN, Mark, Opening, Oracle, SECTOR, Told, Verdict};

/// Regions that count as changed ahead of a stream: so many, or as many as lie behind it.
const STREAM: u64 = 8;
/// Regions that count as changed together in a burst of changes; aligned.
const TOGETHER: u64 = 64;

impl DiskModel {
    /// Whether `block` may be named among changes from `begin` to `end` because the host stopped in between:
    /// something was changed in its regions or their group, or in one of those before them, of a stream that ended.
    fn is_presumed(&self, block: ByteRange, begin: u64, end: u64) -> bool {
        let within = self.presumed.iter().filter(|(time, _)| (begin..end).contains(time));
        let near = |&(_, bytes): &(u64, u64)| {
            let (first, last) = (block.start() / bytes, (block.end() - 1) / bytes);
            let from = first.saturating_sub(STREAM).min(first / 2).min(first / TOGETHER * TOGETHER);
            let to = (last / TOGETHER + 1) * TOGETHER;
            let grains = from * bytes / GRAIN..to * bytes / GRAIN;
            self.by_grain.range(grains).any(|(_, changes)| !changes.is_empty())
        };
        within.into_iter().any(near)
    }
}

impl Oracle {
    /// Epochs since which a snapshot of `disk` can be asked.
    pub fn sinces(&self, group: usize, disk: usize) -> Vec<Epoch> {
        let Some(id) = self.groups[group].members[&disk].id else { return Vec::new() };
        let same = |told: &&Told| told.id.generation == id.generation && told.id.epoch <= id.epoch;
        let told = self.disks[disk].told.iter().filter(same).map(|told| told.id.epoch);
        std::iter::once(Epoch::NEVER).chain(told).collect()
    }

    /// Judges the answer to all changes of a snapshot since an epoch.
    pub fn changes_told(&mut self, group: usize, disk: usize, since: Epoch, answer: &[ByteRange]) -> Verdict {
        let name = self.groups[group].name.clone();
        let fail = |text: String| Err(format!("changes of {name} on disk {disk} since {since:?}: {text}"));
        let held = &self.groups[group];
        let (later_begin, later_end) = (held.begin, held.end.unwrap_or(u64::MAX));
        let member = &held.members[&disk];
        if let Some(before) = member.answers.get(&since.get()) {
            if before != answer {
                return fail(format!("{answer:?}, before it was {before:?}"));
            }
            return self.differing(group, disk, since, answer).or_else(fail);
        }
        let model = &self.disks[disk];
        let Some(id) = member.id else { return fail("no change id is known".into()) };
        let (begin, end) = match model.told.iter().find(|told| {
            told.id.epoch == since && told.id.generation == id.generation && since != Epoch::NEVER
        }) {
            Some(told) => (told.begin, told.end),
            None => {
                let start = model.generation.map_or(0, |(_, start)| start);
                (model.cleared, start)
            }
        };
        let Some(grid) = model.grid else { return fail("the disk is not tracked".into()) };
        if let Some(last) = answer.last().filter(|last| last.end() > member.capacity) {
            return fail(format!("{last} passes its end at {}", member.capacity));
        }
        for pair in answer.windows(2) {
            if pair[0].end() >= pair[1].start() {
                return fail(format!("{} and {} are not apart", pair[0], pair[1]));
            }
        }
        let known = |entry: &Entry| {
            let change = self.change(entry);
            let ended = match change.end {
                Some((time, End::Held | End::Failed)) => Some(time),
                _ => entry.seen,
            };
            // A revert that failed is no change, unless a power cut brings it about.
            let made = !change.settled && !change.only_power;
            made && change.issued >= end && ended.is_some_and(|time| time <= later_begin)
        };
        for (&sector, history) in model.sectors.range(..member.capacity / SECTOR as u64) {
            if let Some(entry) = history.iter().find(|entry| known(entry))
                && !covers(answer, sector)
            {
                return fail(format!("sector {sector} is missing, change {} is in it", entry.change + 1));
            }
        }
        for mark in &model.marks {
            let due = mark.issued >= end && mark.done.is_some_and(|time| time <= later_begin);
            let mut sectors = mark.sectors.start..mark.sectors.end.min(member.capacity / SECTOR as u64);
            if due && let Some(sector) = sectors.find(|&sector| !covers(answer, sector)) {
                return fail(format!("sector {sector} is missing, which was marked at {}", mark.issued));
            }
        }
        self.differing(group, disk, since, answer).or_else(fail)?;
        for range in answer {
            for block in grid.covering(*range) {
                let bytes = grid.range(block..block + 1, member.capacity);
                let grains = bytes.start() / GRAIN..bytes.end().div_ceil(GRAIN);
                let near = |change: &usize| {
                    let change = &self.changes[*change];
                    change.issued < later_end && change.end.is_none_or(|(time, _)| time >= begin)
                };
                let sectors = bytes.start() / SECTOR as u64..bytes.end().div_ceil(SECTOR as u64);
                let marked = |mark: &Mark| {
                    let ended = mark.done.or(mark.cut).unwrap_or(u64::MAX);
                    let there = mark.sectors.start < sectors.end && sectors.start < mark.sectors.end;
                    there && mark.issued < later_end && ended >= begin
                };
                let touched = model.by_grain.range(grains).any(|(_, changes)| changes.iter().any(near));
                if !touched && !model.marks.iter().any(marked) && !model.is_presumed(bytes, begin, later_end)
                {
                    return fail(format!("{bytes} is named and nothing was changed there"));
                }
            }
        }
        self.member(group, disk).answers.insert(since.get(), answer.to_vec());
        Ok(())
    }

    /// What differs between two views is named.
    fn differing(&self, group: usize, disk: usize, since: Epoch, answer: &[ByteRange]) -> Result<(), String> {
        let later = &self.groups[group].members[&disk];
        let older = self.groups.iter().filter_map(|group| group.members.get(&disk)).find(|older| {
            older.id.is_some_and(|id| {
                id.epoch == since && later.id.is_some_and(|later| later.generation == id.generation)
            })
        });
        // Only what came after an opening differs from it by marks.
        let is_after = |opening: &&Opening| {
            let same = later.id.is_some_and(|later| later.generation == opening.id.generation);
            same && opening.id.epoch == since && opening.at < self.groups[group].begin
        };
        let openings = self.disks[disk].openings.iter().filter(is_after);
        let openings = openings.map(|opening| ("what was there at a start", &opening.seen));
        for (what, before) in older.map(|older| ("the older view", &older.seen)).into_iter().chain(openings) {
            for (sector, value) in &later.seen {
                if before.get(sector).is_some_and(|before| before != value) && !covers(answer, *sector) {
                    return Err(format!("sector {sector} differs from {what} and is missing"));
                }
            }
        }
        Ok(())
    }

    /// The full answer that is known already.
    pub fn known_answer(&self, group: usize, disk: usize, since: Epoch) -> Option<&[ByteRange]> {
        self.groups[group].members[&disk].answers.get(&since.get()).map(Vec::as_slice)
    }
}

fn covers(ranges: &[ByteRange], sector: u64) -> bool {
    let at = sector * SECTOR as u64;
    let next = ranges.partition_point(|range| range.end() <= at);
    ranges.get(next).is_some_and(|range| range.start() <= at)
}
