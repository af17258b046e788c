//! An overlay's head on disk, and the names of its files. FORMAT.md describes them for people.
//!
//! Invariant: bytes from disk become a [`Head`] only after magic, version and checksum were checked.
//! Absent: when it is written, and what is believed of it; [`super::registry`] owns that.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::{GRAIN, NAME_BYTES, PAGE, body, checksum, padded, page_of, text};

const MAGIC: [u8; 8] = *b"EBBTOVL1";
const VERSION: u32 = 1;
const FLAG_KEEP: u32 = 1;
/// Longest note in bytes.
pub(crate) const NOTE_BYTES: usize = 1024;

/// What is known of an overlay without looking at its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Counts the overlays of a disk; names the files.
    pub(crate) number: u32,
    /// Everything is on the medium, and nothing was changed since.
    pub(crate) clean: bool,
    /// The snapshot's number.
    pub(crate) snapshot: u32,
    pub(crate) disk: [u8; 16],
    /// The snapshot's group: a number may come again, this does not.
    pub(crate) group: [u8; 16],
    /// The boot of the host during which it was written.
    pub(crate) boot: [u8; 16],
    /// Bytes of the disk at the snapshot's instant.
    pub(crate) capacity: u64,
    /// Whether it outlives the daemon.
    pub(crate) keep: bool,
    pub(crate) name: String,
    /// What its owner wants to be told again; the engine does not look at it.
    pub(crate) note: String,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U32,
    state: U32,
    number: U32,
    snapshot: U32,
    disk: [u8; 16],
    group: [u8; 16],
    boot: [u8; 16],
    capacity: U64,
    grain_bytes: U32,
    flags: U32,
    name_len: U16,
    note_len: U16,
    name: [u8; NAME_BYTES],
    note: [u8; NOTE_BYTES],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHead>() == 1248);

impl Head {
    /// As the one page of its file.
    ///
    /// # Panics
    /// If name or note are longer than their fields; they are checked where they enter.
    pub(crate) fn to_page(&self) -> Box<[u8; PAGE]> {
        let length = |text: &str| U16::new(u16::try_from(text.len()).unwrap_or(0));
        let mut raw = RawHead {
            magic: MAGIC,
            version: U32::new(VERSION),
            state: U32::new(if self.clean { 2 } else { 1 }),
            number: U32::new(self.number),
            snapshot: U32::new(self.snapshot),
            disk: self.disk,
            group: self.group,
            boot: self.boot,
            capacity: U64::new(self.capacity),
            grain_bytes: U32::new(u32::try_from(GRAIN).unwrap_or(0)),
            flags: U32::new(if self.keep { FLAG_KEEP } else { 0 }),
            name_len: length(&self.name),
            note_len: length(&self.note),
            name: padded(&self.name),
            note: padded(&self.note),
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&MAGIC, body(&raw)]);
        page_of(&raw)
    }

    /// From the page of its file; `None` if it is not a whole and valid head.
    pub(crate) fn from_page(page: &[u8]) -> Option<Self> {
        let (raw, _) = RawHead::read_from_prefix(page).ok()?;
        if raw.magic != MAGIC
            || raw.version.get() != VERSION
            || raw.grain_bytes.get() as usize != GRAIN
            || raw.checksum != checksum(&[&MAGIC, body(&raw)])
        {
            return None;
        }
        Some(Self {
            number: raw.number.get(),
            clean: match raw.state.get() {
                1 => false,
                2 => true,
                _ => return None,
            },
            snapshot: raw.snapshot.get(),
            disk: raw.disk,
            group: raw.group,
            boot: raw.boot,
            capacity: raw.capacity.get(),
            keep: raw.flags.get() & FLAG_KEEP != 0,
            name: text(&raw.name, raw.name_len.get().into())?,
            note: text(&raw.note, raw.note_len.get().into())?,
        })
    }
}

/// The file of an overlay's head.
pub(crate) fn head_file(number: u32) -> String {
    format!("{number:010}.overlay")
}

/// The file of an overlay's grains, each at its own place.
pub(crate) fn data_file(number: u32) -> String {
    format!("{number:010}.overlay-data")
}

/// The file of the cells that say which grains those are.
pub(crate) fn cells_file(number: u32) -> String {
    format!("{number:010}.overlay-cells")
}

/// The number of the overlay that a file of the state directory belongs to.
pub(crate) fn number_of(file: &str) -> Option<u32> {
    let (stem, kind) = file.split_once('.')?;
    let known = matches!(kind, "overlay" | "overlay-data" | "overlay-cells");
    let plain = stem.len() == 10 && stem.bytes().all(|b| b.is_ascii_digit());
    if known && plain { stem.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            number: 5,
            clean: false,
            snapshot: 3,
            disk: [1; 16],
            group: [2; 16],
            boot: [3; 16],
            capacity: 1 << 30,
            keep: true,
            name: "repair".into(),
            note: "/run/repair.sock".into(),
        }
    }

    #[test]
    fn a_head_survives_its_page() {
        let clean = Head { clean: true, keep: false, ..head() };
        assert_eq!(Head::from_page(&head().to_page()[..]), Some(head()));
        assert_eq!(Head::from_page(&clean.to_page()[..]), Some(clean));
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let page = head().to_page();
        for bit in 0..size_of::<RawHead>() * 8 {
            let mut page = page.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Head::from_page(&page[..]), None, "bit {bit}");
        }
    }

    #[test]
    fn file_names_tell_their_overlay() {
        for file in [head_file(7), data_file(7), cells_file(7)] {
            assert_eq!(number_of(&file), Some(7), "{file}");
            assert_eq!(crate::format::sequence_of(&file), None, "{file} is no snapshot's");
        }
        assert_eq!(number_of(&crate::format::index_file(7)), None);
        assert_eq!(number_of("7.overlay"), None);
    }

    /// The rows of the head's table in FORMAT.md: offset, bytes, field.
    fn documented() -> Vec<(usize, usize, String)> {
        let text = include_str!("../../FORMAT.md");
        let section = text.split("\n### Overlay head\n").nth(1).expect("the section exists");
        let section = section.split("\n#").next().unwrap_or(section);
        let rows =
            section.lines().filter(|line| line.starts_with("| ") && line.as_bytes()[2].is_ascii_digit());
        rows.map(|row| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (cells[1].parse().unwrap(), cells[2].parse().unwrap(), cells[4].to_owned())
        })
        .collect()
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
            number,
            snapshot,
            disk,
            group,
            boot,
            capacity,
            grain_bytes,
            flags,
            name_len,
            note_len,
            name,
            note,
            checksum
        );
        let rows = documented();
        let places: Vec<_> = rows.iter().map(|(offset, _, field)| (*offset, field.clone())).collect();
        assert_eq!(places, code);
        let ends: Vec<_> = rows.iter().map(|(offset, bytes, _)| offset + bytes).collect();
        let starts: Vec<_> = rows.iter().skip(1).map(|row| row.0).chain([size_of::<RawHead>()]).collect();
        assert_eq!(ends, starts, "no gaps");
    }

    #[test]
    fn an_image_of_the_format_reads_the_same_for_ever() {
        let page = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/overlay-1.head")).unwrap();
        assert_eq!(Head::from_page(&page), Some(head()));
    }
}
