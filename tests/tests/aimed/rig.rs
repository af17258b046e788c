//! A simulated host with one disk, for tests that aim at one place.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use cow_engine::cbt::{BlockGrid, ByteRange, ChangeId};
use cow_engine::group::{self, Admin};
use cow_engine::memory::Source;
use cow_engine::sim::{FileKind, OpKind, Rule, Sim, SimDir, SimFile, SimStorage};
use cow_engine::{Disk, DiskOptions, Durability, OpenReport, StorePlan, Terms, View};

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const BLOCKS: u64 = 64;
pub(crate) const SEEDS: u64 = 200;
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) type SimDisk = Arc<Disk<SimStorage>>;

/// A host, and a disk of it.
pub(crate) struct Rig {
    pub(crate) sim: Sim,
    pub(crate) io: SimStorage,
    pub(crate) image: SimFile,
    pub(crate) dir: SimDir,
    /// Bytes of a tracked block.
    pub(crate) tracked: u64,
}

impl Rig {
    pub(crate) fn new(seed: u64) -> Self {
        Self::of_blocks(seed, BLOCKS)
    }

    pub(crate) fn of_blocks(seed: u64, blocks: u64) -> Self {
        let sim = Sim::new(seed);
        let (io, image, dir) = (sim.storage(), sim.add_image(blocks * BLOCK), sim.add_dir());
        Self { sim, io, image, dir, tracked: BLOCK }
    }

    /// Drives something to its end.
    pub(crate) fn run<T>(&mut self, main: impl Future<Output = T>) -> T {
        self.sim.run(main, u64::MAX).expect("it is not cut off")
    }

    pub(crate) fn open_with(&mut self, image: SimFile, dir: SimDir, path: &str) -> (SimDisk, OpenReport) {
        let (io, options) = (self.io.clone(), self.options(image, dir, path));
        self.run(async move { Disk::open(&io, options).await }).expect("a state directory")
    }

    pub(crate) fn options(&self, image: SimFile, dir: SimDir, path: &str) -> DiskOptions<SimStorage> {
        DiskOptions {
            name: "d".to_owned(),
            image,
            image_path: path.to_owned(),
            identity: self.io.identity(image),
            dir,
            tracking: Some(BlockGrid::new(self.tracked).expect("a block size")),
            boot: self.sim.boot(),
            events: Arc::new(|_| {}),
            merge_step: 10,
            store: StorePlan::default(),
            region_bytes: Some(4096),
            meanwhile: self.io.meanwhile(),
        }
    }

    pub(crate) fn open(&mut self) -> (SimDisk, OpenReport) {
        let (image, dir) = (self.image, self.dir);
        self.open_with(image, dir, "/d.img")
    }

    /// A start that is cut off in its operation number `last` or soon after it, if it has as many; whether it was.
    pub(crate) fn start_until(&mut self, last: u64) -> bool {
        let io = self.io.fated(None, 0..0, last);
        let options = self.options(self.image, self.dir, "/d.img");
        self.sim.run(async move { Disk::open(&io, options).await.map(drop) }, u64::MAX).is_none()
    }

    /// A start that may fail: the first one may be told of a flush that failed before.
    pub(crate) fn start_in_vain(&mut self) {
        let (io, options) = (self.io.clone(), self.options(self.image, self.dir, "/d.img"));
        let _ = self.run(async move { Disk::open(&io, options).await.map(drop) });
    }

    pub(crate) fn close(&mut self, disk: &SimDisk, image: SimFile) {
        let (io, disk) = (self.io.clone(), disk.clone());
        let identity = io.identity(image);
        self.run(async move { disk.close(&io, || Ok(identity)).await }).expect("closed in order");
    }

    pub(crate) fn write(&mut self, disk: &SimDisk, block: u64, byte: u8) {
        let (io, disk, bytes) = (self.io.clone(), disk.clone(), [byte; 4096]);
        let written = async move {
            disk.write(&io, disk.lane(), block * BLOCK, Source::of(&bytes), Durability::Cached).await
        };
        self.run(written).expect("written");
    }

    pub(crate) fn snapshot(&mut self, disk: &SimDisk, name: &'static str) -> ChangeId {
        self.snapshot_on(disk, name, Terms::default())
    }

    pub(crate) fn snapshot_on(&mut self, disk: &SimDisk, name: &'static str, terms: Terms) -> ChangeId {
        let (io, disks) = (self.io.clone(), [disk.clone()]);
        let taken =
            async move { group::create_on(&mut Admin::new(), &io, &disks, name, 1, PATIENCE, terms).await };
        self.run(taken).expect("a snapshot").taken[0].change_id
    }

    pub(crate) fn changes(&mut self, disk: &SimDisk, name: &str, since: ChangeId) -> BTreeSet<u64> {
        let snapshot = disk.snapshot(name).expect("it was taken");
        let epoch = disk.resolve(since, snapshot.change_id()).expect("an instant of this history");
        let (io, view) = (self.io.clone(), View::new(disk.clone(), snapshot));
        let all = ByteRange::new(0, view.capacity());
        let found = self.run(async move { view.changes(&io, epoch, all, usize::MAX).await }).expect("told");
        found.iter().flat_map(|range| range.start() / BLOCK..range.end().div_ceil(BLOCK)).collect()
    }

    pub(crate) fn content(&mut self, image: SimFile) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(BLOCKS * BLOCK).expect("small")];
        self.sim.look(image, 0, &mut bytes);
        bytes
    }

    pub(crate) fn fail(&mut self, op: OpKind, file: FileKind) {
        self.sim.set_faults(vec![Rule { op, file, one_in: 1, error: ErrorKind::Other }]);
    }

    pub(crate) fn fail_no_more(&mut self) {
        self.sim.set_faults(Vec::new());
    }

    /// A sign of life, as the daemon gives one each second.
    pub(crate) fn beat(&mut self, disk: &SimDisk) {
        disk.beat(self.io.now_ns(), || Ok(self.io.identity(self.image))).expect("an image can be asked");
    }

    /// The daemon gives a last sign of life, and is killed.
    pub(crate) fn kill(&mut self, disk: SimDisk) {
        self.beat(&disk);
        drop(disk);
        self.sim.kill();
    }

    /// Cools every region, as the daemon does now and then.
    pub(crate) fn cool(&mut self, disk: &SimDisk) {
        for _ in 0..2 {
            let (io, disk) = (self.io.clone(), disk.clone());
            self.run(async move { disk.cool(&io).await });
        }
    }
}

/// Whether a snapshot is there and not broken.
pub(crate) fn is_whole(disk: &SimDisk, name: &str) -> bool {
    disk.snapshot(name).is_ok_and(|one| one.broken().is_none())
}

/// Blocks that differ between two contents.
pub(crate) fn differing(one: &[u8], other: &[u8]) -> BTreeSet<u64> {
    let len = usize::try_from(BLOCK).expect("small");
    let pairs = one.chunks(len).zip(other.chunks(len));
    (0..).zip(pairs).filter(|(_, (one, other))| one != other).map(|(block, _)| block).collect()
}
