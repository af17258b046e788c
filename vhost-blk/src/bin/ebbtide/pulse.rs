//! The signs of life of the disks on offer: see `cow_engine`'s head of `away`.
//!
//! Invariant: they come about once a second whatever else the daemon does, so a thread gives them that waits for
//! nobody; the first ones before a door opens.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use cow_engine::host::now_ns;

use crate::serve::Served;

/// How often. The engine allows for five times as long.
const OFTEN: Duration = Duration::from_secs(1);

/// Whether it is over.
type Over = Arc<(Mutex<bool>, Condvar)>;

/// The thread; ends with this value.
pub(crate) struct Pulse {
    over: Over,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    /// Gives signs of life of `disks` from now on.
    pub(crate) fn start(disks: Arc<Vec<Served>>) -> anyhow::Result<Self> {
        let over = Over::default();
        let told = over.clone();
        beat(&disks);
        let thread = crate::thread("pulse", move || {
            while !is_over(&told) {
                beat(&disks)
            }
        });
        Ok(Self { over, thread: Some(thread.context("cannot start a thread")?) })
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that gives signs of life panicked");
        }
    }
}

/// Waits until the next ones are due, or it is over.
fn is_over(told: &Over) -> bool {
    let over = told.0.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = told.1.wait_timeout_while(over, OFTEN, |over| !*over);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}

fn beat(disks: &[Served]) {
    for served in disks {
        let disk = &served.disk;
        if let Err(error) = disk.beat(now_ns(), || disk.image().identity()) {
            log::debug!("{}: cannot ask about the image: {error}", served.spec.name);
        }
    }
}
