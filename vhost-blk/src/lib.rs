//! A vhost-user-blk device: its messages, rings, guest memory and requests.
//!
//! [`Device`] serves one disk to one front end at a time, over a [`Backend`]. Everything a guest or
//! a front end says is checked here, once; the backend gets ranges inside the disk and memory that
//! stays mapped. This crate's library has no idea of snapshots or of change tracking.

#![deny(unsafe_code)]

// vhost-user has the machine's byte order, virtio is little-endian: told apart nowhere here.
const _: () = assert!(cfg!(target_endian = "little"), "ebbtide runs on little-endian machines");

mod backend;
mod channel;
mod config;
mod counters;
mod device;
mod engine;
mod events;
#[allow(unsafe_code)]
mod faults;
#[allow(unsafe_code)]
mod guest_mem;
mod options;
mod overlay;
mod request;
#[allow(unsafe_code)]
mod ring;
mod session;
#[allow(unsafe_code)]
mod threads;
mod worker;

pub use backend::Backend;
pub use counters::Counters;
pub use device::{Connection, Device, DeviceError};
pub use options::{Cache, DiscardMode, LogicalBlock, MAX_QUEUES, Options, OptionsError};
