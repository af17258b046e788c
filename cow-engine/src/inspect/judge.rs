//! What opening would make of a state directory, and what is lost by it.

use super::read::{CopyFound, Fate, Head, Index, Overlay, State, WordsOf, Wrong};
use super::{Around, Finding, Grade};
use crate::away::sample::Found;
use crate::away::{self, Doubt};
use crate::format::{DiskState, MAP_FILE, STORE_FILE, SUPERBLOCK_FILE, SnapshotState, Superblock};
use crate::intent::INTENT_FILE;
use crate::open::{is_as_left, is_presumable, is_proved, is_short, is_unneeded, leads_to};
use crate::overlay::{cells_file, data_file, head_file, len_of_cells};

/// Opening begins a new history.
const ANEW: &str = "a new generation begins, and the snapshots are dropped with their overlays";

/// Opening goes on with the history.
const PRESUMED: &str =
    "what may have changed counts as changed, and the snapshots are dropped with their overlays";

/// Decides what becomes of the indexes: [`crate::open`]'s order of damage, need and breaks.
pub(super) fn settle_fates(state: &mut State) {
    let published = |sequence| state.words.as_ref().map_or(0, |words| words.records(sequence));
    let noted = state.words.as_ref().map_or(0, |words| words.broken_up_to);
    let store_len = state.store_len.unwrap_or(0);
    let mut older: Option<(u32, u32)> = None;
    for index in &mut state.indexes {
        index.fate = first_fate(index, store_len, published(index.sequence));
        let (Fate::Kept | Fate::Broken, Head::Valid(head)) = (&index.fate, &index.head) else { continue };
        let is_named = older.is_none_or(|(_, named)| named == head.sequence);
        if is_unneeded(head.state, is_named) {
            index.fate = Fate::Unneeded;
        } else {
            older = Some((head.sequence, head.newer));
        }
    }
    let mut lost = false;
    let mut newer = None;
    for index in state.indexes.iter_mut().rev() {
        let (Fate::Kept | Fate::Broken, Head::Valid(head)) = (&index.fate, &index.head) else { continue };
        lost |= !leads_to(head.newer, newer) || index.records.unlisted.is_some();
        newer = Some(head.sequence);
        if matches!(index.fate, Fate::Kept) {
            index.fate = match lost {
                true => Fate::Cut,
                false if head.sequence <= noted => Fate::Noted,
                false => Fate::Kept,
            };
        }
    }
}

/// What becomes of an index if nothing is wrong with the others.
fn first_fate(index: &Index, store_len: u64, published: u32) -> Fate {
    let wrong = |code, at, what: String| Fate::Damaged(Wrong { code, at, what });
    let head = match &index.head {
        Head::Valid(head) => head,
        Head::Unmade => return Fate::Unneeded,
        Head::Version(version) => return wrong("unknown-version", Some(8), of_version(*version)),
        Head::Damaged => return wrong("damaged-head", Some(0), "its head is damaged".into()),
        Head::Foreign => {
            return wrong(
                "foreign-head",
                Some(16),
                "its head is another snapshot's, or another disk's".into(),
            );
        }
    };
    let records = &index.records;
    if head.broken.is_some() {
        Fate::Broken
    } else if records.damaged > 0 {
        let what = format!("{} of its records are damaged", records.damaged);
        wrong("damaged-record", records.first_damaged, what)
    } else if store_len < records.store_end {
        let what = format!("its records name slots up to byte {}, past the store's end", records.store_end);
        wrong("slot-past-end", None, what)
    } else if is_short(u32::try_from(records.written & u64::from(u32::MAX)).unwrap_or(0), published) {
        let what = format!("it has {} records, and {published} were counted", records.written);
        wrong("short-index", Some(index.len), what)
    } else {
        Fate::Kept
    }
}

fn of_version(version: u32) -> String {
    format!("it is of version {version}, which this program does not know")
}

/// All findings, in the order in which opening meets them.
pub(super) fn findings(state: &State, around: &Around) -> Vec<Finding> {
    let mut found = Vec::new();
    for (file, why) in &state.unreadable {
        found.push(wrong(
            "unreadable",
            file,
            None,
            format!("it cannot be looked at: {why}"),
            "it is used if it is one of opening's own names, and fails",
        ));
    }
    let anew =
        [superblock(state, &mut found), image(state, around, &mut found), map(state, around, &mut found)];
    if anew.contains(&true) {
        let lost = ["what changed until now".to_owned()].into_iter().chain(dropped(state));
        let lost = lost.collect::<Vec<_>>().join("; ");
        found.iter_mut().filter(|one| one.opening == ANEW).for_each(|one| one.lost.clone_from(&lost));
    }
    let lost = dropped(state).join("; ");
    found.iter_mut().filter(|one| one.opening == PRESUMED).for_each(|one| one.lost.clone_from(&lost));
    super::rewind::judge(state, around, &mut found);
    for at in 0..state.indexes.len() {
        snapshot(state, at, &mut found);
    }
    for one in &state.overlays {
        overlay(state, one, around, &mut found);
    }
    super::checkpoint::judge(state, &mut found);
    if state.intent == Some(false) && state.superblock().is_some() {
        let what = "it is damaged, or of a disk of another size";
        found.push(Finding { code: "damaged-intent-log", ..left(INTENT_FILE, what, "it is made anew") });
    }
    for file in &state.unknown {
        found.push(wrong("unknown-file", file, None, "no part of a state directory".into(), "it stays"));
    }
    found
}

pub(super) fn wrong(code: &'static str, file: &str, at: Option<u64>, what: String, opening: &str) -> Finding {
    Finding {
        grade: Grade::Wrong,
        code,
        file: file.to_owned(),
        at,
        what,
        opening: opening.to_owned(),
        lost: String::new(),
    }
}

pub(super) fn left(file: &str, what: &str, opening: &str) -> Finding {
    Finding { grade: Grade::Left, ..wrong("left-over", file, None, what.to_owned(), opening) }
}

/// Judges the superblock; whether a new history begins for its sake.
fn superblock(state: &State, found: &mut Vec<Finding>) -> bool {
    let before = found.len();
    for (nth, copy) in state.copies.iter().enumerate() {
        let at = Some(nth as u64 * crate::format::PAGE as u64);
        let what = match copy {
            CopyFound::Valid(_) => continue,
            CopyFound::Version(version) => {
                found.push(wrong("unknown-version", SUPERBLOCK_FILE, at, of_version(*version), ANEW));
                continue;
            }
            CopyFound::Damaged => "a copy is damaged, which may have been the newer one",
            // Once there was a second copy there always are two.
            CopyFound::Unused if state.superblock().is_some() && state.verdict.one_damaged => {
                "a copy is gone, which may have been the newer one"
            }
            CopyFound::Unused => continue,
        };
        found.push(wrong("damaged-superblock", SUPERBLOCK_FILE, at, what.into(), ANEW));
    }
    let none = state.copies.iter().all(|copy| matches!(copy, CopyFound::Unused));
    let begun = state.map_len.is_some() || !state.indexes.is_empty() || !state.overlays.is_empty();
    if none && begun {
        let what = if state.superblock_len.is_some() { "it is empty" } else { "it is missing" };
        found.push(wrong("no-superblock", SUPERBLOCK_FILE, None, what.into(), ANEW));
    } else if none && state.superblock_len.is_some() {
        let first = left(SUPERBLOCK_FILE, "the first start was cut off", "it begins anew");
        found.push(Finding { code: "first-start", ..first });
    } else if none {
        let what = "it is missing: this is no state directory";
        found.push(wrong("no-superblock", SUPERBLOCK_FILE, None, what.into(), "it becomes one"));
    }
    found.len() > before && found.last().is_some_and(|one| one.opening == ANEW)
}

/// Compares the image with what was stamped; whether a new history begins for its sake.
fn image(state: &State, around: &Around, found: &mut Vec<Finding>) -> bool {
    let Some(superblock) = state.superblock() else { return false };
    if superblock.state == DiskState::HandedOver {
        let what =
            "the history was exported, and goes on elsewhere; an export that is not used can be cancelled";
        found.push(wrong("handed-over", SUPERBLOCK_FILE, None, what.into(), ANEW));
        return true;
    }
    let Some(image) = &around.image else { return false };
    let boot = around.boot.unwrap_or(superblock.boot);
    if is_proved(superblock, image, &boot) {
        if let Some(doubt) = doubt(state, superblock, around) {
            found.push(wrong(doubt.code, doubt.file, None, doubt.what, ANEW));
            return true;
        }
        if let Some(to) = superblock.growing_to {
            let what = format!("a resize to {to} bytes was cut off");
            let opening = match image.len == to {
                true => "it is finished",
                false => "it is forgotten: the image has the old size",
            };
            found.push(left(SUPERBLOCK_FILE, &what, opening));
        }
        return false;
    }
    let logged = state.intent == Some(true) || superblock.block_bytes == 0;
    if logged && is_presumable(superblock, image, &boot) {
        if let Some(doubt) = doubt(state, superblock, around) {
            found.push(wrong(doubt.code, doubt.file, None, doubt.what, ANEW));
            return true;
        }
        let what = "the host stopped while the disk was served".into();
        found.push(wrong("host-stopped", SUPERBLOCK_FILE, None, what, PRESUMED));
        return false;
    }
    let what = match superblock.state {
        DiskState::Serving | DiskState::Unlogged | DiskState::Resetting if superblock.boot != boot => {
            "the host stopped while the disk was served, so marks may be lost"
        }
        DiskState::Doubtful if superblock.boot != boot => {
            "it counted as closed until the host stopped only, so marks and snapshots may be lost"
        }
        _ => "the image is not as it was left",
    };
    found.push(wrong("not-as-left", SUPERBLOCK_FILE, None, what.into(), ANEW));
    true
}

/// What makes the image, or the map, another one than was left: [`away::look`]'s order.
fn doubt(state: &State, superblock: &Superblock, around: &Around) -> Option<Doubt> {
    let image = around.image.as_ref()?;
    let boot = around.boot.unwrap_or(superblock.boot);
    let words = state.words.as_ref().map(|words| &words.control);
    let by_times = away::by_times(superblock, words, image, &boot, around.boot_began_ns);
    if by_times.is_some() {
        return by_times;
    }
    match &state.sample {
        Found::None => None,
        Found::Damaged => Some(away::sample_damaged()),
        Found::Sample(sample) => {
            let medium = around.medium.filter(|_| superblock.boot == boot);
            let of_map = state.map_sum.as_ref().and_then(|sum| away::of_map(sample, sum));
            of_map.or_else(|| away::of_image(sample, &state.differ, medium))
        }
    }
}

/// Judges the map; whether a new history begins for its sake.
fn map(state: &State, around: &Around, found: &mut Vec<Finding>) -> bool {
    let Some(superblock) = state.superblock() else { return false };
    let fits = is_as_left::<WordsOf>(superblock, state.map_len);
    if !fits {
        let what = match state.map_len {
            None => "it is missing".to_owned(),
            Some(len) => format!("it has {len} bytes, and the superblock says another size"),
        };
        found.push(wrong("damaged-map", MAP_FILE, None, what, ANEW));
    }
    let boot = around.boot.unwrap_or(superblock.boot);
    let this_boot = superblock.boot == boot;
    let lost = this_boot && state.words.as_ref().is_some_and(|words| words.control.words_lost(&boot));
    if lost {
        let what = "what the last daemon noted in its first page may be lost: the kernel could not write it";
        found.push(wrong("lost-notes", MAP_FILE, Some(0), what.into(), ANEW));
    }
    if state.words.as_ref().is_some_and(|words| words.flush_failed) {
        let what = "a flush of the image has failed since the host was started";
        let mut one = wrong(
            "flush-failed",
            MAP_FILE,
            Some(4),
            what.into(),
            "the disk is not stamped as clean until the host has started anew",
        );
        "what the kernel could not write of the image".clone_into(&mut one.lost);
        found.push(one);
    }
    !fits || lost
}

/// What is dropped with the image as it was: snapshots and overlays, by name.
fn dropped(state: &State) -> Vec<String> {
    let held =
        state.indexes.iter().filter(|index| matches!(index.fate, Fate::Kept | Fate::Cut | Fate::Noted));
    let names = held.filter_map(Index::head).filter(|head| head.state == SnapshotState::Active);
    let names: Vec<_> = names.map(|head| format!("'{}'", head.name)).collect();
    let kept = state.overlays.iter().filter_map(|one| one.head.as_ref().ok()?.as_ref());
    let overlays: Vec<_> = kept.filter(|head| head.keep).map(|head| format!("'{}'", head.name)).collect();
    let mut lost = Vec::new();
    if !names.is_empty() {
        lost.push(format!("snapshots {}", names.join(", ")));
    }
    if !overlays.is_empty() {
        lost.push(format!("overlays {}", overlays.join(", ")));
    }
    lost
}

fn snapshot(state: &State, at: usize, found: &mut Vec<Finding>) {
    let index = &state.indexes[at];
    let name = index.head().map_or_else(
        || format!("snapshot number {}", index.sequence),
        |head| match head.state {
            SnapshotState::Active => format!("snapshot '{}'", head.name),
            SnapshotState::Prepared => format!("snapshot '{}', which was never confirmed", head.name),
            SnapshotState::Deleted => format!("what deleted snapshot '{}' holds for older ones", head.name),
        },
    );
    match &index.fate {
        Fate::Kept => {}
        Fate::Unneeded => {
            found.push(left(
                &index.file,
                "nobody needs it: it was merged, or its creation was cut off",
                "it is removed",
            ));
        }
        Fate::Damaged(Wrong { code, at: byte, what }) => {
            let mut one = wrong(
                code,
                &index.file,
                *byte,
                what.clone(),
                "it is dropped, and the older ones that need it are broken",
            );
            one.lost = name;
            found.push(one);
        }
        Fate::Broken => {
            let reason =
                index.head().and_then(|head| head.broken.as_ref()).map_or("", |broken| &broken.reason);
            let mut one = wrong(
                "broken",
                &index.file,
                None,
                format!("it is broken: {reason}"),
                "it stays, and cannot be read",
            );
            one.lost = name;
            found.push(one);
        }
        Fate::Noted => {
            let what = "the map notes that it is broken, its head does not say so";
            let mut one = wrong("broken-noted", &index.file, None, what.into(), "it is marked as broken");
            one.lost = name;
            found.push(one);
        }
        Fate::Cut => {
            let named = index.head().map_or(0, |head| head.newer);
            let unlisted = index.records.unlisted;
            let what = match state.indexes[at + 1..].iter().find(|newer| newer.sequence == named) {
                Some(newer) if matches!(newer.fate, Fate::Damaged(_)) => {
                    format!("it needs number {named}, which is damaged")
                }
                _ if unlisted.is_some() => "it names slots that are in no area of the list".to_owned(),
                Some(_) => "it needs a newer one that is lost".to_owned(),
                None if named == 0 => "it names no newer one, and there is one".to_owned(),
                None => format!("it needs number {named}, which is not there"),
            };
            let mut one = wrong("chain-cut", &index.file, Some(96), what, "it is marked as broken");
            one.lost = name;
            found.push(one);
        }
    }
    for (slots, code, what) in [
        (index.foreign_slots, "shared-slot", "are a snapshot's too with which it is not being merged"),
        (index.mixed_slots, "mixed-slot", "are named for two keys"),
    ] {
        if let (count, Some(first)) = slots {
            let what = format!("{count} of the slots that it names {what}, the first is {first}");
            let mut one = wrong(code, &index.file, None, what, "it is not noticed");
            one.lost =
                format!("one of the two contents, of {STORE_FILE} byte {}", crate::store::bytes(first));
            found.push(one);
        }
    }
}

fn overlay(state: &State, one: &Overlay, around: &Around, found: &mut Vec<Finding>) {
    let file = head_file(one.number);
    let head = match &one.head {
        Ok(Some(head)) => head,
        Ok(None) => {
            return found.push(left(&file, "it was never made whole, or is being removed", "it is removed"));
        }
        Err(_) => {
            let mut damaged =
                wrong("damaged-overlay", &file, Some(0), "its head is damaged".into(), "it is removed");
            damaged.lost = format!("overlay number {}", one.number);
            return found.push(damaged);
        }
    };
    if !head.keep {
        return found.push(left(&file, "it is not to be kept", "it is removed"));
    }
    let of = |index: &&Index| {
        index.head().is_some_and(|snapshot| {
            (snapshot.sequence, snapshot.group) == (head.snapshot, head.group)
                && snapshot.state == SnapshotState::Active
                && !matches!(index.fate, Fate::Damaged(_) | Fate::Unneeded)
        })
    };
    let snapshot = state.indexes.iter().find(of).and_then(Index::head);
    let data_len = one.data_len == Some(head.capacity);
    let cells_len = one.cells_len == Some(len_of_cells::<WordsOf>(head.capacity));
    let boot = around.boot.unwrap_or(head.boot);
    let (code, file, what) = if state.superblock().is_some_and(|superblock| superblock.disk != head.disk) {
        ("foreign-overlay", file, "it belongs to another disk".to_owned())
    } else if snapshot.is_none() {
        (
            "overlay-without-snapshot",
            file,
            format!("snapshot number {}, on which it stands, is gone", head.snapshot),
        )
    } else if head.boot != boot && !head.clean {
        ("overlay-not-durable", file, "the host stopped before it was on its medium".to_owned())
    } else if snapshot.is_some_and(|snapshot| snapshot.capacity != head.capacity) {
        ("damaged-overlay", file, "it is not as large as its snapshot".to_owned())
    } else if !data_len {
        ("damaged-overlay", data_file(one.number), "it is missing, or not as long as the disk".to_owned())
    } else if !cells_len {
        ("damaged-overlay", cells_file(one.number), "it is missing, or of a wrong length".to_owned())
    } else {
        return;
    };
    let mut finding = wrong(code, &file, None, what, "the overlay is removed");
    finding.lost = format!("overlay '{}'", head.name);
    found.push(finding);
}
