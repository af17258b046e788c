//! A service without disks: enough state for the server's tests and for trying clients by hand.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use control::commands::*;
use control::service::{Answer, reason};
use control::{CommandError, Event, EventHub, Service};

const GENERATION: &str = "6f9619ff-8b86-4011-b42d-00c04fc964ff";
const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 65_536;

/// Two disks, `vda` and `vdb`, whose every second block changed.
pub(crate) struct Rehearsal {
    events: EventHub,
    snapshots: Mutex<Vec<SnapshotInfo>>,
    quit: Mutex<bool>,
    asked: Condvar,
}

impl Rehearsal {
    pub(crate) fn new(events: EventHub) -> Self {
        Self { events, snapshots: Mutex::default(), quit: Mutex::default(), asked: Condvar::new() }
    }

    /// Waits until a client said `quit`, at most `patience`.
    #[allow(dead_code)]
    pub(crate) fn wait_for_quit(&self, patience: Duration) -> bool {
        let quit = self.quit.lock().unwrap();
        let waited = self.asked.wait_timeout_while(quit, patience, |quit| !*quit).unwrap();
        *waited.0
    }

    fn snapshot(&self, disk: &str, name: &str) -> Answer<SnapshotInfo> {
        let snapshots = self.snapshots.lock().unwrap();
        let found = snapshots.iter().find(|s| s.disk == disk && s.name == name);
        found.cloned().ok_or_else(|| {
            CommandError::not_found(
                reason::SNAPSHOT_NOT_FOUND,
                format!("Disk '{disk}' has no snapshot '{name}'"),
            )
        })
    }
}

impl Service for Rehearsal {
    fn query_status(&self, _: QueryStatus) -> Answer<StatusInfo> {
        Ok(StatusInfo {
            running: true,
            status: RunState::Running,
            pid: std::process::id(),
            uptime: 1,
            disks: 2,
            snapshots: 0,
            control_socket: "c.sock".to_owned(),
            nbd: None,
        })
    }

    fn query_disks(&self, _: QueryDisks) -> Answer<Vec<DiskInfo>> {
        let disk = |name: &str| DiskInfo {
            name: name.to_owned(),
            image: format!("/vm/größe-{name}.img"),
            state_directory: format!("/vm/{name}.img.ebb"),
            size: SIZE,
            block_size: 512,
            queues: 4,
            read_only: false,
            writeback: true,
            serial: None,
            socket: None,
            connected: false,
            tracker: TrackerInfo {
                on: true,
                generation: GENERATION.to_owned(),
                epoch: 8,
                change_id: format!("{GENERATION}/7"),
                block_size: BLOCK,
                began: Some(Timestamp::now()),
                reason: "new-disk".to_owned(),
            },
            io: IoCounters::default(),
            snapshots: 0,
            held: 0,
            rewind: None,
            handed_over: false,
            store: Default::default(),
        };
        Ok(vec![disk("vda"), disk("vdb")])
    }

    fn snapshot_create(&self, arguments: SnapshotCreate) -> Answer<SnapshotCreated> {
        if arguments.name == "slow" {
            std::thread::sleep(Duration::from_millis(500));
        }
        let disks = arguments.disks.unwrap_or_else(|| vec!["vda".to_owned(), "vdb".to_owned()]);
        let mut snapshots = self.snapshots.lock().unwrap();
        let mut points = Vec::new();
        for disk in disks {
            if snapshots.iter().any(|s| s.disk == disk && s.name == arguments.name) {
                return Err(CommandError::generic(
                    reason::SNAPSHOT_EXISTS,
                    format!("Disk '{disk}' has a snapshot '{}' already", arguments.name),
                ));
            }
            let change_id = format!("{GENERATION}/{}", snapshots.len());
            snapshots.push(SnapshotInfo {
                name: arguments.name.clone(),
                disk: disk.clone(),
                change_id: change_id.clone(),
                created: Timestamp::now(),
                size: SIZE,
                state: SnapshotState::Active,
                reason: None,
                broken_time: None,
                errno: None,
                on_overflow: arguments.on_overflow,
                hold_deadline: arguments.hold_deadline,
                limit: arguments.limit,
                held: 0,
                bytes_freed_by_delete: 0,
                released: 0,
                exports: Vec::new(),
                overlays: Vec::new(),
            });
            points.push(SnapshotPoint { disk, change_id, size: SIZE });
        }
        self.events.post(&Event::SnapshotCreated { name: arguments.name.clone(), disks: points.clone() });
        Ok(SnapshotCreated {
            name: arguments.name,
            created: Timestamp::now(),
            held_writes_us: 300,
            disks: points,
        })
    }

    fn store_append(&self, arguments: StoreAppend) -> Answer<AreaInfo> {
        let StoreAppend { path, size, .. } = arguments;
        Ok(AreaInfo { path, kind: "file".to_owned(), size, used: 0 })
    }

    fn store_limit(&self, _: StoreLimit) -> Answer<Nothing> {
        Ok(Nothing {})
    }

    fn snapshot_delete(&self, arguments: SnapshotDelete) -> Answer<SnapshotDeleted> {
        let wanted = |s: &SnapshotInfo| {
            let on = |disks: &Vec<String>| disks.contains(&s.disk);
            s.name == arguments.name && arguments.disks.as_ref().is_none_or(on)
        };
        let mut snapshots = self.snapshots.lock().unwrap();
        let disks: Vec<_> = snapshots.iter().filter(|s| wanted(s)).map(|s| s.disk.clone()).collect();
        snapshots.retain(|s| !wanted(s));
        if disks.is_empty() {
            return Err(CommandError::not_found(
                reason::SNAPSHOT_NOT_FOUND,
                format!("There is no snapshot '{}'", arguments.name),
            ));
        }
        Ok(SnapshotDeleted { name: arguments.name, disks })
    }

    fn snapshot_open(&self, arguments: SnapshotOpen) -> Answer<OverlayInfo> {
        self.snapshot(&arguments.disk, &arguments.snapshot)?;
        Ok(OverlayInfo {
            disk: arguments.disk,
            snapshot: arguments.snapshot,
            name: arguments.name,
            size: SIZE,
            used: 0,
            keep: arguments.keep,
            export: None,
            uri: None,
            clients: 0,
            socket: arguments.socket,
            connected: false,
        })
    }

    fn snapshot_close(&self, arguments: SnapshotClose) -> Answer<Nothing> {
        let text = format!("Snapshot '{}' has no overlay '{}'", arguments.snapshot, arguments.name);
        Err(CommandError::not_found(reason::OVERLAY_NOT_FOUND, text))
    }

    fn disk_revert(&self, arguments: DiskRevert) -> Answer<RewindInfo> {
        let snapshot = self.snapshot(&arguments.disk, &arguments.snapshot)?;
        Ok(RewindInfo { snapshot: snapshot.name, bytes: 0, bytes_left: 0, trouble: None })
    }

    fn query_snapshots(&self, arguments: QuerySnapshots) -> Answer<Vec<SnapshotInfo>> {
        let mut snapshots = self.snapshots.lock().unwrap().clone();
        snapshots.retain(|s| arguments.disk.as_ref().is_none_or(|disk| *disk == s.disk));
        Ok(snapshots)
    }

    fn query_changed_blocks(&self, arguments: QueryChangedBlocks) -> Answer<ChangedBlocks> {
        let name = arguments.snapshot.clone().or(arguments.until.clone()).unwrap_or_default();
        let snapshot = self.snapshot(&arguments.disk, &name)?;
        let since = match arguments.since() {
            Since::ChangeId(id) => id.to_owned(),
            Since::Name(name) => self.snapshot(&arguments.disk, name)?.change_id,
        };
        let step = 2 * BLOCK;
        let first = arguments.offset.div_ceil(step);
        let mut ranges = (first..SIZE / step).map(|number| number * step);
        Ok(ChangedBlocks {
            disk: arguments.disk,
            snapshot: name,
            since,
            until: snapshot.change_id,
            size: SIZE,
            block_size: BLOCK,
            ranges: ranges
                .by_ref()
                .take(arguments.limit.get() as usize)
                .map(|offset| ChangedRange { offset, length: BLOCK })
                .collect(),
            next_offset: ranges.next(),
        })
    }

    fn checkpoint_create(&self, arguments: CheckpointCreate) -> Answer<CheckpointCreated> {
        let disks = arguments.disks.unwrap_or_else(|| vec!["vda".to_owned(), "vdb".to_owned()]);
        let point = |disk: String| {
            let SnapshotInfo { change_id, size, .. } = self.snapshot(&disk, &arguments.snapshot)?;
            Ok(SnapshotPoint { disk, change_id, size })
        };
        let disks = disks.into_iter().map(point).collect::<Answer<_>>()?;
        Ok(CheckpointCreated { name: arguments.name, disks })
    }

    fn checkpoint_delete(&self, arguments: CheckpointDelete) -> Answer<CheckpointDeleted> {
        let text = format!("There is no checkpoint '{}'", arguments.name);
        Err(CommandError::not_found(reason::CHECKPOINT_NOT_FOUND, text))
    }

    fn query_checkpoints(&self, _: QueryCheckpoints) -> Answer<Vec<CheckpointInfo>> {
        Ok(Vec::new())
    }

    fn query_incremental(&self, arguments: QueryIncremental) -> Answer<Vec<IncrementalInfo>> {
        let disk = |disk: &str| IncrementalInfo {
            disk: disk.to_owned(),
            possible: true,
            since: Some(arguments.since.clone()),
            reason: None,
            desc: None,
        };
        Ok(vec![disk("vda"), disk("vdb")])
    }

    fn block_resize(&self, arguments: BlockResize) -> Answer<BlockResized> {
        Ok(BlockResized { disk: arguments.disk, size: arguments.size, announced: false })
    }

    fn query_change_map(&self, arguments: QueryChangeMap) -> Answer<ChangeMap> {
        Ok(ChangeMap {
            disk: arguments.disk,
            cells: arguments.cells.get(),
            exact: true,
            ..Default::default()
        })
    }

    fn tracker_export(&self, arguments: TrackerExport) -> Answer<TrackerExported> {
        let text = format!("Disk '{}' is only rehearsed", arguments.disk);
        Err(CommandError::generic(reason::NOT_MOVABLE, text))
    }

    fn query_tracker(&self, _: QueryTracker) -> Answer<Vec<TrackerDetails>> {
        Ok(Vec::new())
    }

    fn tracker_reset(&self, reset: TrackerReset) -> Answer<TrackerDetails> {
        Ok(TrackerDetails { disk: reset.disk, ..Default::default() })
    }

    fn tracker_enable(&self, enable: TrackerEnable) -> Answer<TrackerDetails> {
        Ok(TrackerDetails { disk: enable.disk, on: true, ..Default::default() })
    }

    fn tracker_disable(&self, disable: TrackerDisable) -> Answer<TrackerDetails> {
        Ok(TrackerDetails { disk: disable.disk, ..Default::default() })
    }

    fn tracker_mark(&self, _: TrackerMark) -> Answer<Nothing> {
        Ok(Nothing {})
    }

    fn nbd_export_add(&self, _: NbdExportAdd) -> Answer<ExportInfo> {
        let desc = "This daemon has no NBD server";
        Err(CommandError::generic(reason::NBD_OFF, desc))
    }

    fn nbd_export_del(&self, _: NbdExportDel) -> Answer<Nothing> {
        let desc = "This daemon has no NBD server";
        Err(CommandError::generic(reason::NBD_OFF, desc))
    }

    fn query_exports(&self, _: QueryExports) -> Answer<Vec<ExportInfo>> {
        Ok(Vec::new())
    }

    fn quit(&self) {
        *self.quit.lock().unwrap() = true;
        self.asked.notify_all();
    }
}
