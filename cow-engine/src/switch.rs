//! Tracking is switched off and on while the disk is served.
//!
//! Both begin a new generation by the order of [`crate::reset`]; the superblock says in the same write whether changes
//! are marked in it, so the word outlives a restart and no generation is half of one kind.
//!
//! ```text
//! on only: the image is flushed      (so that the gate is closed for little)
//! the gate closes                    (changes in flight end)
//! on only: the image is flushed      (every change that was not marked is on its medium)
//! the superblock has the new generation, the next epoch, and whether changes are marked   (durable, one write)
//! the same in memory                 (cannot fail)
//! the gate opens
//! ```
//!
//! **Off.** Changes are neither marked nor logged from then on; the map keeps its place and size. A snapshot that is
//! held is of the generation that ended, so its changes are refused; its content is preserved as before. A stop
//! leaves the old generation, in which everything was marked, or the new one, of which nothing is ever told.
//!
//! **On.** A change passes the gate before it closes, and is then on its medium before the generation exists anywhere;
//! or after it opened, and is then marked in the generation. So nothing slips between. Were the image not flushed
//! behind the gate, a daemon that is killed after the write would leave a generation of which the next one tells
//! the beginning, and a stop of the host would take back changes that have no mark and whose regions are cold.
//! If the write fails, the medium may have the new generation while changes go on without marks. The
//! next daemon goes on with it, and flushes the image before it tells its beginning: what was changed without a mark
//! is on its medium then, and marks begin before that.
//!
//! Pages of the map are marked in the new generation without being frozen for snapshots of older ones. A reader of such a
//! snapshot looks for the generation after it copied a page, so it tells no page that was marked since.
//!
//! Price: for switching on, guests' changes wait for a flush of the image.
//! Absent: whether a disk has a map at all: the daemon's options say that.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use cbt::{BlockGrid, ChangeId};

use crate::disk::Disk;
use crate::error::Error;
use crate::group::Admin;
use crate::open::ResetReason;
use crate::storage::Storage;
use crate::tracker::Tracker;

impl<S: Storage> Disk<S> {
    /// Ends the history: changes are not tracked from then on, also after a restart.
    ///
    /// # Errors
    /// [`Error::NotTracked`] if the disk has no tracker, [`Error::TrackingAlready`], [`Error::RewindActive`], [`Error::ResizeUnfinished`],
    /// [`Error::EpochsExhausted`], [`Error::GateTimeout`]; those of the superblock. After an error tracking goes on.
    pub async fn disable_tracking(
        &self,
        _admin: &mut Admin,
        io: &S,
        deadline: Duration,
    ) -> Result<ChangeId, Error> {
        self.check_switchable(true)?;
        self.begin_generation(io, deadline, ResetReason::TrackingDisabled, true).await
    }

    /// Begins a history: every change from then on is tracked. Its beginning as a change id.
    ///
    /// # Errors
    /// As [`Disk::disable_tracking`], and those of a flush of the image. After an error tracking stays off.
    pub async fn enable_tracking(
        &self,
        _admin: &mut Admin,
        io: &S,
        deadline: Duration,
    ) -> Result<ChangeId, Error> {
        self.check_switchable(false)?;
        self.begin_generation(io, deadline, ResetReason::TrackingEnabled, false).await
    }

    fn check_switchable(&self, off: bool) -> Result<(), Error> {
        self.check_unwound()?;
        if self.watch.tracker().is_none() {
            return Err(Error::NotTracked { disk: self.name.clone() });
        }
        if self.is_switched_off() == off {
            let state = if off { "off" } else { "on" };
            return Err(Error::TrackingAlready { disk: self.name.clone(), state });
        }
        self.check_not_growing()
    }

    /// Whether an operator switched tracking off. Changes inside the gate see one value.
    pub fn is_switched_off(&self) -> bool {
        self.switched_off.load(Relaxed)
    }

    /// The grid of the disk's blocks, which are tracked unless that is switched off.
    pub fn tracker_grid(&self) -> Option<BlockGrid> {
        self.watch.tracker().map(|tracker| tracker.grid())
    }

    /// The tracker, if changes are marked now.
    pub(crate) fn marking(&self) -> Option<Arc<Tracker<S::Cells>>> {
        self.watch.tracker().filter(|_| !self.is_switched_off())
    }
}
