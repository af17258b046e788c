//! The verbs: their arguments, their answers, and what can be checked without the engine.
//!
//! Everything is kebab case on the wire and plain text and numbers in Rust: conversion to the
//! engine's types happens in the daemon, so that neither side's names bind the other.
//!
//! What always holds: arguments refuse members they do not know, so that a mistyped one is an
//! error and not a default; answers accept them, so that an old client reads a new daemon.
//! Fields are added to answers, never taken away or given another meaning.

mod changes;
mod checks;
mod daemon;
mod disks;
mod exports;
mod overlays;
mod snapshots;
mod time;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::changes::{ChangedBlocks, ChangedRange, PageLimit, PageLimitError, QueryChangedBlocks, Since};
pub use self::checks::check_name;
pub use self::daemon::{
    CommandInfo, QmpCapabilities, QueryCommands, QueryStatus, QueryVersion, Quit, RunState, StatusInfo,
    VersionInfo, VersionTriple,
};
pub use self::disks::{DiskInfo, IoCounters, QueryDisks, TrackerInfo};
pub use self::exports::{ExportInfo, NbdExportAdd, NbdExportDel, QueryExports};
pub use self::overlays::{OverlayInfo, SnapshotClose, SnapshotOpen};
pub use self::snapshots::{
    QuerySnapshots, SnapshotCreate, SnapshotCreated, SnapshotDelete, SnapshotDeleted, SnapshotInfo,
    SnapshotPoint, SnapshotState,
};
pub use self::time::Timestamp;
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
    NbdExportAdd::NAME,
    NbdExportDel::NAME,
    QueryChangedBlocks::NAME,
    QueryCommands::NAME,
    QueryDisks::NAME,
    QueryExports::NAME,
    QuerySnapshots::NAME,
    QueryStatus::NAME,
    QueryVersion::NAME,
    Quit::NAME,
    SnapshotClose::NAME,
    SnapshotCreate::NAME,
    SnapshotDelete::NAME,
    SnapshotOpen::NAME,
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
