//! One thing fails, at one place, on a simulated host: what a suite that draws its faults comes to rarely.
//!
//! Each test runs many seeds, which draw what a crash leaves.

#![forbid(unsafe_code)]

#[path = "aimed/ends.rs"]
mod ends;
#[path = "aimed/notes.rs"]
mod notes;
#[path = "aimed/rig.rs"]
mod rig;

use std::collections::BTreeSet;
use std::io::ErrorKind;

use cow_engine::cbt::{ByteRange, ChangeId, Epoch};
use cow_engine::checkpoint;
use cow_engine::group::{self, Admin};
use cow_engine::handover::{self, Arrival, Left, Place};
use cow_engine::memory::Source;
use cow_engine::sim::{Damage, FileKind, OpKind, Rule, SimStorage};
use cow_engine::{Durability, Error, ResetReason, Storage, Terms, View};
use rig::{BLOCK, BLOCKS, PATIENCE, Rig, SEEDS, SimDisk, differing, is_whole};

/// The superblock cannot be written while tracking is switched on, and it is not known what its medium has. Whatever
/// the next opening finds there: of no change that it tells an instant before, anything is left out.
#[test]
fn a_superblock_that_fails_while_tracking_is_switched_on_hides_no_change() {
    for (seed, op) in (0..SEEDS).flat_map(|seed| [(seed, OpKind::Write), (seed, OpKind::Sync)]) {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        let (io, switched) = (rig.io.clone(), disk.clone());
        let off = async move { switched.disable_tracking(&mut Admin::new(), &io, PATIENCE).await };
        rig.run(off).expect("switched off");
        rig.write(&disk, 1, 1);
        rig.fail(op, FileKind::State);
        let (io, switched) = (rig.io.clone(), disk.clone());
        let on = async move { switched.enable_tracking(&mut Admin::new(), &io, PATIENCE).await };
        let answer = rig.run(on);
        assert!(answer.is_err() && disk.is_switched_off(), "seed {seed}: {answer:?}");
        rig.fail_no_more();
        // Goes on without marks, and without a flush.
        rig.write(&disk, 2, 2);
        rig.write(&disk, 3, 3);
        let killed = seed % 3 > 0;
        if killed {
            drop(disk);
            rig.sim.kill();
        } else {
            drop(disk);
            rig.sim.power_cut();
        }
        let (disk, report) = rig.open();
        if disk.is_switched_off() {
            assert!(disk.block_grid().is_none());
            continue;
        }
        // It is on: what it tells an instant of is complete from there on.
        let since = disk.change_id();
        let then = rig.content(rig.image);
        rig.write(&disk, 4, 4);
        if killed && seed % 3 == 1 {
            rig.cool(&disk);
            drop(disk);
            rig.sim.power_cut();
            let (again, report) = rig.open();
            if report.reset.is_some() {
                continue;
            }
            let now = rig.content(rig.image);
            rig.snapshot(&again, "s");
            let told = rig.changes(&again, "s", since);
            let differ = differing(&then, &now);
            assert!(told.is_superset(&differ), "seed {seed}, {op:?}: {told:?} and not {differ:?}");
        } else {
            rig.snapshot(&disk, "s");
            let told = rig.changes(&disk, "s", since);
            assert!(told.contains(&4), "seed {seed}, {op:?}: {told:?}, {report:?}");
        }
    }
}

/// A disk that was handed over stays so, whatever cannot be written afterwards: the generation goes on elsewhere.
#[test]
fn a_flush_that_fails_takes_no_hand_over_back() {
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        let files = rig.sim.add_dir();
        let (io, served, identity) = (rig.io.clone(), disk.clone(), rig.io.identity(rig.image));
        let give = async move {
            let to = Place { dir: &files, name: "moved" };
            served.hand_over(&mut Admin::new(), &io, to, PATIENCE, || Ok(identity)).await
        };
        rig.run(give).expect("handed over");
        let generation = disk.change_id().generation;
        let (kind, op) = match seed % 2 {
            0 => (FileKind::Image, OpKind::Sync),
            _ => (FileKind::State, OpKind::SyncCells),
        };
        rig.fail(op, kind);
        let (io, served) = (rig.io.clone(), disk.clone());
        let _ = rig.run(async move { served.flush(&io).await });
        rig.cool(&disk);
        rig.fail_no_more();
        drop(disk);
        rig.sim.kill();
        let (disk, report) = rig.open();
        assert_eq!(report.reset, Some(ResetReason::HandedOver), "seed {seed}");
        assert_ne!(disk.change_id().generation, generation, "seed {seed}");
    }
}

/// The image of a disk that arrives was copied a moment ago: what the import vouches for is on its medium.
#[test]
fn an_import_vouches_for_no_image_that_a_power_cut_takes_back() {
    let mut taken_back = 0;
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (from, dir) = (rig.image, rig.dir);
        let (disk, _) = rig.open();
        for block in 0..8 {
            rig.write(&disk, block, 7);
        }
        let since = rig.snapshot(&disk, "old");
        let then = rig.content(from);
        rig.close(&disk, from);
        drop(disk);
        let files = rig.sim.add_dir();
        let (io, identity, boot) = (rig.io.clone(), rig.io.identity(from), rig.sim.boot());
        let give = async move {
            let left = Left { dir: &dir, image: &from, identity, boot };
            handover::export(&io, &left, Place { dir: &files, name: "moved" }).await
        };
        rig.run(give).expect("exported");
        // A copy that its maker has not flushed.
        let (to, to_dir) = (rig.sim.add_image(BLOCKS * BLOCK), rig.sim.add_dir());
        let (io, bytes) = (rig.io.clone(), rig.content(from));
        let copy = async move { io.write(&to, 0, Source::of(&bytes)).await };
        rig.run(copy).expect("copied");
        let (io, identity, boot) = (rig.io.clone(), rig.io.identity(to), rig.sim.boot());
        let take = async move {
            let file = io.open(&files, "moved").expect("the history file");
            let arrival = Arrival {
                file: &file,
                image: &to,
                image_path: "/to.img".to_owned(),
                identity,
                dir: &to_dir,
                boot,
                replace: false,
            };
            handover::import(&io, &arrival).await
        };
        rig.run(take).expect("imported");
        rig.sim.power_cut();
        let now = rig.content(to);
        taken_back += u64::from(now != then);
        let (disk, report) = rig.open_with(to, to_dir, "/to.img");
        if report.reset.is_some() {
            continue;
        }
        rig.snapshot(&disk, "new");
        let told = rig.changes(&disk, "new", since);
        let differ = differing(&then, &now);
        assert!(told.is_superset(&differ), "seed {seed}: {differ:?} differ, and {told:?} is told");
    }
    assert_eq!(taken_back, 0, "copies that were imported were taken back");
}

/// What a reset tells as its beginning stays as it was, also if the daemon is killed before it has answered.
#[test]
fn the_beginning_of_a_generation_is_not_taken_back() {
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        let before = disk.change_id();
        rig.write(&disk, 1, 1);
        rig.cool(&disk);
        let (io, served) = (rig.io.clone(), disk.clone());
        let reset = async move { served.reset_tracking(&mut Admin::new(), &io, PATIENCE).await };
        let steps = 1 + seed % 40;
        let answered = rig.sim.run(reset, steps).is_some();
        drop(disk);
        rig.sim.kill();
        let (disk, _) = rig.open();
        let since = disk.change_id();
        if since.generation == before.generation {
            assert!(!answered, "seed {seed}");
            continue;
        }
        let then = rig.content(rig.image);
        drop(disk);
        rig.sim.power_cut();
        let (disk, report) = rig.open();
        if report.reset.is_some() {
            continue;
        }
        let now = rig.content(rig.image);
        rig.snapshot(&disk, "s");
        let told = rig.changes(&disk, "s", since);
        let differ = differing(&then, &now);
        assert!(told.is_superset(&differ), "seed {seed}: {differ:?} differ, and {told:?} is told");
    }
}

/// An export of a served disk is taken back after the host has stopped: what the snapshots had in memory only is not
/// believed to be there.
#[test]
fn an_export_that_is_taken_back_after_a_power_cut_brings_no_snapshot_back() {
    let (mut kept, mut gone_on) = (0, 0);
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        for block in 0..20 {
            rig.write(&disk, block, 1);
        }
        let since = rig.snapshot(&disk, "s");
        let then = rig.content(rig.image);
        for block in 0..20 {
            rig.write(&disk, block, 2);
        }
        let (files, image, dir) = (rig.sim.add_dir(), rig.image, rig.dir);
        let (io, served) = (rig.io.clone(), disk.clone());
        let give = async move {
            let to = Place { dir: &files, name: "moved" };
            served.hand_over(&mut Admin::new(), &io, to, PATIENCE, || Ok(io.identity(image))).await
        };
        rig.run(give).expect("handed over");
        let how = seed % 3;
        if how == 0 {
            rig.close(&disk, image);
        }
        drop(disk);
        if how == 2 {
            rig.sim.kill();
        } else {
            rig.sim.power_cut();
        }
        let io = rig.io.clone();
        rig.run(async move { handover::cancel(&io, &dir).await }).expect("taken back");
        let (disk, report) = rig.open();
        if how == 1 {
            assert_eq!(report.reset, Some(ResetReason::HostStopped), "seed {seed}");
        } else {
            assert_eq!((report.reset.as_ref(), report.kept.len()), (None, 1), "seed {seed}: {report:?}");
        }
        gone_on += u64::from(report.reset.is_none());
        if report.reset.is_none() {
            rig.snapshot(&disk, "t");
            let told = rig.changes(&disk, "t", since);
            assert!((0..20).all(|block| told.contains(&block)), "seed {seed}: {told:?}");
        }
        let Ok(snapshot) = disk.snapshot("s") else { continue };
        let (io, view) = (rig.io.clone(), View::new(disk.clone(), snapshot));
        let mut shown = vec![0; then.len()];
        let read = async move { view.read(&io, 0, &mut shown).await.map(|()| shown) };
        if let Ok(shown) = rig.run(read) {
            assert_eq!(
                differing(&then, &shown),
                BTreeSet::new(),
                "seed {seed}: the view shows something else"
            );
            kept += 1;
        }
    }
    assert!(
        kept > SEEDS / 2 && gone_on > SEEDS / 2,
        "{kept} snapshots were kept, {gone_on} histories went on"
    );
}

/// Writes of a MiB from one queue at a time, over a snapshot, which a kill may cut off anywhere: their old content goes
/// to the store in several batches, some of which have been overwritten while others are appended.
#[test]
fn large_writes_are_preserved_whole() {
    const LARGE: u64 = 256;
    let mut cut_off = 0;
    for seed in 0..SEEDS / 4 {
        let mut rig = Rig::of_blocks(seed, 4 * LARGE);
        let (disk, _) = rig.open();
        for block in 0..4 * LARGE {
            rig.write(&disk, block, u8::try_from(block % 251 + 1).expect("a byte"));
        }
        rig.snapshot(&disk, "s");
        rig.beat(&disk);
        let (io, lane) = (rig.io.clone(), disk.lane());
        let written = async {
            let bytes = vec![255; usize::try_from(LARGE * BLOCK).expect("small")];
            let write =
                |nth: u64| disk.write(&io, lane, nth * LARGE * BLOCK, Source::of(&bytes), Durability::Cached);
            futures_util::future::join_all((0..4).map(write)).await
        };
        let steps = if seed % 4 == 0 { u64::MAX } else { seed * 7 };
        let done = rig.sim.run(written, steps);
        cut_off += usize::from(done.is_none());
        assert!(done.into_iter().flatten().all(|written| written.is_ok()), "seed {seed}");
        rig.kill(disk);
        let (disk, _) = rig.open();
        let snapshot = disk.snapshot("s").expect("it outlives a kill");
        let (io, view) = (rig.io.clone(), View::new(disk, snapshot));
        let mut bytes = vec![0; usize::try_from(4 * LARGE * BLOCK).expect("small")];
        let read = async move { view.read(&io, 0, &mut bytes).await.map(|()| bytes) };
        let bytes = rig.run(read).expect("readable");
        let grains = bytes.chunks(usize::try_from(BLOCK).expect("small"));
        for (block, grain) in (0..).zip(grains) {
            let wanted = u8::try_from(block % 251 + 1).expect("a byte");
            assert!(grain.iter().all(|&byte| byte == wanted), "seed {seed}: block {block}");
        }
    }
    assert!(cut_off > 10, "{cut_off} cut off");
}

/// What guests touch again and again is preserved with its neighbours, while there is room and within a tracked block;
/// without room no snapshot breaks for it.
#[test]
fn neighbours_are_preserved_where_there_is_room() {
    for (tracked, limit, held) in [
        // Two grains, and their stretch with the third; twice.
        (65536, 0, [1, 2, 16, 16, 17, 18, 32]),
        // A stretch is no longer than a block.
        (4096, 0, [1, 2, 3, 4, 5, 6, 7]),
        (16384, 0, [1, 2, 4, 4, 5, 6, 8]),
        // The stretch fits, and takes half of what there may be.
        (65536, 32, [1, 2, 16, 16, 17, 18, 19]),
        // It does not fit.
        (65536, 10, [1, 2, 3, 4, 5, 6, 7]),
    ] {
        let mut rig = Rig::new(tracked);
        rig.tracked = tracked;
        let (disk, _) = rig.open();
        for block in 0..BLOCKS {
            rig.write(&disk, block, u8::try_from(block + 1).expect("a byte"));
        }
        let before = rig.content(rig.image);
        rig.snapshot_on(&disk, "s", Terms { limit: limit * BLOCK, ..Terms::default() });
        for (block, held) in [0, 1, 3, 2, 32, 33, 34].into_iter().zip(held) {
            rig.write(&disk, block, 255);
            // A page of the map is there too.
            let now = disk.snapshot("s").expect("it was taken").bytes_held() / BLOCK;
            assert_eq!(now, held + 1, "blocks of {tracked}, limit {limit}, block {block}");
        }
        let (io, view) = (rig.io.clone(), View::new(disk.clone(), disk.snapshot("s").expect("it is held")));
        let mut bytes = vec![0; before.len()];
        let read = rig.run(async move { view.read(&io, 0, &mut bytes).await.map(|()| bytes) });
        assert!(read.expect("it is whole") == before, "blocks of {tracked}, limit {limit}");
    }
}

/// A snapshot breaks, and its head cannot say so. Then a newer one breaks, whose head can. After a kill both are broken.
#[test]
fn a_break_that_no_head_tells_is_remembered_beside_another() {
    for seed in 0..SEEDS {
        let mut rig = Rig::of_blocks(seed, 4 * 1024);
        let (disk, _) = rig.open();
        let check = |rig: &mut Rig, disk: &SimDisk| {
            let (io, disk) = (rig.io.clone(), disk.clone());
            rig.run(async move { disk.check_stores(&io).await });
        };
        rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        check(&mut rig, &disk);
        // A record, and nothing in the store: it was zeros.
        rig.write(&disk, 2, 1);
        rig.snapshot(&disk, "b");
        let state = |op| Rule { op, file: FileKind::State, one_in: 1, error: ErrorKind::Other };
        rig.sim.set_faults(vec![state(OpKind::Sync), state(OpKind::Write)]);
        check(&mut rig, &disk);
        let broken = |disk: &SimDisk, name| disk.snapshot(name).expect("it is listed").broken().is_some();
        assert!(broken(&disk, "a") && !broken(&disk, "b"), "seed {seed}");
        if seed % 2 == 1 {
            // Nor is it forgotten with the change map that it is noted in: another size of blocks needs another one.
            rig.kill(disk);
            rig.fail_no_more();
            rig.tracked = 16384;
            rig.start_in_vain();
            let (disk, report) = rig.open();
            assert!(!is_whole(&disk, "a"), "seed {seed}: {report:?}");
            continue;
        }
        rig.fail_no_more();
        rig.write(&disk, 1, 3);
        rig.fail(OpKind::Sync, FileKind::State);
        check(&mut rig, &disk);
        assert!(broken(&disk, "b"), "seed {seed}");
        rig.kill(disk);
        rig.fail_no_more();
        let (disk, _) = rig.open();
        assert!(broken(&disk, "a") && broken(&disk, "b"), "seed {seed}, after a kill");
    }
}

/// A guest's flush fails while the disk is closed: whenever that is, the next start finds a disk that was not closed.
#[test]
fn a_flush_that_fails_while_a_disk_is_closed_leaves_it_unclean() {
    let mut stamped = 0;
    for seed in 0..4 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        let turns = rig.sim.random().below(120);
        let (io, failing) = (rig.io.clone(), rig.io.fated(Some(OpKind::Sync), 0..u64::MAX, u64::MAX));
        let identity = io.identity(rig.image);
        let (closed, flushed) = rig.run(async {
            let flush = async {
                for _ in 0..turns {
                    io.turn().await;
                }
                disk.flush(&failing).await
            };
            futures_util::future::join(disk.close(&io, || Ok(identity)), flush).await
        });
        drop(disk);
        rig.sim.kill();
        let (_, report) = rig.open();
        assert!(flushed.is_ok() || report.unclean, "seed {seed}");
        stamped += usize::from(closed.is_ok());
    }
    assert!(stamped > 0, "none was late enough");
}

/// A checkpoint that could not be made durable cannot be removed either. Once a start has told of it, it stays.
#[test]
fn a_checkpoint_that_a_start_told_is_not_taken_back() {
    let (mut failed, mut told) = (0, 0);
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "s");
        let (io, disks) = (rig.io.fated(None, seed % 40..u64::MAX, u64::MAX), [disk.clone()]);
        let made = rig.run(async move { checkpoint::create(&mut Admin::new(), &io, &disks, "c", "s").await });
        failed += usize::from(made.is_err());
        rig.kill(disk);
        let names = |disk: &SimDisk| disk.checkpoints().iter().map(|one| one.name().to_owned()).collect();
        let (disk, _) = rig.open();
        let found: Vec<String> = names(&disk);
        told += usize::from(made.is_err()) * found.len();
        drop(disk);
        rig.sim.power_cut();
        let (disk, _) = rig.open();
        assert_eq!(found, names(&disk), "seed {seed}, after a power cut");
    }
    assert!(told > 0, "of {failed} that failed none was there");
}

/// The superblock is gone, a start begins a new generation and is cut off, and a power cut brings the superblock back: over
/// the map that belongs to it, or not to be believed.
#[test]
fn a_superblock_that_comes_back_finds_its_map() {
    let (mut kept, mut ended) = (0, 0);
    for seed in 0..4 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        let since = rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        rig.cool(&disk);
        rig.kill(disk);
        rig.sim.damage(rig.dir, "superblock", Damage::Remove);
        let cut_off = rig.start_until(seed % 80);
        rig.sim.power_cut();
        let (disk, _) = rig.open();
        let id = rig.snapshot(&disk, "b");
        if disk.resolve(since, id).is_ok() {
            kept += usize::from(cut_off);
            assert!(rig.changes(&disk, "b", since).contains(&1), "seed {seed}");
        } else {
            ended += 1;
        }
    }
    assert!(kept > 10 && ended > 10, "{kept} went on, {ended} ended");
}

/// A merged snapshot's file cannot be removed. The next one that is taken, and deleted while an older one needs it, is
/// found by the older one after a kill all the same.
#[test]
fn an_older_one_leads_past_what_could_not_be_removed() {
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        let before = rig.content(rig.image);
        rig.snapshot(&disk, "a");
        rig.snapshot(&disk, "b");
        rig.fail(OpKind::Remove, FileKind::State);
        let maintain = |rig: &mut Rig, disk: &SimDisk, name: &'static str, rounds| {
            let (io, disk) = (rig.io.clone(), disk.clone());
            rig.run(async move {
                disk.delete_snapshot(&io, name).await.expect("it is held");
                for _ in 0..rounds {
                    let _ = disk.maintain(&mut Admin::new(), &io).await;
                }
            });
        };
        maintain(&mut rig, &disk, "b", 20);
        rig.fail_no_more();
        rig.snapshot(&disk, "c");
        rig.write(&disk, 1, 2);
        maintain(&mut rig, &disk, "c", 0);
        rig.kill(disk);
        let (disk, report) = rig.open();
        let snapshot = disk.snapshot("a").expect("it is held");
        let (io, view) = (rig.io.clone(), View::new(disk, snapshot));
        let mut bytes = vec![0; before.len()];
        let read = rig.run(async move { view.read(&io, 0, &mut bytes).await.map(|()| bytes) });
        assert!(read.expect("it is whole") == before, "seed {seed}: {report:?}");
    }
}

/// While a reader reads the live disk, another snapshot is taken, and a change preserves into that one.
#[test]
fn a_reader_finds_what_a_newer_snapshot_has_preserved_meanwhile() {
    for seed in 0..4 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "a");
        let (io, disks) = (rig.io.clone(), [disk.clone()]);
        let view = View::new(disk.clone(), disk.snapshot("a").expect("it was taken"));
        let turns = rig.sim.random().below(40);
        let (read, ()) = rig.run(async {
            let read = async {
                for _ in 0..turns {
                    io.turn().await;
                }
                let mut bytes = [0; 4096];
                view.read(&io, BLOCK, &mut bytes).await.map(|()| bytes)
            };
            let change = async {
                let taken = group::create(&mut Admin::new(), &io, &disks, "b", 1, PATIENCE).await;
                taken.expect("a snapshot");
                let bytes = Source::of(&[2; 4096]);
                let written = disk.write(&io, disk.lane(), BLOCK, bytes, Durability::Cached).await;
                written.expect("written");
            };
            futures_util::future::join(read, change).await
        });
        assert_eq!(read.expect("readable"), [1; 4096], "seed {seed}");
    }
}

/// A creation fails, and the daemon is killed while it is undone: the older snapshot stays whole.
#[test]
fn a_creation_that_is_undone_breaks_no_older_snapshot() {
    let mut cut_off = 0;
    for seed in 0..8 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "a");
        rig.beat(&disk);
        let mut random = rig.sim.random();
        let fails = random.below(12);
        let io = rig.io.fated(None, fails..fails + 1, fails + random.below(6));
        let disks = [disk.clone()];
        let made = async move { group::create(&mut Admin::new(), &io, &disks, "b", 1, PATIENCE).await };
        cut_off += usize::from(rig.sim.run(made, u64::MAX).is_none());
        drop(disk);
        rig.sim.kill();
        rig.start_in_vain();
        let (disk, report) = rig.open();
        assert!(is_whole(&disk, "a"), "seed {seed}: {report:?}");
    }
    assert!(cut_off > 10, "{cut_off} cut off");
}

/// A snapshot breaks while its head is written for another reason: after a kill it is broken.
#[test]
fn a_break_is_not_overtaken_by_an_older_head() {
    for seed in 0..4 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        let (io, failing) = (rig.io.clone(), rig.io.fated(Some(OpKind::Sync), 0..u64::MAX, u64::MAX));
        let turns = rig.sim.random().below(20);
        rig.run(async {
            let limit = async {
                for _ in 0..turns {
                    io.turn().await;
                }
                disk.limit_snapshot(&io, "a", Some(1 << 20)).await
            };
            let (limited, ()) = futures_util::future::join(limit, disk.check_stores(&failing)).await;
            limited.expect("it is more than is in use");
        });
        assert!(disk.snapshot("a").expect("it is listed").broken().is_some(), "seed {seed}");
        rig.kill(disk);
        rig.start_in_vain();
        let (disk, report) = rig.open();
        assert!(!is_whole(&disk, "a"), "seed {seed}: {report:?}");
    }
}

/// A kill leaves a record that nobody had relied on. The next daemon does, and is killed; then the record is lost.
#[test]
fn a_record_that_came_with_a_kill_is_missed_when_it_is_lost() {
    let (mut cut_off, mut missed) = (0, 0);
    for seed in 0..8 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 2, 1);
        rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        rig.beat(&disk);
        let (io, changed) = (rig.io.clone(), disk.clone());
        let steps = rig.sim.random().below(60);
        let written = async move {
            changed.write(&io, changed.lane(), 2 * BLOCK, Source::of(&[2; 4096]), Durability::Cached).await
        };
        cut_off += usize::from(rig.sim.run(written, steps).is_none());
        drop(disk);
        rig.sim.kill();
        let (disk, _) = rig.open();
        rig.write(&disk, 2, 3);
        rig.kill(disk);
        let names = rig.sim.names(rig.dir).expect("it is there");
        let index = names.iter().find(|name| name.contains("index")).expect("a snapshot has one");
        let len = rig.sim.len_of(rig.dir, index);
        rig.sim.damage(rig.dir, index, Damage::Cut(len - 16));
        let (disk, _) = rig.open();
        let held = disk.snapshot("a").ok().filter(|one| one.broken().is_none());
        let Some(snapshot) = held else {
            missed += 1;
            continue;
        };
        let (io, view) = (rig.io.clone(), View::new(disk, snapshot));
        let mut bytes = [0; 4096];
        let read = rig.run(async move { view.read(&io, 2 * BLOCK, &mut bytes).await.map(|()| bytes) });
        assert_eq!(read.expect("readable"), [1; 4096], "seed {seed}");
    }
    assert!(cut_off > 10 && missed > 10, "{cut_off} cut off, {missed} missed");
}

/// A newer snapshot's file is damaged, and the start that finds it so is cut off: older ones, which need it, stay broken.
#[test]
fn what_a_damaged_snapshot_had_stays_lost_after_a_start_that_was_cut_off() {
    let mut cut_off = 0;
    for seed in 0..4 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "a");
        rig.snapshot(&disk, "b");
        rig.write(&disk, 1, 2);
        rig.kill(disk);
        let mut names = rig.sim.names(rig.dir).expect("it is there");
        names.retain(|name| name.ends_with(".index"));
        rig.sim.damage(rig.dir, names.last().expect("a snapshot has one"), Damage::Flip(seed % 64));
        cut_off += usize::from(rig.start_until(rig.sim.random().below(60)));
        rig.sim.kill();
        let (disk, report) = rig.open();
        assert!(!is_whole(&disk, "a"), "seed {seed}: {report:?}");
    }
    assert!(cut_off > 10, "{cut_off} cut off");
}

/// A snapshot breaks, the disk is closed in order, and a power cut comes: the snapshot stays broken.
#[test]
fn a_break_is_as_durable_as_a_clean_end() {
    let mut closed = 0;
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.write(&disk, 2, 1);
        rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        let (io, checked) = (rig.io.clone(), disk.clone());
        rig.run(async move { checked.check_stores(&io).await });
        // Its old content cannot be written; then the head can.
        let (io, changed) = (rig.io.fated(Some(OpKind::Write), 0..1, u64::MAX), disk.clone());
        let written = async move {
            changed.write(&io, changed.lane(), 2 * BLOCK, Source::of(&[2; 4096]), Durability::Cached).await
        };
        rig.run(written).expect("no guest notices");
        assert!(disk.snapshot("a").expect("it is listed").broken().is_some(), "seed {seed}");
        let (io, ended) = (rig.io.clone(), disk.clone());
        let identity = io.identity(rig.image);
        let end = rig.run(async move { ended.close(&io, || Ok(identity)).await });
        closed += usize::from(end.is_ok());
        drop(disk);
        rig.sim.power_cut();
        let (disk, report) = rig.open();
        assert!(!is_whole(&disk, "a"), "seed {seed}: {report:?}");
    }
    assert!(closed > 10, "{closed} were closed in order");
}

/// A disk grows while changes are on their way that began before, each to a page of the map that has to be frozen first.
/// Then somebody asks, so that it is remembered which pages hold marks. The changes are told all the same.
#[test]
fn a_question_just_after_a_disk_grew_leaves_no_change_out() {
    const PAGE_BLOCKS: u64 = 1024;
    const PAGES: u64 = 13;
    for seed in 0..SEEDS {
        let mut rig = Rig::of_blocks(seed, PAGES * PAGE_BLOCKS);
        let (disk, _) = rig.open();
        rig.write(&disk, 0, 1);
        let since = rig.snapshot(&disk, "a");
        let mut random = rig.sim.random();
        for page in 1..PAGES {
            let (io, disk, turns) = (rig.io.clone(), disk.clone(), random.below(60));
            rig.sim.spawn(async move {
                for _ in 0..turns {
                    io.turn().await;
                }
                let at = page * PAGE_BLOCKS * BLOCK;
                let written =
                    disk.write(&io, disk.lane(), at, Source::of(&[2; 4096]), Durability::Cached).await;
                written.expect("written");
            });
        }
        let (io, grown) = (rig.io.clone(), disk.clone());
        rig.run(async move {
            let size = grown.capacity() + BLOCK;
            grown.resize(&mut Admin::new(), &io, size).await.expect("it grows");
            let view = View::new(grown.clone(), grown.snapshot("a").expect("it was taken"));
            let all = ByteRange::new(0, view.capacity());
            view.changes(&io, Epoch::NEVER, all, usize::MAX).await.expect("told");
            for _ in 0..1000 {
                io.turn().await;
            }
        });
        rig.snapshot(&disk, "b");
        let told = rig.changes(&disk, "b", since);
        let wanted = (1..=PAGES).map(|page| page * PAGE_BLOCKS);
        assert!(wanted.clone().all(|block| told.contains(&block)), "seed {seed}: {told:?}");
    }
}

/// The change map cannot be written, and leaves memory. Nothing is told of changes from then on, also after a kill, until a
/// new generation begins.
#[test]
fn marks_that_left_memory_are_not_taken_for_none() {
    let asked = |rig: &mut Rig, disk: &SimDisk, since: ChangeId| {
        let snapshot = disk.snapshot("b").expect("it was taken");
        let epoch = disk.resolve(since, snapshot.change_id()).expect("an instant of this history");
        let (io, view) = (rig.io.clone(), View::new(disk.clone(), snapshot));
        let all = ByteRange::new(0, view.capacity());
        rig.run(async move { view.changes(&io, epoch, all, usize::MAX).await })
    };
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        let since = rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        if seed % 2 == 0 {
            rig.snapshot(&disk, "b");
        }
        rig.fail(OpKind::SyncCells, FileKind::State);
        let (io, flushed) = (rig.io.clone(), disk.clone());
        let range = [ByteRange::new(2 * BLOCK, 3 * BLOCK)];
        rig.run(async move { flushed.mark_changed(&io, flushed.lane(), &range).await })
            .expect_err("it is not durable");
        rig.fail_no_more();
        if seed % 2 == 1 {
            rig.snapshot(&disk, "b");
        }
        let told = asked(&mut rig, &disk, since);
        assert!(matches!(told, Err(Error::MarksLost { .. })), "seed {seed}: {told:?}");
        let next = disk.check_incremental(since);
        assert!(matches!(next, Err(Error::MarksLost { .. })), "seed {seed}: {next:?}");
        rig.kill(disk);
        let (disk, _) = rig.open();
        let told = asked(&mut rig, &disk, since);
        assert!(matches!(told, Err(Error::MarksLost { .. })), "seed {seed}, after a kill: {told:?}");
    }
    for seed in 0..SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.fail(OpKind::SyncCells, FileKind::State);
        let (io, flushed) = (rig.io.clone(), disk.clone());
        let range = [ByteRange::new(2 * BLOCK, 3 * BLOCK)];
        rig.run(async move { flushed.mark_changed(&io, flushed.lane(), &range).await })
            .expect_err("it is not durable");
        rig.fail_no_more();
        let (io, begun) = (rig.io.clone(), disk.clone());
        let reset = async move { begun.reset_tracking(&mut Admin::new(), &io, PATIENCE).await };
        let since = rig.run(reset).expect("a new generation");
        rig.write(&disk, 3, 1);
        rig.snapshot(&disk, "b");
        let told = rig.changes(&disk, "b", since);
        assert!(told.contains(&3) && !told.contains(&4), "seed {seed}: {told:?}");
    }
}

/// A generation ends while marks are read that have left memory; with it the note ends that a flush of the map had failed.
/// What was read is not told all the same.
#[test]
fn marks_of_a_generation_that_ends_meanwhile_are_not_taken_for_proved() {
    let (mut told, mut ended) = (0, 0);
    for seed in 0..10 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        let (io, looked) = (rig.io.clone(), disk.clone());
        rig.run(async move { looked.look_for_marks(&io).await });
        let since = rig.snapshot(&disk, "a");
        rig.write(&disk, 1, 1);
        rig.snapshot(&disk, "b");
        let (io, cooled) = (rig.io.clone(), disk.clone());
        rig.run(async move { cooled.cool(&io).await });
        let mut random = rig.sim.random();
        let mut later = |io: &SimStorage, most: u64| {
            let (io, turns) = (io.clone(), random.below(most));
            async move {
                for _ in 0..turns {
                    io.turn().await;
                }
            }
        };
        let (io, off, wait) = (rig.io.clone(), disk.clone(), later(&rig.io, 40));
        rig.sim.spawn(async move {
            wait.await;
            off.disable_tracking(&mut Admin::new(), &io, PATIENCE).await.expect("nothing is in flight");
        });
        // Its flush of the map fails.
        let (fated, cooled, wait) =
            (rig.io.fated(Some(OpKind::SyncCells), 0..1, u64::MAX), disk.clone(), later(&rig.io, 40));
        rig.sim.spawn(async move {
            wait.await;
            cooled.cool(&fated).await;
        });
        let snapshot = disk.snapshot("b").expect("it was taken");
        let epoch = disk.resolve(since, snapshot.change_id()).expect("an instant of this history");
        let (io, view, wait) = (rig.io.clone(), View::new(disk, snapshot), later(&rig.io, 60));
        let all = ByteRange::new(0, view.capacity());
        let answer = rig.run(async move {
            wait.await;
            view.changes(&io, epoch, all, usize::MAX).await
        });
        match answer {
            Ok(answer) => {
                let has = answer.iter().any(|range| range.start() <= BLOCK && 2 * BLOCK <= range.end());
                assert!(has, "seed {seed}: {answer:?}");
                told += 1;
            }
            Err(Error::NotTracked { .. }) => ended += 1,
            Err(error) => assert!(matches!(error, Error::MarksLost { .. }), "seed {seed}: {error:?}"),
        }
    }
    assert!(told > 10 && ended > 10, "{told} told, {ended} ended");
}
