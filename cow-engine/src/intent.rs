//! The intent log: in which regions of a disk marks may not be on their medium yet.
//!
//! Marks of the change map survive the process the moment they are made, and the host only once they were
//! written back. So the first change in a cold region waits until the log says, durably, that the region is
//! hot; after the host was stopped, everything in a hot region counts as changed.
//!
//! ```text
//! mark the blocks                  (in the mapped map)
//! is the region hot?               (yes: go on; nothing was waited for)
//! the region's bit, durably        (one write and one flush for all who wait, of all queues)
//! the region is hot, in memory     (others go on)
//! ```
//!
//! and back again, when nothing was changed in a region for a while:
//!
//! ```text
//! the region is cold, in memory    (who comes now waits for its bit)
//! the map, durably                 (with every mark that was made while the region was hot)
//! the region's bit is cleared
//! ```
//!
//! Crash argument. A change is submitted only after its writer marked, then saw the region hot. If that
//! look came before the region was made cold again, the mark came before it too, and so before the map
//! was made durable: whoever clears the bit has the mark on the medium. If it came after, the bit is still
//! set, or is set again before the change. The two looks are ordered by a fence on either side, the writer's in
//! [`crate::tracker::Tracker::mark`].
//!
//! A bit for each region lies in a sector with a checksum of its own, written in place: sectors are old or
//! new after a power cut, and either has every bit that anybody relied on. A sector that is neither makes all
//! its regions hot. So there are neither records to replay nor a limit of hot regions.
//!
//! A log grows before its disk does, in place: the sectors that it needs more, then its head, each durably. So
//! it may be a log of more than the disk has, never of less; see [`crate::resize`].
//!
//! Absent: who marks ([`crate::disk`]), and what a power cut means for everything else ([`crate::open`]).

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Poll, Waker};

use cbt::ByteRange;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Error;
use crate::format::{PAGE, checksum};
use crate::memory::{Source, Target};
use crate::storage::Storage;

/// The file's name.
pub(crate) const INTENT_FILE: &str = "intent";

const MAGIC: [u8; 8] = *b"EBBTINT1";
const VERSION: u32 = 1;

/// Bytes that are written wholly or not at all.
const SECTOR: usize = 512;
/// Words of bits in a sector.
const WORDS: usize = 63;
/// Regions that one sector tells of.
const PER_SECTOR: u64 = WORDS as u64 * 64;

/// Regions that become hot ahead of a stream at least. It is as many as the stream has come by,
const AHEAD: u64 = 8;
/// and this many regions, and bytes, at most.
const MOST_AHEAD: (u64, u64) = (512, 512 << 20);

/// Regions that become hot one by one between two looks, before it is aligned groups of them.
const ALONE: u64 = 32;
/// Regions, and bytes, of a group at most.
const TOGETHER: (u64, u64) = (64, 64 << 20);

/// A disk has at most about this many regions, while they are smaller than the largest.
const REGIONS: u64 = 1 << 16;

/// A log that says it has more is not believed, and none is made so.
const MOST_REGIONS: u64 = 1 << 24;

/// The first page of the file.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U32,
    checksum: U32,
    disk: [u8; 16],
    region_bytes: U64,
    capacity: U64,
}

/// A sector of bits; bit 0 of the first word is the lowest region.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSector {
    checksum: U32,
    reserved: U32,
    bits: [U64; WORDS],
}

const _: () = assert!(size_of::<RawSector>() == SECTOR);

/// What the file says, and who waits for it to say more.
#[derive(Debug, Default)]
struct Log {
    /// Bits of the file, as they were or are being written.
    recorded: Vec<u64>,
    /// Regions that someone waits for.
    requested: BTreeSet<u64>,
    waiting: Vec<Waker>,
    /// Someone writes the file.
    busy: bool,
}

/// Bits of regions in memory; others follow once the disk has grown.
struct Bits {
    /// A bit for each region whose bit is durably in the file.
    hot: Box<[AtomicU64]>,
    /// A bit for each region in which something changed since the last look.
    used: Box<[AtomicU64]>,
    more: OnceLock<Box<Bits>>,
}

impl Bits {
    fn new(words: usize) -> Self {
        let bits = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { hot: bits(), used: bits(), more: OnceLock::new() }
    }
}

/// See the module.
///
/// Price: two bits of memory a region; two loads for a change in a hot region; a write and
/// a flush of the state's disk, shared by all who wait, before the first change in a cold one.
pub(crate) struct Intent<S: Storage> {
    file: S::File,
    disk: [u8; 16],
    /// Of the disk, or of what it is about to become.
    capacity: AtomicU64,
    /// Bytes of a region, as a power of two.
    shift: u32,
    bits: Bits,
    /// Regions that someone waited for since [`Intent::cool`] was called last.
    asked: AtomicU64,
    log: Mutex<Log>,
    /// The file could not be written: nobody waits for it any more.
    failed: AtomicBool,
}

/// The right to write the file; passes on when dropped.
struct Turn<'a, S: Storage> {
    intent: &'a Intent<S>,
}

impl<S: Storage> Drop for Turn<'_, S> {
    fn drop(&mut self) {
        let mut log = self.intent.log();
        log.busy = false;
        log.waiting.drain(..).for_each(Waker::wake);
    }
}

/// Bytes of a region of a disk of `capacity` bytes, unless said otherwise: a power of two from 1 to 64 MiB.
pub(crate) fn region_bytes(capacity: u64) -> u64 {
    (capacity / REGIONS).next_power_of_two().clamp(1 << 20, 64 << 20)
}

impl<S: Storage> Intent<S> {
    /// Makes the log of a disk durably, with every region cold.
    pub(crate) async fn create(
        io: &S,
        file: S::File,
        disk: [u8; 16],
        capacity: u64,
        region: u64,
    ) -> Result<Self, Error> {
        let intent = Self::new(file, disk, capacity, region);
        intent.extend(io, 0, capacity).await?;
        Ok(intent)
    }

    /// Makes the log durably one of a disk of `capacity` bytes, with cold regions where it is longer. One that
    /// is as long already stays so. Cannot be cut off so that a region is lost; one caller at a time.
    ///
    /// # Errors
    /// [`Error::LogTooLong`] if there would be too many regions; those of the file. The log is as it was.
    pub(crate) async fn grow(&self, io: &S, capacity: u64) -> Result<(), Error> {
        let now = self.capacity();
        if capacity <= now {
            return Ok(());
        }
        if capacity >> self.shift > MOST_REGIONS {
            return Err(Error::LogTooLong { region: 1 << self.shift });
        }
        let sectors = self.sectors_for(capacity);
        self.make_room(index(sectors) * WORDS);
        // Were this flush to fail beside one that makes regions hot, that one would succeed over what was lost.
        let _turn = self.turn().await;
        self.extend(io, self.sectors_for(now), capacity).await?;
        self.capacity.store(capacity, Release);
        Ok(())
    }

    /// Writes the sectors from `first` on and the head of a log of `capacity` bytes.
    async fn extend(&self, io: &S, first: u64, capacity: u64) -> Result<(), Error> {
        let sectors = self.sectors_for(capacity);
        let fail = || Error::io("making the intent log");
        if first < sectors {
            io.allocate(&self.file, place_of(sectors)).map_err(fail())?;
            let bytes = self.render(first..sectors);
            io.write(&self.file, place_of(first), Source::of(&bytes)).await.map_err(fail())?;
            io.sync(&self.file).await.map_err(fail())?;
        }
        // Last: a file with a head is whole.
        let head = self.head(capacity);
        io.write(&self.file, 0, Source::of(&head[..])).await.map_err(fail())?;
        io.sync(&self.file).await.map_err(fail())
    }

    /// Makes room for so many words of bits in memory.
    fn make_room(&self, words: usize) {
        let mut log = self.log();
        if log.recorded.len() < words {
            log.recorded.resize(words, 0);
        }
        let (mut last, mut have) = (&self.bits, self.bits.hot.len());
        while let Some(more) = last.more.get() {
            have += more.hot.len();
            last = more;
        }
        if have < words {
            // Twice as many at least, so that there are few parts.
            last.more.get_or_init(|| Box::new(Bits::new(words.max(2 * have) - have)));
        }
    }

    /// Reads a log back; `None` if it is not that of this disk, or of less than it has, or damaged at its head.
    ///
    /// What the file says is hot then is; a sector that is damaged makes all its regions hot.
    pub(crate) async fn load(
        io: &S,
        file: S::File,
        disk: [u8; 16],
        capacity: u64,
    ) -> Result<Option<Self>, Error> {
        let fail = || Error::io("reading the intent log");
        let len = io.len(&file).map_err(fail())?;
        if len < PAGE as u64 {
            return Ok(None);
        }
        let mut page = [0; PAGE];
        io.read(&file, 0, Target::of(&mut page)).await.map_err(fail())?;
        let Some((capacity, region)) = is_whole(&page, len, &disk, capacity) else { return Ok(None) };
        let sectors = sectors_of(capacity, region);
        let intent = Self::new(file, disk, capacity, region);
        // A hole would need space later.
        io.allocate(&intent.file, len).map_err(fail())?;
        for sector in 0..sectors {
            let mut bytes = [0; SECTOR];
            io.read(&intent.file, place_of(sector), Target::of(&mut bytes)).await.map_err(fail())?;
            intent.take_in(sector, &bytes);
        }
        // A process that was killed may have written bits and not flushed them, and another have failed to:
        // written anew, a flush has them for certain.
        let bytes = intent.render(0..sectors);
        io.write(&intent.file, PAGE as u64, Source::of(&bytes)).await.map_err(fail())?;
        io.sync(&intent.file).await.map_err(fail())?;
        Ok(Some(intent))
    }

    fn new(file: S::File, disk: [u8; 16], capacity: u64, region: u64) -> Self {
        let regions = capacity.div_ceil(region);
        let words = usize::try_from(regions.div_ceil(PER_SECTOR)).unwrap_or(usize::MAX).saturating_mul(WORDS);
        let log = Log { recorded: vec![0; words], ..Log::default() };
        Self {
            file,
            disk,
            capacity: AtomicU64::new(capacity),
            shift: region.trailing_zeros(),
            bits: Bits::new(words),
            asked: AtomicU64::new(0),
            log: Mutex::new(log),
            failed: AtomicBool::new(false),
        }
    }

    fn capacity(&self) -> u64 {
        self.capacity.load(Acquire)
    }

    fn sectors_for(&self, capacity: u64) -> u64 {
        capacity.div_ceil(1 << self.shift).div_ceil(PER_SECTOR)
    }

    /// The words of hot and of used regions that `region` is in.
    fn words(&self, region: u64) -> (&AtomicU64, &AtomicU64) {
        self.word(index(region / 64))
    }

    fn word(&self, word: usize) -> (&AtomicU64, &AtomicU64) {
        let (mut part, mut at) = (&self.bits, word);
        while at >= part.hot.len()
            && let Some(more) = part.more.get()
        {
            at -= part.hot.len();
            part = more;
        }
        (&part.hot[at], &part.used[at])
    }

    /// Takes in a sector of the file.
    fn take_in(&self, sector: u64, bytes: &[u8; SECTOR]) {
        let Ok(raw) = RawSector::read_from_bytes(bytes) else { unreachable!("a sector is a sector long") };
        let whole = raw.checksum == self.salted(sector, &raw);
        if !whole {
            log::warn!("sector {sector} of the intent log is damaged: all its regions count as changed");
        }
        let first = index(sector) * WORDS;
        let mut log = self.log();
        for (word, bits) in (first..).zip(raw.bits) {
            let bits = if whole { bits.get() } else { u64::MAX };
            self.word(word).0.store(bits, Relaxed);
            log.recorded[word] = bits;
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn regions(&self, range: ByteRange) -> Range<u64> {
        (range.start() >> self.shift)..((range.end() - 1) >> self.shift) + 1
    }

    fn is_hot(&self, region: u64) -> bool {
        self.words(region).0.load(Acquire) & bit(region) != 0
    }

    /// Whether what was just marked in `range`, which is not empty, may be changed. Otherwise
    /// [`Intent::cover`] it first.
    ///
    /// To be asked after marking, which orders the marks before this look.
    pub(crate) fn covers(&self, range: ByteRange) -> bool {
        if self.failed.load(Relaxed) {
            return true;
        }
        self.regions(range).all(|region| {
            let (hot, used) = self.words(region);
            let hot = hot.load(Acquire) & bit(region) != 0;
            if hot && used.load(Relaxed) & bit(region) == 0 {
                used.fetch_or(bit(region), Relaxed);
            }
            hot
        })
    }

    /// Waits until every region of `range` is hot, with others who wait.
    ///
    /// # Errors
    /// Those of the file. The regions are as cold as before.
    pub(crate) async fn cover(&self, io: &S, range: ByteRange) -> Result<(), Error> {
        loop {
            let turn = poll_fn(|cx| {
                let mut log = self.log();
                // Under the lock, which whoever makes regions hot or cold takes before it passes on its turn.
                if self.covers(range) {
                    return Poll::Ready(None);
                }
                log.requested.extend(self.regions(range).filter(|region| !self.is_hot(*region)));
                if log.busy {
                    log.waiting.push(cx.waker().clone());
                    return Poll::Pending;
                }
                log.busy = true;
                Poll::Ready(Some((Turn { intent: self }, std::mem::take(&mut log.requested))))
            })
            .await;
            match turn {
                None => return Ok(()),
                Some((_turn, regions)) => self.heat(io, self.with_ahead(regions)).await?,
            }
        }
    }

    /// `regions`, and those that a stream will come to next: the longer it is, the more of them. In a burst of
    /// scattered changes also what lies about them, so that it is over after few commits.
    fn with_ahead(&self, mut regions: BTreeSet<u64>) -> BTreeSet<u64> {
        let count = self.capacity().div_ceil(1 << self.shift);
        let mut more = Vec::new();
        if self.asked.fetch_add(regions.len() as u64, Relaxed) >= ALONE {
            let group = (TOGETHER.1 >> self.shift).clamp(1, TOGETHER.0);
            more.extend(regions.iter().flat_map(|region| {
                let first = region / group * group;
                first..first + group
            }));
        }
        let most = (MOST_AHEAD.1 >> self.shift).clamp(AHEAD, MOST_AHEAD.0);
        for &region in &regions {
            let behind = (region.saturating_sub(most)..region).rev();
            let behind = behind.take_while(|before| self.is_hot(*before)).count() as u64;
            if behind > 0 {
                more.extend(region + 1..region + 1 + behind.max(AHEAD));
            }
        }
        regions.extend(more.into_iter().filter(|next| *next < count && !self.is_hot(*next)));
        regions
    }

    /// The bits, durably; then the regions are hot. In the caller's turn.
    async fn heat(&self, io: &S, regions: BTreeSet<u64>) -> Result<(), Error> {
        {
            let mut log = self.log();
            for &region in &regions {
                log.recorded[index(region / 64)] |= bit(region);
            }
        }
        // Also if their bits were set before: that may have been written and not flushed.
        self.write(io, &regions).await?;
        io.sync(&self.file).await.map_err(Error::io("flushing the intent log"))?;
        for region in regions {
            let (hot, used) = self.words(region);
            used.fetch_or(bit(region), Relaxed);
            hot.fetch_or(bit(region), AcqRel);
        }
        Ok(())
    }

    /// Waits until nobody else writes the file.
    async fn turn(&self) -> Turn<'_, S> {
        poll_fn(|cx| {
            let mut log = self.log();
            if log.busy {
                log.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            log.busy = true;
            Poll::Ready(Turn { intent: self })
        })
        .await
    }

    /// Makes regions cold in which nothing changed since it was called last. `sync_map` makes the change map
    /// durable.
    ///
    /// # Errors
    /// Those of the map and of the file. Regions that are cold in memory and hot in the file do no harm.
    pub(crate) async fn cool(
        &self,
        io: &S,
        sync_map: impl AsyncFnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.asked.store(0, Relaxed);
        let mut cooled = BTreeSet::new();
        for word in 0..index(self.sectors_for(self.capacity())) * WORDS {
            let (hot, used) = self.word(word);
            let idle = hot.load(Relaxed) & !used.swap(0, Relaxed);
            if idle != 0 {
                hot.fetch_and(!idle, AcqRel);
                cooled.extend((0..64).filter(|at| idle >> at & 1 == 1).map(|at| word as u64 * 64 + at));
            }
        }
        if cooled.is_empty() {
            return Ok(());
        }
        // Whoever saw a region hot before this has marked before that: its mark is made durable now.
        fence(SeqCst);
        sync_map().await?;
        let _turn = self.turn().await;
        // Some were made hot again meanwhile.
        cooled.retain(|region| !self.is_hot(*region));
        {
            let mut log = self.log();
            for &region in &cooled {
                log.recorded[index(region / 64)] &= !bit(region);
            }
        }
        self.write(io, &cooled).await
    }

    /// Writes the sectors of `regions` as they are recorded.
    async fn write(&self, io: &S, regions: &BTreeSet<u64>) -> Result<(), Error> {
        let sectors: BTreeSet<u64> = regions.iter().map(|region| region / PER_SECTOR).collect();
        for sector in sectors {
            let bytes = self.render(sector..sector + 1);
            io.write(&self.file, place_of(sector), Source::of(&bytes))
                .await
                .map_err(Error::io("writing to the intent log"))?;
        }
        Ok(())
    }

    /// The sectors' bytes.
    fn render(&self, sectors: Range<u64>) -> Vec<u8> {
        let log = self.log();
        let mut bytes = Vec::new();
        for sector in sectors {
            let first = index(sector) * WORDS;
            let mut raw = RawSector { checksum: U32::ZERO, reserved: U32::ZERO, bits: [U64::ZERO; WORDS] };
            for (bits, word) in raw.bits.iter_mut().zip(&log.recorded[first..]) {
                bits.set(*word);
            }
            raw.checksum = self.salted(sector, &raw);
            bytes.extend_from_slice(raw.as_bytes());
        }
        bytes
    }

    fn salted(&self, sector: u64, raw: &RawSector) -> U32 {
        let place = U64::new(sector);
        checksum(&[b"intent", &self.disk, place.as_bytes(), raw.reserved.as_bytes(), raw.bits.as_bytes()])
    }

    /// Gives up the log: from now on nobody waits for it, and after a stop of the host it must not be
    /// believed. Answers whether it was given up before.
    pub(crate) fn give_up(&self) -> bool {
        self.failed.swap(true, SeqCst)
    }

    /// Makes all regions cold. Nothing is changed any more, and the map is durable.
    pub(crate) async fn clear(&self, io: &S) -> Result<(), Error> {
        let sectors = self.sectors_for(self.capacity());
        for word in 0..index(sectors) * WORDS {
            self.word(word).0.store(0, Relaxed);
        }
        self.log().recorded.fill(0);
        let bytes = self.render(0..sectors);
        io.write(&self.file, PAGE as u64, Source::of(&bytes))
            .await
            .map_err(Error::io("writing to the intent log"))
    }

    /// Bytes of a region.
    pub(crate) fn region_bytes(&self) -> u64 {
        1 << self.shift
    }

    /// The ranges of the first `capacity` bytes that are hot, ascending.
    pub(crate) fn hot_ranges(&self, capacity: u64) -> Vec<ByteRange> {
        let count = capacity.div_ceil(1 << self.shift);
        let mut ranges: Vec<ByteRange> = Vec::new();
        for region in (0..count).filter(|region| self.is_hot(*region)) {
            let (start, end) = (region << self.shift, ((region + 1) << self.shift).min(capacity));
            match ranges.last_mut() {
                Some(last) if last.end() == start => *last = ByteRange::new(last.start(), end),
                _ => ranges.push(ByteRange::new(start, end)),
            }
        }
        ranges
    }

    fn head(&self, capacity: u64) -> Box<[u8; PAGE]> {
        let mut raw = RawHead {
            magic: MAGIC,
            version: U32::new(VERSION),
            checksum: U32::ZERO,
            disk: self.disk,
            region_bytes: U64::new(1 << self.shift),
            capacity: U64::new(capacity),
        };
        raw.checksum = checksum(&[raw.as_bytes()]);
        crate::format::page_of(&raw)
    }
}

/// Bytes that the log is of and bytes of a region, if the head is that of this disk and of `capacity` bytes or
/// more.
fn check_head(page: &[u8], disk: &[u8; 16], capacity: u64) -> Option<(u64, u64)> {
    let (raw, _) = RawHead::read_from_prefix(page).ok()?;
    let (covered, region) = (raw.capacity.get(), raw.region_bytes.get());
    let blank = RawHead { checksum: U32::ZERO, ..raw };
    let valid = raw.magic == MAGIC
        && raw.version.get() == VERSION
        && raw.checksum == checksum(&[blank.as_bytes()])
        && raw.disk == *disk
        && covered >= capacity
        && region.is_power_of_two()
        && covered >> region.trailing_zeros() <= MOST_REGIONS;
    valid.then_some((covered, region))
}

/// As [`check_head`], if a file of `len` bytes that begins with `page` has all its sectors.
pub(crate) fn is_whole(page: &[u8], len: u64, disk: &[u8; 16], capacity: u64) -> Option<(u64, u64)> {
    check_head(page, disk, capacity).filter(|&(covered, region)| len >= place_of(sectors_of(covered, region)))
}

fn sectors_of(capacity: u64, region: u64) -> u64 {
    capacity.div_ceil(region).div_ceil(PER_SECTOR)
}

fn place_of(sector: u64) -> u64 {
    PAGE as u64 + sector * SECTOR as u64
}

fn bit(region: u64) -> u64 {
    1 << (region % 64)
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Executor, HostDir, HostStorage};

    const DISK: [u8; 16] = [7; 16];
    const REGION: u64 = 1 << 20;
    /// Ends within a region.
    const CAPACITY: u64 = 5000 * REGION + 512;

    struct Rig {
        executor: Executor,
        folder: tempfile::TempDir,
    }

    impl Rig {
        fn new() -> Self {
            Self { executor: Executor::new(16).unwrap(), folder: tempfile::tempdir().unwrap() }
        }

        fn dir(&self) -> HostDir {
            HostDir::new(self.folder.path().into())
        }

        fn create(&self) -> Intent<HostStorage> {
            let io = self.executor.storage();
            let file = io.create(&self.dir(), INTENT_FILE).unwrap();
            self.executor.block_on(Intent::create(&io, file, DISK, CAPACITY, REGION)).unwrap()
        }

        fn load(&self, disk: [u8; 16], capacity: u64) -> Option<Intent<HostStorage>> {
            let io = self.executor.storage();
            let file = io.open(&self.dir(), INTENT_FILE).unwrap();
            self.executor.block_on(Intent::load(&io, file, disk, capacity)).unwrap()
        }

        fn cover(&self, intent: &Intent<HostStorage>, start: u64, end: u64) {
            let range = ByteRange::new(start, end);
            self.executor.block_on(intent.cover(&self.executor.storage(), range)).unwrap();
        }

        fn cool(&self, intent: &Intent<HostStorage>) {
            let io = self.executor.storage();
            self.executor.block_on(intent.cool(&io, async || Ok(()))).unwrap();
        }
    }

    fn regions(intent: &Intent<HostStorage>) -> Vec<(u64, u64)> {
        let ranges = intent.hot_ranges(CAPACITY);
        ranges.iter().map(|range| (range.start() / REGION, range.end().div_ceil(REGION))).collect()
    }

    #[test]
    fn what_was_covered_is_hot_after_a_stop() {
        let rig = Rig::new();
        let intent = rig.create();
        assert!(!intent.covers(ByteRange::new(5, 6)));
        rig.cover(&intent, 3 * REGION - 1, 3 * REGION + 1);
        rig.cover(&intent, CAPACITY - 1, CAPACITY);
        assert!(intent.covers(ByteRange::new(3 * REGION, 3 * REGION + 512)));
        assert_eq!(regions(&intent), [(2, 4), (5000, 5001)]);
        drop(intent);
        assert_eq!(regions(&rig.load(DISK, CAPACITY).unwrap()), [(2, 4), (5000, 5001)]);
        assert!(rig.load([8; 16], CAPACITY).is_none(), "another disk's");
        assert!(rig.load(DISK, CAPACITY + 512).is_none(), "of a smaller disk");
    }

    #[test]
    fn a_log_grows_before_its_disk_and_forgets_nothing() {
        let rig = Rig::new();
        let intent = rig.create();
        rig.cover(&intent, CAPACITY - 1, CAPACITY);
        let mut capacity = CAPACITY;
        for size in [CAPACITY + 512, 9000 * REGION, 9001 * REGION, 100_000 * REGION] {
            rig.executor.block_on(intent.grow(&rig.executor.storage(), size)).unwrap();
            rig.cover(&intent, size - 1, size);
            let loaded = rig.load(DISK, capacity).expect("a log of more than the disk has");
            assert!(loaded.hot_ranges(capacity).iter().all(|range| range.end() <= capacity));
            capacity = size;
            let loaded = rig.load(DISK, capacity).unwrap();
            assert_eq!(loaded.hot_ranges(capacity), intent.hot_ranges(capacity));
            assert!(loaded.covers(ByteRange::new(capacity - 1, capacity)));
            assert!(loaded.covers(ByteRange::new(CAPACITY - 1, CAPACITY)));
        }
        assert!(!intent.covers(ByteRange::new(50_000 * REGION, 50_000 * REGION + 1)));
        rig.cool(&intent);
        rig.cool(&intent);
        assert_eq!(intent.hot_ranges(capacity), []);
        let most = (MOST_REGIONS + 1) * REGION;
        let refused = rig.executor.block_on(intent.grow(&rig.executor.storage(), most));
        assert!(matches!(refused, Err(Error::LogTooLong { .. })));
    }

    #[test]
    fn a_stream_is_run_ahead_of() {
        let rig = Rig::new();
        let intent = rig.create();
        rig.cover(&intent, 10 * REGION, 10 * REGION + 1);
        assert_eq!(regions(&intent), [(10, 11)]);
        rig.cover(&intent, 11 * REGION, 11 * REGION + 1);
        assert_eq!(regions(&intent), [(10, 12 + AHEAD)]);
        let next = 12 + AHEAD;
        rig.cover(&intent, next * REGION, next * REGION + 1);
        assert_eq!(regions(&intent), [(10, next + 1 + next - 10)], "as far ahead as it has come");
    }

    #[test]
    fn a_burst_heats_what_lies_about_it() {
        let rig = Rig::new();
        let intent = rig.create();
        let far = |nth: u64| nth * 100 * REGION;
        (0..ALONE).for_each(|nth| rig.cover(&intent, far(nth), far(nth) + 1));
        let alone = regions(&intent);
        assert!(alone.iter().all(|(from, to)| to - from == 1) && alone.len() as u64 == ALONE, "{alone:?}");
        rig.cover(&intent, far(ALONE), far(ALONE) + 1);
        let group = TOGETHER.1 / REGION;
        let first = far(ALONE) / REGION / group * group;
        assert_eq!(regions(&intent).last(), Some(&(first, first + group)));
        rig.cool(&intent);
        rig.cover(&intent, far(ALONE + 5), far(ALONE + 5) + 1);
        let last = far(ALONE + 5) / REGION;
        assert_eq!(regions(&intent).last(), Some(&(last, last + 1)), "the burst is over");
    }

    #[test]
    fn what_is_not_used_grows_cold_after_the_map_is_durable() {
        let rig = Rig::new();
        let intent = rig.create();
        rig.cover(&intent, 0, 1);
        rig.cover(&intent, 9 * REGION, 9 * REGION + 1);
        rig.cool(&intent);
        assert_eq!(regions(&intent), [(0, 1), (9, 10)], "both were used since they became hot");
        assert!(intent.covers(ByteRange::new(0, 1)));
        let io = rig.executor.storage();
        let failed = rig.executor.block_on(intent.cool(&io, async || Err(Error::Poisoned)));
        assert!(failed.is_err());
        assert_eq!(regions(&intent), [(0, 1)]);
        assert_eq!(regions(&rig.load(DISK, CAPACITY).unwrap()), [(0, 1), (9, 10)], "the map was not durable");
        rig.cover(&intent, 9 * REGION, 9 * REGION + 1);
        rig.cool(&intent);
        rig.cool(&intent);
        assert_eq!(regions(&rig.load(DISK, CAPACITY).unwrap()), []);
    }

    #[test]
    fn a_damaged_sector_is_hot_and_a_damaged_head_is_nothing() {
        let rig = Rig::new();
        rig.create();
        let path = rig.folder.path().join(INTENT_FILE);
        let whole = std::fs::read(&path).unwrap();
        for at in [PAGE, PAGE + 4, PAGE + 8, PAGE + SECTOR - 1] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(regions(&rig.load(DISK, CAPACITY).unwrap()), [(0, PER_SECTOR)]);
        }
        for at in 0..size_of::<RawHead>() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert!(rig.load(DISK, CAPACITY).is_none(), "byte {at}");
        }
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(rig.load(DISK, CAPACITY).is_none());
    }

    #[test]
    fn regions_grow_with_the_disk() {
        assert_eq!(region_bytes(512), 1 << 20);
        assert_eq!(region_bytes(1 << 40), 16 << 20);
        assert_eq!(region_bytes(64 << 40), 64 << 20);
    }
}
