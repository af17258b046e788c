//! The verbs: their arguments, their answers, and what can be checked without the engine.
//!
//! Everything is kebab case on the wire and plain text and numbers in Rust: conversion to the
//! engine's types happens in the daemon, so that neither side's names bind the other.
//!
//! What always holds: arguments refuse members they do not know, so that a mistyped one is an
//! error and not a default; answers accept them, so that an old client reads a new daemon.
//! Fields are added to answers, never taken away or given another meaning.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::service::{CommandError, reason};

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
    SnapshotCreate::NAME,
    SnapshotDelete::NAME,
];

/// An instant of the host's clock, as QMP's events carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: u32,
}

impl Timestamp {
    /// Now.
    pub fn now() -> Self {
        std::time::SystemTime::now().into()
    }
}

impl From<std::time::SystemTime> for Timestamp {
    /// An instant before 1970 becomes 1970.
    fn from(time: std::time::SystemTime) -> Self {
        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            microseconds: since.subsec_micros(),
        }
    }
}

/// UTC, to the second: `2026-11-22 15:51:12Z`.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days = self.seconds.div_euclid(86_400);
        let second = self.seconds.rem_euclid(86_400);
        // Days to civil date, in eras of 400 years that begin on a 1 March: Howard Hinnant,
        // "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = (shifted_month + 2) % 12 + 1;
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let (hour, minute) = (second / 3_600, second / 60 % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}Z", second % 60)
    }
}

/// The answer of verbs that answer nothing: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nothing {}

// --- qmp_capabilities ---------------------------------------------------------------------

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

// --- query-version ------------------------------------------------------------------------

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

// --- query-commands -----------------------------------------------------------------------

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

// --- query-status -------------------------------------------------------------------------

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

// --- query-disks --------------------------------------------------------------------------

/// Asks for all disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryDisks {}

impl Command for QueryDisks {
    const NAME: &'static str = "query-disks";
    type Answer = Vec<DiskInfo>;
}

/// A disk and how it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskInfo {
    /// The name by which verbs and exports know it.
    pub name: String,
    /// The image's path on the host.
    pub image: String,
    /// The directory of its tracker and snapshots.
    pub state_directory: String,
    /// Capacity in bytes.
    pub size: u64,
    /// Logical block size that the guest sees, in bytes.
    pub block_size: u32,
    /// Virtqueues offered.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// Whether a completed write may still be in a volatile cache until a flush.
    pub writeback: bool,
    /// The serial number that the guest reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// The vhost-user socket's path, unless the front end came with a connected descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Whether a front end (QEMU, cloud-hypervisor, …) is connected.
    pub connected: bool,
    /// Change tracking.
    pub tracker: TrackerInfo,
    /// What the guest did since the daemon started.
    pub io: IoCounters,
    /// Snapshots held, broken ones included.
    pub snapshots: u32,
    /// Bytes that its difference stores take on the host.
    pub held: u64,
}

/// Change tracking of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrackerInfo {
    /// Whether changes are recorded. If not, no change id is valid and a full backup is needed.
    pub on: bool,
    /// The UUID of the unbroken history that now runs.
    pub generation: String,
    /// The epoch that writes are now marked with.
    pub epoch: u64,
    /// The last completed epoch as a change id, `GENERATION/EPOCH`.
    pub change_id: String,
    /// Unit of tracking in bytes.
    pub block_size: u64,
    /// When the generation began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<Timestamp>,
    /// Why the generation began, or why tracking is off: a code such as `new-disk`,
    /// `host-crash`, `image-changed`.
    pub reason: String,
}

/// Counters since the daemon started; they wrap after 2⁶⁴.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct IoCounters {
    /// Read requests completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests completed.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flush requests completed.
    pub flushes: u64,
    /// Discard requests completed.
    pub discards: u64,
    /// Bytes discarded.
    pub discard_bytes: u64,
    /// Write-zeroes requests completed.
    pub write_zeroes: u64,
    /// Requests that failed, refused ones included.
    pub errors: u64,
    /// Bytes of old content preserved for snapshots.
    pub preserved_bytes: u64,
}

// --- snapshot-create ----------------------------------------------------------------------

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
}

impl Command for SnapshotCreate {
    const NAME: &'static str = "snapshot-create";
    type Answer = SnapshotCreated;

    fn check(&self) -> Result<(), CommandError> {
        check_name("name", &self.name)?;
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

// --- snapshot-delete ----------------------------------------------------------------------

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

// --- query-snapshots ----------------------------------------------------------------------

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
    /// Bytes that its difference store takes on the host.
    pub held: u64,
    /// Names of the NBD exports that read it.
    #[serde(default)]
    pub exports: Vec<String>,
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

// --- query-changed-blocks -----------------------------------------------------------------

/// Asks what changed between an older instant and a snapshot.
///
/// Answers come in pages. For whole backups read the export's `qemu:dirty-bitmap:` context
/// over NBD instead: it is made for bulk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryChangedBlocks {
    /// The disk's name.
    pub disk: String,
    /// The older instant: a change id `GENERATION/EPOCH`, or the name of an older snapshot of
    /// the disk. Names contain no `/`; see [`since`](Self::since).
    pub since: String,
    /// The snapshot that holds the younger instant.
    pub snapshot: String,
    /// First byte of interest; 0 when absent. To go on, the previous page's `next-offset`.
    #[serde(default)]
    pub offset: u64,
    /// How many ranges the page has at most.
    #[serde(default)]
    pub limit: PageLimit,
}

/// The older instant of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since<'a> {
    /// A text meant as a change id, not yet parsed.
    ChangeId(&'a str),
    /// The name of a snapshot.
    Snapshot(&'a str),
}

impl QueryChangedBlocks {
    /// What kind of text `since` is.
    pub fn since(&self) -> Since<'_> {
        if self.since.contains('/') { Since::ChangeId(&self.since) } else { Since::Snapshot(&self.since) }
    }
}

impl Command for QueryChangedBlocks {
    const NAME: &'static str = "query-changed-blocks";
    type Answer = ChangedBlocks;
}

/// How many ranges a page has at most: 1 to 65536, 1024 when absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u64", try_from = "u64")]
pub struct PageLimit(u32);

impl PageLimit {
    /// The largest page. About 3 MB of JSON, well below what clients read in one line.
    pub const MAX: Self = Self(65_536);

    /// The limit as a number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl Default for PageLimit {
    fn default() -> Self {
        Self(1_024)
    }
}

impl From<PageLimit> for u64 {
    fn from(limit: PageLimit) -> Self {
        limit.0.into()
    }
}

impl TryFrom<u64> for PageLimit {
    type Error = PageLimitError;

    fn try_from(ranges: u64) -> Result<Self, PageLimitError> {
        match u32::try_from(ranges) {
            Ok(limit) if (1..=Self::MAX.0).contains(&limit) => Ok(Self(limit)),
            _ => Err(PageLimitError(ranges)),
        }
    }
}

/// A page of no ranges, or of too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not between 1 and 65536")]
pub struct PageLimitError(u64);

/// A page of changed ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedBlocks {
    /// The disk's name.
    pub disk: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// The older instant as a change id, however it was asked for.
    pub since: String,
    /// The snapshot's change id: the `since` of the next backup.
    pub until: String,
    /// Size of the frozen image in bytes.
    pub size: u64,
    /// Unit of tracking in bytes: ranges begin at multiples of it.
    pub block_size: u64,
    /// What changed, in ascending order, no two touching; it may have been written with the
    /// same content. Ranges begin at or after the `offset` asked for.
    pub ranges: Vec<ChangedRange>,
    /// Where the next page begins; null when this is the last.
    pub next_offset: Option<u64>,
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

// --- nbd-export-add, nbd-export-del, query-exports ----------------------------------------

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
    /// An older snapshot of the disk: the export has exactly one context
    /// `qemu:dirty-bitmap:NAME`, what changed since. When absent it has one for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
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
    /// The `NAME` of each `qemu:dirty-bitmap:NAME` context it has.
    #[serde(default)]
    pub bitmaps: Vec<String>,
    /// The text given when it was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether clients may only read.
    pub read_only: bool,
    /// Clients connected now.
    pub clients: u32,
    /// Where to reach it, such as `nbd+unix:///NAME?socket=PATH`.
    pub uri: String,
}

// --- quit ---------------------------------------------------------------------------------

/// Stops the daemon. Snapshots and change tracking stay on disk for its next start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quit {}

impl Command for Quit {
    const NAME: &'static str = "quit";
    type Answer = Nothing;
}

// --- checks -------------------------------------------------------------------------------

/// Refuses names that a snapshot cannot have.
///
/// A name has 1 to 128 ASCII letters, digits and `. _ - + :`, and begins with a letter or a
/// digit. So it is never taken for a change id (`/`), never ambiguous in an export's
/// `DISK@SNAPSHOT`, fits NBD's limits, and is safe in file names, URIs and on a terminal.
///
/// # Errors
/// Names `argument`, and says what a name looks like.
pub fn check_name(argument: &str, name: &str) -> Result<(), CommandError> {
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+:".contains(c);
    if starts && name.len() <= 128 && name.chars().all(plain) {
        return Ok(());
    }
    Err(bad_argument(argument, "1 to 128 letters, digits or any of '._-+:', the first a letter or digit"))
}

/// NBD proto.md, "Values": strings have at most 4096 bytes.
fn check_nbd_text(argument: &str, text: &str) -> Result<(), CommandError> {
    if text.len() <= 4096 && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(bad_argument(argument, "at most 4096 bytes without control characters"))
}

fn check_disks(disks: Option<&[String]>) -> Result<(), CommandError> {
    let Some(disks) = disks else { return Ok(()) };
    let distinct: BTreeSet<_> = disks.iter().collect();
    if !disks.is_empty() && distinct.len() == disks.len() {
        return Ok(());
    }
    Err(bad_argument("disks", "at least one disk, none of them twice; leave it out to mean all"))
}

fn bad_argument(argument: &str, expected: &str) -> CommandError {
    CommandError::generic(reason::BAD_ARGUMENT, format!("Parameter '{argument}' expects {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_read_as_utc() {
        let shown = |seconds| Timestamp { seconds, microseconds: 0 }.to_string();
        assert_eq!(shown(0), "1970-01-01 00:00:00Z");
        assert_eq!(shown(951_782_399), "2000-02-28 23:59:59Z");
        assert_eq!(shown(951_782_400), "2000-02-29 00:00:00Z");
        assert_eq!(shown(1_795_362_672), "2026-11-22 15:51:12Z");
        assert_eq!(shown(4_107_542_400), "2100-03-01 00:00:00Z");
        assert_eq!(shown(-1), "1969-12-31 23:59:59Z");
    }

    #[test]
    fn names_that_would_be_ambiguous_or_unsafe_are_refused() {
        for good in ["s1", "2026-11-22T15:51:12", "a.b_c+d", &"x".repeat(128)] {
            assert_eq!(check_name("name", good), Ok(()), "{good}");
        }
        for bad in ["", "a/1", "a@b", "-x", ".x", "a b", "é", "a\n", &"x".repeat(129)] {
            let error = check_name("name", bad).unwrap_err();
            assert_eq!(error.reason, reason::BAD_ARGUMENT, "{bad}");
        }
    }

    #[test]
    fn a_change_id_is_told_from_a_name_by_its_slash() {
        let query = |since: &str| QueryChangedBlocks { since: since.to_owned(), ..Default::default() };
        assert_eq!(query("g/7").since(), Since::ChangeId("g/7"));
        assert_eq!(query("s1").since(), Since::Snapshot("s1"));
    }

    #[test]
    fn disks_named_twice_or_not_at_all_are_refused() {
        let with = |disks: &[&str]| SnapshotCreate {
            name: "s".to_owned(),
            disks: Some(disks.iter().map(|&d| d.to_owned()).collect()),
        };
        assert_eq!(with(&["a", "b"]).check(), Ok(()));
        assert!(with(&[]).check().is_err());
        assert!(with(&["a", "b", "a"]).check().is_err());
    }

    #[test]
    fn the_wire_is_kebab_case_and_the_last_page_says_null() {
        let page = ChangedBlocks {
            disk: "vda".to_owned(),
            snapshot: "s2".to_owned(),
            since: "g/1".to_owned(),
            until: "g/2".to_owned(),
            size: 1 << 30,
            block_size: 65_536,
            ranges: vec![ChangedRange { offset: 0, length: 65_536 }],
            next_offset: None,
        };
        let expected = r#"{"disk":"vda","snapshot":"s2","since":"g/1","until":"g/2","size":1073741824,"block-size":65536,"ranges":[{"offset":0,"length":65536}],"next-offset":null}"#;
        assert_eq!(serde_json::to_string(&page).unwrap(), expected);
    }

    #[test]
    fn a_full_page_of_far_away_ranges_fits_a_line() {
        let range = ChangedRange { offset: u64::MAX, length: u64::MAX };
        let length = serde_json::to_string(&range).unwrap().len() + 1;
        let page = length * PageLimit::MAX.get() as usize;
        assert!(page + 4096 < crate::wire::MAX_ANSWER_BYTES);
    }

    #[test]
    fn verbs_are_listed_by_name() {
        assert!(VERBS[1..].is_sorted());
    }
}
