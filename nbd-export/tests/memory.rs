//! Lengths that a client merely names cost no memory. Alone in its process, since it measures it.

mod support;

use std::fs;

use nbd_export::{ExportInfo, proto};
use support::wire::{Client, FIXED};
use support::{MemoryExport, MemoryExports};

/// Most address space the process ever had, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn named_lengths_and_floods_stay_within_the_bound() {
    let size = 40usize << 20;
    let exports =
        MemoryExports::new([MemoryExport::new(ExportInfo::writable("x", size as u64), vec![1; size])]);
    // Warm up: the test's own buffers, and one connection.
    Client::new(FIXED).structured().go("x").disconnect().talk(&exports, 1 << 16).0.unwrap();
    let before = peak_kib();

    // Options that claim up to 4 GiB and then end.
    for option in [1, 2, 3, 6, 7, 8, 9, 10, 11, 99] {
        let mut client = Client::new(FIXED).option(option, &[]);
        let at = client.bytes.len() - 4;
        client.bytes[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        let _ = client.talk(&exports, 1 << 16);
    }
    // Counts of queries and of information requests that are not there.
    for option in [proto::OPT_GO, proto::OPT_SET_META_CONTEXT] {
        let payload = [&[0; 4][..], &[0xff; 4]].concat();
        let _ = Client::new(FIXED).structured().option(option, &payload).talk(&exports, 1 << 16);
    }
    // A write of 4 GiB that never comes, and a thousand statuses of everything.
    let client = Client::new(FIXED).structured().go("x");
    let _ = client.clone().request(proto::CMD_WRITE, 0, 1, 0, u32::MAX).talk(&exports, 1 << 16);
    let _ = client.request(proto::CMD_WRITE, 0, 1, 0, 32 << 20).talk(&exports, 1 << 16);
    let mut client = Client::new(FIXED).structured().set_contexts("x", &["base:allocation"]).go("x");
    for cookie in 0..1000 {
        client = client.request(proto::CMD_BLOCK_STATUS, 0, cookie, 0, 40 << 20);
    }
    client.talk(&exports, 1 << 16).0.unwrap();

    let grown_mib = (peak_kib() - before) >> 10;
    // The one write of 32 MiB that is within the limits has its buffer.
    assert!(grown_mib <= 32 + 16, "grew by {grown_mib} MiB");
}
