//! New generations while a disk is served: reset, and tracking switched off and on.
//!
//! Invariant: one that is answered is there after every crash, and its checkpoints say why; one that was refused
//! or failed leaves the old one.
//! Absent: what changes must be named since; the oracle knows.

use std::time::Duration;

use cow_engine::sim::Random;
use cow_engine::{Error, group};

use crate::work::{Shared, SimDisk, judge};

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Reset,
    Enable,
    Disable,
}

/// Begins a new generation of a disk, or is refused because a snapshot is held or it is switched so already.
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
    let was_off = disk.is_switched_off();
    let verb = match was_off {
        true => *random.pick(&[Verb::Enable, Verb::Enable, Verb::Enable, Verb::Disable, Verb::Reset]),
        false => *random.pick(&[Verb::Reset, Verb::Reset, Verb::Disable, Verb::Disable, Verb::Enable]),
    };
    let io = shared.of_command();
    let (answer, reason) = match verb {
        Verb::Reset => (disk.reset_tracking(admin, &io, limit).await, "operator"),
        Verb::Enable => (disk.enable_tracking(admin, &io, limit).await, "tracking-enabled"),
        Verb::Disable => (disk.disable_tracking(admin, &io, limit).await, "tracking-disabled"),
    };
    if shared.is_dead() {
        return;
    }
    match answer {
        Ok(id) => {
            assert!(
                verb != Verb::Reset || disk.snapshots().is_empty(),
                "disk {at}: reset while a snapshot is held"
            );
            assert_eq!(disk.is_switched_off(), verb == Verb::Disable);
            assert_eq!(disk.block_grid().is_none(), verb == Verb::Disable);
            assert!(id.generation != before.generation && id.epoch >= before.epoch, "{before} became {id}");
            for one in disk.checkpoints() {
                let is_of_it = one.change_id().generation == before.generation;
                assert!(!is_of_it || one.ended().as_deref() == Some(reason), "{}", one.name());
            }
            // With faults the flush may have failed, which ends the history when the host stops. Of a beginning that is never
            // told nothing has to be durable.
            let durable = verb == Verb::Enable || verb == Verb::Reset && shared.strict;
            let mut oracle = shared.oracle.borrow_mut();
            judge(oracle.reset(at, id, durable));
            oracle.switched(at, disk.is_switched_off(), disk.block_grid());
        }
        Err(error) => {
            assert_eq!(disk.change_id(), before, "disk {at}: {error}");
            assert_eq!(disk.is_switched_off(), was_off, "disk {at}: {error}");
            let refused = match &error {
                Error::SnapshotsHeld { .. } | Error::RewindActive { .. } => true,
                Error::ResizeUnfinished { .. } | Error::GateTimeout { .. } => true,
                Error::TrackingAlready { .. } => was_off == (verb == Verb::Disable),
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
