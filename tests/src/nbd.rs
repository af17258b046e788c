//! A small NBD client, written from the protocol and not from the server.
//!
//! Source: NBD `doc/proto.md`: fixed newstyle negotiation, `NBD_OPT_GO`, simple replies.
//! Always: no call waits longer than [`PATIENCE`] for a byte. Absent: structured replies and meta
//! contexts; what changed is asked on the control socket.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::server::reach;
use crate::vhost_client::PATIENCE;

/// Bytes that one request asks for.
const REQUEST_BYTES: usize = 1 << 20;
/// Requests in flight while a whole export is read.
const WINDOW: usize = 4;

const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const FAILED: u32 = 1 << 31;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

/// The flag of a request that asks for an answer only when it is durable.
pub const FUA: u16 = 1;

/// Why there is no data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server does not give out this export; the option reply's type.
    #[error("the export is refused: {0:#x}")]
    Refused(u32),
    /// A request failed with this errno of the protocol; `EIO` is 5.
    #[error("a request failed: errno {0}")]
    Errno(u32),
    /// The connection failed or ended.
    #[error("nbd: {0}")]
    Io(#[from] std::io::Error),
    /// What came is not NBD.
    #[error("nbd: not understood: {0}")]
    Protocol(&'static str),
}

/// A result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An export that is open.
#[derive(Debug)]
pub struct Nbd {
    stream: UnixStream,
    size: u64,
    flags: u16,
}

impl Nbd {
    /// Opens `export` of the server at `path`.
    ///
    /// # Errors
    /// [`Error::Refused`] if there is no such export.
    pub fn open(path: &Path, export: &str) -> Result<Self> {
        let stream = reach(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut client = Self { stream, size: 0, flags: 0 };
        let greeting: [u8; 18] = client.take()?;
        if greeting[..16] != *b"NBDMAGICIHAVEOPT" {
            return Err(Error::Protocol("the greeting"));
        }
        // Fixed newstyle, no padding.
        client.stream.write_all(&3_u32.to_be_bytes())?;
        client.go(export)?;
        Ok(client)
    }

    fn go(&mut self, export: &str) -> Result<()> {
        let name = u32::try_from(export.len()).map_err(|_| Error::Protocol("so long a name"))?;
        let mut option = b"IHAVEOPT".to_vec();
        option.extend(OPTION_GO.to_be_bytes());
        option.extend((name + 6).to_be_bytes());
        option.extend(name.to_be_bytes());
        option.extend(export.as_bytes());
        option.extend([0; 2]);
        self.stream.write_all(&option)?;
        loop {
            let header: [u8; 20] = self.take()?;
            let (kind, len) = (be32(&header[12..]), be32(&header[16..]));
            let mut body = vec![0; usize::try_from(len.min(1 << 16)).unwrap_or(0)];
            self.stream.read_exact(&mut body)?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO if body.len() == 12 && body[..2] == [0, 0] => {
                    self.size = be64(&body[2..]);
                    self.flags = u16::from_be_bytes([body[10], body[11]]);
                }
                REPLY_INFO => {}
                kind if kind & FAILED != 0 => return Err(Error::Refused(kind)),
                _ => return Err(Error::Protocol("an option reply")),
            }
        }
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its transmission flags.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Writes `data` at `offset`, with [`FUA`] or without.
    ///
    /// # Errors
    /// [`Error::Errno`] if the server answers that it cannot.
    pub fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> Result<()> {
        let len = u32::try_from(data.len()).map_err(|_| Error::Protocol("so long a write"))?;
        self.change(WRITE, flags, offset, len, data)
    }

    /// Zeros `len` bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Errno`] if the server answers that it cannot.
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<()> {
        self.change(WRITE_ZEROES, 0, offset, len, &[])
    }

    /// Gives `len` bytes from `offset` on back.
    ///
    /// # Errors
    /// [`Error::Errno`] if the server answers that it cannot.
    pub fn trim(&mut self, offset: u64, len: u32) -> Result<()> {
        self.change(TRIM, 0, offset, len, &[])
    }

    /// Makes all answered writes durable.
    ///
    /// # Errors
    /// [`Error::Errno`] if the server answers that it cannot.
    pub fn flush(&mut self) -> Result<()> {
        self.change(FLUSH, 0, 0, 0, &[])
    }

    fn change(&mut self, command: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Result<()> {
        self.send(command, flags, offset, len)?;
        self.stream.write_all(data)?;
        match self.answer()? {
            cookie if cookie == offset => Ok(()),
            _ => Err(Error::Protocol("a reply to nothing")),
        }
    }

    /// Reads `len` bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Errno`] if the server answers that it cannot.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>> {
        self.ask(offset, len)?;
        match self.take_answer(len)? {
            (asked, data) if asked == offset => Ok(data),
            _ => Err(Error::Protocol("a reply to nothing")),
        }
    }

    /// Takes the next answer to a request for `len` bytes: where from, and what.
    ///
    /// # Errors
    /// [`Error::Errno`] if the server answers that it cannot.
    pub fn take_answer(&mut self, len: u32) -> Result<(u64, Vec<u8>)> {
        let offset = self.answer()?;
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok((offset, data))
    }

    /// Reads all of it, with some requests in flight, answered in any order.
    ///
    /// # Errors
    /// As [`Nbd::read`]; the first error counts.
    pub fn read_all(&mut self) -> Result<Vec<u8>> {
        let size = usize::try_from(self.size).map_err(|_| Error::Protocol("so large an export"))?;
        let mut data = vec![0; size];
        let mut parts = (0..self.size).step_by(REQUEST_BYTES).peekable();
        let mut waiting = BTreeSet::new();
        while parts.peek().is_some() || !waiting.is_empty() {
            for offset in parts.by_ref().take(WINDOW - waiting.len()) {
                let len = (self.size - offset).min(REQUEST_BYTES as u64);
                self.ask(offset, u32::try_from(len).expect("a part is small"))?;
                waiting.insert(offset);
            }
            let offset = self.answer()?;
            if !waiting.remove(&offset) {
                return Err(Error::Protocol("a reply to nothing"));
            }
            let from = usize::try_from(offset).expect("within the data");
            let to = size.min(from + REQUEST_BYTES);
            self.stream.read_exact(&mut data[from..to])?;
        }
        Ok(data)
    }

    /// Asks for `len` bytes from `offset` on. Who only asks takes no answer.
    ///
    /// # Errors
    /// If the connection failed.
    pub fn ask(&mut self, offset: u64, len: u32) -> Result<()> {
        self.send(READ, 0, offset, len)
    }

    /// Sends a request's head; its cookie is its offset.
    fn send(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> Result<()> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        Ok(self.stream.write_all(&request)?)
    }

    /// Takes the head of a good answer, and says which cookie it has.
    fn answer(&mut self) -> Result<u64> {
        let header: [u8; 16] = self.take()?;
        if be32(&header) != 0x6744_6698 {
            return Err(Error::Protocol("a reply's magic"));
        }
        match be32(&header[4..]) {
            0 => Ok(be64(&header[8..])),
            errno => Err(Error::Errno(errno)),
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // A server that is gone does not mind.
        let _ = self.send(DISCONNECT, 0, 0, 0);
    }
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}
