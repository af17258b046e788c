//! Checkpoints: instants that have a name and outlive their snapshot; and what an older instant is good for.

use serde::{Deserialize, Serialize};

use super::checks::{check_disks, check_name};
use super::{Command, SnapshotPoint, Timestamp};
use crate::service::CommandError;

/// Names the instant of a snapshot that is held.
///
/// The checkpoint stays when the snapshot is deleted, over restarts, `kill -9` and power cuts, until it is
/// deleted itself. On several disks it is made on all or on none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CheckpointCreate {
    /// Name of the checkpoint, the same on every disk; see [`check_name`]. No other instant of the disk has it.
    pub name: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// Disks whose snapshot of that name is meant, all that have it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

impl Command for CheckpointCreate {
    const NAME: &'static str = "checkpoint-create";
    type Answer = CheckpointCreated;

    fn check(&self) -> Result<(), CommandError> {
        check_name("name", &self.name)?;
        check_disks(self.disks.as_deref())
    }
}

/// A checkpoint that was just made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckpointCreated {
    /// Its name.
    pub name: String,
    /// One entry per disk, in the order asked for.
    pub disks: Vec<SnapshotPoint>,
}

/// Deletes a checkpoint. Its change ids stay valid as `since`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CheckpointDelete {
    /// The checkpoint's name.
    pub name: String,
    /// Disks to delete it on, all that have it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

impl Command for CheckpointDelete {
    const NAME: &'static str = "checkpoint-delete";
    type Answer = CheckpointDeleted;

    fn check(&self) -> Result<(), CommandError> {
        check_disks(self.disks.as_deref())
    }
}

/// A checkpoint that was just deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckpointDeleted {
    /// Its name.
    pub name: String,
    /// The disks that no longer have it.
    pub disks: Vec<String>,
}

/// Asks for checkpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryCheckpoints {
    /// Of this disk, of all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

impl Command for QueryCheckpoints {
    const NAME: &'static str = "query-checkpoints";
    type Answer = Vec<CheckpointInfo>;
}

/// A checkpoint of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckpointInfo {
    /// Its name.
    pub name: String,
    /// The disk it is of.
    pub disk: String,
    /// The instant, for `since` and `until`.
    pub change_id: String,
    /// The same instant by the host's clock.
    pub created: Timestamp,
    /// Bytes of the disk at the instant.
    pub size: u64,
    /// Unit in which changes up to it are told, in bytes.
    pub block_size: u64,
    /// Bytes that it takes in the state directory.
    pub held: u64,
    /// Whether changes since it can be told up to the next snapshot: its generation is the disk's.
    pub current: bool,
    /// If it is not current: why its generation ended, as a stable code, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// Why changes up to it cannot be told any more, if that was found. Changes since it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

/// Asks whether the next backup can be an incremental one: per disk, whether changes since an instant will be
/// told in full up to a snapshot that is taken now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryIncremental {
    /// The instant of the last backup: a change id, or the name of a checkpoint or a snapshot.
    pub since: String,
    /// Disks to ask about, all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

impl Command for QueryIncremental {
    const NAME: &'static str = "query-incremental";
    type Answer = Vec<IncrementalInfo>;

    fn check(&self) -> Result<(), CommandError> {
        check_disks(self.disks.as_deref())
    }
}

/// Whether the next backup of one disk can be incremental.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IncrementalInfo {
    /// The disk.
    pub disk: String,
    /// Whether it can.
    pub possible: bool,
    /// The instant as a change id, if there is one of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Why not, as the code with which `query-changed-blocks` would refuse, such as `generation-differs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why not, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desc: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_disks_are_checked() {
        let create = |name: &str, disks: Option<&[&str]>| CheckpointCreate {
            name: name.to_owned(),
            snapshot: "s".to_owned(),
            disks: disks.map(|disks| disks.iter().map(|&disk| disk.to_owned()).collect()),
        };
        assert_eq!(create("monday", None).check(), Ok(()));
        assert!(create("mon/day", None).check().is_err());
        assert!(create("monday", Some(&[])).check().is_err());
        assert!(create("monday", Some(&["a", "a"])).check().is_err());
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let info = IncrementalInfo {
            disk: "vda".to_owned(),
            possible: true,
            since: Some("g/1".to_owned()),
            reason: None,
            desc: None,
        };
        assert_eq!(serde_json::to_string(&info).unwrap(), r#"{"disk":"vda","possible":true,"since":"g/1"}"#);
    }
}
