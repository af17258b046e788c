//! The control plane of Ebbtide: QMP on a Unix socket.
//!
//! Backup programs, operators and the `ebbtide` command line speak to the daemon here. The
//! wire is QEMU's ([`wire`]), so `qmp-shell`, `qemu.qmp`, `socat` and Rust `qapi` clients
//! work unchanged; verbs keep QEMU's names where QEMU has the same verb ([`commands`]).
//!
//! ```text
//! socket ─► listener ─► server ─► wire ─► arguments ─► dispatch ─► Service (the daemon)
//!    ▲                     │
//!    └──────── outbox ◄────┴──── EventHub ◄── any thread of the daemon
//! ```
//!
//! What always holds: every byte from a client is input, bounded in size, nesting and time;
//! a client can hurt nobody but itself; whoever posts an event never waits.
//!
//! Absent: the engine. This crate knows names, numbers and texts only; the daemon turns them
//! into disks and snapshots behind [`service::Service`]. Absent too: any check of *who* asks.
//! The socket's mode 0600 is the access control.

#![forbid(unsafe_code)]

mod arguments;
pub mod client;
pub mod commands;
mod dispatch;
pub mod events;
pub mod listener;
mod outbox;
pub mod paths;
pub mod render;
mod request;
pub mod server;
pub mod service;
pub mod wire;

pub use client::{Client, ClientError};
pub use events::{Event, EventHub};
pub use listener::Listener;
pub use server::{Options, Server};
pub use service::{CommandError, ErrorClass, Service};
