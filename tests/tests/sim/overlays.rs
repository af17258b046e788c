//! Writable views in the simulation: who opens and closes them, who uses them, and the judging of all of
//! them when nothing is done.

use std::ops::Range;
use std::rc::Rc;

use cow_engine::cbt::ByteRange;
use cow_engine::memory::{Source, Target};
use cow_engine::sim::{Random, SimStorage};
use cow_engine::{Durability, Error, Overlay, Zeroing};
use ebbtide_tests::oracle::{Fate, Oracle, stamp};

use crate::work::{Shared, SimDisk, buffer, bytes_of, judge, with_others};

/// Overlays that are open at once, at most.
const MOST: usize = 5;

/// Whether overlays that are to be kept are there after an opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Always,
    Perhaps,
    Never,
}

/// Whether an overlay stands on a snapshot.
pub(crate) fn is_used(shared: &Shared, group: usize, disk: usize) -> bool {
    let overlays = shared.overlays.borrow();
    !overlays.with(|one| one.fate == Fate::Held && (one.group, one.disk) == (group, disk)).is_empty()
}

/// Opens an overlay, or closes one.
pub(crate) async fn command(shared: &Shared, disks: &[SimDisk], random: &mut Random) {
    let held = shared.overlays.borrow().with(|one| one.fate == Fate::Held);
    if held.len() < MOST && (held.is_empty() || !random.one_in(3)) {
        open(shared, disks, random).await;
    } else {
        close(shared, disks, *random.pick(&held));
    }
}

async fn open(shared: &Shared, disks: &[SimDisk], random: &mut Random) {
    let at = random.index(disks.len());
    let held = shared.oracle.borrow().groups_of(at, |fate| fate == Fate::Held);
    if held.is_empty() {
        return;
    }
    let group = *random.pick(&held);
    let snapshot = shared.oracle.borrow().groups[group].name.clone();
    let name = format!("o{}", shared.next_name.replace(shared.next_name.get() + 1));
    let keep = !random.one_in(4);
    let overlay = shared.overlays.borrow_mut().begin(at, group, &name, keep);
    let io = match random.below(4) {
        0 if shared.slips > 0 => {
            // While its files are made; and then the process dies while they are removed again.
            let fails = random.within(3..9);
            shared.io.fated(None, fails..fails + 1, fails + random.within(1..5))
        }
        _ => shared.of_command(),
    };
    let answer = disks[at].open_overlay(&io, &snapshot, &name, keep, &name).await;
    if shared.is_dead() {
        return;
    }
    let fate = match answer {
        Ok(_) => Fate::Held,
        Err(Error::SnapshotReleased { .. }) => {
            let released = shared.oracle.borrow().has_released(group, at);
            assert!(released, "snapshot {snapshot} has released nothing");
            Fate::Gone
        }
        Err(error) => {
            shared.allow("opening an overlay", &error);
            Fate::Unknown
        }
    };
    shared.overlays.borrow_mut().overlays[overlay].fate = fate;
}

fn close(shared: &Shared, disks: &[SimDisk], overlay: usize) {
    let (at, group, name) = {
        let mut overlays = shared.overlays.borrow_mut();
        let one = &mut overlays.overlays[overlay];
        one.fate = Fate::Deleting;
        (one.disk, one.group, one.name.clone())
    };
    let snapshot = shared.oracle.borrow().groups[group].name.clone();
    let answer = disks[at].close_overlay(&shared.of_command(), &snapshot, &name);
    if shared.is_dead() {
        return;
    }
    let fate = match answer {
        Ok(()) => Fate::Gone,
        Err(error) => {
            shared.allow("closing an overlay", &error);
            Fate::Held
        }
    };
    shared.overlays.borrow_mut().overlays[overlay].fate = fate;
}

/// Reads and writes overlays, one request after the other.
pub(crate) async fn user(shared: Rc<Shared>, disks: Vec<SimDisk>, mut random: Random, requests: u64) {
    // One that was found before, as a connection holds it.
    let mut kept: Option<(usize, Overlay<SimStorage>)> = None;
    for _ in 0..requests {
        if random.one_in(8) {
            shared.pause(&mut random, 30).await;
        }
        if let Some((overlay, found)) = kept.take_if(|(overlay, _)| is_gone(&shared, *overlay)) {
            let sectors = shared.range(shared.disk_of(overlay), found.capacity(), &mut random, 40);
            let free = shared.overlays.borrow().is_free(overlay, &sectors);
            let answer = used(&shared, &found, overlay, sectors, &mut random).await;
            let refused = matches!(answer, Err(Error::OverlayClosed { .. }));
            assert!(refused || !free || shared.is_dead(), "overlay {} is closed: {answer:?}", found.name());
        }
        let held = shared.overlays.borrow().with(|one| one.fate == Fate::Held);
        if held.is_empty() {
            shared.pause(&mut random, 60).await;
        } else {
            let overlay = *random.pick(&held);
            let answer = request(&shared, &disks, overlay, &mut random).await;
            if kept.is_none() {
                kept = find(&shared, &disks, overlay).ok().map(|found| (overlay, found));
            }
            let gone = shared.overlays.borrow().overlays[overlay].fate != Fate::Held;
            match answer {
                _ if shared.is_dead() => {}
                Ok(()) => {}
                // Once it is closed its snapshot may go too.
                Err(Error::OverlayClosed { .. }) if gone || shared.closing.get() => {}
                Err(
                    Error::NoSuchOverlay { .. }
                    | Error::NoSuchSnapshot { .. }
                    | Error::SnapshotDeleted { .. }
                    | Error::ContentReleased { .. },
                ) if gone => {}
                Err(error) => shared.allow("using an overlay", &error),
            }
        }
        if shared.is_dead() {
            return;
        }
    }
}

/// Whether it was answered that an overlay is closed.
fn is_gone(shared: &Shared, overlay: usize) -> bool {
    shared.overlays.borrow().overlays[overlay].fate == Fate::Gone
}

fn find(shared: &Shared, disks: &[SimDisk], overlay: usize) -> Result<Overlay<SimStorage>, Error> {
    let overlays = shared.overlays.borrow();
    let one = &overlays.overlays[overlay];
    disks[one.disk].overlay(&shared.oracle.borrow().groups[one.group].name, &one.name)
}

async fn request(
    shared: &Shared,
    disks: &[SimDisk],
    overlay: usize,
    random: &mut Random,
) -> Result<(), Error> {
    let found = find(shared, disks, overlay)?;
    let at = shared.disk_of(overlay);
    let cut_off = shared.overlays.borrow().overlays[overlay].cut_off.clone();
    let sectors = match random.below(3) {
        0 if !cut_off.is_empty() => random.pick(&cut_off).clone(),
        _ => shared.range(at, found.capacity(), random, 40),
    };
    used(shared, &found, overlay, sectors, random).await
}

/// Reads, flushes or changes an overlay.
async fn used(
    shared: &Shared,
    found: &Overlay<SimStorage>,
    overlay: usize,
    sectors: Range<u64>,
    random: &mut Random,
) -> Result<(), Error> {
    let range = bytes_of(&sectors);
    let io = &shared.io;
    match random.below(10) {
        0..3 => return read(shared, found, overlay, range, false).await,
        3 => return flush(shared, found, overlay).await,
        4 => return holes(shared, found, overlay, range).await,
        _ => {}
    }
    if !shared.overlays.borrow().is_free(overlay, &sectors) {
        io.turn().await;
        return Ok(());
    }
    if random.one_in(shared.cuts * 16) {
        // In the midst of it, or soon after.
        io.die_within(random.within(1..60));
    }
    let zeros = random.one_in(3);
    let now = shared.oracle.borrow_mut().now();
    let (number, salt) = shared.overlays.borrow_mut().issue(overlay, sectors.clone(), zeros, now);
    let durability = if random.one_in(4) { Durability::Durable } else { Durability::Cached };
    let lane = found.lane();
    let answer = match random.below(3) {
        _ if !zeros => {
            let mut bytes = buffer(range);
            stamp(salt, sectors.start, number as u64, &mut bytes);
            found.write(io, lane, range.start(), Source::of(&bytes), durability).await
        }
        0 => found.discard(io, lane, range).await,
        1 => found.write_zeroes(io, lane, range, Zeroing::Unmap, durability).await,
        _ => found.write_zeroes(io, lane, range, Zeroing::Keep, durability).await,
    };
    if !shared.is_dead() {
        let now = shared.oracle.borrow_mut().now();
        shared.overlays.borrow_mut().answer(overlay, number, answer.is_ok(), now);
    }
    answer
}

async fn flush(shared: &Shared, found: &Overlay<SimStorage>, overlay: usize) -> Result<(), Error> {
    let issued = shared.oracle.borrow_mut().now();
    let answer = found.flush(&shared.io).await;
    if !shared.is_dead() && !matches!(answer, Err(Error::OverlayClosed { .. })) {
        judge(shared.overlays.borrow_mut().flushed(overlay, issued, answer.is_ok()));
    }
    answer
}

/// Notes what the kernel had lost of overlays when the process was killed: of those of a disk of some, and whether
/// the next flush is told.
pub(crate) fn note_lost(shared: &Shared, of: impl Fn(usize) -> Option<bool>) {
    let mut overlays = shared.overlays.borrow_mut();
    for overlay in overlays.with(|one| one.fate != Fate::Gone) {
        if let Some(untold) = of(overlays.overlays[overlay].disk) {
            overlays.lost(overlay, untold);
        }
    }
}

async fn read(
    shared: &Shared,
    found: &Overlay<SimStorage>,
    overlay: usize,
    range: ByteRange,
    settle: bool,
) -> Result<(), Error> {
    let begin = shared.oracle.borrow_mut().now();
    let mut bytes = buffer(range);
    found.read(&shared.io, range.start(), Target::of(&mut bytes)).await?;
    if !shared.is_dead() {
        let (mut overlays, mut oracle) = (shared.overlays.borrow_mut(), shared.oracle.borrow_mut());
        judge(overlays.read(&mut oracle, overlay, begin, range.start(), &bytes, settle));
    }
    Ok(())
}

/// Extents leave no gap, and what is told a hole and not written since reads as zeros.
async fn holes(
    shared: &Shared,
    found: &Overlay<SimStorage>,
    overlay: usize,
    range: ByteRange,
) -> Result<(), Error> {
    let extents = found.extents(&shared.io, range)?;
    let mut end = range.start();
    for extent in &extents {
        assert_eq!(extent.range.start(), end, "extents leave no gap");
        end = extent.range.end();
    }
    assert_eq!(end, range.end(), "extents cover what was asked");
    read(shared, found, overlay, range, false).await
}

/// Judges which overlays a disk has after it was opened.
pub(crate) fn opened(shared: &Shared, oracle: &mut Oracle, at: usize, disk: &SimDisk, kept: Kept) {
    let mut overlays = shared.overlays.borrow_mut();
    let mut expected = Vec::new();
    for index in overlays.with(|one| one.disk == at && one.fate != Fate::Gone) {
        let one = &mut overlays.overlays[index];
        let snapshot = oracle.groups[one.group].name.clone();
        let snapshot_held = oracle.member(one.group, at).fate == Fate::Held;
        let found = disk.overlay(&snapshot, &one.name).is_ok();
        let may = one.keep && kept != Kept::Never && snapshot_held;
        let must = may && kept == Kept::Always && one.fate == Fate::Held;
        let what = format!("disk {at}: overlay {} of {snapshot} (keep {})", one.name, one.keep);
        assert!(may || !found, "{what} was kept");
        assert!(found || !must, "{what} is gone");
        one.fate = if found { Fate::Held } else { Fate::Gone };
        if found {
            expected.push(one.name.clone());
        }
    }
    for overlay in disk.overlays() {
        assert!(expected.iter().any(|name| name == overlay.name()), "overlay {} appeared", overlay.name());
        assert_eq!(overlay.note(), overlay.name(), "the note is given back");
    }
}

/// Judges the content of all overlays, while nobody changes it.
pub(crate) async fn judge_all(shared: &Shared, disks: &[SimDisk], random: &mut Random) {
    let held = shared.overlays.borrow().with(|one| one.fate == Fate::Held);
    for overlay in held {
        let at = shared.overlays.borrow().overlays[overlay].disk;
        let mut grains = shared.overlays.borrow().touched(overlay);
        grains.extend(shared.oracle.borrow().touched(at));
        let found = find(shared, disks, overlay).expect("it was found before");
        let group = shared.overlays.borrow().overlays[overlay].group;
        assert_eq!(found.capacity(), shared.frozen_size(group, at), "an overlay keeps its size");
        for range in with_others(found.capacity(), grains, random) {
            if let Err(error) = read(shared, &found, overlay, range, true).await {
                shared.allow("judging an overlay", &error);
            }
        }
        shared.overlays.borrow_mut().settled(overlay);
    }
}
