//! The truth about a disk: the order of effects, snapshots, difference stores, views and recovery.
//!
//! The engine's verbs are straight-line `async` functions over one seam, [`Storage`]. They are driven
//! by io_uring on a host ([`host`]) and by a seeded scheduler in tests (`sim`), so that what is
//! simulated is what runs. It has no idea of virtio, of sockets or of JSON.

#![deny(unsafe_code)]

mod append;
mod buffers;
mod chain;
mod claims;
mod disk;
mod error;
mod format;
mod gate;
pub mod group;
#[allow(unsafe_code)]
pub mod host;
mod index;
#[allow(unsafe_code)]
pub mod memory;
mod merge;
mod open;
mod overlay;
mod preserve;
#[cfg(feature = "sim")]
pub mod sim;
mod slots;
mod snapshot;
mod storage;
mod store;
mod tracker;
mod view;

pub use cbt;

pub use disk::{Disk, Event, EventSink};
pub use error::Error;
pub use gate::Lane;
pub use merge::MERGE_STEP;
pub use open::{DiskOptions, OpenReport, ResetReason};
pub use overlay::Overlay;
pub use snapshot::Snapshot;
pub use storage::{Durability, Extent, Storage, Zeroing};
pub use tracker::Identity;
pub use view::View;
