//! The wish that the daemon ends: made by a signal, a verb or a front end, waited for by one thread.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

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

    /// Waits until it is.
    pub(crate) fn wait(&self) {
        let set = self.state.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.state.1.wait_while(set, |set| !*set).unwrap_or_else(PoisonError::into_inner));
    }
}
