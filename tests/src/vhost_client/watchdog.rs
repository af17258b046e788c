//! Ends calls that take too long.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::PATIENCE;

/// Closes a socket whose call takes too long, since the `vhost` crate waits for ever.
pub(super) struct Watchdog {
    shared: Arc<(Mutex<Watch>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Watch {
    deadline: Option<Instant>,
    over: bool,
}

impl Watchdog {
    pub(super) fn new(socket: UnixStream) -> Self {
        let shared = Arc::new((Mutex::new(Watch::default()), Condvar::new()));
        let watched = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let (lock, changed) = &*watched;
            let mut watch = lock.lock().unwrap_or_else(PoisonError::into_inner);
            while !watch.over {
                let left =
                    watch.deadline.map_or(PATIENCE, |when| when.saturating_duration_since(Instant::now()));
                if left.is_zero() {
                    // If it is closed already, the call has ended too.
                    let _ = socket.shutdown(std::net::Shutdown::Both);
                    watch.deadline = None;
                    continue;
                }
                watch = changed.wait_timeout(watch, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        });
        Self { shared, thread: Some(thread) }
    }

    pub(super) fn arm(&self, deadline: Option<Instant>) {
        self.change(|watch| watch.deadline = deadline);
    }

    fn change(&self, change: impl FnOnce(&mut Watch)) {
        change(&mut self.shared.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.1.notify_all();
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.change(|watch| watch.over = true);
        if let Some(thread) = self.thread.take() {
            // It runs no code that panics.
            let _ = thread.join();
        }
    }
}
