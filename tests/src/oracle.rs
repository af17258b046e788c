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
//! Absent: running anything, and choosing what to run. Nothing here is random.

mod checkpoints;
mod reverts;
pub use checkpoints::Named;
pub use reverts::Outcome;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use cow_engine::cbt::{BlockGrid, ByteRange, ChangeId, Epoch, Generation};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const STAMP: usize = 32;
/// Regions that count as changed ahead of a stream: so many, or as many as lie behind it.
const STREAM: u64 = 8;
/// Regions that count as changed together in a burst of changes; aligned.
const TOGETHER: u64 = 64;
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

    /// A resize to `size` bytes begins.
    pub fn begin_resize(&mut self, disk: usize, size: u64) {
        let capacity = self.disks[disk].capacity;
        let mark = self.issue_mark(disk, self.grown(disk, capacity.min(size), capacity.max(size)));
        self.disks[disk].growing.push(Growing { size, mark });
    }

    /// The sectors that change when a disk grows: the last block of old too, if it is not a whole one.
    fn grown(&self, disk: usize, old: u64, size: u64) -> Range<u64> {
        let whole = self.disks[disk].grid.is_none_or(|grid| old.is_multiple_of(grid.bytes()));
        let first = if whole { old } else { old - 1 };
        first / SECTOR as u64..size / SECTOR as u64
    }

    /// A disk tells its size, at any time while it is served.
    pub fn size_told(&mut self, disk: usize, size: u64) -> Verdict {
        if size == self.disks[disk].capacity {
            return Ok(());
        }
        let growing = std::mem::take(&mut self.disks[disk].growing);
        let Some(growing) = growing.into_iter().rfind(|growing| growing.size == size) else {
            return Err(format!("disk {disk} has {size} bytes"));
        };
        let old = std::mem::replace(&mut self.disks[disk].capacity, size);
        if size < old {
            self.cut_to(disk, size, old);
            return Ok(());
        }
        let Some(cut) = self.disks[disk].marks[growing.mark].cut else {
            self.answer_mark(disk, growing.mark, true);
            return Ok(());
        };
        // After a crash it was done again, at the latest now; but perhaps before a new generation began.
        let sectors = self.grown(disk, old, size);
        let mark = self.issue_mark(disk, sectors);
        let same = self.disks[disk].generation.is_some_and(|(_, began)| began < cut);
        self.answer_mark(disk, mark, same);
        Ok(())
    }

    /// A disk has become smaller, and nobody was told yet: a power cut may bring the old size back, with what was
    /// there; else what is past the end is zeros when it grows again.
    fn cut_to(&mut self, disk: usize, size: u64, old: u64) {
        let sectors: Vec<u64> = self.past(disk, size);
        let now = self.now();
        let end = Some((now, End::Failed));
        self.changes.push(Change {
            value: 0,
            issued: now,
            end,
            durable: false,
            settled: false,
            only_power: false,
        });
        let change = self.changes.len() - 1;
        for sector in sectors {
            self.disks[disk].sectors.entry(sector).or_default().push(Entry { change, seen: None });
        }
        let mark = self.issue_mark(disk, self.grown(disk, size, old));
        self.disks[disk].growing = vec![Growing { size: old, mark }];
    }

    /// It was answered that a disk is smaller: what was past its end is gone for good.
    pub fn shrunk(&mut self, disk: usize, size: u64) {
        for sector in self.past(disk, size) {
            self.disks[disk].sectors.remove(&sector);
        }
        self.forget_resize(disk);
    }

    /// Sectors from `size` on that were ever changed.
    fn past(&self, disk: usize, size: u64) -> Vec<u64> {
        self.disks[disk].sectors.range(size / SECTOR as u64..).map(|(&sector, _)| sector).collect()
    }

    /// The least size that the image of a disk may have now.
    pub fn least_size(&self, disk: usize) -> u64 {
        let model = &self.disks[disk];
        model.growing.iter().map(|growing| growing.size).fold(model.capacity, u64::min)
    }

    /// A resize was answered with an error. It may still be finished by a later opening.
    pub fn not_resized(&mut self, disk: usize) {
        if let Some(growing) = self.disks[disk].growing.last() {
            self.answer_mark(disk, growing.mark, false);
        }
    }

    /// Without faults an opening finishes a resize or forgets it.
    pub fn forget_resize(&mut self, disk: usize) {
        self.disks[disk].growing.clear();
    }

    /// A disk was opened: what it may have marked in vain counts as marked.
    fn note_attempt(&mut self, disk: usize) {
        for growing in self.disks[disk].growing.clone() {
            let now = self.disks[disk].capacity;
            let sectors = self.grown(disk, now.min(growing.size), now.max(growing.size));
            let mark = self.issue_mark(disk, sectors);
            self.answer_mark(disk, mark, false);
        }
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

    /// After a power cut: what is past the end, where nobody can look, may be as old as what was durable.
    pub fn settle_past_end(&mut self, disk: usize) {
        let now = self.now();
        for sector in self.past(disk, self.disks[disk].capacity) {
            for entry in self.durable_window(disk, sector) {
                let change = self.changes.len();
                self.changes.push(Change::perhaps(self.value(&entry), now));
                self.disks[disk].sectors.entry(sector).or_default().push(Entry { change, seen: None });
            }
        }
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
