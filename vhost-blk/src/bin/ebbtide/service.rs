//! The control plane's verbs, carried out on the engine.
//!
//! Invariant: verbs that change which snapshots and overlays there are run one at a time (by [`Upkeep`]);
//! all others run beside them and beside each other.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use control::commands::{
    AreaInfo, BlockResize, BlockResized, ChangeMap, ChangedBlocks, CheckpointCreate, CheckpointCreated,
    CheckpointDelete, CheckpointDeleted, CheckpointInfo, DiskInfo, DiskRevert, ExportInfo, IncrementalInfo,
    IoCounters, MarkRange, NbdExportAdd, NbdExportDel, Nothing, OnOverflow, OverlayInfo, QueryChangeMap,
    QueryChangedBlocks, QueryCheckpoints, QueryDisks, QueryExports, QueryIncremental, QuerySnapshots,
    QueryStatus, QueryTracker, RewindInfo, RunState, SnapshotClose, SnapshotCreate, SnapshotCreated,
    SnapshotDelete, SnapshotDeleted, SnapshotInfo, SnapshotOpen, SnapshotPoint, SnapshotState, StatusInfo,
    StoreAppend, StoreLimit, Timestamp, TrackerDetails, TrackerDisable, TrackerEnable, TrackerExport,
    TrackerExported, TrackerInfo, TrackerMark, TrackerReset,
};
use control::service::{Answer, reason};
use control::{CommandError, Event, EventHub, Service};
use cow_engine::cbt::{BlockGrid, ByteRange};
use cow_engine::group;
use cow_engine::host::{Executor, HostStorage};
use cow_engine::{AreaSpec, Began, Budget, Disk, Error, Snapshot, Terms};

use crate::args::is_part;
use crate::catalog::{Catalog, no_disk};
use crate::maintenance::Upkeep;
use crate::overlays::Overlays;
use crate::serve::Served;
use crate::space;
use crate::stop::Stop;

/// Submissions of a verb between two system calls.
const RING_ENTRIES: u32 = 16;
/// Keys that a query looks at to tell what deletions would free: some tenths of a second.
const FREED_LOOKS: u64 = 1 << 20;

/// What the control socket reaches.
pub(crate) struct ControlService {
    pub(crate) disks: Arc<Vec<Served>>,
    pub(crate) upkeep: Upkeep,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) overlays: Arc<Overlays>,
    pub(crate) hub: EventHub,
    /// The limit of all disks' difference stores.
    pub(crate) budget: Arc<Budget>,
    pub(crate) stop: Stop,
    pub(crate) started: Instant,
    pub(crate) control_socket: String,
}

impl ControlService {
    fn served(&self, name: &str) -> Answer<&Served> {
        self.disks.iter().find(|served| served.spec.name == name).ok_or_else(|| no_disk(name))
    }

    /// A disk whose tracking may be switched on or off.
    fn switchable(&self, name: &str) -> Answer<&Disk<HostStorage>> {
        let served = self.served(name)?;
        if served.spec.read_only {
            let text = format!("Disk '{name}' is read-only: there are no changes to track");
            return Err(CommandError::generic(reason::READ_ONLY, text));
        }
        Ok(&served.disk)
    }

    /// The disks that were named, or all.
    pub(crate) fn chosen(&self, names: Option<Vec<String>>) -> Answer<Vec<Arc<Disk<HostStorage>>>> {
        match names {
            Some(names) => names.iter().map(|name| Ok(self.served(name)?.disk.clone())).collect(),
            None => Ok(self.disks.iter().map(|served| served.disk.clone()).collect()),
        }
    }
}

impl Service for ControlService {
    fn query_status(&self, _: QueryStatus) -> Answer<StatusInfo> {
        let snapshots = self.disks.iter().map(|served| served.disk.snapshots().len()).sum::<usize>();
        Ok(StatusInfo {
            running: !self.stop.is_set(),
            status: if self.stop.is_set() { RunState::Stopping } else { RunState::Running },
            pid: std::process::id(),
            uptime: self.started.elapsed().as_secs(),
            disks: count(self.disks.len()),
            snapshots: count(snapshots),
            control_socket: self.control_socket.clone(),
            nbd: self.catalog.address(),
        })
    }

    fn query_disks(&self, _: QueryDisks) -> Answer<Vec<DiskInfo>> {
        Ok(self.disks.iter().map(describe).collect())
    }

    fn snapshot_create(&self, arguments: SnapshotCreate) -> Answer<SnapshotCreated> {
        let disks = self.chosen(arguments.disks)?;
        let now = SystemTime::now();
        let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let created_ns = u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX);
        let name = arguments.name;
        let terms = Terms {
            on_overflow: match arguments.on_overflow {
                OnOverflow::BreakSnapshot => cow_engine::OnOverflow::BreakSnapshot,
                OnOverflow::HoldWrites => cow_engine::OnOverflow::HoldWrites,
                OnOverflow::FailWrites => cow_engine::OnOverflow::FailWrites,
            },
            hold_seconds: arguments.hold_deadline.unwrap_or(Terms::HOLD_SECONDS),
            limit: arguments.limit.unwrap_or(0),
        };
        // Until the sizes are told, which a resize may change.
        let mut admin = self.upkeep.admin();
        let instant = on_ring(async |io| {
            let patience = group::GATE_DEADLINE;
            group::create_on(&mut admin, &io, &disks, &name, created_ns, patience, terms).await
        })?;
        let points: Vec<_> = instant
            .taken
            .iter()
            .zip(&disks)
            .map(|(taken, disk)| SnapshotPoint {
                disk: taken.disk.clone(),
                change_id: taken.change_id.to_string(),
                size: disk.capacity(),
            })
            .collect();
        drop(admin);
        self.hub.post(&Event::SnapshotCreated { name: name.clone(), disks: points.clone() });
        Ok(SnapshotCreated {
            name,
            created: Timestamp::from(now),
            held_writes_us: u64::try_from(instant.held.as_micros()).unwrap_or(u64::MAX),
            disks: points,
        })
    }

    fn snapshot_delete(&self, arguments: SnapshotDelete) -> Answer<SnapshotDeleted> {
        let name = arguments.name;
        let all = arguments.disks.is_none();
        let _admin = self.upkeep.admin();
        let mut disks = self.chosen(arguments.disks)?;
        if all {
            disks.retain(|disk| disk.snapshot(&name).is_ok());
        }
        if disks.is_empty() {
            let text = format!("No disk has a snapshot '{name}'");
            return Err(CommandError::not_found(reason::SNAPSHOT_NOT_FOUND, text));
        }
        for disk in &disks {
            disk.check_deletable(&name).map_err(explain)?;
        }
        let mut deleted = Vec::new();
        let result = disks.iter().try_for_each(|disk| {
            on_ring(async |io| disk.delete_snapshot(&io, &name).await)?;
            self.catalog.forget(disk.name(), &name);
            deleted.push(disk.name().to_owned());
            Ok(())
        });
        if !deleted.is_empty() {
            self.upkeep.nudge();
            self.hub.post(&Event::SnapshotDeleted { name: name.clone(), disks: deleted.clone() });
        }
        result.map(|()| SnapshotDeleted { name, disks: deleted })
    }

    fn store_append(&self, arguments: StoreAppend) -> Answer<AreaInfo> {
        let disk = self.served(&arguments.disk)?.disk.clone();
        let path = std::path::Path::new(&arguments.path);
        if let Some(served) = self.disks.iter().find(|served| is_part(path, &served.spec.path)) {
            let text = format!("'{}' is, or is on, the disk '{}' itself", arguments.path, served.spec.name);
            return Err(CommandError::generic(reason::STORE_REFUSED, text));
        }
        let spec = AreaSpec { path: arguments.path, bytes: arguments.size };
        let mut admin = self.upkeep.admin();
        on_ring(async |io| disk.append_area(&mut admin, &io, &spec).await)?;
        let areas = disk.areas();
        let added = areas.iter().find(|area| area.path == spec.path);
        added.map(space::describe).ok_or_else(|| CommandError::generic(reason::IO, "The area is gone again"))
    }

    fn store_limit(&self, arguments: StoreLimit) -> Answer<Nothing> {
        let _admin = self.upkeep.admin();
        let StoreLimit { disk, snapshot, bytes } = arguments;
        match (disk, snapshot) {
            (Some(disk), Some(snapshot)) => {
                let disk = &self.served(&disk)?.disk;
                on_ring(async |io| disk.limit_snapshot(&io, &snapshot, bytes).await)?;
            }
            (Some(disk), None) => self.served(&disk)?.disk.limit_store(bytes).map_err(explain)?,
            (None, _) => {
                self.budget.set_limit(bytes).map_err(explain)?;
                self.disks.iter().for_each(|served| served.disk.retry_held());
            }
        }
        Ok(Nothing {})
    }

    fn snapshot_open(&self, arguments: SnapshotOpen) -> Answer<OverlayInfo> {
        let _admin = self.upkeep.admin();
        self.overlays.open(&arguments)
    }

    fn snapshot_close(&self, arguments: SnapshotClose) -> Answer<Nothing> {
        let _admin = self.upkeep.admin();
        self.overlays.close(&arguments).map(|()| Nothing {})
    }

    fn disk_revert(&self, arguments: DiskRevert) -> Answer<RewindInfo> {
        let served = self.served(&arguments.disk)?;
        if served.spec.read_only {
            let text = format!("The disk '{}' is served read-only", arguments.disk);
            return Err(CommandError::generic(reason::READ_ONLY, text));
        }
        let mut admin = self.upkeep.admin();
        if served.device.is_connected() && !arguments.force {
            let text = format!(
                "A front end is connected to the disk '{}', whose guest would go on with what it has in memory: stop it first, or say 'force'",
                arguments.disk
            );
            return Err(CommandError::generic(reason::DISK_IN_USE, text));
        }
        let (disk, name) = (&served.disk, &arguments.snapshot);
        let rewind = on_ring(async |io| disk.revert(&mut admin, &io, name, group::GATE_DEADLINE).await)?;
        self.upkeep.nudge();
        Ok(rewind_info(rewind))
    }

    fn query_snapshots(&self, arguments: QuerySnapshots) -> Answer<Vec<SnapshotInfo>> {
        let disks = self.chosen(arguments.disk.map(|disk| vec![disk]))?;
        let mut all: Vec<_> = disks
            .iter()
            .flat_map(|disk| disk.snapshots().into_iter().map(|snapshot| (disk.clone(), snapshot)))
            .collect();
        all.sort_by_key(|(_, snapshot)| snapshot.created_ns());
        let looks = FREED_LOOKS / (all.len() as u64).max(1);
        Ok(all
            .iter()
            .map(|(disk, snapshot)| SnapshotInfo {
                name: snapshot.name().to_owned(),
                disk: disk.name().to_owned(),
                change_id: snapshot.change_id().to_string(),
                created: Timestamp::from(time_of(snapshot)),
                size: snapshot.capacity(),
                state: if snapshot.broken().is_some() {
                    SnapshotState::Broken
                } else {
                    SnapshotState::Active
                },
                reason: snapshot.broken().map(str::to_owned),
                broken_time: snapshot.broken_when().and_then(|(ns, _)| {
                    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(ns);
                    (ns != 0).then(|| Timestamp::from(time))
                }),
                errno: snapshot.broken_when().map(|(_, errno)| errno).filter(|errno| *errno != 0),
                on_overflow: match snapshot.terms().on_overflow {
                    cow_engine::OnOverflow::BreakSnapshot => OnOverflow::BreakSnapshot,
                    cow_engine::OnOverflow::HoldWrites => OnOverflow::HoldWrites,
                    cow_engine::OnOverflow::FailWrites => OnOverflow::FailWrites,
                },
                hold_deadline: Some(snapshot.terms())
                    .filter(|terms| terms.on_overflow == cow_engine::OnOverflow::HoldWrites)
                    .map(|terms| terms.hold_seconds),
                limit: Some(snapshot.terms().limit).filter(|limit| *limit != 0),
                held: snapshot.bytes_held(),
                bytes_freed_by_delete: disk.bytes_freed_by_delete(snapshot, looks),
                released: snapshot.bytes_released(),
                exports: self.catalog.names_of(disk.name(), snapshot.name()),
                overlays: self.overlays.of(disk.name(), snapshot.name()),
            })
            .collect())
    }

    fn query_changed_blocks(&self, arguments: QueryChangedBlocks) -> Answer<ChangedBlocks> {
        self.compare(arguments)
    }

    fn checkpoint_create(&self, arguments: CheckpointCreate) -> Answer<CheckpointCreated> {
        self.make_checkpoint(arguments)
    }

    fn checkpoint_delete(&self, arguments: CheckpointDelete) -> Answer<CheckpointDeleted> {
        self.drop_checkpoint(arguments)
    }

    fn query_checkpoints(&self, arguments: QueryCheckpoints) -> Answer<Vec<CheckpointInfo>> {
        self.list_checkpoints(arguments.disk)
    }

    fn query_incremental(&self, arguments: QueryIncremental) -> Answer<Vec<IncrementalInfo>> {
        self.is_incremental(&arguments.since, arguments.disks)
    }

    fn block_resize(&self, arguments: BlockResize) -> Answer<BlockResized> {
        let served = self.served(&arguments.disk)?;
        crate::resize::resize(served, &mut self.upkeep.admin(), &arguments)
    }

    fn tracker_reset(&self, arguments: TrackerReset) -> Answer<TrackerDetails> {
        let disk = &self.served(&arguments.disk)?.disk;
        let mut admin = self.upkeep.admin();
        on_ring(async |io| disk.reset_tracking(&mut admin, &io, group::GATE_DEADLINE).await)?;
        Ok(describe_tracker(disk))
    }

    fn tracker_enable(&self, arguments: TrackerEnable) -> Answer<TrackerDetails> {
        let disk = self.switchable(&arguments.disk)?;
        let mut admin = self.upkeep.admin();
        on_ring(async |io| disk.enable_tracking(&mut admin, &io, group::GATE_DEADLINE).await)?;
        Ok(describe_tracker(disk))
    }

    fn tracker_disable(&self, arguments: TrackerDisable) -> Answer<TrackerDetails> {
        let disk = self.switchable(&arguments.disk)?;
        let mut admin = self.upkeep.admin();
        on_ring(async |io| disk.disable_tracking(&mut admin, &io, group::GATE_DEADLINE).await)?;
        Ok(describe_tracker(disk))
    }

    fn query_tracker(&self, arguments: QueryTracker) -> Answer<Vec<TrackerDetails>> {
        match &arguments.disk {
            Some(name) => Ok(vec![describe_tracker(&self.served(name)?.disk)]),
            None => Ok(self.disks.iter().map(|served| describe_tracker(&served.disk)).collect()),
        }
    }

    fn tracker_mark(&self, arguments: TrackerMark) -> Answer<Nothing> {
        let disk = &self.served(&arguments.disk)?.disk;
        let range = |range: &MarkRange| ByteRange::at(range.offset, range.length);
        let ranges: Option<Vec<ByteRange>> = arguments.ranges.iter().map(range).collect();
        // Their ends were checked.
        let ranges = ranges.unwrap_or_default();
        on_ring(async |io| disk.mark_changed(&io, disk.lane(), &ranges).await)?;
        Ok(Nothing {})
    }

    fn query_change_map(&self, arguments: QueryChangeMap) -> Answer<ChangeMap> {
        crate::moves::change_map(&self.served(&arguments.disk)?.disk, arguments)
    }

    fn tracker_export(&self, arguments: TrackerExport) -> Answer<TrackerExported> {
        let served = self.served(&arguments.disk)?;
        crate::moves::export(served, &mut self.upkeep.admin(), arguments)
    }

    fn nbd_export_add(&self, arguments: NbdExportAdd) -> Answer<ExportInfo> {
        self.catalog.add(arguments)
    }

    fn nbd_export_del(&self, arguments: NbdExportDel) -> Answer<Nothing> {
        self.catalog.delete(&arguments.name).map(|()| Nothing {})
    }

    fn query_exports(&self, _: QueryExports) -> Answer<Vec<ExportInfo>> {
        Ok(if self.catalog.address().is_some() { self.catalog.infos() } else { Vec::new() })
    }

    fn quit(&self) {
        self.stop.set();
    }
}

/// Drives one verb on a ring of its own: verbs are rare, and their threads come and go.
pub(crate) fn on_ring<T>(verb: impl AsyncFnOnce(HostStorage) -> Result<T, Error>) -> Answer<T> {
    let executor = Executor::new(RING_ENTRIES)
        .map_err(|error| CommandError::generic(reason::IO, format!("The verb cannot run: {error}")))?;
    executor.block_on(verb(executor.storage())).map_err(explain)
}

fn describe(served: &Served) -> DiskInfo {
    let (disk, spec, counted) = (&served.disk, &served.spec, served.device.counters());
    let snapshots = disk.snapshots();
    let held = snapshots.iter().map(|snapshot| snapshot.bytes_held()).sum();
    let (change_id, began) = (disk.change_id(), disk.generation_began());
    DiskInfo {
        name: spec.name.clone(),
        image: served.image_path.clone(),
        state_directory: served.state.display().to_string(),
        size: disk.capacity(),
        block_size: spec.logical_block_bytes,
        queues: spec.queues,
        read_only: spec.read_only,
        writeback: served.device.is_writeback(),
        serial: spec.serial.clone(),
        socket: spec.socket.as_ref().map(|path| path.display().to_string()),
        connected: served.device.is_connected(),
        tracker: TrackerInfo {
            on: disk.block_grid().is_some(),
            generation: change_id.generation.to_string(),
            epoch: u64::from(change_id.epoch.get()) + 1,
            change_id: change_id.to_string(),
            block_size: disk.block_grid().map_or(0, |grid| grid.bytes()),
            began: began.map(|began| Timestamp::from(time_at(began.at_ns))),
            reason: reason_of(began),
        },
        io: IoCounters {
            reads: counted.reads,
            read_bytes: counted.read_bytes,
            writes: counted.writes,
            write_bytes: counted.written_bytes,
            flushes: counted.flushes,
            discards: counted.discards,
            discard_bytes: counted.discarded_bytes,
            write_zeroes: counted.write_zeroes,
            errors: counted.errors + counted.refused,
            preserved_bytes: held,
        },
        snapshots: count(snapshots.len()),
        held,
        rewind: disk.rewind().map(rewind_info),
        handed_over: disk.is_handed_over(),
        store: served.meter.info(served),
    }
}

fn rewind_info(rewind: cow_engine::RewindInfo) -> RewindInfo {
    let cow_engine::RewindInfo { snapshot, bytes, bytes_left, trouble } = rewind;
    RewindInfo { snapshot, bytes, bytes_left, trouble }
}

/// When a snapshot was taken.
pub(crate) fn time_of(snapshot: &Snapshot<HostStorage>) -> SystemTime {
    time_at(snapshot.created_ns())
}

fn time_at(ns: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(ns)
}

fn reason_of(began: Option<Began>) -> String {
    began.map_or("kept", |began| began.code).to_owned()
}

fn describe_tracker(disk: &Disk<HostStorage>) -> TrackerDetails {
    let status = disk.tracker_status();
    TrackerDetails {
        disk: disk.name().to_owned(),
        on: status.grid.is_some(),
        generation: status.change_id.generation.to_string(),
        epoch: u64::from(status.epoch.get()),
        change_id: status.change_id.to_string(),
        block_size: status.grid.map_or(0, BlockGrid::bytes),
        size: status.capacity,
        map_bytes: status.map_bytes,
        region_size: status.region_bytes,
        hot_regions: status.hot_regions,
        presumed_bytes: status.presumed_bytes,
        at_risk: status.at_risk,
        ends_with_host: status.ends_with_host,
        began: status.began.map(|began| Timestamp::from(time_at(began.at_ns))),
        reason: reason_of(status.began),
        checkpoints: count(status.checkpoints),
    }
}

/// The engine's error in the control plane's words.
pub(crate) fn explain(error: Error) -> CommandError {
    let text = sentence(&error);
    match error {
        Error::NoSuchSnapshot { .. } => CommandError::not_found(reason::SNAPSHOT_NOT_FOUND, text),
        Error::NoSuchInstant { .. } => CommandError::not_found(reason::SNAPSHOT_NOT_FOUND, text),
        Error::NoSuchCheckpoint { .. } => CommandError::not_found(reason::CHECKPOINT_NOT_FOUND, text),
        Error::CheckpointExists { .. } => CommandError::generic(reason::CHECKPOINT_EXISTS, text),
        Error::CheckpointDamaged { .. } => CommandError::generic(reason::CHECKPOINT_DAMAGED, text),
        Error::AmbiguousName { .. } => CommandError::generic(reason::AMBIGUOUS_NAME, text),
        Error::BadChangeId { .. } => CommandError::generic(reason::BAD_CHANGE_ID, text),
        Error::OtherGeneration { .. } => CommandError::generic(reason::GENERATION_DIFFERS, text),
        Error::SinceNotOlder { .. } => CommandError::generic(reason::SINCE_NOT_OLDER, text),
        Error::SnapshotExists { .. } => CommandError::generic(reason::SNAPSHOT_EXISTS, text),
        Error::SnapshotBroken { .. } => CommandError::generic(reason::SNAPSHOT_BROKEN, text),
        Error::SnapshotInUse { .. } => CommandError::generic(reason::SNAPSHOT_IN_USE, text),
        Error::NoSuchOverlay { .. } => CommandError::not_found(reason::OVERLAY_NOT_FOUND, text),
        Error::OverlayExists { .. } => CommandError::generic(reason::OVERLAY_EXISTS, text),
        Error::GateTimeout { .. } => CommandError::generic(reason::GATE_TIMEOUT, text),
        Error::RewindActive { .. } => CommandError::generic(reason::REWIND_ACTIVE, text),
        Error::SnapshotsHeld { .. } => CommandError::generic(reason::SNAPSHOTS_HELD, text),
        Error::CapacityDiffers { .. } => CommandError::generic(reason::CAPACITY_DIFFERS, text),
        Error::NotTracked { .. } => CommandError::generic(reason::TRACKING_OFF, text),
        Error::AreaRefused { .. } => CommandError::generic(reason::STORE_REFUSED, text),
        Error::LimitInUse { .. } => CommandError::generic(reason::LIMIT_IN_USE, text),
        Error::BadName { .. }
        | Error::PastEnd { .. }
        | Error::BadSize { .. }
        | Error::Shrink { .. }
        | Error::ShrinkDevice { .. } => CommandError::generic(reason::BAD_ARGUMENT, text),
        Error::Io { ref source, .. } if source.kind() == std::io::ErrorKind::AlreadyExists => {
            CommandError::generic(reason::FILE_EXISTS, text)
        }
        Error::Io { .. } => CommandError::generic(reason::IO, text),
        other => CommandError::generic(other.code(), text),
    }
}

fn sentence(error: &Error) -> String {
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        text = format!("{text}: {source}");
    }
    if let Some(first) = text.get(..1) {
        text.replace_range(..1, &first.to_uppercase());
    }
    text
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
