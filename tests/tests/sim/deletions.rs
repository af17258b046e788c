//! Deletions in the simulation: snapshots that end one upon the other, while guests go on to preserve into them, and
//! what takes their place.

use cow_engine::group;
use cow_engine::sim::Random;
use ebbtide_tests::oracle::Fate;

use crate::work::{Shared, SimDisk, create, delete, maintain_some};

/// Ends some snapshots of a disk in one of the ways in which they lean on each other.
pub(crate) async fn command(
    shared: &Shared,
    admin: &mut group::Admin,
    disks: &[SimDisk],
    random: &mut Random,
) {
    let at = random.index(disks.len());
    let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
    let (all, few) = (u64::MAX, random.within(1..6));
    match (random.below(4), &held[..]) {
        // Another one that may get the same number and the same slots.
        (0, _) => {
            delete_all(shared, disks, at, &held).await;
            create(shared, admin, disks, random).await;
        }
        // One that has part of what the other one had, and ends too.
        (1, [.., older, newer]) => {
            delete(shared, disks, *newer, at).await;
            maintain_some(shared, admin, &disks[at], few).await;
            delete(shared, disks, *older, at).await;
            maintain_some(shared, admin, &disks[at], few).await;
        }
        // One between others.
        (2, [.., older, middle, _]) => {
            let group = if random.one_in(2) { *older } else { *middle };
            delete(shared, disks, group, at).await;
            maintain_some(shared, admin, &disks[at], all).await;
        }
        (3, [.., newest]) => {
            delete(shared, disks, *newest, at).await;
            maintain_some(shared, admin, &disks[at], all).await;
        }
        _ => create(shared, admin, disks, random).await,
    }
}

async fn delete_all(shared: &Shared, disks: &[SimDisk], at: usize, held: &[usize]) {
    for &group in held.iter().rev() {
        if shared.is_dead() {
            return;
        }
        delete(shared, disks, group, at).await;
    }
}
