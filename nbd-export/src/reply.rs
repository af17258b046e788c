//! Forming replies of the transmission phase. Pure: bytes in, bytes out.
//!
//! What always holds: a reply is complete before its first byte is sent, so an error is always
//! known before success is claimed. Reads that are carried out piece by piece are the exception: their
//! chunks come one by one, or the one chunk that `NBD_CMD_FLAG_DF` asks for in pieces.

use crate::export::{Errno, ExportError};
use crate::options::clip;
use crate::proto::{self, CHUNK_HEADER_BYTES, SIMPLE_REPLY_BYTES};
use crate::status::Extents;

/// A reply's header without data, and all there is of a success without data.
pub(crate) fn simple(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut out = [0; SIMPLE_REPLY_BYTES];
    out[..4].copy_from_slice(&proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, Errno::wire).to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

fn chunk(last: bool, kind: u16, cookie: u64, payload_len: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let flags = if last { proto::REPLY_FLAG_DONE } else { 0 };
    let mut out = [0; CHUNK_HEADER_BYTES];
    out[..4].copy_from_slice(&proto::STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..].copy_from_slice(&payload_len.to_be_bytes());
    out
}

/// What goes before `len` bytes of a structured read, the `last` ones or not. `len` is at most
/// [`proto::MAX_BLOCK_BYTES`].
pub(crate) fn data_header(cookie: u64, offset: u64, len: u32, last: bool) -> [u8; CHUNK_HEADER_BYTES + 8] {
    let mut out = [0; CHUNK_HEADER_BYTES + 8];
    let header = chunk(last, proto::REPLY_TYPE_OFFSET_DATA, cookie, len + 8);
    out[..CHUNK_HEADER_BYTES].copy_from_slice(&header);
    out[CHUNK_HEADER_BYTES..].copy_from_slice(&offset.to_be_bytes());
    out
}

/// A structured error with its reason. Where it happened is told if it lies in `[first, end)`,
/// the request's range.
pub(crate) fn error(cookie: u64, error: &ExportError, first: u64, end: u64) -> Vec<u8> {
    let message = clip(&error.message).as_bytes();
    let at = error.at_byte.filter(|at| (first..end).contains(at));
    let kind = match at {
        Some(_) => proto::REPLY_TYPE_ERROR_OFFSET,
        None => proto::REPLY_TYPE_ERROR,
    };
    let mut payload = Vec::with_capacity(message.len() + 14);
    payload.extend(error.errno.wire().to_be_bytes());
    // `clip` leaves at most 4096 bytes.
    payload.extend(u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    payload.extend_from_slice(message);
    if let Some(at) = at {
        payload.extend(at.to_be_bytes());
    }
    let len = u32::try_from(payload.len()).unwrap_or(0);
    [&chunk(true, kind, cookie, len)[..], &payload].concat()
}

/// A block status of one chunk per context, `answers` being (context ID, extents).
pub(crate) fn block_status(cookie: u64, ids: &[u32], answers: &[Extents]) -> Vec<u8> {
    let extents: usize = answers.iter().map(|answer| answer.as_slice().len()).sum();
    let mut out = Vec::with_capacity(answers.len() * (CHUNK_HEADER_BYTES + 4) + extents * 8);
    for (nth, (id, answer)) in ids.iter().zip(answers).enumerate() {
        let last = nth + 1 == answers.len();
        // At most `MAX_EXTENTS_PER_REPLY` extents.
        let len = u32::try_from(4 + 8 * answer.as_slice().len()).unwrap_or(u32::MAX);
        out.extend(chunk(last, proto::REPLY_TYPE_BLOCK_STATUS, cookie, len));
        out.extend(id.to_be_bytes());
        for extent in answer.as_slice() {
            out.extend(extent.len.to_be_bytes());
            out.extend(extent.status.flags().to_be_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_outside_the_request_loses_its_place_but_not_its_reason() {
        let failure = ExportError::new(Errno::Io, "gone").at(512);
        let inside = error(7, &failure, 0, 1024);
        assert_eq!(inside[6..8], proto::REPLY_TYPE_ERROR_OFFSET.to_be_bytes());
        assert_eq!(inside[20..], [0, 0, 0, 5, 0, 4, b'g', b'o', b'n', b'e', 0, 0, 0, 0, 0, 0, 2, 0]);
        let outside = error(7, &failure, 1024, 2048);
        assert_eq!(outside[6..8], proto::REPLY_TYPE_ERROR.to_be_bytes());
        assert_eq!(outside[20..], [0, 0, 0, 5, 0, 4, b'g', b'o', b'n', b'e']);
    }
}
