//! Difference stores: where old content is kept, how much of it, and what happens when there is no space.

use serde::{Deserialize, Serialize};

use super::checks::bad_argument;
use super::{Command, Nothing};
use crate::service::CommandError;

/// What becomes of a guest's write whose old content cannot be preserved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOverflow {
    /// The snapshot breaks; the guest notices nothing.
    #[default]
    BreakSnapshot,
    /// The write waits until there is space, or until the deadline, which breaks the snapshot.
    HoldWrites,
    /// The write fails; the snapshot stays as it is.
    FailWrites,
}

impl OnOverflow {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::BreakSnapshot => "break-snapshot",
            Self::HoldWrites => "hold-writes",
            Self::FailWrites => "fail-writes",
        }
    }
}

/// Longest time that a write may wait for space, in seconds.
pub const MAX_HOLD_DEADLINE: u32 = 3600;

/// Bytes that a limit or an area has at least.
const MIN_BYTES: u64 = 1 << 20;

/// Adds an area to the difference store of a disk, while snapshots are held or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StoreAppend {
    /// The disk.
    pub disk: String,
    /// Absolute path of a directory, a file, which is made if it is missing, or a block device.
    pub path: String,
    /// Bytes of old content in it at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

impl Command for StoreAppend {
    const NAME: &'static str = "store-append";
    type Answer = AreaInfo;

    fn check(&self) -> Result<(), CommandError> {
        check_area_path(&self.path)?;
        if self.size.is_some_and(|size| size < MIN_BYTES) {
            return Err(bad_argument("size", "at least 1048576 bytes; leave it out for no bound"));
        }
        Ok(())
    }
}

fn check_area_path(path: &str) -> Result<(), CommandError> {
    if path.starts_with('/') && path.len() <= 992 && !path.chars().any(char::is_control) {
        return Ok(());
    }
    Err(bad_argument("path", "an absolute path of at most 992 bytes without control characters"))
}

/// Limits what snapshots hold: of the daemon, of a disk, or one snapshot of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StoreLimit {
    /// The disk; all disks together when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// A snapshot of the disk; all of them together when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Bytes of old content, or `null` for no limit.
    pub bytes: Option<u64>,
}

impl Command for StoreLimit {
    const NAME: &'static str = "store-limit";
    type Answer = Nothing;

    fn check(&self) -> Result<(), CommandError> {
        if self.snapshot.is_some() && self.disk.is_none() {
            return Err(bad_argument("disk", "the disk of the snapshot"));
        }
        if self.bytes == Some(0) {
            return Err(bad_argument("bytes", "more than 0; null means no limit"));
        }
        Ok(())
    }
}

/// The difference store of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct StoreInfo {
    /// Where old content is kept, in the order in which areas are filled.
    pub areas: Vec<AreaInfo>,
    /// Bytes of old content, what is still to be given back included.
    pub used: u64,
    /// How many there may be.
    pub limit: Option<u64>,
    /// Guests' writes that wait for space at this moment.
    pub writes_held: u64,
    /// Bytes that still fit, as far as that is known.
    pub bytes_left: Option<u64>,
    /// Bytes that are preserved in a second, of late.
    pub bytes_per_second: u64,
    /// Seconds after which it is full if that goes on; absent if nothing is written.
    pub seconds_left: Option<u64>,
    /// What will be full first: an area's path, `store-limit` or `daemon-limit`.
    pub bound_by: Option<String>,
}

/// One area of a difference store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AreaInfo {
    /// Its path; a name alone is in the state directory.
    pub path: String,
    /// `directory`, `file` or `device`.
    pub kind: String,
    /// Bytes of old content that fit; absent if it grows with its file system.
    pub size: Option<u64>,
    /// Bytes of old content in it.
    pub used: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_an_area_or_a_limit_is_refused() {
        let append = |path: &str, size| StoreAppend { disk: "vda".to_owned(), path: path.to_owned(), size };
        assert_eq!(append("/a", None).check(), Ok(()));
        for bad in [append("a", None), append("/a\n", None), append("/a", Some(4096)), append("", None)] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        let limit = |disk: Option<&str>, snapshot: Option<&str>, bytes| StoreLimit {
            disk: disk.map(str::to_owned),
            snapshot: snapshot.map(str::to_owned),
            bytes,
        };
        assert_eq!(limit(None, None, None).check(), Ok(()));
        assert!(limit(None, Some("s"), None).check().is_err());
        assert!(limit(Some("d"), None, Some(0)).check().is_err());
    }
}
