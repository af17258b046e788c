//! A disk's side of its intent log: who waits for it, and what becomes of it when it fails.
//!
//! Invariant: if the log or the map cannot be written, the superblock says so before any change goes on without
//! them; what was marked until then is not believed after a stop of the host. The same if the image cannot be
//! flushed, before that is answered: a later instant may hold what only the host's memory has, in a region
//! that is cold by then; once the host stops, the disk has changed without a mark.
//! Absent: the log ([`crate::intent`]).

use std::sync::PoisonError;
use std::sync::atomic::Ordering::SeqCst;

use cbt::ByteRange;

use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::DiskState;
use crate::intent::Intent;
use crate::storage::Storage;

impl<S: Storage> Disk<S> {
    /// Whether a stop of the host would lose nothing of what was just marked.
    pub(crate) fn is_covered(&self, range: ByteRange) -> bool {
        self.is_switched_off() || self.intent.as_ref().is_none_or(|intent| intent.covers(range))
    }

    /// Waits until a stop of the host would lose nothing of what was just marked.
    ///
    /// Cannot fail: what cannot be logged ends the history at the next stop of the host, not the guest's change.
    pub(crate) async fn cover(&self, io: &S, range: ByteRange) {
        if let Some(intent) = &self.intent
            && let Err(error) = intent.cover(io, range).await
        {
            self.give_up_log(io, intent, &with_sources(&error)).await;
        }
    }

    /// Lets every later flush of the image fail, and the history end when the host stops.
    ///
    /// The notes in the mapped control page come first and cannot fail: if the process ends now, the next one
    /// says the same before it takes an instant.
    pub(crate) async fn poison(&self, io: &S, reason: &str) {
        self.control.note_flush_failed(true);
        self.poisoned.store(true, SeqCst);
        log::error!("{}: no flush can be trusted any more: {reason}", self.name);
        if let Some(intent) = &self.intent {
            self.give_up_log(io, intent, reason).await;
        }
    }

    /// Goes on without the intent log, once it is known that it is not to be believed.
    pub(crate) async fn give_up_log(&self, io: &S, intent: &Intent<S>, why: &str) {
        // First, and without fail: a restart in this boot believes it neither.
        self.control.note_log_in_doubt(&self.boot(), true);
        let unlogged = self.write_superblock(io, |superblock| {
            // A disk that was handed over stays so: its generation goes on elsewhere.
            if superblock.state != DiskState::HandedOver {
                superblock.state = DiskState::Unlogged;
            }
        });
        let noted = unlogged.await;
        if intent.give_up() {
            return;
        }
        match noted {
            Ok(()) => {
                log::warn!("{}: if the host stops now, the next backup must be a full one: {why}", self.name)
            }
            Err(also) => {
                self.tracking_at_risk.store(true, SeqCst);
                log::error!(
                    "{}: if the host stops now, the next incremental backup misses changes: make a full one, or stop and start this daemon: {why}; {}",
                    self.name,
                    with_sources(&also)
                );
            }
        }
    }

    /// Whether neither the intent log nor the superblock could be written: a stop of the host now would lose
    /// marks that the next start believes to be there. It was said loudly.
    pub fn is_tracking_at_risk(&self) -> bool {
        self.tracking_at_risk.load(SeqCst)
    }

    /// Makes regions cold in which nothing was changed since this was called last: what a stop of the host
    /// would count as changed. To be called now and then. Blocks the thread.
    pub async fn cool(&self, io: &S) {
        let Some(intent) = &self.intent else { return };
        // The mapping of now: whoever marked in a region that was hot until now has marked in no later one.
        if let Err(error) = intent.cool(io, async || self.sync_map(io, &self.map_cells()).await).await {
            self.give_up_log(io, intent, &with_sources(&error)).await;
        }
    }

    /// Makes every mark durable that was made through `map` or an older mapping. Blocks the thread.
    pub(crate) async fn sync_map(&self, io: &S, map: &S::Cells) -> Result<(), Error> {
        // A failure is told once: nobody else's success is acted upon before it was noted.
        let _one = self.syncing_map.claim(0..1).await;
        let synced = io.sync_cells(map).map_err(Error::io("flushing the change map"));
        if let Err(error) = &synced {
            // Marks that could not be written back may be lost though a later flush succeeds.
            let (boot, name) = (self.boot(), &self.name);
            if !self.control.map_in_doubt(&boot) {
                log::error!(
                    "{name}: the next backup must be a full one, after 'tracker reset': {}",
                    with_sources(error)
                );
            }
            self.control.note_map_in_doubt(&boot);
            if let Some(intent) = &self.intent {
                self.give_up_log(io, intent, &with_sources(error)).await;
            }
        }
        synced
    }

    /// The host's boot in which the disk is served.
    pub(crate) fn boot(&self) -> [u8; 16] {
        self.superblock.lock().unwrap_or_else(PoisonError::into_inner).boot
    }
}
