//! A rewind's file: the head, and the runs of grains that are to come back. FORMAT.md describes them.
//!
//! Invariant: bytes from disk become a [`Head`] and a [`Plan`] only after magic, version, checksums and
//! bounds were checked. The head lies within one sector, so no stop tears it.
//! Absent: when they are written, and what is believed of them; the parent and [`super::load`] own that.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::plan::{Plan, Run};
use crate::error::Error;
use crate::format::{GRAIN, NAME_BYTES, PAGE, body, checksum, padded, page_of, text};
use crate::index::Slot;
use crate::memory::{Source, Target};
use crate::storage::Storage;
use crate::store::Store;

const MAGIC: [u8; 8] = *b"EBBTRWD1";
const VERSION: u32 = 1;

/// The rewind's file.
pub(crate) const HEAD_FILE: &str = "rewind";
/// Which of its grains are back, in a mapping.
pub(crate) const DONE_FILE: &str = "rewind-done";
/// Which of them are back on the medium, too.
pub(crate) const SYNCED_FILE: &str = "rewind-synced";

/// Runs that are read or written together: 1 MiB.
const AT_ONCE: usize = (1 << 20) / RUN;

/// Where a rewind is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The superblock may name it or not.
    Prepared,
    /// The superblock names it.
    UnderWay,
    /// Everything is back, and on the medium.
    Finished,
}

/// What is known of a rewind without its runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) state: State,
    pub(crate) disk: [u8; 16],
    /// As the superblock names it.
    pub(crate) id: [u8; 16],
    /// Bytes of the disk.
    pub(crate) capacity: u64,
    /// The snapshot's name.
    pub(crate) name: String,
    pub(crate) runs: u64,
    /// Of the bytes of all runs.
    pub(crate) runs_checksum: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U32,
    state: U32,
    disk: [u8; 16],
    id: [u8; 16],
    capacity: U64,
    runs: U64,
    grain_bytes: U32,
    runs_checksum: U32,
    name_len: U32,
    name: [u8; NAME_BYTES],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHead>() == 208);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRun {
    grain: U64,
    count: U32,
    slot: U32,
}

const RUN: usize = size_of::<RawRun>();
const _: () = assert!(RUN == 16);

impl Head {
    /// As the first page of the file.
    ///
    /// # Panics
    /// If the name is longer than its field; it is a snapshot's.
    pub(crate) fn to_page(&self) -> Box<[u8; PAGE]> {
        let mut raw = RawHead {
            magic: MAGIC,
            version: U32::new(VERSION),
            state: U32::new(match self.state {
                State::Prepared => 1,
                State::UnderWay => 2,
                State::Finished => 3,
            }),
            disk: self.disk,
            id: self.id,
            capacity: U64::new(self.capacity),
            runs: U64::new(self.runs),
            grain_bytes: U32::new(u32::try_from(GRAIN).unwrap_or(0)),
            runs_checksum: U32::new(self.runs_checksum),
            name_len: U32::new(u32::try_from(self.name.len()).unwrap_or(0)),
            name: padded(&self.name),
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&MAGIC, body(&raw)]);
        page_of(&raw)
    }

    /// From the first page of the file; `None` if it is not a whole and valid head.
    fn from_page(page: &[u8]) -> Option<Self> {
        let (raw, _) = RawHead::read_from_prefix(page).ok()?;
        if raw.magic != MAGIC
            || raw.version.get() != VERSION
            || raw.grain_bytes.get() as usize != GRAIN
            || raw.checksum != checksum(&[&MAGIC, body(&raw)])
        {
            return None;
        }
        Some(Self {
            state: match raw.state.get() {
                1 => State::Prepared,
                2 => State::UnderWay,
                3 => State::Finished,
                _ => return None,
            },
            disk: raw.disk,
            id: raw.id,
            capacity: raw.capacity.get(),
            name: text(&raw.name, usize::try_from(raw.name_len.get()).ok()?)?,
            runs: raw.runs.get(),
            runs_checksum: raw.runs_checksum.get(),
        })
    }

    /// Writes the head, durably.
    pub(super) async fn write<S: Storage>(&self, io: &S, file: &S::File) -> Result<(), Error> {
        let page = self.to_page();
        let fail = || Error::io("writing the head of a rewind");
        io.write(file, 0, Source::of(&page[..])).await.map_err(fail())?;
        io.sync(file).await.map_err(fail())
    }

    /// Reads a head; `None` if it was never written whole.
    pub(super) async fn read<S: Storage>(io: &S, file: &S::File) -> Result<Option<Self>, Error> {
        let fail = || Error::io("reading the head of a rewind");
        if io.len(file).map_err(fail())? < PAGE as u64 {
            return Ok(None);
        }
        let mut page = [0; PAGE];
        io.read(file, 0, Target::of(&mut page)).await.map_err(fail())?;
        Self::of_page(&page)
    }

    /// The head in the first page of the file; `None` if it was never written.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is damaged.
    pub(crate) fn of_page(page: &[u8; PAGE]) -> Result<Option<Self>, Error> {
        match Self::from_page(page) {
            None if page.iter().all(|&byte| byte == 0) => Ok(None),
            None => Err(Error::Corrupt { what: "the head of a rewind", at: 0 }),
            found => Ok(found),
        }
    }
}

/// Writes the runs of `plan`; their checksum.
pub(super) async fn write_runs<S: Storage>(io: &S, file: &S::File, plan: &Plan) -> Result<u32, Error> {
    let mut at = PAGE as u64;
    let mut sum = 0;
    for part in plan.runs().chunks(AT_ONCE) {
        let raw: Vec<RawRun> = part.iter().map(RawRun::of).collect();
        let bytes = raw.as_bytes();
        io.write(file, at, Source::of(bytes)).await.map_err(Error::io("writing the runs of a rewind"))?;
        sum = crc32c::crc32c_append(sum, bytes);
        at += bytes.len() as u64;
    }
    Ok(sum)
}

/// Reads the runs that `head` tells of, whose slots are in `store`, or in an area of it that is lost: those
/// grains cannot be read.
pub(super) async fn read_runs<S: Storage>(
    io: &S,
    file: &S::File,
    head: &Head,
    store: &Store<S>,
) -> Result<Plan, Error> {
    let fail = || Error::io("reading the runs of a rewind");
    let check = |slot| match store.check(slot) {
        Err(Error::AreaLost { .. }) => Ok(()),
        checked => checked,
    };
    let mut runs = Runs::of(head, check, io.len(file).map_err(fail())?)?;
    let mut all = Vec::new();
    while let Some((at, len)) = runs.next() {
        let mut bytes = vec![0; len];
        io.read(file, at, Target::of(&mut bytes)).await.map_err(fail())?;
        runs.take(at, &bytes, |run| all.push(run))?;
    }
    runs.finish()?;
    Ok(Plan::of_runs(all))
}

/// The runs of a rewind as they are read from its file, part by part.
pub(crate) struct Runs<'a, C> {
    head: &'a Head,
    check: C,
    /// Runs that were taken.
    taken: u64,
    /// Grains of theirs.
    pub(crate) grains: u64,
    /// Where the last one ends.
    upto: u64,
    sum: u32,
}

impl<'a, C: Fn(u32) -> Result<(), Error>> Runs<'a, C> {
    /// Those that `head` tells of, in a file of `len` bytes; `check` refuses slots that cannot be.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the file ends before them.
    pub(crate) fn of(head: &'a Head, check: C, len: u64) -> Result<Self, Error> {
        let room = len.saturating_sub(PAGE as u64) / RUN as u64;
        if head.runs > room {
            return Err(Error::Corrupt { what: "the end of a rewind", at: PAGE as u64 + room * RUN as u64 });
        }
        Ok(Self { head, check, taken: 0, grains: 0, upto: 0, sum: 0 })
    }

    /// The byte and the length of the part that is to be taken next; `None` after the last.
    pub(crate) fn next(&self) -> Option<(u64, usize)> {
        let left = usize::try_from(self.head.runs - self.taken).unwrap_or(usize::MAX).min(AT_ONCE);
        (left > 0).then(|| (PAGE as u64 + self.taken * RUN as u64, left * RUN))
    }

    /// Takes the part at byte `at`, and calls `each` with its runs: the first grain, grains, the first slot.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if a run cannot be.
    pub(crate) fn take(
        &mut self,
        at: u64,
        bytes: &[u8],
        mut each: impl FnMut((u64, u32, Slot)),
    ) -> Result<(), Error> {
        let damaged = || Error::Corrupt { what: "a run of a rewind", at };
        let grains = self.head.capacity.div_ceil(GRAIN as u64);
        self.sum = crc32c::crc32c_append(self.sum, bytes);
        for raw in bytes.chunks_exact(RUN) {
            let raw = RawRun::read_from_bytes(raw).map_err(|_| damaged())?;
            let run = (raw.grain.get(), raw.count.get(), Slot::from_raw(raw.slot.get()));
            let end = run.0.checked_add(run.1.into()).filter(|&end| end <= grains);
            self.upto = end.filter(|_| run.0 >= self.upto && run.1 > 0).ok_or_else(damaged)?;
            if let Slot::At(slot) = run.2 {
                // A run is of one area.
                let last = slot.checked_add(run.1 - 1).ok_or_else(damaged)?;
                (self.check)(slot)?;
                (self.check)(last)?;
            }
            self.taken += 1;
            self.grains += u64::from(run.1);
            each(run);
        }
        Ok(())
    }

    /// Compares the checksum of them all.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is another.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        match self.sum == self.head.runs_checksum {
            true => Ok(()),
            false => Err(Error::Corrupt { what: "a run of a rewind", at: PAGE as u64 }),
        }
    }
}

impl RawRun {
    fn of(run: &Run) -> Self {
        Self { grain: U64::new(run.grain), count: U32::new(run.count), slot: U32::new(run.slot.to_raw()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            state: State::UnderWay,
            disk: [1; 16],
            id: [2; 16],
            capacity: 1 << 30,
            name: "monday".into(),
            runs: 3,
            runs_checksum: 7,
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

    /// The rows of a table in FORMAT.md: offset, bytes, field.
    fn documented(heading: &str) -> Vec<(usize, usize, String)> {
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

    #[test]
    fn the_written_format_is_the_code() {
        macro_rules! fields {
            ($type:ty: $($field:ident),*) => {
                vec![$((std::mem::offset_of!($type, $field), stringify!($field).to_owned())),*]
            };
        }
        let head = fields!(RawHead: magic, version, state, disk, id, capacity, runs, grain_bytes, runs_checksum, name_len, name, checksum);
        let run = fields!(RawRun: grain, count, slot);
        for (heading, size, fields) in [("Rewind head", size_of::<RawHead>(), head), ("Rewind run", RUN, run)]
        {
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
        let page = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/rewind-1.head")).unwrap();
        assert_eq!(Head::from_page(&page), Some(head()));
    }
}
