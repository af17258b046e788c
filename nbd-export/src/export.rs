//! What the server serves: the traits that exports implement, and how they fail.
//!
//! What always holds when an [`Export`] is called: the range is not empty and lies within its
//! size, data requests are at most [`MAX_BLOCK_BYTES`](crate::proto::MAX_BLOCK_BYTES) long,
//! and a read-only export is never asked to write. Several calls may be pending at once, in
//! any order.
//!
//! Absent: exports themselves.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use crate::proto;
use crate::status::Extents;

/// The exports that a server offers. Looked at during handshakes only.
///
/// Futures need not be `Send`: a connection is driven by one thread.
#[allow(async_fn_in_trait)]
pub trait Exports {
    /// One connection's hold on an export, for instance an `Arc` of a view.
    type Export: Export;

    /// The export called `name`, which is never empty.
    ///
    /// May be called several times during one handshake; what is not used is dropped.
    ///
    /// # Errors
    /// A [`Refusal`], which is told to the client.
    async fn find(&self, name: &str) -> Result<Self::Export, Refusal>;

    /// All exports, in the order to show them.
    fn list(&self) -> Vec<Listing>;

    /// Name of the export that a client gets which names none; the only one, unless
    /// implemented otherwise.
    fn default_name(&self) -> Option<String> {
        match <[Listing; 1]>::try_from(self.list()) {
            Ok([only]) => Some(only.name),
            Err(_) => None,
        }
    }
}

/// One line of the list of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The export's name, at most 4096 bytes.
    pub name: String,
    /// For humans; may be empty.
    pub description: String,
}

/// Why a client cannot have an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is none of this name. The client is told which there are.
    Unknown,
    /// It may not, or not now, and this sentence says why.
    Policy(String),
    /// The server is going away.
    Shutdown,
}

/// What a client may know of an export before it reads from it. Fixed while in use.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Canonical name, at most 4096 bytes.
    pub name: String,
    /// For humans; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Writes, trims and write-zeroes are refused before the export hears of them.
    pub read_only: bool,
    /// All connections see the same bytes, and a flush on one covers all; clients then open
    /// several.
    pub can_multi_conn: bool,
    /// Trims are offered. Only if not read-only.
    pub can_trim: bool,
    /// Write-zeroes are offered. Only if not read-only.
    pub can_write_zeroes: bool,
    /// [`ZeroMode::fast_only`] is offered. Only with write-zeroes.
    pub can_fast_zero: bool,
    /// Unit in which access is efficient, for instance a grain; a power of two from 512 to
    /// 32 MiB, and brought to one if it is not.
    pub preferred_block_bytes: u32,
    /// Names `NAME` of the contexts `qemu:dirty-bitmap:NAME`: distinct, not empty, the whole at
    /// most 4096 bytes.
    pub bitmaps: Vec<String>,
}

impl ExportInfo {
    /// A read-only export that several connections may share.
    pub fn read_only(name: impl Into<String>, size_bytes: u64) -> Self {
        ExportInfo {
            name: name.into(),
            description: String::new(),
            size_bytes,
            read_only: true,
            can_multi_conn: true,
            can_trim: false,
            can_write_zeroes: false,
            can_fast_zero: false,
            preferred_block_bytes: 4096,
            bitmaps: Vec::new(),
        }
    }

    /// A writable export with trim and write-zeroes, for one connection at a time.
    pub fn writable(name: impl Into<String>, size_bytes: u64) -> Self {
        ExportInfo {
            read_only: false,
            can_multi_conn: false,
            can_trim: true,
            can_write_zeroes: true,
            ..ExportInfo::read_only(name, size_bytes)
        }
    }

    /// Transmission flags (proto.md, "Transmission flags"). Flush, FUA and cache are always
    /// offered, on read-only exports too, as QEMU does.
    pub(crate) fn transmission_flags(&self, structured: bool) -> u16 {
        let writable = !self.read_only;
        let zeroes = writable && self.can_write_zeroes;
        let mut flags =
            proto::FLAG_HAS_FLAGS | proto::FLAG_SEND_FLUSH | proto::FLAG_SEND_FUA | proto::FLAG_SEND_CACHE;
        for (set, flag) in [
            (self.read_only, proto::FLAG_READ_ONLY),
            (structured, proto::FLAG_SEND_DF),
            (self.can_multi_conn, proto::FLAG_CAN_MULTI_CONN),
            (writable && self.can_trim, proto::FLAG_SEND_TRIM),
            (zeroes, proto::FLAG_SEND_WRITE_ZEROES),
            (zeroes && self.can_fast_zero, proto::FLAG_SEND_FAST_ZERO),
        ] {
            if set {
                flags |= flag;
            }
        }
        flags
    }

    /// The preferred block size, made what the protocol demands of it.
    pub(crate) fn preferred_on_wire(&self) -> u32 {
        self.preferred_block_bytes.clamp(512, proto::MAX_BLOCK_BYTES).next_power_of_two()
    }
}

/// What block status is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: [`Status::DATA`](crate::Status::DATA), `ZERO` or `HOLE`.
    Allocation,
    /// `qemu:dirty-bitmap:NAME`, by the index of the name in [`ExportInfo::bitmaps`]:
    /// [`Status::CLEAN`](crate::Status::CLEAN) or `DIRTY`.
    Bitmap(usize),
}

/// How zeros are to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Durable before the answer.
    pub fua: bool,
    /// The range must stay or become allocated.
    pub no_hole: bool,
    /// Fail with [`Errno::NotSup`], at once, unless faster than writing zeros.
    pub fast_only: bool,
}

/// An image that clients read, and perhaps write. See the module for what always holds.
///
/// Futures need not be `Send`: a connection is driven by one thread.
#[allow(async_fn_in_trait)]
pub trait Export {
    /// Name, size and abilities.
    fn info(&self) -> &ExportInfo;

    /// Fills `buf` with the bytes from `offset`. `buf` starts at a multiple of 4096.
    ///
    /// # Errors
    /// Its message reaches the client if structured replies were negotiated.
    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError>;

    /// Writes `data` at `offset`; `fua`: durable before the answer.
    ///
    /// # Errors
    /// As [`read`](Export::read). Unless implemented, [`Errno::Perm`].
    async fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        let _ = (offset, data, fua);
        Err(ExportError::new(Errno::Perm, "this export cannot be written"))
    }

    /// Makes `range` read as zeros.
    ///
    /// # Errors
    /// As [`write`](Export::write).
    async fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Result<(), ExportError> {
        let _ = (range, mode);
        Err(ExportError::new(Errno::Perm, "this export cannot be written"))
    }

    /// Forgets `range`: a hint.
    ///
    /// # Errors
    /// As [`write`](Export::write).
    async fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
        let _ = (range, fua);
        Err(ExportError::new(Errno::Perm, "this export cannot be written"))
    }

    /// Makes every write answered before durable. Nothing to do unless implemented.
    ///
    /// # Errors
    /// As [`read`](Export::read).
    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    /// Prepares for reads of `range`: a hint. Nothing to do unless implemented.
    ///
    /// # Errors
    /// As [`read`](Export::read).
    async fn cache(&self, range: Range<u64>) -> Result<(), ExportError> {
        let _ = range;
        Ok(())
    }

    /// Pushes to `out` what `context` says of `range`, from its start, until all is covered
    /// or [`Extents::push`] wants no more. Covering less is allowed, nothing at all is not.
    ///
    /// # Errors
    /// As [`read`](Export::read).
    async fn status(&self, context: Context, range: Range<u64>, out: &mut Extents)
    -> Result<(), ExportError>;
}

/// The error values of the protocol (proto.md, "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errno {
    /// Not permitted: a write to something read-only.
    Perm,
    /// Input or output failed; a broken snapshot.
    Io,
    /// Out of memory.
    NoMem,
    /// The request makes no sense.
    Inval,
    /// No space, or past the end of the export.
    NoSpc,
    /// Too large to answer in one piece.
    Overflow,
    /// Not supported in the way asked for.
    NotSup,
    /// The server or the export is going away.
    Shutdown,
}

impl Errno {
    /// The number on the wire.
    pub fn wire(self) -> u32 {
        match self {
            Errno::Perm => proto::EPERM,
            Errno::Io => proto::EIO,
            Errno::NoMem => proto::ENOMEM,
            Errno::Inval => proto::EINVAL,
            Errno::NoSpc => proto::ENOSPC,
            Errno::Overflow => proto::EOVERFLOW,
            Errno::NotSup => proto::ENOTSUP,
            Errno::Shutdown => proto::ESHUTDOWN,
        }
    }
}

/// Why one request failed. The connection goes on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExportError {
    /// The error value.
    pub errno: Errno,
    /// One sentence for the person at the client. At most 4096 bytes of it are sent.
    pub message: String,
    /// The first byte of the export that could not be served, where that is known.
    pub at_byte: Option<u64>,
}

impl ExportError {
    /// An error of which no more is known than its kind and reason.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        ExportError { errno, message: message.into(), at_byte: None }
    }

    /// The same, at this byte of the export.
    #[must_use]
    pub fn at(self, byte: u64) -> Self {
        ExportError { at_byte: Some(byte), ..self }
    }
}

macro_rules! forward_export {
    ($pointer:ident) => {
        impl<E: Export> Export for $pointer<E> {
            fn info(&self) -> &ExportInfo {
                E::info(self)
            }
            async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
                E::read(self, offset, buf).await
            }
            async fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
                E::write(self, offset, data, fua).await
            }
            async fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Result<(), ExportError> {
                E::write_zeroes(self, range, mode).await
            }
            async fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
                E::trim(self, range, fua).await
            }
            async fn flush(&self) -> Result<(), ExportError> {
                E::flush(self).await
            }
            async fn cache(&self, range: Range<u64>) -> Result<(), ExportError> {
                E::cache(self, range).await
            }
            async fn status(
                &self,
                context: Context,
                range: Range<u64>,
                out: &mut Extents,
            ) -> Result<(), ExportError> {
                E::status(self, context, range, out).await
            }
        }
    };
}

forward_export!(Rc);
forward_export!(Arc);
