//! A disk that moves to another host with its history.

use serde::{Deserialize, Serialize};

use super::Command;
use super::checks::bad_argument;
use crate::service::CommandError;

/// Exports the history of a disk for another host, and hands the disk over: from then on every change of it is
/// refused, until the daemon ends. Opened here again, it begins a new generation, unless the export is
/// cancelled (`ebbtide tracker cancel-export`).
///
/// Refused while a front end is connected: what is written afterwards would be in no history.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrackerExport {
    /// The disk's name.
    pub disk: String,
    /// Absolute path of the history file, which the daemon makes.
    pub file: String,
}

impl Command for TrackerExport {
    const NAME: &'static str = "tracker-export";
    type Answer = TrackerExported;

    fn check(&self) -> Result<(), CommandError> {
        match self.file.starts_with('/') && !self.file.ends_with('/') {
            true => Ok(()),
            false => Err(bad_argument("file", "the absolute path of a file")),
        }
    }
}

/// A history that was exported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrackerExported {
    /// The disk's name.
    pub disk: String,
    /// The history file.
    pub file: String,
    /// Bytes of the file.
    pub file_size: u64,
    /// The last instant that was taken of the disk.
    pub change_id: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes of a tracked block: the other host has to serve the disk with the same.
    pub block_size: u64,
    /// Blocks that have changed in the generation.
    pub changed_blocks: u64,
    /// Snapshots that stay behind, and are dropped when the disk is opened here again.
    pub snapshots: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_an_absolute_path() {
        let export = |file: &str| TrackerExport { disk: "vda".to_owned(), file: file.to_owned() };
        assert!(export("/x/y").check().is_ok());
        for wrong in ["", "x", "/x/"] {
            assert!(export(wrong).check().unwrap_err().desc.contains("absolute"), "{wrong}");
        }
    }
}
