//! What is done to disks that are being served: queues, an administrator, readers; and the judging of
//! everything that is there when nothing is done.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use cow_engine::cbt::ByteRange;
use cow_engine::memory::{Source, Target};
use cow_engine::sim::{Random, SimFile, SimStorage};
use cow_engine::{Disk, Durability, Error, Lane, View, Zeroing, group};
use ebbtide_tests::oracle::{Fate, GRAIN, Oracle, SECTOR, stamp};
use ebbtide_tests::overlay_oracle::OverlayOracle;

use crate::overlays;

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
    pub(crate) unmap_works: bool,
    pub(crate) failed_syncs: Vec<Cell<u64>>,
    pub(crate) next_name: Cell<u64>,
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

    /// Everything in flight was cut off.
    pub(crate) fn crash(&self) {
        self.oracle.borrow_mut().crash();
        self.overlays.borrow_mut().crash();
    }

    fn sectors(&self, disk: usize) -> u64 {
        self.oracle.borrow().disks[disk].capacity / SECTOR as u64
    }

    pub(crate) fn range(&self, disk: usize, random: &mut Random, long: u64) -> Range<u64> {
        let sectors = self.sectors(disk);
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
        if self.strict {
            let source = std::error::Error::source(error).map(ToString::to_string);
            panic!("{what}: {error}: {}", source.unwrap_or_default());
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
    let range = bytes_of(&shared.range(at, random, mix.long));
    let begin = shared.oracle.borrow_mut().now();
    let mut bytes = buffer(range);
    let answer = disk.read(&shared.io, range.start(), Target::of(&mut bytes)).await;
    match answer {
        _ if shared.is_dead() => {}
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
    let sectors = shared.range(at, random, mix.long);
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
    shared.oracle.borrow_mut().answer(at, number, answer.is_ok(), fua);
    if let Err(error) = answer {
        shared.allow("changing", &error);
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
        if random.one_in(2) {
            maintain(&shared, &mut admin, &disks, &mut random).await;
        } else if random.one_in(3) {
            overlays::command(&shared, &disks, &mut random).await;
        } else if held.is_empty() || (held.len() as u64) < most_held && !random.one_in(4) {
            create(&shared, &mut admin, &disks, &mut random).await;
        } else {
            let &(group, disk) = random.pick(&held);
            delete(&shared, &disks, group, disk).await;
        }
    }
}

/// Some steps of what deletions left.
async fn maintain(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], random: &mut Random) {
    let disk = random.pick(disks).clone();
    for _ in 0..random.within(1..30) {
        match disk.maintain(admin, &shared.io).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) if shared.is_dead() => return,
            Err(error) => shared.allow("maintaining", &error),
        }
    }
}

async fn create(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], random: &mut Random) {
    let mut members: Vec<usize> = (0..disks.len()).collect();
    random.shuffle(&mut members);
    if random.one_in(3) {
        members.truncate(1);
    }
    let name = format!("s{}", shared.next_name.replace(shared.next_name.get() + 1));
    let chosen: Vec<SimDisk> = members.iter().map(|&disk| disks[disk].clone()).collect();
    let group = shared.oracle.borrow_mut().begin_group(&name, &members);
    let answer = group::create(admin, &shared.io, &chosen, &name, 0, Duration::from_secs(5)).await;
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
            if !matches!(error, Error::GateTimeout { .. }) {
                shared.allow("creating", &error);
            }
            let left = chosen.iter().any(|disk| disk.snapshot(&name).is_ok());
            assert!(!(left && shared.strict), "snapshot {name} is there after {error}");
            let fate = if shared.strict { Fate::Gone } else { Fate::Unknown };
            shared.oracle.borrow_mut().not_created(group, fate);
        }
    }
}

async fn delete(shared: &Shared, disks: &[SimDisk], group: usize, disk: usize) {
    let name = {
        let mut oracle = shared.oracle.borrow_mut();
        oracle.member(group, disk).fate = Fate::Deleting;
        oracle.groups[group].name.clone()
    };
    let used = overlays::is_used(shared, group, disk);
    let answer = disks[disk].delete_snapshot(&shared.io, &name).await;
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

/// Reads views, and asks for changes and holes.
pub(crate) async fn reader(shared: Rc<Shared>, disks: Vec<SimDisk>, mut random: Random, questions: u64) {
    for _ in 0..questions {
        shared.pause(&mut random, 40).await;
        if shared.is_dead() {
            return;
        }
        let at = random.index(disks.len());
        let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
        if held.is_empty() {
            continue;
        }
        // The newest is where most races are.
        let group = if random.one_in(2) { held[held.len() - 1] } else { *random.pick(&held) };
        let name = shared.oracle.borrow().groups[group].name.clone();
        let view = match disks[at].snapshot(&name) {
            Ok(snapshot) => View::new(disks[at].clone(), snapshot),
            Err(error) => panic!("snapshot {name} of disk {at} is gone: {error}"),
        };
        for _ in 0..random.within(1..6) {
            let answer = match random.below(6) {
                0 => some_changes(&shared, &view, group, at, &mut random).await,
                1 => some_holes(&shared, &view, group, at, &mut random).await,
                _ => {
                    let range = bytes_of(&shared.range(at, &mut random, 20));
                    read_view(&shared, &view, group, at, range).await
                }
            };
            if shared.is_dead() {
                return;
            }
            if let Err(error) = answer {
                if shared.oracle.borrow_mut().member(group, at).fate == Fate::Held {
                    shared.allow("reading a view", &error);
                }
                break;
            }
        }
    }
}

async fn read_view(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    range: ByteRange,
) -> Result<(), Error> {
    let mut bytes = buffer(range);
    view.read(&shared.io, range.start(), &mut bytes).await?;
    if !shared.is_dead() {
        judge(shared.oracle.borrow_mut().view_read(group, at, range.start(), &bytes));
    }
    Ok(())
}

async fn some_holes(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let range = bytes_of(&shared.range(at, random, 20));
    let extents = view.extents(&shared.io, range)?;
    let mut end = range.start();
    for extent in &extents {
        assert_eq!(extent.range.start(), end, "extents leave no gap");
        end = extent.range.end();
    }
    assert_eq!(end, range.end(), "extents cover what was asked");
    read_view(shared, view, group, at, range).await?;
    if !shared.is_dead() {
        for extent in extents.iter().filter(|extent| extent.hole) {
            judge(shared.oracle.borrow().view_hole(group, at, extent.range));
        }
    }
    Ok(())
}

async fn some_changes(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let sinces = shared.oracle.borrow().sinces(group, at);
    if sinces.is_empty() || view.block_grid().is_err() {
        return Ok(());
    }
    let since = *random.pick(&sinces);
    let all = ByteRange::new(0, view.capacity());
    let known = shared.oracle.borrow().known_answer(group, at, since).map(<[ByteRange]>::to_vec);
    let Some(known) = known.filter(|_| random.one_in(2)) else {
        let answer = view.changes(&shared.io, since, all, usize::MAX).await?;
        if !shared.is_dead() {
            judge(shared.oracle.borrow_mut().changes_told(group, at, since, &answer));
        }
        return Ok(());
    };
    let part = bytes_of(&shared.range(at, random, 4));
    let limit = random.within(1..5);
    let limit = usize::try_from(limit).unwrap_or(1);
    let answer = view.changes(&shared.io, since, part, limit).await?;
    let expected: Vec<ByteRange> = known
        .iter()
        .map(|range| range.intersect(part))
        .filter(|range| !range.is_empty())
        .take(limit)
        .collect();
    assert_eq!(answer, expected, "a part of the changes differs from the whole");
    Ok(())
}

/// Ranges that were ever touched, and some others, with what lies close between joined.
fn interesting(shared: &Shared, at: usize, random: &mut Random) -> Vec<ByteRange> {
    let grains = shared.oracle.borrow().touched(at);
    with_others(shared, at, grains, random)
}

/// The ranges of `grains` of a disk, and some others, with what lies close between joined.
pub(crate) fn with_others(
    shared: &Shared,
    at: usize,
    mut grains: BTreeSet<u64>,
    random: &mut Random,
) -> Vec<ByteRange> {
    let capacity = shared.oracle.borrow().disks[at].capacity;
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
pub(crate) async fn judge_all(shared: Rc<Shared>, disks: Vec<SimDisk>, mut random: Random, power_cut: bool) {
    for (at, disk) in disks.iter().enumerate() {
        for range in interesting(&shared, at, &mut random) {
            let mut bytes = buffer(range);
            disk.read(&shared.io, range.start(), Target::of(&mut bytes)).await.expect("no faults now");
            judge(shared.oracle.borrow_mut().settle(at, power_cut, range.start(), &bytes));
        }
    }
    let mut groups = Vec::new();
    for (at, disk) in disks.iter().enumerate() {
        let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
        for group in held {
            let name = shared.oracle.borrow().groups[group].name.clone();
            let view = match disk.snapshot(&name) {
                Ok(snapshot) => View::new(disk.clone(), snapshot),
                Err(error) => panic!("snapshot {name} of disk {at} is gone: {error}"),
            };
            match judge_view(&shared, &view, group, at, &mut random).await {
                Ok(()) => groups.push(group),
                Err(error) => shared.allow("judging a view", &error),
            }
        }
    }
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

/// Lets a disk finish what deletions left; then each slot is somebody's.
async fn account(shared: &Shared, disk: &SimDisk) {
    maintain_all(&shared.io, disk).await.expect("no faults now");
    let held: u64 = disk.snapshots().iter().map(|snapshot| snapshot.bytes_held()).sum();
    assert_eq!(disk.bytes_stored(), held, "{}: bytes of no snapshot", disk.name());
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
    for range in interesting(shared, at, random) {
        read_view(shared, view, group, at, range).await?;
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
