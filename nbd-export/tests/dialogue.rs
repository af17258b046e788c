//! Whole dialogues over a scripted stream: what clients say, and what they must hear.

mod support;

use std::cell::Cell;
use std::sync::LazyLock;

use nbd_export::{Ending, Error, ExportInfo, Exports, Listing, Refusal, proto};
use proptest::prelude::*;
use support::wire::{Client, FIXED, Message, Server, contexts, info, string};
use support::{MemoryExport, MemoryExports, pattern};

const SIZE: u32 = 8 << 20;

fn exports() -> MemoryExports {
    let bytes = pattern(usize::try_from(SIZE).unwrap(), 3);
    let mut described = ExportInfo::read_only("vda@1", u64::from(SIZE));
    described.description = "first".into();
    let mut broken = MemoryExport::new(ExportInfo::read_only("broken", u64::from(SIZE)), bytes.clone());
    broken.broken_at = Some(6000);
    MemoryExports::new([
        MemoryExport::new(described, bytes.clone())
            .with_bitmap("old", vec![4096..8192, 1 << 20..2 << 20])
            .with_bitmap("older", vec![0..4096, 4096..65536]),
        MemoryExport::new(ExportInfo::writable("vda", u64::from(SIZE)), bytes),
        broken,
    ])
}

/// One set for the many dialogues that do not look at the data.
static SHARED: LazyLock<MemoryExports> = LazyLock::new(exports);

fn structured_on(name: &str) -> Client {
    Client::new(FIXED).structured().go(name)
}

/// Past the replies to `structured_on`.
fn entered(server: &mut Server) {
    assert_eq!(server.final_reply(proto::OPT_STRUCTURED_REPLY).0, proto::REP_ACK);
    assert_eq!(server.final_reply(proto::OPT_GO).0, proto::REP_ACK);
}

#[test]
fn go_tells_size_flags_block_sizes_and_what_was_asked_for() {
    let wanted = info("vda@1", &[proto::INFO_NAME, proto::INFO_DESCRIPTION, 77]);
    let client = Client::new(FIXED).structured().option(proto::OPT_GO, &wanted);
    let (result, mut server) = client.talk(&exports(), 1);
    assert_eq!(result.unwrap(), Ending::Closed);
    server.final_reply(proto::OPT_STRUCTURED_REPLY);
    let mut told: Vec<Vec<u8>> = (0..4).map(|_| server.option_reply().payload).collect();
    told.sort();
    let flags: u16 = proto::FLAG_HAS_FLAGS
        | proto::FLAG_READ_ONLY
        | proto::FLAG_SEND_FLUSH
        | proto::FLAG_SEND_FUA
        | proto::FLAG_SEND_DF
        | proto::FLAG_CAN_MULTI_CONN
        | proto::FLAG_SEND_CACHE;
    let export = [&[0, 0][..], &u64::from(SIZE).to_be_bytes(), &flags.to_be_bytes()].concat();
    let sizes = [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0];
    assert_eq!(told, [export, b"\0\x01vda@1".to_vec(), b"\0\x02first".to_vec(), sizes.to_vec()]);
    assert_eq!(server.option_reply().reply, proto::REP_ACK);
    assert!(server.is_at_end());
}

#[test]
fn export_name_gives_size_flags_and_padding_unless_agreed_away() {
    for (flags, padding) in [(FIXED, 0), (proto::FLAG_C_FIXED_NEWSTYLE, 124), (0, 124)] {
        let client = Client::new(flags).option(proto::OPT_EXPORT_NAME, b"vda");
        let (result, mut server) = client.request(proto::CMD_READ, 0, 9, 8, 16).talk(&exports(), 7);
        result.unwrap();
        assert_eq!(server.u64(), u64::from(SIZE));
        let told = server.u16();
        assert_eq!(told & (proto::FLAG_READ_ONLY | proto::FLAG_SEND_DF), 0);
        assert_ne!(told & proto::FLAG_SEND_WRITE_ZEROES, 0);
        assert_eq!(server.take(padding), vec![0; padding]);
        let data = pattern(24, 3)[8..].to_vec();
        assert_eq!(server.message(16), Message::Simple { cookie: 9, error: 0, data });
    }
}

#[test]
fn the_list_names_every_export_with_its_description() {
    let client = Client::new(FIXED).option(proto::OPT_LIST, &[]).option(proto::OPT_ABORT, b"bye");
    let (result, mut server) = client.talk(&exports(), 100);
    assert_eq!(result.unwrap(), Ending::Closed);
    for (name, description) in [("vda@1", "first"), ("vda", ""), ("broken", "")] {
        let reply = server.option_reply();
        assert_eq!(reply.reply, proto::REP_SERVER);
        assert_eq!(reply.payload, [&string(name)[..], description.as_bytes()].concat());
    }
    assert_eq!(server.final_reply(proto::OPT_LIST).0, proto::REP_ACK);
    assert_eq!(server.final_reply(proto::OPT_ABORT).0, proto::REP_ACK);
    assert!(server.is_at_end());
}

#[test]
fn the_empty_name_is_the_lone_export_and_otherwise_explains_itself() {
    let lone = MemoryExports::new([MemoryExport::new(ExportInfo::read_only("x", 512), vec![1; 512])]);
    let (_, mut server) = Client::new(FIXED).go("").talk(&lone, 100);
    assert_eq!(server.final_reply(proto::OPT_GO).0, proto::REP_ACK);

    let (_, mut server) = Client::new(FIXED).go("").go("nope").talk(&exports(), 100);
    let (reply, text) = server.final_reply(proto::OPT_GO);
    assert_eq!(reply, proto::REP_ERR_UNKNOWN);
    assert_eq!(text, r#"there is no default export; ask for one of "vda@1", "vda", "broken""#);
    let (_, text) = server.final_reply(proto::OPT_GO);
    assert_eq!(text, r#"there is no export "nope"; ask for one of "vda@1", "vda", "broken""#);

    let (_, mut server) = Client::new(FIXED).go("x").talk(&MemoryExports::new([]), 100);
    let (_, text) = server.final_reply(proto::OPT_GO);
    assert!(text.ends_with("nothing is exported: take a snapshot or add an export first"), "{text}");
}

/// Replies to one option on an otherwise good connection, and that it goes on afterwards.
fn option_outcome(before: Client, option: u32, payload: &[u8]) -> u32 {
    let client = before.clone().option(option, payload).option(proto::OPT_LIST, &[]);
    let (_, mut server) = client.talk(&*SHARED, 4000);
    if before.bytes.len() > 4 {
        server.final_reply(proto::OPT_STRUCTURED_REPLY);
    }
    let outcome = server.final_reply(option).0;
    assert_eq!(server.final_reply(proto::OPT_LIST).0, proto::REP_ACK, "in step afterwards");
    outcome
}

#[test]
fn each_bad_option_has_its_error_and_negotiation_goes_on() {
    let plain = Client::new(FIXED);
    let structured = plain.clone().structured();
    let cases: [(&Client, u32, Vec<u8>, u32); 16] = [
        (&plain, proto::OPT_STARTTLS, vec![], proto::REP_ERR_UNSUP),
        (&plain, proto::OPT_EXTENDED_HEADERS, vec![], proto::REP_ERR_UNSUP),
        (&plain, 4, vec![], proto::REP_ERR_UNSUP),
        (&plain, 0xffff_ffff, vec![1; 100_000], proto::REP_ERR_UNSUP),
        (&plain, proto::OPT_LIST, vec![0], proto::REP_ERR_INVALID),
        (&plain, proto::OPT_STRUCTURED_REPLY, vec![0], proto::REP_ERR_INVALID),
        (&plain, proto::OPT_INFO, vec![], proto::REP_ERR_INVALID),
        (&plain, proto::OPT_INFO, [info("vda", &[1]), vec![0]].concat(), proto::REP_ERR_INVALID),
        (&plain, proto::OPT_INFO, vec![0; 70_000], proto::REP_ERR_TOO_BIG),
        (&plain, proto::OPT_INFO, info(&"x".repeat(5000), &[]), proto::REP_ERR_TOO_BIG),
        (&plain, proto::OPT_INFO, info("nope", &[]), proto::REP_ERR_UNKNOWN),
        (&plain, proto::OPT_SET_META_CONTEXT, contexts("vda", &[]), proto::REP_ERR_INVALID),
        (&plain, proto::OPT_LIST_META_CONTEXT, contexts("vda", &[]), proto::REP_ERR_INVALID),
        (&structured, proto::OPT_SET_META_CONTEXT, contexts("no", &[]), proto::REP_ERR_UNKNOWN),
        (&structured, proto::OPT_SET_META_CONTEXT, vec![0; 9], proto::REP_ERR_INVALID),
        (&structured, proto::OPT_LIST_META_CONTEXT, contexts("vda", &["base:"; 257]), proto::REP_ERR_TOO_BIG),
    ];
    for (before, option, payload, expected) in cases {
        let outcome = option_outcome(before.clone(), option, &payload);
        assert_eq!(outcome, expected, "option {option} with {} bytes", payload.len());
    }
}

#[test]
fn a_selection_is_told_with_ids_and_answers_block_status_of_equal_length() {
    let client = Client::new(FIXED)
        .structured()
        .set_contexts("vda@1", &["base:allocation", "qemu:dirty-bitmap:older", "base:nope"])
        .go("vda@1")
        .request(proto::CMD_BLOCK_STATUS, 0, 5, 4096, SIZE - 4096)
        .request(proto::CMD_BLOCK_STATUS, proto::CMD_FLAG_REQ_ONE, 6, 0, SIZE);
    let (_, mut server) = client.talk(&exports(), 33);
    server.final_reply(proto::OPT_STRUCTURED_REPLY);
    assert_eq!(server.option_reply().payload, b"\0\0\0\0base:allocation");
    assert_eq!(server.option_reply().payload, b"\0\0\0\x01qemu:dirty-bitmap:older");
    assert_eq!(server.final_reply(proto::OPT_SET_META_CONTEXT).0, proto::REP_ACK);
    assert_eq!(server.final_reply(proto::OPT_GO).0, proto::REP_ACK);
    let mib = 1u32 << 20;
    for (cookie, id, last, words) in [
        (5, 0, false, vec![3 * mib - 4096, 0, mib, 3, 3 * mib, 0, mib, 3]),
        (5, 1, true, vec![61440, 1, SIZE - 65536, 0]),
        (6, 0, false, vec![65536, 0]),
        (6, 1, true, vec![65536, 1]),
    ] {
        let payload = [id].into_iter().chain(words).flat_map(u32::to_be_bytes).collect::<Vec<_>>();
        let kind = proto::REPLY_TYPE_BLOCK_STATUS;
        assert_eq!(server.message(0), Message::Chunk { cookie, last, kind, payload });
    }
    assert!(server.is_at_end());
}

#[test]
fn a_selection_counts_only_for_its_export_and_until_the_next() {
    let set = |client: Client, name| client.set_contexts(name, &["base:allocation"]);
    let base = || Client::new(FIXED).structured();
    let cases = [
        ("another export entered", set(base(), "vda").go("vda@1"), proto::EINVAL),
        ("selected twice", set(set(base(), "vda"), "vda@1").go("vda@1"), 0),
        ("replaced by nothing", set(base(), "vda@1").set_contexts("vda@1", &[]).go("vda@1"), proto::EINVAL),
        ("replaced by a failure", set(base(), "vda@1").set_contexts("no", &[]).go("vda@1"), proto::EINVAL),
        (
            "wildcards do not select",
            base().set_contexts("vda@1", &["base:", "qemu:", ""]).go("vda@1"),
            proto::EINVAL,
        ),
        ("a refused GO keeps it", set(base(), "vda@1").go("no").go("vda@1"), 0),
        (
            "looking elsewhere keeps it",
            set(base(), "vda@1").option(proto::OPT_INFO, &info("vda", &[])).go("vda@1"),
            0,
        ),
    ];
    for (what, client, expected) in cases {
        let (result, mut server) =
            client.request(proto::CMD_BLOCK_STATUS, 0, 1, 0, 4096).talk(&*SHARED, 4000);
        result.unwrap();
        while server.option_reply()
            != (support::wire::OptionReply { option: proto::OPT_GO, reply: proto::REP_ACK, payload: vec![] })
        {
        }
        assert_eq!(server.error_value(), expected, "{what}");
    }
}

#[test]
fn a_structured_read_is_one_chunk_and_a_failed_one_says_why_and_where() {
    let client = structured_on("broken").request(proto::CMD_READ, proto::CMD_FLAG_DF, 1, 8, 24).request(
        proto::CMD_READ,
        0,
        2,
        4096,
        8192,
    );
    let (_, mut server) = client.talk(&exports(), 50);
    entered(&mut server);
    let bytes = pattern(usize::try_from(SIZE).unwrap(), 3);
    let payload = [&8u64.to_be_bytes()[..], &bytes[8..32]].concat();
    let kind = proto::REPLY_TYPE_OFFSET_DATA;
    assert_eq!(server.message(0), Message::Chunk { cookie: 1, last: true, kind, payload });
    let payload =
        [&[0, 0, 0, 5, 0, 39][..], b"the snapshot is broken: no space left", &6000u64.to_be_bytes()];
    let mut payload = payload.concat();
    payload[5] = u8::try_from(payload.len() - 14).unwrap();
    let kind = proto::REPLY_TYPE_ERROR_OFFSET;
    assert_eq!(server.message(0), Message::Chunk { cookie: 2, last: true, kind, payload });
}

#[test]
fn what_is_written_is_read_back() {
    let client = structured_on("vda")
        .request(proto::CMD_WRITE, proto::CMD_FLAG_FUA, 1, 1000, 5)
        .data(b"hello")
        .request(proto::CMD_READ, 0, 2, 999, 7)
        .request(proto::CMD_WRITE_ZEROES, proto::CMD_FLAG_NO_HOLE, 3, 1001, 3)
        .request(proto::CMD_READ, 0, 4, 1000, 5)
        .request(proto::CMD_FLUSH, 0, 5, 0, 0)
        .disconnect();
    let (result, mut server) = client.talk(&exports(), 3);
    assert_eq!(result.unwrap(), Ending::Disconnected);
    entered(&mut server);
    assert_eq!(server.error_value(), 0);
    let Message::Chunk { payload, .. } = server.message(0) else { panic!() };
    assert_eq!(payload[9..14], *b"hello");
    assert_eq!(server.error_value(), 0);
    let Message::Chunk { payload, .. } = server.message(0) else { panic!() };
    assert_eq!(payload[8..], *b"h\0\0\0o");
    assert_eq!(server.error_value(), 0);
    assert!(server.is_at_end());
}

/// A good request of each kind; then one thing is made wrong, and the error is predicted.
#[test]
fn each_bad_request_has_its_error_and_the_next_is_answered() {
    type Request = (&'static str, u16, u16, u64, u32);
    let end = u64::from(SIZE);
    let max = proto::MAX_BLOCK_BYTES;
    let cases: [(&str, Request, u32); 17] = [
        ("unknown command", ("vda", 99, 0, 0, 512), proto::EINVAL),
        ("unknown flag", ("vda", proto::CMD_READ, 1 << 9, 0, 512), proto::EINVAL),
        ("a flag of another", ("vda", proto::CMD_WRITE, proto::CMD_FLAG_DF, 0, 512), proto::EINVAL),
        (
            "fast zero not offered",
            ("vda", proto::CMD_WRITE_ZEROES, proto::CMD_FLAG_FAST_ZERO, 0, 512),
            proto::EINVAL,
        ),
        ("read past the end", ("vda", proto::CMD_READ, 0, end - 511, 512), proto::EINVAL),
        ("read that wraps", ("vda", proto::CMD_READ, 0, u64::MAX, 512), proto::EINVAL),
        ("write past the end", ("vda", proto::CMD_WRITE, 0, end - 511, 512), proto::ENOSPC),
        ("zeroes past the end", ("vda", proto::CMD_WRITE_ZEROES, 0, end, 1), proto::ENOSPC),
        ("trim past the end", ("vda", proto::CMD_TRIM, 0, end, 1), proto::EINVAL),
        ("empty read", ("vda", proto::CMD_READ, 0, 0, 0), proto::EINVAL),
        ("empty write", ("vda", proto::CMD_WRITE, 0, 0, 0), proto::EINVAL),
        ("huge read", ("vda", proto::CMD_READ, 0, 0, max + 1), proto::EINVAL),
        ("huge write", ("vda", proto::CMD_WRITE, 0, 0, max + 1), proto::EINVAL),
        ("flush with a range", ("vda", proto::CMD_FLUSH, 0, 0, 512), proto::EINVAL),
        ("status without contexts", ("vda", proto::CMD_BLOCK_STATUS, 0, 0, 512), proto::EINVAL),
        ("write to a snapshot", ("vda@1", proto::CMD_WRITE, 0, 0, 512), proto::EPERM),
        ("trim of a snapshot", ("vda@1", proto::CMD_TRIM, 0, 0, 512), proto::EPERM),
    ];
    for structured in [false, true] {
        for (what, (name, kind, flags, offset, len), expected) in cases {
            let mut client = Client::new(FIXED);
            if structured {
                client = client.structured();
            }
            client = client.go(name).request(kind, flags, 1, offset, len);
            if kind == proto::CMD_WRITE {
                client = client.data(&vec![7; usize::try_from(len).unwrap()]);
            }
            client = client.request(proto::CMD_CACHE, 0, 2, 0, 512).disconnect();
            let (result, mut server) = client.talk(&*SHARED, 60_000);
            assert_eq!(result.unwrap(), Ending::Disconnected, "{what}");
            if structured {
                entered(&mut server);
            } else {
                server.final_reply(proto::OPT_GO);
            }
            assert_eq!(server.error_value(), expected, "{what}, structured: {structured}");
            assert_eq!(server.error_value(), 0, "{what}: in step afterwards");
            assert!(server.is_at_end());
        }
    }
}

/// A good dialogue; each byte of its fixed parts, corrupted, leads to the predicted end.
#[test]
fn each_corrupted_magic_ends_the_connection_and_what_came_before_is_answered() {
    let greeted = Client::new(FIXED);
    let entered_at = greeted.clone().go("vda@1").bytes.len();
    let good = greeted.go("vda@1").request(proto::CMD_READ, 0, 1, 0, 512);
    let second = good.bytes.len();
    let good = good.request(proto::CMD_READ, 0, 2, 0, 512).disconnect();
    assert_eq!(good.talk(&*SHARED, 11).0.unwrap(), Ending::Disconnected);

    let corrupt = |at: usize| {
        let mut bad = good.clone();
        bad.bytes[at] ^= 0x40;
        bad.talk(&*SHARED, 11)
    };
    // The client's flags, the option's magic number, the requests' magic numbers.
    for at in (0..4).chain(4..12).chain(entered_at..entered_at + 4).chain(second..second + 4) {
        let (result, mut server) = corrupt(at);
        assert!(matches!(result, Err(Error::Protocol(_))), "byte {at}: {result:?}");
        if at >= entered_at {
            server.final_reply(proto::OPT_GO);
        }
        if at >= second {
            assert!(matches!(server.message(512), Message::Simple { cookie: 1, error: 0, .. }));
        }
        assert!(server.is_at_end());
    }
}

#[test]
fn a_stream_cut_anywhere_ends_cleanly_between_messages_and_as_truncated_inside() {
    let greeted = Client::new(FIXED);
    let gone = greeted.clone().structured();
    let entered = gone.clone().go("vda");
    let read = entered.clone().request(proto::CMD_READ, 0, 1, 0, 512);
    let all = read.clone().request(proto::CMD_WRITE, 0, 2, 0, 100).data(&[1; 100]);
    let between: Vec<usize> =
        [&greeted, &gone, &entered, &read, &all].map(|client| client.bytes.len()).to_vec();
    for cut in 0..=all.bytes.len() {
        let client = Client { bytes: all.bytes[..cut].to_vec() };
        match client.talk(&*SHARED, 9).0 {
            Ok(Ending::Closed) => assert!(between.contains(&cut), "cut at {cut}"),
            Err(Error::Truncated(_)) => assert!(!between.contains(&cut), "cut at {cut}"),
            other => panic!("cut at {cut}: {other:?}"),
        }
    }
}

#[test]
fn export_name_of_nothing_and_options_without_fixed_newstyle_close() {
    let client = Client::new(FIXED).option(proto::OPT_EXPORT_NAME, b"nope");
    assert!(matches!(client.talk(&exports(), 99).0, Err(Error::Refused(_))));
    let client = Client::new(0).option(proto::OPT_LIST, &[]);
    assert!(matches!(client.talk(&exports(), 99).0, Err(Error::Protocol(_))));
}

/// Exports of which one loses its bitmaps after a number of look-ups, and others are refused.
struct Changing(Cell<u32>);

impl Exports for Changing {
    type Export = MemoryExport;

    async fn find(&self, name: &str) -> Result<MemoryExport, Refusal> {
        let export = MemoryExport::new(ExportInfo::read_only("x", 512), vec![1; 512]);
        match (name, self.0.replace(self.0.get().saturating_sub(1))) {
            ("x", 0) => Ok(export),
            ("x", _) => Ok(export.with_bitmap("old", Vec::new())),
            ("broken", _) => Err(Refusal::Policy("the snapshot is broken: no space left".into())),
            _ => Err(Refusal::Shutdown),
        }
    }

    fn list(&self) -> Vec<Listing> {
        Vec::new()
    }
}

#[test]
fn a_bitmap_gone_between_selection_and_entry_is_told_and_not_mistaken_for_another() {
    let select = Client::new(FIXED).structured().set_contexts("x", &["qemu:dirty-bitmap:old"]);
    let (result, mut server) = select.go("x").talk(&Changing(Cell::new(1)), 99);
    assert_eq!(result.unwrap(), Ending::Closed);
    server.final_reply(proto::OPT_STRUCTURED_REPLY);
    assert_eq!(server.final_reply(proto::OPT_SET_META_CONTEXT).0, proto::REP_ACK);
    let (reply, text) = server.final_reply(proto::OPT_GO);
    assert_eq!(reply, proto::REP_ERR_UNKNOWN);
    assert_eq!(text, "qemu:dirty-bitmap:old is gone since it was selected; select again");
    assert!(server.is_at_end(), "no information before the error");
}

#[test]
fn a_refused_export_tells_its_reason() {
    let client = Client::new(FIXED).go("broken").go("other");
    let (_, mut server) = client.talk(&Changing(Cell::new(0)), 99);
    let (reply, text) = server.final_reply(proto::OPT_GO);
    assert_eq!(reply, proto::REP_ERR_POLICY);
    assert_eq!(text, "the snapshot is broken: no space left");
    assert_eq!(server.final_reply(proto::OPT_GO).0, proto::REP_ERR_SHUTDOWN);
}

fn any_option() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        Just(info("vda@1", &[1, 2, 3])),
        Just(info("", &[])),
        Just(contexts("vda@1", &["base:allocation", "qemu:dirty-bitmap:old"])),
        Just(contexts("vda", &["", "base:", "qemu:"])),
    ];
    (prop_oneof![9 => 1u32..13, 1 => any::<u32>()], payload)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1usize..100) {
        let mut client = Client::new(FIXED);
        client.bytes.extend(&bytes);
        let _ = client.talk(&*SHARED, step);
        let mut client = structured_on("vda");
        client.bytes.extend(&bytes);
        let _ = client.talk(&*SHARED, step);
    }

    #[test]
    fn arbitrary_options_and_requests_are_each_answered_once(
        options in prop::collection::vec(any_option(), 0..12),
        requests in prop::collection::vec(
            (0u16..10, 0u16..32, prop_oneof![0u64..10 << 20, any::<u64>()], prop_oneof![0u32..70_000, any::<u32>()]),
            0..20,
        ),
        step in 1usize..5000,
    ) {
        let mut client = Client::new(FIXED);
        let mut sent = Vec::new();
        // What ends negotiation comes last.
        for (option, payload) in &options {
            if ![proto::OPT_EXPORT_NAME, proto::OPT_ABORT, proto::OPT_GO].contains(option) {
                client = client.option(*option, payload);
                sent.push(*option);
            }
        }
        client = client.structured().set_contexts("vda", &["base:allocation"]).go("vda");
        let mut expected = Vec::new();
        for (cookie, &(kind, flags, offset, len)) in (1u64..).zip(&requests) {
            let len = if kind == proto::CMD_WRITE { len % 100_000 } else { len };
            client = client.request(kind, flags, cookie, offset, len);
            if kind == proto::CMD_DISC {
                break;
            }
            if kind == proto::CMD_WRITE {
                client = client.data(&vec![1; usize::try_from(len).unwrap()]);
            }
            expected.push(cookie);
        }
        let (result, mut server) = client.talk(&*SHARED, step);
        prop_assert!(result.is_ok(), "{:?}", result);
        for option in sent {
            server.final_reply(option);
        }
        server.final_reply(proto::OPT_STRUCTURED_REPLY);
        server.final_reply(proto::OPT_SET_META_CONTEXT);
        server.final_reply(proto::OPT_GO);
        let mut answered = Vec::new();
        while !server.is_at_end() {
            match server.message(0) {
                Message::Simple { cookie, error, .. } => {
                    prop_assert_eq!(error, 0, "errors are structured");
                    answered.push(cookie);
                }
                Message::Chunk { cookie, last, .. } => {
                    if last {
                        answered.push(cookie);
                    }
                }
            }
        }
        prop_assert_eq!(answered, expected);
    }
}
