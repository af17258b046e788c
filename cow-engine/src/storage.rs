//! The seam under the engine: files, transfers and time, on a host or simulated.
//!
//! The engine's verbs are written once over this trait. [`crate::host`] drives them on io_uring;
//! the simulator drives the same code on a medium that loses, tears and reorders what was not
//! synced, fails any operation and stops at any step.
//!
//! What an implementation promises:
//! - A transfer is whole or an error: short reads and writes are resumed below this seam.
//! - When [`Storage::write`] has answered, every later read of the file sees it, and it survives the
//!   end of this process. It survives the end of the host only after [`Storage::sync`], or if it
//!   was durable.
//! - Futures are dropped only when their operation has ended: memory they borrow is not touched
//!   afterwards. They must not be leaked (`mem::forget`) while pending.

use std::future::Future;
use std::io;
use std::time::Duration;

use cbt::{ByteRange, Cells};

use crate::areas::OpenedArea;
use crate::memory::{Source, Target};

/// Whether a guest's change is on the medium, or only in its cache, when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// In the cache: a later flush makes it durable.
    Cached,
    /// On the medium (what FUA means).
    Durable,
}

/// What becomes of the space of a range that shall read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Give the space back.
    Unmap,
    /// Keep the space allocated, so that a later write cannot run out of it.
    Keep,
}

/// Whether a range of a file holds data, as far as the file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where, in bytes.
    pub range: ByteRange,
    /// Whether it is a hole, which reads as zeros.
    pub hole: bool,
}

impl Extent {
    /// The part of it that lies in `range`.
    pub(crate) fn within(self, range: ByteRange) -> Self {
        Self { range: self.range.intersect(range), ..self }
    }
}

/// Files, transfers and time. One value per thread; files are shared between threads.
pub trait Storage: Clone + 'static {
    /// An open file or device.
    type File: Send + Sync + 'static;
    /// A directory that holds a disk's state.
    type Dir: Send + Sync + 'static;
    /// The shared mapping of a file of cells.
    type Cells: Cells + 'static;

    /// Fills `into` from byte `at` of `file`. Past the end of the file is an error.
    fn read(&self, file: &Self::File, at: u64, into: Target<'_>) -> impl Future<Output = io::Result<()>>;

    /// Writes `from` at byte `at`, extending the file if need be. A later [`Storage::sync`] makes it durable.
    fn write(&self, file: &Self::File, at: u64, from: Source<'_>) -> impl Future<Output = io::Result<()>>;

    /// Makes all answered writes of `file` durable (`fdatasync`).
    fn sync(&self, file: &Self::File) -> impl Future<Output = io::Result<()>>;

    /// Begins to write back what was written to `range`, without waiting. A hint: nothing is promised
    /// before [`Storage::sync`].
    fn write_behind(&self, file: &Self::File, range: ByteRange) -> io::Result<()>;

    /// Writes back what was written to `range`, and waits for that. Blocks the thread; errors as of
    /// [`Storage::drop_behind`].
    fn write_out(&self, file: &Self::File, range: ByteRange) -> io::Result<()>;

    /// Waits until what was written to `range` is on its way, and lets the cache forget it. Blocks the
    /// thread. An error of the medium that is told here is not told again by [`Storage::sync`].
    fn drop_behind(&self, file: &Self::File, range: ByteRange) -> io::Result<()>;

    /// Makes `range` read as zeros. `Unsupported` if this file cannot do it without writing zeros.
    fn zero(
        &self,
        file: &Self::File,
        range: ByteRange,
        zeroing: Zeroing,
    ) -> impl Future<Output = io::Result<()>>;

    /// Data and holes of `range`, in order, without gaps; may join or split what it likes. The last one may pass the
    /// end of the range, as far as what follows is known.
    fn extents(&self, file: &Self::File, range: ByteRange) -> io::Result<Vec<Extent>>;

    /// Length of the file in bytes.
    fn len(&self, file: &Self::File) -> io::Result<u64>;

    /// Makes the file `len` bytes long; what is added reads as zeros. `Unsupported` for a block device.
    fn set_len(&self, file: &Self::File, len: u64) -> io::Result<()>;

    /// Extends the file to `len` bytes with all its space allocated.
    fn allocate(&self, file: &Self::File, len: u64) -> io::Result<()>;

    /// Maps `count` cells from the start of `file`, which is allocated that far.
    fn map(&self, file: &Self::File, count: usize) -> io::Result<Self::Cells>;

    /// Keeps the pages of a mapping's first `count` cells in memory while it is mapped, also what could not be
    /// written back.
    fn hold_cells(&self, cells: &Self::Cells, count: usize) -> io::Result<()>;

    /// Writes a mapping's changed cells back and makes them durable.
    fn sync_cells(&self, cells: &Self::Cells) -> io::Result<()>;

    /// Makes a new empty file; `AlreadyExists` if there is one of this name.
    fn create(&self, dir: &Self::Dir, name: &str) -> io::Result<Self::File>;

    /// Opens a file of a directory; `NotFound` if there is none.
    fn open(&self, dir: &Self::Dir, name: &str) -> io::Result<Self::File>;

    /// Removes a file's name; open files of it go on.
    fn remove(&self, dir: &Self::Dir, name: &str) -> io::Result<()>;

    /// The names in a directory.
    fn list(&self, dir: &Self::Dir) -> io::Result<Vec<String>>;

    /// Opens what `path` leads to, for an area of a difference store: a file, a block device that nobody else
    /// uses, or the file `name` of a directory. With `make` a file that is missing is made, durably.
    fn open_area(&self, path: &str, name: &str, make: bool) -> io::Result<OpenedArea<Self::File>>;

    /// Makes names made and removed in `dir` durable.
    fn sync_dir(&self, dir: &Self::Dir) -> io::Result<()>;

    /// Waits.
    fn sleep(&self, time: Duration) -> impl Future<Output = ()>;
}
