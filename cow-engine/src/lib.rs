//! The truth about a disk: the order of effects, snapshots, difference stores, views and recovery.
//!
//! The engine's verbs are straight-line `async` functions over one seam, [`Storage`]. They are driven
//! by io_uring on a host ([`host`]) and by a seeded scheduler in tests (`sim`), so that what is
//! simulated is what runs. It has no idea of virtio, of sockets or of JSON.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod host;
#[allow(unsafe_code)]
pub mod memory;
pub mod storage;
pub mod tracker;

pub use cbt;
pub use storage::Storage;
