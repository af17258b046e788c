//! Changed block tracking: which blocks of a disk changed since when.
//!
//! This crate owns the change map (one epoch per block), epochs, generations, change ids and
//! the units that the whole project measures a disk in. It has no idea of threads, of what a
//! snapshot keeps, or of virtio: the engine calls it in the right order.
//!
//! What always holds: a block's cell is at least the epoch of its last write
//! ([`Map::mark`] comes before the data), so an answer may name a block too many and never one too few.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
mod bulk;
#[allow(unsafe_code)]
mod cells;
mod change_id;
mod changes;
mod map;
mod units;

pub use cells::{Cells, SharedCells};
pub use change_id::{ChangeId, Epoch, Generation, ParseChangeIdError};
pub use changes::Changes;
pub use map::{CELLS_PER_PAGE, Map, PAGE_BYTES, PageIndex};
pub use units::{BlockGrid, ByteRange, GridError, SECTOR_BYTES, Sector};
