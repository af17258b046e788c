//! A disk that becomes smaller while a guest writes to all of it: real daemons, guests over vhost-user.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{BLOCK, Scene, blocks, disk, write_over};
use ebbtide_tests::vhost_client::{Client, Op, Options};
use rustix::process::Signal;
use serde_json::{Value, json};
use vhost::vhost_user::VhostUserFrontend as _;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// No whole number of blocks, nor of grains.
const OLD: u64 = (70 << 20) + 3 * 512;
const NEW: u64 = (4 << 20) + 9 * 512;

fn capacity(guest: &mut Client) -> Result<u64> {
    let mut field = [0; 8];
    field.copy_from_slice(&guest.config(0, 8)?);
    Ok(u64::from_le_bytes(field) * 512)
}

fn shrink(scene: &mut Scene, size: u64) -> ebbtide_tests::qmp::Result<Value> {
    scene.qmp.call("block_resize", json!({ "disk": "vda", "size": size, "shrink": true }))
}

/// Keeps writes and reads of the whole disk in flight until told to stop; whether some were refused.
fn load(guest: &mut Client, stop: &AtomicBool) -> Result<bool> {
    let (mut refused, mut at) = (false, 0);
    while !stop.load(SeqCst) {
        let mut tickets = Vec::new();
        for _ in 0..8 {
            at = (at + 7919 * 8) % (OLD / 512 - 8);
            tickets.push(guest.start(&Op::write(at, &[5; 4096]))?);
            tickets.push(guest.start(&Op::read(at, 4096))?);
        }
        for ticket in tickets {
            let status = guest.finish(ticket)?.status;
            ensure!(status <= 1, "an answer: {status}");
            refused |= status == 1;
        }
    }
    Ok(refused)
}

#[test]
fn a_disk_becomes_smaller_under_load_and_its_history_goes_on() -> Result<()> {
    let mut scene = Scene::start(&[Disk { bytes: OLD, ..disk("vda") }])?;
    let options = Options {
        queues: 2,
        protocol: Options::default().protocol | VhostUserProtocolFeatures::BACKEND_REQ,
        ..Options::default()
    };
    let mut guest = scene.daemon.connect("vda", &options)?;
    let (told, theirs) = UnixStream::pair()?;
    guest.call(|frontend| frontend.set_backend_request_fd(&theirs.as_raw_fd()))?;
    write_over(&mut guest, &bytes(1, 1 << 20))?;
    let id = scene.freeze("s0", &["vda"])?.remove(0);

    // What is held, and what was not said, is refused.
    let error = shrink(&mut scene, NEW).expect_err("a snapshot is held");
    ensure!(error.reason() == "snapshots-held" && error.to_string().contains("s0"), "{error}");
    scene.delete("s0")?;
    let quietly = scene.qmp.call("block_resize", json!({ "disk": "vda", "size": NEW }));
    let error = quietly.expect_err("it was not said");
    ensure!(error.reason() == "bad-argument" && error.to_string().contains("lost"), "{error}");
    for (size, reason) in [(0, "bad-argument"), (NEW + 1, "bad-argument")] {
        let error = shrink(&mut scene, size).expect_err("bad input");
        ensure!(error.reason() == reason, "{size}: {error}");
    }
    ensure!(capacity(&mut guest)? == OLD, "nothing has changed");

    let stop = AtomicBool::new(false);
    let refused = std::thread::scope(|scope| {
        let loaded = scope.spawn(|| load(&mut guest, &stop));
        let answer = shrink(&mut scene, NEW);
        // A little more, all of it after the answer.
        std::thread::sleep(std::time::Duration::from_millis(50));
        stop.store(true, SeqCst);
        let refused = loaded.join().expect("no panic");
        let answer = answer?;
        ensure!(answer == json!({ "disk": "vda", "size": NEW, "announced": true }), "{answer}");
        refused
    })?;
    ensure!(refused, "requests past the new end are refused");
    drop(told);
    ensure!(capacity(&mut guest)? == NEW, "the configuration space");
    ensure!(std::fs::metadata(scene.daemon.image("vda"))?.len() == NEW, "the image");
    guest.write(NEW / 512 - 1, &[9; 512])?;
    ensure!(guest.run(&Op::write(NEW / 512, &[9; 512]))?.status != 0, "a write past the new end");
    guest.flush()?;

    // Its id is good for what the disk is now.
    scene.freeze("s1", &["vda"])?;
    let changed = scene.changed("vda", &id, "s1")?;
    ensure!(changed.last().is_some_and(|last| last.end == NEW), "up to the end: {changed:?}");
    scene.delete("s1")?;
    drop(guest);
    for signal in [Signal::KILL, Signal::TERM] {
        scene.restart(signal)?;
        let now = scene.qmp.call("query-disks", json!({}))?[0].take();
        ensure!(now["size"] == NEW && now["tracker"]["reason"] == "kept", "after {signal:?}: {now}");
    }

    // What comes later counts as changed, and is zeros.
    scene.freeze("s2", &["vda"])?;
    scene.qmp.call("block_resize", json!({ "disk": "vda", "size": OLD }))?;
    let mut guest = scene.guest("vda", 1)?;
    ensure!(guest.read(NEW / 512, 4096)? == [0; 4096], "what is new is zeros");
    scene.freeze("s3", &["vda"])?;
    let grown = scene.changed("vda", "s2", "s3")?;
    ensure!(blocks(&grown) == (NEW / BLOCK..OLD.div_ceil(BLOCK)).collect(), "{grown:?}");
    Ok(())
}
