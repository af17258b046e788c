//! Two disks of one server under the same load in turns, which are too short for the machine to change much meanwhile.
//!
//! Always: one queue for each disk, and nothing in flight on the other one. Absent: latencies.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::{Load, Worker, prepare};
use crate::raw::process_cpu_ns;

/// Two disks, and how often each has its turn.
#[derive(Args, Clone, Debug)]
pub struct Turns {
    /// The load; its socket is that of the first disk, its requests are those of one turn, and its warm-up each disk has
    /// before the first turn.
    #[command(flatten)]
    pub load: Load,
    /// The vhost-user socket of the second disk
    #[arg(long)]
    pub beside: PathBuf,
    /// Turns of each disk
    #[arg(long, default_value_t = 100)]
    pub turns: usize,
}

/// One turn of each disk, one right after the other.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Pair {
    /// Seconds that the requests of a turn took, of the first disk and of the second.
    pub seconds: [f64; 2],
    /// CPU time of the server meanwhile, in microseconds.
    pub cpu_us: [f64; 2],
}

/// Runs all turns. Who is first changes from pair to pair.
///
/// # Errors
/// As [`super::run`]; if a request fails, or neither the number of requests of a turn nor the server was given.
pub fn in_turns(turns: &Turns) -> Result<Vec<Pair>> {
    let load = &turns.load;
    let server = load.server_pid.context("whose CPU time is counted?")?;
    ensure!(load.requests.is_some_and(|requests| requests > 0), "how many requests has a turn?");
    ensure!(load.queues == 1, "turns are of one queue");
    // What owns the memory's registration goes after the queues.
    let (_first, mut workers) = prepare(load, &load.socket)?;
    let (_second, others) = prepare(load, &turns.beside)?;
    workers.extend(others);
    for worker in &mut workers {
        let begin = Instant::now();
        let warm = begin + Duration::from_secs_f64(load.warmup);
        while Instant::now() < warm {
            worker.run(None)?;
        }
    }
    let turn = |worker: &mut Worker<'_>| -> Result<(f64, f64)> {
        let cpu = process_cpu_ns(server)?;
        let begin = Instant::now();
        worker.run(None)?;
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(worker.errors == 0, "{} requests failed", worker.errors);
        Ok((seconds, (process_cpu_ns(server)? - cpu) as f64 / 1000.0))
    };
    let mut pairs = Vec::new();
    for nth in 0..turns.turns {
        let mut pair = Pair { seconds: [0.0; 2], cpu_us: [0.0; 2] };
        for disk in if nth % 2 == 0 { [0, 1] } else { [1, 0] } {
            (pair.seconds[disk], pair.cpu_us[disk]) = turn(&mut workers[disk])?;
        }
        pairs.push(pair);
    }
    Ok(pairs)
}
