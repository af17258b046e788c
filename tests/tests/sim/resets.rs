//! New generations while a disk is served.
//!
//! Invariant: one that is answered is there after every crash, and its checkpoints say why; one that was refused
//! or failed leaves the old one.
//! Absent: what changes must be named since; the oracle knows.

use std::time::Duration;

use cow_engine::sim::Random;
use cow_engine::{Error, group};

use crate::work::{Shared, SimDisk, judge};

/// Begins a new generation of a disk, or is refused because a snapshot is held.
pub(crate) async fn command(
    shared: &Shared,
    admin: &mut group::Admin,
    disks: &[SimDisk],
    random: &mut Random,
) {
    let at = random.index(disks.len());
    let disk = &disks[at];
    let before = disk.change_id();
    let earlier = shared.oracle.borrow_mut().begin_reset(at);
    let limit = Duration::from_secs(random.within(1..60));
    let answer = disk.reset_tracking(admin, &shared.io, limit).await;
    if shared.is_dead() {
        return;
    }
    match answer {
        Ok(id) => {
            assert!(disk.snapshots().is_empty(), "disk {at}: reset while a snapshot is held");
            assert!(id.generation != before.generation && id.epoch >= before.epoch, "{before} became {id}");
            for one in disk.checkpoints() {
                let is_of_it = one.change_id().generation == before.generation;
                assert!(!is_of_it || one.ended().as_deref() == Some("operator"), "{}", one.name());
            }
            // With faults the flush may have failed, which ends the history when the host stops.
            judge(shared.oracle.borrow_mut().reset(at, id, shared.strict));
        }
        Err(error) => {
            assert_eq!(disk.change_id(), before, "disk {at}: {error}");
            let refused = match &error {
                Error::SnapshotsHeld { .. } | Error::RewindActive { .. } => true,
                Error::ResizeUnfinished { .. } | Error::GateTimeout { .. } => true,
                Error::NotTracked { .. } => disk.block_grid().is_none(),
                _ => false,
            };
            if refused {
                shared.oracle.borrow_mut().not_reset(at, earlier);
            } else {
                shared.allow("resetting a tracker", &error);
            }
        }
    }
}
