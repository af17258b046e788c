//! What becomes of the snapshots of a disk that is opened: which are kept, which break, which are removed.
//!
//! Invariant: a snapshot is believed only if its index has all records that were published, and leads on to its newer
//! neighbour; heads say what broke with a damaged one before its file goes.
//!
//! Absent: whether the image is as the snapshots left it; see `verdict`. Snapshots that a stop left half made are decided
//! by [`crate::group::settle`].

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use super::OpenReport;
use crate::disk::with_sources;
use crate::error::Error;
use crate::format::{self, Broken, SnapshotState};
use crate::index::Slot;
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::store::Store;
use crate::tracker::Control;

/// Reads the snapshots of a disk whose image is as they left it, oldest first.
///
/// Only what is damaged is given up, and what depends on it; an error that may pass (too few
/// descriptors, no permission, a failing device) is the caller's, and nothing was changed.
pub(super) async fn load_chain<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    names: &[String],
    remains: &Remains<'_, S>,
    report: &mut OpenReport,
) -> Result<Vec<Arc<Snapshot<S>>>, Error> {
    let mut chain: Vec<Arc<Snapshot<S>>> = Vec::new();
    let mut damaged = Vec::new();
    let mut lost: Option<String> = None;
    for sequence in sequences(names) {
        let loaded = Snapshot::load(io, dir, disk, sequence, Some(remains.store)).await;
        match loaded.and_then(|found| found.map(|one| remains.check_whole(one)).transpose()) {
            // A creation that did not come to its head.
            Ok(None) => Snapshot::<S>::remove_file(io, dir, sequence)?,
            Ok(Some(snapshot)) => chain.push(Arc::new(snapshot)),
            Err(error) if !error.is_damage() => return Err(error),
            Err(error) => damaged.push((sequence, with_sources(&error))),
        }
    }
    let chain = without_unnamed(io, dir, chain)?;
    for at in (0..chain.len()).rev() {
        let newer = chain.get(at + 1);
        if lost.is_none() && !leads_to(chain[at].newer(), newer.map(|one| one.sequence)) {
            let why = damaged.iter().find(|(sequence, _)| *sequence == chain[at].newer());
            let why = why.map_or("its index is gone", |(_, reason)| reason);
            lost = Some(format!("a newer snapshot is damaged: {why}"));
        }
        if let Some(why) = chain[at].lost.get() {
            lost.get_or_insert_with(|| why.clone());
        }
        if let Some(reason) = &lost {
            log::warn!("snapshot '{}' is broken: {reason}", chain[at].name);
            chain[at].set_broken(Broken { reason: reason.clone(), errno: 0, at_ns: 0 });
            chain[at].write_head(io).await?;
        }
    }
    // Only now: the heads say what was lost with them.
    for (sequence, reason) in damaged {
        log::warn!("snapshot number {sequence} is damaged: {reason}");
        Snapshot::<S>::remove_file(io, dir, sequence)?;
        report.dropped.push((format!("number {sequence}"), reason));
    }
    Ok(chain)
}

/// Removes snapshots that their older neighbour does not name: deleted ones that were merged into it, and
/// prepared ones whose instant had not come.
fn without_unnamed<S: Storage>(
    io: &S,
    dir: &S::Dir,
    chain: Vec<Arc<Snapshot<S>>>,
) -> Result<Vec<Arc<Snapshot<S>>>, Error> {
    let mut kept: Vec<Arc<Snapshot<S>>> = Vec::new();
    for snapshot in chain {
        let is_named = kept.last().is_none_or(|older| older.newer() == snapshot.sequence);
        if is_unneeded(snapshot.state(), is_named) {
            Snapshot::<S>::remove_file(io, dir, snapshot.sequence)?;
        } else {
            kept.push(snapshot);
        }
    }
    Ok(kept)
}

/// Whether a snapshot whose head names number `named` leads on to `newer`, the next one that is there.
pub(crate) fn leads_to(named: u32, newer: Option<u32>) -> bool {
    named == newer.unwrap_or(0)
}

/// Whether an index has fewer records than were published.
///
/// They are counted modulo 2^32, and there may be some more, which were not published.
pub(crate) fn is_short(found: u32, published: u32) -> bool {
    found.wrapping_sub(published).cast_signed() < 0
}

/// Whether nobody needs a snapshot in this state, which its older neighbour names or does not.
pub(crate) fn is_unneeded(state: SnapshotState, is_named: bool) -> bool {
    state != SnapshotState::Active && !is_named
}

/// What else was left that tells whether snapshots are whole.
pub(super) struct Remains<'a, S: Storage> {
    pub(super) store: &'a Store<S>,
    pub(super) control: Option<&'a Control<S::Cells>>,
}

impl<S: Storage> Remains<'_, S> {
    /// Refuses a snapshot whose index has fewer records than were published.
    fn check_whole(&self, snapshot: Snapshot<S>) -> Result<Snapshot<S>, Error> {
        let published = self.control.map_or(0, |control| control.records(snapshot.sequence));
        if snapshot.broken().is_none() && is_short(snapshot.loaded_records(), published) {
            return Err(Error::Corrupt { what: "the end of a snapshot's index", at: snapshot.records() });
        }
        Ok(snapshot)
    }
}

/// Takes the slots that the records of snapshots name. A broken one has given up its own.
pub(super) fn claim_slots<S: Storage>(store: &Store<S>, chain: &[Arc<Snapshot<S>>]) -> Result<(), Error> {
    for snapshot in chain {
        if snapshot.broken().is_some() {
            snapshot.emptied.store(true, SeqCst);
            continue;
        }
        let mut fits = true;
        snapshot.for_each(|_, slot| {
            if let Slot::At(slot) = slot {
                fits &= store.claim(slot);
            }
        });
        if !fits {
            return Err(Error::Corrupt { what: "a slot of a snapshot's index", at: 0 });
        }
    }
    Ok(())
}

/// Removes the snapshots of a disk whose image may not be as they left it.
pub(super) async fn drop_snapshots<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    names: &[String],
    reason: &str,
    report: &mut OpenReport,
) -> Result<(), Error> {
    for sequence in sequences(names) {
        if let Ok(Some(snapshot)) = Snapshot::<S>::load(io, dir, disk, sequence, None).await
            && snapshot.state() == SnapshotState::Active
        {
            report.dropped.push((snapshot.name.clone(), reason.to_owned()));
        }
        Snapshot::<S>::remove_file(io, dir, sequence)?;
    }
    Ok(())
}

/// The names of the snapshots of a disk that is not open, oldest first, as far as their heads can be read.
pub(crate) async fn names_of_snapshots<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    names: &[String],
) -> Vec<String> {
    let mut found = Vec::new();
    for sequence in sequences(names) {
        if let Ok(Some(snapshot)) = Snapshot::<S>::load(io, dir, disk, sequence, None).await
            && snapshot.is_active()
        {
            found.push(snapshot.name.clone());
        }
    }
    found
}

/// The numbers of snapshots that have files, ascending.
pub(crate) fn sequences(names: &[String]) -> Vec<u32> {
    let mut all: Vec<u32> = names.iter().filter_map(|name| format::sequence_of(name)).collect();
    all.sort_unstable();
    all.dedup();
    all
}
