//! Requests of the transmission phase: parsing, and every check that needs no export.
//!
//! What always holds: a [`Command`] that comes out of [`check`] lies within the export, is not
//! empty, is allowed on it, and carries only flags that its kind may carry.
//!
//! A length of 0 is refused with `NBD_EINVAL`: the protocol leaves it open ("unspecified although
//! the server SHOULD NOT disconnect"), nbdkit refuses it for every command and QEMU for block
//! status, and a structured read could not express it.

use std::ops::Range;

use crate::error::Error;
use crate::export::{Errno, ExportError, ExportInfo, ZeroMode};
use crate::proto::{self, REQUEST_BYTES};

/// A request's header as it came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

impl Header {
    /// # Errors
    /// If the magic number is wrong: the stream is out of step and must end.
    pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Error> {
        if field::<4>(bytes, 0) != proto::REQUEST_MAGIC.to_be_bytes() {
            return Err(Error::Protocol("a request without its magic number"));
        }
        Ok(Header {
            flags: u16::from_be_bytes(field(bytes, 4)),
            kind: u16::from_be_bytes(field(bytes, 6)),
            cookie: u64::from_be_bytes(field(bytes, 8)),
            offset: u64::from_be_bytes(field(bytes, 16)),
            len: u32::from_be_bytes(field(bytes, 24)),
        })
    }

    /// Length of what follows the header.
    pub(crate) fn payload_len(&self) -> u32 {
        if self.kind == proto::CMD_WRITE { self.len } else { 0 }
    }

    /// First byte after the request; beyond any export if that does not fit.
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.len))
    }

    fn range(&self) -> Range<u64> {
        self.offset..self.end()
    }
}

fn field<const N: usize>(bytes: &[u8; REQUEST_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// A request that may be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32, fua: bool },
    Disconnect,
    Flush,
    Trim { range: Range<u64>, fua: bool },
    Cache { range: Range<u64> },
    WriteZeroes { range: Range<u64>, mode: ZeroMode },
    BlockStatus { offset: u64, len: u32, only_one: bool },
}

/// What was agreed in the handshake, as far as requests are judged by it.
pub(crate) struct Agreed<'a> {
    pub(crate) info: &'a ExportInfo,
    pub(crate) structured: bool,
    pub(crate) has_contexts: bool,
}

/// Judges a request.
///
/// # Errors
/// What to answer; a payload, if any, is still to be skipped.
pub(crate) fn check(header: &Header, agreed: &Agreed<'_>) -> Result<Command, ExportError> {
    let info = agreed.info;
    let has = |flag: u16| header.flags & flag != 0;
    let (offset, len, fua) = (header.offset, header.len, has(proto::CMD_FLAG_FUA));

    // proto.md, "Command flags": FUA is to be accepted on every command once offered.
    let allowed = proto::CMD_FLAG_FUA
        | match header.kind {
            proto::CMD_DISC => return Ok(Command::Disconnect),
            proto::CMD_READ if agreed.structured => proto::CMD_FLAG_DF,
            proto::CMD_WRITE_ZEROES if info.can_fast_zero => {
                proto::CMD_FLAG_NO_HOLE | proto::CMD_FLAG_FAST_ZERO
            }
            proto::CMD_WRITE_ZEROES => proto::CMD_FLAG_NO_HOLE,
            proto::CMD_BLOCK_STATUS => proto::CMD_FLAG_REQ_ONE,
            proto::CMD_READ | proto::CMD_WRITE | proto::CMD_FLUSH | proto::CMD_TRIM | proto::CMD_CACHE => 0,
            unknown => return Err(invalid(format!("command {unknown} is not known"))),
        };
    if header.flags & !allowed != 0 {
        let extra = header.flags & !allowed;
        let message = format!("command {} does not take the flags {extra:#x}", header.kind);
        return Err(invalid(message));
    }

    let writes = matches!(header.kind, proto::CMD_WRITE | proto::CMD_TRIM | proto::CMD_WRITE_ZEROES);
    if writes && info.read_only {
        return Err(ExportError::new(Errno::Perm, "this export is read-only"));
    }
    if header.kind == proto::CMD_FLUSH {
        return match (offset, len) {
            (0, 0) => Ok(Command::Flush),
            _ => Err(invalid("a flush has neither offset nor length")),
        };
    }
    if len == 0 {
        return Err(invalid("the length is 0"));
    }
    let carries_data = matches!(header.kind, proto::CMD_READ | proto::CMD_WRITE | proto::CMD_CACHE);
    if carries_data && len > proto::MAX_BLOCK_BYTES {
        let max = proto::MAX_BLOCK_BYTES;
        return Err(invalid(format!("{len} bytes are more than the maximum of {max} per request")));
    }
    if offset.checked_add(u64::from(len)).is_none_or(|end| end > info.size_bytes) {
        let size = info.size_bytes;
        let message = format!("{len} bytes at {offset} pass the end of the export at {size}");
        // proto.md, "Error values": ENOSPC for writes past the end, EINVAL for the rest.
        return Err(match header.kind {
            proto::CMD_WRITE | proto::CMD_WRITE_ZEROES => ExportError::new(Errno::NoSpc, message),
            _ => invalid(message),
        });
    }

    match header.kind {
        proto::CMD_READ => Ok(Command::Read { offset, len }),
        proto::CMD_WRITE => Ok(Command::Write { offset, len, fua }),
        proto::CMD_CACHE => Ok(Command::Cache { range: header.range() }),
        proto::CMD_TRIM if info.can_trim => Ok(Command::Trim { range: header.range(), fua }),
        proto::CMD_WRITE_ZEROES if info.can_write_zeroes => Ok(Command::WriteZeroes {
            range: header.range(),
            mode: ZeroMode {
                fua,
                no_hole: has(proto::CMD_FLAG_NO_HOLE),
                fast_only: has(proto::CMD_FLAG_FAST_ZERO),
            },
        }),
        proto::CMD_BLOCK_STATUS if agreed.structured && agreed.has_contexts => {
            Ok(Command::BlockStatus { offset, len, only_one: has(proto::CMD_FLAG_REQ_ONE) })
        }
        proto::CMD_BLOCK_STATUS => Err(invalid("no meta context was selected for this export")),
        _ => Err(invalid("this export does not offer the command")),
    }
}

fn invalid(message: impl Into<String>) -> ExportError {
    ExportError::new(Errno::Inval, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 64 << 20;

    fn judge(info: &ExportInfo, kind: u16, flags: u16, offset: u64, len: u32) -> Result<Command, Errno> {
        let agreed = Agreed { info, structured: true, has_contexts: true };
        check(&Header { flags, kind, cookie: 1, offset, len }, &agreed).map_err(|e| e.errno)
    }

    #[test]
    fn past_the_end_is_no_space_for_writes_and_invalid_for_the_rest() {
        let info = ExportInfo::writable("x", SIZE);
        for (kind, errno) in [
            (proto::CMD_READ, Errno::Inval),
            (proto::CMD_WRITE, Errno::NoSpc),
            (proto::CMD_WRITE_ZEROES, Errno::NoSpc),
            (proto::CMD_TRIM, Errno::Inval),
            (proto::CMD_CACHE, Errno::Inval),
            (proto::CMD_BLOCK_STATUS, Errno::Inval),
        ] {
            for offset in [SIZE - 511, SIZE, u64::MAX, u64::MAX - 511] {
                assert_eq!(judge(&info, kind, 0, offset, 512), Err(errno), "{kind} at {offset}");
            }
            assert!(judge(&info, kind, 0, SIZE - 512, 512).is_ok(), "{kind}");
        }
    }

    #[test]
    fn a_read_only_export_permits_no_kind_of_write() {
        let info = ExportInfo::read_only("x", SIZE);
        for kind in [proto::CMD_WRITE, proto::CMD_TRIM, proto::CMD_WRITE_ZEROES] {
            assert_eq!(judge(&info, kind, 0, 0, 512), Err(Errno::Perm));
        }
        assert_eq!(judge(&info, proto::CMD_FLUSH, 0, 0, 0), Ok(Command::Flush));
    }

    #[test]
    fn each_flag_belongs_to_its_command() {
        let info = ExportInfo { can_fast_zero: true, ..ExportInfo::writable("x", SIZE) };
        for (flag, owner) in [
            (proto::CMD_FLAG_NO_HOLE, proto::CMD_WRITE_ZEROES),
            (proto::CMD_FLAG_DF, proto::CMD_READ),
            (proto::CMD_FLAG_REQ_ONE, proto::CMD_BLOCK_STATUS),
            (proto::CMD_FLAG_FAST_ZERO, proto::CMD_WRITE_ZEROES),
        ] {
            for kind in [
                proto::CMD_READ,
                proto::CMD_WRITE,
                proto::CMD_TRIM,
                proto::CMD_CACHE,
                proto::CMD_WRITE_ZEROES,
                proto::CMD_BLOCK_STATUS,
            ] {
                let judged = judge(&info, kind, flag | proto::CMD_FLAG_FUA, 0, 512);
                assert_eq!(judged.is_ok(), kind == owner, "flag {flag:#x} on {kind}");
            }
        }
    }

    #[test]
    fn what_was_not_agreed_is_invalid() {
        let info = ExportInfo::read_only("x", SIZE);
        let agreed = Agreed { info: &info, structured: false, has_contexts: false };
        for (kind, flags) in [(proto::CMD_READ, proto::CMD_FLAG_DF), (proto::CMD_BLOCK_STATUS, 0)] {
            let header = Header { flags, kind, cookie: 1, offset: 0, len: 512 };
            assert_eq!(check(&header, &agreed).unwrap_err().errno, Errno::Inval);
        }
    }

    #[test]
    fn data_requests_end_at_the_maximum_and_others_do_not() {
        let info = ExportInfo::writable("x", 1 << 40);
        let max = proto::MAX_BLOCK_BYTES;
        for kind in [proto::CMD_READ, proto::CMD_WRITE, proto::CMD_CACHE] {
            assert!(judge(&info, kind, 0, 0, max).is_ok());
            assert_eq!(judge(&info, kind, 0, 0, max + 1), Err(Errno::Inval));
        }
        for kind in [proto::CMD_TRIM, proto::CMD_WRITE_ZEROES, proto::CMD_BLOCK_STATUS] {
            assert!(judge(&info, kind, 0, 0, u32::MAX).is_ok());
        }
    }

    proptest! {
        #[test]
        fn whatever_passes_lies_within_the_export(
            kind in 0u16..10, flags in 0u16..64, offset: u64, len: u32,
            near in any::<bool>(), read_only: bool, structured: bool, has_contexts: bool,
        ) {
            let offset = if near { offset % (2 * SIZE) } else { offset };
            let mut info = ExportInfo::writable("x", SIZE);
            info.read_only = read_only;
            let agreed = Agreed { info: &info, structured, has_contexts };
            let within = |range: &Range<u64>| range.start < range.end && range.end <= SIZE;
            match check(&Header { flags, kind, cookie: 0, offset, len }, &agreed) {
                Ok(Command::Read { offset, len }) => {
                    prop_assert!(within(&(offset..offset + u64::from(len))));
                    prop_assert!(len <= proto::MAX_BLOCK_BYTES);
                }
                Ok(Command::Write { offset, len, .. }) => {
                    prop_assert!(within(&(offset..offset + u64::from(len))));
                    prop_assert!(len <= proto::MAX_BLOCK_BYTES && !read_only);
                }
                Ok(Command::Trim { range, .. } | Command::WriteZeroes { range, .. }) => {
                    prop_assert!(within(&range) && !read_only);
                }
                Ok(Command::Cache { range }) => prop_assert!(within(&range)),
                Ok(Command::BlockStatus { offset, len, .. }) => {
                    prop_assert!(within(&(offset..offset + u64::from(len))));
                    prop_assert!(structured && has_contexts);
                }
                Ok(Command::Flush | Command::Disconnect) | Err(_) => {}
            }
        }
    }
}
