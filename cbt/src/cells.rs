//! The memory that a change map lives in: 32-bit cells shared with a file.
//!
//! Invariant: the file behind a mapping is fully allocated and at least as long as the mapping
//! (a store into a hole of a full file system, or past the file's end, is a SIGBUS).
//! Absent: meaning. What a cell says is [`crate::Map`]'s business.

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU32;

use memmap2::MmapRaw;

/// Memory for a map's cells. Implemented by [`SharedCells`] and by simulated media.
pub trait Cells: Send + Sync {
    /// All cells, in order. The same memory at every call.
    fn cells(&self) -> &[AtomicU32];
}

impl Cells for Box<[AtomicU32]> {
    fn cells(&self) -> &[AtomicU32] {
        self
    }
}

impl<T: Cells + ?Sized> Cells for std::sync::Arc<T> {
    fn cells(&self) -> &[AtomicU32] {
        (**self).cells()
    }
}

/// Cells in a shared mapping of a file: what is stored survives the end of this process.
#[derive(Debug)]
pub struct SharedCells {
    map: MmapRaw,
    count: usize,
}

impl SharedCells {
    /// Maps `count` cells of `file` from its first byte.
    ///
    /// The caller has allocated the file and keeps others from cutting it short.
    ///
    /// # Errors
    /// Those of `mmap`, and `InvalidInput` if the file is shorter than the cells.
    pub fn map(file: &File, count: usize) -> io::Result<Self> {
        let bytes = count
            .checked_mul(size_of::<AtomicU32>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file is shorter than its map"));
        }
        let map = memmap2::MmapOptions::new().len(bytes).map_raw(file)?;
        // Reading ahead would make resident, for each page that is touched, thirty that nobody ever marked.
        map.advise(memmap2::Advice::Random)?;
        Ok(Self { map, count })
    }

    /// Keeps the pages of the first `count` cells in memory while this is mapped, also what could not be written back.
    ///
    /// # Errors
    /// Those of `mlock`: there is a limit (`RLIMIT_MEMLOCK`).
    pub fn hold(&self, count: usize) -> io::Result<()> {
        let bytes = size_of_val(&self.cells()[..count]);
        // SAFETY: the range lies in the mapping, which lives as long as `self`; the call changes nothing in it.
        // JUSTIFICATION: memmap2 can lock a whole mapping only, and a map is as long as the disk asks for.
        Ok(unsafe { rustix::mm::mlock(self.map.as_mut_ptr().cast(), bytes) }?)
    }

    /// Writes changed pages back to the file and its medium (`msync` and wait).
    pub fn sync(&self) -> io::Result<()> {
        self.map.flush()
    }
}

impl Cells for SharedCells {
    fn cells(&self) -> &[AtomicU32] {
        // SAFETY: the mapping is page-aligned, readable and writable, `count` cells long (checked
        // in `map`), and lives as long as `self`. AtomicU32 has the layout of u32 and every bit
        // pattern is valid; other processes may store into it only as atomics do.
        // JUSTIFICATION: marks must be in the file's page cache the moment they are made, so that
        // they survive the end of the process; a copy in private memory would not.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU32>(), self.count) }
    }
}
