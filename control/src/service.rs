//! What the daemon does for the control plane: one method per verb, and how a verb fails.
//!
//! What always holds: arguments that reach a [`Service`] passed their types and
//! [`Command::check`](crate::commands::Command::check); whether a disk or a snapshot of that
//! name exists is for the service to say.
//!
//! Absent: `qmp_capabilities`, `query-version` and `query-commands`, which the server answers
//! by itself.

use serde::{Deserialize, Serialize};

use crate::commands::{
    AreaInfo, BlockResize, BlockResized, ChangeMap, ChangedBlocks, CheckpointCreate, CheckpointCreated,
    CheckpointDelete, CheckpointDeleted, CheckpointInfo, DiskInfo, DiskRevert, ExportInfo, IncrementalInfo,
    NbdExportAdd, NbdExportDel, Nothing, OverlayInfo, QueryChangeMap, QueryChangedBlocks, QueryCheckpoints,
    QueryDisks, QueryExports, QueryIncremental, QuerySnapshots, QueryStatus, QueryTracker, RewindInfo,
    SnapshotClose, SnapshotCreate, SnapshotCreated, SnapshotDelete, SnapshotDeleted, SnapshotInfo,
    SnapshotOpen, StatusInfo, StoreAppend, StoreLimit, TrackerDetails, TrackerDisable, TrackerEnable,
    TrackerExport, TrackerExported, TrackerMark, TrackerReset,
};

/// What a verb answers.
pub type Answer<T> = Result<T, CommandError>;

/// The daemon, as the control plane sees it.
///
/// Every client has its own thread, so methods run at the same time as each other; a method may
/// block as long as its work takes, and holds up only the client that asked. A method must not
/// call [`Server::stop`](crate::Server::stop).
pub trait Service: Send + Sync + 'static {
    /// How the daemon is.
    fn query_status(&self, arguments: QueryStatus) -> Answer<StatusInfo>;

    /// All disks, in the order of the configuration.
    fn query_disks(&self, arguments: QueryDisks) -> Answer<Vec<DiskInfo>>;

    /// Freezes disks at one instant: all of them or, with an error, none.
    fn snapshot_create(&self, arguments: SnapshotCreate) -> Answer<SnapshotCreated>;

    /// Lets go of a snapshot on some or all of its disks.
    fn snapshot_delete(&self, arguments: SnapshotDelete) -> Answer<SnapshotDeleted>;

    /// Opens a snapshot for writing.
    fn snapshot_open(&self, arguments: SnapshotOpen) -> Answer<OverlayInfo>;

    /// Discards what was written to a snapshot that was opened.
    fn snapshot_close(&self, arguments: SnapshotClose) -> Answer<Nothing>;

    /// Makes a disk one of its snapshots again.
    fn disk_revert(&self, arguments: DiskRevert) -> Answer<RewindInfo>;

    /// Adds an area to a difference store.
    fn store_append(&self, arguments: StoreAppend) -> Answer<AreaInfo>;

    /// Limits what snapshots hold.
    fn store_limit(&self, arguments: StoreLimit) -> Answer<Nothing>;

    /// Snapshots of one disk or of all, oldest first within a disk, with their overlays.
    fn query_snapshots(&self, arguments: QuerySnapshots) -> Answer<Vec<SnapshotInfo>>;

    /// One page of the ranges that changed between two instants.
    fn query_changed_blocks(&self, arguments: QueryChangedBlocks) -> Answer<ChangedBlocks>;

    /// Names the instant of a snapshot on all disks or, with an error, on none.
    fn checkpoint_create(&self, arguments: CheckpointCreate) -> Answer<CheckpointCreated>;

    /// Deletes a checkpoint on some or all of its disks.
    fn checkpoint_delete(&self, arguments: CheckpointDelete) -> Answer<CheckpointDeleted>;

    /// Checkpoints of one disk or of all, oldest first.
    fn query_checkpoints(&self, arguments: QueryCheckpoints) -> Answer<Vec<CheckpointInfo>>;

    /// Per disk, whether the next backup can be incremental.
    fn query_incremental(&self, arguments: QueryIncremental) -> Answer<Vec<IncrementalInfo>>;

    /// Makes a disk larger.
    fn block_resize(&self, arguments: BlockResize) -> Answer<BlockResized>;

    /// Marks ranges as changed, for the next instant.
    fn tracker_mark(&self, arguments: TrackerMark) -> Answer<Nothing>;

    /// Begins a new generation of a disk's history.
    fn tracker_reset(&self, arguments: TrackerReset) -> Answer<TrackerDetails>;

    /// Tracks the changes of a disk again.
    fn tracker_enable(&self, arguments: TrackerEnable) -> Answer<TrackerDetails>;

    /// Tracks the changes of a disk no more.
    fn tracker_disable(&self, arguments: TrackerDisable) -> Answer<TrackerDetails>;

    /// How the trackers of one disk or of all are.
    fn query_tracker(&self, arguments: QueryTracker) -> Answer<Vec<TrackerDetails>>;

    /// How recently, and how much, each part of a disk has changed.
    fn query_change_map(&self, arguments: QueryChangeMap) -> Answer<ChangeMap>;

    /// Exports a disk's history for another host, and hands the disk over.
    fn tracker_export(&self, arguments: TrackerExport) -> Answer<TrackerExported>;

    /// Offers a snapshot over NBD.
    fn nbd_export_add(&self, arguments: NbdExportAdd) -> Answer<ExportInfo>;

    /// Ends an export; its clients are disconnected.
    fn nbd_export_del(&self, arguments: NbdExportDel) -> Answer<Nothing>;

    /// All exports, by name.
    fn query_exports(&self, arguments: QueryExports) -> Answer<Vec<ExportInfo>>;

    /// Asks the daemon to stop. The client has its answer by then, or is gone.
    ///
    /// Returns at once; the stopping itself happens on another thread.
    fn quit(&self);
}

/// QEMU's classes of errors; clients that know only these keep working.
///
/// Analogue: `qapi/error.json, QapiErrorClass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything that the others do not say; look at the reason.
    GenericError,
    /// No such verb, or not yet.
    CommandNotFound,
    /// The thing exists and is not in use as the verb needs it.
    DeviceNotActive,
    /// No disk, snapshot or export of that name.
    DeviceNotFound,
    /// Never sent; part of QEMU's list.
    KVMMissingCap,
}

/// Why a verb failed, for three readers: a QMP client (`class`), a program (`reason`) and a
/// person (`desc`).
///
/// On the wire `{"class":…,"desc":…,"x-reason":…}`. `x-reason` is a stable code, see [`reason`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub struct CommandError {
    /// QEMU's class.
    pub class: ErrorClass,
    /// A stable code in kebab case that programs decide by.
    #[serde(rename = "x-reason")]
    pub reason: &'static str,
    /// One sentence that says what is wrong and, where it can, what to do.
    pub desc: String,
}

impl CommandError {
    /// An error of class `GenericError`.
    pub fn generic(reason: &'static str, desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, reason, desc)
    }

    /// An error of class `DeviceNotFound`.
    pub fn not_found(reason: &'static str, desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::DeviceNotFound, reason, desc)
    }

    /// An error of any class.
    pub fn new(class: ErrorClass, reason: &'static str, desc: impl Into<String>) -> Self {
        Self { class, reason, desc: desc.into() }
    }
}

/// The codes of [`CommandError::reason`] that more than one crate needs.
///
/// A code once published keeps its meaning. Services may add their own.
pub mod reason {
    /// Bytes in which no request could be found.
    pub const BAD_JSON: &str = "bad-json";
    /// JSON that is no request.
    pub const BAD_REQUEST: &str = "bad-request";
    /// A verb before `qmp_capabilities`, or `qmp_capabilities` a second time.
    pub const NEGOTIATION: &str = "negotiation";
    /// No verb of that name.
    pub const UNKNOWN_COMMAND: &str = "unknown-command";
    /// An argument that the verb does not have.
    pub const UNKNOWN_ARGUMENT: &str = "unknown-argument";
    /// An argument that the verb needs is not there.
    pub const MISSING_ARGUMENT: &str = "missing-argument";
    /// An argument of another type or out of its range.
    pub const BAD_ARGUMENT: &str = "bad-argument";
    /// The answer would be longer than a client reads; ask for less.
    pub const ANSWER_TOO_LONG: &str = "answer-too-long";
    /// More clients than the server has places for.
    pub const TOO_MANY_CLIENTS: &str = "too-many-clients";
    /// No disk of that name.
    pub const DISK_NOT_FOUND: &str = "disk-not-found";
    /// No snapshot of that name on that disk; where a checkpoint or a change id would do, none of these either.
    pub const SNAPSHOT_NOT_FOUND: &str = "snapshot-not-found";
    /// A snapshot of that name exists already.
    pub const SNAPSHOT_EXISTS: &str = "snapshot-exists";
    /// The snapshot can no longer be read.
    pub const SNAPSHOT_BROKEN: &str = "snapshot-broken";
    /// The snapshot is open for writing; close its overlays first.
    pub const SNAPSHOT_IN_USE: &str = "snapshot-in-use";
    /// No overlay of that name on that snapshot.
    pub const OVERLAY_NOT_FOUND: &str = "overlay-not-found";
    /// An overlay of that name exists already.
    pub const OVERLAY_EXISTS: &str = "overlay-exists";
    /// A front end is connected to the overlay; take it away first, or say `force`.
    pub const OVERLAY_IN_USE: &str = "overlay-in-use";
    /// A front end is connected to the disk; take it away first, or say `force`.
    pub const DISK_IN_USE: &str = "disk-in-use";
    /// A rewind of the disk is under way; wait until it is complete.
    pub const REWIND_ACTIVE: &str = "rewind-active";
    /// Snapshots of the disk are held; delete them first.
    pub const SNAPSHOTS_HELD: &str = "snapshots-held";
    /// The disk had another size at the snapshot's instant.
    pub const CAPACITY_DIFFERS: &str = "capacity-differs";
    /// No checkpoint of that name on that disk.
    pub const CHECKPOINT_NOT_FOUND: &str = "checkpoint-not-found";
    /// A checkpoint of that name exists already.
    pub const CHECKPOINT_EXISTS: &str = "checkpoint-exists";
    /// Changes up to the checkpoint cannot be told any more: its file is damaged. Changes since it can.
    pub const CHECKPOINT_DAMAGED: &str = "checkpoint-damaged";
    /// A snapshot and a checkpoint of different instants have that name; say the change id.
    pub const AMBIGUOUS_NAME: &str = "ambiguous-name";
    /// A text with a `/` that is no change id.
    pub const BAD_CHANGE_ID: &str = "bad-change-id";
    /// The change id belongs to another disk of this daemon.
    pub const OTHER_DISK: &str = "other-disk";
    /// The change id belongs to another generation: a full backup is needed.
    pub const GENERATION_DIFFERS: &str = "generation-differs";
    /// The older instant is not older than the younger one.
    pub const SINCE_NOT_OLDER: &str = "since-not-older";
    /// Tracking of the disk is off: a full backup is needed.
    pub const TRACKING_OFF: &str = "tracking-off";
    /// The disk is served for reading only.
    pub const READ_ONLY: &str = "read-only";
    /// No export of that name.
    pub const EXPORT_NOT_FOUND: &str = "export-not-found";
    /// An export of that name exists already.
    pub const EXPORT_EXISTS: &str = "export-exists";
    /// The daemon has no NBD server.
    pub const NBD_OFF: &str = "nbd-off";
    /// A path that cannot hold old content of this disk; nothing was written to it.
    pub const STORE_REFUSED: &str = "store-refused";
    /// A limit below what is in use; nothing changed.
    pub const LIMIT_IN_USE: &str = "limit-in-use";
    /// The disk's history was exported; nothing of it can be changed here any more.
    pub const HANDED_OVER: &str = "handed-over";
    /// A history that cannot be moved as it is.
    pub const NOT_MOVABLE: &str = "not-movable";
    /// There is a file of that name already.
    pub const FILE_EXISTS: &str = "file-exists";
    /// The gate could not close in time; nothing changed.
    pub const GATE_TIMEOUT: &str = "gate-timeout";
    /// An operation on the host failed.
    pub const IO: &str = "io";
    /// The daemon is not yet, or no longer, able to serve the verb.
    pub const NOT_READY: &str = "not-ready";
}
