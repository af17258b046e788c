//! NBD clients that ask and take no answers, on a real daemon: what they cost it, and what others notice.
//!
//! That a machine is slow fails nothing here: others are served, however long it takes.
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::nbd::Nbd;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{Scene, disk, write_over};
use serde_json::json;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 40 * MIB;
/// Nearly as many as there may be: one that left may still be on its way out.
const GREEDY: usize = 120;
/// Requests of each of them; more than are begun.
const ASKED: u64 = 24;
/// The longest request.
const LONG: u32 = 32 << 20;
/// For the data of all clients together: a budget, and a MiB of its own for each client.
const PROMISED: u64 = (256 + 128) * MIB;
/// A thread, a ring and a receive buffer for each client, and all else that the daemon has.
const BESIDES: u64 = 48 * MIB;

/// Waits until its memory does not change any more; it never exceeds what is promised.
fn at_rest(scene: &mut Scene) -> Result<u64> {
    let (mut last, mut same) = (0, 0);
    while same < 10 {
        std::thread::sleep(Duration::from_millis(50));
        let now = scene.daemon.server().memory_bytes("RssAnon")?;
        ensure!(now < PROMISED + BESIDES, "{} MiB", now / MIB);
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// Another client reads everything, in requests of several lengths, and writes to what it may.
fn others_go_on(scene: &Scene, content: &[u8], written: &[u8]) -> Result<()> {
    let mut reader = scene.open("vda", "s")?;
    ensure!(reader.read_all()? == content, "in requests of 1 MiB, four at a time");
    for (offset, len) in [(0, LONG), (BYTES - u64::from(LONG), LONG), (4096, 4096)] {
        let from = usize::try_from(offset)?;
        ensure!(reader.read(offset, len)? == content[from..from + len as usize], "{len} bytes at {offset}");
    }
    drop(reader);
    let mut writer = Nbd::open(&scene.daemon.nbd(), "vda@s/o")?;
    writer.write(MIB + 512, written, 0)?;
    let len = u32::try_from(written.len())?;
    ensure!(writer.read(MIB + 512, len)? == written, "what was written");
    Ok(())
}

/// Clients that ask and take nothing: the first for the most that a request may have, the others for `len` bytes or less.
fn crowd(scene: &Scene, len: u32) -> Result<Vec<Nbd>> {
    let mut all = Vec::new();
    for nth in 0..GREEDY {
        let mut client = scene.open("vda", "s")?;
        let len = match nth {
            0 => LONG,
            _ if nth % 8 == 7 => 256 << 10,
            _ => len,
        };
        (0..ASKED).try_for_each(|ask| client.ask(ask * 4096, len))?;
        all.push(client);
    }
    Ok(all)
}

#[test]
fn clients_that_take_no_answers_cost_what_is_promised_and_stop_nobody() -> Result<()> {
    let mut scene = Scene::start(&[Disk { bytes: BYTES, queues: 1, ..disk("vda") }])?;
    let content = bytes(3, usize::try_from(BYTES)?);
    let mut guest = scene.guest("vda", 1)?;
    write_over(&mut guest, &content)?;
    scene.freeze("s", &["vda"])?;
    scene
        .qmp
        .call("snapshot-open", json!({ "disk": "vda", "snapshot": "s", "name": "o", "writable": true }))?;
    others_go_on(&scene, &content, &bytes(4, 9 << 20))?;
    let alone = at_rest(&mut scene)?;
    // What the first wave had serves the second, which asks for something else.
    for (wave, len) in [LONG, 300 << 10, 5 << 20].into_iter().enumerate() {
        let mut greedy = crowd(&scene, len)?;
        let most = at_rest(&mut scene)?;
        println!("{} MiB alone, {} MiB with {GREEDY} clients that take nothing", alone / MIB, most / MIB);
        guest.write(8 * wave as u64, &bytes(1, 4096))?;
        others_go_on(&scene, &content, &bytes(5 + wave as u64, 9 << 20))?;
        at_rest(&mut scene)?;
        ensure!(most > 200 * MIB, "they hold what they may: {} MiB", most / MIB);
        // One of them takes its answers after all.
        let mut late = greedy.remove(0);
        for _ in 0..ASKED {
            let (offset, data) = late.take_answer(LONG)?;
            let from = usize::try_from(offset)?;
            ensure!(data == content[from..from + LONG as usize], "a late answer of {offset}");
        }
        drop((late, greedy));
        println!("{} MiB when they are gone", at_rest(&mut scene)? / MIB);
        others_go_on(&scene, &content, &bytes(9, 9 << 20))?;
    }
    Ok(())
}
