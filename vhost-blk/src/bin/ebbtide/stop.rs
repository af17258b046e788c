//! The wish that the daemon ends: made by a signal, a verb or a front end, waited for by one thread.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Set once; clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    state: Arc<(Mutex<bool>, Condvar)>,
}

impl Stop {
    /// Wishes the end.
    pub(crate) fn set(&self) {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.state.1.notify_all();
    }

    /// Whether the end was wished for.
    pub(crate) fn is_set(&self) -> bool {
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is, or for `time`; answers whether it is.
    pub(crate) fn wait_for(&self, time: Duration) -> bool {
        let set = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.state.1.wait_timeout_while(set, time, |set| !*set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits until it is.
    pub(crate) fn wait(&self) {
        let set = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.state.1.wait_while(set, |set| !*set).unwrap_or_else(PoisonError::into_inner));
    }
}
