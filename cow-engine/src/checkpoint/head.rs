//! A checkpoint's head on disk, and the names of its files. FORMAT.md describes them for people.
//!
//! Invariant: bytes from disk become a [`Head`] only after magic, version, checksum and bounds were checked.
//! The head lies within one sector, so no stop tears it. It says nothing of where its file lies: a file that
//! is copied to another state directory under another number is whole.
//! Absent: when it is written, and what is believed of it; the parent and [`super::registry`] own that.

use cbt::{BlockGrid, ChangeId, Epoch, Generation};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::{NAME_BYTES, PAGE, body, checksum, padded, page_of, text};

const MAGIC: [u8; 8] = *b"EBBTCKP1";
const VERSION: u32 = 1;
/// Longest code of why a generation ended, in bytes.
const ENDED_BYTES: usize = 64;
/// Bytes of no disk.
const MOST_BYTES: u64 = 1 << 62;

/// Where a checkpoint is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Its runs may be whole or not; nobody was told of it.
    Prepared,
    /// Its runs are on the medium, and those of every checkpoint of its group.
    Active,
}

/// What is known of a checkpoint without its runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) state: State,
    /// Of this file and no other: salts its runs.
    pub(crate) id: [u8; 16],
    pub(crate) disk: [u8; 16],
    /// Checkpoints that were made by one command share this.
    pub(crate) group: [u8; 16],
    /// The instant.
    pub(crate) change_id: ChangeId,
    /// Bytes of the disk at the instant.
    pub(crate) capacity: u64,
    pub(crate) grid: BlockGrid,
    /// When the instant was, in nanoseconds since 1970.
    pub(crate) created_ns: u64,
    /// Pages of runs that follow the head.
    pub(crate) pages: u64,
    pub(crate) name: String,
    /// Why its generation ended, as a stable code; empty while that goes on, or if it is not known.
    pub(crate) ended: String,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U32,
    state: U32,
    id: [u8; 16],
    disk: [u8; 16],
    group: [u8; 16],
    generation: [u8; 16],
    epoch: U32,
    name_len: U16,
    ended_len: U16,
    capacity: U64,
    block_bytes: U64,
    created_ns: U64,
    pages: U64,
    name: [u8; NAME_BYTES],
    ended: [u8; ENDED_BYTES],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHead>() == 316);
// One sector: a stop leaves the old one or the new one.
const _: () = assert!(size_of::<RawHead>() <= 512);

impl Head {
    /// As the first page of its file.
    ///
    /// # Panics
    /// If the name is longer than its field; it was checked where it entered.
    pub(crate) fn to_page(&self) -> Box<[u8; PAGE]> {
        let length = |text: &str| U16::new(u16::try_from(text.len()).unwrap_or(0));
        let ended = self.ended.get(..ENDED_BYTES).unwrap_or(&self.ended);
        let mut raw = RawHead {
            magic: MAGIC,
            version: U32::new(VERSION),
            state: U32::new(match self.state {
                State::Prepared => 1,
                State::Active => 2,
            }),
            id: self.id,
            disk: self.disk,
            group: self.group,
            generation: self.change_id.generation.to_bytes(),
            epoch: U32::new(self.change_id.epoch.get()),
            name_len: length(&self.name),
            ended_len: length(ended),
            capacity: U64::new(self.capacity),
            block_bytes: U64::new(self.grid.bytes()),
            created_ns: U64::new(self.created_ns),
            pages: U64::new(self.pages),
            name: padded(&self.name),
            ended: padded(ended),
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&MAGIC, body(&raw)]);
        page_of(&raw)
    }

    /// From the first page of a file; `None` if it is not a whole and valid head.
    pub(crate) fn from_page(page: &[u8]) -> Option<Self> {
        let (raw, _) = RawHead::read_from_prefix(page).ok()?;
        if raw.magic != MAGIC
            || raw.version.get() != VERSION
            || raw.checksum != checksum(&[&MAGIC, body(&raw)])
        {
            return None;
        }
        let generation = Generation::from_bytes(raw.generation);
        let head = Self {
            state: match raw.state.get() {
                1 => State::Prepared,
                2 => State::Active,
                _ => return None,
            },
            id: raw.id,
            disk: raw.disk,
            group: raw.group,
            change_id: ChangeId { generation, epoch: Epoch::new(raw.epoch.get()) },
            capacity: raw.capacity.get(),
            grid: BlockGrid::new(raw.block_bytes.get()).ok()?,
            created_ns: raw.created_ns.get(),
            pages: raw.pages.get(),
            name: text(&raw.name, raw.name_len.get().into())?,
            ended: text(&raw.ended, raw.ended_len.get().into())?,
        };
        // Runs of less than a block there are none, so there are never more pages than blocks.
        let fits = (1..=MOST_BYTES).contains(&head.capacity) && (1..=head.blocks()).contains(&head.pages);
        fits.then_some(head)
    }

    /// Blocks of the disk at the instant.
    pub(crate) fn blocks(&self) -> u64 {
        self.grid.count(self.capacity)
    }

    /// Bytes that its file has at least.
    pub(crate) fn file_len(&self) -> u64 {
        self.pages.saturating_add(1).saturating_mul(PAGE as u64)
    }
}

/// The file of a checkpoint.
pub(crate) fn file_of(number: u32) -> String {
    format!("{number:010}.checkpoint")
}

/// The number of the checkpoint that a file of the state directory is.
pub(crate) fn number_of(file: &str) -> Option<u32> {
    let stem = file.strip_suffix(".checkpoint")?;
    let plain = stem.len() == 10 && stem.bytes().all(|b| b.is_ascii_digit());
    if plain { stem.parse().ok() } else { None }
}

/// The numbers of checkpoints that have files, ascending.
pub(crate) fn numbers(names: &[String]) -> Vec<u32> {
    let mut all: Vec<u32> = names.iter().filter_map(|name| number_of(name)).collect();
    all.sort_unstable();
    all
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn head() -> Head {
        Head {
            state: State::Active,
            id: [4; 16],
            disk: [1; 16],
            group: [2; 16],
            change_id: ChangeId { generation: Generation::from_bytes([7; 16]), epoch: Epoch::new(8) },
            capacity: 1 << 30,
            grid: BlockGrid::new(65536).unwrap(),
            created_ns: 1,
            pages: 3,
            name: "monday".into(),
            ended: "image-changed".into(),
        }
    }

    #[test]
    fn a_head_survives_its_page_and_a_flipped_bit_is_noticed() {
        let page = head().to_page();
        assert_eq!(Head::from_page(&page[..]), Some(head()));
        for bit in 0..size_of::<RawHead>() * 8 {
            let mut page = page.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::from_page(&page[..]), None, "bit {bit}");
        }
    }

    #[test]
    fn a_head_of_no_disk_or_of_too_many_runs_is_none() {
        let blocks = head().blocks();
        for wrong in [
            Head { capacity: 0, ..head() },
            Head { pages: 0, ..head() },
            Head { pages: blocks + 1, ..head() },
            Head { pages: u64::MAX, ..head() },
        ] {
            assert_eq!(Head::from_page(&wrong.to_page()[..]), None, "{wrong:?}");
        }
        assert!(Head::from_page(&Head { pages: blocks, ..head() }.to_page()[..]).is_some());
    }

    #[test]
    fn file_names_tell_their_checkpoint() {
        assert_eq!(number_of(&file_of(7)), Some(7));
        for other in ["7.checkpoint", "0000000007.index", "000000000x.checkpoint", "9999999999.checkpoint"] {
            assert_eq!(number_of(other), None, "{other}");
        }
    }

    /// The rows of a table in FORMAT.md: offset, bytes, field.
    pub(crate) fn documented(heading: &str) -> Vec<(usize, usize, String)> {
        let text = include_str!("../../FORMAT.md");
        let section = text.split(&format!("\n### {heading}\n")).nth(1).expect("the section exists");
        let section = section.split("\n#").next().unwrap_or(section);
        let rows =
            section.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit());
        rows.map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[1].parse().unwrap(), cells[2].parse().unwrap(), cells[4].to_owned())
        })
        .collect()
    }

    /// Compares a table with the places of fields, of a structure of `size` bytes.
    pub(crate) fn compare(heading: &str, fields: &[(usize, String)], size: usize) {
        let rows = documented(heading);
        let places: Vec<_> = rows.iter().map(|(offset, _, field)| (*offset, field.clone())).collect();
        assert_eq!(places, fields, "{heading}");
        let ends: Vec<_> = rows.iter().map(|(offset, bytes, _)| offset + bytes).collect();
        let starts: Vec<_> = rows.iter().skip(1).map(|row| row.0).chain([size]).collect();
        assert_eq!(ends, starts, "{heading}: no gaps");
    }

    #[test]
    fn the_written_format_is_the_code() {
        macro_rules! places {
            ($($field:ident),*) => {
                vec![$((std::mem::offset_of!(RawHead, $field), stringify!($field).to_owned())),*]
            };
        }
        let code = places!(
            magic,
            version,
            state,
            id,
            disk,
            group,
            generation,
            epoch,
            name_len,
            ended_len,
            capacity,
            block_bytes,
            created_ns,
            pages,
            name,
            ended,
            checksum
        );
        compare("Checkpoint head", &code, size_of::<RawHead>());
    }
}
