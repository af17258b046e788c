//! The verdict: what the superblock and the image, as they are found, say together.
//!
//! Invariant: nothing here reads or writes a file, so the same findings get the same verdict. What cannot be proved is
//! not believed, and the verdict has the reason. These are the rows of the table at the head of the module `open` that
//! superblock and image decide.
//!
//! Absent: what the map, the notes, the sample and the sign of life say; an opening adds that to the verdict.

use std::fmt;

use cbt::{BlockGrid, Cells, Epoch};

use super::{DiskOptions, bytes_of, cells_of};
use crate::error::Error;
use crate::format::{DiskState, PAGE, Superblock};
use crate::storage::Storage;
use crate::tracker::Identity;

/// Why a new generation began.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetReason {
    /// There was no state: the disk is new here.
    New,
    /// The superblock, or the map, is not what it should be.
    Damaged,
    /// The host stopped without a clean end, so marks may be lost.
    HostStopped,
    /// The image is not as it was left.
    ImageChanged,
    /// Another block size was asked for, or tracking was switched on or off.
    BlockSizeChanged,
    /// An earlier beginning of a new generation was interrupted.
    Interrupted,
    /// The numbers of epochs were about to run out.
    EpochsExhausted,
    /// The history was exported, and goes on elsewhere.
    HandedOver,
    /// The operator says that the image was changed.
    AssumedChanged,
    /// An operator asked for it; see [`crate::Disk::reset_tracking`].
    Operator,
    /// An operator switched tracking off; see [`crate::Disk::disable_tracking`].
    TrackingDisabled,
    /// An operator switched tracking on; see [`crate::Disk::enable_tracking`].
    TrackingEnabled,
}

impl ResetReason {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Damaged => "damaged",
            Self::HostStopped => "host-stopped",
            Self::ImageChanged => "image-changed",
            Self::BlockSizeChanged => "block-size-changed",
            Self::Interrupted => "interrupted",
            Self::EpochsExhausted => "epochs-exhausted",
            Self::HandedOver => "handed-over",
            Self::AssumedChanged => "assumed-changed",
            Self::Operator => "operator",
            Self::TrackingDisabled => "tracking-disabled",
            Self::TrackingEnabled => "tracking-enabled",
        }
    }

    /// All of them; the superblock has the place of one, counted from 1.
    const NUMBERED: [Self; 12] = [
        Self::New,
        Self::Damaged,
        Self::HostStopped,
        Self::ImageChanged,
        Self::BlockSizeChanged,
        Self::Interrupted,
        Self::EpochsExhausted,
        Self::HandedOver,
        Self::AssumedChanged,
        Self::Operator,
        Self::TrackingDisabled,
        Self::TrackingEnabled,
    ];

    /// Its number in the superblock.
    pub(crate) fn number(&self) -> u32 {
        (1..).zip(&Self::NUMBERED).find(|(_, one)| *one == self).map_or(0, |(number, _)| number)
    }

    /// The reason of a number in the superblock, if it is known.
    pub(crate) fn numbered(number: u32) -> Option<&'static Self> {
        Self::NUMBERED.get(usize::try_from(number.checked_sub(1)?).ok()?)
    }
}

impl fmt::Display for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "the disk is new here",
            Self::Damaged => "the tracker's files are damaged",
            Self::HostStopped => "the host stopped without a clean end, so marks may be lost",
            Self::ImageChanged => "the image was changed or replaced while no daemon served it",
            Self::BlockSizeChanged => "another block size was asked for",
            Self::Interrupted => "an earlier reset was interrupted",
            Self::EpochsExhausted => "the numbers of epochs were running out",
            Self::HandedOver => "the history was exported, and goes on elsewhere",
            Self::AssumedChanged => "the operator says that the image was changed while no daemon served it",
            Self::Operator => "an operator asked for it",
            Self::TrackingDisabled => "an operator switched tracking off",
            Self::TrackingEnabled => "an operator switched tracking on",
        })
    }
}

/// What the superblock and the image say together.
pub(super) struct Verdict {
    pub(super) reset: Option<ResetReason>,
    pub(super) keep_snapshots: bool,
    /// Marks may be lost, where the intent log says so.
    pub(super) presume: bool,
}

/// Refuses the state of another image that is still around under its own name.
pub(super) fn check_owner<S: Storage>(found: &Superblock, options: &DiskOptions<S>) -> Result<(), Error> {
    let same_file =
        (found.identity.inode, found.identity.device) == (options.identity.inode, options.identity.device);
    if found.path == options.image_path || same_file {
        return Ok(());
    }
    Err(Error::ForeignState { owner: found.path.clone(), image: options.image_path.clone() })
}

pub(super) fn judge<S: Storage>(
    found: Option<&Superblock>,
    existed: bool,
    logged: bool,
    options: &DiskOptions<S>,
) -> Verdict {
    let Some(found) = found else {
        let reason = if existed { ResetReason::Damaged } else { ResetReason::New };
        return Verdict { reset: Some(reason), keep_snapshots: false, presume: false };
    };
    if found.state == DiskState::HandedOver {
        // Where the image is shared, another host's changes may leave no trace that is seen here.
        return Verdict { reset: Some(ResetReason::HandedOver), keep_snapshots: false, presume: false };
    }
    let proved = is_proved(found, &options.identity, &options.boot);
    // Another boot: marks may be lost, in hot regions only; and none where none were made.
    let logged = logged || found.block_bytes == 0;
    let presume = logged && is_presumable(found, &options.identity, &options.boot);
    let block_bytes = options.tracking.map_or(0, BlockGrid::bytes);
    let reset = if !proved && !presume {
        let host = found.state != DiskState::Clean && found.boot != options.boot;
        Some(if host { ResetReason::HostStopped } else { ResetReason::ImageChanged })
    } else if found.state == DiskState::Resetting {
        Some(ResetReason::Interrupted)
    } else if found.block_bytes != block_bytes {
        Some(ResetReason::BlockSizeChanged)
    } else if found.epoch.get() > Epoch::LAST.get() - (1 << 20) {
        Some(ResetReason::EpochsExhausted)
    } else {
        None
    };
    Verdict { reset, keep_snapshots: proved, presume }
}

/// Whether the image is as the superblock's writer left it.
pub(crate) fn is_proved(found: &Superblock, now: &Identity, boot: &[u8; 16]) -> bool {
    let then = &found.identity;
    let same_len = found.capacity == now.len || found.growing_to == Some(now.len);
    let same_file = then.inode == now.inode && same_len;
    let is_stamped = then.len == now.len && then.mtime_ns == now.mtime_ns;
    match found.state {
        // Device numbers may change with a boot; within one, a file keeps its own.
        DiskState::Clean | DiskState::HandedOver => same_file && is_stamped,
        DiskState::Doubtful => same_file && is_stamped && found.boot == *boot,
        DiskState::Serving | DiskState::Unlogged | DiskState::Resetting => {
            same_file && then.device == now.device && found.boot == *boot
        }
    }
}

/// Whether the image is the one that was served when the host stopped: what may have changed since the last
/// marks that are on the medium, a whole intent log knows.
pub(crate) fn is_presumable(found: &Superblock, now: &Identity, boot: &[u8; 16]) -> bool {
    let same_len = found.capacity == now.len || found.growing_to == Some(now.len);
    let same_file = found.identity.inode == now.inode && same_len;
    found.state == DiskState::Serving && found.boot != *boot && same_file
}

/// Whether the map is as long as the superblock's writer left it, or in the midst of being replaced. It is longer
/// than the disk needs if the disk is on its way to be larger, or was larger.
pub(crate) fn is_as_left<C: Cells>(found: &Superblock, len: Option<u64>) -> bool {
    let tracking = BlockGrid::new(found.block_bytes).ok();
    let cells = |capacity: u64| bytes_of(cells_of::<C>(tracking, capacity));
    let is_long = |len: u64| len >= cells(found.capacity) && len.is_multiple_of(PAGE as u64);
    found.state == DiskState::Resetting || len.is_some_and(is_long)
}
