//! The snapshots of a disk, oldest first, and where a key's content is.
//!
//! A snapshot's content of a key is where the snapshot itself has it, or the next newer one that does,
//! or still on the live disk. Readers walk a list that never changes; who changes the chain puts
//! another list in its place.
//!
//! Invariant: old lists stay right for who holds them: a snapshot leaves the chain only when its older
//! neighbour has everything that an older one could look for in it.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::error::Error;
use crate::index::{Key, Slot};
use crate::snapshot::Snapshot;
use crate::storage::Storage;

/// A chain at one time.
pub(crate) type List<S> = Vec<Arc<Snapshot<S>>>;

/// See the module.
pub(crate) struct Chain<S: Storage> {
    list: ArcSwap<List<S>>,
    /// Held by who changes the list.
    changing: Mutex<()>,
}

impl<S: Storage> Chain<S> {
    pub(crate) fn new(list: List<S>) -> Self {
        Self { list: ArcSwap::from_pointee(list), changing: Mutex::new(()) }
    }

    /// The chain as it is now.
    pub(crate) fn now(&self) -> Arc<List<S>> {
        self.list.load_full()
    }

    /// Adds the newest. The gate is closed.
    pub(crate) fn push(&self, snapshot: Arc<Snapshot<S>>) {
        self.change(|list| list.push(snapshot));
    }

    /// Takes out the one with this number.
    pub(crate) fn remove(&self, sequence: u32) {
        self.change(|list| list.retain(|one| one.sequence != sequence));
    }

    fn change(&self, change: impl FnOnce(&mut List<S>)) {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list = List::clone(&self.list.load());
        change(&mut list);
        self.list.store(Arc::new(list));
    }
}

/// The snapshots in which the content of number `sequence` is looked for, itself first.
///
/// # Errors
/// [`Error::SnapshotDeleted`] if it is not in the chain any more.
pub(crate) fn from<'a, S: Storage>(
    list: &'a List<S>,
    snapshot: &Snapshot<S>,
) -> Result<&'a [Arc<Snapshot<S>>], Error> {
    let at = list.partition_point(|one| one.sequence < snapshot.sequence);
    match list.get(at) {
        Some(one) if std::ptr::eq(&raw const **one, snapshot) => Ok(&list[at..]),
        _ => Err(Error::SnapshotDeleted { name: snapshot.name.clone() }),
    }
}

/// Where a key's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Still on the live disk, unless something is published meanwhile.
    Live,
    /// In the store.
    Kept(Slot),
    /// Nowhere: readers have released it.
    Released,
}

/// Finds `key` in the first of `chain` or the next newer one that has it.
///
/// # Errors
/// [`Error::SnapshotBroken`] if a broken one is passed: what it does not have may be lost.
pub(crate) fn locate<S: Storage>(chain: &[Arc<Snapshot<S>>], key: Key) -> Result<Place, Error> {
    for one in chain {
        if one.is_released(key) {
            return Ok(Place::Released);
        }
        if let Some(slot) = one.get(key) {
            return Ok(Place::Kept(slot));
        }
        if let Some(reason) = one.broken() {
            let name = chain[0].name.clone();
            return Err(Error::SnapshotBroken { name, reason: reason.to_owned() });
        }
    }
    Ok(Place::Live)
}
