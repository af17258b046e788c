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
    #[error("disk '{disk}' has writes in flight that did not end within {seconds} s: no snapshot was taken")]
    GateTimeout {
        /// The disk.
        disk: String,
        /// How long was waited, in seconds.
        seconds: u64,
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
    /// Changes were asked for where none are tracked.
    #[error("disk '{disk}' does not track changes")]
    NotTracked {
        /// The disk.
        disk: String,
    },
    /// A change id that this disk cannot answer for.
    #[error("no changes since '{since}' can be told for disk '{disk}': {reason}; make a full backup")]
    UnknownSince {
        /// The disk.
        disk: String,
        /// The change id asked for.
        since: String,
        /// Why not.
        reason: String,
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
    /// A structure on disk is not what it should be.
    #[error("{what} at byte {at} is damaged")]
    Corrupt {
        /// The structure.
        what: &'static str,
        /// Where in its file, in bytes.
        at: u64,
    },
}

impl Error {
    /// For `map_err`: the medium refused `what`.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// Whether space ran out: of a file system, a quota, or a store's numbers.
    pub fn is_out_of_space(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }

    /// The system's error number, or 0.
    pub(crate) fn errno(&self) -> u32 {
        match self {
            Self::Io { source, .. } => {
                source.raw_os_error().and_then(|code| u32::try_from(code).ok()).unwrap_or(0)
            }
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
            Self::NoSuchSnapshot { .. } => "no-such-snapshot",
            Self::SnapshotExists { .. } => "snapshot-exists",
            Self::SnapshotInUse { .. } => "snapshot-in-use",
            Self::NoSuchOverlay { .. } => "no-such-overlay",
            Self::OverlayExists { .. } => "overlay-exists",
            Self::OverlayClosed { .. } => "overlay-closed",
            Self::BadName { .. } => "bad-name",
            Self::GateTimeout { .. } => "gate-timeout",
            Self::TooManySnapshots { .. } => "too-many-snapshots",
            Self::EpochsExhausted { .. } => "epochs-exhausted",
            Self::NotTracked { .. } => "not-tracked",
            Self::UnknownSince { .. } => "unknown-change-id",
            Self::ForeignState { .. } => "foreign-state",
            Self::Corrupt { .. } => "corrupt",
        }
    }
}
