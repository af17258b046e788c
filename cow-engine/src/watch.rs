//! What every change of a disk looks at before it is made: the map that it is marked in, and the snapshot that it
//! preserves old content into.
//!
//! Invariant: both are found by one look, which costs two atomic operations as a look at either would.
//! Absent: what a change does with them ([`crate::disk`]), and who may put others in their place: the map's place is
//! taken within [`crate::resize`], the snapshot's by who has the right to change the chain.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::tracker::Tracker;

/// See the module.
pub(crate) struct Watch<S: Storage> {
    now: ArcSwap<Watching<S>>,
}

/// Who watches changes at one time.
pub(crate) struct Watching<S: Storage> {
    /// It covers the disk's capacity, or more.
    pub(crate) tracker: Option<Arc<Tracker<S::Cells>>>,
    /// The end of the chain.
    pub(crate) newest: Option<Arc<Snapshot<S>>>,
}

impl<S: Storage> Clone for Watching<S> {
    fn clone(&self) -> Self {
        Self { tracker: self.tracker.clone(), newest: self.newest.clone() }
    }
}

impl<S: Storage> Watch<S> {
    pub(crate) fn new(tracker: Option<Tracker<S::Cells>>, newest: Option<Arc<Snapshot<S>>>) -> Self {
        Self { now: ArcSwap::from_pointee(Watching { tracker: tracker.map(Arc::new), newest }) }
    }

    /// Both, not to be kept over a wait.
    pub(crate) fn look(&self) -> Guard<Arc<Watching<S>>> {
        self.now.load()
    }

    pub(crate) fn tracker(&self) -> Option<Arc<Tracker<S::Cells>>> {
        self.look().tracker.clone()
    }

    pub(crate) fn newest(&self) -> Option<Arc<Snapshot<S>>> {
        self.look().newest.clone()
    }

    pub(crate) fn set_tracker(&self, tracker: Tracker<S::Cells>) {
        let tracker = Arc::new(tracker);
        self.change(|watching| watching.tracker = Some(tracker.clone()));
    }

    pub(crate) fn set_newest(&self, newest: Option<Arc<Snapshot<S>>>) {
        self.change(|watching| watching.newest.clone_from(&newest));
    }

    fn change(&self, change: impl Fn(&mut Watching<S>)) {
        self.now.rcu(|now| {
            let mut watching = Watching::clone(now);
            change(&mut watching);
            watching
        });
    }
}
