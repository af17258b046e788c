//! The byte stream below a connection: two halves that the caller supplies, and the buffered
//! receiver on top of one.
//!
//! What always holds: no byte is lost between handshake and transmission, since both read
//! through the one [`Incoming`]; its memory is fixed.

use std::io;

use crate::error::Error;

/// Enough for a few hundred requests in one system call; larger transfers bypass it.
const RECEIVE_BUFFER_BYTES: usize = 64 << 10;

/// The half of a connection that the client's bytes come from.
///
/// Futures need not be `Send`: a connection is driven by one thread.
#[allow(async_fn_in_trait)]
pub trait ReadHalf {
    /// Reads some bytes into `buf`, which is not empty; 0 means that the client has closed.
    ///
    /// # Errors
    /// Whatever the stream reports; the connection ends, except after
    /// [`io::ErrorKind::Interrupted`].
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize>;
}

/// The half of a connection that takes bytes to the client.
#[allow(async_fn_in_trait)]
pub trait WriteHalf {
    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// Whatever the stream reports; the connection ends.
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Shuts the connection down in both directions (`shutdown(SHUT_RDWR)`), so that a read
    /// pending on the other half ends. Called once, after a failed write.
    fn abort(&mut self);
}

/// Buffered receiver over a [`ReadHalf`].
pub(crate) struct Incoming<R> {
    half: R,
    buf: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<R: ReadHalf> Incoming<R> {
    pub(crate) fn new(half: R) -> Self {
        Incoming { half, buf: vec![0; RECEIVE_BUFFER_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Fills `out`, or tells by `false` that the stream ended before its first byte.
    /// `what` names the message for the error when it ends later.
    pub(crate) async fn fill_or_eof(&mut self, out: &mut [u8], what: &'static str) -> Result<bool, Error> {
        let mut filled = 0;
        while filled < out.len() {
            let rest = &mut out[filled..];
            let got = if self.start < self.end {
                let n = rest.len().min(self.end - self.start);
                rest[..n].copy_from_slice(&self.buf[self.start..self.start + n]);
                self.start += n;
                n
            } else if rest.len() >= self.buf.len() {
                read_some(&mut self.half, rest).await?
            } else {
                self.start = 0;
                self.end = 0;
                self.end = read_some(&mut self.half, &mut self.buf).await?;
                if self.end > 0 {
                    continue;
                }
                0
            };
            if got == 0 {
                return if filled == 0 { Ok(false) } else { Err(Error::Truncated(what)) };
            }
            filled += got;
        }
        Ok(true)
    }

    /// Fills `out`; an end of the stream is an error.
    pub(crate) async fn fill(&mut self, out: &mut [u8], what: &'static str) -> Result<(), Error> {
        if self.fill_or_eof(out, what).await? { Ok(()) } else { Err(Error::Truncated(what)) }
    }

    /// Reads `len` bytes and forgets them, in fixed memory.
    pub(crate) async fn skip(&mut self, len: u32, what: &'static str) -> Result<(), Error> {
        let mut left = u64::from(len);
        while left > 0 {
            if self.start == self.end {
                self.start = 0;
                self.end = 0;
                self.end = read_some(&mut self.half, &mut self.buf).await?;
                if self.end == 0 {
                    return Err(Error::Truncated(what));
                }
            }
            let have = self.end - self.start;
            let step = usize::try_from(left).map_or(have, |left| left.min(have));
            self.start += step;
            left -= step as u64;
        }
        Ok(())
    }
}

async fn read_some<R: ReadHalf>(half: &mut R, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match half.read(buf).await {
            // A half that claims more than it was given room for is a bug of the caller's;
            // the clamp keeps it from becoming a panic here.
            Ok(n) => return Ok(n.min(buf.len())),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
