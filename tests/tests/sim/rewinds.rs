//! Rewinds in the simulation: who commands them, and their end.

use std::rc::Rc;
use std::time::Duration;

use cow_engine::sim::Random;
use cow_engine::{Error, View, group};
use ebbtide_tests::oracle::{Fate, Outcome};

use crate::readers::read_view;
use crate::work::{Shared, SimDisk, maintain_all, with_others};

/// Rewinds a disk to one of its snapshots.
pub(crate) async fn command(
    shared: &Shared,
    admin: &mut group::Admin,
    disks: &[SimDisk],
    random: &mut Random,
) {
    let at = random.index(disks.len());
    let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
    if held.is_empty() {
        return;
    }
    let group = *random.pick(&held);
    let name = shared.oracle.borrow().groups[group].name.clone();
    let grains = shared.oracle.borrow().undetermined(group, at);
    if !grains.is_empty() {
        // What the disk is to become is known once it was seen.
        let snapshot = disks[at].snapshot(&name).expect("it is held");
        let view = View::new(disks[at].clone(), snapshot);
        if view.snapshot().has_released() {
            return;
        }
        for range in with_others(view.capacity(), grains, random) {
            if let Err(error) = read_view(shared, &view, group, at, range).await {
                return shared.allow("reading what a disk is to become", &error);
            }
            if shared.is_dead() {
                return;
            }
        }
    }
    let before = disks[at].rewind();
    let frozen = shared.frozen_size(group, at);
    let released = disks[at].snapshot(&name).is_ok_and(|snapshot| snapshot.has_released());
    let revert = shared.oracle.borrow_mut().begin_revert(group, at);
    let Some(revert) = revert else { return };
    shared.reverts.set(shared.reverts.get() + 1);
    let answer = disks[at].revert(admin, &shared.of_command(), &name, Duration::from_secs(5)).await;
    shared.reverts.set(shared.reverts.get() + 1);
    if shared.is_dead() {
        return;
    }
    shared.note_failed_syncs();
    let outcome = match &answer {
        Ok(_) => Outcome::Done,
        Err(
            Error::RewindActive { .. }
            | Error::GateTimeout { .. }
            | Error::CapacityDiffers { .. }
            | Error::SnapshotReleased { .. },
        ) => Outcome::Refused,
        Err(_) => Outcome::Failed,
    };
    shared.oracle.borrow_mut().reverted(revert, outcome);
    match answer {
        Ok(_) => assert!(before.is_none(), "a second rewind began"),
        Err(Error::RewindActive { .. }) if before.is_some() => {}
        Err(Error::GateTimeout { .. }) => {}
        Err(Error::CapacityDiffers { .. }) => assert_ne!(frozen, disks[at].capacity()),
        Err(Error::SnapshotReleased { .. }) if released => {}
        Err(error) => shared.allow("rewinding", &error),
    }
}

/// Lets all rewinds come to their end; whether they did.
pub(crate) async fn complete(shared: Rc<Shared>, disks: Vec<SimDisk>) -> bool {
    for disk in &disks {
        maintain_all(&shared.io, disk).await.expect("no faults now");
        let may = !shared.strict || !shared.terms.is_empty();
        assert!(disk.rewind().is_none() || may, "a rewind does not end");
    }
    disks.iter().all(|disk| disk.rewind().is_none())
}
