//! Views that are taken under stamped load show one instant, and changes cover what changed.
//!
//! A round takes a snapshot of all disks while their queues are full, reads it over NBD, judges every
//! unit, asks what changed since an older one, and now and then reads an old one again and deletes it.
//! `EBBTIDE_ROUNDS=n` sets the rounds of each test, `SEED=n` what chooses requests and places.

#![forbid(unsafe_code)]

use anyhow::{Context as _, Result, bail};
use ebbtide_tests::random::Random;
use ebbtide_tests::stamped::rig::{Frozen, Rig, Setup};

/// Rounds of each test unless told otherwise.
const ROUNDS: u64 = 30;
/// Snapshots that are held at a time.
const HELD: usize = 4;
/// Requests that every disk acknowledges between two snapshots, at least.
const BETWEEN: u64 = 64;

fn number_of(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Runs the rounds of one test; an error says how to come back.
fn run(test: &str, setup: Setup) -> Result<()> {
    let (seed, count) = (number_of("SEED", setup.seed), number_of("EBBTIDE_ROUNDS", ROUNDS));
    let rerun =
        format!("SEED={seed} EBBTIDE_ROUNDS={count} cargo test -p ebbtide-tests --test stamped {test}");
    rounds(Setup { seed, ..setup }, count).with_context(|| format!("seed={seed}   rerun: {rerun}"))
}

fn rounds(setup: Setup, count: u64) -> Result<()> {
    let mut rig = Rig::start(setup)?;
    let mut random = Random::new(setup.seed);
    let mut held: Vec<Frozen> = Vec::new();
    rig.begin_load()?;
    for round in 0..count {
        rig.wait_for(BETWEEN)?;
        let now = rig.freeze(&format!("s{round}")).with_context(|| format!("round {round}"))?;
        if let Some(previous) = held.last() {
            rig.expect_progress(previous, &now)?;
            let older = &held[random.index(held.len())];
            rig.expect_progress(older, &now)?;
        }
        held.push(now);
        if held.len() > HELD {
            // Any but the newest, in no order.
            let old = held.remove(random.index(HELD));
            rig.expect_same(&old)?;
            rig.scene.delete(&old.name)?;
        }
    }
    rig.end_load()?;
    let last = rig.freeze("last")?;
    rig.expect_on_host(&last)?;
    held.iter().try_for_each(|old| rig.expect_same(old))
}

#[test]
fn views_of_two_disks_on_one_queue_each() -> Result<()> {
    run("views_of_two_disks_on_one_queue_each", Setup { disks: 2, seed: 11, ..Setup::default() })
}

#[test]
fn views_of_two_disks_on_four_queues_each() -> Result<()> {
    let setup = Setup { disks: 2, queues: 4, seed: 14, more: "block-size=4096", ..Setup::default() };
    run("views_of_two_disks_on_four_queues_each", setup)
}

/// Requests that end at once make causes and effects closer together than a full queue does.
#[test]
fn views_of_two_disks_at_depth_one() -> Result<()> {
    let setup = Setup { disks: 2, depth: 1, units: 512, seed: 12, ..Setup::default() };
    run("views_of_two_disks_at_depth_one", setup)
}

#[test]
fn canary_a_copy_of_images_in_use_is_found_to_show_no_instant() -> Result<()> {
    let mut rig = Rig::start(Setup { disks: 2, seed: 17, ..Setup::default() })?;
    rig.begin_load()?;
    for _ in 0..1000 {
        rig.wait_for(BETWEEN)?;
        if rig.judge_live_images().is_err() {
            return rig.end_load();
        }
    }
    bail!("a thousand copies of images in use all seemed to be of one instant")
}
