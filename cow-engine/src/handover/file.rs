//! The history file, byte for byte: a head, then chunks. FORMAT.md describes it for people.
//!
//! Invariant: every byte is covered by a checksum, or must be zero; the checksums of chunks are salted by the
//! file's own UUID and their places, so no chunk of another file, or of another place, passes. The head is
//! written last: a file without it is none.
//! Absent: what the history is for; [`super::give`] and [`super::take`] own that.

use cbt::{BlockGrid, Epoch, Generation};
use zerocopy::byteorder::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Error;
use crate::format::{self, PAGE, body, checksum, page_of, text};
use crate::memory::Source;
use crate::sample::Place;
use crate::storage::Storage;
use crate::tracker::Identity;

const MAGIC: [u8; 8] = *b"EBBTHST1";
const VERSION: u32 = 1;
/// Longest path of an image, in bytes; longer ones are kept by their end.
const PATH_BYTES: usize = 1024;

/// Bytes of a chunk's content at most.
pub(super) const CHUNK_BYTES: usize = 64 << 10;
/// From this many bytes on a chunk of the map is complete: one run more takes 25 bytes at most.
pub(super) const CHUNK_FULL: usize = CHUNK_BYTES - 64;

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Runs of blocks that changed in one epoch.
    Map,
    /// Places of the image and what they hold.
    Sample,
    // 3 is set aside for checkpoints.
}

impl Kind {
    fn to_raw(self) -> u32 {
        match self {
            Self::Map => 1,
            Self::Sample => 2,
        }
    }
}

/// The head: whose history it is, up to which instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// The file's own UUID.
    pub(super) export: [u8; 16],
    /// UUID of the state directory that it came from.
    pub(super) disk: [u8; 16],
    pub(super) generation: Generation,
    /// The epoch in which changes are marked next.
    pub(super) epoch: Epoch,
    pub(super) grid: BlockGrid,
    pub(super) capacity: u64,
    /// What told the image from others where it came from.
    pub(super) identity: Identity,
    pub(super) created_ns: u64,
    pub(super) chunks: u32,
    /// Bytes of all chunks.
    pub(super) body_bytes: u64,
    /// Blocks that have changed in the generation.
    pub(super) marked: u64,
    pub(super) path: String,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U32,
    chunks: U32,
    export: [u8; 16],
    disk: [u8; 16],
    generation: [u8; 16],
    epoch: U32,
    path_len: U32,
    block_bytes: U64,
    capacity: U64,
    device: U64,
    inode: U64,
    image_len: U64,
    mtime_ns: I64,
    created_ns: U64,
    body_bytes: U64,
    marked: U64,
    path: [u8; PATH_BYTES],
    checksum: U32,
}

const _: () = assert!(size_of::<RawHead>() == 1172);

/// Before a chunk's content.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChunk {
    kind: U32,
    len: U32,
    checksum: U32,
}

const CHUNK_HEAD: usize = size_of::<RawChunk>();
const _: () = assert!(CHUNK_HEAD == 12);

/// One place of a sample.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPlace {
    at: U64,
    len: U32,
    checksum: U32,
}

const PLACE: usize = size_of::<RawPlace>();
const _: () = assert!(PLACE == 16);
/// Places in a chunk at most.
pub(super) const CHUNK_PLACES: usize = CHUNK_BYTES / PLACE;

/// For errors: the file is not what it should be.
pub(super) fn bad(why: impl Into<String>) -> Error {
    Error::BadHistory { why: why.into() }
}

impl Head {
    fn to_page(&self) -> Box<[u8; PAGE]> {
        let path = format::tail(&self.path, PATH_BYTES);
        let mut raw = RawHead {
            magic: MAGIC,
            version: U32::new(VERSION),
            chunks: U32::new(self.chunks),
            export: self.export,
            disk: self.disk,
            generation: self.generation.to_bytes(),
            epoch: U32::new(self.epoch.get()),
            path_len: U32::new(u32::try_from(path.len()).unwrap_or(0)),
            block_bytes: U64::new(self.grid.bytes()),
            capacity: U64::new(self.capacity),
            device: U64::new(self.identity.device),
            inode: U64::new(self.identity.inode),
            image_len: U64::new(self.identity.len),
            mtime_ns: I64::new(self.identity.mtime_ns),
            created_ns: U64::new(self.created_ns),
            body_bytes: U64::new(self.body_bytes),
            marked: U64::new(self.marked),
            path: format::padded(path),
            checksum: U32::ZERO,
        };
        raw.checksum = checksum(&[&MAGIC, body(&raw)]);
        page_of(&raw)
    }

    /// From the file's first page.
    ///
    /// # Errors
    /// If it is no whole head of this version that makes sense.
    fn from_page(page: &[u8; PAGE]) -> Result<Self, Error> {
        let Ok((raw, rest)) = RawHead::read_from_prefix(page) else { return Err(bad("it has no head")) };
        if page.iter().all(|&byte| byte == 0) {
            return Err(bad("it was not finished: its head is missing"));
        }
        if raw.magic != MAGIC {
            return Err(bad("it is no history file"));
        }
        if raw.checksum != checksum(&[&MAGIC, body(&raw)]) || rest.iter().any(|&byte| byte != 0) {
            return Err(bad("its head is damaged"));
        }
        if raw.version.get() != VERSION {
            let version = raw.version.get();
            return Err(bad(format!("it has version {version}, and this program knows {VERSION}")));
        }
        let grid = BlockGrid::new(raw.block_bytes.get()).map_err(|error| bad(error.to_string()))?;
        let (epoch, capacity) = (Epoch::new(raw.epoch.get()), raw.capacity.get());
        if !(Epoch::FIRST..=Epoch::LAST).contains(&epoch)
            || !(1..=1 << 56).contains(&capacity)
            || raw.image_len.get() != capacity
            || raw.marked.get() > grid.count(capacity)
        {
            return Err(bad("its head makes no sense"));
        }
        let path = usize::try_from(raw.path_len.get()).ok().and_then(|len| text(&raw.path, len));
        Ok(Self {
            export: raw.export,
            disk: raw.disk,
            generation: Generation::from_bytes(raw.generation),
            epoch,
            grid,
            capacity,
            identity: Identity {
                device: raw.device.get(),
                inode: raw.inode.get(),
                len: raw.image_len.get(),
                mtime_ns: raw.mtime_ns.get(),
            },
            created_ns: raw.created_ns.get(),
            chunks: raw.chunks.get(),
            body_bytes: raw.body_bytes.get(),
            marked: raw.marked.get(),
            path: path.ok_or_else(|| bad("its head makes no sense"))?,
        })
    }
}

impl RawChunk {
    fn new(kind: u32, content: &[u8], export: &[u8; 16], place: u32) -> Self {
        let len = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let mut raw = Self { kind: U32::new(kind), len: U32::new(len), checksum: U32::ZERO };
        let place = U32::new(place);
        raw.checksum = checksum(&[b"history", export, place.as_bytes(), body(&raw), content]);
        raw
    }
}

/// Writes a history file: chunks first, the head at the end.
pub(super) struct Writer<'a, S: Storage> {
    io: &'a S,
    file: &'a S::File,
    export: [u8; 16],
    chunks: u32,
    at: u64,
}

impl<'a, S: Storage> Writer<'a, S> {
    /// Begins to write `file`, which is empty: there is room for its head, and none yet.
    pub(super) async fn begin(io: &'a S, file: &'a S::File, export: [u8; 16]) -> Result<Self, Error> {
        let (chunks, at) = (0, PAGE as u64);
        let writer = Self { io, file, export, chunks, at };
        writer.write(0, &[0; PAGE]).await?;
        Ok(writer)
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let written = self.io.write(self.file, at, Source::of(bytes)).await;
        written.map_err(Error::io("writing the history file"))
    }

    async fn flush(&self) -> Result<(), Error> {
        self.io.sync(self.file).await.map_err(Error::io("flushing the history file"))
    }

    /// Appends a chunk.
    pub(super) async fn chunk(&mut self, kind: Kind, content: &[u8]) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(CHUNK_HEAD + content.len());
        let head = RawChunk::new(kind.to_raw(), content, &self.export, self.chunks);
        bytes.extend_from_slice(head.as_bytes());
        bytes.extend_from_slice(content);
        self.write(self.at, &bytes).await?;
        self.at += bytes.len() as u64;
        self.chunks += 1;
        Ok(())
    }

    /// Appends places of the image, with the checksums of what they hold.
    pub(super) async fn sample(&mut self, places: &[(Place, u32)]) -> Result<(), Error> {
        for some in places.chunks(CHUNK_PLACES) {
            let raw = some.iter().map(|(place, sum)| RawPlace {
                at: U64::new(place.at),
                len: U32::new(place.len),
                checksum: U32::new(*sum),
            });
            let content: Vec<u8> = raw.flat_map(|raw| raw.as_bytes().to_vec()).collect();
            self.chunk(Kind::Sample, &content).await?;
        }
        Ok(())
    }

    /// All chunks are written: makes them durable. `head` learns how many there are.
    pub(super) async fn end(&self, head: &mut Head) -> Result<(), Error> {
        (head.export, head.chunks, head.body_bytes) = (self.export, self.chunks, self.at - PAGE as u64);
        self.flush().await
    }

    /// Makes it a history file, durably.
    pub(super) async fn seal(&self, head: &Head) -> Result<(), Error> {
        self.write(0, &head.to_page()[..]).await?;
        self.flush().await
    }
}

/// Reads a history file, of which nothing is trusted.
pub(super) struct Reader<'a, S: Storage> {
    io: &'a S,
    file: &'a S::File,
    pub(super) head: Head,
    next: u32,
    at: u64,
}

/// A chunk that was checked.
pub(super) enum Chunk {
    Map(Vec<u8>),
    Sample(Vec<(Place, u32)>),
}

impl<'a, S: Storage> Reader<'a, S> {
    /// Reads the head.
    ///
    /// # Errors
    /// [`Error::BadHistory`]; those of the file.
    pub(super) async fn begin(io: &'a S, file: &'a S::File) -> Result<Self, Error> {
        let len = io.len(file).map_err(Error::io("asking for the history file's length"))?;
        if len < PAGE as u64 {
            return Err(bad("it is too short to have a head"));
        }
        let mut page = Box::new([0; PAGE]);
        read(io, file, 0, &mut page[..]).await?;
        let head = Head::from_page(&page)?;
        match head.body_bytes.checked_add(PAGE as u64) {
            Some(end) if end == len => Ok(Self { io, file, head, next: 0, at: PAGE as u64 }),
            Some(end) if len < end => Err(bad(format!("it ends at byte {len} and should have {end}"))),
            _ => Err(bad(format!("it has {len} bytes, more than its head says"))),
        }
    }

    /// The next chunk; `None` after the last.
    ///
    /// # Errors
    /// As [`Reader::begin`].
    pub(super) async fn chunk(&mut self) -> Result<Option<Chunk>, Error> {
        let end = self.head.body_bytes + PAGE as u64;
        if self.next == self.head.chunks {
            return if self.at == end {
                Ok(None)
            } else {
                Err(bad("there is something after its last chunk"))
            };
        }
        let at = self.at;
        let damaged = || bad(format!("the chunk at byte {at} is damaged"));
        if end - at < CHUNK_HEAD as u64 {
            return Err(damaged());
        }
        let mut raw = [0; CHUNK_HEAD];
        read(self.io, self.file, at, &mut raw).await?;
        let raw = RawChunk::read_from_bytes(&raw).map_err(|_| damaged())?;
        let len = raw.len.get() as usize;
        if len > CHUNK_BYTES || end - at - (CHUNK_HEAD as u64) < len as u64 {
            return Err(damaged());
        }
        let mut content = vec![0; len];
        read(self.io, self.file, at + CHUNK_HEAD as u64, &mut content).await?;
        let expected = RawChunk::new(raw.kind.get(), &content, &self.head.export, self.next);
        if expected.checksum != raw.checksum {
            return Err(damaged());
        }
        self.at += (CHUNK_HEAD + len) as u64;
        self.next += 1;
        match raw.kind.get() {
            1 => Ok(Some(Chunk::Map(content))),
            2 => Ok(Some(Chunk::Sample(places(&content, self.head.capacity).ok_or_else(damaged)?))),
            kind => Err(bad(format!(
                "the chunk at byte {at} is of kind {kind}, which this program does not know"
            ))),
        }
    }
}

async fn read<S: Storage>(io: &S, file: &S::File, at: u64, into: &mut [u8]) -> Result<(), Error> {
    let read = io.read(file, at, crate::memory::Target::of(into)).await;
    read.map_err(Error::io("reading the history file"))
}

fn places(content: &[u8], capacity: u64) -> Option<Vec<(Place, u32)>> {
    let (raws, rest) = content.as_chunks::<PLACE>();
    if !rest.is_empty() {
        return None;
    }
    let place = |raw: &[u8; PLACE]| {
        let raw = RawPlace::read_from_bytes(raw).ok()?;
        let place = Place { at: raw.at.get(), len: raw.len.get() };
        let fits = place.at.checked_add(place.len.into()).is_some_and(|end| end <= capacity);
        (fits && place.len as usize <= CHUNK_BYTES).then_some((place, raw.checksum.get()))
    };
    raws.iter().map(place).collect()
}

/// Blocks one after the other whose last change was in one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    pub(super) epoch: Epoch,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// Makes the contents of map chunks from runs that come in order.
pub(super) struct Encoder {
    newest: Epoch,
    content: Vec<u8>,
    /// The end of the last run in `content`.
    after: u64,
}

impl Encoder {
    /// For a map whose newest epoch is `newest`.
    pub(super) fn new(newest: Epoch) -> Self {
        Self { newest, content: Vec::new(), after: 0 }
    }

    /// Takes in a run. A chunk that is full is answered.
    pub(super) fn push(&mut self, run: Run) -> Option<Vec<u8>> {
        put(&mut self.content, run.first - self.after);
        put(&mut self.content, run.count);
        put(&mut self.content, (self.newest.get() - run.epoch.get()).into());
        self.after = run.end();
        (self.content.len() >= CHUNK_FULL).then(|| self.take())
    }

    /// The last chunk, if there is something in it.
    pub(super) fn end(mut self) -> Option<Vec<u8>> {
        (!self.content.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> Vec<u8> {
        self.after = 0;
        std::mem::take(&mut self.content)
    }
}

/// Reads the contents of map chunks, one after the other.
pub(super) struct Decoder {
    newest: Epoch,
    blocks: u64,
    /// The end of the last run.
    after: u64,
    pub(super) marked: u64,
}

impl Decoder {
    /// For the map of a head.
    pub(super) fn new(head: &Head) -> Self {
        Self { newest: head.epoch, blocks: head.grid.count(head.capacity), after: 0, marked: 0 }
    }

    /// Gives each run of a chunk to `each`.
    ///
    /// # Errors
    /// If the content makes no sense.
    pub(super) fn chunk(&mut self, mut content: &[u8], mut each: impl FnMut(Run)) -> Result<(), Error> {
        let mut from = 0;
        while !content.is_empty() {
            let run = self.run(&mut content, from).ok_or_else(|| bad("a run of its map makes no sense"))?;
            from = run.end();
            (self.after, self.marked) = (from, self.marked + run.count);
            each(run);
        }
        Ok(())
    }

    fn run(&self, content: &mut &[u8], from: u64) -> Option<Run> {
        let first = from.checked_add(get(content)?)?;
        let count = get(content)?;
        let epoch = Epoch::new(self.newest.get().checked_sub(u32::try_from(get(content)?).ok()?)?);
        let end = first.checked_add(count)?;
        let makes_sense = count > 0 && first >= self.after && end <= self.blocks && epoch > Epoch::NEVER;
        makes_sense.then_some(Run { first, count, epoch })
    }
}

/// Appends a number: seven bits a byte, the lowest first, the highest bit set on all bytes but the last.
fn put(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let bits = number.to_le_bytes()[0] & 0x7f;
        number >>= 7;
        if number == 0 {
            return out.push(bits);
        }
        out.push(bits | 0x80);
    }
}

/// Takes such a number off the beginning; `None` if there is no whole one that fits.
fn get(content: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = content.split_first()?;
        *content = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            export: [1; 16],
            disk: [2; 16],
            generation: Generation::from_bytes([7; 16]),
            epoch: Epoch::new(9),
            grid: BlockGrid::new(65536).unwrap(),
            capacity: 1 << 30,
            identity: Identity { device: 1, inode: 2, len: 1 << 30, mtime_ns: -5 },
            created_ns: 3,
            chunks: 4,
            body_bytes: 5,
            marked: 6,
            path: "/vm/ä.img".into(),
        }
    }

    #[test]
    fn a_head_survives_its_page_and_no_flipped_bit_does() {
        let page = head().to_page();
        assert_eq!(Head::from_page(&page).unwrap(), head());
        for bit in 0..PAGE * 8 {
            let mut page = page.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Head::from_page(&page), Err(Error::BadHistory { .. })), "bit {bit}");
        }
        assert!(
            matches!(Head::from_page(&[0; PAGE]), Err(Error::BadHistory { why }) if why.contains("not finished"))
        );
    }

    #[test]
    fn numbers_survive_and_long_ones_are_refused() {
        for number in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            let mut rest = &bytes[..];
            assert_eq!((get(&mut rest), rest.len()), (Some(number), 0));
            assert_eq!(get(&mut &bytes[..bytes.len() - 1]), None);
        }
        assert_eq!(get(&mut &[0xff; 10][..]), None);
        assert_eq!(get(&mut &[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02][..]), None);
    }

    #[test]
    fn runs_survive_their_chunks_and_take_some_bytes_each() {
        let head = Head { capacity: 1 << 40, ..head() };
        let runs: Vec<_> = (0..40_000)
            .map(|n: u64| Run { first: n * 400, count: 1 + n % 300, epoch: Epoch::new(1 + (n % 9) as u32) })
            .collect();
        let mut encoder = Encoder::new(head.epoch);
        let mut chunks: Vec<_> = runs.iter().filter_map(|run| encoder.push(*run)).collect();
        chunks.extend(encoder.end());
        assert!(chunks.len() > 1 && chunks.iter().all(|chunk| chunk.len() <= CHUNK_BYTES));
        assert!(chunks.iter().map(Vec::len).sum::<usize>() < runs.len() * 6);
        let (mut decoder, mut found) = (Decoder::new(&head), Vec::new());
        for chunk in &chunks {
            decoder.chunk(chunk, |run| found.push(run)).unwrap();
        }
        assert_eq!(found, runs);
        assert_eq!(decoder.marked, runs.iter().map(|run| run.count).sum());
        // The same chunk again goes back.
        assert!(decoder.chunk(&chunks[0], |_| {}).is_err());
    }

    #[test]
    fn runs_that_make_no_sense_are_refused() {
        let content = |numbers: [u64; 3]| {
            let mut bytes = Vec::new();
            numbers.into_iter().for_each(|number| put(&mut bytes, number));
            bytes
        };
        let blocks = head().grid.count(head().capacity);
        assert!(Decoder::new(&head()).chunk(&content([blocks - 1, 1, 8]), |_| {}).is_ok());
        for wrong in
            [[0, 0, 0], [blocks, 1, 0], [u64::MAX, 2, 0], [0, u64::MAX, 0], [0, 1, 9], [0, 1, 1 << 40]]
        {
            assert!(Decoder::new(&head()).chunk(&content(wrong), |_| {}).is_err(), "{wrong:?}");
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
        let head = fields!(RawHead: magic, version, chunks, export, disk, generation, epoch, path_len, block_bytes,
            capacity, device, inode, image_len, mtime_ns, created_ns, body_bytes, marked, path, checksum);
        let chunk = fields!(RawChunk: kind, len, checksum);
        let place = fields!(RawPlace: at, len, checksum);
        for (heading, size, fields) in [
            ("History head", size_of::<RawHead>(), head),
            ("History chunk", CHUNK_HEAD, chunk),
            ("Sampled place", PLACE, place),
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
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/history-1.head");
        let page = std::fs::read(path).unwrap();
        assert_eq!(Head::from_page(page.as_slice().try_into().unwrap()).unwrap(), head());
    }
}
