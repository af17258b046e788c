//! Checkpoints in the simulation: who makes, deletes and asks them; and the judging of all of them.

use std::collections::BTreeMap;

use cow_engine::cbt::{ByteRange, ChangeId, Epoch};
use cow_engine::sim::Random;
use cow_engine::{Error, Past, checkpoint, group};
use ebbtide_tests::oracle::{Fate, Oracle};

use crate::work::{Shared, SimDisk, bytes_of, judge};

/// Makes one, deletes one, or asks one.
pub(crate) async fn command(
    shared: &Shared,
    admin: &mut group::Admin,
    disks: &[SimDisk],
    random: &mut Random,
) {
    let at = random.index(disks.len());
    let named = shared.oracle.borrow().named_of(at, |fate| fate == Fate::Held);
    match random.below(6) {
        0 if !named.is_empty() => delete(shared, admin, disks, *random.pick(&named), at).await,
        1 | 2 if !named.is_empty() => {
            let answer = ask(shared, disks, *random.pick(&named), at, random).await;
            if let Err(error) = answer {
                allow(shared, "asking a checkpoint", &error);
            }
        }
        _ => create(shared, admin, disks, at, random).await,
    }
}

/// Damage of the runs is told, and nothing wrong.
fn allow(shared: &Shared, what: &str, error: &Error) {
    let told = shared.damaged && matches!(error, Error::CheckpointDamaged { .. });
    if !shared.is_dead() && !told {
        shared.allow(what, error);
    }
}

async fn create(
    shared: &Shared,
    admin: &mut group::Admin,
    disks: &[SimDisk],
    at: usize,
    random: &mut Random,
) {
    let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
    if held.is_empty() {
        return;
    }
    let group = *random.pick(&held);
    let name = shared.oracle.borrow().groups[group].name.clone();
    let has = |disk: &usize| disks[*disk].snapshot(&name).is_ok();
    let mut members: Vec<usize> = (0..disks.len()).filter(has).collect();
    random.shuffle(&mut members);
    if random.one_in(3) {
        members = vec![at];
    }
    let number = shared.next_name.replace(shared.next_name.get() + 1);
    // Some have the name of their snapshot.
    let taken = shared.oracle.borrow().named.iter().any(|one| one.name == name);
    let own = if random.one_in(6) && !taken { name.clone() } else { format!("c{number}") };
    let chosen: Vec<SimDisk> = members.iter().map(|&disk| disks[disk].clone()).collect();
    let named = shared.oracle.borrow_mut().begin_checkpoint(&own, group, &members);
    let answer = checkpoint::create(admin, &shared.of_command(), &chosen, &own, &name).await;
    if shared.is_dead() {
        return;
    }
    let fate = match &answer {
        Ok(made) => {
            for (one, &disk) in made.iter().zip(&members) {
                let id = shared.oracle.borrow().id_of(named, disk);
                assert_eq!(
                    Some(one.change_id()),
                    id,
                    "checkpoint {own} of disk {disk} is its snapshot's instant"
                );
            }
            Fate::Held
        }
        Err(error) => {
            let ended = |disk: &SimDisk| {
                disk.block_grid().is_none()
                    || disk
                        .snapshot(&name)
                        .is_ok_and(|one| one.change_id().generation != disk.change_id().generation)
            };
            match error {
                Error::NotTracked { .. } | Error::OtherGeneration { .. } => {
                    assert!(chosen.iter().any(ended), "checkpoint {own}: {error}");
                }
                // It may break meanwhile, as it may for a reader.
                error => shared.allow("making a checkpoint", error),
            }
            assert!(
                chosen.iter().all(|disk| disk.checkpoint(&own).is_err()),
                "checkpoint {own} after {error}"
            );
            // What could not be removed may come back.
            if shared.strict { Fate::Gone } else { Fate::Unknown }
        }
    };
    shared.oracle.borrow_mut().named(named, fate);
}

async fn delete(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], named: usize, at: usize) {
    let name = {
        let mut oracle = shared.oracle.borrow_mut();
        oracle.named[named].fates.insert(at, Fate::Deleting);
        oracle.named[named].name.clone()
    };
    let answer = disks[at].delete_checkpoint(admin, &shared.of_command(), &name);
    if shared.is_dead() {
        return;
    }
    let fate = match answer {
        Ok(()) => Fate::Gone,
        Err(error) => {
            shared.allow("deleting a checkpoint", &error);
            // As far as anyone sees until the next start.
            match disks[at].checkpoint(&name) {
                Ok(_) => Fate::Held,
                Err(_) => Fate::Unknown,
            }
        }
    };
    shared.oracle.borrow_mut().named[named].fates.insert(at, fate);
}

/// Asks for all changes up to a checkpoint since any older instant, then for parts of them.
async fn ask(
    shared: &Shared,
    disks: &[SimDisk],
    named: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let (name, group) = {
        let oracle = shared.oracle.borrow();
        (oracle.named[named].name.clone(), oracle.named[named].group)
    };
    let past = match disks[at].checkpoint(&name) {
        Ok(one) => Past::new(disks[at].clone(), one),
        Err(error) => panic!("checkpoint {name} of disk {at}: {error}"),
    };
    let sinces = sinces(&shared.oracle.borrow(), group, at);
    let Some(&since) = sinces.get(random.index(sinces.len().max(1))) else { return Ok(()) };
    let size = past.checkpoint().capacity();
    let answer = past.changes(&shared.io, since, ByteRange::new(0, size), usize::MAX).await?;
    if shared.is_dead() {
        return Ok(());
    }
    told(shared, group, at, since, &answer);
    for _ in 0..random.within(1..4) {
        let part = bytes_of(&shared.range(at, size, random, 4));
        let limit = usize::try_from(random.within(1..5)).unwrap_or(1);
        let found = past.changes(&shared.io, since, part, limit).await?;
        if shared.is_dead() {
            return Ok(());
        }
        let expected: Vec<ByteRange> = answer
            .iter()
            .map(|range| range.intersect(part))
            .filter(|range| !range.is_empty())
            .take(limit)
            .collect();
        assert_eq!(found, expected, "a part of the changes up to {name} differs from the whole");
    }
    Ok(())
}

/// Epochs since which a checkpoint is asked: of a generation that has ended those that it was asked before.
fn sinces(oracle: &Oracle, group: usize, disk: usize) -> Vec<Epoch> {
    let id = oracle.groups[group].members[&disk].id;
    let current = oracle.disks[disk].generation.map(|(generation, _)| generation);
    let mut sinces = oracle.sinces(group, disk);
    if id.map(|id| id.generation) != current {
        sinces.retain(|&since| oracle.known_answer(group, disk, since).is_some());
    }
    sinces
}

fn told(shared: &Shared, group: usize, at: usize, since: Epoch, answer: &[ByteRange]) {
    judge(shared.oracle.borrow_mut().changes_told(group, at, since, answer));
}

/// What a disk has, by name.
pub(crate) fn of(disk: &SimDisk) -> BTreeMap<String, ChangeId> {
    disk.checkpoints().iter().map(|one| (one.name().to_owned(), one.change_id())).collect()
}

/// Judges all checkpoints that are there, while nobody changes anything.
pub(crate) async fn judge_all(shared: &Shared, disks: &[SimDisk]) {
    for (at, disk) in disks.iter().enumerate() {
        let named = shared.oracle.borrow().named_of(at, |fate| fate == Fate::Held);
        for named in named {
            let (name, group) = {
                let oracle = shared.oracle.borrow();
                (oracle.named[named].name.clone(), oracle.named[named].group)
            };
            let checkpoint = match disk.checkpoint(&name) {
                Ok(one) => one,
                Err(error) => panic!("checkpoint {name} of disk {at}: {error}"),
            };
            let past = Past::new(disk.clone(), checkpoint.clone());
            let all = ByteRange::new(0, checkpoint.capacity());
            let sinces = sinces(&shared.oracle.borrow(), group, at);
            for since in sinces {
                match past.changes(&shared.io, since, all, usize::MAX).await {
                    Ok(answer) => told(shared, group, at, since, &answer),
                    Err(error) => allow(shared, "judging a checkpoint", &error),
                }
            }
            // As the older end it is as good as its generation.
            let same = checkpoint.change_id().generation == disk.change_id().generation;
            let good = disk.check_incremental(checkpoint.change_id());
            match good {
                // The next snapshot's changes will not be told in full.
                Err(error @ Error::MarksLost { .. }) => allow(shared, "asking whether one is good", &error),
                good => assert_eq!(
                    good.is_ok(),
                    same && disk.block_grid().is_some(),
                    "checkpoint {name}: {good:?}"
                ),
            }
        }
    }
}
