//! Writable views: a disk of its own on top of a snapshot, that any number of others stand beside.
//!
//! A grain is the overlay's, with its content in the overlay's data file, or still the view's. The
//! first change of a grain takes it over:
//!
//! ```text
//! pass the gate                     (the disk's end waits for us)
//! claim the grains                  (of two writers of one grain the second sees the first's bytes)
//! fill the parts that stay          (from the view; whole grains need no reading)
//! write the data
//! publish the bits                  (in a mapping: they outlive this process at once)
//! release the claim
//! ```
//!
//! A stop before the bits leaves bytes in the data file that nobody looks at: the grain is still the
//! view's, as it was before a change that nobody was told of. A stop after them leaves the change done.
//! Were the bits first, a stop in between would show whatever the data file held.
//!
//! Invariant: nothing of an overlay reaches the disk, its snapshots or other overlays; what is not the
//! overlay's own reads as the view, or as the view's error.
//! Absent: change tracking of overlays, and overlays of overlays.
//!
//! Analogue: blksnap's `snapimage`, whose writes go to the chunks of the difference area.

mod head;
mod layer;
mod owned;
mod registry;

use std::ops::Range;
use std::sync::Arc;

use cbt::ByteRange;

use crate::error::Error;
use crate::format::GRAIN;
use crate::gate::Lane;
use crate::memory::{AlignedBuf, Source, Target};
use crate::storage::{Durability, Extent, Storage, Zeroing};
use crate::view::View;

pub(crate) use head::{Head as OverlayHead, cells_file, data_file, head_file, number_of};
use layer::Layer;
pub(crate) use layer::{len_of_cells, remove_files};
pub(crate) use registry::{Left, Overlays, numbers};

/// Bytes that are held in memory at once for a request; a multiple of a grain.
const PIECE: u64 = 256 << 10;
/// Bytes that are zeroed at once, so that publishing them does not hold up others.
const ZERO_PIECE: u64 = 1 << 30;

/// A snapshot's view that can be written. Clones are the same overlay.
///
/// Price: 1 bit of disk space and 2 of memory for each grain of the disk, a copy in memory for each request
/// that is not wholly the overlay's yet, and a file system for the state directory whose files may be
/// as long as the disk.
pub struct Overlay<S: Storage> {
    view: View<S>,
    layer: Arc<Layer<S>>,
}

impl<S: Storage> Clone for Overlay<S> {
    fn clone(&self) -> Self {
        Self { view: self.view.clone(), layer: self.layer.clone() }
    }
}

impl<S: Storage> Overlay<S> {
    fn new(view: View<S>, layer: Arc<Layer<S>>) -> Self {
        Self { view, layer }
    }

    fn layer(&self) -> &Arc<Layer<S>> {
        &self.layer
    }

    /// The view that it stands on.
    pub fn view(&self) -> &View<S> {
        &self.view
    }

    /// Its name among the overlays of its snapshot.
    pub fn name(&self) -> &str {
        &self.layer.head.name
    }

    /// Whether it outlives the daemon.
    pub fn is_kept(&self) -> bool {
        self.layer.head.keep
    }

    /// What was given when it was opened.
    pub fn note(&self) -> &str {
        &self.layer.head.note
    }

    /// Size in bytes: the disk's at the snapshot's instant.
    pub fn capacity(&self) -> u64 {
        self.view.capacity()
    }

    /// Bytes of grains that are its own. Those that were zeroed count, though they may take no space.
    pub fn bytes_used(&self) -> u64 {
        (self.layer.owned.count() * GRAIN as u64).min(self.capacity())
    }

    /// A counter for one more queue, or other source of changes.
    pub fn lane(&self) -> Lane {
        self.layer.gate.lane()
    }

    /// Reads what was written to the overlay, else what the snapshot holds.
    ///
    /// # Errors
    /// [`Error::OverlayClosed`]; those of [`View::read`] where the view is needed, such as
    /// [`Error::SnapshotBroken`]; those of the file. What `into` holds is then to be thrown away.
    ///
    /// # Panics
    /// If the range passes the end; requests are checked where they enter.
    pub async fn read(&self, io: &S, at: u64, into: Target<'_>) -> Result<(), Error> {
        let range = self.check(at, into.len() as u64)?;
        if self.layer.owned.has_all(grains_of(range)) {
            return self.layer.read(io, at, into).await;
        }
        // Rare beside the way above once an overlay is in use, and its state is large.
        Box::pin(self.read_pieces(io, range, into)).await
    }

    async fn read_pieces(&self, io: &S, range: ByteRange, mut into: Target<'_>) -> Result<(), Error> {
        for piece in pieces(range, PIECE) {
            let mut buffer = AlignedBuf::zeroed(index(piece.len()));
            self.read_piece(io, piece, &mut buffer).await?;
            into.copy_from(index(piece.start() - range.start()), &buffer);
        }
        Ok(())
    }

    async fn read_piece(&self, io: &S, piece: ByteRange, out: &mut [u8]) -> Result<(), Error> {
        for (owned, part) in self.runs(piece) {
            let out = &mut out[index(part.start() - piece.start())..index(part.end() - piece.start())];
            if owned {
                self.layer.read(io, part.start(), Target::of(out)).await?;
            } else {
                self.view.read(io, part.start(), out).await?;
            }
        }
        Ok(())
    }

    /// Writes to the overlay; see the module for the order of effects.
    ///
    /// # Errors
    /// [`Error::OverlayClosed`]; those of [`View::read`] if part of a grain is written that is not the
    /// overlay's yet; those of the files.
    ///
    /// # Panics
    /// If the range passes the end; requests are checked where they enter.
    pub async fn write(
        &self,
        io: &S,
        lane: Lane,
        at: u64,
        from: Source<'_>,
        durability: Durability,
    ) -> Result<(), Error> {
        let range = self.check(at, from.len() as u64)?;
        let _pass = self.layer.gate.enter(lane).await;
        if self.layer.owned.has_all(grains_of(range)) {
            self.layer.write(io, at, from).await?;
        } else {
            Box::pin(self.write_pieces(io, range, from)).await?;
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.layer.flush(io).await,
        }
    }

    /// Makes every change that was answered before this durable.
    ///
    /// # Errors
    /// [`Error::OverlayClosed`], those of the files. Once a flush has failed all later ones fail with
    /// [`Error::Poisoned`].
    pub async fn flush(&self, io: &S) -> Result<(), Error> {
        self.layer.check()?;
        self.layer.flush(io).await
    }

    /// Forgets the content of a range: it reads as zeros, and its space is given back.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    ///
    /// # Panics
    /// If `range` passes the end; requests are checked where they enter.
    pub async fn discard(&self, io: &S, lane: Lane, range: ByteRange) -> Result<(), Error> {
        self.write_zeroes(io, lane, range, Zeroing::Unmap, Durability::Cached).await
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    ///
    /// # Panics
    /// If `range` passes the end; requests are checked where they enter.
    pub async fn write_zeroes(
        &self,
        io: &S,
        lane: Lane,
        range: ByteRange,
        zeroing: Zeroing,
        durability: Durability,
    ) -> Result<(), Error> {
        let range = self.check(range.start(), range.len())?;
        let _pass = self.layer.gate.enter(lane).await;
        Box::pin(self.zero(io, range, zeroing)).await?;
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.layer.flush(io).await,
        }
    }

    /// Whole grains by the file system's means, and the parts of grains around them as writes.
    async fn zero(&self, io: &S, range: ByteRange, zeroing: Zeroing) -> Result<(), Error> {
        let whole = self.whole_grains(range);
        for edge in [ByteRange::new(range.start(), whole.start()), ByteRange::new(whole.end(), range.end())] {
            let zeros = Source::of(&ZERO_GRAIN[..index(edge.len())]);
            self.write_pieces(io, edge, zeros).await?;
        }
        for piece in pieces(whole, ZERO_PIECE) {
            let mut at = piece.start();
            while at < piece.end() {
                let claim = self.layer.claims.claim(grains_of(ByteRange::new(at, piece.end()))).await;
                let part = self.bytes_of(claim.run());
                // Also where the view may have zeros, or the data file has a hole: a write that failed
                // or was cut off may have left something there.
                self.layer.zero(io, part, zeroing).await?;
                self.layer.owned.publish(claim.run());
                at = part.end();
            }
        }
        Ok(())
    }

    /// The grains that lie in `range` as a whole; those at its end if there are none.
    fn whole_grains(&self, range: ByteRange) -> ByteRange {
        let start = range.start().next_multiple_of(GRAIN as u64);
        let cut = range.end() - range.end() % GRAIN as u64;
        let end = if range.end() == self.capacity() { range.end() } else { cut };
        if start < end { ByteRange::new(start, end) } else { ByteRange::new(range.end(), range.end()) }
    }

    async fn write_pieces(&self, io: &S, range: ByteRange, from: Source<'_>) -> Result<(), Error> {
        for piece in pieces(range, PIECE) {
            let mut at = piece.start();
            while at < piece.end() {
                let claim = self.layer.claims.claim(grains_of(ByteRange::new(at, piece.end()))).await;
                let end = piece.end().min(self.bytes_of(claim.run()).end());
                let part = ByteRange::new(at, end);
                let skip = index(at - range.start());
                self.take_over(io, claim.run(), part, from, skip).await?;
                at = end;
            }
        }
        Ok(())
    }

    /// Writes `part`, the bytes of `from` after `skip`, and makes `grains` the overlay's: the grains that
    /// it touches, which the caller has claimed.
    async fn take_over(
        &self,
        io: &S,
        grains: Range<u64>,
        part: ByteRange,
        from: Source<'_>,
        skip: usize,
    ) -> Result<(), Error> {
        let owned = &self.layer.owned;
        let whole = self.bytes_of(grains.clone());
        // Where the edges are the overlay's already, others may write beside us without a claim.
        let start = if owned.has(grains.start) { part.start() } else { whole.start() };
        let end = if owned.has(grains.end - 1) { part.end() } else { whole.end() };
        let mut buffer = AlignedBuf::zeroed(index(end - start));
        let edges = [grains.start, grains.end - 1];
        for &grain in &edges[..if grains.end - grains.start > 1 { 2 } else { 1 }] {
            let bytes = self.bytes_of(grain..grain + 1);
            if !owned.has(grain) && bytes.intersect(part) != bytes {
                let out = &mut buffer[index(bytes.start() - start)..index(bytes.end() - start)];
                self.view.read(io, bytes.start(), out).await?;
            }
        }
        from.copy_to(skip, &mut buffer[index(part.start() - start)..index(part.end() - start)]);
        self.layer.write(io, start, Source::of(&buffer)).await?;
        owned.publish(grains);
        Ok(())
    }

    /// Data and zeros of a range, in order, without gaps: `hole` for what reads as zeros without being
    /// stored. May say data where there are zeros, never the other way round.
    ///
    /// # Errors
    /// As [`Overlay::read`].
    pub fn extents(&self, io: &S, range: ByteRange) -> Result<Vec<Extent>, Error> {
        self.layer.check()?;
        let mut extents: Vec<Extent> = Vec::new();
        for (owned, part) in self.runs(range) {
            let found = if owned { self.layer.extents(io, part)? } else { self.view.extents(io, part)? };
            for extent in found {
                match extents.last_mut() {
                    Some(last) if last.hole == extent.hole => {
                        last.range = ByteRange::new(last.range.start(), extent.range.end());
                    }
                    _ => extents.push(extent),
                }
            }
        }
        Ok(extents)
    }

    /// Parts of a range by whether they are the overlay's, in order.
    fn runs(&self, range: ByteRange) -> impl Iterator<Item = (bool, ByteRange)> + '_ {
        let mut at = range.start();
        std::iter::from_fn(move || {
            if at >= range.end() {
                return None;
            }
            let (owned, end) = self.layer.owned.run(grains_of(ByteRange::new(at, range.end())));
            let part = ByteRange::new(at, range.end().min(end * GRAIN as u64));
            at = part.end();
            Some((owned, part))
        })
    }

    /// The bytes of `grains`, of which the last of the disk may be short.
    fn bytes_of(&self, grains: Range<u64>) -> ByteRange {
        let end = (grains.end * GRAIN as u64).min(self.capacity());
        ByteRange::new(grains.start * GRAIN as u64, end)
    }

    /// Checks that the overlay is there, and that `len` bytes at `at` are on it.
    fn check(&self, at: u64, len: u64) -> Result<ByteRange, Error> {
        self.layer.check()?;
        let range = ByteRange::at(at, len);
        match range.filter(|range| range.end() <= self.capacity()) {
            Some(range) => Ok(range),
            None => panic!("{len} bytes at {at} pass the end of the overlay at {}", self.capacity()),
        }
    }
}

/// Zeros for the edges of a range, each less than a grain.
static ZERO_GRAIN: [u8; 2 * GRAIN] = [0; 2 * GRAIN];

/// The grains that `range` touches.
fn grains_of(range: ByteRange) -> Range<u64> {
    range.start() / GRAIN as u64..range.end().div_ceil(GRAIN as u64)
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

#[cfg(test)]
mod tests;
