//! A disk moves from one simulated host to another with its history, and is cut off anywhere on the way.
//!
//! What must be so: a source that was opened after its export has begun a new generation; an import
//! that answered, or was cut off, leaves the whole history or none; and what is told as changed since an old
//! change id covers what differs, and nothing that was not written.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cow_engine::cbt::{BlockGrid, ByteRange, ChangeId};
use cow_engine::group::{self, Admin};
use cow_engine::handover::{self, Arrival, Left, Moved, Place};
use cow_engine::memory::{Source, Target};
use cow_engine::sim::{Damage, Random, Sim, SimDir, SimFile, SimStorage};
use cow_engine::{Disk, DiskOptions, Durability, Error, Identity, OpenReport, ResetReason, StorePlan, View};

const BLOCK: u64 = 4096;
const BLOCK_LEN: usize = 4096;
const FILE: &str = "moved";

type SimDisk = Arc<Disk<SimStorage>>;

/// An image and its state directory.
#[derive(Clone, Copy)]
struct Home {
    image: SimFile,
    dir: SimDir,
    path: &'static str,
}

struct Rig<'a> {
    sim: Sim,
    io: SimStorage,
    random: Random,
    capacity: u64,
    place: &'a dyn Fn(&str),
}

impl Rig<'_> {
    fn identity(&self, home: Home) -> Identity {
        self.io.identity(home.image)
    }

    fn open(&mut self, home: Home) -> (SimDisk, OpenReport) {
        let options = DiskOptions {
            name: "d".to_owned(),
            image: home.image,
            image_path: home.path.to_owned(),
            identity: self.identity(home),
            dir: home.dir,
            tracking: Some(BlockGrid::new(BLOCK).expect("a block size")),
            boot: self.sim.boot(),
            events: Arc::new(|_| {}),
            merge_step: 10,
            store: StorePlan::default(),
            region_bytes: Some(64 << 10),
            meanwhile: self.io.meanwhile(),
        };
        let io = self.io.clone();
        let opened = self.sim.run(async move { Disk::open(&io, options).await }, u64::MAX);
        opened.expect("it is not cut off").expect("a state directory")
    }

    fn close(&mut self, home: Home, disk: &SimDisk) {
        let (io, disk) = (self.io.clone(), disk.clone());
        let identity = self.io.clone();
        let closed = self
            .sim
            .run(async move { disk.close(&io, || Ok(identity.identity(home.image))).await }, u64::MAX);
        closed.expect("it is not cut off").expect("closed in order");
    }

    /// Writes here and there; the blocks that were touched.
    fn write(&mut self, disk: &SimDisk) -> BTreeSet<u64> {
        let mut touched = BTreeSet::new();
        for _ in 0..self.random.within(0..12) {
            let sectors = self.random.within(1..20).min(self.capacity / 512);
            let at = self.random.below(self.capacity / 512 - sectors + 1) * 512;
            let bytes = vec![
                u8::try_from(self.random.within(1..255)).unwrap_or(1);
                usize::try_from(sectors * 512).unwrap_or(0)
            ];
            touched.extend(at / BLOCK..(at + sectors * 512).div_ceil(BLOCK));
            let (io, disk) = (self.io.clone(), disk.clone());
            let written = self.sim.run(
                async move { disk.write(&io, disk.lane(), at, Source::of(&bytes), Durability::Cached).await },
                u64::MAX,
            );
            written.expect("it is not cut off").expect("written");
        }
        touched
    }

    fn content(&mut self, image: SimFile) -> Vec<u8> {
        let io = self.io.clone();
        let len = usize::try_from(self.capacity).expect("a small image");
        let read = self.sim.run(
            async move {
                let mut bytes = vec![0; len];
                cow_engine::Storage::read(&io, &image, 0, Target::of(&mut bytes)).await.map(|()| bytes)
            },
            u64::MAX,
        );
        read.expect("it is not cut off").expect("no faults")
    }

    fn snapshot(&mut self, disk: &SimDisk, name: &str) -> ChangeId {
        let (io, disks, name) = (self.io.clone(), [disk.clone()], name.to_owned());
        let taken = self.sim.run(
            async move {
                let mut admin = Admin::new();
                group::create(&mut admin, &io, &disks, &name, 1, Duration::from_secs(1)).await
            },
            u64::MAX,
        );
        taken.expect("it is not cut off").expect("a snapshot").taken[0].change_id
    }

    fn changes(&mut self, disk: &SimDisk, snapshot: &str, since: ChangeId) -> BTreeSet<u64> {
        let snapshot = disk.snapshot(snapshot).expect("it was taken");
        let epoch = disk.resolve(since, snapshot.change_id()).expect("an instant of this history");
        let view = View::new(disk.clone(), snapshot);
        let (io, range) = (self.io.clone(), ByteRange::new(0, self.capacity));
        let found = self.sim.run(async move { view.changes(&io, epoch, range, usize::MAX).await }, u64::MAX);
        let found = found.expect("it is not cut off").expect("changes are told");
        found.iter().flat_map(|range| range.start() / BLOCK..range.end().div_ceil(BLOCK)).collect()
    }

    fn export(&mut self, home: Home, to: SimDir, limit: u64) -> Option<Result<Moved, Error>> {
        (self.place)(&format!("export, {limit} steps from {}", self.sim.steps()));
        let (io, identity, boot) = (self.io.clone(), self.identity(home), self.sim.boot());
        let Home { image, dir, .. } = home;
        let export = async move {
            let left = Left { dir: &dir, image: &image, identity, boot };
            handover::export(&io, &left, Place { dir: &to, name: FILE }).await
        };
        self.sim.run(export, limit)
    }

    fn import(
        &mut self,
        home: Home,
        from: SimDir,
        replace: bool,
        limit: u64,
    ) -> Option<Result<Moved, Error>> {
        (self.place)(&format!("import, {limit} steps from {}", self.sim.steps()));
        let (io, identity, boot) = (self.io.clone(), self.identity(home), self.sim.boot());
        let Home { image, dir, path } = home;
        let import = async move {
            let file = cow_engine::Storage::open(&io, &from, FILE)
                .map_err(|source| Error::Io { what: "opening the history file", source })?;
            let image_path = path.to_owned();
            let arrival =
                Arrival { file: &file, image: &image, image_path, identity, dir: &dir, boot, replace };
            handover::import(&io, &arrival).await
        };
        self.sim.run(import, limit)
    }

    /// Whether it was a power cut.
    fn crash(&mut self) -> bool {
        let power = self.random.one_in(2);
        if power {
            self.sim.power_cut()
        } else {
            self.sim.kill()
        }
        power
    }

    fn cut_off(&mut self, usual: u64) -> u64 {
        if self.random.one_in(4) { u64::MAX } else { self.random.within(1..usual) }
    }

    /// What differs between two contents, in blocks.
    fn differ(one: &[u8], other: &[u8]) -> BTreeSet<u64> {
        let pairs = one.chunks(BLOCK_LEN).zip(other.chunks(BLOCK_LEN));
        (0..).zip(pairs).filter(|(_, (one, other))| one != other).map(|(block, _)| block).collect()
    }
}

/// Runs the move that `seed` draws.
///
/// # Panics
/// If anything is not as the module says.
pub(crate) fn run(seed: u64, place: &dyn Fn(&str)) {
    let mut random = Random::new(seed ^ 0x0b0e);
    let sim = Sim::new(seed);
    let io = sim.storage();
    let capacity = random.within(9..3000) * 512;
    let mut rig = Rig { sim, io, random, capacity, place };
    let from = Home { image: rig.sim.add_image(capacity), dir: rig.sim.add_dir(), path: "/from.img" };
    let files = rig.sim.add_dir();

    // A life with an instant that is remembered, and changes before it and after it.
    let (disk, _) = rig.open(from);
    let before = rig.write(&disk);
    let old_id = rig.snapshot(&disk, "old");
    let then = rig.content(from.image);
    let first_id = ChangeId { epoch: old_id.epoch.previous(), ..old_id };
    let mut after = rig.write(&disk);
    if rig.random.one_in(2) {
        rig.snapshot(&disk, "newer");
        after.extend(rig.write(&disk));
    }
    let online = rig.random.one_in(3);
    if online {
        hand_over_online(&mut rig, from, files, &disk);
    } else {
        rig.close(from, &disk);
        drop(disk);
        if !export_whatever_happens(&mut rig, from, files, old_id) {
            return;
        }
    }

    // The image is copied, the history taken in; over something that is there, or not.
    let to = Home { image: rig.sim.add_image(capacity), dir: rig.sim.add_dir(), path: "/to.img" };
    let replace = rig.random.one_in(3);
    if replace {
        let (disk, _) = rig.open(to);
        rig.write(&disk);
        rig.snapshot(&disk, "foreign");
        rig.write(&disk);
        rig.close(to, &disk);
    }
    let moved = rig.content(from.image);
    rig.sim.change_offline(to.image, 0, &moved, false, true);
    let imported = import_whatever_happens(&mut rig, to, files, replace, old_id);
    if !imported {
        return;
    }

    // It goes on there.
    let (disk, report) = rig.open(to);
    assert_eq!(report.reset, None, "the imported history is believed");
    assert!(report.kept.is_empty() && report.dropped.is_empty(), "{report:?}");
    assert_eq!(disk.change_id().generation, old_id.generation);
    after.extend(rig.write(&disk));
    rig.snapshot(&disk, "there");
    let now = rig.content(to.image);
    let told = rig.changes(&disk, "there", old_id);
    assert!(told.is_superset(&Rig::differ(&then, &now)), "what differs is told");
    assert_eq!(told, after, "exactly what was written before and after the move");
    let all: BTreeSet<u64> = before.union(&after).copied().collect();
    assert_eq!(rig.changes(&disk, "there", first_id), all);
    rig.close(to, &disk);

    // Where it came from it does not.
    let (disk, report) = rig.open(from);
    assert_eq!(report.reset, Some(ResetReason::HandedOver));
    assert!(report.kept.is_empty(), "{report:?}");
    assert_ne!(disk.change_id().generation, old_id.generation);
}

/// Hands a served disk over; nothing changes it afterwards.
fn hand_over_online(rig: &mut Rig<'_>, from: Home, files: SimDir, disk: &SimDisk) {
    let (io, served) = (rig.io.clone(), disk.clone());
    let identity = rig.io.clone();
    let moved = rig.sim.run(
        async move {
            let to = Place { dir: &files, name: FILE };
            let limit = Duration::from_secs(1);
            let asked = || Ok(identity.identity(from.image));
            served.hand_over(&mut Admin::new(), &io, to, limit, asked).await
        },
        u64::MAX,
    );
    moved.expect("it is not cut off").expect("handed over");
    let (io, served) = (rig.io.clone(), disk.clone());
    let refused = rig.sim.run(
        async move { served.write(&io, served.lane(), 0, Source::of(&[1; 512]), Durability::Cached).await },
        u64::MAX,
    );
    assert!(matches!(refused, Some(Err(Error::HandedOver { .. }))), "{refused:?}");
    if rig.random.one_in(2) {
        rig.close(from, disk);
    } else {
        rig.sim.kill();
    }
}

/// Exports until there is a file, however often it is cut off; whether there is one. Sometimes the disk is opened
/// in between.
fn export_whatever_happens(rig: &mut Rig<'_>, from: Home, files: SimDir, old_id: ChangeId) -> bool {
    let mut torn = false;
    loop {
        let limit = rig.cut_off(60);
        match rig.export(from, files, limit) {
            Some(Ok(_)) => return true,
            // A power cut tore the superblock that was being written.
            Some(Err(Error::NotMovable { why })) if torn && why.contains("superblock is damaged") => {
                let (disk, report) = rig.open(from);
                assert_eq!(report.reset, Some(ResetReason::Damaged));
                assert_ne!(disk.change_id().generation, old_id.generation);
                return false;
            }
            Some(Err(Error::Io { source, .. })) if source.kind() == std::io::ErrorKind::AlreadyExists => {
                // Of an export that was cut off.
                match rig.import(from, files, false, u64::MAX) {
                    Some(Err(Error::BadHistory { .. })) => {}
                    // It was finished, and nobody was told: the source does not go on.
                    Some(Err(Error::HistoryExists)) => {
                        // Who takes the file to another host has it for certain.
                        let io = rig.io.clone();
                        let kept = async move {
                            let file = cow_engine::Storage::open(&io, &files, FILE)?;
                            cow_engine::Storage::sync(&io, &file).await?;
                            cow_engine::Storage::sync_dir(&io, &files)
                        };
                        rig.sim.run(kept, u64::MAX).expect("it is not cut off").expect("no faults");
                        return true;
                    }
                    other => panic!("what an export leaves: {other:?}"),
                }
                cow_engine::Storage::remove(&rig.io, &files, FILE).expect("no faults");
                cow_engine::Storage::sync_dir(&rig.io, &files).expect("no faults");
                cancel_sometimes(rig, from, old_id);
            }
            Some(Err(error)) => panic!("export: {error:?}"),
            None => torn |= rig.crash(),
        }
    }
}

/// What was handed over for a file that is gone goes on, if the operator says so.
fn cancel_sometimes(rig: &mut Rig<'_>, from: Home, old_id: ChangeId) {
    if !rig.random.one_in(2) {
        return;
    }
    let (io, dir) = (rig.io.clone(), from.dir);
    let cancelled = rig.sim.run(async move { handover::cancel(&io, &dir).await }, u64::MAX);
    match cancelled.expect("it is not cut off") {
        Ok(()) | Err(Error::NotMovable { .. }) => {}
        Err(error) => panic!("cancel: {error:?}"),
    }
    let (disk, report) = rig.open(from);
    assert_eq!(report.reset, None, "it goes on");
    assert_eq!(disk.change_id().generation, old_id.generation);
    rig.close(from, &disk);
}

/// Imports until it answers; whether the history is there.
fn import_whatever_happens(
    rig: &mut Rig<'_>,
    to: Home,
    files: SimDir,
    mut replace: bool,
    old_id: ChangeId,
) -> bool {
    if replace {
        let refused = rig.import(to, files, false, u64::MAX);
        assert!(matches!(refused, Some(Err(Error::HistoryExists))), "{refused:?}");
    }
    loop {
        let limit = rig.cut_off(80);
        match rig.import(to, files, replace, limit) {
            Some(Ok(_)) => {
                if rig.random.one_in(3) {
                    rig.sim.power_cut();
                }
                return true;
            }
            Some(Err(Error::HistoryExists)) if !replace => replace = true,
            Some(Err(error)) => panic!("import: {error:?}"),
            None => {
                rig.crash();
            }
        }
        if rig.random.one_in(3) {
            // Opened as it is: whole, or begun anew.
            let identity = rig.identity(to);
            let (disk, report) = rig.open(to);
            match &report.reset {
                None if disk.change_id().generation == old_id.generation => {
                    rig.close(to, &disk);
                    assert_eq!(rig.identity(to), identity);
                    return true;
                }
                // The old history of the image that was there: it was changed since, so it cannot go on.
                None => panic!("a history that is not the image's goes on: {report:?}"),
                Some(_) => {
                    assert_ne!(disk.change_id().generation, old_id.generation);
                    return false;
                }
            }
        }
        // What a cut-off import leaves is in nobody's way, unless the superblock is torn.
        replace = replace || rig.random.one_in(2);
    }
}

/// Every byte of a history file is watched, and so is its end.
pub(crate) fn damage_is_refused() {
    let sim = Sim::new(7);
    let io = sim.storage();
    let capacity = 64 << 10;
    let mut rig = Rig { sim, io, random: Random::new(7), capacity, place: &|_| {} };
    let from = Home { image: rig.sim.add_image(capacity), dir: rig.sim.add_dir(), path: "/from.img" };
    let to = Home { image: rig.sim.add_image(capacity), dir: rig.sim.add_dir(), path: "/to.img" };
    let files = rig.sim.add_dir();
    let (disk, _) = rig.open(from);
    rig.write(&disk);
    rig.snapshot(&disk, "old");
    rig.write(&disk);
    rig.close(from, &disk);
    rig.export(from, files, u64::MAX).expect("it is not cut off").expect("exported");
    let content = rig.content(from.image);
    rig.sim.change_offline(to.image, 0, &content, false, true);
    let refused = |rig: &mut Rig<'_>, what: &str| {
        let answer = rig.import(to, files, false, u64::MAX).expect("it is not cut off");
        assert!(matches!(answer, Err(Error::BadHistory { .. })), "{what}: {answer:?}");
        assert!(rig.sim.names(to.dir).expect("a directory").is_empty(), "{what}: nothing is made");
    };
    let len = rig.sim.len_of(files, FILE);
    for at in 0..len {
        rig.sim.damage(files, FILE, Damage::Flip(at));
        refused(&mut rig, &format!("byte {at} of {len}"));
        rig.sim.damage(files, FILE, Damage::Flip(at));
    }
    for cut in (0..len).rev().step_by(13) {
        rig.sim.damage(files, FILE, Damage::Cut(cut));
        refused(&mut rig, &format!("cut at {cut} of {len}"));
    }
}
