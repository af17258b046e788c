//! Rewind: the live disk becomes one of its snapshots again, at once, and is copied back behind.
//!
//! What the snapshot has in the chain is what changed since its instant; every other grain is on the
//! image as it was. So a rewind is a list of grains, each with the slot that its content is in, and a bit
//! for each that says whether it is back. A grain that is not is read from its slot; the image still
//! holds what it held before the rewind, and the snapshots go on to find that there.
//!
//! ```text
//! close the gate, wait               (writes of before and of after are apart)
//! list the grains
//! write the list, make it durable, and the slots that it names
//! the superblock names it, durably   (from here on, after any stop, the disk is the snapshot)
//! its head says "under way"          (evidence, should the superblock be damaged)
//! readers and writers are told, the gate opens
//! ```
//!
//! Then a copier, and guests who write to such grains, bring them back, each under a claim on its grains:
//!
//! ```text
//! mark, preserve the old content     (for the snapshots, as before every change)
//! write the whole grain              (its content from the slot, with what the guest writes over it)
//! set the bit                        (in a mapping: it survives this process at once)
//! release the claim, answer
//! ```
//!
//! A stop before the bit leaves a grain that reads as it did, whatever the image holds. Were the bit first, a
//! stop would show what was there before the rewind. After a stop of the *host* the mapped bits prove
//! nothing, so a flush keeps a second copy of them:
//!
//! ```text
//! take the bits as they are
//! flush the image                    (what made them true is on the medium)
//! write them to the synced copy, flush it, answer
//! ```
//!
//! A grain whose bit was lost is brought back once more: only what no flush had covered is lost with it.
//! In the end the image is flushed, the head says "finished", the superblock names no rewind, and only
//! then do reads go past the slots, which are given back.
//!
//! Invariant: a slot that a rewind names is its own as much as a snapshot's: whoever has it last gives it
//! back. So deletions, breaks and merges meanwhile take nothing from it.
//! Invariant: what cannot be read is an error, never what was on the disk before.
//! Invariant: every block of a grain in the list is marked by the time the rewind is complete, and no
//! snapshot is taken before: so what a rewind changed is told in full by the first that could.
//! Absent: snapshots that are taken meanwhile. They would need the disk as guests see it where the older ones
//! need the image; [`Error::RewindActive`] says to wait.

mod begin;
mod done;
mod head;
mod load;
mod plan;

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, SeqCst};
use std::sync::atomic::fence;
use std::sync::{Arc, Mutex, PoisonError};

use cbt::ByteRange;

use crate::claims::Claims;
use crate::disk::{Disk, Event, grains_of, with_sources};
use crate::error::Error;
use crate::format::GRAIN;
use crate::gate::Lane;
use crate::index::{Key, Slot};
use crate::memory::{AlignedBuf, Source, Target};
use crate::storage::{Storage, Zeroing};

use done::Done;
pub(crate) use done::bytes_needed;
use head::Head;
pub(crate) use head::{DONE_FILE, HEAD_FILE, Head as RewindHead, Runs, SYNCED_FILE, State as RewindState};
pub(crate) use load::{Found, in_force, load, remove_files};
use plan::Plan;

/// As the superblock says that there is no rewind.
pub(crate) const NO_REWIND: [u8; 16] = [0; 16];

/// Bytes that are held in memory at once for a request; a multiple of a grain.
const PIECE: u64 = 256 << 10;
/// Bytes that are zeroed at once, so that others who want these grains wait for no more.
const ZERO_PIECE: u64 = 1 << 30;
/// Grains that the copier brings back in one step: 1 MiB.
const STEP: u64 = (1 << 20) / GRAIN as u64;

/// How far a rewind is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RewindInfo {
    /// The snapshot that the disk became again. It may be deleted by now.
    pub snapshot: String,
    /// Bytes that are to be copied back.
    pub bytes: u64,
    /// Bytes of these that are not back yet.
    pub bytes_left: u64,
    /// Why it does not go on, if it does not. It is tried again.
    pub trouble: Option<String>,
}

/// A rewind under way. See the module.
///
/// Price while it lasts: one more copy in memory for a request that touches a grain which is not back,
/// and a flush of a small file for each of the guest's.
pub(crate) struct Rewind<S: Storage> {
    head: Head,
    file: S::File,
    plan: Plan,
    done: Done<S>,
    /// Grains that someone brings back.
    claims: Claims,
    /// Who flushes: bits are captured, covered and saved by one at a time.
    flushing: Claims,
    lane: Lane,
    /// No ordinal below is left.
    cursor: AtomicU64,
    trouble: Mutex<Option<String>>,
}

/// Where the first of some grains is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Image,
    Slot(Slot),
}

impl<S: Storage> Rewind<S> {
    pub(crate) fn id(&self) -> [u8; 16] {
        self.head.id
    }

    /// The snapshot's name.
    pub(crate) fn snapshot(&self) -> &str {
        &self.head.name
    }

    /// Whether the content of `key` is in `slot` for this rewind too.
    pub(crate) fn holds(&self, key: Key, slot: Slot) -> bool {
        key.as_grain().and_then(|grain| self.plan.find(grain).ok().map(|run| run.slot_of(grain)))
            == Some(slot)
    }

    /// Calls `each` with every slot.
    pub(crate) fn for_each_slot(&self, mut each: impl FnMut(Key, u32)) {
        for run in self.plan.runs() {
            for grain in run.grain..run.end() {
                if let Slot::At(slot) = run.slot_of(grain) {
                    each(Key::grain(grain), slot);
                }
            }
        }
    }

    /// How far it is.
    pub(crate) fn info(&self) -> RewindInfo {
        RewindInfo {
            snapshot: self.head.name.clone(),
            bytes: self.plan.grains() * GRAIN as u64,
            bytes_left: self.done.left() * GRAIN as u64,
            trouble: self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Where the first of `grains` is, and up to which one that goes on.
    fn place(&self, grains: &Range<u64>) -> (Place, u64) {
        match self.plan.find(grains.start) {
            Err(next) => (Place::Image, next.min(grains.end)),
            Ok(run) => {
                let within = grains.start..run.end().min(grains.end);
                let ordinals = run.ordinals(&within);
                let (back, end) = self.done.run(ordinals.clone());
                let place = if back { Place::Image } else { Place::Slot(run.slot_of(grains.start)) };
                (place, grains.start + (end - ordinals.start))
            }
        }
    }

    /// Whether all of `grains` are to be looked for in the image, from now on for ever.
    fn is_back(&self, grains: Range<u64>) -> bool {
        self.places(grains).all(|(place, _)| place == Place::Image)
    }

    /// Parts of `grains` by where they are, in order.
    fn places(&self, grains: Range<u64>) -> impl Iterator<Item = (Place, Range<u64>)> + '_ {
        let mut at = grains.start;
        std::iter::from_fn(move || {
            if at >= grains.end {
                return None;
            }
            let (place, end) = self.place(&(at..grains.end));
            let part = at..end;
            at = end;
            Some((place, part))
        })
    }

    /// Says that `grains` are back; those that were not to be are passed over.
    fn set_back(&self, grains: Range<u64>) {
        let mut at = grains.start;
        while at < grains.end {
            match self.plan.find(at) {
                Err(next) => at = next,
                Ok(run) => {
                    let end = run.end().min(grains.end);
                    self.done.set(run.ordinals(&(at..end)));
                    at = end;
                }
            }
        }
    }
}

impl<S: Storage> Disk<S> {
    /// How far a rewind is, if one is under way.
    pub fn rewind(&self) -> Option<RewindInfo> {
        self.rewind.load().as_ref().map(|rewind| rewind.info())
    }

    /// [`Disk::read`] while a rewind is under way.
    pub(crate) async fn read_rewinding(
        &self,
        io: &S,
        range: ByteRange,
        mut into: Target<'_>,
    ) -> Result<(), Error> {
        let Some(rewind) = self.rewind.load_full() else {
            return self.read_image(io, range.start(), into).await;
        };
        if rewind.is_back(grains_of(range)) {
            return self.read_image(io, range.start(), into).await;
        }
        for piece in pieces(range, PIECE) {
            let mut buffer = AlignedBuf::zeroed(index(piece.len()));
            self.read_piece(io, &rewind, piece, &mut buffer).await?;
            into.copy_from(index(piece.start() - range.start()), &buffer);
        }
        Ok(())
    }

    async fn read_piece(
        &self,
        io: &S,
        rewind: &Rewind<S>,
        piece: ByteRange,
        out: &mut [u8],
    ) -> Result<(), Error> {
        for (place, grains) in rewind.places(grains_of(piece)) {
            let part = self.bytes_of(grains.clone()).intersect(piece);
            let out = &mut out[index(part.start() - piece.start())..index(part.end() - piece.start())];
            let read = match place {
                Place::Image => {
                    self.read_image(io, part.start(), Target::of(out)).await?;
                    continue;
                }
                Place::Slot(slot) => self.read_slots(io, slot, part.start() % GRAIN as u64, out).await,
            };
            // A slot belongs to the rewind until its grain is back; after that it may be another's.
            fence(Acquire);
            for (place, grains) in rewind.places(grains) {
                let again = self.bytes_of(grains).intersect(part);
                let out = &mut out[index(again.start() - part.start())..index(again.end() - part.start())];
                match (place, &read) {
                    (Place::Image, _) => self.read_image(io, again.start(), Target::of(out)).await?,
                    (Place::Slot(_), Ok(())) => {}
                    (Place::Slot(_), Err(error)) => {
                        self.note_trouble(rewind, error);
                        return read;
                    }
                }
            }
        }
        Ok(())
    }

    /// Fills `out` from byte `skip` of `slot` on.
    async fn read_slots(&self, io: &S, slot: Slot, skip: u64, out: &mut [u8]) -> Result<(), Error> {
        match slot {
            Slot::Zero => {
                out.fill(0);
                Ok(())
            }
            Slot::At(slot) => self.store.read(io, slot, skip, out).await,
        }
    }

    /// The rest of [`Disk::write`] while a rewind is under way: inside the gate, the range marked and
    /// preserved.
    pub(crate) async fn write_rewinding(
        &self,
        io: &S,
        range: ByteRange,
        from: Source<'_>,
    ) -> Result<(), Error> {
        let rewind = self.rewind.load_full().filter(|rewind| !rewind.is_back(grains_of(range)));
        match &rewind {
            None => self.write_image(io, range.start(), from).await,
            Some(rewind) => self.write_pieces(io, rewind, range, from).await,
        }
    }

    async fn write_pieces(
        &self,
        io: &S,
        rewind: &Rewind<S>,
        range: ByteRange,
        from: Source<'_>,
    ) -> Result<(), Error> {
        for piece in pieces(range, PIECE) {
            let mut at = piece.start();
            while at < piece.end() {
                let claim = rewind.claims.claim(grains_of(ByteRange::new(at, piece.end()))).await;
                let part = ByteRange::new(at, piece.end().min(self.bytes_of(claim.run()).end()));
                let skip = index(at - range.start());
                self.write_part(io, rewind, claim.run(), part, (from, skip)).await?;
                rewind.set_back(claim.run());
                at = part.end();
            }
        }
        Ok(())
    }

    /// Writes `part`, the bytes of `from` after so many, so that `grains`, which it touches and the caller has
    /// claimed, are whole on the image.
    async fn write_part(
        &self,
        io: &S,
        rewind: &Rewind<S>,
        grains: Range<u64>,
        part: ByteRange,
        (from, skip): (Source<'_>, usize),
    ) -> Result<(), Error> {
        let whole = self.bytes_of(grains.clone());
        let is_back = |grain: u64| rewind.place(&(grain..grain + 1)).0 == Place::Image;
        // Where the edges are back, others may write beside us without a claim.
        let start = if is_back(grains.start) { part.start() } else { whole.start() };
        let end = if is_back(grains.end - 1) { part.end() } else { whole.end() };
        let mut buffer = AlignedBuf::zeroed(index(end - start));
        let edges = [grains.start, grains.end - 1];
        for &grain in &edges[..if grains.end - grains.start > 1 { 2 } else { 1 }] {
            let bytes = self.bytes_of(grain..grain + 1);
            if let (Place::Slot(slot), _) = rewind.place(&(grain..grain + 1))
                && bytes.intersect(part) != bytes
            {
                let out = &mut buffer[index(bytes.start() - start)..index(bytes.end() - start)];
                let read = self.read_slots(io, slot, 0, out).await;
                read.inspect_err(|error| self.note_trouble(rewind, error))?;
            }
        }
        from.copy_to(skip, &mut buffer[index(part.start() - start)..index(part.end() - start)]);
        self.write_image(io, start, Source::of(&buffer)).await
    }

    /// The rest of [`Disk::discard`] while a rewind is under way. A grain that could not be
    /// discarded reads as before: as the snapshot, if it is not back.
    pub(crate) async fn discard_rewinding(&self, io: &S, range: ByteRange) -> Result<(), Error> {
        let zero = async |part| match io.zero(&self.image, part, Zeroing::Unmap).await {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(false),
            result => result.map(|()| true).map_err(Error::io("discarding a range of the image")),
        };
        self.zero_pieces(io, range, zero).await
    }

    /// The rest of [`Disk::write_zeroes`] while a rewind is under way, but for the flush.
    pub(crate) async fn zero_rewinding(
        &self,
        io: &S,
        range: ByteRange,
        zeroing: Zeroing,
    ) -> Result<(), Error> {
        self.zero_pieces(io, range, async |part| self.zero(io, part, zeroing).await.map(|()| true)).await
    }

    /// Zeros a range with `zero`, which says whether it did: grains at the edges are brought back first, those
    /// within are back once they are zeros.
    async fn zero_pieces(
        &self,
        io: &S,
        range: ByteRange,
        zero: impl AsyncFn(ByteRange) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let rewind = self.rewind.load_full().filter(|rewind| !rewind.is_back(grains_of(range)));
        let Some(rewind) = rewind else { return zero(range).await.map(|_| ()) };
        let grains = grains_of(range);
        for grain in [grains.start, grains.end - 1] {
            let bytes = self.bytes_of(grain..grain + 1);
            if bytes.intersect(range) != bytes {
                self.bring_back(io, &rewind, grain..grain + 1).await?;
            }
        }
        for piece in pieces(range, ZERO_PIECE) {
            let mut at = piece.start();
            while at < piece.end() {
                let claim = rewind.claims.claim(grains_of(ByteRange::new(at, piece.end()))).await;
                let part = ByteRange::new(at, piece.end().min(self.bytes_of(claim.run()).end()));
                if zero(part).await? {
                    rewind.set_back(claim.run());
                }
                at = part.end();
            }
        }
        Ok(())
    }

    /// Copies what is not back of `grains` to the image. Inside the gate, the grains marked and preserved.
    async fn bring_back(&self, io: &S, rewind: &Rewind<S>, grains: Range<u64>) -> Result<(), Error> {
        let copied = self.copy_back(io, rewind, grains).await;
        copied.inspect_err(|error| self.note_trouble(rewind, error))
    }

    async fn copy_back(&self, io: &S, rewind: &Rewind<S>, grains: Range<u64>) -> Result<(), Error> {
        let mut at = grains.start;
        while at < grains.end {
            let claim = rewind.claims.claim(at..grains.end).await;
            at = claim.run().end;
            // As they are now that nobody else brings them back.
            for (place, part) in rewind.places(claim.run()) {
                let Place::Slot(slot) = place else { continue };
                let bytes = self.bytes_of(part.clone());
                if slot == Slot::Zero {
                    // Its space is kept: a later write cannot run out of what it had before.
                    self.zero(io, bytes, Zeroing::Keep).await?;
                } else {
                    let mut buffer = AlignedBuf::zeroed(index(bytes.len()));
                    self.read_slots(io, slot, 0, &mut buffer).await?;
                    self.write_image(io, bytes.start(), Source::of(&buffer)).await?;
                }
                rewind.set_back(part);
            }
        }
        Ok(())
    }

    /// [`Disk::flush`] while a rewind is under way; see the module.
    pub(crate) async fn flush_rewinding(&self, io: &S) -> Result<(), Error> {
        let Some(rewind) = self.rewind.load_full() else { return self.flush_image(io).await };
        let _one = rewind.flushing.claim(0..1).await;
        let captured = rewind.done.capture();
        self.flush_image(io).await?;
        if self.control.flush_failed() {
            // A failure is told once: what an earlier daemon wrote may be lost, though this flush succeeds.
            return Err(Error::Poisoned);
        }
        if let Err(error) = rewind.done.save(io, &captured).await {
            self.poison(io, &with_sources(&error)).await;
            return Err(error);
        }
        self.check_poisoned()
    }

    fn note_trouble(&self, rewind: &Rewind<S>, error: &Error) {
        let reason = with_sources(error);
        let mut trouble = rewind.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if trouble.replace(reason.clone()).is_none() {
            log::error!("{}: the rewind to '{}' does not go on: {reason}", self.name, rewind.snapshot());
            (self.events)(Event::RewindFailed {
                disk: self.name.clone(),
                snapshot: rewind.snapshot().to_owned(),
                reason,
            });
        }
    }

    /// The bytes of `grains`, of which the last of the disk may be short.
    fn bytes_of(&self, grains: Range<u64>) -> ByteRange {
        let end = (grains.end * GRAIN as u64).min(self.capacity());
        ByteRange::new(grains.start * GRAIN as u64, end)
    }
}

impl<S: Storage> Rewind<S> {
    fn clear_trouble(&self) {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Grains that are not back, one after the other, some of the first of all; `None` if there are none.
    fn next(&self) -> Option<Range<u64>> {
        let (mut at, end) = (self.cursor.load(SeqCst), self.plan.grains());
        while at < end {
            let (back, to) = self.done.run(at..end);
            if !back {
                self.cursor.store(at, SeqCst);
                let (run, grain) = self.plan.nth(at)?;
                let limit = run.end().min(grain + (to - at)).min(grain + STEP);
                return Some(grain..limit);
            }
            at = to;
        }
        self.cursor.store(end, SeqCst);
        None
    }
}

/// A range in parts that end at multiples of `bytes`.
fn pieces(range: ByteRange, bytes: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = range.start();
    std::iter::from_fn(move || {
        let piece = ByteRange::new(at, range.end().min((at / bytes + 1) * bytes));
        at = piece.end();
        (!piece.is_empty()).then_some(piece)
    })
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("a part of a buffer in memory")
}

/// The rewind of a disk, if one is under way.
pub(crate) type Current<S> = arc_swap::ArcSwapOption<Rewind<S>>;

/// A rewind that was taken up.
pub(crate) type Loaded<S> = Option<Arc<Rewind<S>>>;
