//! What can go wrong in the engine, by what a caller would do about it.

use std::io;

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The medium refused.
    #[error("{what} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A flush failed earlier: what the medium holds is unknown until the disk is opened anew.
    #[error(
        "an earlier flush of the image failed: no later flush can be trusted until the daemon is restarted"
    )]
    Poisoned,
    /// The snapshot lost something it would have needed.
    #[error("snapshot '{name}' is broken: {reason}")]
    SnapshotBroken {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The snapshot was deleted, perhaps while it was read.
    #[error("snapshot '{name}' was deleted")]
    SnapshotDeleted {
        /// Its name.
        name: String,
    },
    /// A reader has released what was asked for.
    #[error("snapshot '{name}' does not hold byte {at} any more: a reader has released it")]
    ContentReleased {
        /// The snapshot's name.
        name: String,
        /// The first byte that was asked for and is released.
        at: u64,
    },
    /// A reader has released part of the snapshot, so it can only be read in part.
    #[error("snapshot '{name}' cannot be opened for writing: a reader has released part of it")]
    SnapshotReleased {
        /// Its name.
        name: String,
    },
    /// There is none of this name.
    #[error("disk '{disk}' has no snapshot '{name}'")]
    NoSuchSnapshot {
        /// The disk.
        disk: String,
        /// The name asked for.
        name: String,
    },
    /// There is one of this name already.
    #[error("disk '{disk}' has a snapshot '{name}' already")]
    SnapshotExists {
        /// The disk.
        disk: String,
        /// The name asked for.
        name: String,
    },
    /// There are overlays on the snapshot, which need it.
    #[error("snapshot '{name}' is open for writing: close {overlays} first")]
    SnapshotInUse {
        /// Its name.
        name: String,
        /// The names of its overlays, separated by commas.
        overlays: String,
    },
    /// There is no overlay of this name.
    #[error("snapshot '{snapshot}' has no overlay '{name}'")]
    NoSuchOverlay {
        /// The snapshot.
        snapshot: String,
        /// The name asked for.
        name: String,
    },
    /// There is an overlay of this name already.
    #[error("snapshot '{snapshot}' has an overlay '{name}' already")]
    OverlayExists {
        /// The snapshot.
        snapshot: String,
        /// The name asked for.
        name: String,
    },
    /// The overlay was discarded, perhaps while it was used.
    #[error("overlay '{name}' was closed")]
    OverlayClosed {
        /// Its name.
        name: String,
    },
    /// A name that cannot be one.
    #[error(
        "'{name}' is no name for a snapshot or an overlay: 1 to {max} letters, digits, '.', '_', '-', '+' or ':', beginning with a letter or digit"
    )]
    BadName {
        /// The name asked for.
        name: String,
        /// Longest name in bytes.
        max: usize,
    },
    /// Writes in flight did not end in time; nothing was changed.
    #[error("disk '{disk}' has writes in flight that did not end within {seconds} s: nothing was changed")]
    GateTimeout {
        /// The disk.
        disk: String,
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// A rewind is under way, which must be complete first.
    #[error("disk '{disk}' is being rewound to snapshot '{snapshot}': wait until that is complete")]
    RewindActive {
        /// The disk.
        disk: String,
        /// What it becomes.
        snapshot: String,
    },
    /// A rewind was under way, and it cannot be told which part of the disk it had brought back.
    #[error(
        "a rewind to snapshot '{snapshot}' was under way and cannot go on: {reason}; the image alone is neither the disk before nor after it. To take the image as it is, remove the state directory"
    )]
    RewindLost {
        /// What the disk was to become; empty if that is not known.
        snapshot: String,
        /// Why it cannot go on.
        reason: String,
    },
    /// The disk had another size at the snapshot's instant.
    #[error(
        "snapshot '{snapshot}' of disk '{disk}' has {then} bytes and the disk has {now}: it cannot become that again"
    )]
    CapacityDiffers {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
        /// Bytes at the snapshot's instant.
        then: u64,
        /// Bytes now.
        now: u64,
    },
    /// An intent log would have more regions than one can have.
    #[error(
        "the intent log has regions of {region} bytes, too many for the disk's new size; the next start makes larger ones"
    )]
    LogTooLong {
        /// Bytes of a region.
        region: u64,
    },
    /// No more snapshots of one disk can be kept apart.
    #[error("disk '{disk}' has {max} snapshots already, which is as many as it can have")]
    TooManySnapshots {
        /// The disk.
        disk: String,
        /// How many it can have.
        max: usize,
    },
    /// Epochs have run out.
    #[error("disk '{disk}' has used up its epochs: restart the daemon to begin a new generation")]
    EpochsExhausted {
        /// The disk.
        disk: String,
    },
    /// The numbers of checkpoints' files have run out.
    #[error(
        "disk '{disk}' has had a checkpoint file of the last number there is: delete the checkpoint made last and restart the daemon"
    )]
    CheckpointNumbersExhausted {
        /// The disk.
        disk: String,
    },
    /// Changes were asked for where none are tracked.
    #[error("disk '{disk}' does not track changes")]
    NotTracked {
        /// The disk.
        disk: String,
    },
    /// A flush of the change map has failed, and what was marked before may have left memory since.
    #[error(
        "the change map of disk '{disk}' could not be written, and what has changed is not certain: the next backup must be a full one, of a new generation ('tracker reset')"
    )]
    MarksLost {
        /// The disk.
        disk: String,
    },
    /// Tracking was to be switched on or off, and is already.
    #[error("tracking of disk '{disk}' is {state} already: nothing was changed")]
    TrackingAlready {
        /// The disk.
        disk: String,
        /// `on` or `off`.
        state: &'static str,
    },
    /// A range that is not on the disk.
    #[error(
        "{length} bytes at offset {offset} pass the end of disk '{disk}', which has {size} bytes: nothing was changed"
    )]
    PastEnd {
        /// The disk.
        disk: String,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// A size that no disk can have.
    #[error("{size} bytes are no size for disk '{disk}': it must be a multiple of 512, up to {max}")]
    BadSize {
        /// The disk.
        disk: String,
        /// Bytes asked for.
        size: u64,
        /// Bytes that a disk can have at most.
        max: u64,
    },
    /// A disk does not become smaller unless that is said.
    #[error(
        "disk '{disk}' has {now} bytes, and what is past {size} would be lost if it became smaller: say 'shrink' if that is meant"
    )]
    Shrink {
        /// The disk.
        disk: String,
        /// Bytes asked for.
        size: u64,
        /// Bytes that it has.
        now: u64,
    },
    /// A block device cannot be cut.
    #[error("disk '{disk}' is a block device, which cannot be made smaller while it is served")]
    ShrinkDevice {
        /// The disk.
        disk: String,
    },
    /// The image is not as long as the disk, or as the disk shall be.
    #[error(
        "disk '{disk}' cannot become {size} bytes long, for its image is {image_len} bytes long: give a block device that size first, or resize the disk to what the image has"
    )]
    ImageLength {
        /// The disk.
        disk: String,
        /// Bytes asked for.
        size: u64,
        /// Bytes of the image.
        image_len: u64,
    },
    /// An earlier resize failed after the image was made longer.
    #[error("disk '{disk}' has begun to become {size} bytes long: resize it to that first")]
    ResizeUnfinished {
        /// The disk.
        disk: String,
        /// Bytes that it shall have.
        size: u64,
    },
    /// Snapshots are held, of which the changes are still to be told.
    #[error("disk '{disk}' holds snapshot '{snapshot}': delete its snapshots first")]
    SnapshotsHeld {
        /// The disk.
        disk: String,
        /// One of them.
        snapshot: String,
    },
    /// There is a checkpoint of this name already.
    #[error("disk '{disk}' has a checkpoint '{name}' already")]
    CheckpointExists {
        /// The disk.
        disk: String,
        /// The name asked for.
        name: String,
    },
    /// There is no checkpoint of this name.
    #[error("disk '{disk}' has no checkpoint '{name}'")]
    NoSuchCheckpoint {
        /// The disk.
        disk: String,
        /// The name asked for.
        name: String,
    },
    /// The runs of a checkpoint are not what was written.
    #[error("what changed up to checkpoint '{name}' cannot be told any more: {reason}; changes since it can")]
    CheckpointDamaged {
        /// Its name.
        name: String,
        /// What is damaged.
        reason: String,
    },
    /// A text that is no change id.
    #[error("{source}")]
    BadChangeId {
        /// Which.
        source: cbt::ParseChangeIdError,
    },
    /// Neither a snapshot nor a checkpoint.
    #[error("disk '{disk}' has no snapshot or checkpoint '{name}'")]
    NoSuchInstant {
        /// The disk.
        disk: String,
        /// The name or change id asked for.
        name: String,
    },
    /// A name of two instants.
    #[error(
        "disk '{disk}' has a snapshot '{name}' and a checkpoint '{name}' of another instant: say its change id"
    )]
    AmbiguousName {
        /// The disk.
        disk: String,
        /// The name asked for.
        name: String,
    },
    /// An instant of another history than that of the other end, or of the disk.
    #[error(
        "'{what}' belongs to another generation of disk '{disk}'{}: what changed since cannot be told; make a full backup",
        why(reason)
    )]
    OtherGeneration {
        /// The disk.
        disk: String,
        /// The change id or the name asked for.
        what: String,
        /// Why its generation ended, or why the disk's began, as a stable code; empty if that is not known.
        reason: String,
    },
    /// The older end is later than the younger one.
    #[error("'{since}' is later than '{until}' on disk '{disk}'")]
    SinceNotOlder {
        /// The disk.
        disk: String,
        /// The change id of the older end.
        since: String,
        /// The change id of the younger end.
        until: String,
    },
    /// The state directory belongs to another image.
    #[error(
        "the state directory belongs to the image '{owner}', not to '{image}': give each image its own with state=DIR, or remove the directory if its history is not wanted"
    )]
    ForeignState {
        /// The image it belongs to.
        owner: String,
        /// The image that was to be opened.
        image: String,
    },
    /// Changes waited for space until their deadline.
    #[error("guests' writes waited {seconds} s for space, and there was none")]
    HeldTooLong {
        /// The deadline.
        seconds: u32,
        /// Why they waited.
        source: Box<Error>,
    },
    /// Changes waited for space when their queue was stopped.
    #[error("guests' writes that waited for space had to end, for their queue was stopped")]
    HoldEnded {
        /// Why they waited.
        source: Box<Error>,
    },
    /// Something that cannot be an area of a difference store.
    #[error("'{path}' cannot hold old content of this disk: {why}")]
    AreaRefused {
        /// Its path.
        path: String,
        /// Why not.
        why: String,
    },
    /// An area of the difference store that old content is in is not there, or is not what it was.
    #[error("old content is in the store {path}, which cannot be used: {why}")]
    AreaLost {
        /// Its path.
        path: String,
        /// Why it cannot be used.
        why: String,
    },
    /// A limit that the operator set for difference stores is reached.
    #[error("the limit of {what} is reached")]
    LimitReached {
        /// What is limited.
        what: &'static str,
    },
    /// A limit that is below what is in use.
    #[error("the limit of {what} cannot be {limit} bytes, for {used} bytes are in use")]
    LimitInUse {
        /// What is limited.
        what: &'static str,
        /// The limit asked for, in bytes.
        limit: u64,
        /// What is in use, in bytes.
        used: u64,
    },
    /// The disk's history goes on elsewhere: nothing may be changed here any more.
    #[error("disk '{disk}' was handed over to another host: nothing of it can be changed here any more")]
    HandedOver {
        /// The disk.
        disk: String,
    },
    /// A history was handed over, and its file could not be finished.
    #[error(
        "the disk is handed over, but its history file could not be finished: export it again once the disk is closed, or cancel the export"
    )]
    HandedOverWithoutFile {
        /// Why not.
        source: Box<Error>,
    },
    /// A history that cannot go to another host, or cannot be given up for one.
    #[error("the history cannot be moved: {why}")]
    NotMovable {
        /// Why not.
        why: String,
    },
    /// A file that should hold a history and does not, or not a whole one.
    #[error("the history file cannot be used: {why}")]
    BadHistory {
        /// What is wrong with it.
        why: String,
    },
    /// An image that is not what a history belongs to.
    #[error("the image is not what it was when its history was exported: {why}; make a full backup")]
    ImageDiffers {
        /// What differs.
        why: String,
    },
    /// There is a history already where one was to be imported.
    #[error(
        "the state directory has a history already: say that it is to be replaced, which drops its snapshots too"
    )]
    HistoryExists,
    /// A structure on disk is not what it should be.
    #[error("{what} at byte {at} is damaged")]
    Corrupt {
        /// The structure.
        what: &'static str,
        /// Where in its file, in bytes.
        at: u64,
    },
}

/// What a message says of the end of a generation.
fn why(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(", whose history began anew ({reason})") }
}

impl Error {
    /// For `map_err`: the medium refused `what`.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// Whether space ran out: of a file system, a quota, or a store's numbers.
    pub fn is_out_of_space(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match self {
            Self::Io { source, .. } => matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge),
            Self::HeldTooLong { source, .. } | Self::HoldEnded { source } => source.is_out_of_space(),
            Self::LimitReached { .. } => true,
            _ => false,
        }
    }

    /// The system's error number, or 0.
    pub(crate) fn errno(&self) -> u32 {
        match self {
            Self::Io { source, .. } => {
                source.raw_os_error().and_then(|code| u32::try_from(code).ok()).unwrap_or(0)
            }
            Self::HeldTooLong { source, .. } | Self::HoldEnded { source } => source.errno(),
            _ => 0,
        }
    }

    /// Whether a file is not what it should be, as opposed to an error that may pass.
    pub(crate) fn is_damage(&self) -> bool {
        use io::ErrorKind::{NotFound, UnexpectedEof};
        match self {
            Self::Corrupt { .. } => true,
            Self::Io { source, .. } => matches!(source.kind(), NotFound | UnexpectedEof),
            _ => false,
        }
    }

    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io-error",
            Self::Poisoned => "poisoned",
            Self::SnapshotBroken { .. } => "snapshot-broken",
            Self::SnapshotDeleted { .. } => "snapshot-deleted",
            Self::ContentReleased { .. } => "content-released",
            Self::SnapshotReleased { .. } => "snapshot-released",
            Self::NoSuchSnapshot { .. } => "no-such-snapshot",
            Self::SnapshotExists { .. } => "snapshot-exists",
            Self::SnapshotInUse { .. } => "snapshot-in-use",
            Self::NoSuchOverlay { .. } => "no-such-overlay",
            Self::OverlayExists { .. } => "overlay-exists",
            Self::OverlayClosed { .. } => "overlay-closed",
            Self::BadName { .. } => "bad-name",
            Self::GateTimeout { .. } => "gate-timeout",
            Self::RewindActive { .. } => "rewind-active",
            Self::RewindLost { .. } => "rewind-lost",
            Self::CapacityDiffers { .. } => "capacity-differs",
            Self::LogTooLong { .. } => "log-too-long",
            Self::TooManySnapshots { .. } => "too-many-snapshots",
            Self::EpochsExhausted { .. } => "epochs-exhausted",
            Self::CheckpointNumbersExhausted { .. } => "checkpoint-numbers-exhausted",
            Self::NotTracked { .. } => "not-tracked",
            Self::MarksLost { .. } => "marks-lost",
            Self::TrackingAlready { .. } => "tracking-already",
            Self::PastEnd { .. } => "past-end",
            Self::BadSize { .. } => "bad-size",
            Self::Shrink { .. } => "shrink",
            Self::ShrinkDevice { .. } => "shrink-device",
            Self::ImageLength { .. } => "image-length",
            Self::ResizeUnfinished { .. } => "resize-unfinished",
            Self::SnapshotsHeld { .. } => "snapshots-held",
            Self::CheckpointExists { .. } => "checkpoint-exists",
            Self::NoSuchCheckpoint { .. } => "no-such-checkpoint",
            Self::CheckpointDamaged { .. } => "checkpoint-damaged",
            Self::BadChangeId { .. } => "bad-change-id",
            Self::NoSuchInstant { .. } => "no-such-instant",
            Self::AmbiguousName { .. } => "ambiguous-name",
            Self::OtherGeneration { .. } => "other-generation",
            Self::SinceNotOlder { .. } => "since-not-older",
            Self::ForeignState { .. } => "foreign-state",
            Self::HeldTooLong { source, .. } | Self::HoldEnded { source } => source.code(),
            Self::AreaRefused { .. } => "store-refused",
            Self::AreaLost { .. } => "store-lost",
            Self::LimitReached { .. } => "store-full",
            Self::LimitInUse { .. } => "limit-in-use",
            Self::HandedOver { .. } => "handed-over",
            Self::HandedOverWithoutFile { .. } => "handed-over-without-file",
            Self::NotMovable { .. } => "not-movable",
            Self::BadHistory { .. } => "bad-history",
            Self::ImageDiffers { .. } => "image-differs",
            Self::HistoryExists => "history-exists",
            Self::Corrupt { .. } => "corrupt",
        }
    }
}
