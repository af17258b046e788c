//! The control plane's verbs, carried out on the engine.
//!
//! Invariant: verbs that change which snapshots and overlays there are run one at a time (by [`Upkeep`]);
//! all others run beside them and beside each other.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use control::commands::{
    ChangedBlocks, ChangedRange, DiskInfo, ExportInfo, IoCounters, NbdExportAdd, NbdExportDel, Nothing,
    OverlayInfo, QueryChangedBlocks, QueryDisks, QueryExports, QuerySnapshots, QueryStatus, RunState, Since,
    SnapshotClose, SnapshotCreate, SnapshotCreated, SnapshotDelete, SnapshotDeleted, SnapshotInfo,
    SnapshotOpen, SnapshotPoint, SnapshotState, StatusInfo, Timestamp, TrackerInfo,
};
use control::service::{Answer, reason};
use control::{CommandError, Event, EventHub, Service};
use cow_engine::cbt::{ByteRange, Epoch};
use cow_engine::group;
use cow_engine::host::{Executor, HostStorage};
use cow_engine::{Disk, Error, Snapshot, View};

use crate::catalog::{Catalog, no_disk};
use crate::maintenance::Upkeep;
use crate::overlays::Overlays;
use crate::serve::Served;
use crate::stop::Stop;

/// Submissions of a verb between two system calls.
const RING_ENTRIES: u32 = 16;

/// What the control socket reaches.
pub(crate) struct ControlService {
    pub(crate) disks: Arc<Vec<Served>>,
    pub(crate) upkeep: Upkeep,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) overlays: Arc<Overlays>,
    pub(crate) hub: EventHub,
    pub(crate) stop: Stop,
    pub(crate) started: Instant,
    pub(crate) control_socket: String,
}

impl ControlService {
    fn served(&self, name: &str) -> Answer<&Served> {
        self.disks.iter().find(|served| served.spec.name == name).ok_or_else(|| no_disk(name))
    }

    /// The disks that were named, or all.
    fn chosen(&self, names: Option<Vec<String>>) -> Answer<Vec<Arc<Disk<HostStorage>>>> {
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
        let instant = {
            let mut admin = self.upkeep.admin();
            on_ring(async |io| {
                group::create(&mut admin, &io, &disks, &name, created_ns, group::GATE_DEADLINE).await
            })?
        };
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

    fn snapshot_open(&self, arguments: SnapshotOpen) -> Answer<OverlayInfo> {
        let _admin = self.upkeep.admin();
        self.overlays.open(&arguments)
    }

    fn snapshot_close(&self, arguments: SnapshotClose) -> Answer<Nothing> {
        let _admin = self.upkeep.admin();
        self.overlays.close(&arguments).map(|()| Nothing {})
    }

    fn query_snapshots(&self, arguments: QuerySnapshots) -> Answer<Vec<SnapshotInfo>> {
        let disks = self.chosen(arguments.disk.map(|disk| vec![disk]))?;
        let mut all: Vec<_> = disks
            .iter()
            .flat_map(|disk| disk.snapshots().into_iter().map(|snapshot| (disk.clone(), snapshot)))
            .collect();
        all.sort_by_key(|(_, snapshot)| snapshot.created_ns());
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
                held: snapshot.bytes_held(),
                exports: self.catalog.names_of(disk.name(), snapshot.name()),
                overlays: self.overlays.of(disk.name(), snapshot.name()),
            })
            .collect())
    }

    fn query_changed_blocks(&self, arguments: QueryChangedBlocks) -> Answer<ChangedBlocks> {
        let disk = &self.served(&arguments.disk)?.disk;
        let snapshot = disk.snapshot(&arguments.snapshot).map_err(explain)?;
        let (since, epoch) = resolve(disk, &snapshot, &arguments)?;
        let size = snapshot.capacity();
        if arguments.offset > size {
            let text = format!("Offset {} is past the end of the disk at {size}", arguments.offset);
            return Err(CommandError::generic(reason::BAD_ARGUMENT, text));
        }
        let until = snapshot.change_id();
        let view = View::new(disk.clone(), snapshot);
        let block_size = view.block_grid().map_err(explain)?.bytes();
        let limit = usize::try_from(arguments.limit.get()).unwrap_or(usize::MAX);
        let range = ByteRange::new(arguments.offset, size);
        let found = on_ring(async |io| view.changes(&io, epoch, range, limit).await)?;
        let next =
            found.last().filter(|last| found.len() == limit && last.end() < size).map(|last| last.end());
        Ok(ChangedBlocks {
            disk: arguments.disk,
            snapshot: arguments.snapshot,
            since,
            until: until.to_string(),
            size,
            block_size,
            ranges: found.iter().map(|r| ChangedRange { offset: r.start(), length: r.len() }).collect(),
            next_offset: next,
        })
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
        .map_err(|error| CommandError::generic(reason::IO, format!("Cannot start an io_uring: {error}")))?;
    executor.block_on(verb(executor.storage())).map_err(explain)
}

/// The instant that changes are counted from: its name for the answer, and its epoch.
fn resolve(
    disk: &Disk<HostStorage>,
    snapshot: &Snapshot<HostStorage>,
    arguments: &QueryChangedBlocks,
) -> Answer<(String, Epoch)> {
    let id = match arguments.since() {
        Since::ChangeId(text) => text.parse().map_err(|error| {
            CommandError::generic(reason::BAD_ARGUMENT, format!("Argument 'since': {error}"))
        })?,
        Since::Snapshot(name) => {
            let older = disk.snapshot(name).map_err(explain)?;
            let (from, to) = (older.change_id(), snapshot.change_id());
            if from.generation == to.generation && from.epoch >= to.epoch {
                let text = format!("Snapshot '{name}' is not older than '{}'", snapshot.name());
                return Err(CommandError::generic(reason::SINCE_NOT_OLDER, text));
            }
            from
        }
    };
    let epoch = disk.resolve(id, snapshot).map_err(|error| {
        let same = id.generation == snapshot.change_id().generation;
        let reason = if same { reason::SINCE_NOT_OLDER } else { reason::GENERATION_DIFFERS };
        CommandError::generic(reason, sentence(&error))
    })?;
    Ok((id.to_string(), epoch))
}

fn describe(served: &Served) -> DiskInfo {
    let (disk, spec, counted) = (&served.disk, &served.spec, served.device.counters());
    let snapshots = disk.snapshots();
    let held = snapshots.iter().map(|snapshot| snapshot.bytes_held()).sum();
    let change_id = disk.change_id();
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
            began: served.reset.as_ref().map(|(_, at)| Timestamp::from(*at)),
            reason: served.reset.as_ref().map_or("kept", |(reason, _)| reason.code()).to_owned(),
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
    }
}

/// When a snapshot was taken.
pub(crate) fn time_of(snapshot: &Snapshot<HostStorage>) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(snapshot.created_ns())
}

/// The engine's error in the control plane's words.
pub(crate) fn explain(error: Error) -> CommandError {
    let text = sentence(&error);
    match error {
        Error::NoSuchSnapshot { .. } => CommandError::not_found(reason::SNAPSHOT_NOT_FOUND, text),
        Error::SnapshotExists { .. } => CommandError::generic(reason::SNAPSHOT_EXISTS, text),
        Error::SnapshotBroken { .. } => CommandError::generic(reason::SNAPSHOT_BROKEN, text),
        Error::SnapshotInUse { .. } => CommandError::generic(reason::SNAPSHOT_IN_USE, text),
        Error::NoSuchOverlay { .. } => CommandError::not_found(reason::OVERLAY_NOT_FOUND, text),
        Error::OverlayExists { .. } => CommandError::generic(reason::OVERLAY_EXISTS, text),
        Error::GateTimeout { .. } => CommandError::generic(reason::GATE_TIMEOUT, text),
        Error::NotTracked { .. } => CommandError::generic(reason::TRACKING_OFF, text),
        Error::BadName { .. } => CommandError::generic(reason::BAD_ARGUMENT, text),
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
