use proptest::prelude::*;
use serde_json::Value;

use super::*;

/// Everything that comes out of `input` when it arrives in pieces of `piece` bytes.
fn frames(input: &[u8], piece: usize) -> Vec<Result<Vec<u8>, FrameError>> {
    let mut framer = Framer::new();
    let mut out = Vec::new();
    for mut chunk in input.chunks(piece) {
        while let Some(item) = framer.next(&mut chunk) {
            out.push(item);
        }
        assert!(chunk.is_empty());
        assert!(framer.value.len() <= MAX_REQUEST_BYTES);
    }
    out
}

fn ok(text: &str) -> Result<Vec<u8>, FrameError> {
    Ok(text.as_bytes().to_vec())
}

#[test]
fn requests_need_nothing_between_them() {
    let input = br#"{"a":"}]\"\\"}{"b":[1,{}]} [] "x"  true 17{}"#;
    let expected = [
        ok(r#"{"a":"}]\"\\"}"#),
        ok(r#"{"b":[1,{}]}"#),
        ok("[]"),
        ok(r#""x""#),
        ok("true"),
        ok("17"),
        ok("{}"),
    ];
    for piece in [1, 2, 3, input.len()] {
        assert_eq!(frames(input, piece), expected, "in pieces of {piece}");
    }
}

#[test]
fn an_unfinished_value_waits_for_its_rest() {
    assert_eq!(frames(br#"{"execute":"qui"#, 4), []);
}

#[test]
fn stray_closers_are_one_error_and_the_next_request_is_found() {
    let out = frames(b"}}],:]}{\"a\":1}]{}", 1);
    let expected =
        [Err(FrameError::ExpectingValue), ok("{\"a\":1}"), Err(FrameError::ExpectingValue), ok("{}")];
    assert_eq!(out, expected);
}

#[test]
fn byte_0xff_and_control_characters_bring_the_framer_in_step() {
    for stray in [0xff, 0x00, 0x1b] {
        for start in [&b""[..], b"{\"a\":[\"", b"{\"a\":\"\\", b"12", b"[[[["] {
            let input = [start, &[stray], b"{\"b\":2}"].concat();
            let expected = [Err(FrameError::Stray(stray)), ok("{\"b\":2}")];
            assert_eq!(frames(&input, 1), expected, "{start:?}");
        }
    }
}

#[test]
fn a_string_left_open_ends_with_its_line() {
    let out = frames(b"{\"execute\":\"quit}\n{\"b\":2}\n", 3);
    assert_eq!(out, [Err(FrameError::Stray(b'\n')), ok("{\"b\":2}")]);
}

#[test]
fn deep_nesting_is_one_error_and_is_skipped_to_its_end() {
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    let input = [&deep[..], b"{\"a\":1}"].concat();
    let expected = [Err(FrameError::TooDeep), ok("{\"a\":1}")];
    assert_eq!(frames(&input, 4096), expected);
}

#[test]
fn nesting_up_to_the_limit_passes() {
    let text = [b"[".repeat(MAX_DEPTH), b"]".repeat(MAX_DEPTH)].concat();
    assert_eq!(frames(&text, 1), [Ok(text.clone())]);
}

#[test]
fn an_oversize_request_is_one_error_and_is_skipped_to_its_end() {
    for fill in [MAX_REQUEST_BYTES - 1, MAX_REQUEST_BYTES, 3 * MAX_REQUEST_BYTES] {
        for (open, close) in [("\"", "\""), ("[\"", "\"]"), ("", " ")] {
            let value = [open.as_bytes(), &b"x".repeat(fill), close.as_bytes()].concat();
            let length = value.trim_ascii_end().len();
            let input = [&value[..], b"{\"a\":1}"].concat();
            let out = frames(&input, 4096);
            let first = if length > MAX_REQUEST_BYTES {
                Err(FrameError::TooLong)
            } else {
                Ok(value.trim_ascii_end().to_vec())
            };
            assert_eq!(out.len(), 2, "{open}{fill}{close}");
            assert!(out[0] == first, "{open}{fill}{close}");
            assert!(out[1] == ok("{\"a\":1}"), "{open}{fill}{close}");
        }
    }
}

#[test]
fn output_is_one_line_of_ascii() {
    let id = serde_json::from_str::<&serde_json::value::RawValue>("[\n1.50,\t\"é😀\"\r\n]").unwrap();
    let text = String::from_utf8(line(&(id, "a\nü")).unwrap()).unwrap();
    assert_eq!(text, "[[ 1.50, \"\\u00e9\\ud83d\\ude00\"  ],\"a\\n\\u00fc\"]\r\n");
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        r#"[\]\[{}",:\\ ]{0,8}"#.prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::vec((any::<String>(), inner), 0..8)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// Bytes that matter to the grammar, and some that never should.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..2048),
        prop::collection::vec(
            prop::sample::select(&b"{}[]\":,\\ \n\t1-etrufalsn\x00\x7f\x80\xff"[..]),
            0..2048
        ),
    ]
}

proptest! {
    #[test]
    fn values_end_where_serde_json_says(values in prop::collection::vec((json(), "[ \r\n\t]{1,3}"), 1..6), piece in 1usize..64) {
        let mut text = String::new();
        for (value, blank) in &values {
            // Text beyond ASCII passes the framer as it is.
            text += &serde_json::to_string(value).unwrap();
            text += blank;
        }
        let mut ends = Vec::new();
        let mut stream = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        while let Some(value) = stream.next() {
            value.unwrap();
            ends.push(stream.byte_offset());
        }
        let out = frames(text.as_bytes(), piece);
        prop_assert_eq!(out.len(), values.len());
        let mut from = 0;
        for (frame, end) in out.iter().zip(ends) {
            let expected = text.as_bytes()[from..end].trim_ascii();
            prop_assert_eq!(frame.as_deref(), Ok(expected));
            from = end;
        }
    }

    #[test]
    fn any_bytes_in_any_pieces_give_the_same_and_a_request_behind_them_is_found(input in hostile(), piece in 1usize..64) {
        let whole = frames(&input, input.len().max(1));
        prop_assert_eq!(frames(&input, piece), whole);
        // 0xFF twice: in step from anywhere.
        let input = [&input[..], b"\xff{\"execute\":\"quit\"}"].concat();
        let out = frames(&input, piece);
        prop_assert_eq!(out.last(), Some(&ok("{\"execute\":\"quit\"}")));
        prop_assert!(out.len() <= input.len());
        for value in out.into_iter().flatten() {
            // Whatever was cut out: parsing neither panics nor overflows the stack.
            let _ = serde_json::from_slice::<Value>(&value);
        }
    }
}
