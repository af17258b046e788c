//! What the engine writes to disk, byte for byte. FORMAT.md describes it for people.
//!
//! Invariant: bytes from disk are `Raw…` until their magic, version and checksum were checked;
//! only then do they become the types that the rest of the engine uses. All numbers are
//! little-endian; checksums are CRC-32C, salted by what the structure is.
//! Absent: when things are written, and in which order; `open`, `group` and `preserve` own that.

use std::ops::Range;

use cbt::{Epoch, Generation};
use zerocopy::byteorder::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::index::{Key, Slot};
use crate::overflow::{OnOverflow, Terms};
use crate::tracker::Identity;

/// Bytes of a header page, and of the unit in which headers are written.
pub(crate) const PAGE: usize = 4096;
/// Bytes of a grain, the unit of preserving, and of a store's slot.
pub(crate) const GRAIN: usize = GRAIN_BYTES as usize;
const GRAIN_BYTES: u32 = 4096;
/// Version of snapshots' heads and their records.
const VERSION: u32 = 2;
/// Version of the superblock. One of version 2 ends with its checksum in the place of `began_ns`.
const SUPERBLOCK_VERSION: u32 = 3;
const SUPERBLOCK_BODY_2: usize = 1176;
/// Longest image path that a superblock holds, in bytes; longer ones are kept by their end.
const PATH_BYTES: usize = 1024;
/// Longest snapshot name in bytes.
pub(crate) const NAME_BYTES: usize = 128;
/// Longest reason in bytes.
const REASON_BYTES: usize = 512;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"EBBTSUP1";
const SNAPSHOT_MAGIC: [u8; 8] = *b"EBBTSNP1";

/// How a disk was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskState {
    /// Closed in order: everything durable, the identity stamped.
    Clean,
    /// Being served, or left in a hurry.
    Serving,
    /// As [`DiskState::Serving`], but the intent log could not be written: a stop of the host loses marks.
    Unlogged,
    /// A new generation is being begun: the map is not to be trusted.
    Resetting,
    /// As [`DiskState::Clean`], but a flush of the map had failed, or stores were not flushed: it counts only until the host
    /// stops.
    Doubtful,
    /// As [`DiskState::Clean`], but the history was exported: it goes on elsewhere, see [`crate::handover`].
    HandedOver,
}

impl DiskState {
    /// Whether the disk was closed in order, and the image stamped.
    pub(crate) fn is_closed(self) -> bool {
        matches!(self, Self::Clean | Self::Doubtful)
    }
}

/// A disk's superblock: two copies in turn, the newest valid one counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) sequence: u64,
    pub(crate) disk: [u8; 16],
    pub(crate) generation: Generation,
    /// The boot of the host during which it was written.
    pub(crate) boot: [u8; 16],
    pub(crate) state: DiskState,
    /// No mark was ever made in a later epoch than this.
    pub(crate) epoch: Epoch,
    /// Bytes of a block; zero if changes are not tracked.
    pub(crate) block_bytes: u64,
    pub(crate) capacity: u64,
    pub(crate) identity: Identity,
    /// The rewind that is in force; [`crate::rewind::NO_REWIND`] for none.
    pub(crate) rewind: [u8; 16],
    pub(crate) path: String,
    /// The capacity that a resize has begun to give the disk, larger than `capacity`.
    pub(crate) growing_to: Option<u64>,
    /// When the generation began, in nanoseconds since 1970; 0 if that is not known.
    pub(crate) began_ns: u64,
    /// Why it began, as [`crate::ResetReason`] numbers it; 0 if that is not known.
    pub(crate) began_reason: u32,
    /// An operator switched tracking off; see [`crate::switch`].
    pub(crate) switched_off: bool,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    state: U32,
    sequence: U64,
    disk: [u8; 16],
    generation: [u8; 16],
    boot: [u8; 16],
    epoch: U32,
    path_len: U32,
    block_bytes: U64,
    capacity: U64,
    device: U64,
    inode: U64,
    image_len: U64,
    mtime_ns: I64,
    rewind: [u8; 16],
    path: [u8; PATH_BYTES],
    growing_to: U64,
    began_ns: U64,
    began_reason: U32,
    switched_off: U32,
    checksum: U32,
}

const _: () = assert!(size_of::<RawSuperblock>() == 1196);

/// Where a snapshot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SnapshotState {
    /// Its files exist; its instant may or may not have come.
    Prepared,
    /// Its instant has come for every disk of its group.
    Active,
    /// Deleted; kept only for what older snapshots need of it.
    Deleted,
}

/// The head of a snapshot's index file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotHeader {
    /// Counts the snapshots of a disk; orders the chain.
    pub(crate) sequence: u32,
    pub(crate) state: SnapshotState,
    pub(crate) disk: [u8; 16],
    /// Snapshots that were taken together share this.
    pub(crate) group: [u8; 16],
    pub(crate) generation: Generation,
    /// The last epoch that the snapshot includes.
    pub(crate) epoch: Epoch,
    pub(crate) tracked: bool,
    pub(crate) capacity: u64,
    /// When it was taken, in nanoseconds since 1970.
    pub(crate) created_ns: u64,
    pub(crate) name: String,
    /// The number of the next newer one, whose index this one needs; 0 if there is none.
    pub(crate) newer: u32,
    /// Why it is broken, if it is.
    pub(crate) broken: Option<Broken>,
    pub(crate) terms: Terms,
}

/// Why and when a snapshot broke.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) reason: String,
    /// The system's error number, or 0.
    pub(crate) errno: u32,
    /// In nanoseconds since 1970, or 0 if that is not known.
    pub(crate) at_ns: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSnapshotHeader {
    magic: [u8; 8],
    version: U32,
    state: U32,
    sequence: U32,
    epoch: U32,
    disk: [u8; 16],
    group: [u8; 16],
    generation: [u8; 16],
    capacity: U64,
    created_ns: U64,
    grain_bytes: U32,
    flags: U32,
    newer: U32,
    broken_errno: U32,
    broken_ns: U64,
    limit: U64,
    on_overflow: U32,
    hold_seconds: U32,
    name_len: U16,
    reason_len: U16,
    name: [u8; NAME_BYTES],
    reason: [u8; REASON_BYTES],
    checksum: U32,
}

const _: () = assert!(size_of::<RawSnapshotHeader>() == 776);

const FLAG_TRACKED: u32 = 1;
const FLAG_BROKEN: u32 = 2;

/// One published key in an index file, after its head; or grains that were released.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawRecord {
    key: U64,
    slot: U32,
    checksum: U32,
}

/// Bytes of a record.
pub(crate) const RECORD: usize = size_of::<RawRecord>();
const _: () = assert!(RECORD == 16);

/// The CRC-32C of `parts`, in order.
pub(crate) fn checksum(parts: &[&[u8]]) -> U32 {
    U32::new(parts.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part)))
}

/// The bytes of `raw` before its checksum, which is its last field.
pub(crate) fn body<T: IntoBytes + Immutable>(raw: &T) -> &[u8] {
    let bytes = raw.as_bytes();
    &bytes[..bytes.len() - size_of::<U32>()]
}

pub(crate) fn page_of<T: IntoBytes + Immutable>(raw: &T) -> Box<[u8; PAGE]> {
    let mut page = Box::new([0; PAGE]);
    page[..size_of::<T>()].copy_from_slice(raw.as_bytes());
    page
}

/// The longest end of `text` that fits `max` bytes and begins at a character.
pub(crate) fn tail(text: &str, max: usize) -> &str {
    let mut start = text.len().saturating_sub(max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// The longest beginning of `text` that fits `max` bytes and ends at a character.
fn head(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

pub(crate) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A text of `len` bytes in a field, or `None` if it does not fit or is no UTF-8.
pub(crate) fn text(field: &[u8], len: usize) -> Option<String> {
    String::from_utf8(field.get(..len)?.to_vec()).ok()
}

impl RawSuperblock {
    /// From a page, with a good checksum; what version 2 did not have is zero.
    fn checked(page: &[u8]) -> Option<Self> {
        let (raw, _) = Self::read_from_prefix(page).ok()?;
        if raw.magic != SUPERBLOCK_MAGIC {
            return None;
        }
        match raw.version.get() {
            SUPERBLOCK_VERSION => (raw.checksum == checksum(&[&SUPERBLOCK_MAGIC, body(&raw)])).then_some(raw),
            2 => {
                let (body, rest) = page.split_at(SUPERBLOCK_BODY_2);
                let (sum, _) = U32::read_from_prefix(rest).ok()?;
                let began_ns = U64::ZERO;
                let (began_reason, switched_off) = (U32::ZERO, U32::ZERO);
                (sum == checksum(&[&SUPERBLOCK_MAGIC, body])).then_some(Self {
                    began_ns,
                    began_reason,
                    switched_off,
                    ..raw
                })
            }
            _ => None,
        }
    }
}

impl Superblock {
    /// As one page of its file.
    pub(crate) fn to_page(&self) -> Box<[u8; PAGE]> {
        let path = tail(&self.path, PATH_BYTES);
        let mut raw = RawSuperblock {
            magic: SUPERBLOCK_MAGIC,
            version: U32::new(SUPERBLOCK_VERSION),
            state: U32::new(match self.state {
                DiskState::Clean => 1,
                DiskState::Serving => 2,
                DiskState::Resetting => 3,
                DiskState::Unlogged => 4,
                DiskState::Doubtful => 5,
                DiskState::HandedOver => 6,
            }),
            sequence: U64::new(self.sequence),
            disk: self.disk,
            generation: self.generation.to_bytes(),
            boot: self.boot,
            epoch: U32::new(self.epoch.get()),
            path_len: U32::new(u32::try_from(path.len()).unwrap_or(0)),
            block_bytes: U64::new(self.block_bytes),
            capacity: U64::new(self.capacity),
            device: U64::new(self.identity.device),
            inode: U64::new(self.identity.inode),
            image_len: U64::new(self.identity.len),
            mtime_ns: I64::new(self.identity.mtime_ns),
            rewind: self.rewind,
            path: padded(path),
            growing_to: U64::new(self.growing_to.unwrap_or(0)),
            began_ns: U64::new(self.began_ns),
            began_reason: U32::new(self.began_reason),
            switched_off: U32::new(self.switched_off.into()),
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&SUPERBLOCK_MAGIC, body(&raw)]);
        page_of(&raw)
    }

    /// From a page of its file; `None` if it is not a whole and valid superblock.
    pub(crate) fn from_page(page: &[u8]) -> Option<Self> {
        let raw = RawSuperblock::checked(page)?;
        Some(Self {
            sequence: raw.sequence.get(),
            disk: raw.disk,
            generation: Generation::from_bytes(raw.generation),
            boot: raw.boot,
            state: match raw.state.get() {
                1 => DiskState::Clean,
                2 => DiskState::Serving,
                3 => DiskState::Resetting,
                4 => DiskState::Unlogged,
                5 => DiskState::Doubtful,
                6 => DiskState::HandedOver,
                _ => return None,
            },
            epoch: Epoch::new(raw.epoch.get()),
            block_bytes: raw.block_bytes.get(),
            capacity: raw.capacity.get(),
            identity: Identity {
                device: raw.device.get(),
                inode: raw.inode.get(),
                len: raw.image_len.get(),
                mtime_ns: raw.mtime_ns.get(),
            },
            rewind: raw.rewind,
            path: text(&raw.path, usize::try_from(raw.path_len.get()).ok()?)?,
            growing_to: Some(raw.growing_to.get()).filter(|&to| to > raw.capacity.get()),
            began_ns: raw.began_ns.get(),
            began_reason: raw.began_reason.get(),
            switched_off: raw.switched_off.get() != 0,
        })
    }
}

impl SnapshotHeader {
    /// As the first page of an index file.
    pub(crate) fn to_page(&self) -> Box<[u8; PAGE]> {
        let broken = self.broken.as_ref();
        let reason = head(broken.map_or("", |broken| &broken.reason), REASON_BYTES);
        let mut flags = 0;
        if self.tracked {
            flags |= FLAG_TRACKED;
        }
        if self.broken.is_some() {
            flags |= FLAG_BROKEN;
        }
        let length = |text: &str| U16::new(u16::try_from(text.len()).unwrap_or(0));
        let mut raw = RawSnapshotHeader {
            magic: SNAPSHOT_MAGIC,
            version: U32::new(VERSION),
            state: U32::new(match self.state {
                SnapshotState::Prepared => 1,
                SnapshotState::Active => 2,
                SnapshotState::Deleted => 3,
            }),
            sequence: U32::new(self.sequence),
            epoch: U32::new(self.epoch.get()),
            disk: self.disk,
            group: self.group,
            generation: self.generation.to_bytes(),
            capacity: U64::new(self.capacity),
            created_ns: U64::new(self.created_ns),
            grain_bytes: U32::new(GRAIN_BYTES),
            flags: U32::new(flags),
            newer: U32::new(self.newer),
            broken_errno: U32::new(broken.map_or(0, |broken| broken.errno)),
            broken_ns: U64::new(broken.map_or(0, |broken| broken.at_ns)),
            limit: U64::new(self.terms.limit),
            on_overflow: U32::new(match self.terms.on_overflow {
                OnOverflow::BreakSnapshot => 1,
                OnOverflow::HoldWrites => 2,
                OnOverflow::FailWrites => 3,
            }),
            hold_seconds: U32::new(self.terms.hold_seconds),
            name_len: length(&self.name),
            reason_len: length(reason),
            name: padded(&self.name),
            reason: padded(reason),
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&SNAPSHOT_MAGIC, body(&raw)]);
        page_of(&raw)
    }

    /// From the first page of an index file; `None` if it is not a whole and valid head.
    pub(crate) fn from_page(page: &[u8]) -> Option<Self> {
        let (raw, _) = RawSnapshotHeader::read_from_prefix(page).ok()?;
        if raw.magic != SNAPSHOT_MAGIC
            || raw.version.get() != VERSION
            || raw.grain_bytes.get() != GRAIN_BYTES
            || raw.checksum != checksum(&[&SNAPSHOT_MAGIC, body(&raw)])
        {
            return None;
        }
        let reason = text(&raw.reason, raw.reason_len.get().into())?;
        Some(Self {
            sequence: raw.sequence.get(),
            state: match raw.state.get() {
                1 => SnapshotState::Prepared,
                2 => SnapshotState::Active,
                3 => SnapshotState::Deleted,
                _ => return None,
            },
            disk: raw.disk,
            group: raw.group,
            generation: Generation::from_bytes(raw.generation),
            epoch: Epoch::new(raw.epoch.get()),
            tracked: raw.flags.get() & FLAG_TRACKED != 0,
            capacity: raw.capacity.get(),
            created_ns: raw.created_ns.get(),
            name: text(&raw.name, raw.name_len.get().into())?,
            newer: raw.newer.get(),
            broken: (raw.flags.get() & FLAG_BROKEN != 0).then(|| Broken {
                reason,
                errno: raw.broken_errno.get(),
                at_ns: raw.broken_ns.get(),
            }),
            terms: Terms {
                on_overflow: match raw.on_overflow.get() {
                    1 => OnOverflow::BreakSnapshot,
                    2 => OnOverflow::HoldWrites,
                    3 => OnOverflow::FailWrites,
                    _ => return None,
                },
                hold_seconds: raw.hold_seconds.get(),
                limit: raw.limit.get(),
            },
        })
    }
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Where a key is.
    Kept(Key, Slot),
    /// Grains that readers have released.
    Released(Range<u64>),
}

impl RawRecord {
    /// A record of grains that were released, at `place` as below. Fewer than 2^32 grains.
    pub(crate) fn released(disk: &[u8; 16], sequence: u32, place: u64, grains: &Range<u64>) -> Self {
        let count = u32::try_from(grains.end - grains.start).unwrap_or(0);
        let mut raw =
            Self { key: U64::new(grains.start | Key::GRAINS), slot: U32::new(count), checksum: U32::ZERO };
        raw.checksum = raw.expected(disk, sequence, place);
        raw
    }

    /// The record at `place` (0 for the first) of the index of snapshot `sequence`.
    pub(crate) fn new(disk: &[u8; 16], sequence: u32, place: u64, key: Key, slot: Slot) -> Self {
        let mut raw =
            Self { key: U64::new(key.to_raw()), slot: U32::new(slot.to_raw()), checksum: U32::ZERO };
        raw.checksum = raw.expected(disk, sequence, place);
        raw
    }

    /// What it says, or `None` if it was never written, or not whole.
    pub(crate) fn check(&self, disk: &[u8; 16], sequence: u32, place: u64) -> Option<Entry> {
        if self.checksum != self.expected(disk, sequence, place) {
            return None;
        }
        let (key, slot) = (self.key.get(), self.slot.get());
        if key & Key::map_page(0).to_raw() == 0 && key & Key::GRAINS != 0 {
            let first = key & !Key::GRAINS;
            return Some(Entry::Released(first..first + u64::from(slot)));
        }
        Some(Entry::Kept(Key::from_raw(key), Slot::from_raw(slot)))
    }

    /// What the bytes at `place` say; `None` for a place that was not written.
    ///
    /// # Errors
    /// If they are damaged: a record lies within a page, so it is written wholly or not at all.
    pub(crate) fn read(
        bytes: &[u8; RECORD],
        disk: &[u8; 16],
        sequence: u32,
        place: u64,
    ) -> Result<Option<Entry>, Damaged> {
        let Ok(record) = Self::read_from_bytes(bytes) else { return Err(Damaged) };
        match record.check(disk, sequence, place) {
            None if bytes.iter().all(|&byte| byte == 0) => Ok(None),
            None => Err(Damaged),
            entry => Ok(entry),
        }
    }

    /// Salted by the disk, the snapshot and the place, so that a record of another time or file,
    /// or a hole, does not pass.
    fn expected(&self, disk: &[u8; 16], sequence: u32, place: u64) -> U32 {
        let salt = U32::new(sequence);
        let place = U64::new(place);
        checksum(&[b"record", disk, salt.as_bytes(), place.as_bytes(), body(self)])
    }
}

/// Bytes that are not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Damaged;

/// The version that a superblock or a snapshot's head says it has, if that is another one than here.
pub(crate) fn other_version(page: &[u8; PAGE]) -> Option<u32> {
    let (magic, rest) = page.split_at(8);
    let (version, _) = U32::read_from_prefix(rest).ok()?;
    let known: &[u32] = match magic {
        _ if magic == SUPERBLOCK_MAGIC => &[2, SUPERBLOCK_VERSION],
        _ if magic == SNAPSHOT_MAGIC => &[VERSION],
        _ => return None,
    };
    (!known.contains(&version.get())).then(|| version.get())
}

/// The file of a disk's superblock.
pub(crate) const SUPERBLOCK_FILE: &str = "superblock";
/// The file of its change map, and of the words that must survive without being written.
pub(crate) const MAP_FILE: &str = "map";
pub(crate) const STORE_FILE: &str = "store";

/// The index file of the snapshot with this number.
pub(crate) fn index_file(sequence: u32) -> String {
    format!("{sequence:010}.index")
}

/// The number of the snapshot that a file of the state directory belongs to.
pub(crate) fn sequence_of(file: &str) -> Option<u32> {
    let stem = file.strip_suffix(".index")?;
    if stem.len() != 10 || !stem.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    stem.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        Superblock {
            sequence: 7,
            disk: [1; 16],
            generation: Generation::from_bytes([7; 16]),
            boot: [3; 16],
            state: DiskState::Serving,
            epoch: Epoch::new(9),
            block_bytes: 65536,
            capacity: 1 << 30,
            identity: Identity { device: 1, inode: 2, len: 1 << 30, mtime_ns: -5 },
            rewind: [9; 16],
            path: "/vm/ä.img".into(),
            growing_to: Some(2 << 30),
            began_ns: 77,
            began_reason: 10,
            switched_off: true,
        }
    }

    fn header() -> SnapshotHeader {
        SnapshotHeader {
            sequence: 3,
            state: SnapshotState::Active,
            disk: [1; 16],
            group: [2; 16],
            generation: Generation::from_bytes([7; 16]),
            epoch: Epoch::new(8),
            tracked: true,
            capacity: 1 << 30,
            created_ns: 1,
            name: "monday".into(),
            newer: 4,
            broken: Some(Broken { reason: "the store is full".into(), errno: 28, at_ns: 5 }),
            terms: Terms { on_overflow: OnOverflow::HoldWrites, hold_seconds: 60, limit: 1 << 20 },
        }
    }

    #[test]
    fn structures_survive_their_pages() {
        let (sup, snap) = (superblock(), header());
        assert_eq!(Superblock::from_page(&sup.to_page()[..]), Some(sup));
        assert_eq!(SnapshotHeader::from_page(&snap.to_page()[..]), Some(snap));
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let (sup, snap) = (superblock().to_page(), header().to_page());
        for bit in 0..size_of::<RawSuperblock>() * 8 {
            let mut page = sup.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Superblock::from_page(&page[..]), None, "bit {bit}");
        }
        for bit in 0..size_of::<RawSnapshotHeader>() * 8 {
            let mut page = snap.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SnapshotHeader::from_page(&page[..]), None, "bit {bit}");
        }
    }

    #[test]
    fn a_record_holds_only_at_its_place() {
        let record = RawRecord::new(&[1; 16], 4, 77, Key::grain(5), Slot::At(6));
        assert_eq!(record.check(&[1; 16], 4, 77), Some(Entry::Kept(Key::grain(5), Slot::At(6))));
        assert_eq!(record.check(&[1; 16], 4, 78), None);
        assert_eq!(record.check(&[1; 16], 5, 77), None);
        assert_eq!(record.check(&[2; 16], 4, 77), None);
        let record = RawRecord::released(&[1; 16], 4, 77, &(5..8));
        assert_eq!(record.check(&[1; 16], 4, 77), Some(Entry::Released(5..8)));
        assert_eq!(record.check(&[1; 16], 4, 78), None);
        let hole = RawRecord { key: U64::ZERO, slot: U32::ZERO, checksum: U32::ZERO };
        assert_eq!(hole.check(&[1; 16], 4, 0), None);
    }

    #[test]
    fn long_paths_and_reasons_are_cut_at_characters() {
        let mut long = superblock();
        long.path = "ä".repeat(2000);
        let read = Superblock::from_page(&long.to_page()[..]).map(|s| s.path.len());
        assert_eq!(read, Some(PATH_BYTES));
        let mut broken = header();
        broken.broken = Some(Broken { reason: "x".to_owned() + &"ä".repeat(2000), errno: 0, at_ns: 0 });
        let read = SnapshotHeader::from_page(&broken.to_page()[..]).and_then(|h| h.broken);
        assert_eq!(read.map(|r| r.reason.len()), Some(REASON_BYTES - 1));
    }

    #[test]
    fn file_names_tell_their_snapshot() {
        assert_eq!(sequence_of(&index_file(42)), Some(42));
        assert_eq!(sequence_of(&index_file(u32::MAX)), Some(u32::MAX));
        assert_eq!(sequence_of("superblock"), None);
        assert_eq!(sequence_of("+000000042.index"), None);
    }

    /// The rows of the table under `heading` in FORMAT.md: offset, bytes, field.
    fn documented(heading: &str) -> Vec<(usize, usize, String)> {
        let text = include_str!("../FORMAT.md");
        let section = text.split(&format!("\n## {heading}\n")).nth(1).expect("the section exists");
        let section = section.split("\n## ").next().unwrap_or(section);
        let rows =
            section.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit());
        rows.map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[1].parse().unwrap(), cells[2].parse().unwrap(), cells[4].to_owned())
        })
        .collect()
    }

    macro_rules! fields {
        ($type:ty: $($field:ident),* $(,)?) => {
            vec![$((std::mem::offset_of!($type, $field), stringify!($field).to_owned())),*]
        };
    }

    #[test]
    fn the_written_format_is_the_code() {
        let superblock = fields!(RawSuperblock: magic, version, state, sequence, disk, generation, boot, epoch,
            path_len, block_bytes, capacity, device, inode, image_len, mtime_ns, rewind, path, growing_to,
            began_ns, began_reason, switched_off, checksum);
        let head = fields!(RawSnapshotHeader: magic, version, state, sequence, epoch, disk, group, generation,
            capacity, created_ns, grain_bytes, flags, newer, broken_errno, broken_ns, limit, on_overflow, hold_seconds, name_len, reason_len, name, reason, checksum);
        let record = fields!(RawRecord: key, slot, checksum);
        for (heading, size, fields) in [
            ("Superblock", size_of::<RawSuperblock>(), superblock),
            ("Snapshot head", size_of::<RawSnapshotHeader>(), head),
            ("Record", RECORD, record),
        ] {
            let rows = documented(heading);
            let places: Vec<_> = rows.iter().map(|(offset, _, field)| (*offset, field.clone())).collect();
            assert_eq!(places, fields, "{heading}");
            let ends: Vec<_> = rows.iter().map(|(offset, bytes, _)| offset + bytes).collect();
            let starts: Vec<_> = rows.iter().skip(1).map(|row| row.0).chain([size]).collect();
            assert_eq!(ends, starts, "{heading}: no gaps");
        }
    }

    #[test]
    fn an_image_of_the_format_reads_the_same_for_ever() {
        let page = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/superblock-3")).unwrap();
        assert_eq!(Superblock::from_page(&page), Some(superblock()));
        let page = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/superblock-2")).unwrap();
        let older = Superblock { began_ns: 0, began_reason: 0, switched_off: false, ..superblock() };
        assert_eq!(Superblock::from_page(&page), Some(older));
        let page = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/snapshot-2.index")).unwrap();
        assert_eq!(SnapshotHeader::from_page(&page), Some(header()));
        let (record, _) = RawRecord::read_from_prefix(&page[PAGE..]).unwrap();
        assert_eq!(record.check(&[1; 16], 3, 0), Some(Entry::Kept(Key::map_page(5), Slot::Zero)));
        let (record, _) = RawRecord::read_from_prefix(&page[PAGE + RECORD..]).unwrap();
        assert_eq!(record.check(&[1; 16], 3, 1), Some(Entry::Released(16..48)));
    }
}
