//! What a request says: its verb, its `id`, and its arguments not yet looked into.
//!
//! What always holds: whenever the text is JSON with an `id`, the `id` is known, so that every
//! refusal can carry it; it is echoed as it was written, digits included. Texts are QEMU's
//! (qapi/qmp-dispatch.c, qmp_dispatch_check_obj).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::service::{CommandError, reason};

/// The members of a JSON object, values unparsed. A member that comes twice is an error.
#[derive(Debug, Default)]
pub(crate) struct Members<'a>(pub(crate) BTreeMap<String, &'a RawValue>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = BTreeMap::new();
                while let Some((name, value)) = map.next_entry()? {
                    if members.insert(name, value).is_some() {
                        return Err(A::Error::custom("duplicate key"));
                    }
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Collect)
    }
}

/// A request that may be run.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    /// The verb.
    pub(crate) execute: String,
    /// An object if anything.
    pub(crate) arguments: Option<&'a RawValue>,
}

/// Takes a value off the wire apart: the `id` it carries, and the request or why it is none.
pub(crate) fn parse(bytes: &[u8]) -> (Option<&RawValue>, Result<Request<'_>, CommandError>) {
    let text = match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => return (None, Err(bad_json(&format!("invalid UTF-8: {error}")))),
    };
    if !text.starts_with('{') {
        // Say first what is wrong with it as JSON, as QEMU does.
        let refusal = match serde_json::from_str::<&RawValue>(text) {
            Ok(_) => bad_request("QMP input must be a JSON object".to_owned()),
            Err(error) => bad_json(&error.to_string()),
        };
        return (None, Err(refusal));
    }
    let mut members = match serde_json::from_str::<Members<'_>>(text) {
        Ok(Members(members)) => members,
        Err(error) => return (None, Err(bad_json(&error.to_string()))),
    };
    let id = members.remove("id");
    (id, request(members))
}

fn request(mut members: BTreeMap<String, &RawValue>) -> Result<Request<'_>, CommandError> {
    let execute = members.remove("execute");
    let arguments = members.remove("arguments");
    if let Some(name) = members.keys().next() {
        let name = excerpt(name);
        return Err(bad_request(format!("QMP input member '{name}' is unexpected")));
    }
    let execute = execute
        .ok_or_else(|| bad_request("QMP input lacks member 'execute'".to_owned()))
        .and_then(|raw| {
            serde_json::from_str(raw.get())
                .map_err(|_| bad_request("QMP input member 'execute' must be a string".to_owned()))
        })?;
    if arguments.is_some_and(|raw| !raw.get().starts_with('{')) {
        let desc = "QMP input member 'arguments' must be an object";
        return Err(bad_request(desc.to_owned()));
    }
    Ok(Request { execute, arguments })
}

/// As much of a text from a client as an error message repeats.
pub(crate) fn excerpt(text: &str) -> String {
    const CHARS: usize = 100;
    let mut short: String = text.chars().take(CHARS).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

fn bad_json(what: &str) -> CommandError {
    CommandError::generic(reason::BAD_JSON, format!("JSON parse error, {what}"))
}

fn bad_request(desc: String) -> CommandError {
    CommandError::generic(reason::BAD_REQUEST, desc)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arguments;
    use crate::commands::{QueryChangedBlocks, SnapshotCreate};
    use crate::wire::MAX_REQUEST_BYTES;

    fn refusal(text: &str) -> (Option<String>, String) {
        let (id, request) = parse(text.as_bytes());
        (id.map(|raw| raw.get().to_owned()), request.unwrap_err().desc)
    }

    #[test]
    fn a_request_is_taken_apart() {
        let (id, request) = parse(br#"{"execute": "quit", "arguments": {"a":[1]} , "id": [1.50, null]}"#);
        let request = request.unwrap();
        assert_eq!(request.execute, "quit");
        assert_eq!(request.arguments.unwrap().get(), r#"{"a":[1]}"#);
        assert_eq!(id.unwrap().get(), "[1.50, null]");
    }

    #[test]
    fn refusals_read_like_qemus_and_keep_the_id() {
        let object = "QMP input must be a JSON object";
        for text in ["17", "[1,2]", "\"x\"", "null"] {
            assert_eq!(refusal(text), (None, object.to_owned()), "{text}");
        }
        for (text, desc) in [
            (r#"{"id":7}"#, "QMP input lacks member 'execute'"),
            (r#"{"id":7,"execute":1}"#, "QMP input member 'execute' must be a string"),
            (r#"{"id":7,"execute":"x","arguments":[]}"#, "QMP input member 'arguments' must be an object"),
            (r#"{"exec":"x","id":7}"#, "QMP input member 'exec' is unexpected"),
            (r#"{"exec-oob":"x","id":7}"#, "QMP input member 'exec-oob' is unexpected"),
        ] {
            assert_eq!(refusal(text), (Some("7".to_owned()), desc.to_owned()));
        }
    }

    #[test]
    fn what_is_no_json_says_so() {
        for text in [
            "nul",
            "{\"a\":]",
            "{'execute':'quit'}",
            "{\"a\":1,\"a\":2}",
            "01",
            "{\"execute\":\"x\",\"arguments\":{\"a\":tru}}",
        ] {
            let (_, desc) = refusal(text);
            assert!(desc.starts_with("JSON parse error, "), "{text}: {desc}");
        }
        let (_, request) = parse(b"{\"execute\":\"\xc3\x28\"}");
        let desc = request.unwrap_err().desc;
        assert!(desc.starts_with("JSON parse error, invalid UTF-8"));
    }

    #[test]
    fn a_long_name_is_not_repeated_whole() {
        let (_, desc) = refusal(&format!("{{\"{}\":1}}", "é".repeat(100_000)));
        assert!(desc.len() < 300, "{desc}");
    }

    #[test]
    fn the_worst_request_that_fits_costs_bounded_time() {
        const SPACE: usize = MAX_REQUEST_BYTES - 1000;
        let members: String = (0..SPACE / 12).map(|n| format!("\"{n:07}\":0,")).collect();
        let escapes = "\\u00e9".repeat(SPACE / 6);
        let numbers = "1e9,".repeat(SPACE / 4);
        let nested = "[[[[[[[[]]]]]]]],".repeat(SPACE / 18);
        for worst in [
            format!("{{{members}\"execute\":\"quit\"}}"),
            format!("{{\"execute\":\"quit\",\"arguments\":{{{members}\"x\":0}}}}"),
            format!("{{\"execute\":\"{escapes}\"}}"),
            format!("{{\"execute\":\"quit\",\"arguments\":{{\"x\":[{numbers}0]}}}}"),
            format!("{{\"execute\":\"quit\",\"id\":[{nested}0]}}"),
        ] {
            let began = std::time::Instant::now();
            assert!(worst.len() < MAX_REQUEST_BYTES);
            if let (_, Ok(request)) = parse(worst.as_bytes()) {
                let _ = arguments::read::<SnapshotCreate>(request.arguments);
            }
            let took = began.elapsed();
            assert!(took < std::time::Duration::from_secs(5), "{took:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_that_looks_like_a_request_is_a_panic(
            words in prop::collection::vec(prop::sample::select(WORDS), 0..24),
            bytes in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            let text = words.concat();
            for input in [text.as_bytes(), &bytes] {
                if let (_, Ok(request)) = parse(input) {
                    let _ = arguments::read::<SnapshotCreate>(request.arguments);
                    let _ = arguments::read::<QueryChangedBlocks>(request.arguments);
                }
            }
        }
    }

    const WORDS: &[&str] = &[
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"execute\":",
        "\"arguments\":{",
        "\"id\":",
        "\"name\":",
        "\"disks\":[",
        "\"since\":",
        "\"limit\":",
        "\"x\"",
        "1",
        "-0",
        "1e999",
        "null",
        "\"\\ud800\"",
        "\"\\u0000\"",
        " ",
        "\n",
    ];
}
