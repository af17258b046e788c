//! Checkpoints on real files. Concurrency and crashes are the simulation's.

use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::group;
use crate::host::{Executor, HostDir, HostFile, HostStorage, ImageOptions};
use crate::{DiskOptions, Durability, Meanwhile, OpenReport};

const CAPACITY: u64 = 64 << 20;
const BLOCK: u64 = 4096;

type HostDisk = Arc<Disk<HostStorage>>;

struct Rig {
    executor: Executor,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(capacity: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::File::create(folder.path().join("image")).unwrap().set_len(capacity).unwrap();
        std::fs::create_dir(folder.path().join("state")).unwrap();
        Self { executor: Executor::new(16).unwrap(), folder }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn files(&self) -> Vec<PathBuf> {
        let names = std::fs::read_dir(self.state()).unwrap().map(|name| name.unwrap().path());
        let mut files: Vec<_> =
            names.filter(|path| path.extension().is_some_and(|kind| kind == "checkpoint")).collect();
        files.sort();
        files
    }

    fn open_with(&self, block: u64) -> (HostDisk, OpenReport) {
        let options = ImageOptions { read_only: false, direct: false, logical_block_bytes: 512 };
        let image = HostFile::open_image(&self.folder.path().join("image"), options).unwrap();
        // Boots are ours here.
        let meanwhile = Meanwhile { boot_began_ns: None, ..image.meanwhile().unwrap() };
        let options = DiskOptions {
            name: "vda".into(),
            identity: image.identity().unwrap(),
            image,
            image_path: "/image".into(),
            dir: HostDir::new(self.state()),
            tracking: BlockGrid::new(block).ok(),
            boot: [1; 16],
            events: Arc::new(|_| {}),
            merge_step: crate::MERGE_STEP,
            store: crate::StorePlan::default(),
            region_bytes: None,
            meanwhile,
        };
        let io = self.executor.storage();
        let (disk, report) = self.executor.block_on(Disk::open(&io, options)).unwrap();
        let disks = std::slice::from_ref(&disk);
        self.executor.block_on(group::settle(&mut Admin::new(), &io, disks)).unwrap();
        (disk, report)
    }

    fn open(&self) -> HostDisk {
        self.open_with(BLOCK).0
    }

    fn snapshot(&self, disk: &HostDisk, name: &str) {
        let io = self.executor.storage();
        let (mut admin, disks) = (Admin::new(), std::slice::from_ref(disk));
        let taken = group::create(&mut admin, &io, disks, name, 0, Duration::from_secs(5));
        self.executor.block_on(taken).unwrap();
    }

    fn delete_snapshot(&self, disk: &HostDisk, name: &str) {
        self.executor.block_on(disk.delete_snapshot(&self.executor.storage(), name)).unwrap();
    }

    fn create(&self, disk: &HostDisk, name: &str, snapshot: &str) -> Result<(), Error> {
        let io = self.executor.storage();
        let (mut admin, disks) = (Admin::new(), std::slice::from_ref(disk));
        self.executor.block_on(create(&mut admin, &io, disks, name, snapshot)).map(drop)
    }

    fn write(&self, disk: &HostDisk, block: u64) {
        let io = self.executor.storage();
        let bytes = [1; PAGE];
        let written = disk.write(&io, disk.lane(), block * BLOCK, Source::of(&bytes), Durability::Cached);
        self.executor.block_on(written).unwrap();
    }

    /// A page of ranges; all of the disk from `at` on.
    fn ask(
        &self,
        disk: &HostDisk,
        since: Epoch,
        until: &str,
        at: u64,
        limit: usize,
    ) -> Result<Vec<ByteRange>, Error> {
        let until = disk.until(until)?;
        let range = ByteRange::new(at, until.capacity());
        let io = self.executor.storage();
        self.executor.block_on(until.changes(&io, since, range, limit))
    }

    fn close(&self, disk: &HostDisk) {
        let io = self.executor.storage();
        self.executor.block_on(disk.close(&io, || disk.image().identity())).unwrap();
    }
}

/// Every other of 3000 blocks: some pages of runs.
fn scatter(rig: &Rig, disk: &HostDisk) {
    (0..1500).for_each(|nth| rig.write(disk, 2 * nth));
}

#[test]
fn a_checkpoint_answers_as_its_snapshot_did_when_that_is_gone() {
    let rig = Rig::new(CAPACITY);
    let disk = rig.open();
    scatter(&rig, &disk);
    rig.snapshot(&disk, "s1");
    rig.create(&disk, "monday", "s1").unwrap();
    (0..40).for_each(|nth| rig.write(&disk, 300 * nth));
    rig.snapshot(&disk, "s2");
    let monday = disk.instant("monday").unwrap();
    let ask =
        |disk: &HostDisk, until: &str, since: Epoch| rig.ask(disk, since, until, 0, usize::MAX).unwrap();
    let told = [(Epoch::NEVER, "s1"), (Epoch::NEVER, "s2"), (monday.epoch, "s2")]
        .map(|(since, until)| ask(&disk, until, since));
    assert_eq!([told[0].len(), told[2].len()], [1500, 40]);
    // Changes after the instant, and before it is named.
    scatter(&rig, &disk);
    rig.create(&disk, "s2", "s2").unwrap();
    rig.delete_snapshot(&disk, "s1");
    rig.delete_snapshot(&disk, "s2");
    rig.close(&disk);
    drop(disk);
    let disk = rig.open();
    assert_eq!(disk.instant("monday").unwrap(), monday);
    let again = [(Epoch::NEVER, "monday"), (Epoch::NEVER, "s2"), (monday.epoch, "s2")]
        .map(|(since, until)| ask(&disk, until, since));
    assert_eq!(again, told);
    // By its change id too, and page by page from anywhere.
    let id = disk.instant("s2").unwrap().to_string();
    for at in [0, 1, BLOCK, 5000 * BLOCK, CAPACITY] {
        let rest: Vec<_> = told[1]
            .iter()
            .map(|range| range.intersect(ByteRange::new(at, CAPACITY)))
            .filter(|range| !range.is_empty())
            .collect();
        assert_eq!(rig.ask(&disk, Epoch::NEVER, &id, at, usize::MAX).unwrap(), rest, "from {at}");
        assert_eq!(rig.ask(&disk, Epoch::NEVER, &id, at, 7).unwrap(), rest[..rest.len().min(7)], "from {at}");
    }
}

#[test]
fn what_cannot_be_a_checkpoint_is_refused_and_nothing_changed() {
    let rig = Rig::new(CAPACITY);
    let disk = rig.open();
    rig.snapshot(&disk, "s1");
    rig.snapshot(&disk, "s2");
    rig.create(&disk, "c", "s1").unwrap();
    let code = |name: &str, snapshot: &str| rig.create(&disk, name, snapshot).unwrap_err().code();
    assert_eq!(code("c", "s2"), "checkpoint-exists");
    assert_eq!(code("s2", "s1"), "snapshot-exists");
    assert_eq!(code("", "s1"), "bad-name");
    assert_eq!(code("a/1", "s1"), "bad-name");
    assert_eq!(code("d", "s3"), "no-such-snapshot");
    assert_eq!((rig.files().len(), disk.checkpoints().len()), (1, 1));
    let io = rig.executor.storage();
    let delete =
        |name: &str| rig.executor.block_on(async { disk.delete_checkpoint(&mut Admin::new(), &io, name) });
    assert_eq!(delete("d").unwrap_err().code(), "no-such-checkpoint");
    let held = disk.until("c").unwrap();
    delete("c").unwrap();
    let late = rig.executor.block_on(held.changes(&io, Epoch::NEVER, ByteRange::new(0, CAPACITY), 1));
    assert_eq!(late.unwrap_err().code(), "no-such-checkpoint");
    assert_eq!((rig.files().len(), disk.checkpoints().len()), (0, 0));
    // A name is one instant.
    rig.create(&disk, "s1", "s1").unwrap();
    let (mut admin, disks) = (Admin::new(), std::slice::from_ref(&disk));
    rig.delete_snapshot(&disk, "s1");
    let taken = group::create(&mut admin, &io, disks, "s1", 0, Duration::from_secs(5));
    assert_eq!(rig.executor.block_on(taken).unwrap_err().code(), "checkpoint-exists");
    let snapshot = disk.snapshot("s2").unwrap();
    let broken = crate::format::Broken { reason: "test".into(), errno: 0, at_ns: 0 };
    snapshot.set_broken(broken);
    assert_eq!(code("d", "s2"), "snapshot-broken");
}

#[test]
fn of_several_disks_all_have_it_or_none() {
    let (one, two) = (Rig::new(CAPACITY), Rig::new(CAPACITY));
    let (first, second) = (one.open(), two.open_with(0).0);
    let io = one.executor.storage();
    let mut admin = Admin::new();
    let disks = [first, second];
    let taken = group::create(&mut admin, &io, &disks, "s", 0, Duration::from_secs(5));
    one.executor.block_on(taken).unwrap();
    let made = one.executor.block_on(create(&mut admin, &io, &disks, "c", "s"));
    assert_eq!(made.unwrap_err().code(), "not-tracked");
    // One that fails half-way: its state directory is gone.
    let third = Rig::new(CAPACITY);
    let disks = [disks[0].clone(), third.open()];
    let taken = group::create(&mut admin, &io, &disks, "t", 0, Duration::from_secs(5));
    one.executor.block_on(taken).unwrap();
    std::fs::rename(third.state(), third.folder.path().join("away")).unwrap();
    let made = one.executor.block_on(create(&mut admin, &io, &disks, "c", "t"));
    assert_eq!(made.unwrap_err().code(), "io-error");
    assert!(one.files().is_empty() && disks[0].checkpoints().is_empty());
}

#[test]
fn an_ended_generation_leaves_its_checkpoints_with_the_reason() {
    let rig = Rig::new(CAPACITY);
    let disk = rig.open();
    scatter(&rig, &disk);
    rig.snapshot(&disk, "s1");
    rig.create(&disk, "one", "s1").unwrap();
    rig.write(&disk, 7);
    rig.snapshot(&disk, "s2");
    rig.create(&disk, "two", "s2").unwrap();
    let one = disk.instant("one").unwrap();
    let told = rig.ask(&disk, one.epoch, "two", 0, usize::MAX).unwrap();
    assert_eq!(told, [ByteRange::new(7 * BLOCK, 8 * BLOCK)]);
    rig.close(&disk);
    drop(disk);
    let (disk, report) = rig.open_with(2 * BLOCK);
    assert_eq!(report.reset, Some(crate::ResetReason::BlockSizeChanged));
    let ended: Vec<_> = disk.checkpoints().iter().map(|one| one.ended()).collect();
    assert_eq!(ended, [Some("block-size-changed".to_owned()), Some("block-size-changed".to_owned())]);
    assert_eq!(rig.ask(&disk, one.epoch, "two", 0, usize::MAX).unwrap(), told, "both are in the past");
    let error = disk.check_incremental(one).unwrap_err();
    assert!(
        matches!(&error, Error::OtherGeneration { reason, .. } if reason == "block-size-changed"),
        "{error}"
    );
    // The snapshot was kept, but its history was not.
    assert_eq!(rig.create(&disk, "three", "s1").unwrap_err().code(), "other-generation");
    rig.close(&disk);
    drop(disk);
    // Known after another start too.
    let disk = rig.open_with(2 * BLOCK).0;
    let error = disk.check_incremental(one).unwrap_err().to_string();
    assert!(error.contains("(block-size-changed)"), "{error}");
}

#[test]
fn damage_is_noticed_and_costs_no_more_than_it_must() {
    let rig = Rig::new(CAPACITY);
    let disk = rig.open();
    scatter(&rig, &disk);
    rig.snapshot(&disk, "s1");
    rig.create(&disk, "c", "s1").unwrap();
    let told = rig.ask(&disk, Epoch::NEVER, "c", 0, usize::MAX).unwrap();
    rig.close(&disk);
    drop(disk);
    let file = rig.files().remove(0);
    let whole = std::fs::read(&file).unwrap();
    assert!(whole.len() >= 5 * PAGE, "some pages of runs");
    for at in (PAGE..whole.len()).step_by(1013).chain([whole.len() - 1]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        std::fs::write(&file, &bytes).unwrap();
        let disk = rig.open();
        let error = rig.ask(&disk, Epoch::NEVER, "c", 0, usize::MAX).unwrap_err();
        assert_eq!(error.code(), "checkpoint-damaged", "byte {at}");
        assert!(disk.checkpoint("c").unwrap().lost().is_some());
        disk.check_incremental(disk.instant("c").unwrap()).expect("it is good as the older end");
        rig.close(&disk);
    }
    for len in [whole.len() - 1, 2 * PAGE, PAGE] {
        std::fs::write(&file, &whole[..len]).unwrap();
        let disk = rig.open();
        assert!(disk.checkpoint("c").unwrap().lost().is_some(), "at once");
        assert_eq!(rig.ask(&disk, Epoch::NEVER, "c", 0, 1).unwrap_err().code(), "checkpoint-damaged");
        rig.close(&disk);
    }
    std::fs::write(&file, &whole).unwrap();
    let disk = rig.open();
    assert_eq!(rig.ask(&disk, Epoch::NEVER, "c", 0, usize::MAX).unwrap(), told);
    rig.close(&disk);
    drop(disk);
    for at in (0..316).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 4;
        std::fs::write(&file, &bytes).unwrap();
        let (disk, report) = rig.open_with(BLOCK);
        assert_eq!(report.checkpoints_lost.len(), 1, "byte {at}");
        assert!(disk.checkpoints().is_empty() && !file.exists());
        rig.close(&disk);
    }
}

/// Whoever copies or renames files: no number is given twice, or the file of a checkpoint that was answered is replaced.
#[test]
fn a_file_of_the_last_number_costs_no_checkpoint() {
    let rig = Rig::new(CAPACITY);
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    rig.create(&disk, "one", "s").unwrap();
    rig.create(&disk, "two", "s").unwrap();
    rig.close(&disk);
    drop(disk);
    std::fs::write(rig.state().join(file_of(u32::MAX - 1)), [7; PAGE]).unwrap();
    let disk = rig.open();
    rig.create(&disk, "last", "s").unwrap();
    for _ in 0..2 {
        let error = rig.create(&disk, "more", "s").unwrap_err();
        assert_eq!(error.code(), "checkpoint-numbers-exhausted", "{error}");
    }
    let names =
        |disk: &HostDisk| -> Vec<_> { disk.checkpoints().iter().map(|one| one.name().to_owned()).collect() };
    assert_eq!(names(&disk), ["one", "two", "last"]);
    rig.close(&disk);
    drop(disk);
    let disk = rig.open();
    assert_eq!(names(&disk), ["one", "two", "last"]);
    let io = rig.executor.storage();
    rig.executor.block_on(async { disk.delete_checkpoint(&mut Admin::new(), &io, "last") }).unwrap();
    rig.close(&disk);
    drop(disk);
    let disk = rig.open();
    rig.create(&disk, "more", "s").unwrap();
    assert_eq!(names(&disk), ["one", "two", "more"]);
}

#[test]
fn a_checkpoint_of_a_disk_that_was_hardly_written_is_small() {
    // 2^26 blocks: 256 MiB of map, which a page of runs tells.
    let rig = Rig::new(256 << 30);
    let disk = rig.open();
    rig.write(&disk, 12_345_678);
    rig.snapshot(&disk, "s");
    rig.create(&disk, "c", "s").unwrap();
    let told = rig.ask(&disk, Epoch::NEVER, "c", 0, usize::MAX).unwrap();
    assert_eq!(told, [ByteRange::new(12_345_678 * BLOCK, 12_345_679 * BLOCK)]);
    assert_eq!(disk.checkpoint("c").unwrap().bytes(), 2 * PAGE as u64);
}
