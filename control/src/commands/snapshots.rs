//! Snapshots: taking, listing, letting go.
//!
//! A snapshot of several disks is one name and one instant; each disk has its own change id.

use serde::{Deserialize, Serialize};

use super::checks::{bad_argument, check_disks, check_name};
use super::{Command, MAX_HOLD_DEADLINE, OnOverflow, OverlayInfo, Timestamp};
use crate::service::CommandError;

/// Freezes disks at one instant.
///
/// The snapshot belongs to the daemon and not to the client: it stays when the client goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Name of the snapshot, the same on every disk; see [`check_name`].
    pub name: String,
    /// Disks to freeze, all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
    /// What happens when there is no space for old content.
    #[serde(default)]
    pub on_overflow: OnOverflow,
    /// How long writes wait then, in seconds; 30 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_deadline: Option<u32>,
    /// Bytes of old content that it may hold on each disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
}

impl Command for SnapshotCreate {
    const NAME: &'static str = "snapshot-create";
    type Answer = SnapshotCreated;

    fn check(&self) -> Result<(), CommandError> {
        check_name("name", &self.name)?;
        if self.hold_deadline.is_some_and(|seconds| !(1..=MAX_HOLD_DEADLINE).contains(&seconds)) {
            return Err(bad_argument("hold-deadline", "1 to 3600 seconds"));
        }
        if self.limit == Some(0) {
            return Err(bad_argument("limit", "more than 0 bytes; leave it out for no limit"));
        }
        check_disks(self.disks.as_deref())
    }
}

/// A snapshot that was just taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotCreated {
    /// Its name.
    pub name: String,
    /// The instant it shows.
    pub created: Timestamp,
    /// How long writes waited for it, in microseconds.
    pub held_writes_us: u64,
    /// One entry per disk, in the order asked for.
    pub disks: Vec<SnapshotPoint>,
}

/// One disk's part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotPoint {
    /// The disk's name.
    pub disk: String,
    /// What to give as `since` after the next snapshot: keep it with the backup.
    pub change_id: String,
    /// Size of the frozen image in bytes.
    pub size: u64,
}

/// Lets go of a snapshot. Its change ids stay valid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotDelete {
    /// The snapshot's name.
    pub name: String,
    /// Disks to delete it on, all that have it when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<String>>,
}

impl Command for SnapshotDelete {
    const NAME: &'static str = "snapshot-delete";
    type Answer = SnapshotDeleted;

    fn check(&self) -> Result<(), CommandError> {
        check_disks(self.disks.as_deref())
    }
}

/// A snapshot that was just deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotDeleted {
    /// Its name.
    pub name: String,
    /// The disks that no longer have it.
    pub disks: Vec<String>,
}

/// Asks for snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QuerySnapshots {
    /// Of this disk, of all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

impl Command for QuerySnapshots {
    const NAME: &'static str = "query-snapshots";
    type Answer = Vec<SnapshotInfo>;
}

/// A snapshot of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// The disk it is of.
    pub disk: String,
    /// The instant it shows, for `since`.
    pub change_id: String,
    /// The same instant by the host's clock.
    pub created: Timestamp,
    /// Size of the frozen image in bytes.
    pub size: u64,
    /// Whether it can be read.
    pub state: SnapshotState,
    /// Why it is broken: a stable code such as `store-full`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it broke, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken_time: Option<Timestamp>,
    /// The system's error number with which it broke, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<u32>,
    /// What happens when there is no space for old content.
    #[serde(default)]
    pub on_overflow: OnOverflow,
    /// How long writes wait then, in seconds, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_deadline: Option<u32>,
    /// Bytes of old content that it may hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Bytes that its difference store takes on the host.
    pub held: u64,
    /// Bytes of the difference store that deleting it would free, once the background has done its part:
    /// those that no older snapshot needs. What older ones look for in it passes to the next older one.
    /// Exact up to about a million kept grains of all snapshots together, an estimate above.
    #[serde(default)]
    pub bytes_freed_by_delete: u64,
    /// Bytes of the image that readers have released: they can never be read again, and no overlay can be
    /// opened on what is left.
    #[serde(default)]
    pub released: u64,
    /// Names of the NBD exports that read it.
    #[serde(default)]
    pub exports: Vec<String>,
    /// What stands on it, in the order of opening. It cannot be deleted before they are closed.
    #[serde(default)]
    pub overlays: Vec<OverlayInfo>,
}

/// Whether a snapshot can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotState {
    /// It shows its instant.
    Active,
    /// It answers every read with an error, never with newer data.
    Broken,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_named_twice_or_not_at_all_are_refused() {
        let with = |disks: &[&str]| SnapshotCreate {
            name: "s".to_owned(),
            disks: Some(disks.iter().map(|&d| d.to_owned()).collect()),
            ..SnapshotCreate::default()
        };
        assert_eq!(with(&["a", "b"]).check(), Ok(()));
        assert!(with(&[]).check().is_err());
        assert!(with(&["a", "b", "a"]).check().is_err());
    }
}
