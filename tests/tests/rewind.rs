//! A disk becomes one of its snapshots again: a real daemon, guests over vhost-user, views over NBD.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::qmp;
use ebbtide_tests::random::Random;
use ebbtide_tests::scene::{Scene, blocks, write_over};
use rustix::process::Signal;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

fn disk(bytes: u64) -> Disk {
    Disk { name: "vda", bytes, queues: 2, read_only: false, more: "block-size=65536" }
}

fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = (0..count.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(count).collect()
}

fn revert(scene: &mut Scene, snapshot: &str, force: bool) -> qmp::Result<Value> {
    scene.qmp.call("disk-revert", json!({ "disk": "vda", "snapshot": snapshot, "force": force }))
}

/// Reverts, once the daemon has noticed that its guest is gone.
fn revert_alone(scene: &mut Scene, snapshot: &str) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match revert(scene, snapshot, false) {
            Err(error) if error.reason() == "disk-in-use" && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            answer => return answer.context("disk-revert"),
        }
    }
}

fn rewind_of(scene: &mut Scene) -> Result<Value> {
    Ok(scene.qmp.call("query-disks", json!({}))?[0]["rewind"].take())
}

/// Waits until nothing is left to be copied back.
fn complete(scene: &mut Scene) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let rewind = rewind_of(scene)?;
        if rewind.is_null() {
            return Ok(());
        }
        ensure!(rewind["trouble"].is_null() && Instant::now() < deadline, "it does not end: {rewind}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The whole disk as a guest reads it.
fn read_all(scene: &Scene, count: usize) -> Result<Vec<u8>> {
    let mut guest = scene.guest("vda", 1)?;
    let mut all = Vec::new();
    while all.len() < count {
        let part = (count - all.len()).min(1 << 16);
        all.extend(guest.read((all.len() / 512) as u64, u32::try_from(part)?)?);
    }
    Ok(all)
}

/// Compares without printing megabytes.
fn ensure_same(what: &str, found: &[u8], wanted: &[u8]) -> Result<()> {
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    ensure!(found.len() == wanted.len() && differs.is_none(), "{what}: differs at {differs:?}");
    Ok(())
}

#[test]
fn a_disk_becomes_any_of_its_snapshots_again() -> Result<()> {
    const BYTES: usize = 4 << 20;
    let mut scene = Scene::start(&[disk(BYTES as u64)])?;
    let first = noise(1, BYTES);
    let mut guest = scene.guest("vda", 2)?;
    write_over(&mut guest, &first)?;
    scene.freeze("one", &["vda"])?;
    let mut second = first.clone();
    second[..1 << 20].copy_from_slice(&noise(2, 1 << 20));
    guest.write(0, &second[..1 << 20])?;
    scene.freeze("two", &["vda"])?;
    // Over what changed before and what did not, in part of a grain, and as zeros.
    guest.write(2040, &noise(3, 8192 + 512))?;
    guest.write_zeroes(4096, 100, true)?;
    guest.discard(6000, 64)?;
    drop(guest);

    let told = revert_alone(&mut scene, "one")?;
    ensure!(told["snapshot"] == "one" && told["bytes"].as_u64() >= Some(1 << 20), "{told}");
    ensure_same("at once", &read_all(&scene, BYTES)?, &first)?;
    let event = scene.qmp.wait_for_event("REWIND_STARTED")?;
    ensure!(event["disk"] == "vda" && event["snapshot"] == "one", "{event}");
    scene.qmp.wait_for_event("REWIND_COMPLETED")?;
    complete(&mut scene)?;
    ensure_same("the image", &scene.image("vda")?, &first)?;
    ensure_same("its snapshot", &scene.view("vda", "one")?, &first)?;
    ensure_same("a newer one", &scene.view("vda", "two")?, &second)?;

    scene.freeze("three", &["vda"])?;
    let changed = blocks(&scene.changed("vda", "two", "three")?);
    ensure!((0..17).all(|block| changed.contains(&block)), "what the rewind changed is told: {changed:?}");
    ensure!(changed.len() < 40, "and no more: {changed:?}");

    revert_alone(&mut scene, "two")?;
    ensure_same("forth again", &read_all(&scene, BYTES)?, &second)?;
    complete(&mut scene)?;
    ensure_same("the image again", &scene.image("vda")?, &second)?;
    for (name, wanted) in [("one", &first), ("two", &second), ("three", &first)] {
        ensure_same(name, &scene.view("vda", name)?, wanted)?;
        scene.delete(name)?;
    }
    scene.restart(Signal::TERM)?;
    ensure_same("after a restart", &read_all(&scene, BYTES)?, &second)
}

#[test]
fn a_rewind_survives_kills_with_guests_at_work() -> Result<()> {
    const BYTES: usize = 128 << 20;
    let mut scene = Scene::start(&[disk(BYTES as u64)])?;
    let frozen = noise(7, BYTES);
    let mut guest = scene.guest("vda", 2)?;
    write_over(&mut guest, &frozen)?;
    scene.freeze("s", &["vda"])?;
    write_over(&mut guest, &noise(8, BYTES))?;
    drop(guest);
    revert_alone(&mut scene, "s")?;
    scene.restart(Signal::KILL)?;
    let left = rewind_of(&mut scene)?["bytes-left"].as_u64();
    ensure!(left > Some(0), "killed too late to show anything: {left:?}");

    let mut wanted = frozen.clone();
    let mut random = Random::new(9);
    for round in 0..3 {
        let mut guest = scene.guest("vda", 1)?;
        for n in 0..20 {
            let sectors = 1 + random.below(40);
            let first = random.below((BYTES / 512) as u64 - sectors);
            let (at, len) = (usize::try_from(first)? * 512, usize::try_from(sectors)? * 512);
            if n % 5 == 0 {
                guest.write_zeroes(first, u32::try_from(sectors)?, n % 2 == 0)?;
                wanted[at..at + len].fill(0);
            } else {
                let data = noise(random.next(), len);
                guest.write(first, &data)?;
                wanted[at..at + len].copy_from_slice(&data);
            }
            ensure_same("what was written", &guest.read(first, u32::try_from(len)?)?, &wanted[at..at + len])?;
        }
        guest.flush()?;
        drop(guest);
        scene.restart(if round == 1 { Signal::TERM } else { Signal::KILL })?;
    }
    ensure_same("all of it", &read_all(&scene, BYTES)?, &wanted)?;
    complete(&mut scene)?;
    ensure_same("the image", &scene.image("vda")?, &wanted)?;
    ensure_same("the snapshot", &scene.view("vda", "s")?, &frozen)?;
    ensure!(!scene.daemon.dir().join("vda.img.ebb/rewind").exists(), "its files are gone");
    Ok(())
}

#[test]
fn what_cannot_be_rewound_is_refused() -> Result<()> {
    const BYTES: usize = 64 << 20;
    let mut scene = Scene::start(&[disk(BYTES as u64)])?;
    let mut guest = scene.guest("vda", 1)?;
    let frozen = noise(1, 1 << 20);
    guest.write(0, &frozen)?;
    scene.freeze("s", &["vda"])?;
    for at in 0..60 {
        guest.write(at << 11, &noise(at, 1 << 20))?;
    }
    let reason = |answer: qmp::Result<Value>| answer.map_err(|error| error.reason().to_owned());
    ensure!(reason(revert(&mut scene, "s", false)) == Err("disk-in-use".into()));
    ensure!(reason(revert(&mut scene, "t", true)) == Err("snapshot-not-found".into()));
    let other = scene.qmp.call("disk-revert", json!({ "disk": "vdb", "snapshot": "s" }));
    ensure!(reason(other) == Err("disk-not-found".into()));

    // A guest that was told of it goes on: what it reads is the snapshot.
    revert(&mut scene, "s", true)?;
    for answer in [revert(&mut scene, "s", true), scene.qmp.call("snapshot-create", json!({ "name": "t" }))] {
        // Unless this test was held up until it was complete.
        let answer = reason(answer);
        ensure!(answer == Err("rewind-active".into()) || rewind_of(&mut scene)?.is_null(), "{answer:?}");
    }
    ensure_same("a connected guest", &guest.read(0, 1 << 20)?, &frozen)?;
    ensure_same("and the rest", &guest.read(40 << 11, 1 << 20)?, &[0; 1 << 20])?;
    drop(guest);
    complete(&mut scene)?;
    let told = scene.daemon.ask(&["snapshot", "revert", "s", "--disk", "vda", "--force"])?;
    ensure!(told.contains("vda"), "{told}");
    complete(&mut scene)?;

    let mut scene = Scene::start(&[Disk { read_only: true, ..disk(1 << 20) }])?;
    scene.freeze("s", &["vda"])?;
    ensure!(reason(revert(&mut scene, "s", false)) == Err("read-only".into()));
    Ok(())
}

#[test]
fn a_disk_whose_rewind_was_damaged_is_not_served() -> Result<()> {
    const BYTES: usize = 64 << 20;
    let mut scene = Scene::start(&[disk(BYTES as u64)])?;
    let mut guest = scene.guest("vda", 2)?;
    write_over(&mut guest, &noise(1, BYTES))?;
    scene.freeze("s", &["vda"])?;
    write_over(&mut guest, &noise(2, BYTES))?;
    drop(guest);
    revert_alone(&mut scene, "s")?;
    scene.daemon.server().signal(Signal::KILL)?;
    let file = scene.daemon.dir().join("vda.img.ebb/rewind");
    let whole = std::fs::read(&file)?;
    let mut damaged = whole.clone();
    damaged[5000 % whole.len()] ^= 1;
    for bytes in [&damaged[..], &whole[..whole.len() - 16], &whole[..100]] {
        std::fs::write(&file, bytes)?;
        let error = format!("{:#}", scene.restart(Signal::KILL).err().context("it is served")?);
        ensure!(error.contains("a rewind to snapshot"), "{error}");
        ensure!(error.contains("neither the disk before nor after"), "{error}");
    }
    std::fs::write(&file, &whole)?;
    scene.restart(Signal::KILL)?;
    ensure_same("with its file back", &read_all(&scene, BYTES)?, &noise(1, BYTES))
}
