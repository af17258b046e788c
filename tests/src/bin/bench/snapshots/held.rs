//! 64 snapshots held beside one: first touches, writes to what was touched, reads.
//!
//! One daemon holds one snapshot, then 64, then one, and so on, and each time with 64 is compared
//! with the mean of its neighbours: single short runs differ by more than what is looked for, and two
//! daemons by several percent from start to start.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::contender::{Bench, Contender};
use crate::findings::Goal;
use crate::launch::Setup;
use crate::machine::Medium;
use crate::subject::Subject;
use crate::{Options, Results};

const MANY: usize = 64;

/// Comparisons for each of the main table's rounds, where there is more than one.
const PAIRS_PER_ROUND: usize = 2;

/// Seconds of one measurement.
const SECONDS: &str = "0.5";

/// What is written and read; each snapshot holds some of it, the newest all.
const REGION_BYTES: u64 = 64 << 20;

/// Seconds during which snapshots are taken while the guest writes, so that each holds something.
const FILLING_SECONDS: f64 = 1.5;

/// What is compared, in the order measured.
const FIGURES: [&str; 3] = [
    "64 held ÷ one held, 4 KiB writes, first touch",
    "64 held ÷ one held, 4 KiB writes, all touched",
    "64 held ÷ one held, 4 KiB reads",
];

/// IOPS by figure.
type Rates = [f64; FIGURES.len()];

pub(crate) fn row(medium: Medium) -> String {
    format!("{}/snapshot-64-held", medium.name())
}

pub(crate) fn measure(
    bench: &Bench,
    options: &Options,
    row: &str,
    medium: Medium,
    results: &mut Results,
) -> Result<()> {
    let mut subject = Subject::start(bench, Setup::plain(Contender::Ebbtide, &bench.image(medium), medium))?;
    let mut before = with_one(&mut subject)?;
    let pairs = if options.rounds() == 1 { 1 } else { options.rounds() * PAIRS_PER_ROUND };
    for pair in 0..pairs {
        eprintln!("pair {}: {row}", pair + 1);
        let many = with_many(&mut subject)?;
        let after = with_one(&mut subject)?;
        for (index, figure) in FIGURES.into_iter().enumerate() {
            let one = f64::midpoint(before[index], after[index]);
            results.findings.ratio(row, figure, Goal::AtLeast(0.95), Some(many[index]), Some(one));
        }
        before = after;
    }
    subject.stop()
}

fn with_one(subject: &mut Subject<'_>) -> Result<Rates> {
    subject.take()?;
    subject.release_all_but(1)?;
    rates(subject)
}

fn with_many(subject: &mut Subject<'_>) -> Result<Rates> {
    // One is held already, and one more is taken at the end.
    subject.take_under_load(MANY - 2, FILLING_SECONDS, region)?;
    subject.take()?;
    rates(subject)
}

/// The newest snapshot holds nothing yet.
fn rates(subject: &mut Subject<'_>) -> Result<Rates> {
    // What the last deletions left to do is not to be measured.
    std::thread::sleep(Duration::from_millis(200));
    let first = subject.load(|load| {
        region(load);
        load.args(["--mix", "write", "--pattern", "once", "--requests", &u64::MAX.to_string()]);
    })?;
    let timed = |mix: &str| {
        subject.load(|load| {
            region(load);
            load.args(["--mix", mix, "--warmup", "0.1", "--seconds", SECONDS]);
        })
    };
    let (write, read) = (timed("write")?, timed("read")?);
    Ok([first.iops, write.iops, read.iops])
}

fn region(load: &mut Command) {
    load.args(["--depth", "32", "--length", &REGION_BYTES.to_string()]);
}
