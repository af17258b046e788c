//! `bench`: Ebbtide beside `qemu-storage-daemon`, a plain framework back end, and the file itself.
//!
//! Everything runs on this machine, on one file per medium, one server at a time, in interleaved
//! rounds of which the medians are printed. What makes the numbers meaningless is said in the
//! output, see [`machine`]. Read the ratios of one run; figures of different machines, or of one
//! machine on different days, do not compare.

mod cold;
mod contender;
mod findings;
mod launch;
mod machine;
mod memory;
mod scale;
mod snapshots;
mod subject;
mod table;
mod tracking;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use ebbtide_tests::baseline::{self, Baseline};
use ebbtide_tests::load::{self, Load, Outcome, Turns};

use contender::{Bench, CLIENT_CPU, Contender};
use findings::Findings;
use machine::Medium;

/// Compares Ebbtide with qemu-storage-daemon, a plain framework back end and fio, in one table.
#[derive(Parser, Clone, Debug)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Child>,
    #[command(flatten)]
    options: Options,
}

/// What this program starts itself as.
#[derive(Subcommand, Clone, Debug)]
#[command(hide = true)]
enum Child {
    #[command(hide = true)]
    Load(Load),
    #[command(hide = true)]
    Turns(Turns),
    #[command(hide = true)]
    Baseline(Baseline),
}

#[derive(clap::Args, Clone, Debug)]
struct Options {
    /// Four minutes instead of twenty-five: 1 round of 1 second, a small file
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains one of these, comma-separated, such as `disk/randwrite`
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only these servers, comma-separated
    #[arg(long, value_delimiter = ',', value_enum)]
    servers: Vec<Contender>,
    /// Interleaved rounds, of which medians are taken
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of one measurement
    #[arg(long)]
    seconds: Option<f64>,
    /// Mebibytes of the file under test
    #[arg(long)]
    size_mib: Option<u64>,
    /// A directory on the disk to measure [default: that of this program]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// A directory in memory
    #[arg(long, default_value = "/dev/shm")]
    shm: PathBuf,
    /// The program under test [default: built by cargo]
    #[arg(long)]
    ebbtide: Option<PathBuf>,
    /// Print JSON instead of Markdown
    #[arg(long)]
    json: bool,
    /// Let the client spin instead of waiting for interrupts
    #[arg(long)]
    poll: bool,
}

impl Options {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 }).max(1)
    }

    fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 1.0 } else { 2.0 })
    }

    fn size_bytes(&self) -> u64 {
        self.size_mib.unwrap_or(if self.quick { 256 } else { 1024 }) << 20
    }

    fn wants_row(&self, name: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|part| name.contains(part.as_str()))
    }

    fn wants(&self, contender: Contender) -> bool {
        self.servers.is_empty() || self.servers.contains(&contender)
    }
}

/// A load to compare on.
#[derive(Clone, Debug)]
struct Row {
    name: String,
    medium: Medium,
    /// As the load client's `--mix` and fio's `--rw` call it.
    mix: &'static str,
    random: bool,
    block_size: usize,
    depth: usize,
}

fn all_rows() -> Vec<Row> {
    let shapes = [
        ("read", true, 4096, 1),
        ("write", true, 4096, 1),
        ("read", true, 4096, 32),
        ("write", true, 4096, 32),
        ("read", false, 1 << 20, 4),
        ("write", false, 1 << 20, 4),
    ];
    let mut rows = Vec::new();
    for medium in [Medium::Disk, Medium::Shm] {
        for (mix, random, block_size, depth) in shapes {
            let order = if random { "rand" } else { "seq" };
            let size = if block_size == 4096 { "4k" } else { "1m" };
            let name = format!("{}/{order}{mix}-{size}-d{depth}", medium.name());
            rows.push(Row { name, medium, mix, random, block_size, depth });
        }
    }
    rows
}

/// Measurements of each cell: row, column, rounds.
type Cells = BTreeMap<String, BTreeMap<String, Vec<Outcome>>>;

/// What was measured so far.
#[derive(Debug, Default)]
struct Results {
    cells: Cells,
    findings: Findings,
    /// What could not be measured, and why.
    failures: Vec<String>,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.command {
        Some(Child::Load(load)) => {
            println!("{}", serde_json::to_string(&load::run(&load)?)?);
            Ok(())
        }
        Some(Child::Turns(turns)) => {
            println!("{}", serde_json::to_string(&load::in_turns(&turns)?)?);
            Ok(())
        }
        Some(Child::Baseline(options)) => baseline::serve(&options),
        None => compare(&cli.options),
    }
}

fn compare(options: &Options) -> Result<()> {
    let mut report = machine::Report::of_this_machine(options)?;
    let bench = Bench::prepare(options)?;
    report.programs = bench.versions();
    let rows: Vec<_> = all_rows().into_iter().filter(|row| options.wants_row(&row.name)).collect();
    let watch = machine::Steal::begin();
    // What this program itself does is not to disturb a server. Where it may not choose, there was
    // a warning.
    let _ = ebbtide_tests::server::pin_this_thread(&[CLIENT_CPU]);
    let mut results = Results::default();
    for round in 0..options.rounds() {
        for row in &rows {
            let mut servers: Vec<_> =
                Contender::ALL.into_iter().filter(|each| options.wants(*each)).collect();
            let turn = round % servers.len().max(1);
            // Nobody is always first after the pause.
            servers.rotate_left(turn);
            for contender in servers {
                eprintln!("round {}: {} {}", round + 1, row.name, contender.name());
                match bench.measure(row, contender, options.seconds()) {
                    Ok(outcome) => record(&mut results.cells, &row.name, contender.name(), outcome),
                    Err(error) => {
                        results.failures.push(format!("{} {}: {error:#}", row.name, contender.name()));
                    }
                }
            }
        }
        snapshots::round(&bench, options, round, &mut results);
    }
    snapshots::rest(&bench, options, &mut results);
    cold::measure(&bench, options, &mut results);
    scale::measure(&bench, options, &mut results);
    let mut costs = Vec::new();
    for row in rows.iter().filter(|row| is_tracked(row) && options.wants(Contender::Untracked)) {
        match tracking::measure(&bench, options, row) {
            Ok(cost) => costs.push((row.name.clone(), cost)),
            Err(error) => results.failures.push(format!("tracking, {}: {error:#}", row.name)),
        }
    }
    let memory = if options.wants(Contender::Ebbtide) && options.wants_row("memory") {
        memory::measure(&bench).map_err(|error| results.failures.push(format!("memory: {error:#}"))).ok()
    } else {
        None
    };
    report.warnings.extend(watch.warning());
    if options.rounds() < 3 {
        report.warnings.push("fewer than 3 rounds: a median of these is chance".into());
    }
    if options.json {
        let all = serde_json::json!({
            "machine": report, "cells": results.cells, "findings": results.findings.json(),
            "tracking": costs, "memory": memory, "failures": results.failures,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        let order: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
        print!("{}", table::markdown(&report, &order, &results, &costs, memory.as_ref(), options));
    }
    for failure in &results.failures {
        eprintln!("failed: {failure}");
    }
    ensure!(results.failures.is_empty(), "{} measurements failed", results.failures.len());
    Ok(())
}

/// Whether tracking has something to do that could be measured.
fn is_tracked(row: &Row) -> bool {
    row.depth == 32 && row.mix == "write"
}

fn record(cells: &mut Cells, row: &str, column: &str, outcome: Outcome) {
    let column = cells.entry(row.into()).or_default().entry(column.into()).or_default();
    column.push(outcome);
}

/// Writes a file of `bytes` that holds no zeroes and has been read once: a virtual disk is slow
/// where it was never touched.
fn write_image(path: &Path, bytes: u64) -> Result<()> {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut random = ebbtide_tests::random::Random::new(bytes);
    let mut file = std::fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut block = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()?;
    // Page-aligned, for O_DIRECT, somewhere in a larger buffer.
    let mut room = vec![0; (1 << 20) + 4096];
    let skip = room.as_ptr().align_offset(4096);
    let direct = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path);
    let mut file = direct.or_else(|_| std::fs::File::open(path))?;
    while file.read(&mut room[skip..skip + (1 << 20)])? > 0 {}
    Ok(())
}

/// The time after which a measurement of `seconds` has certainly gone wrong.
fn limit(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds * 4.0 + 120.0)
}
