//! A new generation while the disk is served: an operator's word that what is known of changes shall not be
//! relied on.
//!
//! ```text
//! the image is flushed               (so that the gate is closed for little)
//! the gate closes                    (changes in flight end; nobody marks)
//! the image is flushed               (what was changed before the beginning stays changed)
//! the superblock has the new generation, and the next epoch   (durable, one write)
//! generation and epoch in memory     (cannot fail)
//! the gate opens
//! the checkpoints' heads say why the old one ended
//! ```
//!
//! The superblock is replaced by one write of the copy that is not in use, so a stop leaves the old generation
//! or the new one. Both have the map that they need, for it is not touched: epochs go on counting. A mark of the
//! old generation has a lower epoch than any instant that the new one tells, so nothing of it is in an answer
//! since such an instant. The beginning of the new generation is the epoch before its first: changes since
//! then are those of the new generation, all of them, since the first of its epochs began behind the closed
//! gate. Only who asks for everything that was ever marked (epoch 0, which no instant has) gets the old marks
//! too: that is more than what changed, and never less. So no map is cleared under a valid generation, and
//! *resetting* is not needed. What a stop of the host would presume to be changed is marked in the epoch that
//! the superblock says, which is the new generation's.
//!
//! The epoch is in the same write as the generation: a start that found the new generation with the old epoch would
//! mark changes in an epoch that lies at or before the beginning that was told.
//!
//! If the write fails, the old generation goes on, though the medium may have the new one: a start that finds it there
//! serves it and tells its beginning, before which changes were made that are not on their medium. That start flushes the
//! image first ([`crate::open`]). The next write of the superblock goes over the same copy.
//!
//! A stop after the second line and before the last loses reasons only: that a checkpoint is of another
//! generation is seen from its own.
//!
//! Were the image not flushed before the beginning is on the medium, a stop of the host could take back a change of before, whose
//! mark is of the old generation and whose region may be cold: the disk would differ from what it was at the
//! beginning, without a mark. A flush after the write is too late, since a daemon that is killed between the two leaves a
//! beginning that the next one tells. If the flush fails, it is noted that a stop of the host ends the history.
//!
//! What made the log or the map doubtful stays so: a new generation does not make a failed flush good.
//!
//! Price: guests' changes wait for a flush of the image and of one page.
//! Absent: another size of blocks: the next start does that. Why tracking is switched on and off in this order: [`crate::switch`].

use std::sync::PoisonError;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use cbt::{ChangeId, Generation};

use crate::disk::{Disk, Event, now_ns};
use crate::error::Error;
use crate::group::Admin;
use crate::open::ResetReason;
use crate::status::Began;
use crate::storage::Storage;

impl<S: Storage> Disk<S> {
    /// Begins a new generation; its beginning as a change id. Change ids and checkpoints of the old one are good for
    /// nothing from then on, but for comparing two checkpoints of it.
    ///
    /// # Errors
    /// [`Error::NotTracked`], [`Error::SnapshotsHeld`], [`Error::RewindActive`], [`Error::ResizeUnfinished`],
    /// [`Error::HandedOver`], [`Error::EpochsExhausted`]; [`Error::GateTimeout`] if changes in flight did not end
    /// within `deadline`; those of the superblock. After an error the old generation goes on.
    pub async fn reset_tracking(
        &self,
        _admin: &mut Admin,
        io: &S,
        deadline: Duration,
    ) -> Result<ChangeId, Error> {
        self.check_resettable()?;
        self.begin_generation(io, deadline, ResetReason::Operator, false).await
    }

    /// Begins a new generation, in which changes are marked or, once `switched_off`, are not. What has to be
    /// looked at before was.
    pub(crate) async fn begin_generation(
        &self,
        io: &S,
        deadline: Duration,
        reason: ResetReason,
        switched_off: bool,
    ) -> Result<ChangeId, Error> {
        // Most of it now, so that guests wait for little.
        self.flush_before(io, switched_off).await?;
        let ended = self.history.generation();
        let began = self.history.epoch().max(self.superblock_now().epoch);
        let next = began.next().ok_or_else(|| Error::EpochsExhausted { disk: self.name.clone() })?;
        let generation = Generation::random();
        let Some(closed) = self.gate.close_within(io, deadline).await else {
            return Err(Error::GateTimeout { disk: self.name.clone(), seconds: deadline.as_secs() });
        };
        self.flush_before(io, switched_off).await?;
        let began = Began { code: reason.code(), at_ns: now_ns() };
        self.write_superblock(io, |superblock| {
            superblock.generation = generation;
            superblock.epoch = next;
            (superblock.began_reason, superblock.began_ns) = (reason.number(), began.at_ns);
            superblock.switched_off = switched_off;
        })
        .await?;
        self.switched_off.store(switched_off, SeqCst);
        self.history.begin_generation(generation, next);
        // Behind the gate: a flush that fails from here on is noted again.
        self.control.forget_map_in_doubt();
        drop(closed);
        *self.began.lock().unwrap_or_else(PoisonError::into_inner) = Some(began);
        self.checkpoints.end_generation(io, &self.dir, Some(ended), reason.code()).await;
        let change_id = self.change_id();
        log::warn!("{}: a new generation begins with {change_id}: {reason}", self.name);
        (self.events)(Event::TrackerReset { disk: self.name.clone(), change_id, reason });
        Ok(change_id)
    }

    /// Makes durable what was changed before a generation, if its beginning will be told.
    async fn flush_before(&self, io: &S, switched_off: bool) -> Result<(), Error> {
        if switched_off {
            return Ok(());
        }
        match self.flush(io).await {
            // It is noted that a stop of the host ends this generation too.
            Err(_) if !self.is_switched_off() => Ok(()),
            result => result,
        }
    }

    fn check_resettable(&self) -> Result<(), Error> {
        self.check_unwound()?;
        if self.block_grid().is_none() {
            return Err(Error::NotTracked { disk: self.name.clone() });
        }
        self.check_not_growing()?;
        match self.snapshots().first() {
            Some(snapshot) => {
                Err(Error::SnapshotsHeld { disk: self.name.clone(), snapshot: snapshot.name.clone() })
            }
            None => Ok(()),
        }
    }

    pub(crate) fn check_not_growing(&self) -> Result<(), Error> {
        match self.growing_to() {
            Some(size) => Err(Error::ResizeUnfinished { disk: self.name.clone(), size }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cbt::BlockGrid;

    use super::*;
    use crate::DiskOptions;
    use crate::host::{Executor, HostDir, HostFile, HostStorage, ImageOptions};

    /// What `ask` answers while a change is inside the gate, and after it.
    fn beside_a_change<T>(ask: impl AsyncFn(&Disk<HostStorage>, &HostStorage, &mut Admin) -> T) -> [T; 2] {
        let (executor, folder) = (Executor::new(16).unwrap(), tempfile::tempdir().unwrap());
        let path = folder.path().join("image");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        std::fs::create_dir(folder.path().join("state")).unwrap();
        let options = ImageOptions { read_only: false, direct: false, logical_block_bytes: 512 };
        let image = HostFile::open_image(&path, options).unwrap();
        let options = DiskOptions {
            name: "vda".into(),
            identity: image.identity().unwrap(),
            meanwhile: image.meanwhile().unwrap(),
            image,
            image_path: "/image".into(),
            dir: HostDir::new(folder.path().join("state")),
            tracking: Some(BlockGrid::new(4096).unwrap()),
            boot: [1; 16],
            events: Arc::new(|_| {}),
            merge_step: crate::MERGE_STEP,
            store: crate::StorePlan::default(),
            region_bytes: None,
        };
        executor.block_on(async {
            let io = executor.storage();
            let (disk, _) = Disk::open(&io, options).await.unwrap();
            let (mut admin, lane) = (Admin::new(), disk.lane());
            let inside = disk.gate.enter(lane).await;
            let during = ask(&disk, &io, &mut admin).await;
            drop(inside);
            [during, ask(&disk, &io, &mut admin).await]
        })
    }

    #[test]
    fn a_generation_begins_when_no_change_is_in_flight() {
        const BRIEFLY: Duration = Duration::from_millis(20);
        let answers = beside_a_change(async |disk, io, admin| {
            let before = disk.change_id().generation;
            let reset = disk.reset_tracking(admin, io, BRIEFLY).await;
            let off = disk.disable_tracking(admin, io, BRIEFLY).await;
            let on = disk.enable_tracking(admin, io, BRIEFLY).await;
            (reset, off, on, disk.change_id().generation == before)
        });
        let [(reset, off, on, same), (reset_after, off_after, on_after, same_after)] = answers;
        assert!(matches!(reset, Err(Error::GateTimeout { .. })), "{reset:?}");
        assert!(matches!(off, Err(Error::GateTimeout { .. })), "{off:?}");
        assert!(matches!(on, Err(Error::TrackingAlready { .. })), "{on:?}");
        assert!(same, "nothing was changed");
        assert!(reset_after.is_ok() && off_after.is_ok() && on_after.is_ok() && !same_after);
    }
}
