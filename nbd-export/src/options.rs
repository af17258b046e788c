//! Options of the handshake: taking their payloads apart, and forming replies.
//!
//! What always holds: a payload that parses was used up to its last byte, its names are UTF-8
//! without NUL and at most [`MAX_STRING_BYTES`] long.

use crate::proto::{self, MAX_STRING_BYTES};

/// Longest payload that is read; longer ones are skipped and answered "too big".
pub(crate) const MAX_OPTION_BYTES: u32 = 64 << 10;
/// Most queries in one request for meta contexts.
const MAX_QUERIES: u32 = 256;

/// Why an option is refused: the reply's type and a sentence for the person at the client.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OptionError {
    pub(crate) reply: u32,
    pub(crate) message: String,
}

impl OptionError {
    pub(crate) fn new(reply: u32, message: impl Into<String>) -> Self {
        OptionError { reply, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        OptionError::new(proto::REP_ERR_INVALID, message)
    }
}

/// Payload of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) name: String,
    pub(crate) wants_name: bool,
    pub(crate) wants_description: bool,
}

impl InfoRequest {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, OptionError> {
        let mut rest = Payload(payload);
        let name = rest.string("export name")?;
        let count = rest.u16()?;
        let mut request = InfoRequest { name, wants_name: false, wants_description: false };
        for _ in 0..count {
            match rest.u16()? {
                proto::INFO_NAME => request.wants_name = true,
                proto::INFO_DESCRIPTION => request.wants_description = true,
                // The export and block sizes are always told; unknown requests MUST be ignored.
                _ => {}
            }
        }
        rest.end()?;
        Ok(request)
    }
}

/// Payload of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MetaRequest {
    pub(crate) name: String,
    pub(crate) queries: Vec<String>,
}

impl MetaRequest {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, OptionError> {
        let mut rest = Payload(payload);
        let name = rest.string("export name")?;
        let count = rest.u32()?;
        if count > MAX_QUERIES {
            return Err(OptionError::new(
                proto::REP_ERR_TOO_BIG,
                format!("at most {MAX_QUERIES} queries for meta contexts are answered at once"),
            ));
        }
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(rest.string("query")?);
        }
        rest.end()?;
        Ok(MetaRequest { name, queries })
    }
}

/// The payload of `NBD_OPT_EXPORT_NAME`, which is a name and nothing else.
pub(crate) fn parse_export_name(payload: &[u8]) -> Result<String, OptionError> {
    text(payload, "export name")
}

/// What is left of a payload.
struct Payload<'a>(&'a [u8]);

impl<'a> Payload<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], OptionError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| OptionError::invalid("the option is shorter than its fields say"))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], OptionError> {
        let mut field = [0; N];
        field.copy_from_slice(self.take(N)?);
        Ok(field)
    }

    fn u16(&mut self) -> Result<u16, OptionError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, OptionError> {
        self.array().map(u32::from_be_bytes)
    }

    fn string(&mut self, what: &str) -> Result<String, OptionError> {
        // A length beyond usize is beyond the payload too.
        let len = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        text(self.take(len)?, what)
    }

    fn end(self) -> Result<(), OptionError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(OptionError::invalid("the option is longer than its fields say"))
        }
    }
}

fn text(bytes: &[u8], what: &str) -> Result<String, OptionError> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err(OptionError::new(
            proto::REP_ERR_TOO_BIG,
            format!("the {what} is longer than {MAX_STRING_BYTES} bytes"),
        ));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(OptionError::invalid(format!("the {what} is not UTF-8 text"))),
    }
}

/// The longest start of `text` that the protocol allows for a string.
pub(crate) fn clip(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STRING_BYTES)]
}

/// Appends a reply to `option` of type `reply`, its payload in `parts`.
pub(crate) fn put_reply(out: &mut Vec<u8>, option: u32, reply: u32, parts: &[&[u8]]) {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    // Every part is a fixed field or went through `clip`.
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    out.extend(proto::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(reply.to_be_bytes());
    out.extend(len.to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends an error reply to `option`.
pub(crate) fn put_error(out: &mut Vec<u8>, option: u32, error: &OptionError) {
    put_reply(out, option, error.reply, &[clip(&error.message).as_bytes()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |text: &str| {
            out.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            out.extend(text.as_bytes());
        };
        put(name);
        let mut tail = Vec::new();
        for query in queries {
            tail.extend(u32::try_from(query.len()).unwrap().to_be_bytes());
            tail.extend(query.as_bytes());
        }
        out.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
        out.extend(tail);
        out
    }

    #[test]
    fn a_request_for_contexts_is_read_back() {
        let parsed = MetaRequest::parse(&meta("vda@1", &["base:allocation", ""])).unwrap();
        assert_eq!(parsed.name, "vda@1");
        assert_eq!(parsed.queries, ["base:allocation", ""]);
    }

    #[test]
    fn a_payload_one_byte_short_or_long_is_invalid() {
        let good = meta("vda", &["base:"]);
        for cut in 0..good.len() {
            let error = MetaRequest::parse(&good[..cut]).unwrap_err();
            assert_eq!(error.reply, proto::REP_ERR_INVALID, "cut at {cut}");
        }
        let long = [&good[..], &[0]].concat();
        assert_eq!(MetaRequest::parse(&long).unwrap_err().reply, proto::REP_ERR_INVALID);
    }

    #[test]
    fn too_many_queries_are_too_big_before_they_are_read() {
        let payload = [&0u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
        assert_eq!(MetaRequest::parse(&payload).unwrap_err().reply, proto::REP_ERR_TOO_BIG);
    }

    #[test]
    fn names_with_nul_or_bad_utf8_are_invalid_and_long_ones_too_big() {
        assert_eq!(parse_export_name(b"a\0").unwrap_err().reply, proto::REP_ERR_INVALID);
        assert_eq!(parse_export_name(b"\xff").unwrap_err().reply, proto::REP_ERR_INVALID);
        let long = vec![b'a'; MAX_STRING_BYTES + 1];
        assert_eq!(parse_export_name(&long).unwrap_err().reply, proto::REP_ERR_TOO_BIG);
        assert_eq!(parse_export_name(&long[1..]).unwrap().len(), MAX_STRING_BYTES);
    }

    #[test]
    fn clipping_keeps_whole_characters() {
        let text = "é".repeat(MAX_STRING_BYTES);
        assert_eq!(clip(&text).len(), MAX_STRING_BYTES);
        let text = format!("a{text}");
        assert_eq!(clip(&text).len(), MAX_STRING_BYTES - 1);
    }

    proptest! {
        #[test]
        fn arbitrary_payloads_parse_or_are_refused(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = InfoRequest::parse(&payload);
            let _ = MetaRequest::parse(&payload);
            let _ = parse_export_name(&payload);
        }
    }
}
