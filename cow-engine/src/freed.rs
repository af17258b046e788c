//! What deleting a snapshot would give back.
//!
//! A slot of a snapshot is freed by its deletion if the older neighbour has the slot's key itself, and so
//! every older one finds it there, or if no older one can be read. All others pass to the neighbour
//! ([`crate::merge`]). Snapshots that were deleted and are still being merged count as part of what they
//! are merged into, so the answer is that of a disk on which [`Disk::maintain`] has come to its end.
//!
//! Absent: counters. What deletions in the middle do to them would have to be counted anew each time.

use std::sync::Arc;

use crate::chain;
use crate::disk::Disk;
use crate::format::{GRAIN, SnapshotState};
use crate::index::Slot;
use crate::snapshot::Snapshot;
use crate::storage::Storage;

impl<S: Storage> Disk<S> {
    /// Bytes by which [`Disk::bytes_stored`] is less once `snapshot` has been deleted and what that leaves
    /// to do is done.
    ///
    /// 0 for a broken one, whose space is given back anyway, and for one that is not there any more.
    /// Looks at some `most` keys: exact if the snapshot has no more, else estimated from so many,
    /// which errs by some thousandths for 100 000. Takes about a microsecond for each key.
    pub fn bytes_freed_by_delete(&self, snapshot: &Snapshot<S>, most: u64) -> u64 {
        let list = self.chain.now();
        let Ok(here) = chain::from(&list, snapshot) else { return 0 };
        if snapshot.broken().is_some() {
            return 0;
        }
        let is_deleted = |one: &Arc<Snapshot<S>>| one.state() == SnapshotState::Deleted;
        let (older, merged) = (&list[..list.len() - here.len()], &here[1..]);
        let merged = merged.iter().take_while(|one| is_deleted(one) && one.broken().is_none()).count();
        // A broken neighbour is one of which all older ones are broken too.
        let neighbour = older.iter().rposition(|one| !is_deleted(one));
        let neighbour = neighbour.filter(|&at| older[at].broken().is_none()).map(|at| &older[at..]);
        let mine = &here[..=merged];
        (0..mine.len()).map(|at| freed_of(&mine[..at], &mine[at], neighbour, most)).sum()
    }
}

/// Bytes of `one` that nobody needs after the deletion, apart from those of keys that `before` has.
fn freed_of<S: Storage>(
    before: &[Arc<Snapshot<S>>],
    one: &Snapshot<S>,
    older: Option<&[Arc<Snapshot<S>>]>,
    most: u64,
) -> u64 {
    if before.is_empty() && older.is_none() {
        return one.bytes_held();
    }
    let mut slots = 0;
    let part = one.for_some(most, |key, slot| {
        // What is past the end of the one that it is merged into does not come that far.
        let comes = before.first().is_none_or(|first| first.reaches(key));
        let held = matches!(slot, Slot::At(_)) && comes && !before.iter().any(|other| other.has(key));
        let passes =
            |older: &[Arc<Snapshot<S>>]| older[0].reaches(key) && !older.iter().any(|other| other.has(key));
        let freed = held && !older.is_some_and(passes);
        slots += u64::from(freed);
    });
    // Slots are below 2^32, and parts some tens.
    slots * part.of / part.seen * GRAIN as u64
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use cbt::Generation;

    use crate::disk::Disk;
    use crate::format::{SnapshotHeader, SnapshotState};
    use crate::group::{self, Admin};
    use crate::host::{Executor, HostDir, HostFile, HostStorage, ImageOptions};
    use crate::index::{Key, Slot};
    use crate::memory::Source;
    use crate::snapshot::Snapshot;
    use crate::{DiskOptions, Durability, Meanwhile};

    use super::*;

    const GRAINS: u64 = 64;

    fn open(executor: &Executor, folder: &std::path::Path) -> Arc<Disk<HostStorage>> {
        std::fs::write(folder.join("image"), vec![7; 4096 * 64]).unwrap();
        std::fs::create_dir(folder.join("state")).unwrap();
        let options = ImageOptions { read_only: false, direct: false, logical_block_bytes: 512 };
        let image = HostFile::open_image(&folder.join("image"), options).unwrap();
        // Boots are ours here.
        let meanwhile = Meanwhile { boot_began_ns: None, ..image.meanwhile().unwrap() };
        let options = DiskOptions {
            name: "vda".into(),
            identity: image.identity().unwrap(),
            image,
            image_path: "/image".into(),
            dir: HostDir::new(folder.join("state")),
            tracking: None,
            boot: [1; 16],
            events: Arc::new(|_| {}),
            merge_step: 3,
            store: crate::StorePlan::default(),
            region_bytes: None,
            meanwhile,
        };
        executor.block_on(Disk::open(&executor.storage(), options)).unwrap().0
    }

    #[test]
    fn what_a_snapshot_shares_with_nobody_and_what_its_neighbour_has_is_freed() {
        let executor = Executor::new(16).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (disk, io) = (open(&executor, folder.path()), executor.storage());
        let mut admin = Admin::new();
        let disks = std::slice::from_ref(&disk);
        let lane = disk.lane();
        for (name, grains) in [("a", 0..10), ("b", 5..20), ("c", 0..GRAINS / 2)] {
            let taken = group::create(&mut admin, &io, disks, name, 0, Duration::from_secs(5));
            executor.block_on(taken).unwrap();
            let bytes =
                vec![name.as_bytes()[0]; usize::try_from((grains.end - grains.start) * 4096).unwrap()];
            let write = disk.write(&io, lane, grains.start * 4096, Source::of(&bytes), Durability::Cached);
            executor.block_on(write).unwrap();
        }
        let freed = |name: &str| disk.bytes_freed_by_delete(&disk.snapshot(name).unwrap(), 1000) / 4096;
        // 'a' has no older one; 'b' has 5..10 in common with it, and 'c' with 'b' 5..20.
        assert_eq!((freed("a"), freed("b"), freed("c")), (10, 5, 15));
        executor.block_on(disk.delete_snapshot(&io, "b")).unwrap();
        // Before 'b' is merged into 'a', and after it.
        assert_eq!((freed("a"), freed("c")), (20, 20));
        while executor.block_on(disk.maintain(&mut admin, &io)).unwrap() {}
        assert_eq!((freed("a"), freed("c")), (20, 20));
        assert_eq!(disk.bytes_stored() / 4096, 20 + GRAINS / 2);
    }

    fn snapshot(executor: &Executor, folder: &std::path::Path, sequence: u32) -> Snapshot<HostStorage> {
        let header = SnapshotHeader {
            sequence,
            state: SnapshotState::Active,
            disk: [1; 16],
            group: [2; 16],
            generation: Generation::from_bytes([3; 16]),
            epoch: cbt::Epoch::FIRST,
            tracked: false,
            capacity: 1 << 40,
            created_ns: 0,
            name: format!("s{sequence}"),
            newer: 0,
            terms: crate::Terms::default(),
            broken: None,
        };
        let io = executor.storage();
        executor.block_on(Snapshot::create(&io, &HostDir::new(folder.to_owned()), header)).unwrap()
    }

    #[test]
    fn an_estimate_is_close_and_costs_what_was_allowed() {
        let executor = Executor::new(16).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (older, newer) = (snapshot(&executor, folder.path(), 1), snapshot(&executor, folder.path(), 2));
        let grains = 200_000u32;
        for grain in 0..grains {
            newer.publish(&[(Key::grain(grain.into()), Slot::At(grain))]);
            if grain % 4 == 0 {
                older.publish(&[(Key::grain(grain.into()), Slot::At(grains + grain))]);
            }
        }
        let exact = u64::from(grains / 4) * 4096;
        let older = [Arc::new(older)];
        assert_eq!(freed_of(&[], &newer, Some(&older), u64::MAX), exact);
        let began = Instant::now();
        let estimate = freed_of(&[], &newer, Some(&older), u64::from(grains / 10));
        log::info!("{:?} for a tenth of {grains} keys", began.elapsed());
        assert!(estimate.abs_diff(exact) < exact / 20, "{estimate} for {exact}");
    }
}
