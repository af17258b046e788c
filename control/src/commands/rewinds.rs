//! Rewinding a disk to one of its snapshots.

use serde::{Deserialize, Serialize};

use super::Command;

/// Makes a disk one of its snapshots again: at once for who reads it from now on, on the image in the
/// background. All snapshots stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskRevert {
    /// The disk.
    pub disk: String,
    /// The snapshot.
    pub snapshot: String,
    /// Also while a front end is connected, whose guest knows nothing of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

impl Command for DiskRevert {
    const NAME: &'static str = "disk-revert";
    type Answer = RewindInfo;
}

/// How far a rewind is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RewindInfo {
    /// The snapshot that the disk becomes. It may be deleted by now.
    pub snapshot: String,
    /// Bytes that are to be copied back to the image.
    pub bytes: u64,
    /// Bytes of these that are not back yet.
    pub bytes_left: u64,
    /// Why it does not go on, if it does not. It is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}
