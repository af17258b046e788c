//! What an overlay keeps: its files, and who may work on which grain.
//!
//! Invariant: a layer's head is made last and removed first, so files without a head belong to nothing.
//! Absent: the view below ([`super::Overlay`] brings both together) and which layers there are
//! ([`super::registry`]).

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

use cbt::ByteRange;

use super::head::{self, Head};
use super::owned::Owned;
use crate::claims::Claims;
use crate::disk::with_sources;
use crate::error::Error;
use crate::flushes::Flushes;
use crate::format::{GRAIN, PAGE};
use crate::gate::Gate;
use crate::memory::{AlignedBuf, Source, Target};
use crate::storage::{Storage, Zeroing};

/// Zeros that are written at once where the file system cannot zero a range.
const ZEROS: usize = 256 << 10;

/// See the module.
pub(crate) struct Layer<S: Storage> {
    pub(super) head: Head,
    pub(super) owned: Owned<S::Cells>,
    /// Grains that someone is taking over from the view.
    pub(super) claims: Claims,
    /// Changes pass it; closed when the disk is.
    pub(super) gate: Gate,
    head_file: S::File,
    data: S::File,
    /// Grains owned when the cells were last made durable.
    synced: AtomicU64,
    flushes: Flushes,
    discarded: AtomicBool,
    poisoned: AtomicBool,
}

impl<S: Storage> Layer<S> {
    /// Makes the files of a new overlay, the head last.
    pub(super) async fn create(io: &S, dir: &S::Dir, head: Head) -> Result<Self, Error> {
        // What an unlucky removal may have left under this number belongs to nothing.
        remove_files(io, dir, head.number)?;
        let made = Self::make(io, dir, head.clone()).await;
        if made.is_err()
            && let Err(error) = remove_files(io, dir, head.number)
        {
            log::warn!("overlay '{}' was not made: {}", head.name, with_sources(&error));
        }
        made
    }

    async fn make(io: &S, dir: &S::Dir, head: Head) -> Result<Self, Error> {
        let fail = || Error::io("creating the overlay's files");
        let data = io.create(dir, &head::data_file(head.number)).map_err(fail())?;
        // As long as the disk and without content: a read of a grain never passes the end.
        let at = head.capacity.saturating_sub(1);
        io.write(&data, at, Source::of(&[0])).await.map_err(fail())?;
        let cells_file = io.create(dir, &head::cells_file(head.number)).map_err(fail())?;
        let count = Owned::<S::Cells>::cells_needed(head.capacity);
        // Allocated to its end: a store into a hole of a full file system would end the process.
        io.allocate(&cells_file, bytes_of(count)).map_err(fail())?;
        let cells = io.map(&cells_file, count).map_err(fail())?;
        let head_file = io.create(dir, &head::head_file(head.number)).map_err(fail())?;
        let layer = Self::from_parts(head, head_file, data, cells);
        layer.write_head(io, false).await?;
        Ok(layer)
    }

    /// Reads an overlay's head; `None` if the overlay was never made whole.
    pub(super) async fn load_head(
        io: &S,
        dir: &S::Dir,
        number: u32,
    ) -> Result<Option<(Head, S::File)>, Error> {
        let fail = || Error::io("reading the head of an overlay");
        let file = match io.open(dir, &head::head_file(number)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(fail())?,
        };
        if io.len(&file).map_err(fail())? < PAGE as u64 {
            return Ok(None);
        }
        let mut page = [0; PAGE];
        io.read(&file, 0, Target::of(&mut page)).await.map_err(fail())?;
        let found = Head::from_page(&page).filter(|head| head.number == number);
        let head = found.ok_or(Error::Corrupt { what: "the head of an overlay", at: 0 })?;
        Ok(Some((head, file)))
    }

    /// Takes up an overlay whose head was believed.
    pub(super) fn load(io: &S, dir: &S::Dir, head: Head, head_file: S::File) -> Result<Self, Error> {
        let fail = || Error::io("opening the overlay's files");
        let data = io.open(dir, &head::data_file(head.number)).map_err(fail())?;
        if io.len(&data).map_err(fail())? != head.capacity {
            return Err(Error::Corrupt { what: "the end of an overlay's data", at: head.capacity });
        }
        let cells_file = io.open(dir, &head::cells_file(head.number)).map_err(fail())?;
        let count = Owned::<S::Cells>::cells_needed(head.capacity);
        if io.len(&cells_file).map_err(fail())? != bytes_of(count) {
            return Err(Error::Corrupt { what: "the end of an overlay's cells", at: bytes_of(count) });
        }
        // Someone may have copied it with holes.
        io.allocate(&cells_file, bytes_of(count)).map_err(fail())?;
        let cells = io.map(&cells_file, count).map_err(fail())?;
        Ok(Self::from_parts(head, head_file, data, cells))
    }

    fn from_parts(head: Head, head_file: S::File, data: S::File, cells: S::Cells) -> Self {
        Self {
            head,
            owned: Owned::new(cells),
            claims: Claims::default(),
            gate: Gate::new(),
            head_file,
            data,
            // What an earlier process set may not be durable.
            synced: AtomicU64::new(u64::MAX),
            flushes: Flushes::default(),
            discarded: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Writes the head, durably if it says that everything else is.
    pub(super) async fn write_head(&self, io: &S, clean: bool) -> Result<(), Error> {
        let fail = || Error::io("writing the head of an overlay");
        let page = Head { clean, ..self.head.clone() }.to_page();
        io.write(&self.head_file, 0, Source::of(&page[..])).await.map_err(fail())
    }

    /// Makes the head as it was last written durable.
    pub(super) async fn sync_head(&self, io: &S) -> Result<(), Error> {
        io.sync(&self.head_file).await.map_err(Error::io("flushing the head of an overlay"))
    }

    /// Refuses work on an overlay that was discarded.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.discarded.load(SeqCst) {
            return Err(Error::OverlayClosed { name: self.head.name.clone() });
        }
        Ok(())
    }

    /// Tells whoever still holds the overlay that it is gone, or that it is not.
    pub(super) fn set_discarded(&self, discarded: bool) {
        self.discarded.store(discarded, SeqCst);
    }

    /// Reads from grains that are the overlay's.
    pub(super) async fn read(&self, io: &S, at: u64, into: Target<'_>) -> Result<(), Error> {
        io.read(&self.data, at, into).await.map_err(Error::io("reading the overlay's data"))
    }

    /// Writes bytes of grains that are the overlay's, or that the caller has claimed.
    pub(super) async fn write(&self, io: &S, at: u64, from: Source<'_>) -> Result<(), Error> {
        io.write(&self.data, at, from).await.map_err(Error::io("writing the overlay's data"))
    }

    /// Zeros by the file system's means, else by writing zeros.
    pub(super) async fn zero(&self, io: &S, range: ByteRange, zeroing: Zeroing) -> Result<(), Error> {
        let unsupported = |error: &std::io::Error| error.kind() == std::io::ErrorKind::Unsupported;
        let mut result = io.zero(&self.data, range, zeroing).await;
        if zeroing == Zeroing::Unmap && result.as_ref().is_err_and(unsupported) {
            result = io.zero(&self.data, range, Zeroing::Keep).await;
        }
        if !result.as_ref().is_err_and(unsupported) {
            return result.map_err(Error::io("zeroing a range of the overlay"));
        }
        let zeros = AlignedBuf::zeroed(ZEROS);
        let mut at = range.start();
        while at < range.end() {
            let len = (range.end() - at).min(ZEROS as u64);
            let part = Source::of(&zeros[..usize::try_from(len).unwrap_or(ZEROS)]);
            self.write(io, at, part).await?;
            at += len;
        }
        Ok(())
    }

    /// Data and holes of grains that are the overlay's.
    pub(super) fn extents(&self, io: &S, range: ByteRange) -> Result<Vec<crate::Extent>, Error> {
        let extents = io.extents(&self.data, range).map_err(Error::io("asking the overlay for its holes"))?;
        Ok(extents.into_iter().map(|extent| extent.within(range)).collect())
    }

    /// Makes every change that was answered before this durable: data, then the cells that point to it.
    pub(super) async fn flush(&self, io: &S) -> Result<(), Error> {
        self.flushes
            .flush(async || {
                if self.poisoned.load(SeqCst) {
                    return Err(Error::Poisoned);
                }
                let synced = io.sync(&self.data).await;
                self.note(synced, "flushing the overlay's data")?;
                self.sync_cells(io)
            })
            .await
    }

    /// Makes the cells durable, if a bit was set since they last were.
    fn sync_cells(&self, io: &S) -> Result<(), Error> {
        let count = self.owned.count();
        if self.synced.load(SeqCst) != count {
            self.note(io.sync_cells(self.owned.cells()), "flushing the overlay's cells")?;
            self.synced.store(count, SeqCst);
        }
        Ok(())
    }

    /// Once a flush has failed none is believed: the kernel may have dropped what it could not write.
    fn note(&self, flushed: std::io::Result<()>, what: &'static str) -> Result<(), Error> {
        flushed.map_err(|source| {
            self.owned.note_flush_failed(true);
            self.poisoned.store(true, SeqCst);
            log::error!(
                "overlay '{}': {what} failed, no flush can be trusted any more: {source}",
                self.head.name
            );
            Error::Io { what, source }
        })
    }

    /// Waits for changes in flight, for good, and makes everything durable; then the head says so.
    pub(super) async fn finish(&self, io: &S) -> Result<(), Error> {
        self.gate.close().await;
        self.flush(io).await?;
        if self.owned.flush_failed() {
            return Err(Error::Poisoned);
        }
        self.write_head(io, true).await?;
        self.sync_head(io).await
    }
}

/// Removes an overlay's head: from then on there is no such overlay.
pub(super) fn remove_head<S: Storage>(io: &S, dir: &S::Dir, number: u32) -> Result<(), Error> {
    remove(io, dir, &head::head_file(number))
}

/// Removes all files of an overlay, the head first: what is left then belongs to nothing.
pub(crate) fn remove_files<S: Storage>(io: &S, dir: &S::Dir, number: u32) -> Result<(), Error> {
    remove_head(io, dir, number)?;
    remove(io, dir, &head::data_file(number))?;
    remove(io, dir, &head::cells_file(number))
}

fn remove<S: Storage>(io: &S, dir: &S::Dir, file: &str) -> Result<(), Error> {
    match io.remove(dir, file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(Error::io("removing an overlay's files")),
    }
}

/// Bytes of the cells' file of an overlay of `capacity` bytes.
pub(crate) fn len_of_cells<C: cbt::Cells>(capacity: u64) -> u64 {
    bytes_of(Owned::<C>::cells_needed(capacity))
}

fn bytes_of(cells: usize) -> u64 {
    (cells * size_of::<u32>()) as u64
}

const _: () = assert!(PAGE == GRAIN, "a head is written as one page, which no stop tears");
