//! Incremental backups whose base is a checkpoint: a real daemon that is killed between them, a guest over
//! vhost-user, snapshots that live no longer than they are read.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::qmp;
use ebbtide_tests::random::Random;
use ebbtide_tests::scene::{BLOCK, Scene, blocks, write_over};
use rustix::process::Signal;
use serde_json::{Value, json};

const BYTES: usize = 8 << 20;

fn disk(name: &'static str) -> Disk {
    Disk { name, bytes: BYTES as u64, queues: 2, read_only: false, more: "block-size=65536" }
}

fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = (0..count.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(count).collect()
}

/// Changes between two instants, asked for in pages of three ranges.
fn between(scene: &mut Scene, since: &str, until: &str) -> Result<Vec<Range<u64>>> {
    let mut all = Vec::new();
    let mut offset = Some(0);
    while let Some(from) = offset {
        let query = json!({ "disk": "vda", "since": since, "until": until, "offset": from, "limit": 3 });
        let page = scene.qmp.call("query-changed-blocks", query)?;
        for range in page["ranges"].as_array().context("ranges")? {
            let number = |name: &str| range[name].as_u64().with_context(|| format!("{name} of {range}"));
            let (first, length) = (number("offset")?, number("length")?);
            all.push(first..first + length);
        }
        offset = page["next-offset"].as_u64();
    }
    Ok(all)
}

/// Lays what changed since `base` over a backup, as `snapshot` has it; what was read.
fn increment(scene: &mut Scene, base: &str, snapshot: &str, backup: &mut [u8]) -> Result<Vec<Range<u64>>> {
    let changed = scene.changed("vda", base, snapshot)?;
    let mut view = scene.open("vda", snapshot)?;
    for range in &changed {
        let data = view.read(range.start, u32::try_from(range.end - range.start)?)?;
        backup[usize::try_from(range.start)?..usize::try_from(range.end)?].copy_from_slice(&data);
    }
    Ok(changed)
}

fn checkpoint(scene: &mut Scene, name: &str, snapshot: &str) -> qmp::Result<Value> {
    scene.qmp.call("checkpoint-create", json!({ "name": name, "snapshot": snapshot }))
}

fn ensure_same(what: &str, found: &[u8], wanted: &[u8]) -> Result<()> {
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    ensure!(found.len() == wanted.len() && differs.is_none(), "{what}: differs at {differs:?}");
    Ok(())
}

#[test]
fn a_chain_of_backups_goes_on_over_kills_without_a_snapshot() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 2)?;
    write_over(&mut guest, &noise(1, BYTES))?;
    scene.freeze("s", &["vda"])?;
    let mut backup = scene.view("vda", "s")?;
    let made = checkpoint(&mut scene, "full", "s")?;
    ensure!(made["disks"][0]["disk"] == "vda" && made["disks"][0]["size"] == BYTES, "{made}");
    let event = scene.qmp.wait_for_event("CHECKPOINT_CREATED")?;
    ensure!(event["name"] == "full" && event["disks"] == made["disks"], "{event}");
    scene.delete("s")?;
    let mut random = Random::new(2);
    let mut base = "full".to_owned();
    let mut told = Vec::new();
    for round in 1..=4 {
        for _ in 0..12 {
            let at = random.below((BYTES / 512) as u64 - 40);
            guest.write(at, &noise(random.next(), 4096 + 512))?;
        }
        drop(guest);
        scene.restart(Signal::KILL)?;
        guest = scene.guest("vda", 2)?;
        guest.write(0, &noise(random.next(), 512))?;
        scene.freeze("s", &["vda"])?;
        if round == 2 {
            // A backup that failed in the end: the base does not move, and nothing is lost.
            increment(&mut scene, &base, "s", &mut backup.clone())?;
            scene.delete("s")?;
            continue;
        }
        let wanted = scene.view("vda", "s")?;
        let changed = increment(&mut scene, &base, "s", &mut backup)?;
        ensure!((2..60).contains(&blocks(&changed).len()), "as much as was written: {changed:?}");
        ensure_same(&format!("round {round}"), &backup, &wanted)?;
        let name = format!("round-{round}");
        checkpoint(&mut scene, &name, "s")?;
        scene.delete("s")?;
        told.push((std::mem::replace(&mut base, name.clone()), name, changed));
        drop(guest);
        scene.restart(Signal::KILL)?;
        guest = scene.guest("vda", 2)?;
    }
    // Both ends in the past, and no snapshot anywhere.
    ensure!(scene.snapshots("vda")?.is_empty());
    for _ in 0..2 {
        for (since, until, changed) in &told {
            ensure!(between(&mut scene, since, until)? == *changed, "{since} to {until} is told again");
        }
        let all = blocks(&between(&mut scene, "full", "round-4")?);
        let union = told.iter().flat_map(|(_, _, changed)| blocks(changed)).collect();
        ensure!(all == union, "from the first to the last: {all:?}, {union:?}");
        write_over(&mut guest, &noise(9, BYTES))?;
    }
    let listed = scene.daemon.ask(&["checkpoint", "list"])?;
    ensure!(["full", "round-1", "round-3", "round-4"].iter().all(|name| listed.contains(name)), "{listed}");
    scene.restart(Signal::TERM)?;
    let deleted = scene.qmp.call("checkpoint-delete", json!({ "name": "round-3" }))?;
    ensure!(deleted["disks"] == json!(["vda"]), "{deleted}");
    scene.qmp.wait_for_event("CHECKPOINT_DELETED")?;
    ensure!(between(&mut scene, "full", "round-4")?.len() > 1, "others do not need it");
    Ok(())
}

/// Exports offer a bitmap for each older checkpoint, whose snapshot is gone.
#[test]
fn exports_have_a_bitmap_for_each_older_checkpoint() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    scene.freeze("s1", &["vda"])?;
    checkpoint(&mut scene, "monday", "s1")?;
    scene.delete("s1")?;
    guest.write(3 * BLOCK / 512, &[1; 512])?;
    scene.freeze("s2", &["vda"])?;
    checkpoint(&mut scene, "s2", "s2")?;
    guest.write(5 * BLOCK / 512, &[1; 512])?;
    scene.freeze("s3", &["vda"])?;
    checkpoint(&mut scene, "later", "s3")?;
    let bitmaps = |scene: &mut Scene, name: &str| -> Result<Vec<String>> {
        let exports = scene.qmp.call("query-exports", json!({}))?;
        let found = exports.as_array().context("a list")?.iter().find(|one| one["name"] == name);
        let names = found.with_context(|| format!("{name} in {exports}"))?["bitmaps"].clone();
        let mut names: Vec<String> = serde_json::from_value(names)?;
        names.sort();
        Ok(names)
    };
    ensure!(bitmaps(&mut scene, "vda@s2")? == ["monday"], "none of a later one, none of itself");
    ensure!(bitmaps(&mut scene, "vda@s3")? == ["monday", "s2"], "an instant with two names is one bitmap");
    let export = json!({ "name": "one", "disk": "vda", "snapshot": "s3", "bitmap": "monday" });
    scene.qmp.call("nbd-export-add", export)?;
    ensure!(bitmaps(&mut scene, "one")? == ["monday"]);
    let uri = format!("nbd+unix:///one?socket={}", scene.daemon.nbd().display());
    let mut map = std::process::Command::new("nbdinfo");
    map.args(["--json", "--map=qemu:dirty-bitmap:monday", &uri]);
    let map: Value = serde_json::from_str(&ebbtide_tests::server::output_of(
        map,
        &[],
        std::time::Duration::from_secs(60),
    )?)?;
    let dirty = map.as_array().context("a list")?.iter().filter(|one| one["type"] == 1);
    let offsets: Vec<_> = dirty.filter_map(|one| one["offset"].as_u64()).collect();
    ensure!(offsets == [3 * BLOCK, 5 * BLOCK], "{map}");
    for (bitmap, reason) in [("later", "since-not-older"), ("never", "snapshot-not-found")] {
        let export = json!({ "name": "two", "disk": "vda", "snapshot": "s2", "bitmap": bitmap });
        let error = scene.qmp.call("nbd-export-add", export).expect_err("there is no such bitmap");
        ensure!(error.reason() == reason, "{bitmap}: {error}");
    }
    Ok(())
}

/// Why changes cannot be told, and whether they can.
#[test]
fn a_refusal_says_what_is_wrong_with_the_older_end() -> Result<()> {
    let disks = [disk("vda"), disk("vdb")];
    let mut scene = Scene::start(&disks)?;
    let ids = scene.freeze("s1", &["vda", "vdb"])?;
    let made = checkpoint(&mut scene, "both", "s1")?;
    ensure!(made["disks"].as_array().map(Vec::len) == Some(2), "{made}");
    scene.qmp.call("checkpoint-create", json!({ "name": "one", "snapshot": "s1", "disks": ["vda"] }))?;
    let (generation, epoch) = ids[0].split_once('/').context("a change id")?;
    let later = format!("{generation}/{}", epoch.parse::<u64>()? + 1);
    let unknown = "6f9619ff-8b86-4011-b42d-00c04fc964ff/1";
    let refused = |scene: &mut Scene, since: &str, until: &str| {
        let query = json!({ "disk": "vda", "since": since, "until": until });
        scene.qmp.call("query-changed-blocks", query).map_err(|error| error.reason().to_owned()).err()
    };
    let why = |reason: &str| Some(reason.to_owned());
    for until in ["s1", "one", ids[0].as_str()] {
        ensure!(refused(&mut scene, "x/y", until) == why("bad-change-id"));
        ensure!(refused(&mut scene, unknown, until) == why("generation-differs"));
        ensure!(refused(&mut scene, &ids[1], until) == why("other-disk"));
        ensure!(refused(&mut scene, &later, until) == why("since-not-older"));
        ensure!(refused(&mut scene, "never", until) == why("snapshot-not-found"));
        ensure!(refused(&mut scene, &ids[0], until).is_none());
    }
    ensure!(refused(&mut scene, &ids[0], "never") == why("snapshot-not-found"));
    ensure!(refused(&mut scene, &ids[0], &later) == why("snapshot-not-found"));

    let ask = |scene: &mut Scene, since: &str| -> Result<Vec<(bool, String)>> {
        let all = scene.qmp.call("query-incremental", json!({ "since": since }))?;
        let text = |one: &Value| one["reason"].as_str().unwrap_or_default().to_owned();
        let one = |one: &Value| (one["possible"] == true, text(one));
        Ok(all.as_array().context("a list")?.iter().map(one).collect())
    };
    let yes = || (true, String::new());
    let no = |reason: &str| (false, reason.to_owned());
    ensure!(ask(&mut scene, "both")? == [yes(), yes()]);
    ensure!(ask(&mut scene, "one")? == [yes(), no("snapshot-not-found")]);
    ensure!(ask(&mut scene, &ids[0])? == [yes(), no("other-disk")]);
    ensure!(ask(&mut scene, "x/y")? == [no("bad-change-id"), no("bad-change-id")]);

    // The image is changed while nobody serves it.
    scene.daemon.server().signal(Signal::TERM)?;
    let gone = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while scene.daemon.server().is_alive() && std::time::Instant::now() < gone {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::fs::write(scene.daemon.image("vda"), noise(5, BYTES))?;
    scene.restart(Signal::TERM)?;
    ensure!(ask(&mut scene, "both")? == [no("generation-differs"), yes()]);
    let error = scene.freeze("s2", &["vda"]).and_then(|_| {
        scene.qmp.call("query-changed-blocks", json!({ "disk": "vda", "since": ids[0], "snapshot": "s2" }))
    });
    let error = error.expect_err("its history has ended");
    ensure!(error.reason() == "generation-differs" && error.to_string().contains("image-changed"), "{error}");
    let listed = scene.qmp.call("query-checkpoints", json!({ "disk": "vda" }))?;
    ensure!(listed[0]["current"] == false && listed[0]["ended"] == "image-changed", "{listed}");
    let told = scene.daemon.ask(&["incremental", "both"])?;
    ensure!(
        told.contains("vda: no") && told.contains("image-changed") && told.contains("vdb: yes"),
        "{told}"
    );
    scene.daemon.ask(&["checkpoint", "delete", "both"])?;
    ensure!(scene.qmp.call("query-checkpoints", json!({ "disk": "vdb" }))? == json!([]));
    for (name, snapshot, reason) in [
        ("one", "s2", "checkpoint-exists"),
        ("both", "s9", "snapshot-not-found"),
        ("a/b", "s2", "bad-argument"),
    ] {
        let error = checkpoint(&mut scene, name, snapshot).expect_err(reason);
        ensure!(error.reason() == reason, "{name} of {snapshot}: {error}");
    }
    Ok(())
}
