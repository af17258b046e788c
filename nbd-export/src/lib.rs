//! An NBD server as a library: the protocol, free of threads and of any one executor.
//!
//! A [`Connection`] owns the two halves of one client's byte stream. Its
//! [`handshake`](Connection::handshake) finds an [`Export`] among the [`Exports`] offered and
//! agrees on features; its [`transmission`](Connection::transmission) then serves requests,
//! many at once, until the client leaves. Both are plain futures: the caller drives them on
//! whatever it has (one thread per connection on its own io_uring, or any `block_on`), and shuts
//! the stream down to end either early: the first at its deadline, the second at any time.
//!
//! What always holds: everything a client sends is checked here, once, before an export hears
//! of it; memory per connection is bounded by [`Limits`], and of all together by a [`Budget`]; a reply is either complete or the
//! connection is over; an export's future is driven to its end, never dropped half-way, unless
//! the caller drops the connection's own future.
//!
//! [`ViewExport`] serves a snapshot's view, [`OverlayExport`] one that can be written, and [`SocketHalf`] carries a connection on an
//! executor's ring; nothing else here knows of them.
//!
//! Absent: TLS (`NBD_OPT_STARTTLS`), extended headers, oldstyle negotiation, resizing, accept loops
//! and threads. The protocol is that of NBD `doc/proto.md`; where it leaves a choice, the place
//! that chooses names its source.

#![forbid(unsafe_code)]

mod budget;
mod buffer;
mod connection;
mod error;
mod export;
mod handshake;
mod meta;
mod options;
mod overlays;
pub mod proto;
mod reply;
mod request;
mod socket;
mod status;
mod stream;
mod transmission;
mod views;

pub use budget::{Budget, OWN_BYTES};
pub use connection::{Connection, Limits};
pub use error::Error;
pub use export::{Context, Errno, Export, ExportError, ExportInfo, Exports, Listing, Refusal, ZeroMode};
pub use handshake::Session;
pub use overlays::OverlayExport;
pub use socket::{Socket, SocketHalf};
pub use status::{Extent, Extents, Status};
pub use stream::{ReadHalf, WriteHalf};
pub use transmission::Ending;
pub use views::{Base, ViewExport};
