//! What creating a snapshot does to the guest: the longest write while snapshots are created and while
//! none are, and how long the command takes on a disk at rest.
//!
//! A longest write is the worst luck of a run, so runs with and without take turns, and the ratio is of
//! neighbours. Nothing is held in the runs without; in the others every write after a creation is a
//! first touch, and the chain grows to 100.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::contender::{Bench, Contender};
use crate::findings::{Goal, Unit};
use crate::launch::Setup;
use crate::machine::Medium;
use crate::subject::Subject;
use crate::{Options, Results};

const CREATIONS: usize = 100;

/// Seconds of one run: 30 ms for a creation and what follows.
const SECONDS: f64 = 3.0;

/// Creations on a disk at rest.
const IDLE_CREATIONS: usize = 20;

/// What the command may take, besides the flush of the image; of a sparse file in memory that is
/// nothing.
const COMMAND_MS: f64 = 50.0;

const HUGE_BYTES: u64 = 64 << 40;

/// Places that are written on the huge disk, all over it: no more than 256 MiB.
const HUGE_STRIDE_BYTES: u64 = 1 << 30;

/// A disk on which snapshots are created.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    pub(crate) row: &'static str,
    medium: Medium,
    huge: bool,
}

/// The file of the other rows on both media, and one of 64 TiB with next to nothing in it. That one is in memory,
/// since ext4 has no files of more than 16 TiB.
pub(crate) const DISKS: [Disk; 3] = [
    Disk { row: "disk/snapshot-creation", medium: Medium::Disk, huge: false },
    Disk { row: "shm/snapshot-creation", medium: Medium::Shm, huge: false },
    Disk { row: "shm/snapshot-creation-64t", medium: Medium::Shm, huge: true },
];

pub(crate) fn measure(
    bench: &Bench,
    options: &Options,
    row: &str,
    disk: Disk,
    results: &mut Results,
) -> Result<()> {
    let huge = bench.dir(disk.medium).join("huge.raw");
    if !disk.huge {
        return on(bench, options, row, disk, bench.image(disk.medium), results);
    }
    File::create(&huge)?.set_len(HUGE_BYTES)?;
    let measured = on(bench, options, row, disk, huge.clone(), results);
    std::fs::remove_file(&huge)?;
    let _ = std::fs::remove_dir_all(crate::launch::state_of(&huge));
    measured
}

fn on(
    bench: &Bench,
    options: &Options,
    row: &str,
    disk: Disk,
    image: PathBuf,
    results: &mut Results,
) -> Result<()> {
    // The change map is allocated in full: with blocks of 64 KiB it would take 4 GiB, so 256 MiB.
    let keys = if disk.huge { ",block-size=1M" } else { "" };
    let setup = Setup { keys, ..Setup::plain(Contender::Ebbtide, &image, disk.medium) };
    let mut subject = Subject::start(bench, setup)?;
    at_rest(&mut subject, row, results)?;
    for round in 0..options.rounds() {
        eprintln!("round {}: {row}", round + 1);
        let (without, with);
        if round % 2 == 0 {
            without = longest_without(&subject, disk)?;
            with = longest_with(&mut subject, disk, row, results)?;
        } else {
            with = longest_with(&mut subject, disk, row, results)?;
            without = longest_without(&subject, disk)?;
        }
        results.findings.note(row, "longest write without a creation", Unit::Milliseconds, None, without);
        results.findings.note(row, "longest write with creations", Unit::Milliseconds, None, with);
        let figure = "longest write with ÷ without";
        results.findings.ratio(row, figure, Goal::AtMost(2.0), Some(with), Some(without));
    }
    subject.stop()
}

fn at_rest(subject: &mut Subject<'_>, row: &str, results: &mut Results) -> Result<()> {
    let mut longest: f64 = 0.0;
    for _ in 0..IDLE_CREATIONS {
        let begin = Instant::now();
        subject.take()?;
        longest = longest.max(begin.elapsed().as_secs_f64() * 1000.0);
    }
    let figure = "command at rest, longest of 20";
    results.findings.note(row, figure, Unit::Milliseconds, Goal::AtMost(COMMAND_MS), longest);
    subject.release_all_but(0)
}

/// Milliseconds of the longest write when no snapshot is taken or held.
fn longest_without(subject: &Subject<'_>, disk: Disk) -> Result<f64> {
    let outcome = subject.load(|load| {
        write_all_over(load, disk);
        load.args(["--seconds", &SECONDS.to_string()]);
    })?;
    Ok(outcome.max_us / 1000.0)
}

/// Milliseconds of the longest write while snapshots are taken.
fn longest_with(subject: &mut Subject<'_>, disk: Disk, row: &str, results: &mut Results) -> Result<f64> {
    let run = subject.take_under_load(CREATIONS, SECONDS, |load| write_all_over(load, disk))?;
    subject.release_all_but(0)?;
    let findings = &mut results.findings;
    findings.note(row, "creations under load", Unit::Count, None, run.taken as f64);
    findings.note(row, "longest creation under load", Unit::Milliseconds, None, run.longest_ms);
    findings.note(row, "writes held at most, as reported", Unit::Milliseconds, None, run.held_writes_ms);
    Ok(run.outcome.max_us / 1000.0)
}

fn write_all_over(load: &mut Command, disk: Disk) {
    load.args(["--mix", "write", "--depth", "32"]);
    if disk.huge {
        load.args(["--stride", &HUGE_STRIDE_BYTES.to_string()]);
    }
}
