//! The truth about a disk: the order of effects, snapshots, difference stores, views and recovery.
//!
//! The engine's verbs are straight-line `async` functions over one seam, [`Storage`]. They are driven
//! by io_uring on a host ([`host`]) and by a seeded scheduler in tests (`sim`), so that what is
//! simulated is what runs. It has no idea of virtio, of sockets or of JSON.

#![deny(unsafe_code)]

mod append;
mod area;
mod areas;
mod away;
mod behind;
mod buffers;
mod chain;
pub mod checkpoint;
mod claims;
mod cover;
mod disk;
mod error;
mod flushes;
mod format;
mod freed;
mod gate;
pub mod group;
pub mod handover;
#[allow(unsafe_code)]
pub mod host;
mod index;
pub mod inspect;
mod intent;
mod known;
mod mark;
mod marked;
#[allow(unsafe_code)]
pub mod memory;
mod merge;
mod notes;
mod open;
mod overflow;
mod overlay;
mod picture;
mod preserve;
mod pulse;
mod release;
mod released;
mod reset;
mod resize;
mod rewind;
mod sample;
mod shrink;
#[cfg(feature = "sim")]
pub mod sim;
mod slots;
mod snapshot;
mod status;
mod storage;
mod store;
mod switch;
mod tracker;
mod view;
mod walk;
mod watch;

pub use cbt;

pub use areas::{AreaKind, AreaSpec, OpenedArea};
pub use away::Meanwhile;
pub use behind::{Backlog, cache_share};
pub use checkpoint::{Checkpoint, Past, Until};
pub use disk::{Disk, Event, EventSink};
pub use error::Error;
pub use gate::Lane;
pub use merge::MERGE_STEP;
pub use open::{DiskOptions, OpenReport, ResetReason, StorePlan};
pub use overflow::{OnOverflow, Terms};
pub use overlay::Overlay;
pub use picture::{Cell as PictureCell, Picture, RECENT as RECENT_EPOCHS};
pub use rewind::RewindInfo;
pub use snapshot::Snapshot;
pub use status::{Began, TrackerStatus};
pub use storage::{Durability, Extent, Storage, Zeroing};
pub use store::{AreaInfo, Budget};
pub use tracker::Identity;
pub use view::View;
