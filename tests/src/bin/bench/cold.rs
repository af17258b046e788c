//! What change tracking costs where nothing is hot yet: a fresh disk that is filled in order, and random writes all
//! over a large one that was just taken up.
//!
//! Each run has a daemon of its own with an empty state, so that every region is cold. Runs with and without
//! tracking take turns, and the ratios are of neighbours. Absent: the steady state, see [`crate::tracking`].

use std::fs::File;
use std::path::Path;

use anyhow::Result;
use ebbtide_tests::load::Outcome;

use crate::contender::{Bench, Contender};
use crate::findings::{Goal, Unit};
use crate::launch::{Setup, state_of};
use crate::machine::Medium;
use crate::snapshots::attempt;
use crate::{Options, Results};

const FILL: &str = "disk/tracking-fill";
const BURST: &str = "disk/tracking-burst";

/// A disk of 1 TiB with a place to write every 4 MiB: four or more in each region of the intent log.
const BURST_BYTES: u64 = 1 << 40;
const STRIDE: &str = "4194304";

/// Seconds of a burst, each measured by itself.
const BURST_SECONDS: usize = 30;

/// The seconds of which the curve is told.
const TOLD: [(usize, &str); 6] = [
    (1, "second 1, with ÷ without"),
    (2, "second 2, with ÷ without"),
    (3, "second 3, with ÷ without"),
    (5, "second 5, with ÷ without"),
    (10, "second 10, with ÷ without"),
    (20, "second 20, with ÷ without"),
];

/// Measures the rows that are wanted.
pub(crate) fn measure(bench: &Bench, options: &Options, results: &mut Results) {
    if !options.wants(Contender::Untracked) {
        return;
    }
    attempt(options, results, FILL, |_, results| fill(bench, options, results));
    attempt(options, results, BURST, |_, results| burst(bench, options, results));
}

/// The two in the order of a round.
fn both(round: usize) -> [Contender; 2] {
    let mut both = [Contender::Ebbtide, Contender::Untracked];
    if round % 2 == 1 {
        both.reverse();
    }
    both
}

/// A sparse file for the time of `measure`.
fn on_new_file<T>(bench: &Bench, bytes: u64, measure: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let path = bench.dir(Medium::Disk).join("cold.raw");
    File::create(&path)?.set_len(bytes)?;
    let measured = measure(&path);
    std::fs::remove_file(&path)?;
    let _ = std::fs::remove_dir_all(state_of(&path));
    measured
}

fn fill(bench: &Bench, options: &Options, results: &mut Results) -> Result<()> {
    let mib: u64 = if options.quick { 1 << 10 } else { 10 << 10 };
    for round in 0..options.rounds() {
        let (mut with, mut without) = (None, None);
        for contender in both(round) {
            eprintln!("round {}: {FILL} {}", round + 1, contender.name());
            let outcome = on_new_file(bench, mib << 20, |image| {
                let server = bench.start(Setup::plain(contender, image, Medium::Disk))?;
                let outcome = bench.load(server.pid(), |load| {
                    load.args(["--mix", "write", "--pattern", "sequential", "--block-size", "1048576"]);
                    load.args(["--depth", "4", "--requests", &mib.to_string()]);
                })?;
                server.stop()?;
                Ok(outcome)
            })?;
            *(if contender == Contender::Ebbtide { &mut with } else { &mut without }) = Some(outcome.iops);
        }
        results.findings.ratio(FILL, "rate with ÷ without", Goal::AtLeast(0.97), with, without);
    }
    Ok(())
}

fn burst(bench: &Bench, options: &Options, results: &mut Results) -> Result<()> {
    on_new_file(bench, BURST_BYTES, |image| {
        let server = bench.start(Setup::plain(Contender::Untracked, image, Medium::Disk))?;
        // Every place once: a file system that makes room for them is not what is measured.
        bench.load(server.pid(), |load| {
            load.args(["--mix", "write", "--pattern", "once", "--stride", STRIDE, "--depth", "32"]);
            load.args(["--requests", &u64::MAX.to_string()]);
        })?;
        server.stop()?;
        for round in 0..options.rounds().min(3) {
            let (mut with, mut without) = (Vec::new(), Vec::new());
            for contender in both(round) {
                eprintln!("round {}: {BURST} {}", round + 1, contender.name());
                let curve = curve(bench, contender, image)?;
                *(if contender == Contender::Ebbtide { &mut with } else { &mut without }) = curve;
            }
            note_curve(&with, &without, results);
        }
        Ok(())
    })
}

/// The rate of each second from the first write on.
fn curve(bench: &Bench, contender: Contender, image: &Path) -> Result<Vec<Outcome>> {
    let server = bench.start(Setup::plain(contender, image, Medium::Disk))?;
    let mut curve = Vec::new();
    for second in 0..BURST_SECONDS {
        curve.push(bench.load(server.pid(), |load| {
            load.args(["--mix", "write", "--stride", STRIDE, "--depth", "32"]);
            load.args(["--seconds", "1", "--warmup", "0", "--seed", &(second + 1).to_string()]);
        })?);
    }
    server.stop()?;
    Ok(curve)
}

fn note_curve(with: &[Outcome], without: &[Outcome], results: &mut Results) {
    let findings = &mut results.findings;
    let mut rates: Vec<f64> = without.iter().map(|second| second.iops).collect();
    rates.sort_by(f64::total_cmp);
    let Some(&steady) = rates.get(rates.len() / 2) else { return };
    for (second, figure) in TOLD {
        let rate = with.get(second - 1).map(|outcome| outcome.iops);
        findings.ratio(BURST, figure, None, rate, Some(steady));
    }
    let longest = with.iter().map(|second| second.max_us / 1000.0).fold(0.0, f64::max);
    findings.note(BURST, "longest write", Unit::Milliseconds, None, longest);
    let least = steady * 0.9;
    // Of three seconds together: one alone is chance.
    let there = with.windows(3).position(|three| {
        let sum: f64 = three.iter().map(|second| second.iops).sum();
        sum / 3.0 >= least
    });
    let seconds = there.map_or(f64::INFINITY, |second| second as f64);
    let figure = "seconds until within 10 % of the rate without";
    findings.note(BURST, figure, Unit::Count, Goal::AtMost(20.0), seconds);
}
