//! The kernel could not write the map's control page, and the process that kept it in memory is gone.

use std::io::ErrorKind;

use cow_engine::group::Admin;
use cow_engine::memory::Target;
use cow_engine::sim::{FileKind, OpKind, Rule};
use cow_engine::{Disk, Error};

use crate::rig::{BLOCK, PATIENCE, Rig, SEEDS, SimDisk, is_whole};

impl Rig {
    /// A sign of life, and what was noted until now is on the medium.
    fn settle(&mut self, disk: &SimDisk) {
        self.beat(disk);
        self.write(disk, 60, 1);
        self.cool(disk);
    }

    /// The kernel cannot write what was noted since, and the daemon is killed.
    fn lose_notes(&mut self, disk: SimDisk) {
        self.sim.fail_write_back(self.dir, "map", 0);
        drop(disk);
        self.sim.kill();
    }
}

/// A snapshot broke, and only the page says so. However often a start is cut off that is told of the loss, and whether
/// the page has left memory or not: the snapshot does not pass for whole.
#[test]
fn notes_that_are_lost_take_the_snapshots_along() {
    let mut cut_off = 0;
    for seed in 0..8 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "a");
        rig.settle(&disk);
        rig.fail(OpKind::Write, FileKind::State);
        rig.write(&disk, 1, 2);
        rig.fail_no_more();
        assert!(disk.snapshot("a").expect("it is listed").broken().is_some(), "seed {seed}");
        rig.lose_notes(disk);
        for _ in 0..rig.sim.random().below(3) {
            cut_off += usize::from(rig.start_until(rig.sim.random().below(40)));
            rig.sim.kill();
        }
        let (disk, report) = rig.open();
        assert!(!is_whole(&disk, "a"), "seed {seed}: {report:?}");
    }
    assert!(cut_off > 10, "{cut_off} cut off");
}

/// A flush of the image failed, and only the page says so: no later daemon closes the disk in order.
#[test]
fn notes_that_are_lost_count_as_a_failed_flush() {
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.settle(&disk);
        rig.write(&disk, 1, 1);
        rig.fail(OpKind::Sync, FileKind::Image);
        let (io, flushed) = (rig.io.clone(), disk.clone());
        rig.run(async move { flushed.flush(&io).await }).expect_err("it failed");
        rig.fail_no_more();
        rig.lose_notes(disk);
        let (disk, report) = rig.open();
        let (io, identity) = (rig.io.clone(), rig.io.identity(rig.image));
        let closed = rig.run(async move { disk.close(&io, || Ok(identity)).await });
        assert!(matches!(closed, Err(Error::Poisoned)), "seed {seed}: {closed:?}, {report:?}");
    }
}

/// A rewind failed, could not be taken back, and only the page says that it is none. It takes back no write.
#[test]
fn a_rewind_that_only_lost_notes_called_none_is_not_gone_on_with() {
    let mut refused = 0;
    for seed in 0..8 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 2);
        rig.settle(&disk);
        let fails = rig.sim.random().below(12);
        let (io, reverted) = (rig.io.fated(Some(OpKind::Sync), fails..u64::MAX, u64::MAX), disk.clone());
        let answer = rig.run(async move { reverted.revert(&mut Admin::new(), &io, "a", PATIENCE).await });
        if answer.is_ok() {
            continue;
        }
        rig.write(&disk, 1, 3);
        rig.lose_notes(disk);
        let (io, options) = (rig.io.clone(), rig.options(rig.image, rig.dir, "/d.img"));
        // The first start may be told of another flush that failed.
        let first = rig.run(async move { Disk::open(&io, options).await });
        let disk = match first {
            Ok((disk, _)) => disk,
            Err(_) => {
                let (io, options) = (rig.io.clone(), rig.options(rig.image, rig.dir, "/d.img"));
                match rig.run(async move { Disk::open(&io, options).await }) {
                    Ok((disk, _)) => disk,
                    Err(error) => {
                        assert!(matches!(error, Error::RewindLost { .. }), "seed {seed}: {error:?}");
                        refused += 1;
                        continue;
                    }
                }
            }
        };
        let (io, mut bytes) = (rig.io.clone(), [0; 4096]);
        let read =
            rig.run(async move { disk.read(&io, BLOCK, Target::of(&mut bytes)).await.map(|()| bytes) });
        assert_eq!(read.expect("readable"), [3; 4096], "seed {seed}");
    }
    assert!(refused > 10, "{refused} refused");
}

/// A flush of the image failed, and a start that replaces the map, because another block size is asked for, is cut off
/// anywhere: no later daemon closes the disk in order.
#[test]
fn a_map_that_is_replaced_forgets_no_failed_flush() {
    let mut cut_off = 0;
    for seed in 0..SEEDS {
        let mut rig = Rig::of_blocks(seed, 2048);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.fail(OpKind::Sync, FileKind::Image);
        let (io, flushed) = (rig.io.clone(), disk.clone());
        rig.run(async move { flushed.flush(&io).await }).expect_err("it failed");
        rig.fail_no_more();
        drop(disk);
        rig.sim.kill();
        rig.tracked = 16 * BLOCK;
        cut_off += usize::from(rig.start_until(seed % 50));
        rig.sim.kill();
        let (disk, report) = rig.open();
        let (io, identity) = (rig.io.clone(), rig.io.identity(rig.image));
        let closed = rig.run(async move { disk.close(&io, || Ok(identity)).await });
        assert!(matches!(closed, Err(Error::Poisoned)), "seed {seed}: {closed:?}, {report:?}");
    }
    assert!(cut_off > 50, "{cut_off} cut off");
}

/// A start with another block size finds no room for the new map. The next one has the old size again, or the new one and
/// room: what was changed is told, or a new generation is.
#[test]
fn a_map_that_finds_no_room_hides_no_change() {
    let (mut refused, mut ended) = (0, 0);
    for seed in 0..SEEDS {
        let mut rig = Rig::of_blocks(seed, 2048);
        let (disk, _) = rig.open();
        let since = rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        rig.kill(disk);
        let before = rig.tracked;
        rig.tracked = 16 * BLOCK;
        let rule = Rule {
            op: OpKind::Allocate,
            file: FileKind::State,
            one_in: 1 + seed % 3,
            error: ErrorKind::StorageFull,
        };
        rig.sim.set_faults(vec![rule]);
        let (io, options) = (rig.io.clone(), rig.options(rig.image, rig.dir, "/d.img"));
        let opened = rig.run(async move { Disk::open(&io, options).await.map(drop) });
        refused += usize::from(opened.is_err());
        rig.fail_no_more();
        if seed % 2 == 0 {
            rig.sim.kill();
        } else {
            rig.sim.power_cut();
        }
        if seed % 5 < 3 {
            rig.tracked = before;
        }
        let (disk, report) = rig.open();
        let id = rig.snapshot(&disk, "b");
        if disk.resolve(since, id).is_ok() {
            assert!(rig.changes(&disk, "b", since).contains(&1), "seed {seed}: {report:?}");
        } else {
            ended += 1;
        }
    }
    assert!(refused > 50 && ended > 50, "{refused} refused, {ended} ended");
}

/// The kernel cannot write the page of notes again and again, while a start clears the map; and that start is cut off.
#[test]
fn a_map_that_is_cleared_forgets_no_failed_flush() {
    let mut cut_off = 0;
    for seed in 0..10 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.fail(OpKind::Sync, FileKind::Image);
        let (io, flushed) = (rig.io.clone(), disk.clone());
        rig.run(async move { flushed.flush(&io).await }).expect_err("it failed");
        rig.lose_notes(disk);
        let rule = Rule { op: OpKind::WriteBack, file: FileKind::State, one_in: 3, error: ErrorKind::Other };
        rig.sim.set_faults(vec![rule]);
        cut_off += usize::from(rig.start_until(seed % 80));
        rig.fail_no_more();
        rig.sim.kill();
        let (disk, report) = rig.open();
        let (io, identity) = (rig.io.clone(), rig.io.identity(rig.image));
        let closed = rig.run(async move { disk.close(&io, || Ok(identity)).await });
        assert!(matches!(closed, Err(Error::Poisoned)), "seed {seed}: {closed:?}, {report:?}");
    }
    assert!(cut_off > 200, "{cut_off} cut off");
}
