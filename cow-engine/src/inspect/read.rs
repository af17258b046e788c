//! Reading the structures of a state directory, each with what could not be read of it.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use cbt::PAGE_BYTES;

use super::Files;
use super::checkpoint::Checkpoint;
use super::end_of;
use super::rewind::Rewind;
use crate::areas::{LIST_BYTES, LIST_FILE, List, OWN_SLOTS};
use crate::away::Differing;
use crate::away::sample::{self, MapSum, SAMPLE_FILE, Sample};
use crate::format::{
    Damaged, Entry, GRAIN, MAP_FILE, PAGE, RECORD, RawRecord, STORE_FILE, SUPERBLOCK_FILE, SnapshotHeader,
    SnapshotState, Superblock, index_file, other_version, sequence_of,
};
use crate::index::{Key, Slot};
use crate::intent::{INTENT_FILE, is_whole};
use crate::open::{Copies, sequences};
use crate::overlay::{OverlayHead, cells_file, data_file, head_file, number_of, numbers};
use crate::tracker::Control;
pub(super) use crate::tracker::WordsOf;

/// Bytes of an index that are read together.
const CHUNK: usize = 64 << 10;

/// Slots of which it is remembered whose key they hold, to compare with who names them too.
const COMPARED: usize = 1 << 20;

/// A page that should hold a structure.
pub(super) enum CopyFound {
    Valid(Superblock),
    Unused,
    /// Written by a program that knows another version.
    Version(u32),
    Damaged,
}

/// The head of an index.
pub(super) enum Head {
    Valid(SnapshotHeader),
    /// The file is shorter than a head: its creation was cut off.
    Unmade,
    Version(u32),
    Damaged,
    /// It is the head of another snapshot, or of another disk's.
    Foreign,
}

/// What the records of an index say together.
#[derive(Default)]
pub(super) struct Records {
    /// Places that hold a record.
    pub(super) written: u64,
    pub(super) damaged: u64,
    /// The byte of the first that is damaged.
    pub(super) first_damaged: Option<u64>,
    /// Where the store must reach.
    pub(super) store_end: u64,
    /// A slot that is in no area of the list.
    pub(super) unlisted: Option<u32>,
    /// Records that name a slot which is not released; the others say zeros, or release.
    pub(super) slots: u64,
    /// Grains that are released, in runs apart from each other, in order.
    pub(super) released: Vec<Range<u64>>,
}

impl Records {
    /// Whether `key` is released.
    fn is_released(&self, key: Key) -> bool {
        key.as_grain().is_some_and(|grain| {
            let after = self.released.partition_point(|run| run.end <= grain);
            self.released.get(after).is_some_and(|run| run.contains(&grain))
        })
    }
}

/// What opening makes of an index, as far as that hangs on the indexes alone.
pub(super) enum Fate {
    /// It is removed; nobody needs it.
    Unneeded,
    /// It is removed, and older ones that need it are broken.
    Damaged(Wrong),
    /// Its head says that it is broken.
    Broken,
    /// The map says that it is broken, its head does not.
    Noted,
    /// It is broken because it needs what is not there.
    Cut,
    Kept,
}

/// What is wrong with an index.
pub(super) struct Wrong {
    pub(super) code: &'static str,
    pub(super) at: Option<u64>,
    pub(super) what: String,
}

pub(super) struct Index {
    pub(super) file: String,
    pub(super) sequence: u32,
    pub(super) len: u64,
    pub(super) head: Head,
    pub(super) records: Records,
    pub(super) fate: Fate,
    /// Slots that a snapshot names with which it is not being merged, and the first of them.
    pub(super) foreign_slots: (u64, Option<u32>),
    /// Slots that it, or one with which it is being merged, names for another key, and the first of them.
    pub(super) mixed_slots: (u64, Option<u32>),
}

impl Index {
    /// Whether its records count.
    pub(super) fn counts(&self) -> bool {
        matches!(self.fate, Fate::Kept)
    }

    pub(super) fn head(&self) -> Option<&SnapshotHeader> {
        match &self.head {
            Head::Valid(head) => Some(head),
            _ => None,
        }
    }
}

pub(super) struct Overlay {
    pub(super) number: u32,
    /// `None` if there is no whole head, and then whether there is a damaged one.
    pub(super) head: Result<Option<OverlayHead>, Damaged>,
    pub(super) data_len: Option<u64>,
    pub(super) cells_len: Option<u64>,
}

/// The first page of the map.
pub(super) struct Words {
    pub(super) broken_up_to: u32,
    pub(super) flush_failed: bool,
    pub(super) rewind_void: bool,
    pub(super) control: Control<WordsOf>,
}

impl Words {
    pub(super) fn records(&self, sequence: u32) -> u32 {
        self.control.records(sequence)
    }
}

/// A state directory.
pub(super) struct State {
    /// Files that nothing here has made.
    pub(super) unknown: Vec<String>,
    /// Files that could not be looked at, and why.
    pub(super) unreadable: Vec<(String, String)>,
    pub(super) superblock_len: Option<u64>,
    pub(super) copies: [CopyFound; 2],
    pub(super) verdict: Copies,
    pub(super) map_len: Option<u64>,
    pub(super) words: Option<Words>,
    /// The map as it is, if it can be compared with one that was stamped.
    pub(super) map_sum: Option<MapSum>,
    pub(super) sample: sample::Found,
    /// What differs of the image, if somebody compared it.
    pub(super) differ: Differing,
    /// Whether there is an intent log, and whether it is believed.
    pub(super) intent: Option<bool>,
    pub(super) store_len: Option<u64>,
    /// The list of areas, whose files are not looked at.
    pub(super) areas: List,
    /// `None` if it has no files.
    pub(super) rewind: Option<Rewind>,
    /// Slots that snapshots name which count.
    pub(super) named_slots: u64,
    /// By number.
    pub(super) indexes: Vec<Index>,
    pub(super) overlays: Vec<Overlay>,
    /// By number.
    pub(super) checkpoints: Vec<Checkpoint>,
}

/// Whether opening believes the intent log, of so many bytes.
fn is_believed(files: &impl Files, len: u64, superblock: Option<&Superblock>) -> io::Result<bool> {
    let Some(superblock) = superblock.filter(|_| len >= PAGE as u64) else { return Ok(false) };
    let mut page = [0; PAGE];
    files.read(INTENT_FILE, 0, &mut page)?;
    Ok(is_whole(&page, len, &superblock.disk, superblock.capacity).is_some())
}

impl State {
    pub(super) fn superblock(&self) -> Option<&Superblock> {
        self.verdict.newest.as_ref()
    }

    pub(super) fn read(files: &impl Files) -> io::Result<Self> {
        let names = files.names()?;
        let mut unreadable = Vec::new();
        let names: Vec<String> = names
            .into_iter()
            .filter(|name| match files.len(name) {
                Ok(_) => true,
                Err(error) => {
                    unreadable.push((name.clone(), error.to_string()));
                    false
                }
            })
            .collect();
        let len = |name: &str| match names.iter().any(|held| held == name) {
            true => files.len(name).map(Some),
            false => Ok(None),
        };
        let superblock_len = len(SUPERBLOCK_FILE)?;
        let pages = superblock_pages(files, superblock_len.unwrap_or(0))?;
        let map_len = len(MAP_FILE)?;
        let words = match map_len.filter(|len| *len >= PAGE_BYTES as u64) {
            Some(_) => Some(read_words(files)?),
            None => None,
        };
        let verdict = Copies::of(&pages);
        let sample = match (len(SAMPLE_FILE)?, &verdict.newest) {
            (Some(len), Some(newest)) if newest.state.is_closed() => read_sample(files, len, newest)?,
            _ => sample::Found::None,
        };
        let map_sum = match (&sample, map_len.filter(|len| *len >= PAGE_BYTES as u64)) {
            (sample::Found::Sample(one), Some(len)) => Some(sum_of_map(files, len.min(one.map_len()))?),
            _ => None,
        };
        let disk = verdict.newest.as_ref().map(|superblock| superblock.disk);
        let mut indexes = Vec::new();
        let areas = read_list(files, len(LIST_FILE)?.unwrap_or(0), disk)?;
        for sequence in sequences(&names) {
            indexes.push(read_index(files, sequence, disk, &areas)?);
        }
        let mut overlays = Vec::new();
        for number in numbers(&names) {
            let (data_len, cells_len) = (len(&data_file(number))?, len(&cells_file(number))?);
            let head = match len(&head_file(number))? {
                Some(len) if len >= PAGE as u64 => read_overlay(files, number)?,
                _ => Ok(None),
            };
            overlays.push(Overlay { number, head, data_len, cells_len });
        }
        let checkpoints = crate::checkpoint::numbers(&names);
        let checkpoints = checkpoints.into_iter().map(|number| Checkpoint::read(files, number));
        let checkpoints = checkpoints.collect::<io::Result<_>>()?;
        let is_known = |name: &String| {
            ["lock", SUPERBLOCK_FILE, MAP_FILE, INTENT_FILE, STORE_FILE, LIST_FILE, SAMPLE_FILE]
                .contains(&name.as_str())
                || super::rewind::FILES.contains(&name.as_str())
                || sequence_of(name).is_some()
                || number_of(name).is_some()
                || crate::checkpoint::number_of(name).is_some()
        };
        let store_len = len(STORE_FILE)?;
        let intent = match len(INTENT_FILE)? {
            Some(len) => Some(is_believed(files, len, verdict.newest.as_ref())?),
            None => None,
        };
        let mut state = Self {
            unknown: names.iter().filter(|name| !is_known(name)).cloned().collect(),
            unreadable,
            superblock_len,
            copies: pages.map(|page| copy_of(&page)),
            verdict,
            map_len,
            words,
            map_sum,
            sample,
            differ: Differing::default(),
            intent,
            store_len,
            areas,
            rewind: Rewind::read(files, &names, store_len.unwrap_or(0))?,
            named_slots: 0,
            indexes,
            overlays,
            checkpoints,
        };
        super::judge::settle_fates(&mut state);
        state.compare_slots(files)?;
        Ok(state)
    }

    /// Looks who names which slot, among those whose records count.
    fn compare_slots(&mut self, files: &impl Files) -> io::Result<()> {
        let mut of_others = Bits::default();
        let mut at = 0;
        while at < self.indexes.len() {
            // One that is held, and the deleted ones after it that are being merged into it.
            let is_deleted = |index: &Index| matches!(&index.head, Head::Valid(head) if head.state == SnapshotState::Deleted);
            let joins = |index: &&Index| !index.counts() || is_deleted(index);
            let end = at + 1 + self.indexes[at + 1..].iter().take_while(joins).count();
            let (mut own, mut keys) = (Bits::default(), HashMap::new());
            for index in self.indexes[at..end].iter_mut().filter(|index| index.counts()) {
                let Head::Valid(head) = &index.head else { continue };
                let (foreign, mixed) = (&mut index.foreign_slots, &mut index.mixed_slots);
                let records = &index.records;
                each_record(files, &index.file, index.len, head, |_, record| {
                    let Ok(Some(Entry::Kept(key, Slot::At(slot)))) = record else { return Ok(()) };
                    if records.is_released(key) {
                        return Ok(());
                    }
                    if of_others.has(slot) {
                        foreign.0 += 1;
                        foreign.1.get_or_insert(slot);
                    }
                    own.set(slot);
                    let other = match keys.get(&slot) {
                        None if keys.len() < COMPARED => keys.insert(slot, key),
                        other => other.copied(),
                    };
                    if other.is_some_and(|other| other != key) {
                        mixed.0 += 1;
                        mixed.1.get_or_insert(slot);
                    }
                    Ok(())
                })?;
            }
            self.named_slots += own.count();
            of_others.join(own);
            at = end;
        }
        Ok(())
    }
}

fn superblock_pages(files: &impl Files, len: u64) -> io::Result<[[u8; PAGE]; 2]> {
    let mut pages = [[0; PAGE]; 2];
    for (page, at) in pages.iter_mut().zip([0, PAGE as u64]) {
        // Of one that is cut off what is there, as opening does.
        let there = usize::try_from(len.saturating_sub(at)).unwrap_or(PAGE).min(PAGE);
        if there > 0 {
            files.read(SUPERBLOCK_FILE, at, &mut page[..there])?;
        }
    }
    Ok(pages)
}

fn copy_of(page: &[u8; PAGE]) -> CopyFound {
    match Superblock::from_page(page) {
        Some(superblock) => CopyFound::Valid(superblock),
        None if page.iter().all(|&byte| byte == 0) => CopyFound::Unused,
        None => other_version(page).map_or(CopyFound::Damaged, CopyFound::Version),
    }
}

/// The sample of the stop that `newest` tells of.
fn read_sample(files: &impl Files, len: u64, newest: &Superblock) -> io::Result<sample::Found> {
    if len < PAGE as u64 {
        return Ok(sample::Found::Damaged);
    }
    let mut page = [0; PAGE];
    files.read(SAMPLE_FILE, 0, &mut page)?;
    Ok(Sample::find(&page, newest))
}

/// Sums up the first `len` bytes of the map, as opening does.
fn sum_of_map(files: &impl Files, len: u64) -> io::Result<MapSum> {
    let mut sum = MapSum::new(len);
    let mut page = [0; PAGE_BYTES];
    let (mut nth, pages) = (0, len / PAGE_BYTES as u64);
    while nth < pages {
        let Some(data) = files.data_from(MAP_FILE, nth * PAGE_BYTES as u64)? else { break };
        nth = nth.max(data / PAGE_BYTES as u64);
        if nth < pages {
            files.read(MAP_FILE, nth * PAGE_BYTES as u64, &mut page)?;
            sum.add(nth, &page);
        }
        nth += 1;
    }
    Ok(sum)
}

fn read_words(files: &impl Files) -> io::Result<Words> {
    let mut page = [0; PAGE_BYTES];
    files.read(MAP_FILE, 0, &mut page)?;
    let control = Control::new(std::sync::Arc::new(WordsOf::from_page(&page)));
    Ok(Words {
        broken_up_to: control.broken_up_to(),
        flush_failed: control.flush_failed(),
        rewind_void: control.rewind_void(),
        control,
    })
}

/// The newest valid copy of the list of areas, as opening takes it.
fn read_list(files: &impl Files, len: u64, disk: Option<[u8; 16]>) -> io::Result<List> {
    let mut newest = List::default();
    let mut bytes = vec![0; LIST_BYTES];
    for at in [0, LIST_BYTES as u64] {
        let Some(disk) = disk.filter(|_| at + LIST_BYTES as u64 <= len) else { break };
        files.read(LIST_FILE, at, &mut bytes)?;
        if let Some(found) = List::from_bytes(&bytes, &disk).filter(|one| one.sequence > newest.sequence) {
            newest = found;
        }
    }
    Ok(newest)
}

fn read_index(files: &impl Files, sequence: u32, disk: Option<[u8; 16]>, areas: &List) -> io::Result<Index> {
    let file = index_file(sequence);
    let len = files.len(&file)?;
    let head = read_head(files, &file, len, sequence, disk)?;
    let mut records = Records::default();
    if let Head::Valid(head) = &head
        && head.broken.is_none()
    {
        let grains = head.capacity.div_ceil(GRAIN as u64);
        each_record(files, &file, len, head, |place, record| {
            match record {
                Ok(None) => {}
                Ok(Some(Entry::Kept(..))) => records.written += 1,
                Ok(Some(Entry::Released(run))) if run.end <= grains => {
                    records.written += 1;
                    records.released.push(run);
                }
                Ok(Some(Entry::Released(_))) | Err(Damaged) => {
                    records.damaged += 1;
                    records.first_damaged.get_or_insert(PAGE as u64 + place * RECORD as u64);
                }
            }
            Ok(())
        })?;
        records.released = joined(std::mem::take(&mut records.released));
        // Only now: what is released is in no slot, whichever of the two records comes first.
        each_record(files, &file, len, head, |_, record| {
            if let Ok(Some(Entry::Kept(key, slot))) = record
                && !records.is_released(key)
            {
                records.slots += u64::from(slot != Slot::Zero);
                match slot {
                    Slot::At(slot) if slot >= OWN_SLOTS => {
                        if !areas.entries.iter().any(|area| area.has(slot)) {
                            records.unlisted.get_or_insert(slot);
                        }
                    }
                    slot => records.store_end = records.store_end.max(end_of(slot)),
                }
            }
            Ok(())
        })?;
    }
    let none = (0, None);
    Ok(Index { file, sequence, len, head, records, fate: Fate::Kept, foreign_slots: none, mixed_slots: none })
}

/// Runs in any order as runs apart from each other, in order.
fn joined(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    runs.retain(|run| !run.is_empty());
    runs.sort_unstable_by_key(|run| run.start);
    let mut apart: Vec<Range<u64>> = Vec::new();
    for run in runs {
        match apart.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => apart.push(run),
        }
    }
    apart
}

fn read_head(
    files: &impl Files,
    file: &str,
    len: u64,
    sequence: u32,
    disk: Option<[u8; 16]>,
) -> io::Result<Head> {
    if len < PAGE as u64 {
        return Ok(Head::Unmade);
    }
    let mut page = [0; PAGE];
    files.read(file, 0, &mut page)?;
    let Some(head) = SnapshotHeader::from_page(&page) else {
        return Ok(other_version(&page).map_or(Head::Damaged, Head::Version));
    };
    let is_own = head.sequence == sequence && disk.is_none_or(|disk| disk == head.disk);
    Ok(if is_own { Head::Valid(head) } else { Head::Foreign })
}

/// A record, or that there is none at its place.
pub(super) type Found = Result<Option<Entry>, Damaged>;

/// Calls `each` with the place of each record of an index, and what is there; holes are passed over.
pub(super) fn each_record(
    files: &impl Files,
    file: &str,
    len: u64,
    head: &SnapshotHeader,
    mut each: impl FnMut(u64, Found) -> io::Result<()>,
) -> io::Result<()> {
    let end = len - (len - PAGE as u64) % RECORD as u64;
    let mut buffer = vec![0; CHUNK];
    let mut at = PAGE as u64;
    while at < end {
        let Some(data) = files.data_from(file, at)? else { break };
        at = at.max(data - data % RECORD as u64);
        let here = usize::try_from(end.saturating_sub(at)).unwrap_or(CHUNK).min(CHUNK);
        let chunk = &mut buffer[..here];
        files.read(file, at, chunk)?;
        for bytes in chunk.as_chunks::<RECORD>().0 {
            let place = (at - PAGE as u64) / RECORD as u64;
            let found = RawRecord::read(bytes, &head.disk, head.sequence, place);
            if found != Ok(None) {
                each(place, found)?;
            }
            at += RECORD as u64;
        }
        if here == 0 {
            break;
        }
    }
    Ok(())
}

fn read_overlay(files: &impl Files, number: u32) -> io::Result<Result<Option<OverlayHead>, Damaged>> {
    let mut page = [0; PAGE];
    files.read(&head_file(number), 0, &mut page)?;
    let head = OverlayHead::from_page(&page).filter(|head| head.number == number);
    Ok(head.ok_or(Damaged).map(Some))
}

/// A set of slots, in parts that take memory only where something is in them.
#[derive(Default)]
struct Bits {
    parts: HashMap<u32, Box<[u64; Bits::WORDS]>>,
}

impl Bits {
    const WORDS: usize = 512;
    const PART: u32 = 512 * 64;

    fn place(slot: u32) -> (u32, usize, u64) {
        (slot / Self::PART, (slot % Self::PART / 64) as usize, 1 << (slot % 64))
    }

    fn has(&self, slot: u32) -> bool {
        let (part, word, bit) = Self::place(slot);
        self.parts.get(&part).is_some_and(|words| words[word] & bit != 0)
    }

    fn set(&mut self, slot: u32) {
        let (part, word, bit) = Self::place(slot);
        self.parts.entry(part).or_insert_with(|| Box::new([0; Self::WORDS]))[word] |= bit;
    }

    fn count(&self) -> u64 {
        self.parts.values().flat_map(|words| words.iter()).map(|word| u64::from(word.count_ones())).sum()
    }

    fn join(&mut self, other: Self) {
        for (part, words) in other.parts {
            let own = self.parts.entry(part).or_insert_with(|| Box::new([0; Self::WORDS]));
            own.iter_mut().zip(words.iter()).for_each(|(own, word)| *own |= word);
        }
    }
}
