//! Readers of views, who may release what they have read; and hunts, in which something happens to a
//! snapshot while all of them read it.

use std::rc::Rc;

use cow_engine::cbt::ByteRange;
use cow_engine::sim::{Random, SimStorage};
use cow_engine::{Error, View, group};
use ebbtide_tests::oracle::{Fate, GRAIN, Oracle};

use crate::overlays;
use crate::work::{Shared, SimDisk, buffer, bytes_of, create, delete, judge};

/// Reads views, and asks for changes and holes.
pub(crate) async fn reader(shared: Rc<Shared>, disks: Vec<SimDisk>, mut random: Random, questions: u64) {
    let releases = random.below(10) < shared.releases;
    for _ in 0..questions {
        for _ in 0..random.below(40) {
            read_hunted(&shared, &disks, &mut random).await;
            shared.io.turn().await;
        }
        if shared.is_dead() {
            return;
        }
        let at = random.index(disks.len());
        let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
        if held.is_empty() {
            continue;
        }
        // The newest is where most races are, and the oldest where releases have an effect.
        let group = match releases {
            true => held[0],
            false if random.one_in(2) => held[held.len() - 1],
            false => *random.pick(&held),
        };
        let view = view_of(&shared, &disks, group, at);
        for _ in 0..random.within(1..6) {
            let answer = match random.below(6) {
                0 => some_changes(&shared, &view, group, at, &mut random).await,
                1 => some_holes(&shared, &view, group, at, &mut random).await,
                _ if releases => read_and_release(&shared, &view, group, at, &mut random).await,
                _ => {
                    let range = bytes_of(&shared.range(at, view.capacity(), &mut random, 20));
                    read_view(&shared, &view, group, at, range).await
                }
            };
            if shared.is_dead() {
                return;
            }
            if let Err(error) = answer {
                if shared.oracle.borrow_mut().member(group, at).fate == Fate::Held {
                    shared.allow("reading a view", &error);
                }
                break;
            }
        }
    }
}

/// Reads a range; where part of it was released, grain by grain.
pub(crate) async fn read_view(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    range: ByteRange,
) -> Result<(), Error> {
    let lost = shared.oracle.borrow().lost(group, at, range);
    let mut bytes = buffer(range);
    let answer = view.read(&shared.io, range.start(), &mut bytes).await;
    if shared.is_dead() {
        return Ok(());
    }
    match answer {
        Ok(()) => {
            assert!(
                lost.is_empty(),
                "view {} of disk {at} has released grains {lost:?}",
                view.snapshot().name()
            );
            judge(shared.oracle.borrow_mut().view_read(group, at, range.start(), &bytes));
        }
        Err(Error::ContentReleased { at: byte, .. }) => {
            judge(shared.oracle.borrow().view_lost(group, at, range, byte));
            let grains = range.start() / GRAIN..range.end().div_ceil(GRAIN);
            if grains.end - grains.start > 1 {
                for grain in grains {
                    let part = ByteRange::new(grain * GRAIN, (grain + 1) * GRAIN).intersect(range);
                    Box::pin(read_view(shared, view, group, at, part)).await?;
                }
            }
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Reads some ranges one after the other, and releases each when it was read.
async fn read_and_release(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let mut range = bytes_of(&shared.range(at, view.capacity(), random, 8));
    for _ in 0..random.within(1..6) {
        read_view(shared, view, group, at, range).await?;
        release(shared, view, group, at, range).await?;
        if shared.is_dead() {
            return Ok(());
        }
        // On from there, as a copy goes through a disk.
        let end = (range.end() + range.len()).min(view.capacity());
        if range.end() >= end {
            return Ok(());
        }
        range = ByteRange::new(range.end(), end);
    }
    Ok(())
}

async fn release(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    range: ByteRange,
) -> Result<(), Error> {
    let end = if range.end() == view.capacity() { range.end().div_ceil(GRAIN) } else { range.end() / GRAIN };
    let grains = range.start().div_ceil(GRAIN)..end;
    let used = overlays::is_used(shared, group, at);
    let has_older = |oracle: &Oracle| {
        oracle.groups_of(at, |fate| fate != Fate::Gone).first().is_some_and(|&older| older < group)
    };
    let older = has_older(&shared.oracle.borrow());
    let new = shared.oracle.borrow_mut().begin_release(group, at, grains.clone());
    let (reverts, rewinding) = (shared.reverts.get(), view.disk().rewind().is_some());
    let answer = view.release(&shared.io, range).await;
    if shared.is_dead() {
        return Ok(());
    }
    let mut oracle = shared.oracle.borrow_mut();
    match answer {
        Ok(true) => {
            let used = used && !grains.is_empty();
            assert!(!used || !overlays::is_used(shared, group, at), "released below an overlay");
            oracle.released(group, at, grains);
        }
        Ok(false) => {
            let rewinding = rewinding || reverts % 2 == 1 || reverts != shared.reverts.get();
            let expected = older || has_older(&oracle) || rewinding || !shared.strict;
            assert!(expected, "the oldest snapshot did not release");
            oracle.not_released(group, at, &new);
        }
        Err(Error::SnapshotInUse { .. }) => oracle.not_released(group, at, &new),
        Err(error) => return Err(error),
    }
    Ok(())
}

async fn some_holes(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let range = bytes_of(&shared.range(at, view.capacity(), random, 20));
    let lost = shared.oracle.borrow().lost(group, at, range);
    let extents = view.extents(&shared.io, range)?;
    let mut end = range.start();
    for extent in &extents {
        assert_eq!(extent.range.start(), end, "extents leave no gap");
        end = extent.range.end();
    }
    assert_eq!(end, range.end(), "extents cover what was asked");
    read_view(shared, view, group, at, range).await?;
    if !shared.is_dead() {
        for extent in extents.iter().filter(|extent| extent.hole) {
            let of_it: Vec<_> = lost
                .iter()
                .filter(|&&grain| {
                    extent.range.start() < (grain + 1) * GRAIN && grain * GRAIN < extent.range.end()
                })
                .collect();
            assert!(of_it.is_empty(), "released grains {of_it:?} are in the hole {}", extent.range);
            judge(shared.oracle.borrow().view_hole(group, at, extent.range));
        }
    }
    Ok(())
}

async fn some_changes(
    shared: &Shared,
    view: &View<SimStorage>,
    group: usize,
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let sinces = shared.oracle.borrow().sinces(group, at);
    if sinces.is_empty() || view.block_grid().is_err() {
        return Ok(());
    }
    let since = *random.pick(&sinces);
    let all = ByteRange::new(0, view.capacity());
    let known = shared.oracle.borrow().known_answer(group, at, since).map(<[ByteRange]>::to_vec);
    let Some(known) = known.filter(|_| random.one_in(2)) else {
        let Some(answer) = unless_ended(view, view.changes(&shared.io, since, all, usize::MAX).await)? else {
            return Ok(());
        };
        if !shared.is_dead() {
            judge(shared.oracle.borrow_mut().changes_told(group, at, since, &answer));
        }
        return Ok(());
    };
    let part = bytes_of(&shared.range(at, view.capacity(), random, 4));
    let limit = random.within(1..5);
    let limit = usize::try_from(limit).unwrap_or(1);
    let Some(answer) = unless_ended(view, view.changes(&shared.io, since, part, limit).await)? else {
        return Ok(());
    };
    let expected: Vec<ByteRange> = known
        .iter()
        .map(|range| range.intersect(part))
        .filter(|range| !range.is_empty())
        .take(limit)
        .collect();
    assert_eq!(answer, expected, "a part of the changes differs from the whole");
    Ok(())
}

/// The answer, unless the snapshot's generation ended meanwhile.
fn unless_ended<T>(view: &View<SimStorage>, answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Err(Error::NotTracked { .. }) if view.block_grid().is_err() => Ok(None),
        answer => answer.map(Some),
    }
}

/// Deletes a snapshot, releases much of it, or takes another, while all readers read it; and lets
/// everything that then needs to be done be done at once.
pub(crate) async fn hunt(shared: &Shared, admin: &mut group::Admin, disks: &[SimDisk], random: &mut Random) {
    let at = random.index(disks.len());
    let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
    if held.is_empty() {
        return;
    }
    let group = if random.one_in(2) { held[0] } else { held[held.len() - 1] };
    shared.hunted.set(Some((group, at)));
    shared.pause(random, 60).await;
    let view = view_of(shared, disks, group, at);
    match random.below(3) {
        _ if shared.is_dead() => {}
        0 if shared.releases > 0 => {
            let most = view.capacity().min(64 * GRAIN);
            let start = random.below((view.capacity() - most) / GRAIN + 1) * GRAIN;
            let range = ByteRange::new(start, start + most);
            if let Err(error) = release(shared, &view, group, at, range).await {
                shared.allow("releasing", &error);
            }
        }
        1 => create(shared, admin, disks, random).await,
        _ => delete(shared, disks, group, at).await,
    }
    for _ in 0..random.within(1..40) {
        if shared.is_dead() || !matches!(disks[at].maintain(admin, &shared.io).await, Ok(true)) {
            break;
        }
    }
    shared.pause(random, 40).await;
    shared.hunted.set(None);
}

/// The view of a snapshot that is held.
fn view_of(shared: &Shared, disks: &[SimDisk], group: usize, at: usize) -> View<SimStorage> {
    let name = shared.oracle.borrow().groups[group].name.clone();
    match disks[at].snapshot(&name) {
        Ok(snapshot) => View::new(disks[at].clone(), snapshot),
        Err(error) => panic!("snapshot {name} of disk {at} is gone: {error}"),
    }
}

/// Reads and releases some of a disk's oldest snapshot.
async fn release_oldest(
    shared: &Shared,
    disks: &[SimDisk],
    at: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
    let Some(&oldest) = held.first() else { return Ok(()) };
    let view = view_of(shared, disks, oldest, at);
    match read_and_release(shared, &view, oldest, at, random).await {
        Err(_) if shared.oracle.borrow_mut().member(oldest, at).fate != Fate::Held => Ok(()),
        answer => answer,
    }
}

/// Reads the snapshot that is hunted as long as it is.
async fn read_hunted(shared: &Shared, disks: &[SimDisk], random: &mut Random) {
    let Some((group, at)) = shared.hunted.get() else { return };
    if shared.oracle.borrow_mut().member(group, at).fate != Fate::Held {
        return;
    }
    let view = view_of(shared, disks, group, at);
    while shared.hunted.get() == Some((group, at)) && !shared.is_dead() {
        let answer = match random.below(6) {
            0 => some_changes(shared, &view, group, at, random).await,
            1 => some_holes(shared, &view, group, at, random).await,
            // What is deleted may be merged into the oldest meanwhile, or be that itself.
            2 | 3 if shared.releases > 0 => release_oldest(shared, disks, at, random).await,
            _ => {
                // Long, so that much can happen between its first byte and its last.
                let near = bytes_of(&shared.range(at, view.capacity(), random, 20));
                let end = (near.end() + random.below(40) * GRAIN).min(view.capacity());
                let start = near.start().saturating_sub(random.below(40) * GRAIN);
                read_view(shared, &view, group, at, ByteRange::new(start, end)).await
            }
        };
        if let Err(error) = answer {
            if !shared.is_dead() && shared.oracle.borrow_mut().member(group, at).fate == Fate::Held {
                shared.allow("reading a view", &error);
            }
            return;
        }
        shared.io.turn().await;
    }
}
