//! A vhost-user-blk device: its messages, rings, guest memory and requests.
//!
//! [`Device`] serves one disk to one front end at a time, over a [`Backend`]. Everything a guest or
//! a front end says is checked here, once; the backend gets ranges inside the disk and memory that
//! stays mapped. This crate's library has no idea of snapshots or of change tracking.

#![deny(unsafe_code)]

mod backend;
mod config;
mod counters;
mod device;
mod engine;
mod events;
#[allow(unsafe_code)]
mod guest_mem;
mod options;
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
