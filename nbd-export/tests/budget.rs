//! Memory for all connections together: clients that ask and take no answers, beside others that go on. Alone in its
//! process, since it measures it.

mod support;

use std::fs;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use nbd_export::{Budget, Connection, Ending, Error, ExportInfo, OWN_BYTES, proto};
use support::pipe::Pipe;
use support::wire::{Client, FIXED, Message};
use support::{MemoryExport, MemoryExports, Script, block_on, pattern};

const MIB: usize = 1 << 20;
const SIZE: usize = 36 * MIB;
const BUDGET: usize = 48 * MIB;
const GREEDY: usize = 24;

/// Most memory that the process ever had in use, in MiB.
fn peak_mib() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() >> 10
}

fn exports(bytes: Vec<u8>) -> MemoryExports {
    let size = bytes.len() as u64;
    let image = MemoryExport::new(ExportInfo::writable("x", size), bytes);
    // A bitmap whose extents do not fit into one reply.
    MemoryExports::new([
        image.with_bitmap("old", (0..size / 1024).map(|k| k * 1024..k * 1024 + 512).collect())
    ])
}

/// A connection that is driven when somebody likes.
type Driven<'x> = Pin<Box<dyn Future<Output = Result<Ending, Error>> + 'x>>;

/// Whoever can go on does so until nobody can.
fn drive(all: &mut [Driven<'_>]) {
    for _ in 0..50 {
        block_on(poll_fn(|cx| {
            all.iter_mut().for_each(|one| assert!(one.as_mut().poll(cx).is_pending()));
            Poll::Ready(())
        }));
    }
}

/// A client that asks for all it may, and never takes a byte.
fn greedy<'x>(exports: &'x MemoryExports, budget: &Arc<Budget>, client: &Client) -> Driven<'x> {
    let script = Script { bytes: client.bytes.clone(), at: 0, step: 1 << 16 };
    // Room for the handshake.
    let connection = Connection::new(script, Pipe::new(4096)).sharing(budget.clone());
    Box::pin(connection.serve(exports))
}

const LONG: u32 = 32 << 20;

/// Reads of all lengths, one with a single chunk, a write, and a status.
fn modest_talks(exports: &MemoryExports, budget: &Arc<Budget>, image: &[u8], is_short: bool) {
    let written = pattern(3 * MIB + 512, 99);
    let client = Client::new(FIXED)
        .structured()
        .set_contexts("x", &["qemu:dirty-bitmap:old"])
        .go("x")
        .request(proto::CMD_READ, 0, 1, 512, LONG)
        .request(proto::CMD_READ, proto::CMD_FLAG_DF, 2, 1 << 20, LONG)
        .request(proto::CMD_READ, 0, 3, 4096, 4096)
        .request(proto::CMD_WRITE, 0, 4, 0, u32::try_from(written.len()).unwrap())
        .data(&written)
        .request(proto::CMD_BLOCK_STATUS, 0, 5, 0, LONG)
        .disconnect();
    let (ending, mut server) = client.talk_within(budget, exports);
    assert_eq!(ending.unwrap(), Ending::Disconnected);
    server.entered(&[proto::OPT_STRUCTURED_REPLY, proto::OPT_SET_META_CONTEXT, proto::OPT_GO]);
    let long = LONG as usize;
    let (data, chunks) = server.data_of(1, 512, long);
    assert!(data == image[512..512 + long], "a long read");
    assert_eq!(chunks, if is_short { long / OWN_BYTES } else { 1 });
    let (data, chunks) = server.data_of(2, MIB, long);
    assert!(data == image[MIB..MIB + long], "a long read that may not be cut");
    assert_eq!(chunks, 1);
    assert!(server.data_of(3, 4096, 4096).0 == image[4096..8192], "a short read");
    assert_eq!(server.error_value(), 0, "a write");
    let Message::Chunk { cookie: 5, payload, .. } = server.message(0) else { panic!("no status") };
    assert!(payload.len() > 8 * 30_000, "{}", payload.len());
    assert!(server.is_at_end());
    let bytes = exports.0[0].bytes.read().unwrap();
    assert!(bytes[..written.len()] == written && bytes[written.len()..] == image[written.len()..]);
    drop(bytes);
    exports.0[0].bytes.write().unwrap().copy_from_slice(image);
}

/// A client without structured replies.
fn plain_talks(exports: &MemoryExports, budget: &Arc<Budget>, image: &[u8]) {
    let client = Client::new(FIXED)
        .go("x")
        .request(proto::CMD_READ, 0, 7, 512, LONG)
        .request(proto::CMD_READ, 0, 8, 0, 512)
        .disconnect();
    let (ending, mut server) = client.talk_within(budget, exports);
    assert_eq!(ending.unwrap(), Ending::Disconnected);
    server.entered(&[proto::OPT_GO]);
    for (cookie, offset, len) in [(7, 512, LONG as usize), (8, 0, 512)] {
        let Message::Simple { cookie: of, error: 0, data } = server.message(len) else { panic!("no data") };
        assert!(of == cookie && data == image[offset..offset + len], "{cookie}");
    }
    assert!(server.is_at_end());
}

#[test]
fn clients_that_take_no_answers_hold_the_budget_and_stop_nobody() {
    let image = pattern(SIZE, 5);
    let exports = exports(image.clone());
    let budget = Arc::new(Budget::new(BUDGET));
    modest_talks(&exports, &budget, &image, false);
    plain_talks(&exports, &budget, &image);
    let before = peak_mib();

    let kinds = [
        (proto::CMD_READ, LONG),
        (proto::CMD_READ, 4 << 20),
        (proto::CMD_READ, 65536),
        (proto::CMD_BLOCK_STATUS, LONG),
    ];
    let mut all: Vec<_> = (0..GREEDY)
        .map(|nth| {
            let (kind, len) = kinds[nth % kinds.len()];
            let mut client =
                Client::new(FIXED).structured().set_contexts("x", &["qemu:dirty-bitmap:old"]).go("x");
            for cookie in 0..40 {
                client = client.request(kind, 0, cookie, cookie * 4096 % 65536, len);
            }
            greedy(&exports, &budget, &client)
        })
        .collect();
    drive(&mut all);
    for _ in 0..3 {
        modest_talks(&exports, &budget, &image, true);
        plain_talks(&exports, &budget, &image);
        drive(&mut all);
    }
    let grown = peak_mib() - before;
    // What clients heard is kept too, by the test; and there is the connections' own memory.
    let most = (BUDGET + GREEDY * OWN_BYTES) / MIB + 8;
    println!("grew by {grown} MiB of {most}");
    assert!(grown <= most, "grew by {grown} MiB");
    // What they had is there again.
    drop(all);
    modest_talks(&exports, &budget, &image, false);
}
