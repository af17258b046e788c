//! What goes on behind the verbs: space of deleted snapshots is given back, and stores are looked after.
//!
//! Invariant: each step holds the right to change snapshots ([`Admin`]) for some milliseconds, and is
//! followed by a pause as long as it took, so that neither verbs nor guests wait for it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cow_engine::group::Admin;
use cow_engine::host::Executor;

use crate::serve::Served;

/// How often to look without being told that there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// How often to look whether difference stores reach their medium.
const STORE_CHECKS: Duration = Duration::from_secs(10);

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
    pub(crate) fn start(&self, disks: Arc<Vec<Served>>) -> anyhow::Result<Maintenance> {
        let upkeep = self.clone();
        let thread = crate::thread("maintenance", move || run(&upkeep, &disks));
        Ok(Maintenance { upkeep: self.clone(), thread: Some(thread.context("cannot start a thread")?) })
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

fn run(upkeep: &Upkeep, disks: &[Served]) {
    let executor = match Executor::new(16) {
        Ok(executor) => executor,
        Err(error) => {
            log::warn!("cannot look after the difference stores: {error}");
            return;
        }
    };
    let mut checked = Instant::now();
    while upkeep.wait(TICK) {
        for served in disks {
            maintain(upkeep, &executor, served);
        }
        if checked.elapsed() >= STORE_CHECKS {
            for served in disks {
                executor.block_on(served.disk.check_stores(&executor.storage()));
            }
            checked = Instant::now();
        }
    }
}

/// Maintains one disk until there is nothing left to do, or it is over.
fn maintain(upkeep: &Upkeep, executor: &Executor, served: &Served) {
    let io = executor.storage();
    loop {
        let began = Instant::now();
        let more = executor.block_on(served.disk.maintain(&mut upkeep.admin(), &io));
        match more {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                let source =
                    std::error::Error::source(&error).map_or(String::new(), |why| format!(": {why}"));
                log::warn!(
                    "{}: space of deleted snapshots is not given back: {error}{source}",
                    served.spec.name
                );
                return;
            }
        }
        if upkeep.told().end {
            return;
        }
        std::thread::sleep(began.elapsed());
    }
}
