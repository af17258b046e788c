//! Memory of Ebbtide's own for each grain that it preserved.
//!
//! Tables grow by doubling, so a figure at one number of grains could be luck: the worst of several
//! numbers counts.

use anyhow::{Context as _, Result};

use crate::contender::{Bench, Contender};
use crate::findings::{Goal, Unit};
use crate::launch::Setup;
use crate::machine::Medium;
use crate::subject::Subject;
use crate::{Options, Results};

pub(crate) const ROW: &str = "shm/snapshot-memory";

const GRAIN_BYTES: u64 = 4 << 10;

/// First touches between two looks.
const STEP_GRAINS: u64 = 16 << 10;

/// Below this many grains, what a process allocates once would count.
const LEAST_GRAINS: u64 = 48 << 10;

pub(crate) fn measure(bench: &Bench, options: &Options, row: &str, results: &mut Results) -> Result<()> {
    let medium = Medium::Shm;
    let mut subject = Subject::start(bench, Setup::plain(Contender::Ebbtide, &bench.image(medium), medium))?;
    // Buffers and stacks that any load needs come first, those of a first touch too.
    subject.take()?;
    touch(&subject, 0)?;
    subject.take()?;
    subject.release_all_but(1)?;
    let before = own_bytes(subject.server().pid())?;
    let mut worst: f64 = 0.0;
    for step in 0..options.size_bytes() / GRAIN_BYTES / STEP_GRAINS {
        touch(&subject, step)?;
        let grains = (step + 1) * STEP_GRAINS;
        let each = (own_bytes(subject.server().pid())? - before) / grains as f64;
        if grains >= LEAST_GRAINS {
            worst = worst.max(each);
        }
    }
    subject.expect_preserved(options.size_bytes())?;
    let figure = "own memory per preserved grain, worst of several fills";
    results.findings.note(row, figure, Unit::Bytes, Goal::AtMost(40.0), worst);
    subject.stop()
}

/// Writes each grain of a part of the disk once.
fn touch(subject: &Subject<'_>, step: u64) -> Result<()> {
    let length = STEP_GRAINS * GRAIN_BYTES;
    subject
        .load(|load| {
            load.args(["--mix", "write", "--depth", "32", "--pattern", "once"]);
            load.args(["--offset", &(step * length).to_string(), "--length", &length.to_string()]);
            load.args(["--requests", &u64::MAX.to_string()]);
        })
        .map(drop)
}

/// Resident memory that is neither a file's nor shared. `status` would do, but it is not exact.
fn own_bytes(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path)?;
    let kib: f64 = text
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
        .with_context(|| format!("no anonymous memory in {path}"))?;
    Ok(kib * 1024.0)
}
