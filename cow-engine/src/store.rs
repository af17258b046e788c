//! The difference store of a disk: slots of old content that all its snapshots share.
//!
//! A snapshot's records say which of its keys is in which slot. So a slot can pass from a snapshot
//! that is deleted to its older neighbour without being copied, and one that nobody needs any more is
//! given back by itself.
//!
//! Invariant: a slot is written before a record names it, and given back only when no record that
//! counts names it and no reader that could still ask for it would be answered.
//! Absent: which key is where ([`crate::snapshot`]) and when to copy ([`crate::preserve`]).

use std::io::{ErrorKind, IoSlice};
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cbt::ByteRange;

use crate::error::Error;
use crate::format::GRAIN;
use crate::memory::{Source, Target};
use crate::slots::Slots;
use crate::storage::{Durability, Storage, Zeroing};

/// Slots that a store can have: numbers of 32 bits, of which the last one says "zeros".
const MAX_SLOTS: u32 = u32::MAX;

/// See the module.
pub(crate) struct Store<S: Storage> {
    file: S::File,
    slots: Mutex<Slots>,
    /// Runs that nobody needs, whose space is still to be given back.
    garbage: Mutex<Vec<Range<u32>>>,
    /// Written since the last sync.
    grown: AtomicBool,
}

impl<S: Storage> Store<S> {
    /// The store in `file`, with no slot taken.
    pub(crate) fn new(file: S::File) -> Self {
        Self {
            file,
            slots: Mutex::new(Slots::new(MAX_SLOTS)),
            garbage: Mutex::default(),
            grown: AtomicBool::new(false),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of slots that are taken.
    pub(crate) fn bytes_taken(&self) -> u64 {
        bytes(self.slots().taken())
    }

    /// Takes `count` slots, in runs, or none.
    pub(crate) fn take(&self, count: u32) -> Result<Vec<Range<u32>>, Error> {
        let mut slots = self.slots();
        let mut runs = Vec::with_capacity(1);
        let mut left = count;
        while left > 0 {
            let Some(run) = slots.take(left) else {
                runs.into_iter().for_each(|run| slots.give(run));
                let source = ErrorKind::StorageFull.into();
                return Err(Error::Io { what: "finding room in the difference store", source });
            };
            left -= run.end - run.start;
            runs.push(run);
        }
        Ok(runs)
    }

    /// Takes the slots that records name.
    pub(crate) fn claim(&self, slot: u32) -> bool {
        self.slots().claim(slot)
    }

    /// Fills the slots from `first` on with `grains`.
    pub(crate) async fn write(&self, io: &S, first: u32, grains: &[IoSlice<'_>]) -> Result<(), Error> {
        self.grown.store(true, SeqCst);
        io.write(&self.file, bytes(first), Source::of_slices(grains), Durability::Cached)
            .await
            .map_err(Error::io("writing to the difference store"))
    }

    /// Fills `out` with the bytes of the store from byte `skip` of slot `first` on.
    pub(crate) async fn read(&self, io: &S, first: u32, skip: u64, out: &mut [u8]) -> Result<(), Error> {
        io.read(&self.file, bytes(first) + skip, Target::of(out))
            .await
            .map_err(Error::io("reading the difference store"))
    }

    /// Gives slots back for good: their space to the file system, their numbers to others.
    ///
    /// The space first: a hole that is made late would be made in what another has written.
    pub(crate) async fn give(&self, io: &S, run: Range<u32>) {
        let range = ByteRange::new(bytes(run.start), bytes(run.end));
        match io.zero(&self.file, range, Zeroing::Unmap).await {
            Err(error) if error.kind() != ErrorKind::Unsupported => {
                log::warn!("cannot give back space of a difference store: {error}");
            }
            _ => {}
        }
        self.slots().give(run);
    }

    /// Puts slots aside that nobody needs any more; [`Store::sweep`] gives them back.
    pub(crate) fn discard(&self, mut slots: Vec<u32>) {
        slots.sort_unstable();
        let mut runs: Vec<Range<u32>> = Vec::new();
        for slot in slots {
            match runs.last_mut() {
                Some(last) if last.end == slot => last.end += 1,
                _ => runs.push(slot..slot + 1),
            }
        }
        self.garbage().append(&mut runs);
    }

    /// Gives back up to `most` runs of what was put aside; whether there is more.
    pub(crate) async fn sweep(&self, io: &S, most: usize) -> bool {
        for _ in 0..most {
            let Some(run) = self.garbage().pop() else { return false };
            self.give(io, run).await;
        }
        !self.garbage().is_empty()
    }

    fn garbage(&self) -> MutexGuard<'_, Vec<Range<u32>>> {
        self.garbage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives back the space of slots that no record names: what a stop left.
    pub(crate) async fn tidy(&self, io: &S) -> Result<(), Error> {
        let len = io.len(&self.file).map_err(Error::io("opening the difference store"))?;
        let mut ranges: Vec<ByteRange> = {
            let slots = self.slots();
            let high = bytes(slots.high());
            let runs = slots.free_runs().into_iter();
            let holes = runs.map(|run| ByteRange::new(bytes(run.start), bytes(run.end)));
            holes.chain((len > high).then(|| ByteRange::new(high, len))).collect()
        };
        while let Some(range) = ranges.pop() {
            match io.zero(&self.file, range, Zeroing::Unmap).await {
                Err(error) if error.kind() == ErrorKind::Unsupported => return Ok(()),
                result => result.map_err(Error::io("giving back space of the difference store"))?,
            }
        }
        Ok(())
    }

    /// Bytes of the file.
    pub(crate) fn len(&self, io: &S) -> Result<u64, Error> {
        io.len(&self.file).map_err(Error::io("opening the difference store"))
    }

    /// Whether something was written since the last [`Store::sync`].
    pub(crate) fn has_grown(&self) -> bool {
        self.grown.load(SeqCst)
    }

    /// Makes everything that was written durable.
    pub(crate) async fn sync(&self, io: &S) -> Result<(), Error> {
        self.grown.store(false, SeqCst);
        io.sync(&self.file).await.map_err(Error::io("flushing the difference store"))
    }
}

/// Bytes of `slots` slots, or where slot `slots` begins.
pub(crate) fn bytes(slots: u32) -> u64 {
    u64::from(slots) * GRAIN as u64
}
