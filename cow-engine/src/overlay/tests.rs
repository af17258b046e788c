//! Overlays on real files. Concurrency and crashes are the simulation's.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cbt::ByteRange;

use super::*;
use crate::format::Broken;
use crate::group::{self, Admin};
use crate::host::{Executor, HostDir, HostFile, HostStorage, ImageOptions};
use crate::{Disk, DiskOptions, OpenReport};

/// Ends within a grain.
const CAPACITY: u64 = (1 << 20) + 512;
const BOOT: [u8; 16] = [1; 16];

type HostDisk = Arc<Disk<HostStorage>>;

struct Rig {
    executor: Executor,
    folder: tempfile::TempDir,
}

impl Rig {
    /// An image of sevens.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("image"), vec![7; usize::try_from(CAPACITY).unwrap()]).unwrap();
        std::fs::create_dir(folder.path().join("state")).unwrap();
        Self { executor: Executor::new(16).unwrap(), folder }
    }

    fn state(&self) -> std::path::PathBuf {
        self.folder.path().join("state")
    }

    fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.state()).unwrap();
        let names = names.map(|name| name.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name.contains("overlay")).collect();
        names.sort();
        names
    }

    fn open_in(&self, boot: [u8; 16]) -> (HostDisk, OpenReport) {
        let path = self.folder.path().join("image");
        let options = ImageOptions { read_only: false, direct: false, logical_block_bytes: 512 };
        let image = HostFile::open_image(Path::new(&path), options).unwrap();
        // Boots are ours here.
        let meanwhile = crate::Meanwhile { boot_began_ns: None, ..image.meanwhile().unwrap() };
        let options = DiskOptions {
            name: "vda".into(),
            identity: image.identity().unwrap(),
            image,
            image_path: "/image".into(),
            dir: HostDir::new(self.state()),
            tracking: None,
            boot,
            events: Arc::new(|_| {}),
            merge_step: crate::MERGE_STEP,
            store: crate::StorePlan::default(),
            region_bytes: None,
            meanwhile,
        };
        self.executor.block_on(Disk::open(&self.executor.storage(), options)).unwrap()
    }

    fn open(&self) -> HostDisk {
        self.open_in(BOOT).0
    }

    fn snapshot(&self, disk: &HostDisk, name: &str) {
        let io = self.executor.storage();
        let (mut admin, disks) = (Admin::new(), std::slice::from_ref(disk));
        let taken = group::create(&mut admin, &io, disks, name, 0, Duration::from_secs(5));
        self.executor.block_on(taken).unwrap();
    }

    fn overlay(&self, disk: &HostDisk, name: &str, keep: bool) -> Result<Overlay<HostStorage>, Error> {
        let io = self.executor.storage();
        self.executor.block_on(disk.open_overlay(&io, "s", name, keep, "note"))
    }

    fn close(&self, disk: &HostDisk) {
        let io = self.executor.storage();
        self.executor.block_on(disk.close(&io, || disk.image().identity())).unwrap();
    }

    fn read(&self, overlay: &Overlay<HostStorage>, at: u64, len: usize) -> Result<Vec<u8>, Error> {
        let mut out = vec![0xee; len];
        let io = self.executor.storage();
        self.executor.block_on(overlay.read(&io, at, Target::of(&mut out)))?;
        Ok(out)
    }

    fn all(&self, overlay: &Overlay<HostStorage>) -> Vec<u8> {
        self.read(overlay, 0, usize::try_from(CAPACITY).unwrap()).unwrap()
    }

    fn write(&self, overlay: &Overlay<HostStorage>, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let io = self.executor.storage();
        let lane = overlay.lane();
        self.executor.block_on(overlay.write(&io, lane, at, Source::of(bytes), Durability::Cached))
    }

    fn zero(&self, overlay: &Overlay<HostStorage>, range: ByteRange, zeroing: Zeroing) {
        let io = self.executor.storage();
        let lane = overlay.lane();
        let zeroed = overlay.write_zeroes(&io, lane, range, zeroing, Durability::Durable);
        self.executor.block_on(zeroed).unwrap();
    }
}

/// What the whole overlay should hold, changed by hand.
fn model() -> Vec<u8> {
    vec![7; usize::try_from(CAPACITY).unwrap()]
}

#[test]
fn writes_of_any_shape_read_back_beside_the_snapshot() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let overlay = rig.overlay(&disk, "o", false).unwrap();
    let mut model = model();
    let end = model.len();
    for (round, (at, len)) in
        [(0, 1), (4095, 2), (5000, 100), (4096, 4096), (9000, 300_000), (end - 1, 1), (end - 5000, 5000)]
            .into_iter()
            .enumerate()
    {
        let bytes = vec![u8::try_from(round).unwrap() + 20; len];
        rig.write(&overlay, at as u64, &bytes).unwrap();
        model[at..at + len].copy_from_slice(&bytes);
        assert!(rig.all(&overlay) == model, "after {len} bytes at {at}");
    }
    assert!(std::fs::read(rig.folder.path().join("image")).unwrap().iter().all(|&byte| byte == 7));
    assert_eq!(rig.read(&overlay, 4000, 200).unwrap(), model[4000..4200]);
}

#[test]
fn zeros_of_any_shape_read_back() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let overlay = rig.overlay(&disk, "o", false).unwrap();
    let mut model = model();
    rig.write(&overlay, 20_000, &[9; 20_000]).unwrap();
    model[20_000..40_000].fill(9);
    let end = model.len();
    for (at, len) in
        [(10, 20), (4000, 200), (8192, 4096), (10_000, 40_000), (100_000, 8190), (end - 513, 513)]
    {
        for zeroing in [Zeroing::Unmap, Zeroing::Keep] {
            rig.zero(&overlay, ByteRange::at(at as u64, len as u64).unwrap(), zeroing);
            model[at..at + len].fill(0);
            assert!(rig.all(&overlay) == model, "after {len} zeros at {at}");
        }
    }
}

#[test]
fn what_an_unpublished_write_left_is_not_seen() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let overlay = rig.overlay(&disk, "o", false).unwrap();
    let io = rig.executor.storage();
    let left = overlay.layer().write(&io, 8192, Source::of(&[1; 8192]));
    rig.executor.block_on(left).unwrap();
    assert!(rig.all(&overlay) == model());
    rig.zero(&overlay, ByteRange::new(8192, 12_288), Zeroing::Unmap);
    rig.write(&overlay, 12_300, &[2]).unwrap();
    let mut model = model();
    model[8192..12_288].fill(0);
    model[12_300] = 2;
    assert!(rig.all(&overlay) == model);
}

#[test]
fn overlays_of_one_snapshot_know_nothing_of_each_other() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let (a, b) = (rig.overlay(&disk, "a", false).unwrap(), rig.overlay(&disk, "b", true).unwrap());
    rig.write(&a, 0, &[1; 5000]).unwrap();
    assert!(rig.all(&b) == model());
    rig.write(&b, 100, &[2; 100]).unwrap();
    assert_eq!(rig.read(&a, 0, 5001).unwrap()[..5000], [1; 5000]);
    assert_eq!((a.bytes_used(), b.bytes_used()), (8192, 4096));
    let names: Vec<_> = disk.overlays().iter().map(|overlay| overlay.name().to_owned()).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn extents_tell_data_and_zeros_of_both_layers() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let overlay = rig.overlay(&disk, "o", false).unwrap();
    rig.zero(&overlay, ByteRange::new(65_536, 131_072), Zeroing::Unmap);
    let io = rig.executor.storage();
    let extents = overlay.extents(&io, ByteRange::new(0, CAPACITY)).unwrap();
    let told: Vec<_> = extents.iter().map(|e| (e.range.start(), e.range.end(), e.hole)).collect();
    assert_eq!(told, [(0, 65_536, false), (65_536, 131_072, true), (131_072, CAPACITY, false)]);
}

#[test]
fn a_snapshot_with_overlays_is_not_deleted() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let overlay = rig.overlay(&disk, "o", false).unwrap();
    let io = rig.executor.storage();
    let refused = rig.executor.block_on(disk.delete_snapshot(&io, "s"));
    assert!(matches!(refused, Err(Error::SnapshotInUse { overlays, .. }) if overlays == "o"));
    assert!(rig.all(&overlay) == model());
    disk.close_overlay(&io, "s", "o").unwrap();
    assert!(matches!(rig.read(&overlay, 0, 1), Err(Error::OverlayClosed { .. })));
    assert!(matches!(rig.write(&overlay, 0, &[1]), Err(Error::OverlayClosed { .. })));
    assert!(matches!(disk.close_overlay(&io, "s", "o"), Err(Error::NoSuchOverlay { .. })));
    assert_eq!(rig.files(), Vec::<String>::new());
    rig.executor.block_on(disk.delete_snapshot(&io, "s")).unwrap();
    assert!(matches!(disk.close_overlay(&io, "s", "o"), Err(Error::NoSuchSnapshot { .. })));
}

#[test]
fn names_are_checked() {
    let rig = Rig::new();
    let disk = rig.open();
    assert!(matches!(rig.overlay(&disk, "o", false), Err(Error::NoSuchSnapshot { .. })));
    rig.snapshot(&disk, "s");
    rig.overlay(&disk, "o", false).unwrap();
    assert!(matches!(rig.overlay(&disk, "o", true), Err(Error::OverlayExists { .. })));
    for bad in ["", "a/b", "../x", "a@b", &"x".repeat(129)] {
        assert!(matches!(rig.overlay(&disk, bad, false), Err(Error::BadName { .. })), "{bad}");
    }
    assert_eq!(rig.files().len(), 3);
}

#[test]
fn where_the_snapshot_is_broken_the_overlay_says_so() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let overlay = rig.overlay(&disk, "o", false).unwrap();
    rig.write(&overlay, 0, &[1; 8192]).unwrap();
    disk.snapshot("s").unwrap().set_broken(Broken {
        reason: "the store is full".into(),
        errno: 28,
        at_ns: 0,
    });
    assert_eq!(rig.read(&overlay, 100, 5000).unwrap(), [1; 5000]);
    let broken =
        |error: Error| matches!(error, Error::SnapshotBroken { reason, .. } if reason == "the store is full");
    assert!(broken(rig.read(&overlay, 8000, 500).unwrap_err()));
    assert!(broken(rig.write(&overlay, 12_000, &[1; 10]).unwrap_err()));
    rig.write(&overlay, 8192, &[2; 4096]).unwrap();
    assert_eq!(rig.read(&overlay, 8000, 500).unwrap()[192..], [2; 308]);
    assert!(matches!(rig.overlay(&disk, "p", false), Err(Error::SnapshotBroken { .. })));
}

#[test]
fn kept_overlays_outlive_the_daemon_and_others_do_not() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    let kept = rig.overlay(&disk, "kept", true).unwrap();
    rig.write(&kept, 4000, &[1; 200]).unwrap();
    rig.overlay(&disk, "other", false).unwrap();
    drop((kept, disk));
    // As after a kill, and then twice after a close in order, of which the second is in another boot.
    for boot in [BOOT, BOOT, [2; 16]] {
        let (disk, report) = rig.open_in(boot);
        assert_eq!(report.overlays_dropped, []);
        let overlays = disk.overlays();
        assert_eq!(overlays.len(), 1);
        assert_eq!((overlays[0].name(), overlays[0].note()), ("kept", "note"));
        assert_eq!(overlays[0].bytes_used(), 8192);
        assert_eq!(rig.read(&overlays[0], 3999, 202).unwrap(), [&[7], &[1; 200][..], &[7]].concat());
        assert_eq!(rig.files().len(), 3);
        rig.close(&disk);
    }
}

#[test]
fn overlays_go_with_their_snapshots_after_a_stop_of_the_host() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.snapshot(&disk, "s");
    rig.overlay(&disk, "o", true).unwrap();
    drop(disk);
    let (disk, report) = rig.open_in([2; 16]);
    assert!(disk.overlays().is_empty());
    assert_eq!(report.overlays_dropped.len(), 1);
    assert!(report.overlays_dropped[0].1.contains("host stopped"), "{report:?}");
    assert_eq!(rig.files(), Vec::<String>::new());
}

#[test]
fn damage_costs_the_overlay_and_is_told() {
    for (file, len) in [("overlay", 4096), ("overlay-data", 100), ("overlay-cells", 4096)] {
        let rig = Rig::new();
        let disk = rig.open();
        rig.snapshot(&disk, "s");
        rig.overlay(&disk, "o", true).unwrap();
        drop(disk);
        std::fs::write(rig.state().join(format!("0000000001.{file}")), vec![1; len]).unwrap();
        let (disk, report) = rig.open_in(BOOT);
        assert!(disk.overlays().is_empty() && disk.snapshot("s").is_ok());
        assert_eq!(report.overlays_dropped.len(), 1, "{file}: {report:?}");
        assert!(report.overlays_dropped[0].1.contains("damaged"), "{report:?}");
        assert_eq!(rig.files(), Vec::<String>::new());
    }
}

#[test]
fn what_a_cut_off_creation_left_is_removed() {
    let rig = Rig::new();
    let disk = rig.open();
    drop(disk);
    for file in ["0000000004.overlay-data", "0000000005.overlay-cells", "0000000006.overlay"] {
        std::fs::write(rig.state().join(file), b"").unwrap();
    }
    let (_, report) = rig.open_in(BOOT);
    assert_eq!(report.overlays_dropped, []);
    assert_eq!(rig.files(), Vec::<String>::new());
}
