//! What a disk may answer: the judge of the simulation suite.
//!
//! Every event has a time, counted up by one: a change is issued and ends, a command begins and ends.
//! Each sector that is written carries a stamp: disk, sector, number of the change, checksum; a zeroed
//! one is stamp 0. Per sector the oracle keeps the changes in order; no two in flight share a sector.
//! A change *holds* when it was answered without an error. One that was answered with an error, or cut
//! off by a crash, may be there or not, in each sector on its own.
//!
//! What must be so:
//! - **Live.** A read between times b and e answers, per sector, the last change that held by b or one
//!   after it issued before e. After a kill the same. After a power cut: the last change that was
//!   durable or one after it; durable is what held when a flush was issued that was answered, and a
//!   durable (FUA) write. What was dirty when a sync failed is durable only once written again; no flush
//!   is answered without an error after one that was, until the disk is opened anew.
//!   What is read after a crash is how it is from then on.
//! - **Views.** A snapshot commanded between b and e shows, per sector, the last change that held by b
//!   or one after it issued before e. One that held, or was cut off by a crash, is in it wholly or not
//!   at all. There is one instant for all disks of a group: if a change is in, every change that had
//!   been answered before it was issued is in. What was read once is read again, also after a kill.
//! - **Changes** since an older instant of the same generation name every sector that had a change
//!   issued after the older command ended and held before the later one began, and every sector whose
//!   content differs between the two views, or from what the disk held when it was opened with that instant;
//!   and no block without a change that was in flight between the beginning of the older and the end of the
//!   later. Asked again, the answer is the same. A mark counts as a change that leaves the content as it is.
//! - **Sizes.** A disk has the size that it had, or that a resize shall give it; once it has told that one, it
//!   keeps it over any crash. What is new is zeros, and marked. A view ends where the disk did. One that was to
//!   become smaller has what it had, or is cut; whatever comes past its end later is marked.
//! - **Breaks.** A snapshot that broke stays so, over kills and over power cuts after a stop in order. A disk of which
//!   a flush has failed is not closed in order until the host was started anew.
//! - **Holes** of a view read as zeros.
//! - **Releases.** What a reader has released is answered with an error, and is in no hole; everything else
//!   is as it was. A release that was cut off or failed may hold for each of its grains or not.
//! - **Crashes.** After a kill the generation and all snapshots are kept. After a power cut, unless the
//!   disk was closed before, there is no snapshot, but the same generation, and changes may name whole regions
//!   in which something was changed. After a change from outside there is a new generation and no snapshot.
//!   A snapshot that was being created is on all disks of its group or on none.
//! - **Checkpoints** are instants that outlive their snapshot; the module `checkpoints` tells what must be so.
//! - **Reverts** are changes of the whole disk; the module `reverts` tells what must be so.
//!
//! Here are time, changes, the live disk, crashes, and which snapshots and generations there are. Sizes, views and the
//! answers about changes have modules of their own.
//!
//! Absent: running anything, and choosing what to run. Nothing here is random.

mod checkpoints;
mod reverts;
mod sizes;
mod tracking;
mod views;
pub use checkpoints::Named;
pub use reverts::Outcome;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use cow_engine::cbt::{BlockGrid, ByteRange, ChangeId, Generation};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const STAMP: usize = 32;
/// Bytes of a grain, by which touched places are remembered.
pub const GRAIN: u64 = 4096;

/// What a check found wrong.
pub type Verdict = Result<(), String>;

/// Number of a change; 0 stands for zeros.
pub type Stamp = u64;

/// Fills sectors from `first` on with the stamp of change `number`.
pub fn stamp(disk: usize, first: u64, number: Stamp, out: &mut [u8]) {
    for (sector, bytes) in (first..).zip(out.chunks_exact_mut(SECTOR)) {
        let stamp = stamp_of(disk, sector, number);
        for part in bytes.chunks_exact_mut(STAMP) {
            part.copy_from_slice(&stamp);
        }
    }
}

fn stamp_of(disk: usize, sector: u64, number: Stamp) -> [u8; STAMP] {
    let words = [number, sector, disk as u64 + 1];
    let sum = words.iter().fold(0x9e37_79b9_7f4a_7c15u64, |sum, word| {
        (sum ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(31)
    });
    let mut stamp = [0; STAMP];
    for (bytes, word) in stamp.chunks_exact_mut(8).zip(words.iter().chain([&sum])) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    stamp
}

/// The stamp in a sector's bytes, or what is wrong with them.
pub(crate) fn read_stamp(disk: usize, sector: u64, bytes: &[u8]) -> Result<Stamp, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(0);
    }
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[..8]);
    let number = Stamp::from_le_bytes(word);
    let expected = stamp_of(disk, sector, number);
    if bytes.chunks_exact(STAMP).all(|part| part == expected) {
        return Ok(number);
    }
    Err(format!("disk {disk} sector {sector}: no stamp of its own, it begins with {:x?}", &bytes[..STAMP]))
}

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Held,
    Failed,
    /// A crash came first.
    Cut,
}

#[derive(Clone, Debug)]
struct Change {
    value: Stamp,
    issued: u64,
    end: Option<(u64, End)>,
    durable: bool,
    /// No change at all: what was found after a crash.
    settled: bool,
    /// Possible after a power cut only.
    only_power: bool,
}

impl Change {
    fn held_by(&self, time: u64) -> bool {
        matches!(self.end, Some((end, End::Held)) if end <= time)
    }
}

/// A change of one sector.
#[derive(Clone, Copy, Debug)]
struct Entry {
    change: usize,
    /// When it was found there though it had not held.
    seen: Option<u64>,
}

/// How a life ended, for what is judged at the beginning of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The page cache stays.
    Kill,
    /// By a kill, but the kernel had lost what was not flushed, and not told it yet.
    Loss,
    /// What was not flushed is there or not.
    PowerCut,
}

/// What became of a snapshot on one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its creation has not been answered.
    Creating,
    /// It must be there.
    Held,
    /// Its deletion has not been answered.
    Deleting,
    /// It may be there or not: a command was cut off or failed.
    Unknown,
    /// It must not be there.
    Gone,
}

/// A snapshot on one disk.
#[derive(Clone, Debug)]
pub struct Member {
    /// What became of it.
    pub fate: Fate,
    /// Its change id, once told.
    pub id: Option<ChangeId>,
    /// Bytes of the disk when it was commanded.
    pub capacity: u64,
    seen: BTreeMap<u64, Stamp>,
    /// Grains that readers asked to release, and whether it was answered that they are.
    released: BTreeMap<u64, bool>,
    /// A release was begun.
    may_be_released: bool,
    /// It was told that it broke.
    broken: bool,
    answers: BTreeMap<u32, Vec<ByteRange>>,
}

/// A snapshot of one or more disks.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub name: String,
    /// By disk.
    pub members: BTreeMap<usize, Member>,
    begin: u64,
    end: Option<u64>,
    /// A crash cut its creation off, and nobody has looked since.
    cut: bool,
}

/// An instant that a disk has told.
#[derive(Clone, Copy, Debug)]
struct Told {
    id: ChangeId,
    begin: u64,
    end: u64,
}

/// What a disk held when it was opened, and the instant that it told then.
#[derive(Debug)]
struct Opening {
    at: u64,
    id: ChangeId,
    seen: BTreeMap<u64, Stamp>,
}

/// A resize on its way.
#[derive(Clone, Copy, Debug)]
struct Growing {
    size: u64,
    /// The mark that goes with it.
    mark: usize,
}

/// Sectors that were marked without being written.
#[derive(Clone, Debug)]
struct Mark {
    sectors: Range<u64>,
    issued: u64,
    /// When it was answered.
    done: Option<u64>,
    /// When a crash or an error ended it: it may have been made or not.
    cut: Option<u64>,
}

/// What is known of one disk.
#[derive(Debug)]
pub struct DiskModel {
    /// Bytes.
    pub capacity: u64,
    sectors: BTreeMap<u64, Vec<Entry>>,
    by_grain: BTreeMap<u64, Vec<usize>>,
    in_flight: Vec<(usize, Range<u64>)>,
    marks: Vec<Mark>,
    /// Resizes that were not answered with success: any of them may still come to its end.
    growing: Vec<Growing>,
    /// Changes issued after the first that held by the second are durable.
    flushes: Vec<(u64, u64)>,
    tainted: u64,
    /// When a flush was first answered with an error since the disk was opened.
    refused: Option<u64>,
    /// The same, since the host was started.
    distrusted: bool,
    told: Vec<Told>,
    openings: Vec<Opening>,
    generations: Vec<Generation>,
    /// When regions of so many bytes were counted as changed because the host had stopped.
    presumed: Vec<(u64, u64)>,
    /// The generation and when it began.
    pub generation: Option<(Generation, u64)>,
    /// When the map was cleared last: a new generation that began while the disk was served keeps older marks.
    cleared: u64,
    /// A new generation may be on the medium that nobody was told of.
    pub resetting: bool,
    /// An operator switched tracking off.
    pub off: bool,
    /// When the last one was asked for.
    reset_at: u64,
    /// The block size, if changes are tracked.
    pub grid: Option<BlockGrid>,
}

/// The judge.
#[derive(Debug, Default)]
pub struct Oracle {
    now: u64,
    changes: Vec<Change>,
    /// The disks.
    pub disks: Vec<DiskModel>,
    /// All snapshots that were ever commanded.
    pub groups: Vec<Group>,
    reverts: Vec<reverts::Revert>,
    /// All checkpoints that were ever commanded.
    pub named: Vec<Named>,
}

impl Oracle {
    /// A disk more, of zeros.
    pub fn add_disk(&mut self, capacity: u64) {
        self.disks.push(DiskModel {
            capacity,
            sectors: BTreeMap::new(),
            by_grain: BTreeMap::new(),
            in_flight: Vec::new(),
            marks: Vec::new(),
            growing: Vec::new(),
            flushes: Vec::new(),
            tainted: 0,
            refused: None,
            distrusted: false,
            told: Vec::new(),
            openings: Vec::new(),
            generations: Vec::new(),
            presumed: Vec::new(),
            generation: None,
            cleared: 0,
            resetting: false,
            off: false,
            reset_at: 0,
            grid: None,
        });
    }

    /// The time now: later than everything before.
    pub fn now(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Whether no change in flight has a sector of `sectors`.
    pub fn is_free(&self, disk: usize, sectors: &Range<u64>) -> bool {
        let overlaps = |held: &Range<u64>| held.start < sectors.end && sectors.start < held.end;
        !self.disks[disk].in_flight.iter().any(|(_, held)| overlaps(held))
    }

    /// A change begins; its number, which is the value of its sectors unless it zeros them. One that
    /// has no effect (a discard that the medium cannot do) is told by `effect`.
    pub fn issue(&mut self, disk: usize, sectors: Range<u64>, zeros: bool, effect: bool) -> usize {
        let issued = self.now();
        let number = self.changes.len() + 1;
        let value = if zeros { 0 } else { number as u64 };
        self.changes.push(Change {
            value,
            issued,
            end: None,
            durable: false,
            settled: false,
            only_power: false,
        });
        let held = &mut self.disks[disk];
        let grains = sectors.start / 8..sectors.end.div_ceil(8);
        for grain in grains {
            held.by_grain.entry(grain).or_default().push(number - 1);
        }
        if effect {
            for sector in sectors.clone() {
                held.sectors.entry(sector).or_default().push(Entry { change: number - 1, seen: None });
            }
        }
        held.in_flight.push((number - 1, sectors));
        number
    }

    /// A change was answered.
    pub fn answer(&mut self, disk: usize, number: usize, ok: bool, durable: bool) {
        let now = self.now();
        let change = &mut self.changes[number - 1];
        change.end = Some((now, if ok { End::Held } else { End::Failed }));
        change.durable = ok && durable;
        self.disks[disk].in_flight.retain(|(held, _)| *held != number - 1);
    }

    /// A mark without a write begins; its index.
    pub fn issue_mark(&mut self, disk: usize, sectors: Range<u64>) -> usize {
        let issued = self.now();
        let marks = &mut self.disks[disk].marks;
        marks.push(Mark { sectors, issued, done: None, cut: None });
        marks.len() - 1
    }

    /// A mark was answered.
    pub fn answer_mark(&mut self, disk: usize, mark: usize, ok: bool) {
        let now = self.now();
        let mark = &mut self.disks[disk].marks[mark];
        *(if ok { &mut mark.done } else { &mut mark.cut }) = Some(now);
    }

    /// A change was refused for want of space for old content: no byte of it was submitted.
    pub fn refused(&mut self, disk: usize, number: usize) -> Verdict {
        self.answer(disk, number, false, false);
        self.changes[number - 1].settled = true;
        for entries in self.disks[disk].sectors.values_mut() {
            if entries.iter().any(|entry| entry.change == number - 1 && entry.seen.is_some()) {
                return Err(format!("disk {disk}: change {number} was refused, and yet it was read"));
            }
            entries.retain(|entry| entry.change != number - 1);
        }
        Ok(())
    }

    /// A flush was answered with an error.
    pub fn not_flushed(&mut self, disk: usize) {
        let now = self.now();
        self.disks[disk].refused.get_or_insert(now);
    }

    /// Whether a flush has been answered with an error since the disk was opened.
    pub fn is_refused(&self, disk: usize) -> bool {
        self.disks[disk].refused.is_some()
    }

    /// A flush of the image has failed: until the host is started anew nobody knows what the medium holds.
    pub fn distrust(&mut self, disk: usize) {
        self.disks[disk].distrusted = true;
    }

    /// The host was started anew.
    pub fn host_started(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.distrusted = false);
    }

    /// Judges a disk's being closed in order, by a command that began at `issued`.
    pub fn closed(&mut self, disk: usize, issued: u64) -> Verdict {
        if self.disks[disk].distrusted {
            return Err(format!("disk {disk} was closed in order though a flush of it had failed"));
        }
        self.flushed(disk, issued)
    }

    /// A flush issued at `issued` was answered without an error.
    pub fn flushed(&mut self, disk: usize, issued: u64) -> Verdict {
        let at = disk;
        let disk = &mut self.disks[disk];
        if disk.refused.is_some_and(|refused| refused < issued) {
            return Err(format!("disk {at}: a flush succeeded after one had failed"));
        }
        match disk.flushes.last_mut() {
            Some((after, upto)) if *after == disk.tainted => *upto = issued.max(*upto),
            _ => disk.flushes.push((disk.tainted, issued)),
        }
        Ok(())
    }

    /// A sync of the image failed: what was written by now may never be durable.
    pub fn sync_failed(&mut self, disk: usize) {
        self.disks[disk].tainted = self.now();
    }

    /// Everything in flight was cut off.
    pub fn crash(&mut self) {
        let now = self.now();
        for disk in &mut self.disks {
            for (number, _) in disk.in_flight.drain(..) {
                self.changes[number].end = Some((now, End::Cut));
            }
            for mark in disk.marks.iter_mut().filter(|mark| mark.done.is_none()) {
                mark.cut.get_or_insert(now);
            }
        }
        self.cut_reverts(now);
        self.cut_checkpoints();
        for group in &mut self.groups {
            if group.end.is_none() {
                group.end = Some(now);
                group.cut = true;
            }
            for member in group.members.values_mut() {
                if matches!(member.fate, Fate::Creating | Fate::Deleting) {
                    member.fate = Fate::Unknown;
                }
            }
        }
    }

    /// Grains that were ever touched.
    pub fn touched(&self, disk: usize) -> BTreeSet<u64> {
        self.disks[disk].by_grain.keys().copied().collect()
    }

    fn change(&self, entry: &Entry) -> &Change {
        &self.changes[entry.change]
    }

    /// The changes that a look between `begin` and `end` may find in a sector, oldest first; `None`
    /// stands for the zeros of the beginning.
    fn window(&self, disk: usize, sector: u64, begin: u64, end: u64) -> Vec<Option<Entry>> {
        let history = self.disks[disk].sectors.get(&sector).map_or(&[][..], Vec::as_slice);
        let floor = history.iter().rposition(|entry| self.change(entry).held_by(begin));
        let later = &history[floor.unwrap_or(0)..];
        let may_be = |change: &Change| change.issued < end && !change.only_power;
        let later = later.iter().filter(|entry| may_be(self.change(entry))).map(|&entry| Some(entry));
        floor.is_none().then_some(None).into_iter().chain(later).collect()
    }

    fn value(&self, entry: &Option<Entry>) -> Stamp {
        entry.map_or(0, |entry| self.change(&entry).value)
    }

    fn expect(&self, what: &str, sector: u64, found: Stamp, window: &[Option<Entry>]) -> Verdict {
        if window.iter().any(|entry| self.value(entry) == found) {
            return Ok(());
        }
        let allowed: Vec<_> = window.iter().map(|entry| self.value(entry)).collect();
        Err(format!("{what} sector {sector}: change {found} is there, allowed are {allowed:?}"))
    }

    /// Judges a read of the live disk that was issued at `begin` and has just been answered.
    pub fn live_read(&mut self, disk: usize, begin: u64, at: u64, bytes: &[u8]) -> Verdict {
        let end = self.now();
        for (sector, bytes) in (at / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            let found = read_stamp(disk, sector, bytes)?;
            let window = self.window(disk, sector, begin, end);
            self.expect(&format!("live disk {disk}"), sector, found, &window)?;
        }
        Ok(())
    }

    /// Judges what is there after a crash, with nothing in flight, and settles on it.
    pub fn settle(&mut self, disk: usize, after: After, at: u64, bytes: &[u8]) -> Verdict {
        let now = self.now();
        let power_cut = after == After::PowerCut;
        for (sector, bytes) in (at / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            let found = read_stamp(disk, sector, bytes)?;
            let window = match after {
                After::Kill => self.window(disk, sector, now, now),
                After::Loss | After::PowerCut => self.durable_window(disk, sector),
            };
            self.expect(&format!("{after:?}: disk {disk}"), sector, found, &window)?;
            self.check_side(disk, sector, found, &window)?;
            if let Some(opening) = self.disks[disk].openings.last_mut() {
                opening.seen.insert(sector, found);
            }
            if window.len() > 1 {
                // It is as old as what was found: a sync that failed since has left it behind.
                let fits = window.iter().filter(|entry| self.value(entry) == found);
                let issued = fits.map(|entry| entry.map_or(0, |entry| self.change(&entry).issued)).min();
                let issued = if power_cut { now } else { issued.unwrap_or(now) };
                let entries = self.disks[disk].sectors.entry(sector).or_default();
                for entry in entries.iter_mut() {
                    let change = &self.changes[entry.change];
                    if change.value == found && found != 0 && entry.seen.is_none() {
                        entry.seen = Some(now);
                    }
                }
                entries.push(Entry { change: self.changes.len(), seen: None });
                let end = Some((now, End::Held));
                let durable = power_cut;
                let change = Change { value: found, issued, end, durable, settled: true, only_power: false };
                self.changes.push(change);
            }
        }
        Ok(())
    }

    fn durable_window(&self, disk: usize, sector: u64) -> Vec<Option<Entry>> {
        let disk = &self.disks[disk];
        let history = disk.sectors.get(&sector).map_or(&[][..], Vec::as_slice);
        let durable = |entry: &Entry| {
            let change = self.change(entry);
            let flushed = |(after, upto): &(u64, u64)| change.issued > *after && change.held_by(*upto);
            change.durable || disk.flushes.iter().any(flushed)
        };
        let floor = history.iter().rposition(durable);
        let later = history[floor.unwrap_or(0)..].iter().map(|&entry| Some(entry));
        floor.is_none().then_some(None).into_iter().chain(later).collect()
    }

    /// The image of `disk` was changed from outside, durably or not; the number of the change.
    pub fn changed_offline(&mut self, disk: usize, sectors: Range<u64>, durable: bool) -> usize {
        let number = self.issue(disk, sectors, false, true);
        self.answer(disk, number, true, durable);
        number
    }

    /// A snapshot's command begins; its index.
    pub fn begin_group(&mut self, name: &str, disks: &[usize]) -> usize {
        let member = |disk: usize| Member {
            fate: Fate::Creating,
            id: None,
            capacity: self.disks[disk].capacity,
            seen: BTreeMap::new(),
            released: BTreeMap::new(),
            may_be_released: false,
            broken: false,
            answers: BTreeMap::new(),
        };
        let members = disks.iter().map(|&disk| (disk, member(disk))).collect();
        let begin = self.now();
        self.groups.push(Group { name: name.to_owned(), members, begin, end: None, cut: false });
        self.groups.len() - 1
    }

    /// A snapshot's command was answered with these change ids.
    pub fn created(&mut self, group: usize, ids: &[(usize, ChangeId)]) -> Verdict {
        let end = self.now();
        self.groups[group].end = Some(end);
        let begin = self.groups[group].begin;
        for &(disk, id) in ids {
            if self.disks[disk].generation.is_none_or(|(generation, _)| generation != id.generation) {
                return Err(format!("disk {disk}: change id {id} is not of this generation"));
            }
            self.tell(group, disk, id)?;
            self.flushed(disk, begin)?;
        }
        Ok(())
    }

    fn tell(&mut self, group: usize, disk: usize, id: ChangeId) -> Verdict {
        let (begin, end) = (self.groups[group].begin, self.groups[group].end.unwrap_or(self.now));
        let model = &mut self.disks[disk];
        let earlier = |told: &&Told| told.id.generation == id.generation;
        if let Some(last) = model.told.iter().rfind(earlier)
            && last.id.epoch >= id.epoch
            && last.end <= begin
        {
            return Err(format!("disk {disk}: change id {id} was told after {}", last.id));
        }
        if model.told.iter().any(|told| told.id == id) {
            return Err(format!("disk {disk}: change id {id} was told twice"));
        }
        if !model.generations.contains(&id.generation) {
            return Err(format!("disk {disk}: change id {id} is of no generation of this disk"));
        }
        model.told.push(Told { id, begin, end });
        if let Some(member) = self.groups[group].members.get_mut(&disk) {
            member.fate = Fate::Held;
            member.id = Some(id);
        }
        Ok(())
    }

    /// A snapshot's command was answered with an error.
    pub fn not_created(&mut self, group: usize, fate: Fate) {
        self.groups[group].end = Some(self.now());
        for member in self.groups[group].members.values_mut() {
            member.fate = fate;
        }
    }

    /// Snapshots of a disk of which `fate` is true, as indexes.
    pub fn groups_of(&self, disk: usize, fate: impl Fn(Fate) -> bool) -> Vec<usize> {
        let has = |group: &Group| group.members.get(&disk).is_some_and(|member| fate(member.fate));
        self.groups.iter().enumerate().filter(|(_, group)| has(group)).map(|(at, _)| at).collect()
    }

    /// The snapshot's record on a disk.
    ///
    /// # Panics
    /// If it is not of that disk.
    pub fn member(&mut self, group: usize, disk: usize) -> &mut Member {
        self.groups[group].members.get_mut(&disk).expect("a member of the group")
    }

    /// It was told that a snapshot broke.
    pub fn broke(&mut self, disk: usize, name: &str) {
        let groups = self.groups.iter_mut().filter(|group| group.name == name);
        groups.filter_map(|group| group.members.get_mut(&disk)).for_each(|member| member.broken = true);
    }

    /// Whether it was told that a snapshot broke.
    pub fn is_broken(&self, disk: usize, name: &str) -> bool {
        let groups = self.groups.iter().filter(|group| group.name == name);
        groups.filter_map(|group| group.members.get(&disk)).any(|member| member.broken)
    }

    /// Judges whether a snapshot that a start found is broken if it was left so.
    pub fn found_whole(&mut self, disk: usize, name: &str, whole: bool) -> Verdict {
        if !whole {
            self.broke(disk, name);
            return Ok(());
        }
        match self.is_broken(disk, name) {
            true => Err(format!("disk {disk}: snapshot {name} had broken, and is whole")),
            false => Ok(()),
        }
    }

    /// A snapshot of unknown fate was found, or not.
    pub fn found(&mut self, group: usize, disk: usize, id: Option<ChangeId>) -> Verdict {
        match id {
            Some(id) if self.member(group, disk).id.is_none() => self.tell(group, disk, id),
            Some(_) => {
                self.member(group, disk).fate = Fate::Held;
                Ok(())
            }
            None => {
                self.member(group, disk).fate = Fate::Gone;
                Ok(())
            }
        }
    }

    /// After all were looked for: a creation that was cut off came to all disks or to none.
    pub fn check_whole(&mut self, strict: bool) -> Verdict {
        for group in &mut self.groups {
            if !std::mem::take(&mut group.cut) || !strict {
                continue;
            }
            let there = group.members.values().filter(|member| member.fate == Fate::Held).count();
            if there != 0 && there != group.members.len() {
                return Err(format!("snapshot {} is on some disks of its group only", group.name));
            }
        }
        Ok(())
    }

    /// A disk was opened under this generation at time `now`.
    pub fn opened(&mut self, disk: usize, generation: Generation, grid: Option<BlockGrid>) {
        let now = self.now();
        let model = &mut self.disks[disk];
        if model.generation.is_none_or(|(held, _)| held != generation) {
            model.generation = Some((generation, now));
            model.generations.push(generation);
            if !model.resetting {
                model.cleared = now;
            }
            self.touch_reverted(disk, now);
        }
        let model = &mut self.disks[disk];
        model.resetting = false;
        model.grid = grid;
        model.refused = None;
        self.note_attempt(disk);
    }

    /// A disk that was opened tells its last instant, or the beginning of its generation. What is marked after that
    /// one is all that differs from what is there now.
    pub fn told_at_start(&mut self, disk: usize, id: ChangeId) {
        let now = self.now();
        let model = &mut self.disks[disk];
        model.openings.push(Opening { at: now, id, seen: BTreeMap::new() });
        if model.told.iter().all(|told| told.id != id) {
            model.told.push(Told { id, begin: model.cleared, end: now });
        }
    }

    /// A new generation of a disk that is served is asked for; whether an earlier one may be on the medium.
    pub fn begin_reset(&mut self, disk: usize) -> bool {
        let now = self.now();
        let model = &mut self.disks[disk];
        model.reset_at = now;
        std::mem::replace(&mut model.resetting, true)
    }

    /// Whether the map has marks of a generation that ended while the disk was served. What of them could not be written
    /// back is no concern of the new one's, and yet a map that lacks them is not as it was when the disk was closed.
    pub fn keeps_older_marks(&self, disk: usize) -> bool {
        let model = &self.disks[disk];
        model.generation.is_some_and(|(_, began)| began > model.cleared)
    }

    /// It began, with this instant. `durable`: so is what was changed before it was asked for.
    pub fn reset(&mut self, disk: usize, id: ChangeId, durable: bool) -> Verdict {
        let now = self.now();
        let model = &mut self.disks[disk];
        model.generation = Some((id.generation, now));
        model.generations.push(id.generation);
        let begin = model.reset_at;
        model.told.push(Told { id, begin, end: now });
        model.resetting = false;
        if durable { self.flushed(disk, begin) } else { Ok(()) }
    }

    /// Tracking of the disk is off or on from now on, which outlives restarts.
    pub fn switched(&mut self, disk: usize, off: bool, grid: Option<BlockGrid>) {
        let model = &mut self.disks[disk];
        model.off = off;
        model.grid = grid.or(model.grid);
    }

    /// It was refused before anything was written.
    pub fn not_reset(&mut self, disk: usize, earlier: bool) {
        self.disks[disk].resetting = earlier;
    }

    /// The disk was opened and counts regions of so many bytes as changed, because the host had stopped.
    pub fn presumed(&mut self, disk: usize, region_bytes: u64) {
        let now = self.now();
        self.disks[disk].presumed.push((now, region_bytes));
    }
}
