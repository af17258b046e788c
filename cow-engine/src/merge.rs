//! The end of a snapshot: hidden at once, then merged into its older neighbour, then its space given
//! back.
//!
//! A deleted snapshot may hold what older ones need. What its older neighbour does not have passes to
//! it, by records that name the same slots: nothing is copied. What the neighbour has itself, and so
//! every older one finds there, nobody needs any more.
//!
//! ```text
//! the head says "deleted"              (nobody reads it from now on)
//! records in the neighbour's index     (a stop leaves both: the same keys in the same slots)
//! out of the chain                     (older ones now find everything in the neighbour)
//! its index removed                    (a stop before: merged again; after: it is gone)
//! slots that it had alone given back   (a stop before: no record names them, the next start does it)
//! ```
//!
//! While it is the newest, guests go on to preserve into it. So the last of its records are merged
//! behind a closed gate, which the neighbour then takes over.
//!
//! Invariant: each step is bounded, so that administrative verbs come in between.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use crate::disk::Disk;
use crate::error::Error;
use crate::format::{Entry, SnapshotState};
use crate::group::Admin;
use crate::index::{Key, Slot};
use crate::rewind::Rewind;
use crate::snapshot::Snapshot;
use crate::storage::Storage;

/// Runs of slots that one step gives back.
const SWEEP: usize = 256;

/// Records that one step of a merge takes in, unless told otherwise: some milliseconds.
pub const MERGE_STEP: u64 = 4096;

/// How long a merge into the newest may hold writes while those in flight end; it tries again later.
const PATIENCE: Duration = Duration::from_millis(100);

impl<S: Storage> Disk<S> {
    /// Deletes a snapshot. One at a time with other administrative verbs of the disk.
    ///
    /// It is gone for users at once; [`Disk::maintain`] gives back its space.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`]; [`Error::SnapshotInUse`] while it has overlays; those of its file, and then
    /// it is still there.
    pub async fn delete_snapshot(&self, io: &S, name: &str) -> Result<(), Error> {
        let snapshot = self.snapshot(name)?;
        self.overlays.check_unused(&snapshot)?;
        self.retire(io, &snapshot).await
    }

    /// Takes a snapshot from the users, then from the disk if none older needs it.
    pub(crate) async fn retire(&self, io: &S, snapshot: &Snapshot<S>) -> Result<(), Error> {
        // Readers look at the state after each read: told first, before anything stops preserving.
        let before = snapshot.state();
        snapshot.set_state(SnapshotState::Deleted);
        if let Err(error) = snapshot.write_head(io).await {
            snapshot.set_state(before);
            return Err(error);
        }
        self.collect(io).await
    }

    /// Removes deleted snapshots that none older needs: those without an older one that can be read.
    pub(crate) async fn collect(&self, io: &S) -> Result<(), Error> {
        let list = self.chain.now();
        let is_deleted = |one: &Snapshot<S>| one.state() == SnapshotState::Deleted;
        // Nobody reads through a broken one, so nothing newer is needed for its sake.
        let unread = list.iter().take_while(|one| is_deleted(one) || one.broken().is_some());
        // The oldest first: a record of it that nobody published may name a slot of a newer one, which is not given
        // back while the record's file is there.
        for snapshot in unread.filter(|one| is_deleted(one)) {
            self.drop_snapshot(io, snapshot).await?;
        }
        Ok(())
    }

    /// Takes a snapshot out of the chain whose content nobody needs, or that was merged.
    async fn drop_snapshot(&self, io: &S, snapshot: &Arc<Snapshot<S>>) -> Result<(), Error> {
        let list = self.chain.now();
        let older = list.iter().rev().find(|one| one.sequence < snapshot.sequence).cloned();
        let newer = list.iter().find(|one| one.sequence > snapshot.sequence);
        if let Some(older) = &older {
            // First: an older one that names one that is not there is taken to have lost it.
            older.set_newer(io, newer.map_or(0, |newer| newer.sequence)).await?;
        }
        // One whose file is still there stays, so that its number is not given again.
        Snapshot::<S>::remove_file(io, &self.dir, snapshot.sequence)?;
        let newest = self.watch.newest();
        if newest.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, snapshot)) {
            self.watch.set_newest(None);
        }
        self.chain.remove(snapshot.sequence);
        snapshot.end_preserving();
        self.holds.retry();
        self.leaving().push(snapshot.clone());
        self.empty_leaving();
        Ok(())
    }

    /// Puts the slots of those aside that have left the chain, once nobody preserves into them.
    fn empty_leaving(&self) {
        let all = self.leaving().clone();
        let done: Vec<_> = all.iter().filter(|one| self.empty(one)).collect();
        self.leaving().retain(|one| !done.iter().any(|done| Arc::ptr_eq(done, one)));
    }

    /// Puts the slots of a snapshot aside that nobody reads any more; `false` if someone still
    /// preserves into it.
    ///
    /// A slot that passed to another snapshot stays: whoever has it last gives it back.
    fn empty(&self, snapshot: &Snapshot<S>) -> bool {
        if snapshot.is_preserving() {
            return false;
        }
        let _deciding = self.deciding();
        if snapshot.emptied.swap(true, SeqCst) {
            return true;
        }
        let (sharers, rewind) = (self.sharers(snapshot), self.rewind.load_full());
        let mut slots = Vec::new();
        snapshot.for_each(|key, slot| {
            if let Slot::At(number) = slot
                && !sharers.iter().any(|one| one.get(key) == Some(slot))
                && !rewind.as_ref().is_some_and(|rewind| rewind.holds(key, slot))
            {
                slots.push(number);
            }
        });
        self.store.discard(slots);
        true
    }

    /// Who may have slots of `snapshot`: the older neighbour, into which it was merged in part or
    /// wholly, and deleted ones, which are being merged.
    pub(crate) fn sharers(&self, snapshot: &Snapshot<S>) -> Vec<Arc<Snapshot<S>>> {
        let list = self.chain.now();
        let older = list.iter().rev().find(|one| one.sequence < snapshot.sequence);
        let is_older = |one: &Arc<Snapshot<S>>| older.is_some_and(|older| Arc::ptr_eq(older, one));
        let merging = |one: &&Arc<Snapshot<S>>| is_older(one) || one.state() == SnapshotState::Deleted;
        let leaving = self.leaving();
        let all = list.iter().filter(merging).chain(leaving.iter());
        let others = all.filter(|one| one.sequence != snapshot.sequence && !one.emptied.load(SeqCst));
        others.cloned().collect()
    }

    /// Ends a rewind that is complete, and puts its slots aside, but those that a snapshot has too.
    pub(crate) fn end_rewind(&self, rewind: &Rewind<S>) {
        // One decision: a release that goes on sees the rewind, or what it has left.
        let _deciding = self.deciding();
        self.rewind.store(None);
        let (list, leaving) = (self.chain.now(), self.leaving());
        let holders: Vec<_> =
            list.iter().chain(leaving.iter()).filter(|one| !one.emptied.load(SeqCst)).collect();
        let mut slots = Vec::new();
        rewind.for_each_slot(|key, slot| {
            if !holders.iter().any(|one| one.get(key) == Some(Slot::At(slot))) {
                slots.push(slot);
            }
        });
        self.store.discard(slots);
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<Arc<Snapshot<S>>>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a bounded part of the work that deletions, breaks and rewinds left; whether there is more.
    ///
    /// To be called until there is none, now and then and after each deletion.
    ///
    /// # Errors
    /// Those of the files; it may be tried again.
    pub async fn maintain(&self, _admin: &mut Admin, io: &S) -> Result<bool, Error> {
        // What fails here does not keep space from those who wait for it.
        let undone = self.undo_unconfirmed(io).await;
        let collected = self.collect(io).await;
        self.empty_leaving();
        self.empty_broken();
        self.appender.bury(&self.store);
        let merged = self.merge(io).await;
        let merging = *merged.as_ref().unwrap_or(&false);
        let rewinding = self.go_on_rewinding(io).await;
        let (freed, sweeping) = self.store.sweep(io, SWEEP).await;
        if freed || !merging && !sweeping {
            // There is space, or there may be: nobody says when a file system has some again.
            self.store.forgive();
            self.holds.retry();
        }
        undone.and(collected).and(merged)?;
        Ok(merging || rewinding || sweeping)
    }

    /// Retires what a creation has left that failed and could not be undone: nobody sees it, and yet changes
    /// preserve into it. None is under way, for it needs the same [`Admin`].
    async fn undo_unconfirmed(&self, io: &S) -> Result<(), Error> {
        let list = self.chain.now();
        for snapshot in list.iter().filter(|one| one.state() == SnapshotState::Prepared) {
            self.retire(io, snapshot).await?;
        }
        Ok(())
    }

    /// Puts the slots of broken snapshots aside: whoever reads them is answered with an error.
    fn empty_broken(&self) {
        for snapshot in self.chain.now().iter().filter(|one| one.broken().is_some()) {
            self.empty(snapshot);
        }
    }

    /// Merges some records of the oldest deleted snapshot into its neighbour.
    async fn merge(&self, io: &S) -> Result<bool, Error> {
        let list = self.chain.now();
        let found = list.windows(2).find(|pair| {
            pair[1].state() == SnapshotState::Deleted
                && pair[1].broken().is_none()
                && pair[0].broken().is_none()
        });
        let Some([older, snapshot]) = found else { return Ok(false) };
        let is_newest = list.last().is_some_and(|last| Arc::ptr_eq(last, snapshot));
        let result = match is_newest {
            true => self.merge_newest(io, older, snapshot).await,
            false => self.merge_settled(io, older, snapshot).await,
        };
        match result {
            // What it should take over is lost to it, and to those who look through it.
            Err(error) if error.is_damage() => {
                self.break_snapshot(io, older, &error).await;
                Ok(true)
            }
            result => result.map(|()| true),
        }
    }

    /// Merges some of one into which nobody preserves any more, or drops it once there is no more.
    async fn merge_settled(
        &self,
        io: &S,
        older: &Arc<Snapshot<S>>,
        snapshot: &Arc<Snapshot<S>>,
    ) -> Result<(), Error> {
        snapshot.settled.store(snapshot.records(), SeqCst);
        if self.merge_some(io, older, snapshot).await? {
            return Ok(());
        }
        self.drop_snapshot(io, snapshot).await
    }

    /// Merges some of the newest, into which guests go on to preserve. The last part is merged while
    /// nobody does, and its neighbour put in its place.
    async fn merge_newest(
        &self,
        io: &S,
        older: &Arc<Snapshot<S>>,
        snapshot: &Arc<Snapshot<S>>,
    ) -> Result<(), Error> {
        if self.merge_some(io, older, snapshot).await? {
            return Ok(());
        }
        let Some(closed) = self.gate.close_within(io, PATIENCE).await else { return Ok(()) };
        // Every record that was begun is written: nobody is inside.
        let left = snapshot.records() - snapshot.settled.swap(snapshot.records(), SeqCst);
        if left > self.merge_step {
            return Ok(());
        }
        self.merge_some(io, older, snapshot).await?;
        self.watch.set_newest(Some(older.clone()));
        drop(closed);
        self.drop_snapshot(io, snapshot).await
    }

    /// Merges the next settled records of `snapshot` into `older`; `false` if there was none.
    async fn merge_some(&self, io: &S, older: &Snapshot<S>, snapshot: &Snapshot<S>) -> Result<bool, Error> {
        let from = snapshot.merged.load(SeqCst);
        let count = (snapshot.settled.load(SeqCst) - from).min(self.merge_step);
        if count == 0 {
            return Ok(false);
        }
        // Places whose writers failed may lie past the end of the file.
        let places = snapshot.places(io)?;
        if u64::from(self.control.records(snapshot.sequence)) > places {
            return Err(Error::Corrupt { what: "the end of a snapshot's index", at: places });
        }
        let there = places.saturating_sub(from).min(count);
        let records = snapshot.read_records(io, from, there).await?;
        let mut entries: Vec<(Key, Slot)> = Vec::new();
        for record in records.into_iter().flatten() {
            match record {
                // Only what was published: the slot of a record whose writer failed may be another's by
                // now. And nothing that was released in the older one, nor what is past its end: it is nothing to
                // it, nor to any before it.
                Entry::Kept(key, slot)
                    if snapshot.get(key) == Some(slot) && !older.has(key) && older.reaches(key) =>
                {
                    entries.push((key, slot));
                }
                Entry::Kept(..) => {}
                // Nobody looks through one that releases. Who does all the same has lost what it needs.
                Entry::Released(_) => {
                    return Err(Error::Corrupt { what: "a deleted snapshot's index", at: from });
                }
            }
        }
        entries.sort_unstable_by_key(|(key, _)| *key);
        entries.dedup_by_key(|(key, _)| *key);
        if !entries.is_empty() {
            older.record(io, &self.control, &entries).await?;
            // What is released from now on finds them published; what was released before is passed over.
            let _deciding = self.deciding();
            older.adopt(older.publish(&entries));
        }
        snapshot.merged.store(from + count, SeqCst);
        Ok(true)
    }
}
