//! The verbs of checkpoints, and which two instants a comparison is between.
//!
//! Invariant: a refusal tells apart a text that is no change id, an instant of another generation (and why that
//! ended), one of another disk, and one that is later than the younger end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use control::commands::{
    ChangedBlocks, ChangedRange, CheckpointCreate, CheckpointCreated, CheckpointDelete, CheckpointDeleted,
    CheckpointInfo, IncrementalInfo, QueryChangedBlocks, SnapshotPoint, Timestamp,
};
use control::service::{Answer, reason};
use control::{CommandError, Event};
use cow_engine::cbt::{ByteRange, ChangeId};
use cow_engine::host::HostStorage;
use cow_engine::{Disk, Error, Until, View, checkpoint};

use crate::catalog::no_disk;
use crate::service::{ControlService, explain, on_ring};

type HostDisk = Arc<Disk<HostStorage>>;

impl ControlService {
    pub(crate) fn make_checkpoint(&self, arguments: CheckpointCreate) -> Answer<CheckpointCreated> {
        let CheckpointCreate { name, snapshot, disks } = arguments;
        let all = disks.is_none();
        let mut admin = self.upkeep.admin();
        let mut disks = self.chosen(disks)?;
        if all {
            disks.retain(|disk| disk.snapshot(&snapshot).is_ok());
        }
        if disks.is_empty() {
            let text = format!("No disk has a snapshot '{snapshot}'");
            return Err(CommandError::not_found(reason::SNAPSHOT_NOT_FOUND, text));
        }
        let made = on_ring(async |io| checkpoint::create(&mut admin, &io, &disks, &name, &snapshot).await)?;
        let point = |(disk, one): (&HostDisk, &Arc<cow_engine::Checkpoint>)| SnapshotPoint {
            disk: disk.name().to_owned(),
            change_id: one.change_id().to_string(),
            size: one.capacity(),
        };
        let points: Vec<_> = disks.iter().zip(&made).map(point).collect();
        self.hub.post(&Event::CheckpointCreated { name: name.clone(), disks: points.clone() });
        Ok(CheckpointCreated { name, disks: points })
    }

    pub(crate) fn drop_checkpoint(&self, arguments: CheckpointDelete) -> Answer<CheckpointDeleted> {
        let CheckpointDelete { name, disks } = arguments;
        let all = disks.is_none();
        let mut admin = self.upkeep.admin();
        let mut disks = self.chosen(disks)?;
        if all {
            disks.retain(|disk| disk.checkpoint(&name).is_ok());
        }
        if disks.is_empty() {
            let text = format!("No disk has a checkpoint '{name}'");
            return Err(CommandError::not_found(reason::CHECKPOINT_NOT_FOUND, text));
        }
        for disk in &disks {
            disk.checkpoint(&name).map_err(explain)?;
        }
        let mut deleted = Vec::new();
        let result = disks.iter().try_for_each(|disk| {
            let done = on_ring(async |io| disk.delete_checkpoint(&mut admin, &io, &name));
            // It is gone also if that could not be made durable.
            if disk.checkpoint(&name).is_err() {
                deleted.push(disk.name().to_owned());
            }
            done
        });
        if !deleted.is_empty() {
            self.hub.post(&Event::CheckpointDeleted { name: name.clone(), disks: deleted.clone() });
        }
        result.map(|()| CheckpointDeleted { name, disks: deleted })
    }

    pub(crate) fn list_checkpoints(&self, disk: Option<String>) -> Answer<Vec<CheckpointInfo>> {
        let disks = self.chosen(disk.map(|disk| vec![disk]))?;
        let of = |disk: &HostDisk| {
            disk.checkpoints().into_iter().map(|one| describe(disk, &one)).collect::<Vec<_>>()
        };
        let mut all: Vec<_> = disks.iter().flat_map(of).collect();
        all.sort_by_key(|one| (one.created.seconds, one.created.microseconds));
        Ok(all)
    }

    /// Per disk, whether what changed since `since` will be told of a snapshot that is taken now.
    pub(crate) fn is_incremental(
        &self,
        since: &str,
        disks: Option<Vec<String>>,
    ) -> Answer<Vec<IncrementalInfo>> {
        let disks = self.chosen(disks)?;
        let of = |disk: &HostDisk| {
            let id = disk.instant(since);
            let possible = match &id {
                Ok(id) => disk.check_incremental(*id).map_err(|error| self.explain_since(disk, *id, error)),
                Err(_) => disk.instant(since).map(drop).map_err(explain),
            };
            let refusal = possible.err();
            IncrementalInfo {
                disk: disk.name().to_owned(),
                possible: refusal.is_none(),
                since: id.ok().map(|id| id.to_string()),
                reason: refusal.as_ref().map(|error| error.reason.to_owned()),
                desc: refusal.map(|error| error.desc),
            }
        };
        Ok(disks.iter().map(of).collect())
    }

    /// Why changes since `since` cannot be told, if it is another disk's.
    fn explain_since(&self, disk: &HostDisk, since: ChangeId, error: Error) -> CommandError {
        if !matches!(error, Error::OtherGeneration { .. }) {
            return explain(error);
        }
        let owns = |other: &&HostDisk| {
            let of_it = |id: ChangeId| id.generation == since.generation;
            of_it(other.change_id())
                || other.checkpoints().iter().any(|one| of_it(one.change_id()))
                || other.snapshots().iter().any(|one| of_it(one.change_id()))
        };
        let mut others = self.disks.iter().map(|served| &served.disk);
        match others.find(|other| owns(other)) {
            Some(other) if other.name() != disk.name() => {
                let text =
                    format!("'{since}' is an instant of disk '{}', not of '{}'", other.name(), disk.name());
                CommandError::generic(reason::OTHER_DISK, text)
            }
            _ => explain(error),
        }
    }

    pub(crate) fn compare(&self, arguments: QueryChangedBlocks) -> Answer<ChangedBlocks> {
        let served = self.disks.iter().find(|served| served.spec.name == arguments.disk);
        let disk = &served.ok_or_else(|| no_disk(&arguments.disk))?.disk;
        let until = match (&arguments.snapshot, &arguments.until) {
            (Some(name), _) => {
                Until::Snapshot(View::new(disk.clone(), disk.snapshot(name).map_err(explain)?))
            }
            (None, until) => disk.until(until.as_deref().unwrap_or_default()).map_err(explain)?,
        };
        let (since, id) = (disk.instant(&arguments.since).map_err(explain)?, until.change_id());
        if arguments.since == until.name() {
            let text = format!("'{}' is not older than itself", arguments.since);
            return Err(CommandError::generic(reason::SINCE_NOT_OLDER, text));
        }
        let epoch = disk.resolve(since, id).map_err(|error| self.explain_since(disk, since, error))?;
        let size = until.capacity();
        if arguments.offset > size {
            let text = format!("Offset {} is past the end of the disk at {size}", arguments.offset);
            return Err(CommandError::generic(reason::BAD_ARGUMENT, text));
        }
        let block_size = until.block_grid().map_err(explain)?.bytes();
        let limit = usize::try_from(arguments.limit.get()).unwrap_or(usize::MAX);
        let range = ByteRange::new(arguments.offset, size);
        let found = on_ring(async |io| until.changes(&io, epoch, range, limit).await)?;
        let next =
            found.last().filter(|last| found.len() == limit && last.end() < size).map(|last| last.end());
        Ok(ChangedBlocks {
            disk: arguments.disk,
            snapshot: until.name().to_owned(),
            since: since.to_string(),
            until: id.to_string(),
            size,
            block_size,
            ranges: found.iter().map(|r| ChangedRange { offset: r.start(), length: r.len() }).collect(),
            next_offset: next,
        })
    }
}

fn describe(disk: &HostDisk, one: &cow_engine::Checkpoint) -> CheckpointInfo {
    let current = disk.check_incremental(one.change_id()).is_ok();
    let time = SystemTime::UNIX_EPOCH + Duration::from_nanos(one.created_ns());
    CheckpointInfo {
        name: one.name().to_owned(),
        disk: disk.name().to_owned(),
        change_id: one.change_id().to_string(),
        created: Timestamp::from(time),
        size: one.capacity(),
        block_size: one.block_grid().bytes(),
        held: one.bytes(),
        current,
        ended: one.ended().filter(|_| !current),
        damaged: one.lost().map(str::to_owned),
    }
}
