//! How a disk's tracker is: what an operator may want to know before a stop of the host, or a backup.
//!
//! Invariant: looked at without a lock that a change waits for, so numbers may be a moment old and of
//! different moments.
//! Absent: anything that changes it.

use std::sync::PoisonError;

use cbt::{BlockGrid, Cells, ChangeId, Epoch};

use crate::disk::Disk;
use crate::format::DiskState;
use crate::open::{ResetReason, bytes_of};
use crate::storage::Storage;

/// Why a generation began, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Began {
    /// Why, as a stable code for programs; see [`crate::ResetReason::code`].
    pub code: &'static str,
    /// When, in nanoseconds since 1970.
    pub at_ns: u64,
}

/// How a disk's tracker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackerStatus {
    /// The last instant that was taken, or the beginning of the generation.
    pub change_id: ChangeId,
    /// The epoch in which changes are marked now.
    pub epoch: Epoch,
    /// Tracked blocks; none if changes are not tracked.
    pub grid: Option<BlockGrid>,
    /// Bytes of the disk.
    pub capacity: u64,
    /// Bytes of the map's file.
    pub map_bytes: u64,
    /// Bytes of a region of the intent log; 0 if changes are not tracked.
    pub region_bytes: u64,
    /// Regions in which marks may not be on their medium.
    pub hot_regions: u64,
    /// Bytes of the disk in these regions: what a stop of the host now would count as changed.
    pub presumed_bytes: u64,
    /// See [`Disk::is_tracking_at_risk`].
    pub at_risk: bool,
    /// A stop of the host ends the generation: the log, the map or the image could not be written.
    pub ends_with_host: bool,
    /// Why the generation began, if that is known: also of one that began before the disk was opened.
    pub began: Option<Began>,
    /// Checkpoints of the disk, of all generations.
    pub checkpoints: usize,
}

impl<S: Storage> Disk<S> {
    /// How the tracker is now.
    pub fn tracker_status(&self) -> TrackerStatus {
        let (capacity, superblock) = (self.capacity(), self.superblock_now());
        let hot = self.intent.as_ref().map_or_else(Vec::new, |intent| intent.hot_ranges(capacity));
        let region_bytes = self.intent.as_ref().map_or(0, |intent| intent.region_bytes());
        let grid = self.block_grid();
        let in_doubt = superblock.state == DiskState::Unlogged
            || self.control.map_in_doubt(&superblock.boot)
            || self.control.log_in_doubt(&superblock.boot)
            || self.control.flush_failed();
        TrackerStatus {
            change_id: self.change_id(),
            epoch: self.history.epoch(),
            grid,
            capacity,
            map_bytes: bytes_of(self.map_cells().cells().len()),
            region_bytes,
            // The last region of the disk may be a part of one.
            hot_regions: hot.iter().map(|range| range.len().div_ceil(region_bytes.max(1))).sum(),
            presumed_bytes: hot.iter().map(|range| range.len()).sum(),
            at_risk: self.is_tracking_at_risk(),
            ends_with_host: grid.is_some() && in_doubt,
            began: self.ever_began(),
            checkpoints: self.checkpoints().len(),
        }
    }

    /// Why and when the generation began, also if that was before the disk was opened; if it is known.
    pub(crate) fn ever_began(&self) -> Option<Began> {
        let superblock = self.superblock_now();
        ResetReason::numbered(superblock.began_reason)
            .map(|reason| Began { code: reason.code(), at_ns: superblock.began_ns })
    }

    /// Why and when the generation began, if it did since the disk was opened.
    pub fn generation_began(&self) -> Option<Began> {
        *self.began.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
