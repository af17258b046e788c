//! Keeps the queues of one disk full of stamped writes, discards, write-zeroes and reads.
//!
//! Always: as many requests in flight on each queue as was asked for; reads are compared with the journal.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};

use super::journal::{Clock, Journal, Kind};
use super::unit;
use crate::random::Random;
use crate::vhost_client::{Client, Op, Options, PATIENCE, Ticket};

/// How often a load that waits for the device looks whether it is to go on.
const GLANCE: Duration = Duration::from_millis(20);
/// Most units of one request.
const LONGEST: usize = 16;

const GO: u8 = 0;
const DRAIN: u8 = 1;
const DROP: u8 = 2;

/// What a load does, to which disk.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The disk's vhost-user socket.
    pub socket: PathBuf,
    /// The disk's number, which its stamps carry.
    pub disk: u64,
    /// Bytes of a unit.
    pub unit_bytes: usize,
    /// Units of the disk.
    pub units: usize,
    /// Queues to use.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// What chooses requests and places.
    pub seed: u64,
}

/// A journal that a load writes and a judge reads.
#[derive(Clone, Debug)]
pub struct Shared(Arc<Mutex<Journal>>);

impl Shared {
    /// The journal of a disk of `units` zero units.
    pub fn new(units: usize) -> Self {
        Self(Arc::new(Mutex::new(Journal::new(units))))
    }

    /// The journal, for a moment.
    pub fn lock(&self) -> MutexGuard<'_, Journal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running load.
#[derive(Debug)]
pub struct Load {
    journal: Shared,
    state: Arc<AtomicU8>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Load {
    /// Connects to the disk and begins.
    ///
    /// # Errors
    /// If there is no thread to be had; what goes wrong later is in [`Load::wait_for`] and [`Load::end`].
    pub fn begin(plan: Plan, clock: Arc<Clock>, journal: Shared) -> Result<Self> {
        let state = Arc::new(AtomicU8::new(GO));
        let worker = (journal.clone(), Arc::clone(&state));
        let thread = std::thread::Builder::new().name(format!("load {}", plan.disk)).spawn(move || {
            let (journal, state) = worker;
            Worker::connect(&plan, &clock, journal)?.run(&state)
        })?;
        Ok(Self { journal, state, thread: Some(thread) })
    }

    /// Waits until `more` requests were acknowledged from now on.
    ///
    /// # Errors
    /// What went wrong with the load, also if nothing moves.
    pub fn wait_for(&mut self, more: u64) -> Result<()> {
        let reached = self.journal.lock().acknowledged() + more;
        let deadline = Instant::now() + PATIENCE;
        while self.journal.lock().acknowledged() < reached {
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                self.join()?;
                return Err(anyhow!("the load ended by itself"));
            }
            ensure!(Instant::now() < deadline, "the load does not get on");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Waits for the requests in flight, and ends.
    ///
    /// # Errors
    /// What went wrong with the load.
    pub fn end(mut self) -> Result<()> {
        self.state.store(DRAIN, Ordering::SeqCst);
        self.join()
    }

    /// Ends at once; requests in flight count as lost. For a daemon that was killed.
    ///
    /// # Errors
    /// What went wrong with the load before.
    pub fn abandon(mut self) -> Result<()> {
        self.state.store(DROP, Ordering::SeqCst);
        self.join()
    }

    fn join(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the load panicked"))?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.state.store(DROP, Ordering::SeqCst);
        // A test that comes here has failed already and says why.
        let _ = self.join();
    }
}

/// A request that the device holds.
struct Flying {
    ticket: Ticket,
    units: Range<usize>,
    /// Its number in the journal; none if it is a read.
    write: Option<u64>,
}

struct Worker<'a> {
    plan: &'a Plan,
    clock: &'a Clock,
    journal: Shared,
    client: Client,
    random: Random,
    /// Units that a request in flight touches.
    busy: Vec<bool>,
    flying: Vec<VecDeque<Flying>>,
}

impl<'a> Worker<'a> {
    fn connect(plan: &'a Plan, clock: &'a Clock, journal: Shared) -> Result<Self> {
        // A front end that was here before may still be on its way out.
        let deadline = Instant::now() + PATIENCE;
        let options = Options { queues: plan.queues, ..Options::default() };
        let client = loop {
            match Client::connect(&plan.socket, &options) {
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                result => break result.context("connect")?,
            }
        };
        Ok(Self {
            plan,
            clock,
            journal,
            client,
            random: Random::new(plan.seed),
            busy: vec![false; plan.units],
            flying: (0..plan.queues).map(|_| VecDeque::new()).collect(),
        })
    }

    fn run(&mut self, state: &AtomicU8) -> Result<()> {
        loop {
            for queue in 0..self.plan.queues {
                if state.load(Ordering::SeqCst) == GO {
                    self.fill(queue)?;
                }
                if !self.finish_oldest(queue, state)? {
                    self.lose_all();
                    return Ok(());
                }
            }
            if state.load(Ordering::SeqCst) != GO && self.flying.iter().all(VecDeque::is_empty) {
                return Ok(());
            }
        }
    }

    /// Brings `queue` to its depth, with one kick.
    fn fill(&mut self, queue: usize) -> Result<()> {
        while self.flying[queue].len() < self.plan.depth {
            let units = self.free_units();
            let flying = self.place(queue, units)?;
            self.flying[queue].push_back(flying);
        }
        Ok(self.client.queues[queue].kick_if_wanted()?)
    }

    /// Some units in a row that no request in flight touches.
    fn free_units(&mut self) -> Range<usize> {
        loop {
            let first = self.random.index(self.plan.units);
            let wanted = 1 + self.random.index(LONGEST);
            let most = &self.busy[first..self.plan.units.min(first + wanted)];
            let free = most.iter().take_while(|busy| !**busy).count();
            if free > 0 {
                return first..first + free;
            }
        }
    }

    fn place(&mut self, queue: usize, units: Range<usize>) -> Result<Flying> {
        self.busy[units.clone()].fill(true);
        let sectors_per_unit = (self.plan.unit_bytes / 512) as u64;
        let sector = units.start as u64 * sectors_per_unit;
        let sectors = u32::try_from(units.len() as u64 * sectors_per_unit)?;
        let choice = self.random.below(20);
        let (write, op) = match choice {
            0..2 => (None, Op::read(sector, sectors * 512)),
            2..4 => (Some(self.issue(&units, Kind::Zeros)), Op::discard(&[(sector, sectors, 0)])),
            4..6 => {
                // With and without leave to make a hole.
                let flags = u32::from(choice == 4);
                (Some(self.issue(&units, Kind::Zeros)), Op::write_zeroes(&[(sector, sectors, flags)]))
            }
            _ => {
                let write = self.issue(&units, Kind::Stamps);
                (Some(write), Op::write(sector, &self.stamps(&units, write)))
            }
        };
        let ticket = self.client.place(&Op { queue, ..op })?;
        Ok(Flying { ticket, units, write })
    }

    fn issue(&self, units: &Range<usize>, kind: Kind) -> u64 {
        let mut journal = self.journal.lock();
        journal.issue(units.clone(), kind, self.clock.tick())
    }

    fn stamps(&self, units: &Range<usize>, write: u64) -> Vec<u8> {
        let mut data = vec![0; units.len() * self.plan.unit_bytes];
        for (unit, bytes) in units.clone().zip(data.chunks_exact_mut(self.plan.unit_bytes)) {
            unit::fill(bytes, self.plan.disk, unit as u64, write);
        }
        data
    }

    /// Ends the oldest request of `queue`, if there is one; false if it is not to be waited for.
    fn finish_oldest(&mut self, queue: usize, state: &AtomicU8) -> Result<bool> {
        let Some(flying) = self.flying[queue].pop_front() else { return Ok(true) };
        let deadline = Instant::now() + PATIENCE;
        while !self.client.ends_within(&flying.ticket, GLANCE)? {
            if state.load(Ordering::SeqCst) == DROP {
                self.flying[queue].push_front(flying);
                return Ok(false);
            }
            ensure!(Instant::now() < deadline, "a request on units {:?} does not end", flying.units);
        }
        let Flying { ticket, units, write } = flying;
        let data = self.client.finish(ticket)?.ok().with_context(|| format!("request on units {units:?}"))?;
        self.busy[units.clone()].fill(false);
        let now = self.clock.tick();
        match write {
            Some(write) => self.journal.lock().acknowledge(units, write, now),
            None => self.check_read(&units, &data)?,
        }
        Ok(true)
    }

    /// The guest reads what it wrote last.
    fn check_read(&self, units: &Range<usize>, data: &[u8]) -> Result<()> {
        let journal = self.journal.lock();
        for (unit, bytes) in units.clone().zip(data.chunks_exact(self.plan.unit_bytes)) {
            let found = unit::read(bytes, self.plan.disk, unit as u64)
                .map_err(|text| anyhow!("the guest reads that unit {unit} {text}"))?;
            ensure!(journal.may_hold(unit, found), "the guest reads write {found:?} in unit {unit}");
        }
        Ok(())
    }

    fn lose_all(&mut self) {
        let mut journal = self.journal.lock();
        for Flying { units, write, .. } in self.flying.drain(..).flatten() {
            if let Some(write) = write {
                journal.lose(units, write);
            }
        }
    }
}
