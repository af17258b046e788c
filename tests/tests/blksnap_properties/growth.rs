//! A disk that grows while it is served and frozen: blksnap stops tracking it, and what it had frozen is lost.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

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
const OLD: u64 = (4 << 20) + 9 * 512;
const NEW: u64 = (70 << 20) + 3 * 512;

fn capacity(guest: &mut Client) -> Result<u64> {
    let mut field = [0; 8];
    field.copy_from_slice(&guest.config(0, 8)?);
    Ok(u64::from_le_bytes(field) * 512)
}

fn resize(scene: &mut Scene, disk: &str, size: u64) -> ebbtide_tests::qmp::Result<Value> {
    scene.qmp.call("block_resize", json!({ "disk": disk, "size": size }))
}

/// The blocks from the one at the old end on.
fn new_blocks(old: u64, new: u64) -> BTreeSet<u64> {
    (old / BLOCK..new.div_ceil(BLOCK)).collect()
}

#[test]
fn b_missing_online_grow_under_snapshot() -> Result<()> {
    let mut scene = Scene::start(&[Disk { bytes: OLD, ..disk("vda") }])?;
    let options = Options {
        queues: 2,
        protocol: Options::default().protocol | VhostUserProtocolFeatures::BACKEND_REQ,
        ..Options::default()
    };
    let mut guest = scene.daemon.connect("vda", &options)?;
    let (mut told, theirs) = UnixStream::pair()?;
    guest.call(|frontend| frontend.set_backend_request_fd(&theirs.as_raw_fd()))?;
    let old = bytes(1, usize::try_from(OLD)?);
    write_over(&mut guest, &old)?;
    scene.freeze("s0", &["vda"])?;
    guest.write(0, &[1; 512])?;
    scene.freeze("s1", &["vda"])?;
    let before = scene.changed("vda", "s0", "s1")?;
    ensure!(guest.run(&Op::read(OLD / 512, 512))?.status != 0, "a read past the old end");

    let answer = resize(&mut scene, "vda", NEW)?;
    ensure!(answer == json!({ "disk": "vda", "size": NEW, "announced": true }), "{answer}");
    let mut message = [0; 12];
    told.read_exact(&mut message)?;
    ensure!(message == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "a config change: {message:?}");
    ensure!(capacity(&mut guest)? == NEW, "the configuration space");
    ensure!(std::fs::metadata(scene.daemon.image("vda"))?.len() == NEW, "the image");
    ensure!(scene.qmp.call("query-disks", json!({}))?[0]["size"] == NEW, "query-disks");

    // The rings that run reach all of it, and no further.
    ensure!(guest.read(OLD / 512, 4096)? == [0; 4096], "what is new is zeros");
    guest.write(OLD / 512, &[7; 512])?;
    guest.write(NEW / 512 - 1, &[8; 512])?;
    guest.write(OLD / 512 - 1, &[9; 512])?;
    guest.discard(40 << 11, 2048)?;
    ensure!(guest.run(&Op::read(NEW / 512, 512))?.status != 0, "a read past the new end");

    // What is held stays as long as it was, and as it was.
    for (name, first) in [("s0", old[0]), ("s1", 1)] {
        let view = scene.view("vda", name)?;
        ensure!(view.len() as u64 == OLD && view[0] == first && view[512..] == old[512..], "{name}");
    }
    ensure!(scene.changed("vda", "s0", "s1")? == before, "the changes of what is held");
    scene.freeze("s2", &["vda"])?;
    let grown = scene.changed("vda", "s1", "s2")?;
    ensure!(blocks(&grown) == new_blocks(OLD, NEW), "what is new counts as changed: {grown:?}");
    ensure!(grown.last().is_some_and(|last| last.end == NEW), "up to the end: {grown:?}");
    guest.write(60 << 11, &[3; 512])?;
    scene.freeze("s3", &["vda"])?;
    let next = scene.changed("vda", "s2", "s3")?;
    ensure!(blocks(&next) == [(60 << 20) / BLOCK].into(), "and only once: {next:?}");
    let grown_view = scene.view("vda", "s2")?;
    ensure!(
        grown_view.len() as u64 == NEW && grown_view[60 << 20] == 0,
        "the newer view is as long as the disk"
    );

    // Older ones take over what a newer, larger one held; and all of it is there after a kill, and after an end.
    guest.flush()?;
    scene.delete("s2")?;
    drop(guest);
    for signal in [Signal::KILL, Signal::TERM] {
        scene.restart(signal)?;
        let mut guest = scene.guest("vda", 1)?;
        ensure!(capacity(&mut guest)? == NEW, "the size after {signal:?}");
        let view = scene.view("vda", "s1")?;
        ensure!(view.len() as u64 == OLD && view[512..] == old[512..], "s1 after {signal:?}");
        ensure!(scene.changed("vda", "s0", "s1")? == before, "changes after {signal:?}");
        let all = blocks(&scene.changed("vda", "s1", "s3")?);
        ensure!(all == new_blocks(OLD, NEW), "from s1 to s3 after {signal:?}: {all:?}");
    }
    // A front end without a channel sees it when it comes again.
    let answer = resize(&mut scene, "vda", NEW + BLOCK)?;
    ensure!(answer["announced"] == false, "{answer}");
    Ok(())
}

#[test]
fn b_missing_online_grow_refuses_what_cannot_be() -> Result<()> {
    let size: u64 = 4 << 20;
    let mut scene = Scene::start(&[
        disk("vda"),
        Disk { read_only: true, ..disk("vdr") },
        Disk { more: "logical-block-size=4096", ..disk("vdb") },
    ])?;
    for (disk, wanted, reason, mention) in [
        ("vdx", json!(size * 2), "disk-not-found", "vdx"),
        ("vdr", json!(size * 2), "read-only", "vdr"),
        ("vda", json!(size - 512), "bad-argument", "smaller"),
        ("vda", json!(0), "bad-argument", "0 bytes"),
        ("vda", json!(size + 1), "bad-argument", "512"),
        ("vdb", json!(size + 512), "bad-argument", "4096"),
        ("vda", json!(u64::MAX / 512 * 512), "io", "change map"),
        ("vda", json!(-1), "bad-argument", "size"),
        ("vda", json!("4G"), "bad-argument", "size"),
    ] {
        let answer = scene.qmp.call("block_resize", json!({ "disk": disk, "size": wanted }));
        let error = answer.expect_err("bad input");
        ensure!(error.reason() == reason && error.to_string().contains(mention), "{disk} {wanted}: {error}");
    }
    // Someone else made the image longer: which size is meant is for the operator to say.
    let image = std::fs::OpenOptions::new().write(true).open(scene.daemon.image("vda"))?;
    image.set_len(size * 3)?;
    let error = resize(&mut scene, "vda", size * 2).expect_err("the image is longer");
    ensure!(error.reason() == "image-length" && error.to_string().contains("12582912"), "{error}");
    ensure!(scene.qmp.call("query-disks", json!({}))?[0]["size"] == size, "nothing has changed");
    resize(&mut scene, "vda", size * 3)?;
    resize(&mut scene, "vda", size * 3)?;
    scene.restart(Signal::KILL)?;
    ensure!(scene.qmp.call("query-disks", json!({}))?[0]["size"] == size * 3, "as it was told");
    ensure!(
        scene.qmp.call("query-disks", json!({}))?[0]["tracker"]["reason"] == "kept",
        "the history goes on"
    );
    Ok(())
}
