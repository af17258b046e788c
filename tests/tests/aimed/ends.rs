//! What a power cut leaves of heads and superblocks whose writing was cut off or failed just before.

use cow_engine::group::Admin;
use cow_engine::memory::Source;
use cow_engine::sim::OpKind;
use cow_engine::{Durability, ResetReason};

use crate::rig::{BLOCK, BLOCKS, PATIENCE, Rig, SEEDS};

/// An overlay is used again and cannot be flushed when its disk is closed in order. After a power cut it does not pass for
/// one that was closed in order.
#[test]
fn an_overlay_that_could_not_be_flushed_is_not_clean_after_a_power_cut() {
    let (mut closed, mut dropped) = (0, 0);
    for seed in 0..4 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.snapshot(&disk, "a");
        let (io, opened) = (rig.io.clone(), disk.clone());
        let made = rig.run(async move { opened.open_overlay(&io, "a", "o", true, "").await.map(drop) });
        made.expect("an overlay");
        rig.close(&disk, rig.image);
        drop(disk);
        rig.sim.kill();
        let (disk, _) = rig.open();
        let overlay = disk.overlay("a", "o").expect("it was kept");
        let io = rig.io.clone();
        let written = rig.run(async move {
            overlay.write(&io, overlay.lane(), BLOCK, Source::of(&[2; 4096]), Durability::Cached).await
        });
        written.expect("written");
        let (io, ended) = (rig.io.fated(Some(OpKind::SyncCells), 0..1, u64::MAX), disk.clone());
        let identity = io.identity(rig.image);
        let end = rig.run(async move { ended.close(&io, || Ok(identity)).await });
        closed += usize::from(end.is_ok());
        drop(disk);
        rig.sim.power_cut();
        let (disk, report) = rig.open();
        assert!(disk.overlay("a", "o").is_err(), "seed {seed}: {end:?}, {report:?}");
        dropped += report.overlays_dropped.len();
    }
    assert!(closed > 10 && dropped > 10, "{closed} closed, {dropped} dropped");
}

/// A kill cuts off the writing of the superblock, a power cut that of the next start: one of the two copies is whole.
#[test]
fn a_kill_and_a_power_cut_tear_no_more_than_one_copy_of_the_superblock() {
    let mut cut_off = 0;
    for seed in 0..8 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        let mut random = rig.sim.random();
        let io = rig.io.fated(None, 0..0, random.below(6));
        let reset = async move { disk.reset_tracking(&mut Admin::new(), &io, PATIENCE).await.map(drop) };
        cut_off += usize::from(rig.sim.run(reset, u64::MAX).is_none());
        rig.sim.kill();
        rig.start_until(random.below(40));
        rig.sim.power_cut();
        let (_, report) = rig.open();
        // Without a whole copy nobody knows how the disk was left.
        assert!(report.unclean || report.reset != Some(ResetReason::Damaged), "seed {seed}: {report:?}");
    }
    assert!(cut_off > 10, "{cut_off} cut off");
}

/// A flush of the intent log fails while a disk grows, beside one that makes a region hot. If the history goes on after a power
/// cut, the change in that region is told.
#[test]
fn a_flush_of_the_log_that_fails_takes_no_region_along() {
    let (mut failed, mut told) = (0, 0);
    for seed in 0..20 * SEEDS {
        let mut rig = Rig::new(seed);
        let (disk, _) = rig.open();
        rig.cool(&disk);
        let since = disk.change_id();
        let mut random = rig.sim.random();
        let (io, turns) = (rig.io.clone(), random.below(12));
        let failing = rig.io.fated(Some(OpKind::Sync), 0..1, u64::MAX);
        let grown = rig.run(async {
            let write = async {
                for _ in 0..turns {
                    io.turn().await;
                }
                let bytes = Source::of(&[2; 4096]);
                disk.write(&io, disk.lane(), 9 * BLOCK, bytes, Durability::Cached).await.expect("written");
                disk.flush(&io).await
            };
            let mut admin = Admin::new();
            let grow = disk.resize(&mut admin, &failing, (BLOCKS + 1) * BLOCK);
            let (grown, flushed) = futures_util::future::join(grow, write).await;
            flushed.map(|()| grown)
        });
        // A flush of the image that failed is told the guest.
        let Ok(grown) = grown else { continue };
        failed += usize::from(grown.is_err());
        let then = disk.change_id().generation;
        drop(disk);
        rig.sim.power_cut();
        let (disk, report) = rig.open();
        if disk.change_id().generation != then {
            continue;
        }
        rig.snapshot(&disk, "b");
        let changes = rig.changes(&disk, "b", since);
        assert!(changes.contains(&9), "seed {seed}: {changes:?}, {report:?}");
        told += 1;
    }
    assert!(failed > 10 && told > 10, "{failed} failed, {told} told");
}
