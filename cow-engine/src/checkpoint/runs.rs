//! A frozen change map as runs: so many blocks, all last written in one epoch. FORMAT.md describes the pages.
//!
//! Runs are in pages of their own checksum, each of which tells its first block: who wants to begin anywhere
//! finds the page by halving, and what is read is checked before it is believed, without reading the rest.
//!
//! Invariant: bytes from disk become a [`Page`] only after checksum, counts and bounds were checked; together
//! the pages tell of each block of the disk once, in order.
//! Absent: files; the parent reads and writes them.

use std::ops::Range;

use cbt::{BlockGrid, ByteRange, Epoch, PAGE_BYTES};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::format::{PAGE, body, checksum};

/// Runs that a page has room for.
const RUNS: usize = 510;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRun {
    count: U32,
    epoch: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPage {
    first: U64,
    count: U32,
    runs: [RawRun; RUNS],
    checksum: U32,
}

const _: () = assert!(size_of::<RawPage>() == PAGE);

/// A page of runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// Its first block.
    pub(crate) first: u64,
    /// How many blocks, and the epoch of their last write; at least one run, none of them empty.
    pub(crate) runs: Vec<(u32, Epoch)>,
}

impl Page {
    /// From the bytes of page `number` of the checkpoint `id`, of a disk of `blocks`; `None` if they are not
    /// what was written.
    pub(crate) fn from_bytes(bytes: &[u8], id: &[u8; 16], number: u64, blocks: u64) -> Option<Self> {
        let (raw, _) = RawPage::read_from_prefix(bytes).ok()?;
        if raw.checksum != expected(&raw, id, number) {
            return None;
        }
        let count = usize::try_from(raw.count.get()).ok().filter(|count| (1..=RUNS).contains(count))?;
        let runs = raw.runs[..count].iter().map(|run| (run.count.get(), Epoch::new(run.epoch.get())));
        let page = Self { first: raw.first.get(), runs: runs.collect() };
        let filled = page.runs.iter().all(|(count, _)| *count > 0);
        // 510 counts of 32 bits do not overflow.
        let end = page.first.checked_add(page.blocks())?;
        (filled && end <= blocks).then_some(page)
    }

    fn blocks(&self) -> u64 {
        self.runs.iter().map(|(count, _)| u64::from(*count)).sum()
    }

    /// One past its last block.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.blocks()
    }
}

/// Salted by the checkpoint and the page's number, so that a page of another time or file does not pass.
fn expected(raw: &RawPage, id: &[u8; 16], number: u64) -> U32 {
    checksum(&[b"runs", id, U64::new(number).as_bytes(), body(raw)])
}

/// Makes pages of runs, block by block.
pub(crate) struct Encoder {
    id: [u8; 16],
    /// Pages that were made, whole ones.
    pages: u64,
    page: Page,
    /// The block after the last one of `page`.
    next: u64,
    open: (u64, Epoch),
    bytes: Vec<u8>,
}

impl Encoder {
    /// For the checkpoint `id`.
    pub(crate) fn new(id: [u8; 16]) -> Self {
        let page = Page { first: 0, runs: Vec::with_capacity(RUNS) };
        Self { id, pages: 0, page, next: 0, open: (0, Epoch::NEVER), bytes: Vec::new() }
    }

    /// Adds `count` blocks that were last written in `epoch`.
    pub(crate) fn push(&mut self, count: u64, epoch: Epoch) {
        if epoch == self.open.1 {
            self.open.0 += count;
        } else {
            self.close();
            self.open = (count, epoch);
        }
    }

    /// Adds the cells of a page of the map, the first `count` of them.
    pub(crate) fn push_cells(&mut self, cells: &[u8; PAGE_BYTES], count: usize) {
        let cells = &cells.as_chunks::<4>().0[..count];
        // Most pages of a large disk are alike throughout: a comparison with itself, moved by one, is fast.
        if let [first, rest @ ..] = cells
            && rest == &cells[..rest.len()]
        {
            return self.push(count as u64, Epoch::new(u32::from_le_bytes(*first)));
        }
        for cell in cells {
            self.push(1, Epoch::new(u32::from_le_bytes(*cell)));
        }
    }

    /// Bytes of whole pages that wait to be taken.
    pub(crate) fn ready(&self) -> usize {
        self.bytes.len()
    }

    /// The pages that are whole, and how many there were before them.
    pub(crate) fn take(&mut self) -> (u64, Vec<u8>) {
        let bytes = std::mem::take(&mut self.bytes);
        (self.pages - (bytes.len() / PAGE) as u64, bytes)
    }

    /// The end: makes the last page whole. How many there are together.
    pub(crate) fn finish(&mut self) -> u64 {
        self.close();
        if !self.page.runs.is_empty() {
            self.flush();
        }
        self.pages
    }

    fn close(&mut self) {
        let (mut count, epoch) = std::mem::replace(&mut self.open, (0, Epoch::NEVER));
        while count > 0 {
            let part = u32::try_from(count).unwrap_or(u32::MAX);
            if self.page.runs.len() == RUNS {
                self.flush();
            }
            self.page.runs.push((part, epoch));
            self.next += u64::from(part);
            count -= u64::from(part);
        }
    }

    fn flush(&mut self) {
        let none = RawRun { count: U32::ZERO, epoch: U32::ZERO };
        let mut raw = RawPage {
            first: U64::new(self.page.first),
            count: U32::new(u32::try_from(self.page.runs.len()).unwrap_or(0)),
            runs: [none; RUNS],
            checksum: U32::ZERO,
        };
        for (raw, (count, epoch)) in raw.runs.iter_mut().zip(&self.page.runs) {
            *raw = RawRun { count: U32::new(*count), epoch: U32::new(epoch.get()) };
        }
        raw.checksum = expected(&raw, &self.id, self.pages);
        self.bytes.extend_from_slice(raw.as_bytes());
        self.pages += 1;
        self.page = Page { first: self.next, runs: Vec::with_capacity(RUNS) };
    }
}

/// Collects what changed after an epoch within a range, from pages in order.
pub(crate) struct Collector {
    grid: BlockGrid,
    capacity: u64,
    since: Epoch,
    range: ByteRange,
    limit: usize,
    open: Option<Range<u64>>,
    found: Vec<ByteRange>,
}

impl Collector {
    /// At most `limit` ranges.
    pub(crate) fn new(grid: BlockGrid, capacity: u64, since: Epoch, range: ByteRange, limit: usize) -> Self {
        Self { grid, capacity, since, range, limit, open: None, found: Vec::new() }
    }

    /// Takes in a page, the one after the last. Whether more are wanted.
    pub(crate) fn take(&mut self, page: &Page) -> bool {
        let wanted = self.grid.covering(self.range);
        let mut at = page.first;
        for (count, epoch) in &page.runs {
            let run = at.max(wanted.start)..(at + u64::from(*count)).min(wanted.end);
            at += u64::from(*count);
            if run.is_empty() {
                continue;
            }
            match &mut self.open {
                Some(open) if *epoch > self.since => open.end = run.end,
                None if *epoch > self.since => self.open = Some(run),
                Some(_) => self.close(),
                None => {}
            }
            if self.found.len() >= self.limit {
                return false;
            }
        }
        at < wanted.end
    }

    /// What was found, in order and apart from each other.
    pub(crate) fn finish(mut self) -> Vec<ByteRange> {
        if self.found.len() < self.limit {
            self.close();
        }
        self.found
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        let part = self.grid.range(open, self.capacity).intersect(self.range);
        if !part.is_empty() {
            self.found.push(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: [u8; 16] = [4; 16];

    fn encode(runs: &[(u64, u32)]) -> Vec<u8> {
        let mut encoder = Encoder::new(ID);
        let mut bytes = Vec::new();
        for &(count, epoch) in runs {
            encoder.push(count, Epoch::new(epoch));
            let (before, part) = encoder.take();
            assert_eq!(before * PAGE as u64, bytes.len() as u64);
            bytes.extend(part);
        }
        let pages = encoder.finish();
        bytes.extend(encoder.take().1);
        assert_eq!(pages * PAGE as u64, bytes.len() as u64);
        bytes
    }

    fn decode(bytes: &[u8], blocks: u64) -> Vec<(u64, u32)> {
        let mut runs: Vec<(u64, u32)> = Vec::new();
        let mut next = 0;
        for (number, bytes) in (0..).zip(bytes.chunks(PAGE)) {
            let page = Page::from_bytes(bytes, &ID, number, blocks).expect("a whole page");
            assert_eq!(page.first, next);
            next = page.end();
            for (count, epoch) in page.runs {
                match runs.last_mut() {
                    Some(last) if last.1 == epoch.get() => last.0 += u64::from(count),
                    _ => runs.push((count.into(), epoch.get())),
                }
            }
        }
        assert_eq!(next, blocks);
        runs
    }

    #[test]
    fn runs_longer_than_a_count_are_whole_again() {
        let runs = [(5, 1), (3 << 32, 0), (1, 2)];
        let bytes = encode(&runs);
        assert_eq!(bytes.len(), PAGE);
        assert_eq!(decode(&bytes, 6 + (3 << 32)), runs);
    }

    #[test]
    fn a_page_holds_only_at_its_place_and_a_flipped_bit_is_noticed() {
        let bytes = encode(&[(5, 1), (7, 2)]);
        assert!(Page::from_bytes(&bytes, &ID, 0, 12).is_some());
        assert_eq!(Page::from_bytes(&bytes, &ID, 1, 12), None);
        assert_eq!(Page::from_bytes(&bytes, &[5; 16], 0, 12), None);
        assert_eq!(Page::from_bytes(&bytes, &ID, 0, 11), None, "past the disk's end");
        for bit in 0..PAGE * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Page::from_bytes(&bytes, &ID, 0, 12), None, "bit {bit}");
        }
    }

    #[test]
    fn counts_that_cannot_be_are_refused_though_the_checksum_is_right() {
        let make = |first: u64, count: u32, runs: &[(u32, u32)]| {
            let none = RawRun { count: U32::ZERO, epoch: U32::ZERO };
            let (first, count) = (U64::new(first), U32::new(count));
            let mut raw = RawPage { first, count, runs: [none; RUNS], checksum: U32::ZERO };
            for (raw, (count, epoch)) in raw.runs.iter_mut().zip(runs) {
                *raw = RawRun { count: U32::new(*count), epoch: U32::new(*epoch) };
            }
            raw.checksum = expected(&raw, &ID, 0);
            Page::from_bytes(raw.as_bytes(), &ID, 0, 100)
        };
        assert!(make(0, 1, &[(100, 1)]).is_some());
        assert_eq!(make(0, 0, &[]), None);
        assert_eq!(make(0, 511, &[(1, 1)]), None);
        assert_eq!(make(0, u32::MAX, &[(1, 1)]), None);
        assert_eq!(make(0, 2, &[(1, 1), (0, 2)]), None);
        assert_eq!(make(1, 1, &[(100, 1)]), None);
        assert_eq!(make(u64::MAX, 1, &[(100, 1)]), None);
    }

    #[test]
    fn the_written_format_is_the_code() {
        use super::super::head::tests::compare;
        macro_rules! fields {
            ($type:ty: $($field:ident),*) => {
                [$((std::mem::offset_of!($type, $field), stringify!($field).to_owned())),*]
            };
        }
        let page = fields!(RawPage: first, count, runs, checksum);
        compare("Page of runs", &page, PAGE);
        compare("Run", &fields!(RawRun: count, epoch), size_of::<RawRun>());
    }

    #[test]
    fn an_image_of_the_format_reads_the_same_for_ever() {
        let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/checkpoint-1")).unwrap();
        let head = super::super::head::Head::from_page(&file).expect("a head");
        assert_eq!(head, super::super::head::tests::head());
        let blocks = head.blocks();
        // As many runs as make the pages that the head tells of.
        let runs: Vec<_> = (0..1100).map(|n| (n % 3 + 1, u32::try_from(n % 7 + 1).unwrap())).collect();
        let rest = blocks - runs.iter().map(|run| run.0).sum::<u64>();
        let runs: Vec<_> = runs.into_iter().chain([(rest, 0)]).collect();
        assert_eq!(decode(&file[PAGE..], blocks), runs);
        let pages = encode(&runs);
        assert_eq!([&head.to_page()[..], &pages].concat(), file);
    }

    proptest! {
        #[test]
        fn what_is_collected_is_what_a_model_has(
            runs in prop::collection::vec((1u64..900, 0u32..4), 1..1500),
            since in 0u32..4,
            start in 0u64..1_000_000,
            len in 0u64..1_000_000,
            limit in 1usize..40,
            rest in 1u64..4096,
        ) {
            let grid = BlockGrid::new(4096).unwrap();
            let blocks: u64 = runs.iter().map(|run| run.0).sum();
            let capacity = (blocks - 1) * 4096 + rest;
            let start = start * 8 % (capacity + 1);
            let range = ByteRange::new(start, (start + len * 8).min(capacity));
            let bytes = encode(&runs);
            let mut collector = Collector::new(grid, capacity, Epoch::new(since), range, limit);
            for (number, bytes) in (0..).zip(bytes.chunks(PAGE)) {
                if !collector.take(&Page::from_bytes(bytes, &ID, number, blocks).unwrap()) {
                    break;
                }
            }
            let found = collector.finish();
            let mut model: Vec<ByteRange> = Vec::new();
            let mut block = 0;
            for (count, epoch) in runs {
                let part = grid.range(block..block + count, capacity).intersect(range);
                block += count;
                if epoch <= since || part.is_empty() {
                    continue;
                }
                match model.last_mut() {
                    Some(last) if last.end() == part.start() => *last = ByteRange::new(last.start(), part.end()),
                    _ => model.push(part),
                }
            }
            model.truncate(limit);
            prop_assert_eq!(found, model);
        }
    }
}
