//! The verbs: their arguments, their answers, and what can be checked without the engine.
//!
//! Everything is kebab case on the wire and plain text and numbers in Rust: conversion to the
//! engine's types happens in the daemon, so that neither side's names bind the other.
//!
//! What always holds: arguments refuse members they do not know, so that a mistyped one is an
//! error and not a default; answers accept them, so that an old client reads a new daemon.
//! Fields are added to answers, never taken away or given another meaning.

mod changes;
mod checkpoints;
mod checks;
mod daemon;
mod disks;
mod exports;
mod map;
mod moves;
mod overlays;
mod rewinds;
mod snapshots;
mod store;
mod time;
mod tracking;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::changes::{ChangedBlocks, ChangedRange, PageLimit, PageLimitError, QueryChangedBlocks, Since};
pub use self::checkpoints::{
    CheckpointCreate, CheckpointCreated, CheckpointDelete, CheckpointDeleted, CheckpointInfo,
    IncrementalInfo, QueryCheckpoints, QueryIncremental,
};
pub use self::checks::check_name;
pub use self::daemon::{
    CommandInfo, QmpCapabilities, QueryCommands, QueryStatus, QueryVersion, Quit, RunState, StatusInfo,
    VersionInfo, VersionTriple,
};
pub use self::disks::{BlockResize, BlockResized, DiskInfo, IoCounters, QueryDisks, TrackerInfo};
pub use self::exports::{ExportInfo, NbdExportAdd, NbdExportDel, QueryExports};
pub use self::map::{
    CellCount, CellCountError, ChangeMap, ChangedCell, MapInstant, QueryChangeMap, RECENT as RECENT_EPOCHS,
};
pub use self::moves::{TrackerExport, TrackerExported};
pub use self::overlays::{OverlayInfo, SnapshotClose, SnapshotOpen};
pub use self::rewinds::{DiskRevert, RewindInfo};
pub use self::snapshots::{
    QuerySnapshots, SnapshotCreate, SnapshotCreated, SnapshotDelete, SnapshotDeleted, SnapshotInfo,
    SnapshotPoint, SnapshotState,
};
pub use self::store::{AreaInfo, MAX_HOLD_DEADLINE, OnOverflow, StoreAppend, StoreInfo, StoreLimit};
pub use self::time::Timestamp;
pub use self::tracking::{
    MarkRange, QueryTracker, TrackerDetails, TrackerDisable, TrackerEnable, TrackerMark, TrackerReset,
};
use crate::service::CommandError;

/// The arguments of one verb, and what the verb answers.
pub trait Command: Serialize + DeserializeOwned {
    /// The verb's name on the wire.
    const NAME: &'static str;
    /// What the verb returns.
    type Answer: Serialize + DeserializeOwned;

    /// What the types do not say about valid arguments.
    ///
    /// # Errors
    /// Says which argument is wrong, and how.
    fn check(&self) -> Result<(), CommandError> {
        Ok(())
    }
}

/// Every verb of the server, by name: what `query-commands` answers.
pub const VERBS: &[&str] = &[
    QmpCapabilities::NAME,
    BlockResize::NAME,
    CheckpointCreate::NAME,
    CheckpointDelete::NAME,
    DiskRevert::NAME,
    NbdExportAdd::NAME,
    NbdExportDel::NAME,
    QueryChangeMap::NAME,
    QueryChangedBlocks::NAME,
    QueryCheckpoints::NAME,
    QueryCommands::NAME,
    QueryDisks::NAME,
    QueryExports::NAME,
    QueryIncremental::NAME,
    QuerySnapshots::NAME,
    QueryStatus::NAME,
    QueryTracker::NAME,
    QueryVersion::NAME,
    Quit::NAME,
    SnapshotClose::NAME,
    SnapshotCreate::NAME,
    SnapshotDelete::NAME,
    SnapshotOpen::NAME,
    StoreAppend::NAME,
    StoreLimit::NAME,
    TrackerDisable::NAME,
    TrackerEnable::NAME,
    TrackerExport::NAME,
    TrackerMark::NAME,
    TrackerReset::NAME,
];

/// The answer of verbs that answer nothing: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_listed_by_name() {
        assert!(VERBS[1..].is_sorted());
    }
}
