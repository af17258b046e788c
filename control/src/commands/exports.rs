//! NBD exports of snapshots and of their overlays.

use serde::{Deserialize, Serialize};

use super::Command;
use super::checks::check_nbd_text;
use crate::commands::Nothing;
use crate::service::CommandError;

/// Offers a snapshot over NBD.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NbdExportAdd {
    /// The export's name; may be empty, which is NBD's default export.
    pub name: String,
    /// The disk's name.
    pub disk: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// An older snapshot or a checkpoint of the disk: the export has exactly one context
    /// `qemu:dirty-bitmap:NAME`, what changed since. When absent it has one for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// What a client trims is released: its space in the difference store is given back, and it can never be
    /// read again. Only while no older snapshot of the disk looks through this one; else trims do nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub release_on_trim: bool,
    /// A text for people, at most 4096 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

impl Command for NbdExportAdd {
    const NAME: &'static str = "nbd-export-add";
    type Answer = ExportInfo;

    fn check(&self) -> Result<(), CommandError> {
        check_nbd_text("name", &self.name)?;
        check_nbd_text("description", self.description.as_deref().unwrap_or(""))
    }
}

/// Ends an export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NbdExportDel {
    /// The export's name.
    pub name: String,
}

impl Command for NbdExportDel {
    const NAME: &'static str = "nbd-export-del";
    type Answer = Nothing;
}

/// Asks for all exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryExports {}

impl Command for QueryExports {
    const NAME: &'static str = "query-exports";
    type Answer = Vec<ExportInfo>;
}

/// An NBD export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExportInfo {
    /// Its name on the NBD wire.
    pub name: String,
    /// The disk's name.
    pub disk: String,
    /// The snapshot it shows; absent for the live disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The overlay of the snapshot that it shows, if it can be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<String>,
    /// The `NAME` of each `qemu:dirty-bitmap:NAME` context it has.
    #[serde(default)]
    pub bitmaps: Vec<String>,
    /// The text given when it was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether its content cannot be changed.
    pub read_only: bool,
    /// Whether what a client trims is released.
    #[serde(default)]
    pub release_on_trim: bool,
    /// Clients connected now.
    pub clients: u32,
    /// Where to reach it, such as `nbd+unix:///NAME?socket=PATH`.
    pub uri: String,
}
