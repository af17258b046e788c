//! Release as you read: a reader says that it is done with a range of a snapshot, whose space is given
//! back at once, and which is preserved no more.
//!
//! ```text
//! refuse while overlays stand on it    (and no overlay is opened on it any more, and no rewind begun to it)
//! claim the grains                     (nobody is preserving them)
//! write and count the record           (a stop: released, though nobody was told)
//! set the bits                         (readers are answered with an error, nobody preserves them)
//! put their slots aside                (a stop: no record that counts names them)
//! ```
//!
//! The record comes before the bits: were it the other way round, a guest's write could find a bit, pass
//! without preserving, and a stop leave no record; the next start would show the new content for the
//! old. The bits come before the slots: a reader that found a slot looks for the bits after it has read
//! ([`crate::View`]), so that what another has written there meanwhile is never shown. The record comes
//! before the slots, too: a slot that two records name would show the newer content for the older key.
//!
//! At the next start the record counts, wherever it is among the others: a key that it covers is in no
//! slot. A record that could not be written is nobody's loss: nothing is released then, or, if it reached
//! the file after all, what the reader had asked for.
//!
//! Under the claim no one else publishes the same keys but a merge, which takes over what a deleted
//! newer neighbour has. Bits are set, keys of a merge published, and slots put aside under one lock: a merge
//! passes over what is released, and of two that have a slot exactly one gives it back.
//!
//! Invariant: a snapshot through which an older one looks releases nothing. That stays so: none that is
//! older is ever added, and a broken one stays broken.
//! Absent: taking back. What was released is gone.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use cbt::ByteRange;

use crate::chain;
use crate::disk::Disk;
use crate::error::Error;
use crate::format::GRAIN;
use crate::index::{Key, Slot};
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::view::View;

/// Grains that are released under one claim: 256 MiB of the disk.
const PIECE: u64 = 1 << 16;

impl<S: Storage> View<S> {
    /// Releases the grains that lie in `range` as a whole: their space is given back, and they can never be
    /// read again. Whether it had an effect: it has none while an older snapshot looks through this one, or
    /// while the disk is rewound.
    ///
    /// The end of the view counts as the end of a grain. What changed since older snapshots can still be
    /// asked. It holds over a stop of the process when this answers.
    ///
    /// # Errors
    /// [`Error::SnapshotInUse`] while overlays stand on the snapshot; [`Error::SnapshotBroken`] or
    /// [`Error::SnapshotDeleted`]; those of the index. A part may have been released then.
    ///
    /// # Panics
    /// If `range` passes the end of the view.
    pub async fn release(&self, io: &S, range: ByteRange) -> Result<bool, Error> {
        assert!(range.end() <= self.capacity(), "a view is released within its size");
        self.check()?;
        let (disk, snapshot) = (self.disk(), self.snapshot());
        if !disk.is_oldest(snapshot)? {
            return Ok(false);
        }
        let grains = self.whole_grains(range);
        if grains.is_empty() {
            return Ok(true);
        }
        // What a rewind has listed stays where it is.
        if !disk.overlays.begin_release(snapshot, || disk.rewind.load().is_some())? {
            return Ok(false);
        }
        let mut at = grains.start;
        while at < grains.end {
            let piece = at..grains.end.min((at / PIECE + 1) * PIECE);
            match disk.release_some(io, snapshot, piece).await? {
                Some(end) => at = end,
                // Whoever ends preserving into it has told so first.
                None => break,
            }
        }
        self.check()?;
        Ok(true)
    }

    fn whole_grains(&self, range: ByteRange) -> Range<u64> {
        let grain = GRAIN as u64;
        let end =
            if range.end() == self.capacity() { range.end().div_ceil(grain) } else { range.end() / grain };
        let start = range.start().div_ceil(grain);
        start..end.max(start)
    }
}

impl<S: Storage> Disk<S> {
    /// Whether nobody looks through `snapshot`.
    fn is_oldest(&self, snapshot: &Snapshot<S>) -> Result<bool, Error> {
        let list = self.chain.now();
        let older = list.len() - chain::from(&list, snapshot)?.len();
        // Deleted ones count: until they have left the chain, a deletion may still fail.
        Ok(list[..older].iter().all(|one| one.broken().is_some()))
    }

    /// Releases the first of `grains` that are free to be claimed; where that ends, or `None` if the snapshot
    /// is broken or deleted.
    async fn release_some(
        &self,
        io: &S,
        snapshot: &Arc<Snapshot<S>>,
        grains: Range<u64>,
    ) -> Result<Option<u64>, Error> {
        // Its slots are not put aside as a whole beside us.
        let Some(_preserving) = snapshot.begin_preserving() else { return Ok(None) };
        let claim = snapshot.claims.claim(grains).await;
        let end = claim.run().end;
        // Whoever releases again writes no records for it.
        let runs = snapshot.released.missing(claim.run());
        if runs.is_empty() {
            return Ok(Some(end));
        }
        snapshot.record_released(io, &self.control, &runs).await?;
        let _deciding = self.deciding();
        for run in &runs {
            snapshot.released.set(run.clone());
        }
        drop(claim);
        self.put_released_aside(snapshot, runs);
        Ok(Some(end))
    }

    /// Puts the slots aside that are of released grains alone. The caller decides.
    fn put_released_aside(&self, snapshot: &Snapshot<S>, runs: Vec<Range<u64>>) {
        let (sharers, rewind) = (self.sharers(snapshot), self.rewind.load_full());
        let mut slots = Vec::new();
        for key in runs.into_iter().flatten().map(Key::grain) {
            let Some(Slot::At(number)) = snapshot.take_released(key) else { continue };
            // Whoever has it too gives it back at its end.
            let slot = Slot::At(number);
            if !sharers.iter().any(|one| one.get(key) == Some(slot))
                && !rewind.as_ref().is_some_and(|rewind| rewind.holds(key, slot))
            {
                slots.push(number);
            }
        }
        self.store.discard(slots);
    }

    /// The right to decide which slots nobody needs. Held for some milliseconds at most, by nobody who
    /// serves a guest.
    pub(crate) fn deciding(&self) -> MutexGuard<'_, ()> {
        self.deciding.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
