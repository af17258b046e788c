//! Writable views of a real daemon, over NBD and as disks of their own.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::{Daemon, Disk, Program};
use ebbtide_tests::nbd::{FUA, Nbd};
use ebbtide_tests::random::Random;
use ebbtide_tests::server::reach;
use ebbtide_tests::vhost_client::{Client, Options, PATIENCE};
use rustix::process::Signal;
use serde_json::{Value, json};

const GRAIN: usize = 4096;
const BYTES: usize = 4 << 20;
const DISKS: [Disk; 2] = [
    Disk { name: "vda", bytes: BYTES as u64, queues: 2, read_only: false, more: "" },
    Disk { name: "vdb", bytes: BYTES as u64, queues: 2, read_only: false, more: "" },
];

fn start() -> Result<Daemon> {
    Daemon::start(Program::Ebbtide, &DISKS)
}

fn bytes(random: &mut Random, count: usize) -> Vec<u8> {
    (0..count).map(|_| random.next().to_le_bytes()[0]).collect()
}

/// Sends a verb; the answer, or the error.
fn ask(daemon: &Daemon, verb: &str, arguments: Value) -> Result<Value, Value> {
    let talk = || -> Result<Value> {
        let mut stream = reach(&daemon.control())?;
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut say = |message: Value| stream.write_all(format!("{message}\n").as_bytes());
        say(json!({ "execute": "qmp_capabilities" }))?;
        say(json!({ "execute": verb, "arguments": arguments, "id": 1 }))?;
        loop {
            let line: Value = serde_json::from_str(&lines.next().context("no answer")??)?;
            if line["id"] == 1 {
                return Ok(line);
            }
        }
    };
    let mut answer = talk().unwrap_or_else(|error| json!({ "error": { "desc": error.to_string() } }));
    match answer.get_mut("error") {
        Some(error) => Err(error.take()),
        None => Ok(answer["return"].take()),
    }
}

fn done(daemon: &Daemon, verb: &str, arguments: Value) -> Result<Value> {
    ask(daemon, verb, arguments.clone()).map_err(|error| anyhow::anyhow!("{verb} {arguments}: {error}"))
}

/// Expects a verb to be refused for `reason`.
fn refused(daemon: &Daemon, verb: &str, arguments: Value, reason: &str) -> Result<()> {
    match ask(daemon, verb, arguments.clone()) {
        Err(error) if error["x-reason"] == reason => Ok(()),
        other => anyhow::bail!("{verb} {arguments}: expected {reason}, got {other:?}"),
    }
}

/// Closes an overlay, once the daemon has noticed that its guest is gone.
fn close(daemon: &Daemon, name: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(daemon, "snapshot-close", of(name)) {
            Ok(_) => return Ok(()),
            Err(error) if error["x-reason"] == "overlay-in-use" && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => anyhow::bail!("snapshot-close {name}: {error}"),
        }
    }
}

fn snapshot(daemon: &Daemon, name: &str) -> Result<()> {
    done(daemon, "snapshot-create", json!({ "name": name, "disks": ["vda"] })).map(drop)
}

fn of(name: &str) -> Value {
    json!({ "disk": "vda", "snapshot": "s", "name": name })
}

/// Opens an overlay of `vda@s`.
fn open(daemon: &Daemon, name: &str, keep: bool, socket: bool) -> Result<Value> {
    let mut arguments = of(name);
    arguments["writable"] = true.into();
    arguments["keep"] = keep.into();
    if socket {
        arguments["socket"] = daemon.socket(name).to_str().context("a path")?.into();
    }
    done(daemon, "snapshot-open", arguments)
}

fn overlays(daemon: &Daemon) -> Result<Vec<Value>> {
    let snapshots = done(daemon, "query-snapshots", json!({ "disk": "vda" }))?;
    let overlays =
        snapshots.as_array().context("a list")?.iter().filter_map(|one| one["overlays"].as_array());
    Ok(overlays.flatten().cloned().collect())
}

fn over_nbd(daemon: &Daemon, export: &str) -> Result<Nbd> {
    Ok(Nbd::open(&daemon.nbd(), export)?)
}

/// A client of a disk, or of an overlay's socket.
fn guest(daemon: &Daemon, socket: &str) -> Result<Client> {
    daemon.connect(socket, &Options::default())
}

/// Fills the origin with a pattern of its own, and takes the snapshot `s` of it.
fn prepare(daemon: &Daemon, seed: u64) -> Result<Vec<u8>> {
    let frozen = bytes(&mut Random::new(seed), BYTES);
    let mut guest = guest(daemon, "vda")?;
    for (at, part) in frozen.chunks(1 << 18).enumerate() {
        guest.write((at << 9) as u64, part)?;
    }
    snapshot(daemon, "s")?;
    Ok(frozen)
}

#[test]
fn b_6000_snapimage_write() -> Result<()> {
    let daemon = start()?;
    let frozen = prepare(&daemon, 1)?;
    open(&daemon, "image", false, false)?;
    let (mut origin, mut image) = (frozen.clone(), frozen.clone());
    for round in 0..8u64 {
        std::thread::scope(|scope| -> Result<()> {
            let guests = scope.spawn(|| -> Result<()> {
                let (mut client, mut random) = (guest(&daemon, "vda")?, Random::new(100 + round));
                for _ in 0..150 {
                    let sectors = 1 + random.below(40);
                    let first = random.below((BYTES / 512) as u64 - sectors);
                    let (at, len) = (usize::try_from(first)? * 512, usize::try_from(sectors)? * 512);
                    let data = bytes(&mut random, len);
                    client.write(first, &data)?;
                    origin[at..at + len].copy_from_slice(&data);
                }
                client.flush()?;
                Ok(())
            });
            let (mut client, mut random) = (over_nbd(&daemon, "vda@s/image")?, Random::new(200 + round));
            for number in 0..150 {
                let len = usize::try_from(1 + random.below(20_000))?;
                let at = usize::try_from(random.below((BYTES - len) as u64))?;
                match number % 5 {
                    0 => {
                        client.write_zeroes(at as u64, u32::try_from(len)?)?;
                        image[at..at + len].fill(0);
                    }
                    1 => {
                        client.trim(at as u64, u32::try_from(len)?)?;
                        image[at..at + len].fill(0);
                    }
                    _ => {
                        let data = bytes(&mut random, len);
                        client.write(at as u64, &data, if number % 7 == 0 { FUA } else { 0 })?;
                        image[at..at + len].copy_from_slice(&data);
                    }
                }
            }
            client.flush()?;
            guests.join().expect("no panic")
        })?;
        // Opened anew: both sides have exactly their own, and the snapshot what it had.
        ensure!(over_nbd(&daemon, "vda@s/image")?.read_all()? == image, "the image, round {round}");
        ensure!(over_nbd(&daemon, "vda@s")?.read_all()? == frozen, "the snapshot, round {round}");
        ensure!(std::fs::read(daemon.image("vda"))? == origin, "the origin, round {round}");
    }
    done(&daemon, "snapshot-close", of("image"))?;
    done(&daemon, "snapshot-delete", json!({ "name": "s" }))?;
    ensure!(std::fs::read(daemon.image("vda"))? == origin, "the origin at the end");
    Ok(())
}

#[test]
fn b_6100_writes_straddling_grain_borders() -> Result<()> {
    let daemon = start()?;
    let mut image = prepare(&daemon, 2)?;
    open(&daemon, "image", false, false)?;
    let mut random = Random::new(3);
    let mut written = Vec::new();
    for border in 1..200 {
        let data = bytes(&mut random, 1024);
        let at = border * GRAIN - 512;
        image[at..at + 1024].copy_from_slice(&data);
        written.push((at, data));
    }
    // The writers of two clients meet in every grain: one has its start, the other its end.
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..2)
            .map(|odd| {
                let (written, daemon) = (&written, &daemon);
                scope.spawn(move || -> Result<()> {
                    let mut client = over_nbd(daemon, "vda@s/image")?;
                    for (at, data) in written.iter().skip(odd).step_by(2) {
                        client.write(*at as u64, data, 0)?;
                    }
                    Ok(())
                })
            })
            .collect();
        clients.into_iter().try_for_each(|client| client.join().expect("no panic"))
    })?;
    let mut client = over_nbd(&daemon, "vda@s/image")?;
    for (at, data) in &written {
        ensure!(client.read(*at as u64, 1024)? == *data, "at {at}");
    }
    ensure!(client.read_all()? == image, "neighbours changed");
    Ok(())
}

#[test]
fn an_overlay_is_a_disk_of_its_own() -> Result<()> {
    let daemon = start()?;
    let mut image = prepare(&daemon, 4)?;
    let frozen = image.clone();
    let opened = open(&daemon, "repair", false, true)?;
    ensure!(opened["connected"] == false && opened["used"] == 0, "{opened}");
    let (mut repair, mut live) = (guest(&daemon, "repair")?, guest(&daemon, "vda")?);
    let mut random = Random::new(5);
    for border in 1..100usize {
        let data = bytes(&mut random, 1024);
        let at = border * GRAIN - 512;
        repair.write((at / 512) as u64, &data)?;
        image[at..at + 1024].copy_from_slice(&data);
        live.write((at / 512) as u64, &[0xaa; 1024])?;
    }
    repair.discard(1000, 100)?;
    image[1000 * 512..1100 * 512].fill(0);
    repair.write_zeroes(2001, 13, false)?;
    image[2001 * 512..2014 * 512].fill(0);
    let large = bytes(&mut random, 1 << 20);
    repair.write(3001, &large)?;
    image[3001 * 512..][..1 << 20].copy_from_slice(&large);
    repair.flush()?;
    for (at, part) in image.chunks(1 << 18).enumerate() {
        ensure!(repair.read((at << 9) as u64, 1 << 18)? == part, "part {at}");
    }
    ensure!(over_nbd(&daemon, "vda@s/repair")?.read_all()? == image, "over NBD");
    ensure!(over_nbd(&daemon, "vda@s")?.read_all()? == frozen, "the snapshot");
    let now = &overlays(&daemon)?[0];
    ensure!(now["connected"] == true && now["used"].as_u64() > Some(1 << 20), "{now}");

    refused(&daemon, "snapshot-close", of("repair"), "overlay-in-use")?;
    repair.read(0, 512)?;
    let mut forced = of("repair");
    forced["force"] = true.into();
    done(&daemon, "snapshot-close", forced)?;
    ensure!(!daemon.socket("repair").exists(), "the socket is left");
    live.write(0, &[1; 512])?;
    ensure!(live.read(0, 512)? == [1; 512], "the original runs on");
    Ok(())
}

#[test]
fn kept_overlays_outlive_the_daemon() -> Result<()> {
    let mut daemon = start()?;
    let mut image = prepare(&daemon, 6)?;
    open(&daemon, "kept", true, true)?;
    open(&daemon, "other", false, true)?;
    guest(&daemon, "other")?.write(0, &[1; 512])?;
    let mut random = Random::new(7);
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL] {
        {
            let (mut client, mut nbd) = (guest(&daemon, "kept")?, over_nbd(&daemon, "vda@s/kept")?);
            for _ in 0..50 {
                let data = bytes(&mut random, 3000);
                let at = usize::try_from(random.below((BYTES - 3000) as u64))?;
                nbd.write(at as u64, &data, 0)?;
                image[at..at + 3000].copy_from_slice(&data);
                let sector = usize::try_from(random.below((BYTES / 512) as u64))?;
                client.write(sector as u64, &data[..512])?;
                image[sector * 512..][..512].copy_from_slice(&data[..512]);
            }
        }
        daemon.restart(signal, &DISKS)?;
        let names: Vec<_> = overlays(&daemon)?.iter().map(|one| one["name"].clone()).collect();
        ensure!(names == ["kept"], "after {signal:?}: {names:?}");
        ensure!(over_nbd(&daemon, "vda@s/kept")?.read_all()? == image, "after {signal:?}");
        ensure!(guest(&daemon, "kept")?.read(0, 1 << 18)? == image[..1 << 18], "after {signal:?}");
        ensure!(over_nbd(&daemon, "vda@s/other").is_err(), "the other is still there");
    }
    close(&daemon, "kept")?;
    done(&daemon, "snapshot-delete", json!({ "name": "s" }))?;
    let left = std::fs::read_dir(daemon.dir().join("vda.img.ebb"))?;
    let mut left: Vec<_> = left.map(|one| Ok(one?.file_name())).collect::<Result<_>>()?;
    left.sort();
    ensure!(left == ["intent", "lock", "map", "store", "superblock"], "{left:?}");
    Ok(())
}

#[test]
fn a_snapshot_that_is_open_is_not_deleted() -> Result<()> {
    let daemon = start()?;
    done(&daemon, "snapshot-create", json!({ "name": "s" }))?;
    let mut on_b = of("x");
    on_b["disk"] = "vdb".into();
    on_b["writable"] = true.into();
    done(&daemon, "snapshot-open", on_b.clone())?;
    refused(&daemon, "snapshot-delete", json!({ "name": "s" }), "snapshot-in-use")?;
    let held = done(&daemon, "query-snapshots", json!({}))?;
    ensure!(held.as_array().map(Vec::len) == Some(2), "nothing may be deleted: {held}");
    let list = daemon.ask(&["snapshot", "list"])?;
    ensure!(list.contains("vdb@s/x"), "{list}");
    let exports = daemon.ask(&["export", "list"])?;
    ensure!(exports.lines().any(|line| line.starts_with("vdb@s/x") && line.contains("rw")), "{exports}");
    ensure!(daemon.ask(&["export", "delete", "vdb@s/x"]).is_err(), "an overlay's export belongs to it");
    daemon.ask(&["snapshot", "close", "s", "x", "--disk", "vdb"])?;
    done(&daemon, "snapshot-delete", json!({ "name": "s" }))?;
    Ok(())
}

#[test]
fn a_closed_overlay_answers_with_errors() -> Result<()> {
    let daemon = start()?;
    snapshot(&daemon, "s")?;
    let mut client = {
        open(&daemon, "x", false, false)?;
        over_nbd(&daemon, "vda@s/x")?
    };
    client.write(100, &[1; 100], 0)?;
    done(&daemon, "snapshot-close", of("x"))?;
    // ESHUTDOWN: proto.md, "Error values".
    for error in [client.read(0, 512).unwrap_err(), client.write(0, &[1], 0).unwrap_err()] {
        ensure!(error.to_string().ends_with("108"), "{error}");
    }
    open(&daemon, "x", false, false)?;
    ensure!(over_nbd(&daemon, "vda@s/x")?.read(0, 4096)? == [0; 4096], "a new one begins as the snapshot");
    Ok(())
}

#[test]
fn bad_input_is_refused_and_changes_nothing() -> Result<()> {
    let daemon = start()?;
    snapshot(&daemon, "s")?;
    open(&daemon, "x", false, true)?;
    let opening = |change: &[(&str, Value)]| {
        let mut arguments = of("y");
        arguments["writable"] = true.into();
        for (key, value) in change {
            arguments[*key] = value.clone();
        }
        arguments
    };
    let taken = daemon.socket("x").to_str().context("a path")?.to_owned();
    let no_socket = daemon.image("vda").to_str().context("a path")?.to_owned();
    for (change, reason) in [
        (vec![("disk", json!("nope"))], "disk-not-found"),
        (vec![("snapshot", json!("nope"))], "snapshot-not-found"),
        (vec![("name", json!("x"))], "overlay-exists"),
        (vec![("name", json!(""))], "bad-argument"),
        (vec![("name", json!("a/b"))], "bad-argument"),
        (vec![("name", json!("é"))], "bad-argument"),
        (vec![("name", json!("x".repeat(129)))], "bad-argument"),
        (vec![("name", json!(7))], "bad-argument"),
        (vec![("writable", json!(false))], "bad-argument"),
        (vec![("keep", json!("yes"))], "bad-argument"),
        (vec![("colour", json!("red"))], "unknown-argument"),
        (vec![("socket", json!("relative.sock"))], "bad-argument"),
        (vec![("socket", json!(""))], "bad-argument"),
        (vec![("socket", json!(format!("/{}", "x".repeat(200))))], "bad-argument"),
        (vec![("socket", json!("/no/such/directory/sock"))], "bad-argument"),
        (vec![("socket", json!(taken))], "bad-argument"),
        (vec![("socket", json!(no_socket))], "bad-argument"),
    ] {
        refused(&daemon, "snapshot-open", opening(&change), reason)?;
    }
    done(&daemon, "nbd-export-add", json!({ "name": "vda@s/y", "disk": "vda", "snapshot": "s" }))?;
    refused(&daemon, "snapshot-open", opening(&[]), "export-exists")?;
    refused(
        &daemon,
        "nbd-export-add",
        json!({ "name": "vda@s/x", "disk": "vda", "snapshot": "s" }),
        "export-exists",
    )?;
    refused(&daemon, "snapshot-close", of("nope"), "overlay-not-found")?;
    refused(
        &daemon,
        "snapshot-close",
        json!({ "disk": "vda", "snapshot": "nope", "name": "x" }),
        "snapshot-not-found",
    )?;
    refused(
        &daemon,
        "snapshot-close",
        json!({ "disk": "nope", "snapshot": "s", "name": "x" }),
        "disk-not-found",
    )?;
    let names: Vec<_> = overlays(&daemon)?.iter().map(|one| one["name"].clone()).collect();
    ensure!(names == ["x"], "{names:?}");
    guest(&daemon, "x")?.read(0, 512)?;
    close(&daemon, "x")?;
    refused(&daemon, "snapshot-close", of("x"), "overlay-not-found")?;
    Ok(())
}

#[test]
fn other_peoples_tools_write_to_it() -> Result<()> {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("skipped: no qemu-io");
        return Ok(());
    }
    let daemon = start()?;
    prepare(&daemon, 8)?;
    let opened = open(&daemon, "x", false, false)?;
    let uri = opened["uri"].as_str().context("a URI")?;
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", uri]);
    for line in
        ["write -P 0xab 3584 1k", "write -z 8k 64k", "discard 128k 4k", "flush", "read -P 0xab 3584 1k"]
    {
        command.args(["-c", line]);
    }
    let done = command.arg("-c").arg("read -P 0 8k 64k").output()?;
    let said = String::from_utf8_lossy(&done.stdout);
    ensure!(done.status.success() && !said.contains("failed"), "{said}");
    Ok(())
}
