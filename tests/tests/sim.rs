//! The engine on a simulated host: random work, crashes and faults, judged by the oracle.
//!
//! A seed makes a host, one or two disks and a way of working, then some rounds of: open (perhaps cut
//! off, perhaps several times), judge what is there, work with several queues, an administrator,
//! readers and users of overlays until a crash at a random step or a clean close. At the end all snapshots are deleted, and
//! none of their files may be left.
//!
//! `SEED=n` runs one seed, `SEED=<commit>` as many as usual from a place of its own, `SEEDS=n` as many
//! as that. A failure prints how to come back.

#![forbid(unsafe_code)]

#[path = "sim/checkpoints.rs"]
mod checkpoints;
#[path = "sim/deletions.rs"]
mod deletions;
#[path = "sim/moves.rs"]
mod moves;
#[path = "sim/overlays.rs"]
mod overlays;
#[path = "sim/readers.rs"]
mod readers;
#[path = "sim/resets.rs"]
mod resets;
#[path = "sim/rewinds.rs"]
mod rewinds;
#[path = "sim/rig.rs"]
mod rig;
#[path = "sim/work.rs"]
mod work;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cow_engine::sim::Defect;
use rig::Profile;

thread_local! {
    /// Where the run of this thread is, for the message of a failure.
    static PLACE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Seeds that a test runs unless told otherwise.
const USUAL: u64 = 1200;

/// The first seed and how many, of the environment.
fn seeds(first: u64) -> (u64, u64) {
    let count = std::env::var("SEEDS").ok().and_then(|text| text.parse().ok());
    match std::env::var("SEED") {
        Err(_) => (first, count.unwrap_or(USUAL)),
        Ok(text) => match text.parse() {
            Ok(seed) => (seed, count.unwrap_or(1)),
            Err(_) => {
                let hash = |sum: u64, byte: u8| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                (text.bytes().fold(0xcbf2_9ce4_8422_2325, hash) >> 8, count.unwrap_or(USUAL))
            }
        },
    }
}

/// Runs one seed; what was wrong, and where.
fn run(seed: u64, profile: Profile) -> Result<(), String> {
    caught(|| rig::run(seed, profile, &at))
}

/// Notes where the run of this thread is.
fn at(place: &str) {
    PLACE.with_borrow_mut(|held| place.clone_into(held));
}

/// Runs something that panics if something is wrong.
fn caught(run: impl FnOnce()) -> Result<(), String> {
    let run = catch_unwind(AssertUnwindSafe(run));
    run.map_err(|payload| {
        let text = payload.downcast_ref::<String>().cloned();
        text.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
    })
}

/// Runs the seeds of a test.
fn suite(test: &str, first: u64, profile: Profile) {
    suite_of(test, first, |seed| run(seed, profile));
}

fn suite_of(test: &str, first: u64, run: impl Fn(u64) -> Result<(), String>) {
    let (first, count) = seeds(first);
    for (nth, seed) in (first..first.saturating_add(count)).enumerate() {
        if let Err(what) = run(seed) {
            panic!(
                "{what}\nseed={seed} (number {} of {count}) crash_at={}\nrerun: SEED={seed} cargo test -p ebbtide-tests --test sim {test}",
                nth + 1,
                PLACE.with_borrow(Clone::clone),
            );
        }
    }
}

#[test]
fn a_kill_loses_nothing() {
    suite("a_kill_loses_nothing", 1_000_000, Profile { power: 0, ..Profile::STRICT });
}

#[test]
fn a_power_cut_loses_no_change() {
    suite("a_power_cut_loses_no_change", 2_000_000, Profile { power: 5, ..Profile::STRICT });
}

#[test]
fn starts_and_stops_are_cut_off_anywhere() {
    let profile = Profile { power: 2, restless: true, ..Profile::STRICT };
    suite("starts_and_stops_are_cut_off_anywhere", 3_000_000, profile);
}

#[test]
fn faults_break_snapshots_and_nothing_else() {
    let profile = Profile { power: 4, faults: true, ..Profile::STRICT };
    suite("faults_break_snapshots_and_nothing_else", 4_000_000, profile);
}

#[test]
fn damage_is_noticed() {
    let profile = Profile { power: 1, damage: true, ..Profile::STRICT };
    suite("damage_is_noticed", 20_000_000, profile);
}

#[test]
fn overlays_keep_what_was_written_to_them_and_nothing_else() {
    let profile = Profile { power: 2, overlays: true, ..Profile::STRICT };
    suite("overlays_keep_what_was_written_to_them_and_nothing_else", 8_000_000, profile);
}

#[test]
fn overlays_survive_faults() {
    let profile = Profile { power: 4, overlays: true, faults: true, ..Profile::STRICT };
    suite("overlays_survive_faults", 21_000_000, profile);
}

#[test]
fn what_is_released_is_an_error_and_nothing_else() {
    let profile = Profile { power: 1, releases: true, ..Profile::STRICT };
    suite("what_is_released_is_an_error_and_nothing_else", 9_000_000, profile);
}

#[test]
fn faults_while_readers_release() {
    let profile = Profile { power: 1, releases: true, faults: true, ..Profile::STRICT };
    suite("faults_while_readers_release", 10_000_000, profile);
}

#[test]
fn a_rewind_is_whole_and_takes_nothing_else_with_it() {
    let profile = Profile { power: 4, rewinds: true, ..Profile::STRICT };
    suite("a_rewind_is_whole_and_takes_nothing_else_with_it", 11_000_000, profile);
}

#[test]
fn a_rewind_survives_faults() {
    let profile = Profile { power: 4, rewinds: true, faults: true, ..Profile::STRICT };
    suite("a_rewind_survives_faults", 12_000_000, profile);
}

#[test]
fn checkpoints_outlive_their_snapshots_and_never_change() {
    let profile = Profile { power: 4, checkpoints: true, ..Profile::STRICT };
    suite("checkpoints_outlive_their_snapshots_and_never_change", 14_000_000, profile);
}

#[test]
fn checkpoints_survive_cut_off_starts_and_new_generations() {
    let profile = Profile { power: 4, checkpoints: true, restless: true, ..Profile::STRICT };
    suite("checkpoints_survive_cut_off_starts_and_new_generations", 15_000_000, profile);
}

#[test]
fn checkpoints_survive_faults() {
    let profile = Profile { power: 3, checkpoints: true, faults: true, ..Profile::STRICT };
    suite("checkpoints_survive_faults", 16_000_000, profile);
}

#[test]
fn damaged_checkpoints_are_noticed() {
    let profile = Profile { power: 1, checkpoints: true, damage: true, ..Profile::STRICT };
    suite("damaged_checkpoints_are_noticed", 17_000_000, profile);
}

#[test]
fn a_store_without_space_costs_what_was_chosen() {
    let profile = Profile { power: 2, short: true, ..Profile::STRICT };
    suite("a_store_without_space_costs_what_was_chosen", 13_000_000, profile);
}

#[test]
fn deletions_are_cut_off_anywhere() {
    let profile = Profile { power: 1, deletes: true, ..Profile::STRICT };
    suite("deletions_are_cut_off_anywhere", 22_000_000, profile);
}

#[test]
fn deletions_survive_faults() {
    let profile = Profile { power: 1, deletes: true, faults: true, ..Profile::STRICT };
    suite("deletions_survive_faults", 23_000_000, profile);
}

#[test]
fn sizes_and_generations_begin_anywhere() {
    let profile = Profile { power: 4, verbs: true, ..Profile::STRICT };
    suite("sizes_and_generations_begin_anywhere", 18_000_000, profile);
}

#[test]
fn sizes_and_generations_survive_faults() {
    let profile = Profile { power: 4, verbs: true, faults: true, ..Profile::STRICT };
    suite("sizes_and_generations_survive_faults", 19_000_000, profile);
}

#[test]
fn a_history_moves_whole_or_not_at_all() {
    suite_of("a_history_moves_whole_or_not_at_all", 14_000_000, |seed| caught(|| moves::run(seed, &at)));
}

#[test]
fn a_damaged_history_file_is_refused_whatever_the_byte() {
    moves::damage_is_refused();
}

/// A medium that breaks its promises must be noticed, or the net has a hole.
fn canary(first: u64, defect: Defect, profile: Profile) {
    let noticed =
        (first..first + 40).filter(|&seed| run(seed, Profile { defect: Some(defect), ..profile }).is_err());
    assert!(noticed.take(3).count() == 3, "{defect:?} went unnoticed");
}

#[test]
fn the_net_holds_forgotten_writes_of_the_store() {
    canary(5_000_000, Defect::ForgetsStateWrites, Profile::STRICT);
}

#[test]
fn the_net_holds_stores_that_answer_early() {
    canary(6_000_000, Defect::AnswersStateWritesEarly, Profile::STRICT);
}

#[test]
fn the_net_holds_flushes_that_do_nothing() {
    canary(7_000_000, Defect::IgnoresImageSyncs, Profile { power: 8, ..Profile::STRICT });
}
