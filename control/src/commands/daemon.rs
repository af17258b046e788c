//! Verbs about the daemon itself: negotiation, version, status, the end.

use serde::{Deserialize, Serialize};

use super::Command;
use crate::commands::Nothing;
use crate::service::{CommandError, reason};

/// Ends the negotiation; the first verb of every client, and accepted once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QmpCapabilities {
    /// Capabilities to switch on. The greeting offers none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub enable: Vec<String>,
}

impl Command for QmpCapabilities {
    const NAME: &'static str = "qmp_capabilities";
    type Answer = Nothing;

    fn check(&self) -> Result<(), CommandError> {
        if self.enable.is_empty() {
            return Ok(());
        }
        let desc = format!("Capability {} not available", self.enable.join(", "));
        Err(CommandError::generic(reason::BAD_ARGUMENT, desc))
    }
}

/// Asks which daemon this is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryVersion {}

impl Command for QueryVersion {
    const NAME: &'static str = "query-version";
    type Answer = VersionInfo;
}

/// The daemon's version, in QEMU's shape: clients of QMP look for the member `qemu`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// The version of Ebbtide, in spite of the name.
    pub qemu: VersionTriple,
    /// Name and version in one text, `Ebbtide 0.1.0`.
    pub package: String,
}

/// A version in three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionTriple {
    /// Changes where users must change something.
    pub major: u32,
    /// Changes with features.
    pub minor: u32,
    /// Changes with corrections.
    pub micro: u32,
}

impl VersionInfo {
    /// The version of this build.
    pub fn current() -> Self {
        let part = |text: &str| text.parse().unwrap_or(0);
        Self {
            qemu: VersionTriple {
                major: part(env!("CARGO_PKG_VERSION_MAJOR")),
                minor: part(env!("CARGO_PKG_VERSION_MINOR")),
                micro: part(env!("CARGO_PKG_VERSION_PATCH")),
            },
            package: concat!("Ebbtide ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// Asks which verbs there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryCommands {}

impl Command for QueryCommands {
    const NAME: &'static str = "query-commands";
    type Answer = Vec<CommandInfo>;
}

/// A verb.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInfo {
    /// Its name on the wire.
    pub name: String,
}

/// Asks how the daemon is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryStatus {}

impl Command for QueryStatus {
    const NAME: &'static str = "query-status";
    type Answer = StatusInfo;
}

/// How the daemon is. `running` and `status` are QEMU's members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StatusInfo {
    /// Whether all disks are served.
    pub running: bool,
    /// What the daemon is doing.
    pub status: RunState,
    /// Its process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime: u64,
    /// How many disks it has.
    pub disks: u32,
    /// How many snapshots they have together, each disk's counted by itself.
    pub snapshots: u32,
    /// The control socket's path.
    pub control_socket: String,
    /// The NBD server's address as a URI without an export name, if there is a server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd: Option<String>,
}

/// What the daemon is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Recovering; disks are not yet served.
    Starting,
    /// Serving.
    Running,
    /// On its way out.
    Stopping,
}

/// Stops the daemon. Snapshots and change tracking stay on disk for its next start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quit {}

impl Command for Quit {
    const NAME: &'static str = "quit";
    type Answer = Nothing;
}
