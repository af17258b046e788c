//! The daemon is killed: snapshots, changes and the order of writes outlive it.

use std::time::Duration;

use anyhow::Result;
use ebbtide_tests::random::Random;
use ebbtide_tests::stamped::rig::{Frozen, Rig, Setup};

/// Units of a sector: of a request that the kill met, each sector is old or new.
const SECTORS: Setup =
    Setup { disks: 2, queues: 1, depth: 32, unit_bytes: 512, units: 8192, more: "", seed: 9 };

#[test]
fn b_missing_kill_9() -> Result<()> {
    let mut rig = Rig::start(Setup { queues: 4, ..SECTORS })?;
    let mut held: Vec<Frozen> = Vec::new();
    for round in 0..4 {
        rig.begin_load()?;
        rig.wait_for(64)?;
        take(&mut rig, &mut held, &format!("under-load-{round}"))?;
        rig.wait_for(64)?;
        rig.kill_and_restart()?;
        held.iter().try_for_each(|frozen| rig.expect_same(frozen))?;
        take(&mut rig, &mut held, &format!("after-kill-{round}"))?;
        let old = held.remove(0);
        rig.scene.delete(&old.name)?;
    }
    Ok(())
}

/// Takes a snapshot, which must be right, ahead of all held ones, and with all changes since each.
fn take(rig: &mut Rig, held: &mut Vec<Frozen>, name: &str) -> Result<()> {
    let now = rig.freeze(name)?;
    held.iter().try_for_each(|older| rig.expect_progress(older, &now))?;
    held.push(now);
    Ok(())
}

/// A snapshot that was being taken when the daemon was killed is on all of its disks and right, or on none.
#[test]
fn b_missing_kill_9_at_the_take() -> Result<()> {
    let mut rig = Rig::start(SECTORS)?;
    let mut random = Random::new(9);
    let mut held: Vec<Frozen> = Vec::new();
    for round in 0..8 {
        rig.begin_load()?;
        rig.wait_for(64)?;
        // No more than a way to meet it at different steps.
        let after = Duration::from_micros(random.below(12_000));
        if let Some(now) = rig.kill_at_a_take(&format!("s{round}"), after)? {
            held.iter().try_for_each(|older| rig.expect_progress(older, &now))?;
            held.push(now);
        }
        held.iter().try_for_each(|frozen| rig.expect_same(frozen))?;
        take(&mut rig, &mut held, &format!("t{round}"))?;
    }
    Ok(())
}
