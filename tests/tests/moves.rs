//! A disk moves to another host with its history: real daemons, guests over vhost-user, backups over NBD.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{BLOCK, Scene, blocks, write_over};
use ebbtide_tests::server::{ebbtide, output_of};
use ebbtide_tests::vhost_client::Client;
use rustix::process::Signal;
use serde_json::{Value, json};

const BYTES: usize = 16 << 20;
/// Bytes of a tracked block.
const BLOCK_LEN: usize = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

fn disk() -> Disk {
    Disk { name: "vda", bytes: BYTES as u64, queues: 2, read_only: false, more: "" }
}

/// A disk that was backed up in full and changed afterwards.
struct Source {
    scene: Scene,
    /// The instant of the backup, and the backup.
    id: String,
    full: Vec<u8>,
    /// What has changed since, in blocks.
    changed: BTreeSet<u64>,
}

impl Source {
    fn make() -> Result<Self> {
        let mut scene = Scene::start(&[disk()])?;
        let mut guest = scene.guest("vda", 2)?;
        write_over(&mut guest, &bytes(1, BYTES / 2))?;
        let id = scene.freeze("monday", &["vda"])?.remove(0);
        let full = scene.view("vda", "monday")?;
        let mut changed = BTreeSet::new();
        write_some(&mut guest, 2, &mut changed)?;
        drop(guest);
        Ok(Self { scene, id, full, changed })
    }

    fn state(&self) -> PathBuf {
        self.scene.daemon.dir().join("vda.img.ebb")
    }

    fn file(&self) -> PathBuf {
        self.scene.daemon.dir().join("vda.history")
    }

    fn tracker(&mut self) -> Result<Value> {
        tracker(&mut self.scene)
    }
}

fn tracker(scene: &mut Scene) -> Result<Value> {
    Ok(scene.qmp.call("query-disks", json!({}))?[0]["tracker"].take())
}

/// Writes a sector here and there, and notes the blocks.
fn write_some(guest: &mut Client, seed: u64, changed: &mut BTreeSet<u64>) -> Result<()> {
    for nth in 0..20 {
        let sector = (seed * 7919 + nth * 1543) % (BYTES as u64 / 512);
        guest.write(sector, &bytes(seed + nth, 512))?;
        changed.insert(sector * 512 / BLOCK);
    }
    guest.flush()?;
    Ok(())
}

fn stop(scene: &mut Scene, signal: Signal) -> Result<()> {
    let server = scene.daemon.server();
    server.signal(signal)?;
    let deadline = Instant::now() + PATIENCE;
    while server.is_alive() {
        ensure!(Instant::now() < deadline, "does not end:\n{}", server.output());
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Another host: a daemon that was stopped, without a state, with a copy of `image`.
fn elsewhere(image: &Path) -> Result<Scene> {
    let mut there = Scene::start(&[disk()])?;
    stop(&mut there, Signal::TERM)?;
    std::fs::remove_dir_all(there.daemon.dir().join("vda.img.ebb"))?;
    std::fs::copy(image, there.daemon.image("vda"))?;
    Ok(there)
}

/// Runs `ebbtide tracker …`.
fn run(arguments: &[&std::ffi::OsStr]) -> Result<String> {
    let mut command = Command::new(ebbtide()?);
    command.arg("tracker").args(arguments);
    output_of(command, &[], PATIENCE)
}

fn export(state: &Path, file: &Path) -> Result<String> {
    run(&["export".as_ref(), state.as_os_str(), file.as_os_str()])
}

fn import(file: &Path, image: &Path, more: &[&str]) -> Result<String> {
    let mut arguments = vec!["import".as_ref(), file.as_os_str(), "--image".as_ref(), image.as_os_str()];
    arguments.extend(more.iter().map(std::ffi::OsStr::new));
    run(&arguments)
}

/// Expects a command to fail with this in what it prints.
fn refused(result: Result<String>, mention: &str) -> Result<()> {
    match result {
        Ok(text) => bail!("not refused: {text}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.contains(mention) && !text.contains("panicked"), "expected '{mention}': {text}");
            Ok(())
        }
    }
}

/// The next backup on the other host is incremental, and restores to what the disk is.
fn goes_on(there: &mut Scene, id: &str, mut full: Vec<u8>, mut changed: BTreeSet<u64>) -> Result<()> {
    there.restart(Signal::TERM)?;
    let told = tracker(there)?;
    ensure!(told["reason"] == "kept", "{told}");
    let mut guest = there.guest("vda", 2)?;
    write_some(&mut guest, 3, &mut changed)?;
    there.freeze("there", &["vda"])?;
    write_some(&mut guest, 4, &mut BTreeSet::new())?;
    let ranges = there.changed("vda", id, "there")?;
    ensure!(blocks(&ranges) == changed, "{:?} and not {changed:?}", blocks(&ranges));
    let now = there.view("vda", "there")?;
    for range in ranges {
        let range = usize::try_from(range.start)?..usize::try_from(range.end)?;
        full[range.clone()].copy_from_slice(&now[range]);
    }
    ensure!(full == now, "what was restored differs");
    Ok(())
}

#[test]
fn the_next_backup_on_another_host_is_incremental() -> Result<()> {
    let mut source = Source::make()?;
    let (state, file, image) = (source.state(), source.file(), source.scene.daemon.image("vda"));
    refused(export(&state, &file), "in use")?;
    stop(&mut source.scene, Signal::TERM)?;
    let told = export(&state, &file)?;
    ensure!(told.contains("Snapshots stay behind: monday"), "{told}");
    ensure!(std::fs::metadata(&file)?.len() < 40_000, "a small file");
    refused(export(&state, &file), "File exists")?;
    // The same again is the same.
    export(&state, &source.scene.daemon.dir().join("again"))?;

    let mut there = elsewhere(&image)?;
    let told = import(&file, &there.daemon.image("vda"), &[])?;
    ensure!(told.contains("block-size=65536"), "{told}");
    goes_on(&mut there, &source.id, source.full.clone(), source.changed.clone())?;

    // Where it came from a new history begins, and says why.
    source.scene.restart(Signal::TERM)?;
    let told = source.tracker()?;
    ensure!(
        told["reason"] == "handed-over"
            && !source.id.starts_with(told["generation"].as_str().context("an id")?),
        "{told}"
    );
    ensure!(source.scene.snapshots("vda")?.is_empty());
    Ok(())
}

#[test]
fn a_disk_that_is_served_is_handed_over_and_not_written_any_more() -> Result<()> {
    let mut source = Source::make()?;
    let (file, image) = (source.file(), source.scene.daemon.image("vda"));
    let guest = source.scene.guest("vda", 1)?;
    let ask = json!({ "disk": "vda", "file": file });
    let error = source.scene.qmp.call("tracker-export", ask.clone()).unwrap_err();
    ensure!(error.reason() == "disk-in-use", "{error}");
    let error = source.scene.qmp.call("tracker-export", json!({ "disk": "vda", "file": "x" })).unwrap_err();
    ensure!(error.reason() == "bad-argument", "{error}");
    std::fs::write(&file, "mine")?;
    drop(guest);
    let deadline = Instant::now() + PATIENCE;
    let error = loop {
        let error = source.scene.qmp.call("tracker-export", ask.clone()).unwrap_err();
        if error.reason() != "disk-in-use" || Instant::now() >= deadline {
            break error;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    ensure!(error.reason() == "file-exists" && std::fs::read(&file)? == b"mine", "{error}");
    // Nothing has changed by that.
    let mut guest = source.scene.guest("vda", 1)?;
    guest.write(8, &bytes(9, 512))?;
    source.changed.insert(0);
    drop(guest);
    std::fs::remove_file(&file)?;
    let done = loop {
        match source.scene.qmp.call("tracker-export", ask.clone()) {
            Err(error) if error.reason() == "disk-in-use" && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            answer => break answer?,
        }
    };
    ensure!(done["snapshots"] == json!(["monday"]) && done["change-id"] == source.id.as_str(), "{done}");
    ensure!(source.scene.qmp.call("query-disks", json!({}))?[0]["handed-over"] == true);

    // Everything that would change it is refused; reading is not.
    let mut guest = source.scene.guest("vda", 1)?;
    ensure!(guest.write(0, &bytes(10, 512)).is_err() && guest.discard(0, 8).is_err(), "refused");
    ensure!(guest.read(8, 512)? == bytes(9, 512));
    drop(guest);
    for (verb, arguments) in [
        ("snapshot-create", json!({ "name": "tuesday" })),
        ("tracker-mark", json!({ "disk": "vda", "ranges": [{ "offset": 0, "length": 1 }] })),
        ("block_resize", json!({ "disk": "vda", "size": BYTES * 2 })),
        ("tracker-export", json!({ "disk": "vda", "file": "/nowhere/x" })),
    ] {
        let mut error = source.scene.qmp.call(verb, arguments.clone()).unwrap_err();
        while error.reason() == "disk-in-use" && Instant::now() < deadline {
            // The daemon has not noticed yet that its guest is gone.
            std::thread::sleep(Duration::from_millis(5));
            error = source.scene.qmp.call(verb, arguments.clone()).unwrap_err();
        }
        ensure!(error.reason() == "handed-over" || error.reason() == "bad-argument", "{verb}: {error}");
    }
    stop(&mut source.scene, Signal::KILL)?;
    let mut there = elsewhere(&image)?;
    import(&file, &there.daemon.image("vda"), &[])?;
    goes_on(&mut there, &source.id, source.full.clone(), source.changed.clone())
}

#[test]
fn an_export_that_is_not_used_is_taken_back() -> Result<()> {
    let mut source = Source::make()?;
    stop(&mut source.scene, Signal::TERM)?;
    let (state, file) = (source.state(), source.file());
    refused(run(&["cancel-export".as_ref(), state.as_os_str()]), "not handed over")?;
    export(&state, &file)?;
    run(&["cancel-export".as_ref(), state.as_os_str()])?;
    let Source { mut scene, id, full, changed } = source;
    goes_on(&mut scene, &id, full, changed)?;
    ensure!(scene.snapshots("vda")?.len() == 2, "its snapshots are there");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_changed() -> Result<()> {
    let mut source = Source::make()?;
    let (state, file, image) = (source.state(), source.file(), source.scene.daemon.image("vda"));
    stop(&mut source.scene, Signal::KILL)?;
    refused(export(&state, &file), "not closed in order")?;
    source.scene.restart(Signal::TERM)?;
    stop(&mut source.scene, Signal::TERM)?;
    export(&state, &file)?;
    refused(export(&source.scene.daemon.dir().join("nowhere"), &file), "no state directory")?;

    let mut there = elsewhere(&image)?;
    let (target, target_state) = (there.daemon.image("vda"), there.daemon.dir().join("vda.img.ebb"));
    let copy = std::fs::OpenOptions::new().write(true).open(&target)?;
    // The first place, the last one, and one that changed last: somebody went on after the export.
    let last = source.changed.last().context("a block")? * BLOCK;
    for at in [0, BYTES as u64 - 1, last + 100] {
        let mut kept = [0];
        std::fs::File::open(&image)?.read_exact_at(&mut kept, at)?;
        copy.write_all_at(&[!kept[0]], at)?;
        refused(import(&file, &target, &[]), "sampled places differ")?;
        ensure!(!target_state.exists(), "nothing is made");
        copy.write_all_at(&kept, at)?;
    }
    copy.set_len(BYTES as u64 + 4096)?;
    refused(import(&file, &target, &[]), "it has")?;
    copy.set_len(BYTES as u64)?;
    refused(import(&source.scene.daemon.dir().join("nowhere"), &target, &[]), "cannot open")?;
    refused(import(&image, &target, &[]), "no history file")?;
    ensure!(!target_state.exists(), "nothing is made");

    // A history that is there already stays, unless it is said that it goes.
    import(&file, &target, &[])?;
    let before = std::fs::read(target_state.join("superblock"))?;
    refused(import(&file, &target, &[]), "has a history already")?;
    ensure!(std::fs::read(target_state.join("superblock"))? == before);
    import(&file, &target, &["--replace"])?;
    there.restart(Signal::TERM)?;
    refused(import(&file, &target, &["--replace"]), "in use")?;
    there.freeze("mine", &["vda"])?;
    stop(&mut there, Signal::TERM)?;
    std::fs::copy(&image, &target)?;
    import(&file, &target, &["--replace"])?;
    let Source { id, full, changed, .. } = source;
    goes_on(&mut there, &id, full, changed)?;
    ensure!(there.snapshots("vda")?.len() == 1, "the snapshots of the old history are gone");
    Ok(())
}

#[test]
fn a_picture_tells_ages_and_the_busiest_regions() -> Result<()> {
    let mut scene = Scene::start(&[disk()])?;
    let mut guest = scene.guest("vda", 1)?;
    guest.write(0, &bytes(1, 4 * BLOCK_LEN))?;
    scene.freeze("monday", &["vda"])?;
    guest.write(0, &bytes(2, BLOCK_LEN))?;
    guest.write(100 * BLOCK / 512, &bytes(2, 2 * BLOCK_LEN))?;
    let map = scene.qmp.call("query-change-map", json!({ "disk": "vda", "cells": 64 }))?;
    // 256 blocks, four in a cell.
    let cell = |cell: u64, newest: u64, blocks: u64, since: u64, recent: [u64; 2]| {
        let recent: Vec<u64> = recent.into_iter().chain([0; 6]).collect();
        json!({ "cell": cell, "newest": newest, "blocks": blocks, "blocks-since": since, "recent": recent })
    };
    ensure!(map["changed"] == json!([cell(0, 2, 4, 1, [1, 3]), cell(25, 2, 2, 2, [2, 0])]), "{map}");
    ensure!(map["exact"] == true && map["cells"] == 64 && map["cell-size"] == 4 * BLOCK, "{map}");
    ensure!(map["snapshots"] == json!([{ "name": "monday", "epoch": 1 }]), "{map}");
    // Nothing has changed since this one, so the one before is asked about.
    scene.freeze("tuesday", &["vda"])?;
    let later = scene.qmp.call("query-change-map", json!({ "disk": "vda", "cells": 64 }))?;
    ensure!(later["since"] == map["since"] && later["epoch"] == 3, "{later}");
    let since = json!({ "disk": "vda", "since": "tuesday" });
    let none = scene.qmp.call("query-change-map", since)?;
    ensure!(
        none["changed"].as_array().context("a list")?.iter().all(|one| one["blocks-since"] == 0),
        "{none}"
    );
    for (ask, reason) in [
        (json!({ "disk": "vda", "cells": 0 }), "bad-argument"),
        (json!({ "disk": "vda", "cells": 16_385 }), "bad-argument"),
        (json!({ "disk": "vdb" }), "disk-not-found"),
        (json!({ "disk": "vda", "since": "sunday" }), "snapshot-not-found"),
        (json!({ "disk": "vda", "since": "x/1" }), "bad-change-id"),
        (json!({ "disk": "vda", "since": "6f9619ff-8b86-4011-b42d-00c04fc964ff/1" }), "generation-differs"),
    ] {
        let error = scene.qmp.call("query-change-map", ask.clone()).unwrap_err();
        ensure!(error.reason() == reason, "{ask}: {error}");
    }
    let png = scene.daemon.dir().join("map.png");
    let text = scene.daemon.ask(&[
        "changes",
        "vda",
        "--map",
        "--top",
        "1",
        "--png",
        png.to_str().context("a text")?,
    ])?;
    ensure!(text.contains("before tuesday") && text.contains("Busiest regions"), "{text}");
    ensure!(std::fs::read(&png)?.starts_with(b"\x89PNG"), "a PNG");
    scene
        .daemon
        .ask(&["changes", "vda", "--png", png.to_str().context("a text")?])
        .context("a PNG is replaced")?;
    // Anything else is not: what a slip of the tongue costs must not be a disk.
    let image = scene.daemon.image("vda");
    let before = std::fs::read(&image)?;
    let slip = scene.daemon.ask(&["changes", "vda", "--png", image.to_str().context("a text")?]);
    refused(slip, "there already")?;
    ensure!(std::fs::read(&image)? == before, "the image is as it was");
    // The map is that of now, and of no past instant.
    for picture in ["--map", "--top", "--png=x.png"] {
        let past = scene.daemon.ask(&["changes", "vda", picture, "--until", "monday"]);
        refused(past, "cannot be used with")?;
    }
    Ok(())
}

/// A list that is cut off would be taken for all that changed.
#[test]
fn an_answer_that_cannot_be_printed_is_no_success() -> Result<()> {
    let mut scene = Scene::start(&[disk()])?;
    scene.freeze("monday", &["vda"])?;
    scene.guest("vda", 1)?.write(0, &bytes(1, BLOCK_LEN))?;
    scene.freeze("tuesday", &["vda"])?;
    let control = scene.daemon.control();
    let control = control.to_str().context("a text")?;
    let list = ["changes", "vda", "--since", "monday", "--snapshot", "tuesday", "--control", control];
    for command in [&list[..], &["disks", "--json", "--control", control], &["--print-capabilities"]] {
        let full = std::fs::File::options().write(true).open("/dev/full")?;
        let ended = Command::new(ebbtide()?).args(command).stdout(full).output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.code() == Some(1) && said.contains("cannot write"), "{command:?}: {said}");
        // A reader who goes away has enough.
        let (reader, closed) = std::io::pipe()?;
        drop(reader);
        let ended = Command::new(ebbtide()?).args(command).stdout(closed).output()?;
        ensure!(ended.status.success() && ended.stderr.is_empty(), "{command:?}: {ended:?}");
    }
    Ok(())
}
