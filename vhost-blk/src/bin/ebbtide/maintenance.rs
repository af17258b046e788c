//! What goes on behind the verbs: space of deleted snapshots is given back, and stores are looked after.
//!
//! Invariant: each step holds the right to change snapshots ([`Admin`]) for some milliseconds, and is
//! followed by a pause as long as it took, so that neither verbs nor guests wait for it.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use control::EventHub;
use cow_engine::Backlog;
use cow_engine::group::Admin;
use cow_engine::host::Executor;

use crate::cache;
use crate::serve::Served;

/// How often to look without being told that there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// How often to look whether difference stores reach their medium. The kernel begins to write back what is about as
/// old.
const STORE_CHECKS: Duration = Duration::from_secs(30);

/// How long a turn of writing back is, with the pauses that leave the medium to guests.
const EASING: Duration = Duration::from_millis(200);

/// How long one disk's merges and rewinds go on before it is others' turn, and that of periodic duties.
const TURN: Duration = Duration::from_millis(500);

/// How long nothing is changed in a region before a stop of the host would not count it as changed; at most
/// twice as long.
const COOLING: Duration = Duration::from_secs(30);

/// What the thread was told.
#[derive(Default)]
struct Told {
    work: bool,
    end: bool,
}

/// The right to change snapshots, and the bell of the thread that shares it.
#[derive(Clone)]
pub(crate) struct Upkeep {
    shared: Arc<(Mutex<Admin>, Mutex<Told>, Condvar)>,
}

impl Upkeep {
    pub(crate) fn new() -> Self {
        Self { shared: Arc::new((Mutex::new(Admin::new()), Mutex::default(), Condvar::new())) }
    }

    /// Waits for the right to change snapshots.
    pub(crate) fn admin(&self) -> MutexGuard<'_, Admin> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that there is something to do.
    pub(crate) fn nudge(&self) {
        self.told().work = true;
        self.shared.2.notify_all();
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.shared.1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `time`, or less if there is something to do; `false` if it is over.
    fn wait(&self, time: Duration) -> bool {
        let waited = self.shared.2.wait_timeout_while(self.told(), time, |told| !told.work && !told.end);
        let (mut told, _) = waited.unwrap_or_else(PoisonError::into_inner);
        told.work = false;
        !told.end
    }

    /// Starts the thread that maintains `disks`.
    pub(crate) fn start(&self, disks: Arc<Vec<Served>>, hub: EventHub) -> anyhow::Result<Maintenance> {
        let upkeep = self.clone();
        let (tell, told) = sync_channel(1);
        let thread = crate::thread("maintenance", move || {
            // An executor stays with its thread.
            let (executor, began) = match Executor::new(16) {
                Ok(executor) => (Some(executor), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let _ = tell.send(began);
            if let Some(executor) = executor {
                run(&upkeep, &executor, &disks, &hub);
            }
        });
        let thread = Some(thread.context("cannot start a thread")?);
        let maintenance = Maintenance { upkeep: self.clone(), thread };
        // Nothing would be cooled, merged or looked after without it, and no rewind come to its end.
        told.recv().context("the maintenance of disks ended at once")??;
        Ok(maintenance)
    }
}

/// The thread; ends with this value.
pub(crate) struct Maintenance {
    upkeep: Upkeep,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Maintenance {
    fn drop(&mut self) {
        self.upkeep.told().end = true;
        self.upkeep.shared.2.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the maintenance of difference stores panicked");
        }
    }
}

fn run(upkeep: &Upkeep, executor: &Executor, disks: &[Served], hub: &EventHub) {
    for served in disks {
        executor.block_on(served.disk.look_for_marks(&executor.storage()));
    }
    let cache = cache::bytes_for_stores();
    let mut checked = Instant::now();
    let mut measured = Instant::now();
    let mut cooled = Instant::now();
    let mut pause = TICK;
    while upkeep.wait(pause) {
        pause = TICK;
        for served in disks {
            if maintain(upkeep, executor, served) {
                pause = Duration::ZERO;
            }
            if write_behind(upkeep, executor, disks, served, cache) {
                pause = Duration::ZERO;
            }
        }
        if measured.elapsed() >= TICK {
            measured = Instant::now();
            disks.iter().for_each(|served| served.meter.look(served, hub));
        }
        if checked.elapsed() >= STORE_CHECKS {
            // Not for ever: what is written meanwhile may be as much.
            if checked.elapsed() < 4 * STORE_CHECKS && ease(upkeep, executor, disks) {
                pause = Duration::ZERO;
            } else {
                for served in disks {
                    executor.block_on(served.disk.check_stores(&executor.storage()));
                }
                checked = Instant::now();
            }
        }
        if cooled.elapsed() >= COOLING {
            for served in disks {
                executor.block_on(served.disk.cool(&executor.storage()));
            }
            cooled = Instant::now();
        }
    }
}

/// Writes back what is in the page cache only, for a while and with pauses; `true` if there is more.
fn ease(upkeep: &Upkeep, executor: &Executor, disks: &[Served]) -> bool {
    let turn = Instant::now();
    while turn.elapsed() < EASING && !upkeep.told().end {
        let began = Instant::now();
        let eased = |served: &Served| executor.block_on(served.disk.ease_stores(&executor.storage()));
        if !disks.iter().any(eased) {
            return false;
        }
        std::thread::sleep(3 * began.elapsed());
    }
    !upkeep.told().end
}

/// Keeps what the stores of a disk take of the host's memory within bounds, which are `cache` bytes for all of them;
/// whether more is due.
fn write_behind(upkeep: &Upkeep, executor: &Executor, disks: &[Served], served: &Served, cache: u64) -> bool {
    let turn = Instant::now();
    while turn.elapsed() < EASING && !upkeep.told().end {
        let began = Instant::now();
        let all = disks.iter().map(|one| one.disk.cached_bytes()).sum();
        let kept = cow_engine::cache_share(cache, all, served.disk.cached_bytes(), disks.len());
        match executor.block_on(served.disk.write_behind(&executor.storage(), kept)) {
            Backlog::Nothing => return false,
            Backlog::Some => std::thread::sleep(3 * began.elapsed()),
            Backlog::TooMuch => {}
        }
    }
    !upkeep.told().end
}

/// Maintains one disk until there is nothing left to do, or it is over; `true` if it is others' turn first.
fn maintain(upkeep: &Upkeep, executor: &Executor, served: &Served) -> bool {
    let io = executor.storage();
    let turn = Instant::now();
    while turn.elapsed() < TURN {
        let began = Instant::now();
        let more = executor.block_on(served.disk.maintain(&mut upkeep.admin(), &io));
        match more {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                let source =
                    std::error::Error::source(&error).map_or(String::new(), |why| format!(": {why}"));
                log::warn!(
                    "{}: space of deleted snapshots is not given back: {error}{source}",
                    served.spec.name
                );
                return false;
            }
        }
        if upkeep.told().end {
            return false;
        }
        std::thread::sleep(began.elapsed());
    }
    true
}
