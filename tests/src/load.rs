//! A load generator on the third-party `blkio` crate: one thread per queue, latencies counted, the
//! server's CPU time read from outside.
//!
//! Always: a stall ends the run with an error, not a hang. Absent: checking of what is read; the
//! suites do that with [`crate::vhost_client`].

mod turns;

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use blkio::{Blkio, Blkioq, ReqFlags};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;
use crate::random::Random;
use crate::raw::{Buffers, Completions, process_cpu_ns};

pub use turns::{Pair, Turns, in_turns};

/// No request takes longer than this on a machine that works at all.
const STALL: Duration = Duration::from_secs(30);

/// What to send, to whom, and for how long.
#[derive(Args, Clone, Debug)]
pub struct Load {
    /// The vhost-user socket of the disk
    #[arg(long)]
    pub socket: PathBuf,
    /// Operations and their weights: read, write, flush, discard, write-zeroes
    #[arg(long, default_value = "read=1", value_parser = Mix::parse)]
    pub mix: Mix,
    /// Bytes of one request, a multiple of 512
    #[arg(long, default_value_t = 4096)]
    pub block_size: usize,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32)]
    pub depth: usize,
    /// Queues, each with its own thread
    #[arg(long, default_value_t = 1)]
    pub queues: usize,
    /// Seconds to measure
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Seconds of the same load before measuring begins
    #[arg(long, default_value_t = 0.5)]
    pub warmup: f64,
    /// Stop after so many requests per queue instead (measures all of them, no warm-up)
    #[arg(long)]
    pub requests: Option<u64>,
    /// Where requests go within the region
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,
    /// First byte of the region
    #[arg(long, default_value_t = 0)]
    pub offset: u64,
    /// Bytes of the region; 0 means up to the end of the disk
    #[arg(long, default_value_t = 0)]
    pub length: u64,
    /// Bytes from the start of one block to the next, a multiple of 512; 0 means no gaps
    #[arg(long, default_value_t = 0)]
    pub stride: u64,
    /// Spin for completions instead of waiting for the interrupt's eventfd
    #[arg(long)]
    pub poll: bool,
    /// Pin this program to one CPU
    #[arg(long)]
    pub cpu: Option<usize>,
    /// Process whose CPU time is counted
    #[arg(long)]
    pub server_pid: Option<u32>,
    /// Seed of places and data
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Load {
    /// Bytes from the start of one block to the next.
    fn stride(&self) -> u64 {
        if self.stride == 0 { self.block_size as u64 } else { self.stride }
    }
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Anywhere, independently
    Random,
    /// One after the other; each queue in its own part
    Sequential,
    /// Every block exactly once, in a scattered order; ends after the last
    Once,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// Operations with weights.
#[derive(Clone, Debug)]
pub struct Mix(Vec<(Operation, u64)>);

impl Mix {
    /// Parses `read=70,write=30`; a name alone has weight 1.
    ///
    /// # Errors
    /// If a name is unknown, a weight is no number, or all weights are 0.
    pub fn parse(text: &str) -> Result<Self> {
        let mut mix = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let operation = match name {
                "read" => Operation::Read,
                "write" => Operation::Write,
                "flush" => Operation::Flush,
                "discard" => Operation::Discard,
                "write-zeroes" => Operation::WriteZeroes,
                _ => bail!("unknown operation {name:?}"),
            };
            let weight = weight.parse().with_context(|| format!("weight of {name}"))?;
            mix.push((operation, weight));
        }
        ensure!(mix.iter().any(|part| part.1 > 0), "all weights are 0");
        Ok(Self(mix))
    }

    fn pick(&self, random: &mut Random) -> Operation {
        if let [(only, _)] = self.0[..] {
            return only;
        }
        let mut ticket = random.below(self.0.iter().map(|part| part.1).sum());
        for &(operation, weight) in &self.0 {
            if ticket < weight {
                return operation;
            }
            ticket -= weight;
        }
        unreachable!("the ticket is below the sum of the weights")
    }
}

/// What a run measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Requests completed in the measured time.
    pub requests: u64,
    /// Measured time.
    pub seconds: f64,
    /// Requests per second.
    pub iops: f64,
    /// Half of the requests took no longer, in microseconds.
    pub p50_us: f64,
    /// 99 % of the requests took no longer, in microseconds.
    pub p99_us: f64,
    /// The longest request, in microseconds.
    pub max_us: f64,
    /// CPU time of the server per request, in microseconds, if its process was given.
    pub server_cpu_us: Option<f64>,
    /// Requests that failed.
    pub errors: u64,
}

/// Runs `load` to its end.
///
/// # Errors
/// If the disk cannot be reached, the load does not fit it, or a request stalls. Failed requests
/// are counted in [`Outcome::errors`].
pub fn run<'a>(load: &'a Load) -> Result<Outcome> {
    let (blkio, workers) = prepare(load, &load.socket)?;
    let cpu = |pid: Option<u32>| pid.map(process_cpu_ns).transpose().context("server's CPU time");
    let sleep_until = |when: Instant| std::thread::sleep(when - Instant::now().min(when));

    let begin = Instant::now();
    let window = load.requests.is_none().then(|| {
        let from = begin + Duration::from_secs_f64(load.warmup);
        (from, from + Duration::from_secs_f64(load.seconds))
    });
    let ready = Barrier::new(workers.len());
    let mut before = cpu(load.server_pid)?;
    let mut after = before;
    let finished = std::thread::scope(|scope| -> Result<Vec<Worker<'a>>> {
        let ready = &ready;
        let run = |mut worker: Worker<'a>| {
            move || {
                ready.wait();
                worker.run(window).map(|()| worker)
            }
        };
        let threads: Vec<_> = workers.into_iter().map(|worker| scope.spawn(run(worker))).collect();
        if let (Some((from, to)), Some(_)) = (window, load.server_pid) {
            sleep_until(from);
            before = cpu(load.server_pid)?;
            sleep_until(to);
            after = cpu(load.server_pid)?;
        }
        threads.into_iter().map(|thread| thread.join().expect("a worker panicked")).collect()
    })?;
    if window.is_none() {
        after = cpu(load.server_pid)?;
    }

    let seconds = window.map_or(begin.elapsed(), |(from, to)| to - from).as_secs_f64();
    let mut histogram = Histogram::default();
    let mut errors = 0;
    for worker in &finished {
        histogram.merge(&worker.histogram);
        errors += worker.errors;
    }
    // The queues go before the device that owns their memory's registration.
    drop(finished);
    drop(blkio);
    let us = |ns: u64| ns as f64 / 1000.0;
    let requests = histogram.total();
    Ok(Outcome {
        requests,
        seconds,
        iops: requests as f64 / seconds,
        p50_us: us(histogram.percentile_ns(0.50)),
        p99_us: us(histogram.percentile_ns(0.99)),
        max_us: us(histogram.max_ns()),
        server_cpu_us: before.zip(after).map(|(before, after)| us(after - before) / requests.max(1) as f64),
        errors,
    })
}

/// Connects to a disk, with a worker for each of the queues.
fn prepare<'a>(load: &'a Load, socket: &Path) -> Result<(Blkio, Vec<Worker<'a>>)> {
    ensure!(load.block_size > 0 && load.block_size.is_multiple_of(512), "block size: 512 bytes");
    ensure!(load.depth > 0 && load.queues > 0, "nothing in flight is no load");
    ensure!(load.stride == 0 || load.stride >= load.block_size as u64, "blocks would overlap");
    ensure!(load.stride.is_multiple_of(512), "stride: 512 bytes");
    if let Some(cpu) = load.cpu {
        crate::server::pin_this_thread(&[cpu])?;
    }
    let (mut blkio, queues) = connect(load, socket)?;
    let capacity = blkio.get_u64("capacity").context("capacity")?;
    let length = if load.length == 0 { capacity.saturating_sub(load.offset) } else { load.length };
    ensure!(load.offset + length <= capacity, "the region passes the end of the disk");
    let blocks = length / load.stride();
    ensure!(blocks >= load.queues as u64, "the region is too small");

    let mut workers = Vec::new();
    for (index, queue) in queues.into_iter().enumerate() {
        let seed = load.seed.wrapping_mul(0x1_0001).wrapping_add(index as u64);
        workers.push(Worker {
            buffers: Buffers::new(&mut blkio, load.block_size, load.depth, seed)
                .context("map the buffers")?,
            places: Places::new(load, blocks, index as u64, seed),
            histogram: Histogram::default(),
            errors: 0,
            queue,
            load,
        });
    }
    Ok((blkio, workers))
}

fn connect(load: &Load, socket: &Path) -> Result<(Blkio, Vec<Blkioq>)> {
    let count = i32::try_from(load.queues)?;
    let (eventfd, polled) = if load.poll { (0, count) } else { (count, 0) };
    // Without indirect descriptors a request takes three of them.
    let queue_size = i32::try_from((load.depth * 3).next_power_of_two().max(256))?;
    let path = socket.to_str().context("socket path is no text")?;
    let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
    blkio.set_str("path", path)?;
    blkio.connect().with_context(|| format!("connect to {path}"))?;
    blkio.set_i32("num-queues", eventfd)?;
    blkio.set_i32("num-poll-queues", polled)?;
    blkio.set_i32("queue-size", queue_size).context("queue size for this depth")?;
    let started = blkio.start().context("start the queues")?;
    let queues = if load.poll { started.poll_queues } else { started.queues };
    Ok((blkio, queues))
}

struct Worker<'a> {
    load: &'a Load,
    queue: Blkioq,
    buffers: Buffers,
    places: Places,
    histogram: Histogram,
    errors: u64,
}

impl Worker<'_> {
    /// Sends the load until the window, the requests or the pattern end, and waits for what is in flight.
    fn run(&mut self, window: Option<(Instant, Instant)>) -> Result<()> {
        let depth = self.load.depth;
        let mut random = Random::new(self.places.seed ^ 0xfeed);
        let mut submitted = vec![Instant::now(); depth];
        let mut completions = Completions::new(depth);
        let mut left = self.load.requests.unwrap_or(u64::MAX);
        let mut flying = 0_usize;
        let mut now = Instant::now();
        for (slot, when) in submitted.iter_mut().enumerate() {
            if left > 0 && self.enqueue(slot, &mut random) {
                *when = now;
                flying += 1;
                left -= 1;
            }
        }
        while flying > 0 {
            let mut patience = STALL;
            let count = self
                .queue
                .do_io(completions.room(), 1, Some(&mut patience), None)
                .context("the server completes nothing")?;
            now = Instant::now();
            let over = window.is_some_and(|(_, to)| now >= to);
            let counted = window.is_none_or(|(from, _)| now >= from && !over);
            for index in 0..count {
                let (slot, ret) = completions.get(index);
                ensure!(slot < depth, "completion of a request that was not sent");
                flying -= 1;
                self.errors += u64::from(ret != 0);
                if counted {
                    let taken = now.saturating_duration_since(submitted[slot]);
                    self.histogram.record(u64::try_from(taken.as_nanos())?);
                }
                if !over && left > 0 && self.enqueue(slot, &mut random) {
                    submitted[slot] = now;
                    flying += 1;
                    left -= 1;
                }
            }
        }
        Ok(())
    }

    /// Queues one more request in `slot`; false if the pattern has ended.
    fn enqueue(&mut self, slot: usize, random: &mut Random) -> bool {
        let Some(block) = self.places.next() else { return false };
        let bytes = self.load.block_size;
        let start = self.load.offset + block * self.load.stride();
        let none = ReqFlags::empty();
        match self.load.mix.pick(random) {
            Operation::Read => {
                let (list, count) = self.buffers.segments(slot);
                self.queue.readv(start, list, count, slot, none);
            }
            Operation::Write => {
                self.buffers.stamp(slot, random.next());
                let (list, count) = self.buffers.segments(slot);
                self.queue.writev(start, list, count, slot, none);
            }
            Operation::Flush => self.queue.flush(slot, none),
            Operation::Discard => self.queue.discard(start, bytes as u64, slot, none),
            Operation::WriteZeroes => self.queue.write_zeroes(start, bytes as u64, slot, none),
        }
        true
    }
}

/// The block numbers that one queue visits.
struct Places {
    pattern: Pattern,
    seed: u64,
    random: Random,
    /// Half-open range of this queue, for the patterns that share the region out.
    from: u64,
    to: u64,
    next: u64,
}

impl Places {
    fn new(load: &Load, blocks: u64, queue: u64, seed: u64) -> Self {
        let queues = load.queues as u64;
        let (from, to) = match load.pattern {
            Pattern::Random => (0, blocks),
            _ => (blocks * queue / queues, blocks * (queue + 1) / queues),
        };
        Self { pattern: load.pattern, seed, random: Random::new(seed), from, to, next: 0 }
    }
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let blocks = self.to - self.from;
        let place = match self.pattern {
            Pattern::Random => self.random.below(blocks),
            Pattern::Sequential => self.next % blocks,
            Pattern::Once if self.next == blocks => return None,
            Pattern::Once => scatter(self.next, blocks, self.seed),
        };
        self.next += 1;
        Some(self.from + place)
    }
}

/// A permutation of the numbers below `count`: mixes within the next power of two and walks on
/// until it is back below `count`.
fn scatter(number: u64, count: u64, seed: u64) -> u64 {
    let bits = 64 - (count - 1).leading_zeros();
    if bits == 0 {
        return 0;
    }
    let mask = u64::MAX >> (64 - bits);
    let mut mixed = number;
    loop {
        for round in 1..=3 {
            mixed = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask;
            mixed ^= mixed >> bits.div_ceil(2);
            mixed = mixed.wrapping_add(seed.wrapping_mul(round)) & mask;
        }
        if mixed < count {
            return mixed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattering_visits_every_block_once() {
        for count in [1, 2, 3, 64, 1000, 4097] {
            let mut seen: Vec<u64> = (0..count).map(|n| scatter(n, count, 7)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_mix_is_parsed_and_wrong_ones_are_refused() {
        let mix = Mix::parse("read=3,write").expect("valid");
        assert_eq!(mix.0, [(Operation::Read, 3), (Operation::Write, 1)]);
        for wrong in ["", "reed", "read=x", "read=0", "read=-1"] {
            assert!(Mix::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
