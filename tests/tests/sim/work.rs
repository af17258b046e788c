//! What is done to disks that are being served: queues, an administrator, readers; and the judging of
//! everything that is there when nothing is done.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cow_engine::cbt::ByteRange;
use cow_engine::memory::{Source, Target};
use cow_engine::sim::{Random, SimDir, SimFile, SimStorage};
use cow_engine::{AreaSpec, Disk, Durability, Error, Lane, OnOverflow, Terms, View, Zeroing, group};
use ebbtide_tests::oracle::{After, Fate, GRAIN, Oracle, SECTOR, stamp};
use ebbtide_tests::overlay_oracle::OverlayOracle;

use crate::{checkpoints, deletions, overlays, readers, resets, rewinds};

pub(crate) type SimDisk = Arc<Disk<SimStorage>>;

/// What all tasks share.
pub(crate) struct Shared {
    pub(crate) io: SimStorage,
    pub(crate) oracle: RefCell<Oracle>,
    pub(crate) overlays: RefCell<OverlayOracle>,
    /// The disks are being closed: overlays that are not kept may be gone.
    pub(crate) closing: Cell<bool>,
    pub(crate) images: Vec<SimFile>,
    /// Places where much happens, per disk, in sectors.
    pub(crate) spots: Vec<Vec<u64>>,
    /// How far around them, in sectors.
    pub(crate) spread: u64,
    /// No fault may happen: every error is wrong.
    pub(crate) strict: bool,
    /// On which terms snapshots are taken; the usual ones if there is none.
    pub(crate) terms: Vec<Terms>,
    /// No lack of space may break a snapshot.
    pub(crate) exact: bool,
    /// Where areas are added to the disks' stores, and how many were.
    pub(crate) places: Vec<SimDir>,
    pub(crate) next_area: Cell<u64>,
    pub(crate) unmap_works: bool,
    /// One command in so many makes a disk larger; 0 for none.
    pub(crate) resizes: u64,
    /// One command in so many begins a new generation; 0 for none.
    pub(crate) resets: u64,
    /// One command in so many is cut off, or what comes soon after it; 0 for none.
    pub(crate) cuts: u64,
    /// Snapshots end more often than anything else happens.
    pub(crate) deletes: bool,
    /// Something fails in one command in so many, whatever else does; 0 for none.
    pub(crate) slips: u64,
    /// The storage of a command that is cut off, or in which something fails, while there is one.
    pub(crate) doomed: RefCell<Option<SimStorage>>,
    /// Snapshots whose deletion was commanded.
    pub(crate) let_go: RefCell<BTreeSet<String>>,
    /// State files are damaged between lives.
    pub(crate) damaged: bool,
    /// One command in so many is for a checkpoint; 0 for none.
    pub(crate) checkpoints: u64,
    /// Disks are rewound often.
    pub(crate) rewinds: bool,
    /// Commands to rewind that began or ended: odd during one.
    pub(crate) reverts: Cell<u64>,
    pub(crate) failed_syncs: Vec<Cell<u64>>,
    pub(crate) next_name: Cell<u64>,
    /// Snapshots that broke, with their disks, which the oracle does not know of yet.
    pub(crate) broke: Arc<Mutex<Vec<(usize, String)>>>,
    /// A snapshot (group and disk) that all readers are to read at once, since something happens to it.
    pub(crate) hunted: Cell<Option<(usize, usize)>>,
    /// Of ten readers so many release what they have read.
    pub(crate) releases: u64,
}

/// How often a queue does what.
#[derive(Clone, Debug)]
pub(crate) struct Mix {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) discard: u64,
    pub(crate) zeroes: u64,
    pub(crate) flush: u64,
    pub(crate) fua: u64,
    pub(crate) long: u64,
    /// One request in so many goes with a mark; 0 for none.
    pub(crate) mark: u64,
}

impl Shared {
    /// Looks whether syncs of images have failed since the last look.
    pub(crate) fn note_failed_syncs(&self) {
        for (disk, image) in self.images.iter().enumerate() {
            let failed = self.io.failed_syncs(*image);
            if failed != self.failed_syncs[disk].replace(failed) {
                self.oracle.borrow_mut().sync_failed(disk);
            }
        }
    }

    /// The storage that a command goes through.
    pub(crate) fn of_command(&self) -> SimStorage {
        self.doomed.borrow().clone().unwrap_or_else(|| self.io.clone())
    }

    /// Tells the oracle what broke.
    pub(crate) fn note_breaks(&self) {
        for (disk, snapshot) in self.broke.lock().expect("one thread").drain(..) {
            self.oracle.borrow_mut().broke(disk, &snapshot);
        }
    }

    /// A disk's sign of life; whether nothing is in flight.
    pub(crate) fn beat(&self, at: usize, disk: &SimDisk) -> bool {
        let identity = || Ok(self.io.identity(self.images[at]));
        disk.beat(self.io.now_ns(), identity).expect("an image can be asked")
    }

    /// Everything in flight was cut off.
    pub(crate) fn crash(&self) {
        *self.doomed.borrow_mut() = None;
        self.oracle.borrow_mut().crash();
        self.overlays.borrow_mut().crash();
    }

    /// A range of a disk, as large as it tells to be now.
    fn live_range(&self, at: usize, disk: &SimDisk, random: &mut Random, long: u64) -> Range<u64> {
        judge(self.oracle.borrow_mut().size_told(at, disk.capacity()));
        self.range(at, disk.capacity(), random, long)
    }

    /// The disk of an overlay.
    pub(crate) fn disk_of(&self, overlay: usize) -> usize {
        self.overlays.borrow().overlays[overlay].disk
    }

    /// Bytes of a disk at a snapshot's instant.
    pub(crate) fn frozen_size(&self, group: usize, disk: usize) -> u64 {
        self.oracle.borrow().groups[group].members[&disk].capacity
    }

    /// A range of sectors of `disk`, within `size` bytes of it.
    pub(crate) fn range(&self, disk: usize, size: u64, random: &mut Random, long: u64) -> Range<u64> {
        let sectors = size / SECTOR as u64;
        let len = match random.below(12) {
            _ if random.one_in(long) => random.within(64..2500),
            0 => random.within(16..200),
            _ if self.spread < 10 => random.within(1..4),
            1..4 => 8 * random.within(1..5),
            _ => random.within(1..20),
        };
        let len = len.min(sectors);
        let near = match random.below(8) {
            0 => random.below(sectors),
            _ => random.pick(&self.spots[disk]) + random.below(self.spread),
        };
        let start = near.saturating_sub(random.below(len + self.spread / 2)).min(sectors - len);
        start..start + len
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.io.is_dead()
    }

    pub(crate) fn allow(&self, what: &str, error: &Error) {
        if matches!(error, Error::SnapshotBroken { .. }) && !self.terms.is_empty() {
            return self.allow_broken(what, error);
        }
        if self.strict {
            let source = std::error::Error::source(error).map(ToString::to_string);
            panic!("{what}: {error}: {}", source.unwrap_or_default());
        }
    }

    /// Whether a lack of space may be answered to guests.
    fn writes_may_fail(&self) -> bool {
        self.terms.iter().any(|terms| terms.on_overflow == OnOverflow::FailWrites)
    }

    /// Whether snapshots may break for a lack of space.
    fn allow_broken(&self, what: &str, error: &Error) {
        // One whose deletion was cut off was let go of meanwhile.
        if matches!(error, Error::SnapshotBroken { name, .. } if self.let_go.borrow().contains(name)) {
            return;
        }
        if self.exact {
            // Faults may have kept a head from being written before a restart, and a verb that slips may do so in a flush.
            let faults = [
                "a newer snapshot is damaged",
                "before the daemon was restarted",
                "flushing the difference store failed",
            ];
            let text = error.to_string();
            let allowed = !self.strict && faults.iter().any(|one| text.contains(one));
            assert!(allowed, "{what}, which lack of space may not break: {text}");
        } else if self.terms.is_empty() {
            self.allow(what, error);
        }
    }

    pub(crate) async fn pause(&self, random: &mut Random, most: u64) {
        for _ in 0..random.below(most) {
            self.io.turn().await;
        }
    }
}

pub(crate) fn judge(verdict: ebbtide_tests::oracle::Verdict) {
    if let Err(what) = verdict {
        panic!("{what}");
    }
}

pub(crate) fn bytes_of(sectors: &Range<u64>) -> ByteRange {
    ByteRange::new(sectors.start * SECTOR as u64, sectors.end * SECTOR as u64)
}

pub(crate) fn buffer(range: ByteRange) -> Vec<u8> {
    vec![0xee; usize::try_from(range.len()).expect("a small range")]
}

/// One queue of a disk: a request after the other.
pub(crate) async fn queue(
    shared: Rc<Shared>,
    at: usize,
    disk: SimDisk,
    lane: Lane,
    mut random: Random,
    mix: Mix,
    requests: u64,
) {
    for _ in 0..requests {
        if random.one_in(8) {
            shared.pause(&mut random, 30).await;
        }
        if random.one_in(mix.mark) {
            mark(&shared, at, &disk, lane, &mut random, &mix).await;
        }
        let mut dice = random.below(mix.read + mix.write + mix.discard + mix.zeroes + mix.flush);
        let mut is = |weight: u64| {
            let hit = dice < weight;
            dice = if hit { u64::MAX } else { dice - weight };
            hit
        };
        if is(mix.read) {
            read(&shared, at, &disk, &mut random, &mix).await;
        } else if is(mix.flush) {
            flush(&shared, at, &disk).await;
        } else {
            let kind = if is(mix.discard) {
                Kind::Discard
            } else if is(mix.zeroes) {
                Kind::Zeroes
            } else {
                Kind::Write
            };
            change(&shared, at, &disk, lane, &mut random, &mix, kind).await;
        }
        if shared.is_dead() {
            return;
        }
    }
}

async fn read(shared: &Shared, at: usize, disk: &SimDisk, random: &mut Random, mix: &Mix) {
    let range = bytes_of(&shared.live_range(at, disk, random, mix.long));
    let begin = shared.oracle.borrow_mut().now();
    let mut bytes = buffer(range);
    let answer = disk.read(&shared.io, range.start(), Target::of(&mut bytes)).await;
    match answer {
        _ if shared.is_dead() => {}
        // It was cut before it was read, or meanwhile.
        Err(Error::PastEnd { size, .. }) if size < range.end() => {}
        _ if disk.capacity() < range.end() => {}
        Ok(()) => judge(shared.oracle.borrow_mut().live_read(at, begin, range.start(), &bytes)),
        Err(error) => shared.allow("reading", &error),
    }
}

async fn flush(shared: &Shared, at: usize, disk: &SimDisk) {
    let issued = shared.oracle.borrow_mut().now();
    let answer = disk.flush(&shared.io).await;
    shared.note_failed_syncs();
    match answer {
        _ if shared.is_dead() => {}
        Ok(()) => {
            let refused = shared.oracle.borrow().is_refused(at);
            assert!(!refused, "disk {at}: a flush succeeded beside one that had failed");
            judge(shared.oracle.borrow_mut().flushed(at, issued));
        }
        Err(error) => {
            shared.oracle.borrow_mut().not_flushed(at);
            if matches!(error, Error::Poisoned | Error::Io { what: "flushing the image", .. }) {
                shared.oracle.borrow_mut().distrust(at);
            }
            shared.allow("flushing", &error);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    Discard,
    Zeroes,
}

async fn change(
    shared: &Shared,
    at: usize,
    disk: &SimDisk,
    lane: Lane,
    random: &mut Random,
    mix: &Mix,
    kind: Kind,
) {
    let sectors = shared.live_range(at, disk, random, mix.long);
    if !shared.oracle.borrow().is_free(at, &sectors) {
        return shared.io.turn().await;
    }
    let range = bytes_of(&sectors);
    let fua = kind != Kind::Discard && random.one_in(mix.fua);
    let durability = if fua { Durability::Durable } else { Durability::Cached };
    let effect = kind != Kind::Discard || shared.unmap_works;
    let number = shared.oracle.borrow_mut().issue(at, sectors.clone(), kind != Kind::Write, effect);
    let io = &shared.io;
    let answer = match kind {
        Kind::Write => {
            let mut bytes = buffer(range);
            stamp(at, sectors.start, number as u64, &mut bytes);
            disk.write(io, lane, range.start(), Source::of(&bytes), durability).await
        }
        Kind::Discard => disk.discard(io, lane, range).await,
        Kind::Zeroes => {
            let zeroing = if random.one_in(2) { Zeroing::Unmap } else { Zeroing::Keep };
            disk.write_zeroes(io, lane, range, zeroing, durability).await
        }
    };
    if shared.is_dead() {
        return;
    }
    shared.note_failed_syncs();
    // The bits of what a rewind has brought back may have no space either, after the bytes are written.
    let unsaved = fua && disk.rewind().is_some();
    match answer {
        // The disk has become smaller before it had its turn.
        Err(Error::PastEnd { size, .. }) if size < range.end() => {
            judge(shared.oracle.borrow_mut().refused(at, number));
        }
        Err(error) if shared.writes_may_fail() && error.is_out_of_space() && !unsaved => {
            judge(shared.oracle.borrow_mut().refused(at, number));
        }
        answer => {
            shared.oracle.borrow_mut().answer(at, number, answer.is_ok(), fua);
            if let Err(error) = answer
                && !(unsaved && error.is_out_of_space())
            {
                shared.allow("changing", &error);
            }
        }
    }
}

/// Marks some ranges without writing them.
async fn mark(shared: &Shared, at: usize, disk: &SimDisk, lane: Lane, random: &mut Random, mix: &Mix) {
    let ranges: Vec<_> =
        (0..random.within(1..4)).map(|_| shared.live_range(at, disk, random, mix.long)).collect();
    let tracked = disk.block_grid().is_some();
    let marks: Vec<usize> = match tracked {
        true => ranges.iter().map(|range| shared.oracle.borrow_mut().issue_mark(at, range.clone())).collect(),
        false => Vec::new(),
    };
    let bytes: Vec<ByteRange> = ranges.iter().map(bytes_of).collect();
    let answer = disk.mark_changed(&shared.io, lane, &bytes).await;
    if shared.is_dead() {
        return;
    }
    // A page of the map that cannot be frozen counts like a write's old content.
    let refused = answer.as_ref().is_err_and(|error| error.is_out_of_space() && !shared.terms.is_empty());
    match &answer {
        // Marked, and perhaps not durably.
        Err(error @ Error::Io { .. }) if !refused => shared.allow("marking", error),
        _ => assert!(tracked == answer.is_ok() || refused, "marking: {answer:?}"),
    }
    for mark in marks {
        shared.oracle.borrow_mut().answer_mark(at, mark, answer.is_ok());
    }
}

/// Creates and deletes snapshots.
pub(crate) async fn administrator(
    shared: Rc<Shared>,
    disks: Vec<SimDisk>,
    mut random: Random,
    commands: u64,
) {
    let mut admin = group::Admin::new();
    let most_held = random.within(1..6);
    let patience = *random.pick(&[20, 100, 300]);
    for _ in 0..commands {
        shared.pause(&mut random, patience).await;
        if shared.is_dead() {
            return;
        }
        let held: Vec<(usize, usize)> = {
            let oracle = shared.oracle.borrow();
            let of = |disk| oracle.groups_of(disk, |fate| fate == Fate::Held);
            (0..disks.len()).flat_map(|disk| of(disk).into_iter().map(move |group| (group, disk))).collect()
        };
        *shared.doomed.borrow_mut() = None;
        if random.one_in(shared.cuts) {
            if random.one_in(2) {
                // In what it does itself, whatever else goes on.
                let most = 1 << random.within(2..7);
                *shared.doomed.borrow_mut() = Some(shared.io.fated(None, 0..0, random.below(most)));
            } else {
                let most = 1 << random.within(3..9);
                shared.io.die_within(random.within(1..most));
            }
        }
        if random.one_in(shared.slips) {
            let most = 1 << random.within(1..6);
            let first = random.below(most);
            let dies = if random.one_in(3) { first + random.within(1..6) } else { u64::MAX };
            let fails = first..first + random.within(1..3);
            *shared.doomed.borrow_mut() = Some(shared.io.fated(None, fails, dies));
        }
        if shared.deletes && random.one_in(2) {
            deletions::command(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(shared.resizes) {
            resize(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(shared.resets) {
            resets::command(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(shared.checkpoints) {
            checkpoints::command(&shared, &mut admin, &disks, &mut random).await;
        } else if !held.is_empty() && random.one_in(4) {
            readers::hunt(&shared, &mut admin, &disks, &mut random).await;
        } else if !shared.terms.is_empty() && random.one_in(4) {
            provide(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(2) {
            maintain(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(if shared.rewinds { 2 } else { 12 }) {
            rewinds::command(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(3) {
            overlays::command(&shared, &disks, &mut random).await;
        } else if held.is_empty() || (held.len() as u64) < most_held && !random.one_in(4) {
            create(&shared, &mut admin, &disks, &mut random).await;
        } else {
            let &(group, disk) = random.pick(&held);
            delete(&shared, &disks, group, disk).await;
        }
    }
    *shared.doomed.borrow_mut() = None;
}

/// Sectors that a disk grows to at most.
const MOST_SECTORS: u64 = 26_000;

/// Makes a disk smaller or larger: by a little, by whole blocks, or past a border of a page of the map.
async fn resize(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], random: &mut Random) {
    let at = random.index(disks.len());
    let sectors = disks[at].capacity() / SECTOR as u64;
    let less = random.one_in(2);
    let size = match random.below(3) {
        _ if less => random.within(sectors / 2..sectors).max(1),
        0 => sectors + random.within(1..16),
        1 => (sectors / 8 + random.within(1..40)) * 8,
        _ => sectors + random.within(1..5000),
    } * SECTOR as u64;
    if size > MOST_SECTORS * SECTOR as u64 || size == disks[at].capacity() {
        return;
    }
    let held: Vec<String> = disks[at].snapshots().iter().map(|one| one.name().to_owned()).collect();
    shared.oracle.borrow_mut().begin_resize(at, size);
    let rewinding = disks[at].rewind().is_some();
    let limit = Duration::from_secs(random.within(1..60));
    let answer = match less {
        true => disks[at].shrink(admin, &shared.of_command(), size, limit).await,
        false => disks[at].resize(admin, &shared.of_command(), size).await,
    };
    if shared.is_dead() {
        return;
    }
    shared.note_failed_syncs();
    let told = disks[at].capacity();
    judge(shared.oracle.borrow_mut().size_told(at, told));
    match answer {
        Ok(()) => {
            assert_eq!(told, size, "disk {at}: what was answered is so");
            if less {
                assert!(held.is_empty(), "disk {at} became smaller under {held:?}");
                shared.oracle.borrow_mut().shrunk(at, size);
            }
        }
        Err(error) => {
            assert!(less || told != size, "disk {at}: {error}");
            shared.oracle.borrow_mut().not_resized(at);
            match error {
                // Also one that was deleted and is not gone yet.
                Error::SnapshotsHeld { .. } if less => assert_ne!(told, size, "it was refused"),
                Error::GateTimeout { .. } if less => assert_ne!(told, size, "it was refused"),
                Error::RewindActive { .. } if rewinding => {}
                // One before it was refused half-way, or is kept from being finished by a rewind.
                Error::ResizeUnfinished { .. } => {}
                // A page of the map that cannot be frozen, where writes would wait or fail.
                error if error.is_out_of_space() && !shared.terms.is_empty() => {}
                error => shared.allow("resizing", &error),
            }
        }
    }
}

/// Gives a store more space, or less.
async fn provide(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], random: &mut Random) {
    let at = random.index(disks.len());
    let disk = &disks[at];
    let limit = (!random.one_in(3)).then(|| disk.store_budget().used() + GRAIN * random.below(40));
    match random.below(3) {
        0 => match disk.limit_store(limit) {
            Ok(()) | Err(Error::LimitInUse { .. }) => {}
            Err(error) => panic!("limiting a store: {error}"),
        },
        1 => {
            let nth = shared.next_area.replace(shared.next_area.get() + 1);
            let spec = AreaSpec { path: shared.places[at].path(&format!("b{nth}")), bytes: Some(1 << 20) };
            match disk.append_area(admin, &shared.io, &spec).await {
                _ if shared.is_dead() => {}
                Ok(()) | Err(Error::AreaRefused { .. }) => {}
                Err(error) => shared.allow("adding an area", &error),
            }
        }
        _ => {
            let Some(snapshot) = disk.snapshots().last().cloned() else { return };
            let limit = limit.map(|_| snapshot.bytes_held() + GRAIN * random.below(20));
            match disk.limit_snapshot(&shared.io, snapshot.name(), limit).await {
                _ if shared.is_dead() => {}
                Ok(()) | Err(Error::LimitInUse { .. }) => {}
                Err(error) => shared.allow("limiting a snapshot", &error),
            }
        }
    }
}

/// Some steps of what deletions left.
async fn maintain(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], random: &mut Random) {
    let disk = random.pick(disks).clone();
    if random.one_in(2) {
        disk.cool(&shared.io).await;
    }
    if random.one_in(3) {
        disk.check_stores(&shared.io).await;
    }
    maintain_some(shared, admin, &disk, random.within(1..30)).await;
}

/// So many steps, if there are as many.
pub(crate) async fn maintain_some(shared: &Shared, admin: &mut group::Admin, disk: &SimDisk, steps: u64) {
    let io = shared.of_command();
    let (mut failed, mut left) = (0, steps);
    while left > 0 && failed < 30 {
        left -= 1;
        match disk.maintain(admin, &io).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) if shared.is_dead() => return,
            Err(error) => {
                failed += 1;
                shared.allow("maintaining", &error);
            }
        }
    }
}

pub(crate) async fn create(
    shared: &Shared,
    admin: &mut group::Admin,
    disks: &[SimDisk],
    random: &mut Random,
) {
    let mut members: Vec<usize> = (0..disks.len()).collect();
    random.shuffle(&mut members);
    if random.one_in(3) {
        members.truncate(1);
    }
    let name = format!("s{}", shared.next_name.replace(shared.next_name.get() + 1));
    let chosen: Vec<SimDisk> = members.iter().map(|&disk| disks[disk].clone()).collect();
    let group = shared.oracle.borrow_mut().begin_group(&name, &members);
    let terms = if shared.terms.is_empty() { Terms::default() } else { *random.pick(&shared.terms) };
    let limit = if shared.terms.is_empty() || !random.one_in(3) { 0 } else { GRAIN * random.within(1..30) };
    let (io, terms) = (shared.of_command(), Terms { limit, ..terms });
    let patience = Duration::from_millis(*random.pick(&[5000, 5000, 5000, 50]));
    let answer = group::create_on(admin, &io, &chosen, &name, 0, patience, terms).await;
    if shared.is_dead() {
        return;
    }
    shared.note_failed_syncs();
    match answer {
        Ok(instant) => {
            let ids: Vec<_> =
                members.iter().zip(&instant.taken).map(|(&disk, taken)| (disk, taken.change_id)).collect();
            judge(shared.oracle.borrow_mut().created(group, &ids));
        }
        Err(error) => {
            let rewinding = chosen.iter().any(|disk| disk.rewind().is_some());
            match error {
                Error::GateTimeout { .. } => {}
                Error::RewindActive { .. } if rewinding => {}
                _ => shared.allow("creating", &error),
            }
            let left = chosen.iter().any(|disk| disk.snapshot(&name).is_ok());
            assert!(!(left && shared.strict), "snapshot {name} is there after {error}");
            let fate = if shared.strict { Fate::Gone } else { Fate::Unknown };
            shared.oracle.borrow_mut().not_created(group, fate);
        }
    }
}

pub(crate) async fn delete(shared: &Shared, disks: &[SimDisk], group: usize, disk: usize) {
    let name = {
        let mut oracle = shared.oracle.borrow_mut();
        oracle.member(group, disk).fate = Fate::Deleting;
        shared.let_go.borrow_mut().insert(oracle.groups[group].name.clone());
        oracle.groups[group].name.clone()
    };
    let used = overlays::is_used(shared, group, disk);
    let answer = disks[disk].delete_snapshot(&shared.of_command(), &name).await;
    if shared.is_dead() {
        return;
    }
    if used {
        assert!(
            matches!(answer, Err(Error::SnapshotInUse { .. })),
            "snapshot {name} has overlays: {answer:?}"
        );
        shared.oracle.borrow_mut().member(group, disk).fate = Fate::Held;
        return;
    }
    let fate = match answer {
        Ok(()) => Fate::Gone,
        Err(error) => {
            shared.allow("deleting", &error);
            Fate::Unknown
        }
    };
    shared.oracle.borrow_mut().member(group, disk).fate = fate;
}

/// Ranges that were ever touched, and some others, with what lies close between joined.
fn interesting(shared: &Shared, at: usize, capacity: u64, random: &mut Random) -> Vec<ByteRange> {
    let grains = shared.oracle.borrow().touched(at);
    with_others(capacity, grains, random)
}

/// The ranges of `grains` below `capacity`, and some others, with what lies close between joined.
pub(crate) fn with_others(capacity: u64, mut grains: BTreeSet<u64>, random: &mut Random) -> Vec<ByteRange> {
    grains.split_off(&capacity.div_ceil(GRAIN));
    grains.extend((0..6).map(|_| random.below(capacity.div_ceil(GRAIN))));
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for grain in grains {
        match ranges.last_mut() {
            Some(last) if grain <= last.end + 3 && last.end - last.start < 64 => last.end = grain + 1,
            _ => ranges.push(grain..grain + 1),
        }
    }
    let bytes =
        |grains: &Range<u64>| ByteRange::new(grains.start * GRAIN, (grains.end * GRAIN).min(capacity));
    ranges.iter().map(bytes).collect()
}

/// Judges everything that is there, while nobody changes it.
pub(crate) async fn judge_all(shared: Rc<Shared>, disks: Vec<SimDisk>, mut random: Random, ends: Vec<After>) {
    for ((at, disk), after) in disks.iter().enumerate().zip(ends) {
        for range in interesting(&shared, at, disk.capacity(), &mut random) {
            let mut bytes = buffer(range);
            disk.read(&shared.io, range.start(), Target::of(&mut bytes)).await.expect("no faults now");
            judge(shared.oracle.borrow_mut().settle(at, after, range.start(), &bytes));
        }
        if after == After::Loss && disk.rewind().is_some() {
            // What was lost is told by the first flush.
            shared.oracle.borrow_mut().not_flushed(at);
        }
    }
    let groups = judge_views(&shared, &disks, 0, &mut random).await;
    checkpoints::judge_all(&shared, &disks).await;
    overlays::judge_all(&shared, &disks, &mut random).await;
    for group in groups {
        judge(shared.oracle.borrow().check_instant(group));
    }
    if random.one_in(2) {
        for disk in &disks {
            account(&shared, disk).await;
        }
    }
}

/// Takes a snapshot while nothing else happens, and judges what a backup would get.
pub(crate) async fn back_up(shared: Rc<Shared>, disks: Vec<SimDisk>, mut random: Random) {
    let first = shared.oracle.borrow().groups.len();
    create(&shared, &mut group::Admin::new(), &disks, &mut random).await;
    judge_views(&shared, &disks, first, &mut random).await;
}

/// Judges the views of all snapshots that are held, from number `first` on; those that could be read.
async fn judge_views(shared: &Shared, disks: &[SimDisk], first: usize, random: &mut Random) -> Vec<usize> {
    let mut groups = Vec::new();
    for (at, disk) in disks.iter().enumerate() {
        let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
        for group in held.into_iter().filter(|&group| group >= first) {
            let name = shared.oracle.borrow().groups[group].name.clone();
            let view = match disk.snapshot(&name) {
                Ok(snapshot) => View::new(disk.clone(), snapshot),
                Err(error) => panic!("snapshot {name} of disk {at} is gone: {error}"),
            };
            match judge_view(shared, &view, group, at, random).await {
                Ok(()) => groups.push(group),
                Err(error) => shared.allow_broken("judging a view", &error),
            }
        }
    }
    groups
}

/// Lets a disk finish what deletions left; then each slot is somebody's.
async fn account(shared: &Shared, disk: &SimDisk) {
    let before = freed_by_deletes(disk);
    let rewinding = disk.rewind().is_some();
    maintain_all(&shared.io, disk).await.expect("no faults now");
    if disk.rewind().is_some() {
        // A limit may keep it from that.
        assert!(
            !shared.strict || !shared.terms.is_empty(),
            "{}: a rewind does not end: {:?}",
            disk.name(),
            disk.rewind()
        );
        return;
    }
    check_slots(disk);
    // What is copied back is preserved on the way.
    if !rewinding {
        assert_eq!(before, freed_by_deletes(disk), "{}: maintenance freed something else", disk.name());
    }
}

/// Lets disks with which nobody does anything do what is left to do, if they can; then each slot is somebody's.
pub(crate) async fn account_all(shared: Rc<Shared>, disks: Vec<SimDisk>) {
    for disk in disks.iter().filter(|disk| disk.rewind().is_none()) {
        maintain_all(&shared.io, disk).await.expect("no faults now");
        check_slots(disk);
    }
}

/// Of a disk that has nothing left to do.
fn check_slots(disk: &SimDisk) {
    let held: u64 = disk.snapshots().iter().map(|snapshot| snapshot.bytes_held()).sum();
    let orphaned = disk.bytes_orphaned();
    assert_eq!(disk.bytes_stored(), held + orphaned, "{}: bytes of no snapshot", disk.name());
    assert_eq!(disk.store_budget().used(), held + orphaned, "{}: bytes that are counted", disk.name());
}

/// What deletions of a disk's snapshots would free, one at a time.
fn freed_by_deletes(disk: &SimDisk) -> Vec<u64> {
    disk.snapshots().iter().map(|snapshot| disk.bytes_freed_by_delete(snapshot, u64::MAX)).collect()
}

/// Deletes a snapshot when nothing else happens, and compares what that frees with what was told before.
pub(crate) async fn delete_and_weigh(io: &SimStorage, disk: &SimDisk, name: &str) {
    let snapshot = disk.snapshot(name).expect("it is there");
    let told = disk.bytes_freed_by_delete(&snapshot, u64::MAX);
    maintain_all(io, disk).await.expect("no faults now");
    assert_eq!(disk.bytes_freed_by_delete(&snapshot, u64::MAX), told, "{name}: maintenance changed it");
    let before = disk.bytes_stored();
    disk.delete_snapshot(io, name).await.expect("no faults now");
    maintain_all(io, disk).await.expect("no faults now");
    assert_eq!(before - disk.bytes_stored(), told, "{name}: its deletion freed something else");
}

/// Maintains a disk until there is nothing left to do.
pub(crate) async fn maintain_all(io: &SimStorage, disk: &SimDisk) -> Result<(), Error> {
    let mut admin = group::Admin::new();
    while disk.maintain(&mut admin, io).await? {}
    Ok(())
}

async fn judge_view(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    assert_eq!(view.capacity(), shared.frozen_size(group, at), "a view keeps its size");
    for range in interesting(shared, at, view.capacity(), random) {
        readers::read_view(shared, view, group, at, range).await?;
    }
    if view.block_grid().is_ok() {
        let sinces = shared.oracle.borrow().sinces(group, at);
        let all = ByteRange::new(0, view.capacity());
        for since in sinces {
            let answer = view.changes(&shared.io, since, all, usize::MAX).await?;
            judge(shared.oracle.borrow_mut().changes_told(group, at, since, &answer));
        }
    }
    Ok(())
}
