//! A disk that becomes smaller while it is served: what is past the new end is lost, and the operator said so.
//!
//! It is a resize of a smaller disk that is taken back ([`crate::resize`]): from the second line on the superblock says
//! *the disk has the new size, and has begun to become as large as it was*.
//!
//! ```text
//! the gate is closed                   (no change is in flight; later ones are checked again inside the gate)
//! the superblock has the new size      (durable; and "growing to" the old one)
//! the image is cut
//! the size is told                     (to requests, the configuration space)
//! the gate is opened
//! the image is flushed
//! the superblock forgets the old size  (durable)
//! ```
//!
//! A stop before the third line leaves an image of the old length, with all that was in it: the next opening
//! finishes the resize, and the disk has its old size. All that is past the new end counts as changed then, which is
//! too much and not too little. A stop after it leaves an image of the new length: the next opening forgets the
//! resize. After a power cut before the image is flushed it may have either length, and either is known.
//!
//! Were the image cut before the second line, a stop would leave an image of a length that nobody can explain, and
//! the generation would end. Were the old size forgotten before the image is flushed, a power cut could bring the
//! old length back, with the same end; so an opening that forgets it flushes the image first, too. Were the gate
//! open, a change past the new end could make the image longer again after it was cut, and mark what the disk has
//! not.
//!
//! If the image cannot be cut, the superblock has the old size again before the gate opens. If that fails too, the
//! disk is served with its old size all the same; a stop goes on as above, and the next superblock that is written says
//! the old size, so that nothing that is made meanwhile is larger than the disk that an opening finds.
//!
//! Snapshots are refused: they would end where the image does not reach any more, and preserve of it what is not
//! there. So there are no overlays, and no view. Checkpoints stay: as the older end only their epoch counts, as the
//! younger one only their own runs, so what is answered between two of them stays the same, past the new end too.
//! Change ids go on: who asks since one is answered for the disk's size of now.
//!
//! The change map and the intent log stay as long as they were until the next opening, which cuts the map: a query
//! may be reading it. What they say past the end is not looked at. A disk that grows again counts everything
//! past its end as changed, in the epoch of that, whatever the map said there.
//!
//! Requests that were parsed before, and reads, which do not pass the gate: what is past the end fails with
//! [`Error::PastEnd`], or as the image says if it was cut meanwhile.
//!
//! A block device is refused. It cannot be cut, and a served size of less than the device would have to be known
//! at every start, whatever its operator did to the device in between.
//!
//! Price: guests' changes wait for a flush of one page.
//! Absent: growing.

use std::io::ErrorKind;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Release;
use std::time::Duration;

use cbt::SECTOR_BYTES;

use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::Superblock;
use crate::group::Admin;
use crate::resize::MAX_BYTES;
use crate::storage::Storage;

impl<S: Storage> Disk<S> {
    /// Gives the disk another size, also a smaller one: what is past it is lost. See [`Disk::resize`].
    ///
    /// Asked again for the size that it has, it finishes what an error left.
    ///
    /// # Errors
    /// As of [`Disk::resize`]; [`Error::SnapshotsHeld`], [`Error::ShrinkDevice`]; [`Error::GateTimeout`] if changes
    /// in flight did not end within `deadline`. After an error [`Disk::capacity`] tells which size the disk has: the
    /// new one, if it failed after the image was cut.
    pub async fn shrink(
        &self,
        admin: &mut Admin,
        io: &S,
        size: u64,
        deadline: Duration,
    ) -> Result<(), Error> {
        let old = self.capacity();
        if size > old {
            return self.resize(admin, io, size).await;
        }
        if !size.is_multiple_of(SECTOR_BYTES) || size == 0 {
            return Err(Error::BadSize { disk: self.name.clone(), size, max: MAX_BYTES });
        }
        self.check_unwound()?;
        self.check_poisoned()?;
        let image_len = io.len(&self.image).map_err(Error::io("asking for the image's length"))?;
        if size == old {
            let is_left = self.growing_to().is_some() && image_len == size;
            return if is_left { self.forget_old_size(io, size).await } else { Ok(()) };
        }
        self.check_nothing_held()?;
        if let Some(size) = self.growing_to().filter(|&begun| begun == image_len) {
            return Err(Error::ResizeUnfinished { disk: self.name.clone(), size });
        }
        if image_len != old {
            return Err(Error::ImageLength { disk: self.name.clone(), size, image_len });
        }
        self.cut(io, old, size, deadline).await?;
        self.forget_old_size(io, size).await
    }

    /// Behind a closed gate: the disk is smaller, or as it was.
    async fn cut(&self, io: &S, old: u64, size: u64, deadline: Duration) -> Result<(), Error> {
        let Some(closed) = self.gate.close_within(io, deadline).await else {
            return Err(Error::GateTimeout { disk: self.name.clone(), seconds: deadline.as_secs() });
        };
        self.write_superblock(io, |superblock| {
            superblock.capacity = size;
            superblock.growing_to = Some(old);
        })
        .await?;
        // Counted, so that nobody notes meanwhile that the image stays as it is.
        let pass = closed.pass(self.lane());
        self.control.stir();
        let result = io.set_len(&self.image, size);
        drop(pass);
        let Err(error) = result else {
            self.capacity.store(size, Release);
            return Ok(());
        };
        let take_back = |superblock: &mut Superblock| {
            superblock.capacity = old;
            superblock.growing_to = None;
        };
        if let Err(error) = self.write_superblock(io, take_back).await {
            // With the next one that is written, a snapshot's or the last, at the latest.
            take_back(&mut self.superblock.lock().unwrap_or_else(PoisonError::into_inner));
            log::warn!("{}: taking back a resize: {}", self.name, with_sources(&error));
        }
        match error.kind() {
            ErrorKind::Unsupported => Err(Error::ShrinkDevice { disk: self.name.clone() }),
            _ => Err(Error::Io { what: "making the image shorter", source: error }),
        }
    }

    async fn forget_old_size(&self, io: &S, size: u64) -> Result<(), Error> {
        self.flush(io).await?;
        self.write_superblock(io, |superblock| {
            superblock.identity.len = size;
            superblock.growing_to = None;
        })
        .await
    }

    /// Refuses while anything looks at what is past the new end: snapshots, and deleted ones that older ones need.
    fn check_nothing_held(&self) -> Result<(), Error> {
        let names: Vec<String> = self.chain.now().iter().map(|one| one.name.clone()).collect();
        match names.is_empty() {
            true => Ok(()),
            false => Err(Error::SnapshotsHeld { disk: self.name.clone(), snapshot: names.join("', '") }),
        }
    }
}
