//! Reading a snapshot: its content, its changes, and where it has data.
//!
//! Invariant: nothing is answered that was not so at the snapshot's instant. Whatever was found on
//! the live disk is looked up again afterwards: publication always precedes the overwrite, so what
//! is still in no store was not overwritten while it was read. Whatever was found in a slot counts only
//! if the snapshot is still held afterwards, and the grain was not released: a slot is given back, and so
//! another's, only after that is told.
//! Readers take no lock that a guest's write waits for.

use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::fence;
use std::sync::{Arc, PoisonError};

use cbt::{BlockGrid, ByteRange, Changes, Epoch, PAGE_BYTES};

use crate::chain::{self, Place};
use crate::disk::Disk;
use crate::error::Error;
use crate::format::{GRAIN, SnapshotState};
use crate::index::{Key, Slot};
use crate::memory::{AlignedBuf, Target};
use crate::snapshot::Snapshot;
use crate::storage::{Extent, Storage};
use crate::tracker::Tracker;

/// Preserved bytes between live ones that are not read along with these.
const GAP: u64 = 8 * GRAIN as u64;

/// Parts in slots that are read at once, so that memory is bounded: a MiB, where they are gaps.
const TOGETHER: usize = 32;

/// The readable image of a snapshot.
pub struct View<S: Storage> {
    disk: Arc<Disk<S>>,
    snapshot: Arc<Snapshot<S>>,
}

impl<S: Storage> Clone for View<S> {
    fn clone(&self) -> Self {
        Self { disk: self.disk.clone(), snapshot: self.snapshot.clone() }
    }
}

impl<S: Storage> View<S> {
    /// A view of `snapshot`, which is one of `disk`'s.
    pub fn new(disk: Arc<Disk<S>>, snapshot: Arc<Snapshot<S>>) -> Self {
        Self { disk, snapshot }
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &Arc<Snapshot<S>> {
        &self.snapshot
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk<S>> {
        &self.disk
    }

    /// Size in bytes: the disk's at the instant.
    pub fn capacity(&self) -> u64 {
        self.snapshot.capacity
    }

    /// Fills `out` with the bytes from `at` on, as they were at the snapshot's instant.
    ///
    /// # Errors
    /// [`Error::SnapshotBroken`], [`Error::SnapshotDeleted`] or [`Error::ContentReleased`], also if it
    /// happens meanwhile; `out` is then to be thrown away.
    ///
    /// # Panics
    /// If the range passes the end of the view.
    pub async fn read(&self, io: &S, at: u64, out: &mut [u8]) -> Result<(), Error> {
        let end = at + out.len() as u64;
        assert!(end <= self.capacity(), "a view is read within its size");
        self.check()?;
        let before = self.now()?;
        let runs = before.runs(at..end)?;
        let mut rest = &runs[..];
        while let [first, ..] = rest {
            let together;
            (together, rest) = rest.split_at(live_with_gaps(rest).max(1));
            let last = together.last().unwrap_or(first);
            let part = &mut out[index(first.at.start - at)..index(last.at.end - at)];
            match first.found {
                Found::Live => self.read_live(io, &before, together, part).await?,
                Found::Zero => part.fill(0),
                Found::Slots(slot) => self.read_slots(io, slot, first.at.start, part).await?,
                Found::Released => return Err(self.released(first.at.start)),
            }
        }
        // What was found in slots may be another's by now.
        self.check()?;
        self.check_held(at..end)
    }

    /// Whether nothing of the bytes of `range` was released.
    fn check_held(&self, range: Range<u64>) -> Result<(), Error> {
        let grains = range.start / GRAIN as u64..range.end.div_ceil(GRAIN as u64);
        match self.snapshot.released.first(grains) {
            Some(grain) => Err(self.released(range.start.max(grain * GRAIN as u64))),
            None => Ok(()),
        }
    }

    fn released(&self, at: u64) -> Error {
        Error::ContentReleased { name: self.snapshot.name.clone(), at }
    }

    /// The chain as it is now, from this snapshot on.
    fn now(&self) -> Result<Now<S>, Error> {
        let list = self.disk.chain.now();
        let chain = chain::from(&list, &self.snapshot)?;
        let (first, published) = (list.len() - chain.len(), chain.iter().map(|one| one.published()).sum());
        Ok(Now { list, first, published })
    }

    /// Reads `runs` and what is between them from the live disk, then puts in place of it what is preserved, or was
    /// since `before`, in which they were found.
    async fn read_live(&self, io: &S, before: &Now<S>, runs: &[Run], out: &mut [u8]) -> Result<(), Error> {
        let at = runs.first().map_or(0, |first| first.at.start);
        let read = io.read(&self.disk.image, at, Target::of(out)).await;
        read.map_err(Error::io("reading the image for a snapshot"))?;
        // In the chain as it is now: a newer snapshot may have what was live.
        let now = self.now()?;
        let changed = !now.is(before);
        let mut kept = Vec::new();
        for run in runs {
            let again = changed && matches!(run.found, Found::Live);
            let again = again.then(|| now.runs(run.at.clone())).transpose()?;
            for Run { found, at: bytes } in again.as_deref().unwrap_or(std::slice::from_ref(run)) {
                let part = index(bytes.start - at)..index(bytes.end - at);
                match *found {
                    Found::Zero => out[part].fill(0),
                    Found::Slots(slot) => kept.push(Kept { slot, skip: bytes.start % GRAIN as u64, part }),
                    Found::Live => {}
                    Found::Released => return Err(self.released(bytes.start)),
                }
            }
        }
        for together in kept.chunk_by(Kept::goes_on).flat_map(|run| run.chunks(TOGETHER)) {
            self.read_together(io, together, out).await?;
        }
        Ok(())
    }

    /// Reads parts of `out` that are in slots one after the other.
    async fn read_together(&self, io: &S, parts: &[Kept], out: &mut [u8]) -> Result<(), Error> {
        let [first, .., _] = parts else {
            let Some(only) = parts.first() else { return Ok(()) };
            return self.disk.store.read(io, only.slot, only.skip, &mut out[only.part.clone()]).await;
        };
        let mut bounce = AlignedBuf::zeroed(parts.iter().map(|kept| kept.part.len()).sum());
        self.disk.store.read(io, first.slot, first.skip, &mut bounce).await?;
        let mut rest = &bounce[..];
        for kept in parts {
            let (these, later) = rest.split_at(kept.part.len());
            out[kept.part.clone()].copy_from_slice(these);
            rest = later;
        }
        Ok(())
    }

    /// Reads bytes from `at` on, whose grains are in slots from `slot` on.
    async fn read_slots(&self, io: &S, slot: u32, at: u64, out: &mut [u8]) -> Result<(), Error> {
        self.disk.store.read(io, slot, at % GRAIN as u64, out).await
    }

    /// Data and zeros of a range, in order, without gaps: `hole` for what reads as zeros without
    /// being stored. May say data where there are zeros, never the other way round; what was released
    /// counts as data.
    pub fn extents(&self, io: &S, range: ByteRange) -> Result<Vec<Extent>, Error> {
        self.check()?;
        // Asked once for all: a question for each live run would be slow on an image in memory.
        let live = self.live_extents(io, range)?;
        // Through the chain as it is now: a hole counts only if nothing was preserved from it meanwhile.
        let now = self.now()?;
        let no_zeros = !now.chain().iter().any(|one| one.has_zeros());
        let mut extents: Vec<Extent> = Vec::new();
        for live in live {
            // Data stays data, unless a grain of it was preserved as zeros.
            let data = Run { found: Found::Live, at: live.range.start()..live.range.end() };
            let runs = if no_zeros && !live.hole { vec![data] } else { now.runs(data.at)? };
            for Run { found, at } in runs {
                let hole = match found {
                    Found::Zero => true,
                    Found::Slots(_) | Found::Released => false,
                    Found::Live => live.hole,
                };
                match extents.last_mut() {
                    Some(last) if last.hole == hole => {
                        last.range = ByteRange::new(last.range.start(), at.end);
                    }
                    _ => extents.push(Extent { range: ByteRange::new(at.start, at.end), hole }),
                }
            }
        }
        self.check()?;
        Ok(extents)
    }

    /// Data and holes of the image.
    ///
    /// To find the end of data in memory, the kernel looks at each of its pages. What was found is kept for later
    /// questions: data that has become a hole meanwhile was preserved, or may be told of as data.
    fn live_extents(&self, io: &S, range: ByteRange) -> Result<Vec<Extent>, Error> {
        let seen = || self.snapshot.seen_data.lock().unwrap_or_else(PoisonError::into_inner);
        if seen().contains(range) {
            return Ok(vec![Extent { range, hole: false }]);
        }
        let mut extents =
            io.extents(&self.disk.image, range).map_err(Error::io("asking the image for its holes"))?;
        if let Some(last) = extents.last_mut() {
            if !last.hole {
                *seen() = last.range;
            }
            *last = last.within(range);
        }
        Ok(extents)
    }

    /// The ranges within `range` that changed after epoch `since` up to the snapshot's instant, in
    /// order and apart from each other, rounded out to whole blocks (cut at `range`).
    ///
    /// Stops after `limit` ranges; what follows the last one is then unknown.
    pub async fn changes(
        &self,
        io: &S,
        since: Epoch,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<ByteRange>, Error> {
        let tracker = self.tracked()?;
        self.check()?;
        let mut found: Vec<ByteRange> = Vec::new();
        let mut keep = |changed: ByteRange| {
            let part = changed.intersect(range);
            if !part.is_empty() && found.len() <= limit {
                found.push(part);
            }
            found.len()
        };
        let mut changes = Changes::new(tracker.grid(), self.capacity(), since);
        let mut cells = Box::new([0; PAGE_BYTES]);
        let mut full = false;
        self.disk.look_for_marks_in(io, &tracker).await;
        for page in tracker.marked().runs(tracker.pages_of(range)).flatten() {
            self.read_map_page(io, &tracker, page, &mut cells).await?;
            changes.page(page, &cells, |changed| full |= keep(changed) >= limit);
            if full {
                break;
            }
        }
        if !full {
            changes.finish(|changed| {
                keep(changed);
            });
        }
        self.settle_marks(io).await?;
        self.check()?;
        found.truncate(limit);
        Ok(found)
    }

    /// Makes sure, once, that no mark was lost on its way to the medium before it was read.
    ///
    /// A page of the map that the kernel could not write is clean all the same, and may leave memory: who reads it then
    /// finds what the medium has. Such a failure is told to the next flush. So what was read before a flush that succeeds
    /// was whole, and what was marked by the instant stays so, on the medium. Once one has failed none is proof.
    ///
    /// # Errors
    /// [`Error::MarksLost`]; that of the flush.
    pub(crate) async fn settle_marks(&self, io: &S) -> Result<(), Error> {
        if self.snapshot.marks_durable.load(Acquire) {
            return Ok(());
        }
        self.disk.sync_map(io, &self.disk.map_cells()).await?;
        if self.disk.control.map_in_doubt(&self.disk.boot()) {
            return Err(Error::MarksLost { disk: self.disk.name.clone() });
        }
        // A generation that begins forgets the doubt, after it has become the one that counts.
        self.check_history()?;
        self.snapshot.marks_durable.store(true, Release);
        Ok(())
    }

    /// The grid in which changes are told.
    pub fn block_grid(&self) -> Result<BlockGrid, Error> {
        Ok(self.tracked()?.grid())
    }

    /// A page of the change map as it was at the instant: frozen, or live and not marked since.
    pub(crate) async fn read_map_page(
        &self,
        io: &S,
        tracker: &Tracker<S::Cells>,
        page: u64,
        cells: &mut [u8; PAGE_BYTES],
    ) -> Result<(), Error> {
        let key = Key::map_page(page);
        if self.locate(key)? == Place::Live {
            tracker.copy_page(page, cells);
        }
        // A page is published before it is marked, so a copy that is torn or late is found out here;
        // the fence keeps the look-up behind the copy.
        fence(Acquire);
        // So is a generation that ended before the page was marked in the next one without being frozen.
        self.check_history()?;
        match self.locate(key)? {
            // Pages of the map are never released.
            Place::Live | Place::Released => Ok(()),
            Place::Kept(Slot::Zero) => {
                cells.fill(0);
                Ok(())
            }
            Place::Kept(Slot::At(slot)) => self.disk.store.read(io, slot, 0, cells).await,
        }
    }

    fn locate(&self, key: Key) -> Result<Place, Error> {
        let list = self.disk.chain.now();
        chain::locate(chain::from(&list, &self.snapshot)?, key)
    }

    /// The tracker, if it knows this snapshot's history.
    pub(crate) fn tracked(&self) -> Result<Arc<Tracker<S::Cells>>, Error> {
        self.check_history()?;
        let untracked = || Error::NotTracked { disk: self.disk.name.clone() };
        self.disk.watch.tracker().ok_or_else(untracked)
    }

    /// Whether the map is still that of the snapshot's generation.
    fn check_history(&self) -> Result<(), Error> {
        let (disk, snapshot) = (&self.disk, &self.snapshot);
        if snapshot.tracked && snapshot.generation == disk.history.generation() {
            return Ok(());
        }
        if !snapshot.tracked || disk.block_grid().is_none() {
            return Err(Error::NotTracked { disk: disk.name.clone() });
        }
        Err(disk.other_generation(snapshot.change_id(), &snapshot.name))
    }

    /// Whether the snapshot may still be read.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let name = || self.snapshot.name.clone();
        if let Some(reason) = self.snapshot.broken() {
            return Err(Error::SnapshotBroken { name: name(), reason: reason.to_owned() });
        }
        match self.snapshot.state() {
            SnapshotState::Deleted => Err(Error::SnapshotDeleted { name: name() }),
            SnapshotState::Active | SnapshotState::Prepared => Ok(()),
        }
    }
}

/// Where a run of bytes is.
#[derive(Clone, Copy)]
enum Found {
    Zero,
    Slots(u32),
    Live,
    Released,
}

/// Bytes that are all in one place.
struct Run {
    found: Found,
    at: Range<u64>,
}

/// A part of a buffer that is in slots from `slot` on, but for so many bytes of the first.
struct Kept {
    slot: u32,
    skip: u64,
    part: Range<usize>,
}

impl Kept {
    /// Whether `next` begins with the slot in which this one ends, to that one's last byte.
    fn goes_on(&self, next: &Self) -> bool {
        let end = u64::from(self.slot) * GRAIN as u64 + self.skip + self.part.len() as u64;
        end == u64::from(next.slot) * GRAIN as u64 + next.skip
    }
}

/// A chain at one time, and how much had been published in it.
struct Now<S: Storage> {
    list: Arc<chain::List<S>>,
    /// The place of the snapshot that is looked at.
    first: usize,
    published: u64,
}

impl<S: Storage> Now<S> {
    fn chain(&self) -> &[Arc<Snapshot<S>>] {
        &self.list[self.first..]
    }

    /// Whether what was live `before` was not changed since: publication comes before the count, which comes before
    /// the change that made it necessary. A broken one is told of before somebody changes without preserving.
    fn is(&self, before: &Self) -> bool {
        let same = Arc::ptr_eq(&self.list, &before.list) && self.published == before.published;
        same && self.chain().iter().all(|one| one.broken().is_none())
    }

    /// Where the bytes of `range` are.
    fn runs(&self, range: Range<u64>) -> Result<Vec<Run>, Error> {
        let mut runs = Runs { chain: self.chain(), rest: range, ahead: None };
        std::iter::from_fn(|| runs.next().transpose()).collect()
    }
}

/// How many of `runs`, from the first on, are live or short gaps between live ones: one read of all of it, and what is
/// preserved put over it, is faster than many small ones.
fn live_with_gaps(runs: &[Run]) -> usize {
    let (mut count, mut gap) = (0, 0);
    for (nth, run) in runs.iter().enumerate() {
        match run.found {
            Found::Live => (count, gap) = (nth + 1, 0),
            Found::Released => break,
            Found::Zero | Found::Slots(_) => gap += run.at.end - run.at.start,
        }
        if count == 0 || gap >= GAP {
            break;
        }
    }
    count
}

/// Walks over bytes, a run at a time; every grain is looked for once.
struct Runs<'a, S: Storage> {
    chain: &'a [Arc<Snapshot<S>>],
    rest: Range<u64>,
    /// What was found of the first grain of the rest.
    ahead: Option<Found>,
}

impl<S: Storage> Runs<'_, S> {
    fn next(&mut self) -> Result<Option<Run>, Error> {
        let Range { start, end } = self.rest;
        if start >= end {
            return Ok(None);
        }
        let first = start / GRAIN as u64;
        let found = match self.ahead.take() {
            Some(found) => found,
            None => self.find(first)?,
        };
        let mut grain = first + 1;
        while grain * (GRAIN as u64) < end {
            let next = self.find(grain)?;
            if !found.goes_on(next, grain - first) {
                self.ahead = Some(next);
                break;
            }
            grain += 1;
        }
        self.rest.start = end.min(grain * GRAIN as u64);
        Ok(Some(Run { found, at: start..self.rest.start }))
    }

    fn find(&self, grain: u64) -> Result<Found, Error> {
        Ok(match chain::locate(self.chain, Key::grain(grain))? {
            Place::Kept(Slot::Zero) => Found::Zero,
            Place::Kept(Slot::At(slot)) => Found::Slots(slot),
            Place::Live => Found::Live,
            Place::Released => Found::Released,
        })
    }
}

impl Found {
    /// Whether a run of so many grains that begins with this one goes on with `next`.
    fn goes_on(self, next: Self, grains: u64) -> bool {
        match (self, next) {
            (Self::Zero, Self::Zero) | (Self::Live, Self::Live) | (Self::Released, Self::Released) => true,
            (Self::Slots(slot), Self::Slots(next)) => u64::from(next) == u64::from(slot) + grains,
            _ => false,
        }
    }
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a part of a buffer in memory")
}
