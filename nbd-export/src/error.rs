//! How a connection ends when it does not end well.
//!
//! Absent: errors of single requests. Those are [`ExportError`](crate::ExportError)s, they are
//! answered on the wire and the connection goes on.

use std::io;

use crate::export::ExportError;

/// Why a connection is over. None of these concerns another client or the export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The byte stream failed.
    #[error("the NBD connection failed")]
    Io(#[from] io::Error),
    /// The client sent what cannot be answered, for instance a wrong magic number.
    #[error("the NBD client broke the protocol: {0}")]
    Protocol(&'static str),
    /// The stream ended inside a message.
    #[error("the NBD client left in the middle of {0}")]
    Truncated(&'static str),
    /// A read failed of which part was sent already, in a reply that cannot say so any more.
    #[error("an NBD read failed when part of it was sent")]
    HalfSent(#[source] ExportError),
    /// The client chose an export by `NBD_OPT_EXPORT_NAME`, whose only error reply is to
    /// close the connection (proto.md, "Option types").
    #[error("the NBD client cannot have the export it asked for: {0}")]
    Refused(String),
}
