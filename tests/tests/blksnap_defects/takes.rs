//! Defects of taking snapshots, and of telling what becomes of them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use ebbtide_tests::qmp::Qmp;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{Scene, disk, on_one_queue_and_on_four, write_over};
use ebbtide_tests::stamped::rig::{Rig, Setup};
use rustix::process::Resource;
use serde_json::{Value, json};

const DISK_BYTES: usize = 4 << 20;

/// D6: adding the device that holds the difference storage says yes and does nothing. Here what a snapshot
/// is asked of, it has, or it is refused and changes nothing. (A state directory on the disk that it
/// serves is refused when the daemon starts.)
#[test]
fn a10_d6_a_snapshot_has_every_disk_that_it_was_asked_of() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
    let answer = scene.qmp.call("snapshot-create", json!({ "name": "s", "disks": ["vdb", "vda"] }))?;
    let disks: Vec<_> = answer["disks"].as_array().into_iter().flatten().map(|disk| &disk["disk"]).collect();
    ensure!(disks == ["vdb", "vda"], "{answer}");
    scene.open("vda", "s")?;
    scene.open("vdb", "s")?;
    scene.freeze("only-b", &["vdb"])?;
    let refused = [
        ("t", json!(["vda", "nosuch"])),
        ("t", json!(["nosuch", "vda"])),
        ("t", json!(["vda", "vda"])),
        ("t", json!([])),
        ("only-b", json!(["vda", "vdb"])),
        ("s", json!(["vda"])),
    ];
    for (name, disks) in refused {
        let answer = scene.qmp.call("snapshot-create", json!({ "name": name, "disks": disks }));
        ensure!(answer.is_err(), "'{name}' of {disks}: {answer:?}");
        ensure!(names(&mut scene, "vda")? == ["s"], "'{name}' of {disks} changed the first disk");
        ensure!(names(&mut scene, "vdb")? == ["s", "only-b"], "'{name}' of {disks} changed the second disk");
    }
    Ok(())
}

fn names(scene: &mut Scene, disk: &str) -> Result<Vec<String>> {
    let text = |snapshot: &Value| snapshot["name"].as_str().unwrap_or_default().to_owned();
    Ok(scene.snapshots(disk)?.iter().map(text).collect())
}

/// D7: who waits for an event waits by another clock than was asked for. Here nobody polls with a time
/// limit: events come by themselves, to each who listens, once and in order.
#[test]
fn a10_d7_events_come_to_everyone_once_and_in_order() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut listeners = [Qmp::connect(&scene.daemon.control())?, Qmp::connect(&scene.daemon.control())?];
    for round in 0..5 {
        scene.freeze(&format!("s{round}"), &["vda"])?;
        scene.delete(&format!("s{round}"))?;
    }
    for listener in &mut listeners {
        for round in 0..5 {
            for name in ["SNAPSHOT_CREATED", "SNAPSHOT_DELETED"] {
                let event = listener.wait_for_any_event()?;
                let named = event["data"]["name"] == format!("s{round}");
                ensure!(event["event"] == name && named, "round {round}, {name}: {event}");
            }
        }
        // The answer to a later verb comes behind all events of earlier ones.
        listener.call("query-status", json!({}))?;
        let more = listener.event_within(Duration::ZERO)?;
        ensure!(more.is_none(), "one more: {more:?}");
    }
    Ok(())
}

/// D8: the devices of a snapshot are frozen one after the other. Here a request that was made on any disk
/// after another had ended on any disk is in no view without it.
#[test]
fn a10_d8_all_disks_are_frozen_at_one_instant() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        // Few in flight, so that they end soon and others can follow from them.
        let mut rig =
            Rig::start(Setup { disks: 2, queues, depth: 1, units: 512, seed: 8, ..Setup::default() })?;
        rig.begin_load()?;
        for round in 0..10 {
            rig.wait_for(32)?;
            let frozen = rig.freeze(&format!("s{round}"))?;
            rig.scene.delete(&frozen.name)?;
        }
        rig.end_load()
    })
}

/// D11: a take that fails half-way leaves the devices before the failure switched. Here it runs out of
/// descriptors at every place where it can, and leaves nothing.
#[test]
fn a10_d11_a_take_that_fails_half_way_leaves_nothing() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
    let mut guests = [scene.guest("vda", 1)?, scene.guest("vdb", 1)?];
    let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
    for guest in &mut guests {
        write_over(guest, &old)?;
    }
    scene.freeze("old", &["vda", "vdb"])?;
    let before = [state_files(&scene, "vda")?, state_files(&scene, "vdb")?];
    let mut failures = 0;
    for most in 0.. {
        scene.daemon.server().limit(Resource::Nofile, Some(most))?;
        let taken = scene.freeze("new", &["vda", "vdb"]);
        scene.daemon.server().limit(Resource::Nofile, None)?;
        if taken.is_ok() {
            break;
        }
        failures += 1;
        for (disk, files) in ["vda", "vdb"].iter().zip(&before) {
            ensure!(names(&mut scene, disk)? == ["old"], "{disk} at {most} descriptors: {taken:?}");
            ensure!(state_files(&scene, disk)? == *files, "files of {disk} at {most} descriptors");
        }
    }
    ensure!(failures > 0, "it never failed");
    for (guest, name) in guests.iter_mut().zip(["vda", "vdb"]) {
        write_over(guest, &new)?;
        ensure!(scene.view(name, "old")? == old && scene.view(name, "new")? == old, "{name} after that");
    }
    Ok(())
}

/// What lies in the state directory of `disk`.
fn state_files(scene: &Scene, disk: &str) -> Result<Vec<PathBuf>> {
    let mut state = scene.daemon.image(disk).into_os_string();
    state.push(".ebb");
    let files = std::fs::read_dir(state)?.map(|entry| Ok(entry?.path()));
    let mut files = files.collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// D13: a difference storage of one kind never says that it is full. Here a store that cannot be written,
/// for whatever reason, says so once, to everyone, and in every list.
#[test]
fn a10_d13_a_store_that_cannot_grow_says_so() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut listeners = [Qmp::connect(&scene.daemon.control())?, Qmp::connect(&scene.daemon.control())?];
    let mut guest = scene.guest("vda", 1)?;
    write_over(&mut guest, &bytes(1, DISK_BYTES))?;
    scene.freeze("s", &["vda"])?;
    let second_half = bytes(2, DISK_BYTES / 2);
    for (number, part) in second_half.chunks(64 << 10).enumerate() {
        guest.write((DISK_BYTES / 1024 + number * 128) as u64, part)?;
    }
    scene.daemon.server().limit(Resource::Fsize, Some(1 << 20))?;
    for number in 0..8 {
        guest.write(number * 128, &[7; 64 << 10])?;
    }
    for listener in &mut listeners {
        let event = listener.wait_for_event("SNAPSHOT_BROKEN")?;
        ensure!(event["name"] == "s" && event["disk"] == "vda" && event["reason"].is_string(), "{event}");
        listener.call("query-status", json!({}))?;
        let more = listener.event_within(Duration::ZERO)?;
        ensure!(more.is_none(), "said twice: {more:?}");
    }
    let listed = &scene.snapshots("vda")?[0];
    ensure!(listed["state"] == "broken" && listed["reason"].is_string(), "{listed}");
    Ok(())
}
