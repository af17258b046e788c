//! Writable views: opening a snapshot for writing, and closing it again.

use serde::{Deserialize, Serialize};

use super::Command;
use super::checks::{bad_argument, check_name, check_socket};
use crate::commands::Nothing;
use crate::service::CommandError;

/// Opens a snapshot for writing: an overlay, which is a disk of its own that begins as the snapshot.
///
/// Nothing that is written to it reaches the origin, the snapshot or other overlays. It is exported over
/// NBD as `DISK@SNAPSHOT/NAME`, and served on `socket` if there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotOpen {
    /// The disk's name.
    pub disk: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// The overlay's name among those of the snapshot; see [`check_name`].
    pub name: String,
    /// Must be true: for reading a snapshot need not be opened.
    #[serde(default)]
    pub writable: bool,
    /// Whether it stays when the daemon ends.
    #[serde(default)]
    pub keep: bool,
    /// A vhost-user socket to serve it on: an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

impl Command for SnapshotOpen {
    const NAME: &'static str = "snapshot-open";
    type Answer = OverlayInfo;

    fn check(&self) -> Result<(), CommandError> {
        check_name("name", &self.name)?;
        check_socket("socket", self.socket.as_deref())?;
        if self.writable {
            return Ok(());
        }
        Err(bad_argument("writable", "true; for reading a snapshot need not be opened, see query-exports"))
    }
}

/// Discards an overlay and what was written to it. NBD clients that use it get errors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotClose {
    /// The disk's name.
    pub disk: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// The overlay's name.
    pub name: String,
    /// Also while a front end is connected to its socket, which is disconnected.
    #[serde(default)]
    pub force: bool,
}

impl Command for SnapshotClose {
    const NAME: &'static str = "snapshot-close";
    type Answer = Nothing;
}

/// An overlay of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct OverlayInfo {
    /// The disk's name.
    pub disk: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// Its name.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Bytes that are its own, in units of 4 KiB.
    pub used: u64,
    /// Whether it stays when the daemon ends.
    pub keep: bool,
    /// Its name on the NBD wire, if there is a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// Where to reach it over NBD, such as `nbd+unix:///NAME?socket=PATH`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// NBD clients connected now.
    pub clients: u32,
    /// The vhost-user socket that it is served on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Whether a front end is connected to it.
    pub connected: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::reason;

    fn open() -> SnapshotOpen {
        SnapshotOpen { name: "repair".to_owned(), writable: true, ..SnapshotOpen::default() }
    }

    #[test]
    fn what_cannot_be_opened_is_refused_before_the_engine_hears_of_it() {
        assert_eq!(open().check(), Ok(()));
        let socket = |path: &str| SnapshotOpen { socket: Some(path.to_owned()), ..open() };
        assert_eq!(socket(&format!("/{}", "x".repeat(106))).check(), Ok(()));
        for bad in [
            SnapshotOpen { writable: false, ..open() },
            SnapshotOpen { name: "a/b".to_owned(), ..open() },
            SnapshotOpen { name: String::new(), ..open() },
            socket(""),
            socket("relative"),
            socket("/a\nb"),
            socket(&format!("/{}", "x".repeat(107))),
        ] {
            assert_eq!(bad.check().unwrap_err().reason, reason::BAD_ARGUMENT, "{bad:?}");
        }
    }
}
