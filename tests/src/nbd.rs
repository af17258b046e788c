//! A plain NBD client: one request at a time, at any byte, without what a tool would add.
//!
//! Always: nothing waits without a deadline. Absent: structured replies, and block status.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
/// The request's flag that asks for an answer only when it is durable.
pub const FUA: u16 = 1;

/// A connection to an export (NBD proto.md, "Fixed newstyle negotiation").
#[derive(Debug)]
pub struct Nbd {
    stream: UnixStream,
    /// Size of the export in bytes.
    pub bytes: u64,
    /// Its transmission flags.
    pub flags: u16,
}

impl Nbd {
    /// Connects to `export` of the server at `socket`.
    ///
    /// # Errors
    /// If the server is not there or has no such export.
    pub fn connect(socket: &Path, export: &str) -> Result<Self> {
        let mut stream = UnixStream::connect(socket).context("no NBD server")?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        ensure!(hello.starts_with(b"NBDMAGICIHAVEOPT"), "no newstyle server");
        // Fixed newstyle, no zeroes; then NBD_OPT_EXPORT_NAME.
        stream.write_all(&3u32.to_be_bytes())?;
        stream.write_all(b"IHAVEOPT")?;
        stream.write_all(&1u32.to_be_bytes())?;
        stream.write_all(&u32::try_from(export.len())?.to_be_bytes())?;
        stream.write_all(export.as_bytes())?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).with_context(|| format!("export '{export}' was refused"))?;
        let bytes = u64::from_be_bytes(answer[..8].try_into()?);
        let flags = u16::from_be_bytes(answer[8..].try_into()?);
        Ok(Self { stream, bytes, flags })
    }

    fn request(&mut self, kind: u16, flags: u16, at: u64, len: usize, data: &[u8]) -> Result<u32> {
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend(0x2560_9513u32.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend([7; 8]);
        bytes.extend(at.to_be_bytes());
        bytes.extend(u32::try_from(len)?.to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        ensure!(reply.starts_with(&[0x67, 0x44, 0x66, 0x98]) && reply.ends_with(&[7; 8]), "{reply:x?}");
        Ok(u32::from_be_bytes(reply[4..8].try_into()?))
    }

    fn done(&mut self, kind: u16, flags: u16, at: u64, len: usize, data: &[u8]) -> Result<()> {
        match self.request(kind, flags, at, len, data)? {
            0 => Ok(()),
            code => bail!("command {kind} of {len} bytes at {at} failed with {code}"),
        }
    }

    /// Reads `len` bytes from `at` on.
    ///
    /// # Errors
    /// If the server says so, with its number.
    pub fn read(&mut self, at: u64, len: usize) -> Result<Vec<u8>> {
        self.done(0, 0, at, len, &[])?;
        let mut data = vec![0; len];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes `data` at `at`, with [`FUA`] or without.
    ///
    /// # Errors
    /// If the server says so, with its number.
    pub fn write(&mut self, at: u64, data: &[u8], flags: u16) -> Result<()> {
        self.done(WRITE, flags, at, data.len(), data)
    }

    /// Zeros `len` bytes.
    ///
    /// # Errors
    /// If the server says so, with its number.
    pub fn write_zeroes(&mut self, at: u64, len: usize) -> Result<()> {
        self.done(WRITE_ZEROES, 0, at, len, &[])
    }

    /// Forgets `len` bytes.
    ///
    /// # Errors
    /// If the server says so, with its number.
    pub fn trim(&mut self, at: u64, len: usize) -> Result<()> {
        self.done(TRIM, 0, at, len, &[])
    }

    /// Makes all writes durable.
    ///
    /// # Errors
    /// If the server says so, with its number.
    pub fn flush(&mut self) -> Result<()> {
        self.done(FLUSH, 0, 0, 0, &[])
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let goodbye = [&[0x25, 0x60, 0x95, 0x13, 0, 0][..], &DISCONNECT.to_be_bytes(), &[0; 20]].concat();
        let _ = self.stream.write_all(&goodbye);
    }
}
