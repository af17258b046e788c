//! One client: its byte stream, and the two phases it goes through.

use std::sync::Arc;

use crate::budget::Budget;
use crate::error::Error;
use crate::export::Exports;
use crate::stream::{Incoming, ReadHalf, WriteHalf};
use crate::transmission::Ending;

/// How much one connection may have in hand. Beyond that its socket is not read. Several together may have less: see
/// [`Budget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests begun and not yet answered.
    pub requests: usize,
    /// Bytes of data buffers, kept ones included, and of block status replies. At least the largest request fits.
    pub data_bytes: usize,
}

impl Default for Limits {
    /// 16 requests, 64 MiB.
    fn default() -> Self {
        Limits { requests: 16, data_bytes: 64 << 20 }
    }
}

/// A client's connection, from its first byte to its last.
///
/// ```no_run
/// # use nbd_export::{Connection, Error, Exports, ReadHalf, WriteHalf};
/// # async fn serve<R: ReadHalf, W: WriteHalf, X: Exports>(r: R, w: W, exports: &X) -> Result<(), Error> {
/// let mut connection = Connection::new(r, w);
/// // Ends by itself; the caller shuts the stream down where it takes too long ...
/// if let Some(session) = connection.handshake(exports).await? {
///     // ... and this one runs until the client leaves or the socket is shut down.
///     connection.transmission(session).await?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct Connection<R, W> {
    pub(crate) incoming: Incoming<R>,
    pub(crate) writer: W,
    pub(crate) limits: Limits,
    pub(crate) budget: Arc<Budget>,
}

impl<R: ReadHalf, W: WriteHalf> Connection<R, W> {
    /// A connection on which nothing was said yet, with the default limits.
    pub fn new(reader: R, writer: W) -> Self {
        Connection::with_limits(reader, writer, Limits::default())
    }

    /// A connection on which nothing was said yet.
    pub fn with_limits(reader: R, writer: W, limits: Limits) -> Self {
        // As much as it may have: no other limit.
        let budget = Arc::new(Budget::new(usize::MAX));
        Connection { incoming: Incoming::new(reader), writer, limits, budget }
    }

    /// The same, with memory that it shares with other connections.
    #[must_use]
    pub fn sharing(self, budget: Arc<Budget>) -> Self {
        Connection { budget, ..self }
    }

    /// Both phases without a deadline; see [`handshake`](Self::handshake) and
    /// [`transmission`](Self::transmission).
    ///
    /// # Errors
    /// As theirs.
    pub async fn serve<X: Exports>(mut self, exports: &X) -> Result<Ending, Error> {
        match self.handshake(exports).await? {
            Some(session) => self.transmission(session).await,
            None => Ok(Ending::Closed),
        }
    }
}
