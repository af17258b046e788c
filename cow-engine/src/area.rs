//! One area of a difference store: a file or device with slots, which have a range of the store's numbers.
//!
//! Invariant: as of [`crate::store`]. Numbers that go in and out are the store's; only here does a number
//! become a place in a file.
//! Absent: which areas there are ([`crate::areas`]) and which is used next ([`crate::store`]).

use std::io::{ErrorKind, IoSlice};
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cbt::ByteRange;

use crate::areas::Entry;
use crate::behind::{Backlog, Behind};
use crate::error::Error;
use crate::format::{GRAIN, PAGE};
use crate::memory::{Source, Target};
use crate::slots::Slots;
use crate::storage::{Storage, Zeroing};

/// See the module.
pub(crate) struct Area<S: Storage> {
    pub(crate) entry: Entry,
    /// What tells its file from others.
    pub(crate) identity: (u64, u64),
    file: S::File,
    /// Bytes of the file before its first slot.
    skip: u64,
    /// Bytes of the file when it was opened.
    len_at_open: u64,
    /// Holds what is left from before; nothing new goes there.
    pub(crate) retired: bool,
    /// Its medium refused a write: others come first until it is tried again.
    pub(crate) full: AtomicBool,
    slots: Mutex<Slots>,
    /// Runs that nobody needs, whose space is still to be given back.
    garbage: Mutex<Vec<Range<u32>>>,
    /// Written since the last sync.
    grown: AtomicBool,
    behind: Behind,
}

impl<S: Storage> Area<S> {
    /// An area in `file`, with no slot taken.
    pub(crate) fn new(entry: Entry, file: S::File, identity: (u64, u64), len: u64, retired: bool) -> Self {
        Self {
            // The one of the state directory has no header.
            skip: if entry.number == 0 { 0 } else { PAGE as u64 },
            slots: Mutex::new(Slots::new(entry.slots)),
            identity,
            entry,
            file,
            len_at_open: len,
            retired,
            full: AtomicBool::new(false),
            garbage: Mutex::default(),
            // A killed process may have written what no flush has covered.
            grown: AtomicBool::new(true),
            behind: Behind::default(),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn garbage(&self) -> MutexGuard<'_, Vec<Range<u32>>> {
        self.garbage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this number is one of its slots.
    pub(crate) fn has(&self, slot: u32) -> bool {
        slot.checked_sub(self.entry.base).is_some_and(|own| own < self.entry.slots)
    }

    /// Where a slot begins in the file, in bytes.
    fn at(&self, slot: u32) -> u64 {
        self.skip + u64::from(slot - self.entry.base) * GRAIN as u64
    }

    fn range(&self, run: &Range<u32>) -> ByteRange {
        let start = self.at(run.start);
        ByteRange::new(start, start + u64::from(run.end - run.start) * GRAIN as u64)
    }

    /// Whether the file was long enough for `slot` when it was opened.
    pub(crate) fn reaches(&self, slot: u32) -> bool {
        self.at(slot) + GRAIN as u64 <= self.len_at_open
    }

    /// Slots that are taken.
    pub(crate) fn taken(&self) -> u32 {
        self.slots().taken()
    }

    /// Takes a run of free slots, at most `most` long.
    pub(crate) fn take(&self, most: u32) -> Option<Range<u32>> {
        let run = self.slots().take(most)?;
        Some(self.entry.base + run.start..self.entry.base + run.end)
    }

    /// Takes a slot that a record names; whether it was free.
    pub(crate) fn claim(&self, slot: u32) -> bool {
        let mut slots = self.slots();
        let before = slots.taken();
        slots.claim(slot - self.entry.base);
        slots.taken() > before
    }

    /// Lets go of slots that nothing was written to.
    pub(crate) fn untake(&self, run: Range<u32>) {
        self.slots().give(run.start - self.entry.base..run.end - self.entry.base);
    }

    pub(crate) async fn write(&self, io: &S, first: u32, grains: &[IoSlice<'_>]) -> std::io::Result<()> {
        self.grown.store(true, SeqCst);
        let len = grains.iter().map(|grain| grain.len() as u64).sum::<u64>();
        let at = self.at(first);
        io.write(&self.file, at, Source::of_slices(grains)).await?;
        self.behind.note(ByteRange::new(at, at + len));
        Ok(())
    }

    pub(crate) async fn read(&self, io: &S, first: u32, skip: u64, out: &mut [u8]) -> std::io::Result<()> {
        io.read(&self.file, self.at(first) + skip, Target::of(out)).await
    }

    /// Bytes of it that are in the host's page cache.
    pub(crate) fn cached(&self) -> u64 {
        self.behind.cached()
    }

    pub(crate) fn write_behind(&self, io: &S, kept: u64) -> std::io::Result<Backlog> {
        self.behind.step(io, &self.file, kept)
    }

    pub(crate) fn ease(&self, io: &S) -> std::io::Result<bool> {
        self.behind.ease(io, &self.file)
    }

    /// Gives slots back for good: their space to the medium, their numbers to others.
    ///
    /// The space first: a hole that is made late would be made in what another has written.
    async fn give(&self, io: &S, run: Range<u32>) {
        match io.zero(&self.file, self.range(&run), Zeroing::Unmap).await {
            Err(error) if error.kind() != ErrorKind::Unsupported => {
                log::warn!("cannot give back space of the store {}: {error}", self.entry.path);
            }
            _ => {}
        }
        self.untake(run);
    }

    /// Puts a run aside that nobody needs any more.
    pub(crate) fn discard(&self, run: Range<u32>) {
        self.garbage().push(run);
    }

    /// Gives back up to `most` runs of what was put aside; how many slots those had, and whether there is
    /// more.
    pub(crate) async fn sweep(&self, io: &S, most: usize) -> (u64, bool) {
        let mut given = 0;
        for _ in 0..most {
            let Some(run) = self.garbage().pop() else { return (given, false) };
            given += u64::from(run.end - run.start);
            self.give(io, run).await;
        }
        (given, !self.garbage().is_empty())
    }

    /// Gives back the space of slots that no record names: what a stop left. It is only space: what fails is
    /// said, and stays as it is.
    pub(crate) async fn tidy(&self, io: &S) {
        let mut ranges: Vec<ByteRange> = {
            let slots = self.slots();
            let base = self.entry.base;
            let runs = slots.free_runs().into_iter();
            let end = self.at(base + slots.high());
            let len = self.len_at_open.min(self.skip + u64::from(self.entry.slots) * GRAIN as u64);
            runs.map(|run| self.range(&(base + run.start..base + run.end)))
                .chain((len > end).then(|| ByteRange::new(end, len)))
                .collect()
        };
        while let Some(range) = ranges.pop() {
            match io.zero(&self.file, range, Zeroing::Unmap).await {
                Err(error) if error.kind() == ErrorKind::Unsupported => return,
                Err(error) => {
                    log::warn!("cannot give back space of the store {}: {error}", self.entry.path);
                    return;
                }
                Ok(()) => {}
            }
        }
    }

    pub(crate) fn has_grown(&self) -> bool {
        self.grown.load(SeqCst)
    }

    /// Makes what [`Area::tidy`] did durable.
    pub(crate) async fn sync_holes(&self, io: &S) -> Result<(), Error> {
        io.sync(&self.file).await.map_err(Error::io("flushing an area that is let go"))
    }

    /// Makes everything in it durable, also what a killed process had written.
    pub(crate) async fn sync(&self, io: &S) -> Result<(), Error> {
        self.grown.store(false, SeqCst);
        io.sync(&self.file).await.map_err(Error::io("flushing the difference store"))
    }
}
