//! Which areas a difference store has, on disk: a list in the state directory, and a header in each area but
//! the one of the state directory.
//!
//! ```text
//! the file or device looked at       (blank, or ours and in no list: anything else is refused)
//! its header, flushed                (a stop leaves a header that no list knows: ours, and written anew)
//! the list with it, flushed          (two copies in turn; a copy that is torn leaves the one before)
//! used                               (records name its slots)
//! ```
//!
//! Invariant: no record names a slot of an area before header and list are durable; a range of numbers is
//! given to another area only when there is no snapshot that could name a slot of the first.
//! What a list cannot tell costs snapshots, never content: a record whose area is not there, or is another's,
//! breaks its snapshot and the older ones, which look through it.

use std::sync::PoisonError;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::area::Area;
use crate::disk::Disk;
use crate::error::Error;
use crate::format::{GRAIN, PAGE, STORE_FILE, body, checksum, padded, page_of, text};
use crate::group::Admin;
use crate::memory::{AlignedBuf, Source, Target};
use crate::open::StorePlan;
use crate::storage::Storage;
use crate::store::{AreaInfo, Budget, Lost, Store};
use crate::tracker::Identity;

const HEADER_MAGIC: [u8; 8] = *b"EBBTARE1";
const LIST_MAGIC: [u8; 8] = *b"EBBTLST1";
const VERSION: u32 = 1;

/// The file of the list.
pub(crate) const LIST_FILE: &str = "areas";
/// Bytes of a copy of the list.
pub(crate) const LIST_BYTES: usize = 16 << 10;
/// Areas besides the one in the state directory.
const MAX_AREAS: usize = 15;
/// Longest path of an area in bytes.
const PATH_BYTES: usize = 992;
/// Bytes that an area has at least.
const MIN_BYTES: u64 = 1 << 20;
/// Slots of the area in the state directory: 8 TiB.
pub(crate) const OWN_SLOTS: u32 = 1 << 31;
/// Slots of another area that grows: 2 TiB.
const GROWING_SLOTS: u32 = 1 << 29;
/// Bytes at the beginning and at the end of something blank that are zero.
const BLANK_BYTES: u64 = 1 << 20;

/// What kind of thing an area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AreaKind {
    /// A file of ours in a directory.
    Directory,
    /// A file.
    File,
    /// A block device.
    Device,
}

/// An area that the operator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AreaSpec {
    /// Absolute path of a directory, a file or a block device.
    pub path: String,
    /// Bytes of old content in it at most; for a device its size if not said.
    pub bytes: Option<u64>,
}

/// What was opened for an area.
pub struct OpenedArea<F> {
    /// The file or device.
    pub file: F,
    /// What the path leads to.
    pub kind: AreaKind,
    /// Bytes of the file now.
    pub len: u64,
    /// What tells the file from others.
    pub identity: (u64, u64),
}

/// One area, as the list tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// 0 for the one in the state directory, which the list does not have.
    pub(crate) number: u32,
    pub(crate) kind: AreaKind,
    /// The slots that it can have are of a number that somebody said.
    pub(crate) bounded: bool,
    pub(crate) base: u32,
    pub(crate) slots: u32,
    pub(crate) uuid: [u8; 16],
    pub(crate) path: String,
}

impl Entry {
    pub(crate) fn has(&self, slot: u32) -> bool {
        slot.checked_sub(self.base).is_some_and(|own| own < self.slots)
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    number: U32,
    base: U32,
    slots: U32,
    disk: [u8; 16],
    uuid: [u8; 16],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 60);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    number: U32,
    base: U32,
    slots: U32,
    kind: U16,
    path_len: U16,
    uuid: [u8; 16],
    path: [u8; PATH_BYTES],
}

const _: () = assert!(size_of::<RawEntry>() == 1024);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawList {
    magic: [u8; 8],
    version: U32,
    count: U32,
    sequence: U64,
    disk: [u8; 16],
    entries: [RawEntry; MAX_AREAS],
    checksum: U32,
}

const _: () = assert!(size_of::<RawList>() == 15404 && size_of::<RawList>() <= LIST_BYTES);

/// Kinds in a list; the bit says that the slots are bounded.
const BOUNDED: u16 = 0x100;

impl Entry {
    fn to_raw(&self) -> RawEntry {
        let kind = match self.kind {
            AreaKind::Directory => 1,
            AreaKind::File => 2,
            AreaKind::Device => 3,
        };
        RawEntry {
            number: U32::new(self.number),
            base: U32::new(self.base),
            slots: U32::new(self.slots),
            kind: U16::new(kind | if self.bounded { BOUNDED } else { 0 }),
            path_len: U16::new(u16::try_from(self.path.len()).unwrap_or(0)),
            uuid: self.uuid,
            path: padded(&self.path),
        }
    }

    fn from_raw(raw: &RawEntry) -> Option<Self> {
        Some(Self {
            number: raw.number.get(),
            kind: match raw.kind.get() & !BOUNDED {
                1 => AreaKind::Directory,
                2 => AreaKind::File,
                3 => AreaKind::Device,
                _ => return None,
            },
            bounded: raw.kind.get() & BOUNDED != 0,
            base: raw.base.get(),
            slots: raw.slots.get(),
            uuid: raw.uuid,
            path: text(&raw.path, raw.path_len.get().into())?,
        })
    }

    fn header(&self, disk: &[u8; 16]) -> Box<[u8; PAGE]> {
        let mut raw = RawHeader {
            magic: HEADER_MAGIC,
            version: U32::new(VERSION),
            number: U32::new(self.number),
            base: U32::new(self.base),
            slots: U32::new(self.slots),
            disk: *disk,
            uuid: self.uuid,
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&HEADER_MAGIC, body(&raw)]);
        page_of(&raw)
    }
}

/// A header that was found: its disk and its area's UUID.
fn read_header(page: &[u8]) -> Option<([u8; 16], [u8; 16])> {
    let (raw, _) = RawHeader::read_from_prefix(page).ok()?;
    let valid = raw.magic == HEADER_MAGIC
        && raw.version.get() == VERSION
        && raw.checksum == checksum(&[&HEADER_MAGIC, body(&raw)]);
    valid.then_some((raw.disk, raw.uuid))
}

/// The list as it is on disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct List {
    pub(crate) sequence: u64,
    pub(crate) entries: Vec<Entry>,
}

impl List {
    fn to_bytes(&self, disk: &[u8; 16]) -> AlignedBuf {
        let mut raw = Box::new(RawList::new_zeroed());
        raw.magic = LIST_MAGIC;
        raw.version = U32::new(VERSION);
        raw.count = U32::new(u32::try_from(self.entries.len()).unwrap_or(0));
        raw.sequence = U64::new(self.sequence);
        raw.disk = *disk;
        for (raw, entry) in raw.entries.iter_mut().zip(&self.entries) {
            *raw = entry.to_raw();
        }
        raw.checksum = checksum(&[&LIST_MAGIC, body(&*raw)]);
        let mut bytes = AlignedBuf::zeroed(LIST_BYTES);
        bytes[..size_of::<RawList>()].copy_from_slice(raw.as_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8], disk: &[u8; 16]) -> Option<Self> {
        let (raw, _) = RawList::ref_from_prefix(bytes).ok()?;
        let count = usize::try_from(raw.count.get()).ok().filter(|count| *count <= MAX_AREAS)?;
        let valid = raw.magic == LIST_MAGIC
            && raw.version.get() == VERSION
            && raw.disk == *disk
            && raw.checksum == checksum(&[&LIST_MAGIC, body(raw)]);
        let entries = raw.entries[..count].iter().map(Entry::from_raw).collect::<Option<_>>()?;
        valid.then_some(Self { sequence: raw.sequence.get(), entries })
    }

    /// The newest valid copy, or none.
    pub(crate) async fn load<S: Storage>(
        io: &S,
        dir: &S::Dir,
        names: &[String],
        disk: &[u8; 16],
    ) -> Result<Self, Error> {
        let fail = || Error::io("reading the list of areas");
        if !names.iter().any(|name| name == LIST_FILE) {
            return Ok(Self::default());
        }
        let file = io.open(dir, LIST_FILE).map_err(fail())?;
        let len = io.len(&file).map_err(fail())?;
        let mut newest = Self::default();
        for copy in 0..2 {
            let at = copy * LIST_BYTES as u64;
            if at + LIST_BYTES as u64 > len {
                break;
            }
            let mut bytes = AlignedBuf::zeroed(LIST_BYTES);
            io.read(&file, at, Target::of(&mut bytes)).await.map_err(fail())?;
            if let Some(found) = Self::from_bytes(&bytes, disk).filter(|one| one.sequence > newest.sequence) {
                newest = found;
            }
        }
        Ok(newest)
    }

    /// Writes it over the older copy, durably.
    pub(crate) async fn save<S: Storage>(
        &mut self,
        io: &S,
        dir: &S::Dir,
        disk: &[u8; 16],
    ) -> Result<(), Error> {
        let fail = || Error::io("writing the list of areas");
        let next = Self { sequence: self.sequence + 1, entries: self.entries.clone() };
        let file = match io.open(dir, LIST_FILE) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => io.create(dir, LIST_FILE),
            opened => opened,
        };
        let file = file.map_err(fail())?;
        let at = next.sequence % 2 * LIST_BYTES as u64;
        let bytes = next.to_bytes(disk);
        io.write(&file, at, Source::of(&bytes[..])).await.map_err(fail())?;
        io.sync(&file).await.map_err(fail())?;
        io.sync_dir(dir).map_err(fail())?;
        *self = next;
        Ok(())
    }

    /// A range of numbers that no area has, at most `wanted` long.
    fn free_range(&self, wanted: u32) -> Option<(u32, u32)> {
        let mut taken: Vec<(u32, u32)> = self.entries.iter().map(|one| (one.base, one.slots)).collect();
        taken.sort_unstable();
        // Between two areas a number is nobody's, so that no run goes from one to the other; the last one
        // says "zeros".
        let mut from = OWN_SLOTS + 1;
        let mut best: Option<(u32, u32)> = None;
        for (base, slots) in taken.into_iter().chain([(u32::MAX, 0)]) {
            let free = base.saturating_sub(1).saturating_sub(from);
            if best.is_none_or(|(_, most)| most < wanted && free > most) && free > 0 {
                best = Some((from, free.min(wanted)));
            }
            from = from.max(base.saturating_add(slots).saturating_add(1));
        }
        best
    }
}

/// What is in a file that may become an area.
enum Found {
    Blank,
    /// Of this disk: the area's UUID.
    Ours([u8; 16]),
    Foreign(&'static str),
}

async fn look<S: Storage>(io: &S, opened: &OpenedArea<S::File>, disk: &[u8; 16]) -> std::io::Result<Found> {
    let mut first = vec![0; usize::try_from(opened.len.min(BLANK_BYTES)).unwrap_or(0)];
    io.read(&opened.file, 0, Target::of(&mut first)).await?;
    match read_header(&first) {
        Some((owner, uuid)) if owner == *disk => return Ok(Found::Ours(uuid)),
        Some(_) => return Ok(Found::Foreign("it keeps the old content of another disk")),
        None => {}
    }
    let mut last = vec![0; first.len()];
    let at = opened.len - last.len() as u64;
    io.read(&opened.file, at, Target::of(&mut last)).await?;
    // A power cut may leave the length that the header gave the file, and not the header.
    let is_short = opened.len <= PAGE as u64;
    if first.iter().chain(&last).all(|&byte| byte == 0) && (is_short || opened.kind == AreaKind::Device) {
        return Ok(Found::Blank);
    }
    Ok(Found::Foreign("it is not empty, and what is in it was not written by ebbtide"))
}

/// The file that a disk has in a directory that is an area.
fn name_in_directory(disk: &[u8; 16]) -> String {
    format!("{}.ebbtide-store", uuid::Uuid::from_bytes(*disk))
}

fn refused(spec: &AreaSpec, why: impl Into<String>) -> Error {
    Error::AreaRefused { path: spec.path.clone(), why: why.into() }
}

/// An area that may be added: looked at, and nothing written to it yet.
pub(crate) struct Candidate<S: Storage> {
    spec: AreaSpec,
    opened: OpenedArea<S::File>,
}

/// Opens what the operator named, and refuses what cannot be an area of this disk.
pub(crate) async fn inspect<S: Storage>(
    io: &S,
    spec: &AreaSpec,
    disk: &[u8; 16],
    others: &[(u64, u64)],
) -> Result<Candidate<S>, Error> {
    let fail = |error: std::io::Error| refused(spec, error.to_string());
    if spec.path.len() > PATH_BYTES {
        return Err(refused(spec, format!("its path has more than {PATH_BYTES} bytes")));
    }
    if let Some(bytes) = spec.bytes.filter(|bytes| *bytes < MIN_BYTES) {
        return Err(refused(
            spec,
            format!("{bytes} bytes are fewer than the {MIN_BYTES} that an area has at least"),
        ));
    }
    let opened = io.open_area(&spec.path, &name_in_directory(disk), true).map_err(fail)?;
    if others.contains(&opened.identity) {
        return Err(refused(spec, "it is in use by this disk already"));
    }
    if opened.kind == AreaKind::Device && opened.len < MIN_BYTES + PAGE as u64 {
        return Err(refused(
            spec,
            format!("the device has {} bytes, an area has {MIN_BYTES} at least", opened.len),
        ));
    }
    match look(io, &opened, disk).await.map_err(fail)? {
        Found::Blank | Found::Ours(_) => Ok(Candidate { spec: spec.clone(), opened }),
        Found::Foreign(why) => Err(refused(spec, why)),
    }
}

/// Makes a candidate an area, durably: the header, then the list.
pub(crate) async fn adopt<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    list: &mut List,
    candidate: Candidate<S>,
) -> Result<Area<S>, Error> {
    let Candidate { spec, opened } = candidate;
    let device = opened.kind == AreaKind::Device;
    let room = if device { opened.len.saturating_sub(PAGE as u64) } else { u64::MAX };
    let bytes = spec.bytes.or(device.then_some(room)).map(|bytes| bytes.min(room));
    let wanted =
        bytes.map_or(GROWING_SLOTS, |bytes| u32::try_from(bytes / GRAIN as u64).unwrap_or(OWN_SLOTS));
    let number = list.entries.iter().map(|one| one.number).max().unwrap_or(0).checked_add(1);
    let (Some((base, slots)), Some(number), true) =
        (list.free_range(wanted), number, list.entries.len() < MAX_AREAS)
    else {
        return Err(refused(&spec, format!("a disk has at most {MAX_AREAS} areas, of 8 TiB together")));
    };
    let uuid = uuid::Uuid::new_v4().into_bytes();
    let entry = Entry {
        number,
        kind: opened.kind,
        bounded: bytes.is_some(),
        base,
        slots,
        uuid,
        path: spec.path.clone(),
    };
    let fail = || Error::io("writing the header of an area");
    let page = entry.header(disk);
    io.write(&opened.file, 0, Source::of(&page[..])).await.map_err(fail())?;
    io.sync(&opened.file).await.map_err(fail())?;
    let mut next = list.clone();
    next.entries.push(entry.clone());
    next.save(io, dir, disk).await?;
    *list = next;
    Ok(Area::new(entry, opened.file, opened.identity, opened.len, false))
}

/// Opens the area of the state directory and those of the list. One that is not there, or is another's, is
/// lost.
pub(crate) async fn open<S: Storage>(
    io: &S,
    dir: &S::Dir,
    names: &[String],
    disk: &[u8; 16],
    list: &List,
    wanted: &[AreaSpec],
    shared: std::sync::Arc<crate::Budget>,
) -> Result<Store<S>, Error> {
    let fail = || Error::io("opening the difference store");
    let found = names.iter().any(|name| name == STORE_FILE);
    let file = if found { io.open(dir, STORE_FILE) } else { io.create(dir, STORE_FILE) }.map_err(fail())?;
    let len = io.len(&file).map_err(fail())?;
    let own = Entry {
        number: 0,
        kind: AreaKind::File,
        bounded: false,
        base: 0,
        slots: OWN_SLOTS,
        uuid: [0; 16],
        path: STORE_FILE.to_owned(),
    };
    let mut areas = vec![std::sync::Arc::new(Area::new(own, file, (0, 0), len, !wanted.is_empty()))];
    let mut lost = Vec::new();
    for entry in &list.entries {
        match reopen(io, entry, disk).await {
            Ok(area) => areas.push(std::sync::Arc::new(area)),
            Err(why) => lost.push(Lost { entry: entry.clone(), why }),
        }
    }
    Ok(Store::new(areas, lost, shared))
}

/// Opens an area of the list; why not, if it is not as the list says.
async fn reopen<S: Storage>(io: &S, entry: &Entry, disk: &[u8; 16]) -> Result<Area<S>, String> {
    let opened =
        io.open_area(&entry.path, &name_in_directory(disk), false).map_err(|error| error.to_string())?;
    match look(io, &opened, disk).await.map_err(|error| error.to_string())? {
        Found::Ours(uuid) if uuid == entry.uuid => {
            Ok(Area::new(entry.clone(), opened.file, opened.identity, opened.len, false))
        }
        Found::Ours(_) => Err("it was made anew".to_owned()),
        Found::Blank => Err("it is empty".to_owned()),
        Found::Foreign(why) => Err(why.to_owned()),
    }
}

/// Looks at what the operator named and the list does not have, or has as lost.
///
/// # Errors
/// [`Error::AreaRefused`] for what cannot be an area of this disk; nothing was written then. What the list
/// has and is another's by now is only said, and the disk served without it; so is all if `lenient`, which is
/// for a disk whose superblock is damaged: what was its own looks like another's then.
pub(crate) async fn wanted<S: Storage>(
    io: &S,
    plan: &StorePlan,
    disk: &[u8; 16],
    store: &Store<S>,
    image: &Identity,
    lenient: bool,
) -> Result<Vec<Candidate<S>>, Error> {
    let specs = &plan.areas;
    let areas = store.areas();
    let mut others: Vec<(u64, u64)> = areas.iter().map(|area| area.identity).collect();
    others.push((image.device, image.inode));
    let mut wanted = Vec::new();
    for (nth, spec) in specs.iter().enumerate() {
        if specs[..nth].iter().any(|other| other.path == spec.path) {
            return Err(refused(spec, "it is named twice"));
        }
        if areas.iter().any(|area| area.entry.number != 0 && area.entry.path == spec.path) {
            continue;
        }
        match inspect(io, spec, disk, &others).await {
            Ok(candidate) => {
                others.push(candidate.opened.identity);
                wanted.push(candidate);
            }
            Err(error) if lenient || store.lost.iter().any(|lost| lost.entry.path == spec.path) => {
                log::warn!("{error}; going on without it");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(wanted)
}

/// Takes from the list what no record can name, if the operator does not name it either.
pub(crate) async fn settle<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    list: &mut List,
    store: &Store<S>,
    specs: &[AreaSpec],
    no_snapshots: bool,
) -> Result<(), Error> {
    let is_lost = |entry: &Entry| store.lost.iter().any(|lost| lost.entry.number == entry.number);
    let is_named = |entry: &Entry| specs.iter().any(|spec| spec.path == entry.path);
    let stays = |entry: &&Entry| !no_snapshots || is_named(entry) && !is_lost(entry);
    let kept: Vec<Entry> = list.entries.iter().filter(stays).cloned().collect();
    if kept.len() == list.entries.len() {
        return Ok(());
    }
    let leaves = |number: u32| number != 0 && !kept.iter().any(|one| one.number == number);
    for area in store.areas().iter().filter(|area| leaves(area.entry.number)) {
        // Nobody asks for its space later.
        area.tidy(io).await;
        if let Err(error) = area.sync_holes(io).await {
            log::warn!("{error}: {}", area.entry.path);
        }
    }
    let mut next = list.clone();
    next.entries = kept;
    next.save(io, dir, disk).await?;
    store.retain(&next.entries);
    *list = next;
    Ok(())
}

impl<S: Storage> Disk<S> {
    /// Adds an area to the difference store, while snapshots are held or not. Guests' writes that wait for
    /// space go on.
    ///
    /// # Errors
    /// [`Error::AreaRefused`] for what cannot be one; those of the files. Nothing is changed then.
    pub async fn append_area(&self, _admin: &mut Admin, io: &S, spec: &AreaSpec) -> Result<(), Error> {
        let areas = self.store.areas();
        if areas.iter().any(|area| area.entry.number != 0 && area.entry.path == spec.path) {
            return Err(refused(spec, "it is in use by this disk already"));
        }
        let mut others: Vec<(u64, u64)> = areas.iter().map(|area| area.identity).collect();
        let image = self.superblock.lock().unwrap_or_else(PoisonError::into_inner).identity;
        others.push((image.device, image.inode));
        let candidate = inspect(io, spec, &self.id, &others).await?;
        let mut list = self.areas.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let area = adopt(io, &self.dir, &self.id, &mut list, candidate).await?;
        *self.areas.lock().unwrap_or_else(PoisonError::into_inner) = list;
        self.store.push(area);
        self.holds.retry();
        Ok(())
    }

    /// The areas of the difference store.
    pub fn areas(&self) -> Vec<AreaInfo> {
        self.store.infos()
    }

    /// The limit of the difference store of all snapshots of the disk, and what they use of it.
    pub fn store_budget(&self) -> &Budget {
        &self.store.budget
    }

    /// Changes the limit of the disk's difference store. One at a time with other administrative verbs.
    ///
    /// # Errors
    /// [`Error::LimitInUse`].
    pub fn limit_store(&self, limit: Option<u64>) -> Result<(), Error> {
        self.store.budget.set_limit(limit)?;
        self.holds.retry();
        Ok(())
    }

    /// A limit that changes wait for may have been raised elsewhere.
    pub fn retry_held(&self) {
        self.holds.retry();
    }

    /// Changes the limit of a snapshot, durably over a restart of the process.
    ///
    /// # Errors
    /// [`Error::LimitInUse`]; [`Error::NoSuchSnapshot`]; those of its file.
    pub async fn limit_snapshot(&self, io: &S, name: &str, limit: Option<u64>) -> Result<(), Error> {
        let snapshot = self.snapshot(name)?;
        let before = snapshot.set_limit(limit.unwrap_or(0))?;
        if let Err(error) = snapshot.write_head(io).await {
            let _ = snapshot.set_limit(before);
            return Err(error);
        }
        self.holds.retry();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u32, base: u32, slots: u32) -> Entry {
        let path = format!("/a/{number}");
        Entry { number, kind: AreaKind::Device, bounded: true, base, slots, uuid: [5; 16], path }
    }

    #[test]
    fn a_list_survives_its_bytes_and_a_flipped_bit_is_noticed() {
        let list =
            List { sequence: 3, entries: vec![entry(1, OWN_SLOTS + 1, 300), entry(2, OWN_SLOTS + 400, 9)] };
        let bytes = list.to_bytes(&[1; 16]);
        assert_eq!(List::from_bytes(&bytes, &[1; 16]).map(|one| one.entries), Some(list.entries));
        assert!(List::from_bytes(&bytes, &[2; 16]).is_none());
        for bit in (0..size_of::<RawList>() * 8).step_by(7) {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(List::from_bytes(&bytes, &[1; 16]).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn the_written_format_is_the_code() {
        use std::mem::offset_of;
        let text = include_str!("../FORMAT.md");
        let rows = |heading: &str| -> Vec<(usize, usize)> {
            let section = text.split(&format!("\n## {heading}\n")).nth(1).expect("the section exists");
            let section = section.split("\n## ").next().unwrap_or(section);
            let rows =
                section.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit());
            let cell = |row: &str, nth| row.split('|').nth(nth).and_then(|cell| cell.trim().parse().ok());
            rows.map(|row| (cell(row, 1).unwrap(), cell(row, 2).unwrap())).collect()
        };
        macro_rules! places {
            ($type:ty: $($field:ident),*) => {
                (size_of::<$type>(), vec![$(offset_of!($type, $field)),*])
            };
        }
        for (heading, (size, places)) in [
            ("List of areas", places!(RawList: magic, version, count, sequence, disk, entries, checksum)),
            ("Entry of the list", places!(RawEntry: number, base, slots, kind, path_len, uuid, path)),
            ("Area header", places!(RawHeader: magic, version, number, base, slots, disk, uuid, checksum)),
        ] {
            let rows = rows(heading);
            assert_eq!(rows.iter().map(|row| row.0).collect::<Vec<_>>(), places, "{heading}");
            let ends: Vec<_> = rows.iter().map(|(at, bytes)| at + bytes).collect();
            let starts: Vec<_> = places.into_iter().skip(1).chain([size]).collect();
            assert_eq!(ends, starts, "{heading}: no gaps");
        }
    }

    #[test]
    fn numbers_of_two_areas_never_touch() {
        let mut list = List::default();
        for number in 1..=15 {
            let wanted = if number % 5 == 0 { GROWING_SLOTS } else { 256 * number };
            let Some((base, slots)) = list.free_range(wanted) else { continue };
            assert!(base > OWN_SLOTS && slots > 0 && slots <= wanted);
            assert!(u64::from(base) + u64::from(slots) < u64::from(u32::MAX));
            for one in &list.entries {
                let apart = base > one.base + one.slots || base + slots < one.base;
                assert!(apart, "{base}+{slots} beside {}+{}", one.base, one.slots);
            }
            list.entries.push(entry(number, base, slots));
        }
        assert!(list.entries.len() >= 13);
    }

    #[test]
    fn a_header_tells_disk_and_area() {
        let page = entry(1, 7, 8).header(&[3; 16]);
        assert_eq!(read_header(&page[..]), Some(([3; 16], [5; 16])));
        for bit in 0..size_of::<RawHeader>() * 8 {
            let mut page = page.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read_header(&page[..]), None, "bit {bit}");
        }
    }
}
