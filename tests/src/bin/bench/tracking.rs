//! What change tracking costs: two disks of one daemon, with it and without, in turns of some ten milliseconds.
//!
//! The machine drifts by several percent within a second, so a turn is short and compared with its neighbour; two servers
//! differ as much from start to start (where the kernel puts their pages), so there are several starts, and what belongs to
//! a disk and not to its tracking changes sides: its file, and its place in the daemon. The cost is the median of all
//! pairs, with the middle half beside it; a ratio of two medians of long runs is chance.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use crate::contender::Bench;
use crate::{Options, Row, write_image};

/// Starts of the daemon for each of the main table's rounds: each image tracked and not, each disk first and second.
const STARTS_PER_ROUND: usize = 4;

/// Pairs of one start.
const PAIRS: usize = 100;

/// Bytes that a turn writes, in requests of the row's size: some ten milliseconds of them.
const TURN_BYTES: usize = 16 << 20;

/// The share of something that tracking costs, of all pairs, ascending.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(crate) struct Costs {
    iops: Vec<f64>,
    cpu: Vec<f64>,
}

/// Measures one row.
pub(crate) fn measure(bench: &Bench, options: &Options, row: &Row) -> Result<Costs> {
    let (image, beside) = (bench.image(row.medium), bench.dir(row.medium).join("beside.raw"));
    write_image(&beside, options.size_bytes())?;
    let mut costs = Costs::default();
    for start in 0..options.rounds() * STARTS_PER_ROUND {
        eprintln!("start {}: {}", start + 1, row.name);
        let images = if start % 2 == 0 { [&image, &beside] } else { [&beside, &image] };
        one_start(bench, row, images.map(|image| image.as_path()), start / 2 % 2 == 1, &mut costs)?;
    }
    std::fs::remove_file(&beside)?;
    costs.iops.sort_by(f64::total_cmp);
    costs.cpu.sort_by(f64::total_cmp);
    Ok(costs)
}

fn one_start(
    bench: &Bench,
    row: &Row,
    [tracked, untracked]: [&Path; 2],
    untracked_first: bool,
    costs: &mut Costs,
) -> Result<()> {
    let server = bench.start_both(tracked, untracked, untracked_first)?;
    let pairs = bench.turns(server.pid(), |load| {
        load.args(["--mix", row.mix, "--block-size", &row.block_size.to_string()]);
        load.args(["--depth", &row.depth.to_string(), "--turns", &PAIRS.to_string()]);
        load.args(["--requests", &(TURN_BYTES / row.block_size).to_string()]);
    })?;
    server.stop()?;
    for pair in pairs {
        let ([on, off], [on_cpu, off_cpu]) = (pair.seconds, pair.cpu_us);
        // As many requests took longer.
        costs.iops.push(1.0 - off / on);
        costs.cpu.push(on_cpu / off_cpu - 1.0);
    }
    Ok(())
}

/// The table of all rows.
pub(crate) fn markdown(all: &[(String, Costs)]) -> String {
    let mut text = String::new();
    if all.is_empty() {
        return text;
    }
    let pairs = all[0].1.iops.len();
    let _ =
        writeln!(text, "\n| tracking costs (median of {pairs} pairs; middle half) | IOPS | CPU per I/O |");
    let _ = writeln!(text, "|---|---|---|");
    for (row, costs) in all {
        let _ = writeln!(text, "| {row} | {} | {} |", summary(&costs.iops), summary(&costs.cpu));
    }
    text
}

fn summary(sorted: &[f64]) -> String {
    let at = |quarter: usize| sorted.get(sorted.len() * quarter / 4).map_or(f64::NAN, |share| share * 100.0);
    format!("{:+.1} % ({:+.1} to {:+.1})", at(2), at(1), at(3))
}
