//! A disk that grows while it is served.
//!
//! ```text
//! the intent log is made longer      (durable; it has cold regions for what is to come)
//! the superblock says "growing to"   (durable: from now on a longer image is known to be our doing)
//! the image is made longer           (a block device has been, by its operator)
//! the map's file is made longer      (and mapped a second time: both mappings are of the same pages)
//! the block at the old end is marked (as a write's would be: its page is frozen for the newest snapshot first)
//! the new blocks are marked          (through the new mapping; no snapshot that is held looks at them)
//! image and map flushed
//! the new tracker takes over         (the disk's size is still the old one)
//! the superblock has the new size    (durable)
//! the size is told                   (to requests, the configuration space, snapshots)
//! ```
//!
//! A stop after the first line leaves a log of more than the disk has, which is as good: it says the same of
//! what the disk has. That its regions of the new blocks are cold is right: nobody changes these before the
//! size is told, and what is marked there is flushed before that. Were the log made longer later, a stop could
//! leave a disk of the new size with a log of the old one, which is not believed.
//!
//! A stop before the third line leaves an image of the old length: the next opening cuts the map's file and
//! forgets the resize. A stop after it, and before the superblock has the new size, leaves an image of the new
//! length: the next opening serves the old size for as long as it takes to do the same lines again, and then
//! the new one. Nobody was told of the new size, so nothing was written past the old one; what the first
//! attempt marked was marked in the epoch that is still current, for a snapshot needs the same [`Admin`]. A
//! stop after it leaves the new size.
//!
//! Were the image made longer before the first line, a stop would leave an image of a length that nobody
//! can explain, and the generation would end. Were the new size told before the superblock has it, a start
//! that cannot finish the resize (a full file system) would serve a guest less than it had been told. Were
//! the new blocks marked after that, they could be missing from the changes. Were the image not flushed
//! before the superblock has the new size, a stop of the host could leave it at its old length.
//!
//! The gate stays open: no request waits for a resize. A change that took the old tracker with it is within
//! the old size and marks the same pages of the same file. That a page was frozen and opened in the old
//! tracker may be unknown to the new one; then it is looked for again, found preserved, and opened. Which pages hold
//! marks is known to both at once: the bits are shared ([`crate::marked`]), for who asks the new one may come first.
//!
//! What the old size was stays so for snapshots: a view, its export and an overlay end where the disk ended at
//! the instant. What is past a snapshot's end is not preserved for it, and not merged into it. The grain at
//! the old end, if it is not a whole one, is preserved whole; what is past the end in it is never read.
//!
//! Invariant: whoever checked a range against an older size was right, as far as this module goes.
//! Absent: shrinking ([`crate::shrink`]).

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::{Release, SeqCst};

use cbt::{ByteRange, Cells, SECTOR_BYTES};

use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::MAP_FILE;
use crate::group::Admin;
use crate::open::{bytes_of, cells_of};
use crate::storage::Storage;
use crate::tracker::Tracker;

/// Bytes that a disk can have at most.
pub(crate) const MAX_BYTES: u64 = 1 << 56;

impl<S: Storage> Disk<S> {
    /// Makes the disk larger, while it is served. What is new reads as zeros and counts as changed.
    ///
    /// `size` is in bytes, a multiple of 512; the caller looks after logical blocks. The image becomes as long
    /// if it is a file, and has to be already if it is a block device. When this answers, the new size is
    /// durable and [`Disk::capacity`] tells it. The size that the disk has is nothing to do.
    ///
    /// # Errors
    /// [`Error::BadSize`], [`Error::Shrink`], [`Error::RewindActive`], [`Error::ImageLength`], [`Error::ResizeUnfinished`]; those of the
    /// files. After an error the disk has its old size; the same resize may be tried again, and is finished by
    /// the next start if it had come as far as the image.
    pub async fn resize(&self, _admin: &mut Admin, io: &S, size: u64) -> Result<(), Error> {
        let now = self.capacity();
        let disk = || self.name.clone();
        if !size.is_multiple_of(SECTOR_BYTES) || !(1..=MAX_BYTES).contains(&size) {
            return Err(Error::BadSize { disk: disk(), size, max: MAX_BYTES });
        }
        if size < now {
            return Err(Error::Shrink { disk: disk(), size, now });
        }
        if size == now {
            return Ok(());
        }
        self.check_unwound()?;
        self.grow(io, size).await
    }

    /// Finishes what a stop has left, before the disk is served. What cannot be finished stays begun.
    pub(crate) async fn finish_resize(&self, io: &S) {
        let Some(size) = self.growing_to() else { return };
        if self.check_unwound().is_err() {
            // A rewind is of the old size. Once it is complete, the next start goes on.
            return;
        }
        match self.grow(io, size).await {
            Ok(()) => log::info!("{}: finished a resize to {size} bytes", self.name),
            Err(error) => log::warn!(
                "{}: a resize to {size} bytes is not finished: {}",
                self.name,
                with_sources(&error)
            ),
        }
    }

    /// The order of effects; see the module.
    pub(crate) async fn grow(&self, io: &S, size: u64) -> Result<(), Error> {
        if self.poisoned.load(SeqCst) {
            return Err(Error::Poisoned);
        }
        let old = self.capacity();
        let image_len = io.len(&self.image).map_err(Error::io("asking for the image's length"))?;
        if let Some(begun) = self.growing_to().filter(|&begun| begun == image_len && begun != size) {
            return Err(Error::ResizeUnfinished { disk: self.name.clone(), size: begun });
        }
        let refused = || Error::ImageLength { disk: self.name.clone(), size, image_len };
        if image_len != old && image_len != size {
            return Err(refused());
        }
        self.grow_log(io, size).await?;
        self.write_superblock(io, |superblock| superblock.growing_to = Some(size)).await?;
        // The image's time of change is of our doing from here on, also if somebody else made the image longer.
        let pass = self.gate.enter(self.lane()).await;
        self.control.stir();
        let lengthened = self.lengthen(io, image_len, size).await;
        drop(pass);
        let tracker = match lengthened {
            Ok(tracker) => tracker,
            Err(error) => {
                self.give_up(io, image_len).await;
                let is_device = matches!(&error, Error::Io { source, .. }
                    if source.kind() == std::io::ErrorKind::Unsupported);
                return Err(if is_device { refused() } else { error });
            }
        };
        let at_the_end = ByteRange::new(old - 1, old);
        if let Some(tracker) = &tracker {
            if !old.is_multiple_of(tracker.grid().bytes()) && !self.is_switched_off() {
                self.mark_changed(io, self.lane(), &[at_the_end]).await?;
            }
            tracker.mark(ByteRange::new(old, size), self.history.epoch());
        }
        self.flush(io).await?;
        if let Some(tracker) = tracker {
            self.sync_map(io, tracker.cells()).await?;
            self.watch.set_tracker(tracker);
        }
        self.write_superblock(io, |superblock| {
            superblock.capacity = size;
            superblock.identity.len = size;
            superblock.growing_to = None;
        })
        .await?;
        self.capacity.store(size, Release);
        Ok(())
    }

    /// Makes the intent log one of the new size. One that cannot have as many regions is given up; the next
    /// start makes one with larger regions.
    async fn grow_log(&self, io: &S, size: u64) -> Result<(), Error> {
        let Some(intent) = &self.intent else { return Ok(()) };
        match intent.grow(io, size).await {
            Err(error @ Error::LogTooLong { .. }) => {
                self.give_up_log(io, intent, &with_sources(&error)).await;
                Ok(())
            }
            result => result,
        }
    }

    /// Makes the image and the map's file as long as the new size needs; the tracker for it.
    async fn lengthen(&self, io: &S, image_len: u64, size: u64) -> Result<Option<Tracker<S::Cells>>, Error> {
        if image_len < size {
            io.set_len(&self.image, size).map_err(Error::io("making the image longer"))?;
        }
        let Some(tracker) = self.watch.tracker() else { return Ok(None) };
        let fail = || Error::io("making the change map longer");
        // Never less than was mapped before: a map that was longer, for a disk that was larger, may be in use.
        let mapped = tracker.cells().cells().len();
        let cells = cells_of::<S::Cells>(Some(tracker.grid()), size).max(mapped);
        let file = io.open(&self.dir, MAP_FILE).map_err(fail())?;
        io.allocate(&file, bytes_of(cells)).map_err(fail())?;
        let mapped = io.map(&file, cells).map_err(fail())?;
        Ok(Some(tracker.grown(Arc::new(mapped), size)))
    }

    /// Takes back what was made longer; what cannot be taken back stays begun, which is harmless.
    async fn give_up(&self, io: &S, image_len: u64) {
        let taken_back = async {
            let fail = || Error::io("taking back a resize");
            if io.len(&self.image).map_err(fail())? != image_len {
                let _pass = self.gate.enter(self.lane()).await;
                self.control.stir();
                io.set_len(&self.image, image_len).map_err(fail())?;
            }
            // Also while tracking is switched off.
            let grid = self.tracker_grid();
            // An earlier attempt may have come further, and its tracker is in use.
            let mapped = self.map_cells().cells().len();
            if cells_of::<S::Cells>(grid, self.capacity()) == mapped {
                let file = io.open(&self.dir, MAP_FILE).map_err(fail())?;
                io.set_len(&file, bytes_of(mapped)).map_err(fail())?;
            }
            if image_len == self.capacity() {
                // A power cut could bring the other length back, which nobody could explain then.
                self.flush(io).await?;
                self.write_superblock(io, |superblock| superblock.growing_to = None).await?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = taken_back.await {
            log::warn!("{}: {}", self.name, with_sources(&error));
        }
    }

    /// The size that a resize has begun to give the disk.
    pub(crate) fn growing_to(&self) -> Option<u64> {
        self.superblock.lock().unwrap_or_else(PoisonError::into_inner).growing_to
    }

    /// The mapping of the whole map file.
    pub(crate) fn map_cells(&self) -> Arc<S::Cells> {
        match self.watch.tracker() {
            Some(tracker) => tracker.cells().clone(),
            None => self.control.cells().clone(),
        }
    }
}
