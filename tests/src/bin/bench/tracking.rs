//! What change tracking costs: two daemons, with it and without, one right after the other, many
//! times.
//!
//! Two servers of the same program differ by several percent from start to start (where the kernel
//! puts their pages), and the machine drifts more than that within a minute. So the cost is the
//! median of the ratios of many short pairs, with the middle half of them beside it; a ratio of two
//! medians of long runs is chance.

use std::fmt::Write as _;

use anyhow::Result;

use crate::contender::{Bench, Contender};
use crate::{Options, Row};

/// Pairs for each of the main table's rounds.
const PAIRS_PER_ROUND: usize = 20;

/// Seconds of one measurement.
const SECONDS: f64 = 0.4;

/// The share of something that tracking costs, of all pairs, ascending.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub(crate) struct Costs {
    iops: Vec<f64>,
    cpu: Vec<f64>,
}

/// Measures one row.
pub(crate) fn measure(bench: &Bench, options: &Options, row: &Row) -> Result<Costs> {
    let mut costs = Costs::default();
    for pair in 0..options.rounds() * PAIRS_PER_ROUND {
        eprintln!("pair {}: {}", pair + 1, row.name);
        let mut both = [Contender::Ebbtide, Contender::Untracked];
        if pair % 2 == 1 {
            both.reverse();
        }
        let mut outcomes = Vec::new();
        for contender in both {
            outcomes.push(bench.measure(row, contender, SECONDS)?);
        }
        if pair % 2 == 1 {
            outcomes.reverse();
        }
        let [on, off] = &outcomes[..] else { unreachable!("a pair") };
        costs.iops.push(1.0 - on.iops / off.iops);
        if let (Some(on), Some(off)) = (on.server_cpu_us, off.server_cpu_us) {
            costs.cpu.push(on / off - 1.0);
        }
    }
    costs.iops.sort_by(f64::total_cmp);
    costs.cpu.sort_by(f64::total_cmp);
    Ok(costs)
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
