//! The difference store of a disk: slots of old content that all its snapshots share, in one area or more.
//!
//! A snapshot's records say which of its keys is in which slot. So a slot can pass from a snapshot
//! that is deleted to its older neighbour without being copied, and one that nobody needs any more is
//! given back by itself.
//!
//! Invariant: a slot is written before a record names it, and given back only when no record that
//! counts names it and no reader that could still ask for it would be answered. An area never leaves while
//! the disk is open, so a number means the same place for who holds it.
//! Absent: which key is where ([`crate::snapshot`]) and when to copy ([`crate::preserve`]).

use std::io::{ErrorKind, IoSlice};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use arc_swap::ArcSwap;

use crate::area::Area;
use crate::areas::{AreaKind, Entry};
use crate::behind::{self, Backlog};
use crate::error::Error;
use crate::format::GRAIN;
use crate::storage::Storage;

/// Bytes of old content: how many there may be, and how many there are.
///
/// Shared by whom the limit is for: all snapshots of a disk, or all disks of a daemon.
#[derive(Debug)]
pub struct Budget {
    what: &'static str,
    limit: AtomicU64,
    used: AtomicU64,
}

impl Budget {
    /// No limit, of `what` in the words of an error.
    pub fn new(what: &'static str) -> Self {
        Self { what, limit: AtomicU64::new(u64::MAX), used: AtomicU64::new(0) }
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(SeqCst)
    }

    /// The limit in bytes, if there is one.
    pub fn limit(&self) -> Option<u64> {
        let limit = self.limit.load(SeqCst);
        (limit != u64::MAX).then_some(limit)
    }

    /// Sets or takes away the limit.
    ///
    /// # Errors
    /// [`Error::LimitInUse`] if it is below what is in use; nothing is changed then.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<(), Error> {
        let (used, limit) = (self.used(), limit.unwrap_or(u64::MAX));
        if limit < used {
            return Err(Error::LimitInUse { what: self.what, limit, used });
        }
        self.limit.store(limit, SeqCst);
        Ok(())
    }

    /// Sets the limit that something is opened with: what is there already may be more.
    pub fn begin_limit(&self, limit: Option<u64>) {
        self.limit.store(limit.unwrap_or(u64::MAX), SeqCst);
    }

    /// Takes `bytes`, if the limit allows.
    fn take(&self, bytes: u64) -> Result<(), Error> {
        if self.used.fetch_add(bytes, SeqCst).saturating_add(bytes) > self.limit.load(SeqCst) && bytes > 0 {
            self.give(bytes);
            return Err(Error::LimitReached { what: self.what });
        }
        Ok(())
    }

    /// Whether less than half of it is in use.
    fn is_roomy(&self) -> bool {
        self.used() < self.limit.load(SeqCst) / 2
    }

    fn force(&self, bytes: u64) {
        self.used.fetch_add(bytes, SeqCst);
    }

    fn give(&self, bytes: u64) {
        self.used.fetch_sub(bytes, SeqCst);
    }
}

/// An area that its records cannot be read from.
pub(crate) struct Lost {
    pub(crate) entry: Entry,
    pub(crate) why: String,
}

/// An area as an operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AreaInfo {
    /// Its path, as it was said.
    pub path: String,
    /// What kind of thing it is.
    pub kind: AreaKind,
    /// Bytes of old content that fit, or `None` if it grows with its file system.
    pub bytes: Option<u64>,
    /// Bytes of old content in it.
    pub used: u64,
    /// Its number; 0 for the one in the state directory.
    pub number: u32,
    /// More goes there when there is room; otherwise it only keeps what it has.
    pub open: bool,
}

/// See the module.
pub(crate) struct Store<S: Storage> {
    areas: ArcSwap<Vec<Arc<Area<S>>>>,
    pub(crate) lost: Vec<Lost>,
    pub(crate) budget: Budget,
    /// Of all disks of the daemon.
    shared: Arc<Budget>,
}

impl<S: Storage> Drop for Store<S> {
    fn drop(&mut self) {
        self.shared.give(self.budget.used());
    }
}

impl<S: Storage> Store<S> {
    pub(crate) fn new(areas: Vec<Arc<Area<S>>>, lost: Vec<Lost>, shared: Arc<Budget>) -> Self {
        Self {
            areas: ArcSwap::from_pointee(areas),
            lost,
            budget: Budget::new("the difference store of the disk"),
            shared,
        }
    }

    /// The areas, in the order in which they are filled.
    pub(crate) fn areas(&self) -> Arc<Vec<Arc<Area<S>>>> {
        self.areas.load_full()
    }

    /// Adds an area. One at a time.
    pub(crate) fn push(&self, area: Area<S>) {
        let mut areas = Vec::clone(&self.areas());
        areas.push(Arc::new(area));
        self.areas.store(Arc::new(areas));
    }

    /// Forgets areas that are not in the list any more, and that no record names.
    pub(crate) fn retain(&self, entries: &[Entry]) {
        let mut areas = Vec::clone(&self.areas());
        areas.retain(|area| {
            area.entry.number == 0 || entries.iter().any(|one| one.number == area.entry.number)
        });
        self.areas.store(Arc::new(areas));
    }

    /// What an operator is told of the areas that are there.
    pub(crate) fn infos(&self) -> Vec<AreaInfo> {
        let of = |area: &Arc<Area<S>>| AreaInfo {
            path: area.entry.path.clone(),
            kind: area.entry.kind,
            bytes: area.entry.bounded.then(|| bytes(area.entry.slots)),
            used: bytes(area.taken()),
            number: area.entry.number,
            open: !area.retired,
        };
        self.areas().iter().filter(|area| !area.retired || area.taken() > 0).map(of).collect()
    }

    /// Bytes of slots that are taken.
    pub(crate) fn bytes_taken(&self) -> u64 {
        self.areas().iter().map(|area| bytes(area.taken())).sum()
    }

    /// Whether less than half is in use of what there may be, as far as that is known.
    pub(crate) fn is_roomy(&self) -> bool {
        let areas = self.areas.load();
        let open = || areas.iter().filter(|area| !area.retired);
        let grows = open().any(|area| !area.entry.bounded);
        let free = || open().any(|area| area.taken() < area.entry.slots / 2);
        self.budget.is_roomy() && self.shared.is_roomy() && (grows || free())
    }

    fn area_of(&self, slot: u32) -> Result<Arc<Area<S>>, Error> {
        let areas = self.areas.load();
        let found = areas.iter().find(|area| area.has(slot));
        found.cloned().ok_or(Error::Corrupt { what: "a slot of a snapshot's index", at: slot.into() })
    }

    /// Whether what a record names can be there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it cannot; [`Error::AreaLost`] if its area is not there.
    pub(crate) fn check(&self, slot: u32) -> Result<(), Error> {
        let lost = |path: &str, why: &str| Error::AreaLost { path: path.to_owned(), why: why.to_owned() };
        match self.areas.load().iter().find(|area| area.has(slot)) {
            Some(area) if area.reaches(slot) => Ok(()),
            Some(area) if area.entry.number == 0 => {
                Err(Error::Corrupt { what: "the end of the difference store", at: slot.into() })
            }
            Some(area) => Err(lost(&area.entry.path, "it is shorter than it was")),
            None => {
                let gone = self.lost.iter().find(|lost| lost.entry.has(slot));
                Err(gone.map_or_else(
                    || lost("of an unknown number", "the list of areas does not have it"),
                    |gone| lost(&gone.entry.path, &gone.why),
                ))
            }
        }
    }

    /// Takes `count` slots, in runs, or none. Areas whose medium refused a write are passed over.
    pub(crate) fn take(&self, count: u32) -> Result<Vec<Range<u32>>, Error> {
        self.shared.take(bytes(count))?;
        let own = self.budget.take(bytes(count));
        let mut runs = Vec::with_capacity(1);
        let mut left = count;
        if own.is_ok() {
            let areas = self.areas.load();
            for area in areas.iter().filter(|area| !area.retired && !area.full.load(SeqCst)) {
                while left > 0
                    && let Some(run) = area.take(left)
                {
                    left -= run.end - run.start;
                    runs.push(run);
                }
                if left == 0 {
                    return Ok(runs);
                }
            }
        }
        self.shared.give(bytes(count));
        own?;
        self.budget.give(bytes(count));
        if left == 0 {
            return Ok(runs);
        }
        for run in runs {
            self.area_of(run.start)?.untake(run);
        }
        let source = ErrorKind::StorageFull.into();
        Err(Error::Io { what: "finding room in the difference store", source })
    }

    /// Takes the slots that records name. Answers `false` if no area has such a slot.
    pub(crate) fn claim(&self, slot: u32) -> bool {
        let Ok(area) = self.area_of(slot) else { return false };
        if area.claim(slot) {
            self.budget.force(GRAIN as u64);
            self.shared.force(GRAIN as u64);
        }
        true
    }

    /// Fills the slots from `first` on, which are of one area, with `grains`.
    pub(crate) async fn write(&self, io: &S, first: u32, grains: &[IoSlice<'_>]) -> Result<(), Error> {
        let area = self.area_of(first)?;
        let written = area.write(io, first, grains).await;
        if written.is_err() {
            area.full.store(true, SeqCst);
        }
        written.map_err(Error::io("writing to the difference store"))
    }

    /// After a write failed: whether there is an area left to try. If not, all are tried again next time.
    pub(crate) fn has_another(&self) -> bool {
        let areas = self.areas.load();
        let another = areas.iter().any(|area| !area.retired && !area.full.load(SeqCst));
        if !another {
            self.forgive();
        }
        another
    }

    /// Areas that refused a write are tried again.
    pub(crate) fn forgive(&self) {
        self.areas.load().iter().for_each(|area| area.full.store(false, SeqCst));
    }

    /// Bytes of it that are in the host's page cache.
    pub(crate) fn cached(&self) -> u64 {
        self.areas().iter().map(|area| area.cached()).sum()
    }

    /// Takes some of what was written long ago out of the host's page cache, if there is more than `kept` bytes; what
    /// is left then. Blocks the thread.
    pub(crate) fn write_behind(&self, io: &S, kept: u64) -> Result<Backlog, Error> {
        let (areas, all) = (self.areas(), self.cached());
        let mut left = Backlog::Nothing;
        for area in areas.iter() {
            let share = behind::cache_share(kept, all, area.cached(), areas.len());
            let more = area.write_behind(io, share);
            left = left.max(more.map_err(Error::io("writing back the difference store"))?);
        }
        Ok(left)
    }

    /// Writes a little back of what is in the host's page cache only; whether there was something. Blocks the
    /// thread.
    pub(crate) fn ease(&self, io: &S) -> Result<bool, Error> {
        for area in self.areas().iter() {
            if area.ease(io).map_err(Error::io("writing back the difference store"))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Fills `out` with the bytes of the store from byte `skip` of slot `first` on.
    pub(crate) async fn read(&self, io: &S, first: u32, skip: u64, out: &mut [u8]) -> Result<(), Error> {
        let area = self.area_of(first)?;
        area.read(io, first, skip, out).await.map_err(Error::io("reading the difference store"))
    }

    /// Puts slots aside that nobody needs any more; [`Store::sweep`] gives them back.
    pub(crate) fn discard(&self, mut slots: Vec<u32>) {
        slots.sort_unstable();
        let mut rest = &slots[..];
        while let [first, ..] = rest {
            // Numbers of two areas never touch.
            let len = (0..).zip(rest).take_while(|(nth, slot)| **slot == first + nth).count();
            let run = *first..rest[len - 1] + 1;
            rest = &rest[len..];
            match self.area_of(run.start) {
                Ok(area) => area.discard(run),
                Err(_) => debug_assert!(false, "slot {} is no area's", run.start),
            }
        }
    }

    /// Gives back up to `most` runs of each area of what was put aside; whether something was given back,
    /// and whether there is more.
    pub(crate) async fn sweep(&self, io: &S, most: usize) -> (bool, bool) {
        let (mut given, mut more) = (0, false);
        for area in self.areas().iter() {
            let (slots, left) = area.sweep(io, most).await;
            self.budget.give(slots * GRAIN as u64);
            self.shared.give(slots * GRAIN as u64);
            given += slots;
            more |= left;
        }
        (given > 0, more)
    }

    /// Gives back the space of slots that no record names: what a stop left.
    pub(crate) async fn tidy(&self, io: &S) {
        for area in self.areas().iter() {
            area.tidy(io).await;
        }
    }

    /// Whether something was written since the last [`Store::sync`].
    pub(crate) fn has_grown(&self) -> bool {
        self.areas.load().iter().any(|area| area.has_grown())
    }

    /// Makes everything that was written durable.
    pub(crate) async fn sync(&self, io: &S) -> Result<(), Error> {
        for area in self.areas().iter() {
            area.sync(io).await?;
        }
        Ok(())
    }
}

/// Bytes of `slots` slots.
pub(crate) fn bytes(slots: u32) -> u64 {
    u64::from(slots) * GRAIN as u64
}
