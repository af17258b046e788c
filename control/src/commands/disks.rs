//! Disks: what they are, what the guest does to them, how their tracker is.

use serde::{Deserialize, Serialize};

use super::{Command, RewindInfo, StoreInfo, Timestamp};

/// Asks for all disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueryDisks {}

impl Command for QueryDisks {
    const NAME: &'static str = "query-disks";
    type Answer = Vec<DiskInfo>;
}

/// Gives a disk another size, while it is served. What is new reads as zeros, and counts as changed.
///
/// The image becomes as long, unless it is a block device: that has to have the size already, and cannot become
/// smaller.
///
/// Analogue: QEMU's `block_resize`, which names the disk by `device` or `node-name`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockResize {
    /// The disk's name.
    pub disk: String,
    /// The new capacity in bytes: a multiple of the logical block size.
    pub size: u64,
    /// The disk may become smaller: what is past its new end is lost. Refused while a snapshot is held.
    #[serde(default)]
    pub shrink: bool,
}

impl Command for BlockResize {
    const NAME: &'static str = "block_resize";
    type Answer = BlockResized;
}

/// A disk that has the size that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockResized {
    /// The disk's name.
    pub disk: String,
    /// Its capacity in bytes.
    pub size: u64,
    /// Whether the front end was told. If not, the guest sees the new size when its front end connects
    /// again.
    pub announced: bool,
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
    /// The rewind that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewind: Option<RewindInfo>,
    /// Whether the history was exported: every change is refused, until the daemon ends.
    #[serde(default)]
    pub handed_over: bool,
    /// Where they are, and how much still fits.
    #[serde(default)]
    pub store: StoreInfo,
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
    /// Why the generation began, if this daemon began it: `new`, `damaged`, `host-stopped`, `image-changed`, `assumed-changed`,
    /// `block-size-changed`, `interrupted`, `epochs-exhausted` or `handed-over`; `kept` if the history went on.
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
