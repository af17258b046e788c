//! The sample of a disk that is closed: checksums of some grains of its image, and of its change map.
//!
//! It is made once everything is flushed, durable before the superblock says *clean*, and removed once the
//! superblock says *serving*: so it is of the stop that the superblock tells of, or there is none.
//! Without one a closed disk is believed by its stamp alone.
//!
//! Price: a read of at most 129 places of the image, and of the map where it was ever marked, at each
//! start and each stop.

use std::io::ErrorKind;
use std::sync::atomic::Ordering::SeqCst;

use cbt::{CELLS_PER_PAGE, Cells, PAGE_BYTES};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::note;
use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::{self, MAP_FILE, PAGE, Superblock};
use crate::memory::{Source, Target};
use crate::open::{bytes_of, cells_of};
use crate::sample::{self as places, Place};
use crate::storage::Storage;
use crate::tracker::{CONTROL_PAGES, LOG_DOUBT, MAP_DOUBT, MAP_FAILURES};
use crate::walk;

/// The file's name.
pub(crate) const SAMPLE_FILE: &str = "sample";

const MAGIC: [u8; 8] = *b"EBBTSMP1";
const VERSION: u32 = 1;
/// Places of the image that are looked at.
const PLACES: u64 = 128;
const CHECKSUMS: usize = 128;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSample {
    magic: [u8; 8],
    version: U32,
    count: U32,
    disk: [u8; 16],
    generation: [u8; 16],
    seed: [u8; 16],
    capacity: U64,
    medium: U64,
    map_len: U64,
    map_checksum: U32,
    reserved: U32,
    unread: [u8; CHECKSUMS / 8],
    checksums: [U32; CHECKSUMS],
    padding: [u8; 3468],
    checksum: U32,
}

const _: () = assert!(size_of::<RawSample>() == PAGE);

/// What a daemon saw of an image and a map when it closed the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sample {
    disk: [u8; 16],
    generation: [u8; 16],
    /// Where the places are.
    seed: [u8; 16],
    pub(crate) capacity: u64,
    pub(crate) medium: u64,
    map: MapSum,
    /// `None` for a place that could not be read.
    checksums: Vec<Option<u32>>,
}

/// What was found of a sample.
pub(crate) enum Found {
    /// There is none of this stop.
    None,
    Damaged,
    Sample(Box<Sample>),
}

impl Sample {
    pub(crate) fn to_page(&self) -> Box<[u8; PAGE]> {
        let mut raw = RawSample {
            magic: MAGIC,
            version: U32::new(VERSION),
            count: U32::new(u32::try_from(self.checksums.len()).unwrap_or(0)),
            disk: self.disk,
            generation: self.generation,
            seed: self.seed,
            capacity: U64::new(self.capacity),
            medium: U64::new(self.medium),
            map_len: U64::new(self.map.len),
            map_checksum: U32::new(self.map.crc),
            reserved: U32::ZERO,
            unread: [0; CHECKSUMS / 8],
            checksums: [U32::ZERO; CHECKSUMS],
            padding: [0; 3468],
            checksum: U32::ZERO,
        };
        for (nth, one) in self.checksums.iter().enumerate() {
            match one {
                Some(checksum) => raw.checksums[nth] = U32::new(*checksum),
                None => raw.unread[nth / 8] |= 1 << (nth % 8),
            }
        }
        raw.checksum = format::checksum(&[&MAGIC, format::body(&raw)]);
        format::page_of(&raw)
    }

    pub(crate) fn from_page(page: &[u8; PAGE]) -> Option<Self> {
        let raw = RawSample::read_from_bytes(page).ok()?;
        let count = usize::try_from(raw.count.get()).ok()?;
        if raw.magic != MAGIC
            || raw.version.get() != VERSION
            || raw.checksum != format::checksum(&[&MAGIC, format::body(&raw)])
            || count > CHECKSUMS
        {
            return None;
        }
        let one = |nth: usize| {
            let unread = raw.unread[nth / 8] & 1 << (nth % 8) != 0;
            (!unread).then(|| raw.checksums[nth].get())
        };
        Some(Self {
            disk: raw.disk,
            generation: raw.generation,
            seed: raw.seed,
            capacity: raw.capacity.get(),
            medium: raw.medium.get(),
            map: MapSum { len: raw.map_len.get(), crc: raw.map_checksum.get() },
            checksums: (0..count).map(one).collect(),
        })
    }

    /// What the file's page says to who believes `found`.
    pub(crate) fn find(page: &[u8; PAGE], found: &Superblock) -> Found {
        match Self::from_page(page) {
            None => Found::Damaged,
            Some(sample) if sample.is_of(found) => Found::Sample(Box::new(sample)),
            Some(_) => Found::Damaged,
        }
    }

    fn is_of(&self, found: &Superblock) -> bool {
        self.disk == found.disk
            && self.generation == found.generation.to_bytes()
            && self.capacity == found.capacity
    }

    /// The places that could be read, and the checksums of what was there.
    pub(crate) fn places(&self) -> impl Iterator<Item = (Place, u32)> {
        let places = places::spread(&self.seed, self.capacity, PLACES);
        places.into_iter().zip(&self.checksums).filter_map(|(place, sum)| Some((place, (*sum)?)))
    }

    /// Bytes of the map that are summed up.
    pub(crate) fn map_len(&self) -> u64 {
        self.map.len
    }

    pub(crate) fn is_of_map(&self, sum: &MapSum) -> bool {
        self.map == *sum
    }
}

/// Bytes of a map and the checksum of their pages, of which those that are all zero may be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapSum {
    len: u64,
    crc: u32,
}

impl MapSum {
    pub(crate) fn new(len: u64) -> Self {
        Self { len, crc: 0 }
    }

    /// Takes in a page, in the order of their places in the file.
    pub(crate) fn add(&mut self, nth: u64, page: &[u8; PAGE_BYTES]) {
        if nth == 0 {
            let mut words = *page;
            for (at, word) in words.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                if is_passing(at) {
                    *word = [0; 4];
                }
            }
            return self.add_words(nth, &words);
        }
        self.add_words(nth, page);
    }

    fn add_words(&mut self, nth: u64, page: &[u8; PAGE_BYTES]) {
        if page.iter().any(|&byte| byte != 0) {
            self.crc = crc32c::crc32c_append(self.crc, &nth.to_le_bytes());
            self.crc = crc32c::crc32c_append(self.crc, page);
        }
    }
}

/// Whether a control word says nothing of a disk that is closed: of one boot, and noted without a flush.
fn is_passing(word: usize) -> bool {
    [LOG_DOUBT, MAP_DOUBT, MAP_FAILURES].contains(&word) || note::is_of_a_note(word)
}

/// Sums up the first `len` bytes of the map in `file`, through a mapping.
pub(crate) fn sum_of_map<S: Storage>(io: &S, file: &S::File, len: u64) -> Result<MapSum, Error> {
    let fail = || Error::io("reading the change map");
    let mut sum = MapSum::new(len);
    let pages = len / PAGE_BYTES as u64;
    if pages < CONTROL_PAGES {
        return Ok(sum);
    }
    let count = usize::try_from(pages).unwrap_or(0) * CELLS_PER_PAGE;
    let mapped = io.map(file, count).map_err(fail())?;
    let cells = mapped.cells();
    let mut bytes = [0; PAGE_BYTES];
    let mut add = |nth: u64| {
        let first = usize::try_from(nth).unwrap_or(0) * CELLS_PER_PAGE;
        let page = &cells[first..first + CELLS_PER_PAGE];
        for (out, cell) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(page) {
            *out = cell.load(SeqCst).to_le_bytes();
        }
        sum.add(nth, &bytes);
    };
    add(0);
    for stride in walk::strides(pages - CONTROL_PAGES) {
        for run in walk::touched(io, file, stride).map_err(fail())? {
            run.for_each(|page| add(page + CONTROL_PAGES));
        }
    }
    Ok(sum)
}

/// Reads the sample of a disk that is closed.
pub(crate) async fn load<S: Storage>(
    io: &S,
    dir: &S::Dir,
    names: &[String],
    found: &Superblock,
) -> Result<Found, Error> {
    if !names.iter().any(|name| name == SAMPLE_FILE) {
        return Ok(Found::None);
    }
    let fail = || Error::io("reading the sample");
    let file = io.open(dir, SAMPLE_FILE).map_err(fail())?;
    if io.len(&file).map_err(fail())? < PAGE as u64 {
        return Ok(Found::Damaged);
    }
    let mut page = [0; PAGE];
    io.read(&file, 0, Target::of(&mut page)).await.map_err(fail())?;
    Ok(Sample::find(&page, found))
}

/// Removes the sample, if there is one.
pub(crate) fn remove<S: Storage>(io: &S, dir: &S::Dir) -> Result<(), Error> {
    match io.remove(dir, SAMPLE_FILE) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(Error::io("removing the sample")),
    }
}

impl<S: Storage> Disk<S> {
    /// Makes the sample, durable but for its name. Nothing changes the disk any more, and all is flushed.
    ///
    /// # Errors
    /// If a sample that is not whole cannot be removed. Without one the disk is believed by its stamp.
    pub(crate) async fn write_sample(&self, io: &S) -> Result<(), Error> {
        remove(io, &self.dir)?;
        let Err(error) = self.try_write_sample(io).await else { return Ok(()) };
        log::warn!("{}: no sample of the image is kept: {}", self.name, with_sources(&error));
        remove(io, &self.dir)
    }

    async fn try_write_sample(&self, io: &S) -> Result<(), Error> {
        let seed = uuid::Uuid::new_v4().into_bytes();
        let capacity = self.capacity();
        let mut checksums = Vec::new();
        for place in places::spread(&seed, capacity, PLACES) {
            checksums.push(places::checksum(io, &self.image, place).await.ok());
        }
        let map = io.open(&self.dir, MAP_FILE).map_err(Error::io("opening the change map"))?;
        // What a resize that is not finished has added was not flushed. Once a flush has failed, what was stored may
        // pass for a hole.
        let len = match self.control.map_in_doubt(&self.boot()) {
            true => 0,
            // Of a map that is longer than the disk needs the rest is cut at the next opening, and so is not summed up.
            false => bytes_of(cells_of::<S::Cells>(self.block_grid(), capacity)),
        };
        let sample = Sample {
            disk: self.id,
            generation: self.history.generation().to_bytes(),
            seed,
            capacity,
            medium: self.meanwhile.medium,
            map: sum_of_map(io, &map, len)?,
            checksums,
        };
        let fail = || Error::io("writing the sample");
        let file = io.create(&self.dir, SAMPLE_FILE).map_err(fail())?;
        let page = sample.to_page();
        io.write(&file, 0, Source::of(&page[..])).await.map_err(fail())?;
        io.sync(&file).await.map_err(fail())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            disk: [1; 16],
            generation: [2; 16],
            seed: [3; 16],
            capacity: 64 << 20,
            medium: 4,
            map: MapSum { len: 8192, crc: 5 },
            checksums: (0..128).map(|nth| (nth % 5 != 0).then_some(nth)).collect(),
        }
    }

    #[test]
    fn a_sample_survives_its_page_and_a_flipped_bit_is_noticed() {
        let page = sample().to_page();
        assert_eq!(Sample::from_page(&page), Some(sample()));
        for at in 0..PAGE {
            let mut damaged = page.clone();
            damaged[at] ^= 1 << (at % 8);
            assert_eq!(Sample::from_page(&damaged), None, "byte {at}");
        }
    }

    #[test]
    fn what_could_not_be_read_is_not_compared() {
        let places: Vec<_> = sample().places().collect();
        assert_eq!(places.len(), 102);
        assert!(places.iter().all(|(place, sum)| sum % 5 != 0 && place.len == 4096));
    }

    #[test]
    fn a_map_is_summed_up_without_what_is_zero_or_passing() {
        let (mut control, mut page) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let sum = |pages: &[(u64, &[u8; PAGE_BYTES])]| {
            let mut sum = MapSum::new(3 * PAGE_BYTES as u64);
            pages.iter().for_each(|(nth, page)| sum.add(*nth, page));
            sum
        };
        let none = sum(&[]);
        assert_eq!(sum(&[(0, &control), (1, &page)]), none);
        control[4 * note::SLOTS[1]] = 1;
        control[4 * LOG_DOUBT] = 1;
        assert_eq!(sum(&[(0, &control)]), none);
        control[0] = 1;
        assert_ne!(sum(&[(0, &control)]), none);
        page[9] = 1;
        assert_ne!(sum(&[(1, &page)]), sum(&[(2, &page)]), "another place");
    }

    #[test]
    fn the_written_format_is_the_code() {
        macro_rules! places {
            ($($field:ident),*) => {
                vec![$((std::mem::offset_of!(RawSample, $field), stringify!($field).to_owned())),*]
            };
        }
        let code = places!(
            magic,
            version,
            count,
            disk,
            generation,
            seed,
            capacity,
            medium,
            map_len,
            map_checksum,
            reserved,
            unread,
            checksums,
            padding,
            checksum
        );
        crate::checkpoint::compare_format("Sample page", &code, size_of::<RawSample>());
    }
}
