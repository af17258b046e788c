use std::collections::BTreeMap;
use std::io::ErrorKind;

use cbt::{Cells, Epoch, Generation};
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;
use crate::checkpoint::file_of;
use crate::format::{
    Broken, DiskState, PAGE, RawRecord, SnapshotHeader, SnapshotState, Superblock, index_file,
};
use crate::index::Key;
use crate::overflow::Terms;
use crate::overlay::{OverlayHead, cells_file, data_file, head_file};
use crate::rewind::{DONE_FILE, HEAD_FILE, NO_REWIND, RewindHead, RewindState, SYNCED_FILE};
use crate::tracker::{Control, WordsOf};

const DISK: [u8; 16] = [1; 16];
const CAPACITY: u64 = 1 << 20;

/// A directory in memory.
#[derive(Clone, Default)]
struct Memory(BTreeMap<String, Vec<u8>>);

impl Files for Memory {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.0.keys().cloned().collect())
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        self.0.get(name).map(|bytes| bytes.len() as u64).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn read(&self, name: &str, at: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.get(name).ok_or(ErrorKind::NotFound)?;
        let at = usize::try_from(at).unwrap();
        out.copy_from_slice(bytes.get(at..at + out.len()).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn data_from(&self, _name: &str, at: u64) -> io::Result<Option<u64>> {
        Ok(Some(at))
    }
}

fn superblock(sequence: u64) -> Superblock {
    Superblock {
        sequence,
        disk: DISK,
        generation: Generation::from_bytes([7; 16]),
        boot: [3; 16],
        state: DiskState::Serving,
        epoch: Epoch::new(9),
        block_bytes: 65536,
        capacity: CAPACITY,
        identity: Identity { device: 1, inode: 2, len: CAPACITY, mtime_ns: 5 },
        rewind: NO_REWIND,
        path: "/vm/a.img".into(),
        growing_to: None,
        began_ns: 0,
        began_reason: 0,
        switched_off: false,
    }
}

fn header(sequence: u32, newer: u32) -> SnapshotHeader {
    SnapshotHeader {
        sequence,
        state: SnapshotState::Active,
        disk: DISK,
        group: [u8::try_from(sequence % 256).unwrap(); 16],
        generation: Generation::from_bytes([7; 16]),
        epoch: Epoch::new(sequence),
        tracked: true,
        capacity: CAPACITY,
        created_ns: 1,
        name: format!("s{sequence}"),
        newer,
        broken: None,
        terms: Terms::default(),
    }
}

fn index(header: &SnapshotHeader, records: &[(Key, Slot)]) -> Vec<u8> {
    let mut bytes = header.to_page().to_vec();
    for (place, (key, slot)) in (0..).zip(records) {
        let record = RawRecord::new(&header.disk, header.sequence, place, *key, *slot);
        bytes.extend_from_slice(record.as_bytes());
    }
    bytes
}

fn overlay(number: u32, snapshot: u32) -> OverlayHead {
    OverlayHead {
        number,
        clean: false,
        snapshot,
        disk: DISK,
        group: [u8::try_from(snapshot % 256).unwrap(); 16],
        boot: [3; 16],
        capacity: CAPACITY,
        keep: true,
        name: "try".into(),
        note: String::new(),
    }
}

/// Two snapshots, the older one with an overlay.
fn whole() -> Memory {
    let mut files = Memory::default();
    let mut put = |name: &str, bytes: Vec<u8>| files.0.insert(name.to_owned(), bytes);
    put("lock", Vec::new());
    put("superblock", [superblock(2).to_page(), superblock(3).to_page()].map(|page| page.to_vec()).concat());
    let mut map = vec![0; 8192];
    map[4 * (64 + 1)] = 2;
    map[4 * (64 + 2)] = 1;
    let words = Control::new(std::sync::Arc::new(WordsOf::from_page(map[..PAGE].try_into().unwrap())));
    words.give_sign(&superblock(3).boot, 0, superblock(3).identity.mtime_ns);
    for (bytes, word) in map.as_chunks_mut::<4>().0.iter_mut().zip(words.cells().cells()) {
        *bytes = word.load(std::sync::atomic::Ordering::SeqCst).to_le_bytes();
    }
    put("map", map);
    put("store", vec![0xab; 2 * PAGE]);
    let first = [(Key::grain(3), Slot::At(0)), (Key::map_page(0), Slot::Zero)];
    put(&index_file(1), index(&header(1, 2), &first));
    put(&index_file(2), index(&header(2, 0), &[(Key::grain(3), Slot::At(1))]));
    put(&head_file(1), overlay(1, 1).to_page().to_vec());
    put(&data_file(1), vec![0; usize::try_from(CAPACITY).unwrap()]);
    put(&cells_file(1), vec![0; 8192]);
    files
}

fn findings(files: &Memory) -> Vec<Finding> {
    Inspection::read(files).unwrap().findings(&Around::default())
}

/// Codes of what is wrong.
fn codes(files: &Memory) -> Vec<&'static str> {
    let wrong = |one: &Finding| one.grade == Grade::Wrong;
    findings(files).iter().filter(|one| wrong(one)).map(|one| one.code).collect()
}

/// What is wrong after `change`.
fn after(change: impl FnOnce(&mut Memory)) -> Vec<&'static str> {
    let mut files = whole();
    change(&mut files);
    codes(&files)
}

fn file<'a>(files: &'a mut Memory, name: &str) -> &'a mut Vec<u8> {
    files.0.get_mut(name).unwrap()
}

#[test]
fn a_whole_directory_is_fine() {
    assert_eq!(findings(&whole()), []);
}

#[test]
fn a_damaged_copy_of_the_superblock_costs_the_history() {
    let mut files = whole();
    file(&mut files, "superblock")[PAGE + 100] ^= 1;
    let found = findings(&files);
    assert_eq!((found[0].code, found[0].at), ("damaged-superblock", Some(PAGE as u64)));
    assert!(found[0].lost.contains("snapshots 's1', 's2'; overlays 'try'"), "{}", found[0].lost);
    let zeroed = after(|files| file(files, "superblock")[..PAGE].fill(0));
    assert_eq!(zeroed, ["damaged-superblock"]);
    assert_eq!(after(|files| drop(files.0.remove("superblock"))), ["no-superblock"]);
    assert_eq!(after(|files| file(files, "superblock")[8] = 9), ["unknown-version"]);
}

#[test]
fn a_map_of_another_length_is_found() {
    assert_eq!(after(|files| file(files, "map").truncate(4096)), ["damaged-map"]);
    assert_eq!(after(|files| drop(files.0.remove("map"))), ["damaged-map"]);
}

#[test]
fn what_the_map_notes_is_found() {
    assert_eq!(after(|files| file(files, "map")[0] = 1), ["broken-noted"]);
    assert_eq!(after(|files| file(files, "map")[4] = 1), ["flush-failed"]);
}

#[test]
fn a_damaged_snapshot_breaks_the_older_ones() {
    let (older, newer) = (index_file(1), index_file(2));
    assert_eq!(after(|files| file(files, &newer)[PAGE + 3] ^= 1), ["chain-cut", "damaged-record"]);
    assert_eq!(after(|files| file(files, &newer)[40] ^= 1), ["chain-cut", "damaged-head"]);
    assert_eq!(after(|files| file(files, &newer).truncate(PAGE)), ["chain-cut", "short-index"]);
    assert_eq!(after(|files| drop(files.0.remove(&newer))), ["chain-cut"]);
    let unlisted = [(Key::grain(4), Slot::At(1 << 31))];
    let unlisted = after(|files| drop(files.0.insert(newer.clone(), index(&header(2, 0), &unlisted))));
    assert_eq!(unlisted, ["chain-cut"; 2]);
    assert_eq!(after(|files| file(files, "store").truncate(PAGE)), ["chain-cut", "slot-past-end"]);
    let gone = after(|files| drop(files.0.remove(&older)));
    assert_eq!(gone, ["overlay-without-snapshot"]);
}

#[test]
fn a_record_at_another_place_is_found() {
    let index = index_file(1);
    let swapped = after(|files| file(files, &index).copy_within(PAGE..PAGE + 16, PAGE + 16));
    assert_eq!(swapped, ["damaged-record", "overlay-without-snapshot"]);
}

#[test]
fn slots_of_two_are_found_unless_one_is_merged_into_the_other() {
    let same = [(Key::grain(3), Slot::At(0))];
    let shared = after(|files| drop(files.0.insert(index_file(2), index(&header(2, 0), &same))));
    assert_eq!(shared, ["shared-slot"]);
    let merged = SnapshotHeader { state: SnapshotState::Deleted, ..header(2, 0) };
    let fine = after(|files| drop(files.0.insert(index_file(2), index(&merged, &same))));
    assert_eq!(fine, [""; 0]);
    let other = [(Key::grain(4), Slot::At(0))];
    let mixed = after(|files| drop(files.0.insert(index_file(2), index(&merged, &other))));
    assert_eq!(mixed, ["mixed-slot"]);
}

#[test]
fn what_is_released_is_in_no_slot() {
    let released = |place, run| RawRecord::released(&DISK, 1, place, &run).as_bytes().to_vec();
    // Its slot may be another's by now, or past the end of the store.
    for slot in [1, 7] {
        let mut bytes = index(&header(1, 2), &[(Key::grain(3), Slot::At(slot))]);
        bytes.extend(released(1, 2..5));
        let mut files = whole();
        files.0.insert(index_file(1), bytes);
        assert_eq!(findings(&files), []);
        let mut shown = Vec::new();
        Inspection::read(&files).unwrap().records(&files, |fact| shown.push(fact.fields)).unwrap();
        let run =
            [("released", Value::Flag(true)), ("grain", Value::Number(2)), ("grains", Value::Number(3))];
        assert!(shown[1].ends_with(&run), "{shown:?}");
    }
    let past = after(|files| file(files, &index_file(1)).extend(released(2, 255..257)));
    assert_eq!(past, ["damaged-record", "overlay-without-snapshot"]);
}

#[test]
fn a_resize_that_was_cut_off_is_not_wrong() {
    let mut files = whole();
    let growing = Superblock { growing_to: Some(2 * CAPACITY), ..superblock(3) };
    file(&mut files, "superblock")[PAGE..].copy_from_slice(&growing.to_page()[..]);
    let inspection = Inspection::read(&files).unwrap();
    for (len, opening) in
        [(2 * CAPACITY, "it is finished"), (CAPACITY, "it is forgotten: the image has the old size")]
    {
        let image = Some(Identity { len, ..superblock(3).identity });
        let found = inspection.findings(&Around { image, boot: Some([3; 16]), ..Around::default() });
        let found: Vec<_> = found.iter().map(|one| (one.grade, one.opening.as_str())).collect();
        assert_eq!(found, [(Grade::Left, opening)]);
    }
}

/// A rewind's files, and a superblock that names it.
fn rewinding() -> Memory {
    let mut files = whole();
    let named = Superblock { rewind: [2; 16], ..superblock(3) };
    file(&mut files, "superblock")[PAGE..].copy_from_slice(&named.to_page()[..]);
    let run = [&5u64.to_le_bytes()[..], &2u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    let head = RewindHead {
        state: RewindState::UnderWay,
        disk: DISK,
        id: [2; 16],
        capacity: CAPACITY,
        name: "s1".into(),
        runs: 1,
        runs_checksum: crc32c::crc32c(&run),
    };
    files.0.insert(HEAD_FILE.into(), [&head.to_page()[..], &run].concat());
    files.0.insert(DONE_FILE.into(), vec![0; PAGE]);
    files.0.insert(SYNCED_FILE.into(), vec![0; PAGE]);
    files
}

#[test]
fn rewinds_are_judged() {
    let found = findings(&rewinding());
    let told: Vec<_> = found.iter().map(|one| (one.grade, one.opening.as_str())).collect();
    assert_eq!(told, [(Grade::Left, "the rewind goes on")]);
    assert!(found[0].what.contains("'s1', 8192 bytes"), "{}", found[0].what);
    let refused = |change: &dyn Fn(&mut Memory)| {
        let mut files = rewinding();
        change(&mut files);
        let found = findings(&files);
        let lost: Vec<_> = found.iter().filter(|one| one.code == "rewind-lost").collect();
        assert_eq!((lost.len(), lost[0].opening.as_str()), (1, "the disk is not opened"), "{found:?}");
    };
    for name in [HEAD_FILE, DONE_FILE, SYNCED_FILE, "superblock", "store"] {
        refused(&|files| drop(files.0.remove(name)));
        refused(&|files| file(files, name).truncate(100));
    }
    refused(&|files| file(files, HEAD_FILE)[20] ^= 1);
    refused(&|files| file(files, HEAD_FILE)[PAGE + 8] ^= 1);
    refused(&|files| file(files, "superblock")[PAGE + 20] ^= 1);
    // Nothing is lost of one that the superblock does not name.
    let over = after(|files| {
        *files = rewinding();
        file(files, "superblock")[PAGE..].copy_from_slice(&superblock(3).to_page()[..]);
        file(files, HEAD_FILE)[20] ^= 1;
    });
    assert_eq!(over, [""; 0]);
}

#[test]
fn overlays_are_judged() {
    assert_eq!(after(|files| drop(files.0.remove(&data_file(1)))), ["damaged-overlay"]);
    assert_eq!(after(|files| file(files, &cells_file(1)).truncate(4096)), ["damaged-overlay"]);
    assert_eq!(after(|files| file(files, &head_file(1))[20] ^= 1), ["damaged-overlay"]);
    let boot = Around { boot: Some([9; 16]), ..Around::default() };
    let found = Inspection::read(&whole()).unwrap().findings(&boot);
    assert_eq!(found.iter().map(|one| one.code).collect::<Vec<_>>(), ["overlay-not-durable"]);
}

#[test]
fn checkpoints_are_judged() {
    let golden = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/checkpoint-1")).unwrap();
    let after = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut files = whole();
        let mut bytes = golden.clone();
        change(&mut bytes);
        files.0.insert(file_of(3), bytes);
        findings(&files)
    };
    assert_eq!(after(&|_| {}), []);
    let head = after(&|bytes| bytes[100] ^= 1);
    assert_eq!((head[0].code, head[0].opening.as_str()), ("damaged-checkpoint", "it is removed"));
    let page = after(&|bytes| bytes[2 * PAGE + 77] ^= 1);
    assert_eq!((page[0].code, page[0].at), ("damaged-runs", Some(2 * PAGE as u64)));
    assert!(page[0].lost.contains("'monday'"), "{}", page[0].lost);
    let swapped = after(&|bytes| {
        bytes.copy_within(PAGE..2 * PAGE, 2 * PAGE);
    });
    assert_eq!(swapped[0].code, "damaged-runs");
    assert_eq!(after(&|bytes| bytes.truncate(3 * PAGE))[0].code, "damaged-runs");
    for unmade in [after(&|bytes| bytes.truncate(100)), after(&|bytes| bytes[..PAGE].fill(0))] {
        assert_eq!(unmade[0].grade, Grade::Left);
    }
    let mut files = whole();
    files.0.insert(file_of(3), golden.clone());
    let facts = Inspection::read(&files).unwrap().facts();
    let fact = facts.iter().find(|fact| fact.structure == "checkpoint").unwrap();
    assert!(fact.fields.contains(&("runs", Value::Number(1101))), "{fact:?}");
}

#[test]
fn what_a_stop_leaves_is_not_wrong() {
    let begun = after(|files| drop(files.0.insert(index_file(3), vec![0; 10])));
    assert_eq!(begun, [""; 0]);
    let prepared = SnapshotHeader { state: SnapshotState::Prepared, ..header(3, 0) };
    let unnamed = after(|files| drop(files.0.insert(index_file(3), index(&prepared, &[]))));
    assert_eq!(unnamed, [""; 0]);
    assert_eq!(after(|files| drop(files.0.remove(&head_file(1)))), [""; 0]);
}

#[test]
fn unknown_files_are_named() {
    assert_eq!(after(|files| drop(files.0.insert("notes.txt".into(), vec![1]))), ["unknown-file"]);
}

#[test]
fn the_image_is_compared_with_the_stamp() {
    let inspection = Inspection::read(&whole()).unwrap();
    let image = superblock(3).identity;
    let with = |image, boot| {
        inspection.findings(&Around { image: Some(image), boot: Some(boot), ..Around::default() })
    };
    assert_eq!(with(image, [3; 16]), []);
    assert_eq!(with(Identity { len: 5, ..image }, [3; 16])[0].code, "not-as-left");
    assert!(with(image, [4; 16])[0].what.contains("host stopped"));
}

/// Looks at everything in every way.
fn look(files: &Memory) {
    let inspection = Inspection::read(files).unwrap();
    let around = Around { image: Some(superblock(3).identity), boot: Some([3; 16]), ..Around::default() };
    let _ = (inspection.findings(&Around::default()), inspection.findings(&around));
    let _ = inspection.facts();
    inspection.records(files, |_| {}).unwrap();
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(damages in prop::collection::vec((any::<prop::sample::Index>(), 0u8..6, any::<u64>(), any::<u64>()), 1..12)) {
        let mut files = rewinding();
        for (which, kind, a, b) in damages {
            let names = files.names().unwrap();
            if names.is_empty() {
                break;
            }
            let name = which.get(&names).clone();
            let bytes = file(&mut files, &name);
            let at = usize::try_from(a % (bytes.len() as u64 + 1)).unwrap();
            let random = b.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
            match kind {
                0 => bytes.truncate(at),
                1 => bytes.iter_mut().skip(at).step_by(97).for_each(|byte| *byte ^= random[0]),
                2 => bytes.extend(random.iter().cycle().take(at % 5000)),
                3 => bytes.iter_mut().skip(at).zip(random).for_each(|(byte, random)| *byte = random),
                4 => drop(files.0.remove(&name)),
                _ => { let copy = bytes.clone(); files.0.insert(index_file(u32::try_from(b % 4).unwrap()), copy); }
            }
            look(&files);
        }
    }

    #[test]
    fn no_values_make_it_panic(
        (epoch, block_bytes, capacity, sequence, growing_to) in (any::<u32>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<Option<u64>>()),
        heads in prop::collection::vec((0u32..6, any::<u32>(), 0u32..8, 0u8..3, any::<bool>()), 0..8),
        records in prop::collection::vec((any::<u64>(), prop_oneof![0u32..8, any::<u32>()]), 0..20),
        words in prop::collection::vec(any::<u32>(), 1024),
        overlays in prop::collection::vec((0u32..4, 0u32..8, any::<u64>()), 0..4),
    ) {
        let mut files = whole();
        let superblock = Superblock { epoch: Epoch::new(epoch), block_bytes, capacity, growing_to, ..superblock(sequence) };
        file(&mut files, "superblock")[..PAGE].copy_from_slice(&superblock.to_page()[..]);
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file(&mut files, "map")[..4096].copy_from_slice(&words);
        let records: Vec<_> =
            records.iter().map(|&(key, slot)| (Key::from_raw(key), Slot::from_raw(slot))).collect();
        for (number, wild, newer, state, broken) in heads {
            let state = [SnapshotState::Prepared, SnapshotState::Active, SnapshotState::Deleted][usize::from(state)];
            let broken = broken.then(|| Broken { reason: "x\u{1b}[0m".into(), errno: wild, at_ns: u64::from(wild) });
            let number = if wild % 5 == 0 { wild } else { number };
            let head = SnapshotHeader { state, broken, capacity, epoch: Epoch::new(wild), ..header(number, newer) };
            files.0.insert(index_file(number), index(&head, &records));
        }
        for (number, snapshot, capacity) in overlays {
            let head = OverlayHead { capacity, ..overlay(number, snapshot) };
            files.0.insert(head_file(number), head.to_page().to_vec());
        }
        look(&files);
    }
}
