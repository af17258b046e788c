//! A rewind's beginning, its background work and its end.
//!
//! Invariant: a command that was answered with an error had no effect, and will have none: guests go on to
//! write to the disk as it was.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::done::{self, Done};
use super::head::{self, Head, State};
use super::plan::Plan;
use super::{NO_REWIND, Rewind, RewindInfo, remove_files};
use crate::chain;
use crate::claims::Claims;
use crate::disk::{Disk, Event, with_sources};
use crate::error::Error;
use crate::group::Admin;
use crate::snapshot::Snapshot;
use crate::storage::Storage;

impl<S: Storage> Disk<S> {
    /// Makes the disk what snapshot `name` shows: at once for readers, on the image in the background, by
    /// [`Disk::maintain`]. The snapshot and all others stay as they are. What differs counts as changed.
    ///
    /// Whoever writes to the disk meanwhile waits. That they know of a rewind is for the caller to
    /// see to: a guest that runs has content in its memory which no longer fits.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], [`Error::SnapshotBroken`], [`Error::SnapshotReleased`], [`Error::CapacityDiffers`],
    /// [`Error::RewindActive`]; [`Error::Poisoned`]; [`Error::GateTimeout`] if writes in flight did not end within
    /// `deadline`; those of the files. After an error the disk is as it was.
    pub async fn revert(
        &self,
        _admin: &mut Admin,
        io: &S,
        name: &str,
        deadline: Duration,
    ) -> Result<RewindInfo, Error> {
        let target = self.snapshot(name)?;
        self.check_unwound()?;
        if target.capacity() != self.capacity() {
            return Err(Error::CapacityDiffers {
                disk: self.name.clone(),
                snapshot: name.to_owned(),
                then: target.capacity(),
                now: self.capacity(),
            });
        }
        check_readable(&target)?;
        let _whole = self.overlays.hold_whole(&target)?;
        self.check_poisoned()?;
        self.settle_void(io).await?;
        remove_files(io, &self.dir)?;
        // Most of what is to be durable becomes so before the gate is closed.
        self.sync_store(io).await;
        let Some(closed) = self.gate.close_within(io, deadline).await else {
            return Err(Error::GateTimeout { disk: self.name.clone(), seconds: deadline.as_secs() });
        };
        let plan = self.plan(&target)?;
        if plan.grains() == 0 {
            drop(closed);
            return Ok(self.announce_nothing(name));
        }
        let rewind = match self.prepare_rewind(io, &target, plan).await {
            Ok(rewind) => rewind,
            Err(error) => {
                self.discard_files(io);
                return Err(error);
            }
        };
        self.enforce(io, &rewind).await?;
        let info = rewind.info();
        self.rewind.store(Some(Arc::new(rewind)));
        drop(closed);
        (self.events)(Event::RewindStarted {
            disk: self.name.clone(),
            snapshot: info.snapshot.clone(),
            bytes: info.bytes,
        });
        Ok(info)
    }

    /// Refuses what cannot be done while a rewind is under way, or once the disk was handed over.
    pub(crate) fn check_unwound(&self) -> Result<(), Error> {
        self.check_kept()?;
        match &*self.rewind.load() {
            Some(rewind) => {
                Err(Error::RewindActive { disk: self.name.clone(), snapshot: rewind.snapshot().to_owned() })
            }
            None => Ok(()),
        }
    }

    /// Everything that the snapshot finds in the chain. The gate is closed.
    fn plan(&self, target: &Snapshot<S>) -> Result<Plan, Error> {
        let list = self.chain.now();
        let mut entries = Vec::new();
        for (rank, one) in (0..).zip(chain::from(&list, target)?) {
            check_readable(one)?;
            one.for_each(|key, slot| {
                if let Some(grain) = key.as_grain() {
                    entries.push((grain, rank, slot));
                }
            });
        }
        Ok(Plan::of_entries(entries))
    }

    /// There was nothing to bring back.
    fn announce_nothing(&self, snapshot: &str) -> RewindInfo {
        let (disk, snapshot) = (self.name.clone(), snapshot.to_owned());
        (self.events)(Event::RewindStarted { disk: disk.clone(), snapshot: snapshot.clone(), bytes: 0 });
        (self.events)(Event::RewindCompleted { disk, snapshot: snapshot.clone() });
        RewindInfo { snapshot, bytes: 0, bytes_left: 0, trouble: None }
    }

    /// Makes everything durable that the rewind needs.
    async fn prepare_rewind(&self, io: &S, target: &Snapshot<S>, plan: Plan) -> Result<Rewind<S>, Error> {
        let lane = self.lane();
        let fail = || Error::io("making the files of a rewind");
        let file = io.create(&self.dir, head::HEAD_FILE).map_err(fail())?;
        let synced = io.create(&self.dir, head::SYNCED_FILE).map_err(fail())?;
        let cells_file = io.create(&self.dir, head::DONE_FILE).map_err(fail())?;
        let count = done::cells_needed(plan.grains());
        let bytes = (count * size_of::<u32>()) as u64;
        // Allocated to its end: a store into a hole of a full file system would end the process.
        io.allocate(&cells_file, bytes).map_err(fail())?;
        io.allocate(&synced, bytes).map_err(fail())?;
        let cells = io.map(&cells_file, count).map_err(fail())?;
        io.sync(&synced).await.map_err(fail())?;
        let runs_checksum = head::write_runs(io, &file, &plan).await?;
        let head = Head {
            state: State::Prepared,
            disk: self.id,
            id: uuid::Uuid::new_v4().into_bytes(),
            capacity: self.capacity(),
            name: target.name().to_owned(),
            runs: plan.runs().len() as u64,
            runs_checksum,
        };
        head.write(io, &file).await?;
        io.sync_dir(&self.dir).map_err(fail())?;
        self.sync_store(io).await;
        // What the slots held may have been lost, which breaks it.
        check_readable(target)?;
        let grains = plan.grains();
        Ok(Rewind::of_parts(head, file, plan, Done::new(cells, synced, grains), lane))
    }

    /// Makes the rewind hold over any stop, or undoes it.
    async fn enforce(&self, io: &S, rewind: &Rewind<S>) -> Result<(), Error> {
        let id = rewind.id();
        let begun = async {
            self.write_superblock(io, |superblock| superblock.rewind = id).await?;
            rewind.write_state(io, State::UnderWay).await
        };
        let Err(error) = begun.await else { return Ok(()) };
        // It may be on the medium all the same, and would take back at the next start what guests write now.
        match self.write_superblock(io, |superblock| superblock.rewind = NO_REWIND).await {
            Ok(()) => {
                let _ = rewind.write_state(io, State::Prepared).await;
                self.discard_files(io);
            }
            Err(second) => {
                self.control.note_rewind_void(true);
                let why = format!(
                    "after a stop of the host the disk may be snapshot '{}': a rewind could not be undone: {}",
                    rewind.snapshot(),
                    with_sources(&second)
                );
                self.poison(io, &why).await;
            }
        }
        Err(error)
    }

    /// Takes back, on the medium too, what an earlier rewind that failed may have left in the superblock.
    async fn settle_void(&self, io: &S) -> Result<(), Error> {
        if self.control.rewind_void() {
            self.write_superblock(io, |superblock| superblock.rewind = NO_REWIND).await?;
            self.control.note_rewind_void(false);
        }
        Ok(())
    }

    /// Does a bounded part of what a rewind leaves to be done; whether there is more.
    ///
    /// A failure is told by [`Disk::rewind`] and an event, and tried again.
    pub(crate) async fn go_on_rewinding(&self, io: &S) -> bool {
        let Some(rewind) = self.rewind.load_full() else {
            if let Err(error) = self.settle_void(io).await {
                log::warn!("{}: {}", self.name, with_sources(&error));
            }
            return false;
        };
        let result = match rewind.next() {
            Some(grains) => {
                let _pass = self.gate.enter(rewind.lane).await;
                // Whoever is to wait for space is a guest: this is tried again.
                match self.before_change(io, rewind.lane, self.bytes_of(grains.clone()), None).await {
                    Ok(()) => self.copy_back(io, &rewind, grains).await.map(|()| true),
                    Err(stuck) => Err(stuck.into_error()),
                }
            }
            None => self.finish_rewind(io, &rewind).await.map(|()| false),
        };
        match result {
            Ok(more) => {
                rewind.clear_trouble();
                more
            }
            Err(error) => {
                self.note_trouble(&rewind, &error);
                false
            }
        }
    }

    /// Everything is back: the image alone is the disk again.
    async fn finish_rewind(&self, io: &S, rewind: &Arc<Rewind<S>>) -> Result<(), Error> {
        self.flush(io).await?;
        if self.control.flush_failed() {
            // What an earlier daemon copied back may be lost, though its bits are here.
            return Err(Error::Poisoned);
        }
        rewind.write_state(io, State::Finished).await?;
        self.write_superblock(io, |superblock| superblock.rewind = NO_REWIND).await?;
        self.end_rewind(rewind);
        self.discard_files(io);
        log::info!("{}: the rewind to snapshot '{}' is complete", self.name, rewind.snapshot());
        (self.events)(Event::RewindCompleted {
            disk: self.name.clone(),
            snapshot: rewind.snapshot().to_owned(),
        });
        Ok(())
    }

    /// Removes the files of a rewind that the superblock does not name. What stays belongs to nothing.
    fn discard_files(&self, io: &S) {
        let removed = remove_files(io, &self.dir);
        let synced =
            removed.and_then(|()| io.sync_dir(&self.dir).map_err(Error::io("removing a rewind's files")));
        if let Err(error) = synced {
            log::warn!("{}: {}", self.name, with_sources(&error));
        }
    }
}

impl<S: Storage> Rewind<S> {
    pub(super) fn of_parts(
        head: Head,
        file: S::File,
        plan: Plan,
        done: Done<S>,
        lane: crate::gate::Lane,
    ) -> Self {
        Self {
            head,
            file,
            plan,
            done,
            claims: Claims::default(),
            flushing: Claims::default(),
            lane,
            cursor: AtomicU64::new(0),
            trouble: std::sync::Mutex::default(),
        }
    }

    /// Writes its state, durably.
    async fn write_state(&self, io: &S, state: State) -> Result<(), Error> {
        Head { state, ..self.head.clone() }.write(io, &self.file).await
    }
}

/// Refuses a snapshot that lost something.
fn check_readable<S: Storage>(snapshot: &Snapshot<S>) -> Result<(), Error> {
    match snapshot.broken() {
        Some(reason) => {
            Err(Error::SnapshotBroken { name: snapshot.name().to_owned(), reason: reason.to_owned() })
        }
        None => Ok(()),
    }
}
