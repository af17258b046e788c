//! What a start costs before the front end is answered, after any end of the daemon: as much as what was touched, and
//! not as much as the disk.
//!
//! What is counted is what the daemon asks of the system, and not time: a test must not fail because a machine is
//! slow. Time is measured by the program `bench`.
//! Absent: what was not written back and is lost (`tests/e2e/power-cut`, and the simulation).
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::host::can_unshare_mounts;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{BLOCK, Scene, blocks};
use ebbtide_tests::server::Effort;
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

const SMALL: u64 = 64 << 30;
const LARGE: u64 = 64 << 40;
/// Places that the guest writes to, each in a region of its own also on the small disk.
const PLACES: u64 = 100;
/// What a start may read and write: the superblock, a bit for each region of at most 64 MiB, a sample of 128 grains, records
/// of what was preserved.
const MOST_BYTES: u64 = 2 << 20;
const MOST_CALLS: u64 = 2000;
/// Pages that a large disk may touch more than a small one: a word for each page of its change map takes 4 MiB of memory.
const MORE_FAULTS: u64 = 2000;

/// How the daemon ended before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stopped,
    Killed,
    HostStopped,
}

/// What a start takes up again.
struct Past {
    scene: Scene,
    /// Changes are asked since this instant.
    id: String,
    _image: TempDir,
}

/// A disk of `size` bytes, whose image takes no space, with snapshots, a checkpoint, old content, and changes.
fn begin(size: u64) -> Result<Past> {
    // File systems on disks have no files so long.
    let memory = tempfile::Builder::new().prefix("ebbtide-test-").tempdir_in(Path::new("/dev/shm"))?;
    let image = memory.path().join("image");
    File::create(&image)?.set_len(size)?;
    // The change map of 4 GiB has its place, and takes time nowhere but in memory.
    let dir = tempfile::Builder::new().prefix("ebbtide-test-").tempdir()?;
    symlink(&image, dir.path().join("vda.img"))?;
    let more = format!("block-size=65536,state={}/state", dir.path().display()).leak();
    let disk = Disk { name: "vda", bytes: size, queues: 1, read_only: false, more };
    let mut scene = Scene::start_in(dir, &[disk])?;
    let id = scene.freeze("base", &["vda"])?.remove(0);
    scene.qmp.call("checkpoint-create", json!({ "name": "point", "snapshot": "base" }))?;
    scene.delete("base")?;
    let past = Past { scene, id, _image: memory };
    touch(&past.scene, size, 0)?;
    Ok(past)
}

fn place(size: u64, nth: u64) -> u64 {
    size / PLACES / BLOCK * nth * BLOCK
}

fn touch(scene: &Scene, size: u64, round: u64) -> Result<()> {
    let mut guest = scene.guest("vda", 1)?;
    (0..PLACES).try_for_each(|nth| Ok(guest.write(place(size, nth) / 512, &bytes(round + nth, 4096))?))
}

/// Ends the daemon and starts it; what it had asked of the system when it answered a front end.
fn start(past: &mut Past, end: End) -> Result<Effort> {
    match end {
        End::Stopped => past.scene.restart(Signal::TERM)?,
        End::Killed => past.scene.restart(Signal::KILL)?,
        End::HostStopped => past.scene.restart_in_another_boot()?,
    }
    past.scene.guest("vda", 1)?.read(0, 512)?;
    past.scene.daemon.server().effort()
}

/// The history goes on, with every change.
fn expect_kept(past: &mut Past, size: u64, end: End) -> Result<()> {
    let told = past.scene.qmp.call("query-disks", json!({}))?[0]["tracker"].take();
    ensure!(told["reason"] == "kept", "{end:?}: {told}");
    let log = past.scene.daemon.server().output();
    ensure!(log.contains("count as changed") == (end == End::HostStopped), "{end:?}: {log}");
    past.scene.freeze("now", &["vda"])?;
    let changed = blocks(&past.scene.changed("vda", &past.id, "now")?);
    let touched: Vec<u64> = (0..PLACES).map(|nth| place(size, nth) / BLOCK).collect();
    ensure!(touched.iter().all(|block| changed.contains(block)), "{end:?}: changes are missing");
    let exact = changed.iter().eq(&touched);
    ensure!(exact || end == End::HostStopped, "{end:?}: {} blocks", changed.len());
    // After a stop of the host whole regions count, of 64 MiB at most.
    ensure!(changed.len() as u64 <= PLACES * (64 << 20) / BLOCK, "{end:?}: {} blocks", changed.len());
    Ok(past.scene.delete("now")?)
}

#[test]
fn a_start_costs_what_was_touched_and_not_the_disk() -> Result<()> {
    let (mut small, mut large) = (begin(SMALL)?, begin(LARGE)?);
    // Snapshots and old content are dropped with the host; the others are kept.
    let mut ends = vec![End::Killed, End::Stopped, End::Killed];
    if can_unshare_mounts() {
        ends.push(End::HostStopped);
    }
    for (round, end) in ends.into_iter().enumerate() {
        let mut efforts = Vec::new();
        for (past, size) in [(&mut small, SMALL), (&mut large, LARGE)] {
            past.scene.freeze(&format!("s{round}"), &["vda"])?;
            touch(&past.scene, size, 100 * round as u64)?;
            let began = Instant::now();
            let effort = start(past, end)?;
            println!("{} GiB, {end:?}: {effort:?} in {:?}", size >> 30, began.elapsed());
            ensure!(effort.read < MOST_BYTES && effort.written < MOST_BYTES, "{end:?}: {effort:?}");
            ensure!(effort.calls < MOST_CALLS, "{end:?}: {effort:?}");
            expect_kept(past, size, end)?;
            efforts.push(effort);
        }
        let [small, large] = efforts[..] else { unreachable!("two disks") };
        ensure!(large.faults < small.faults + MORE_FAULTS, "{end:?}: {small:?}, {large:?}");
    }
    Ok(())
}

/// What a daemon notes of failures stays in memory even if the kernel cannot write it, also of a disk that has grown.
#[test]
fn the_control_page_stays_in_memory() -> Result<()> {
    let disk = Disk { name: "vda", bytes: 1 << 30, queues: 1, read_only: false, more: "" };
    let mut scene = Scene::start(&[disk])?;
    let pid = scene.daemon.server().pid();
    let locked = || -> Result<u64> {
        let all = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let mut is_map = false;
        let mut sum = 0;
        for line in all.lines() {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [range, _, _, _, _, path] if range.contains('-') => is_map = path.ends_with("/map"),
                ["Locked:", kib, "kB"] if is_map => sum += kib.parse::<u64>()?,
                _ => {}
            }
        }
        Ok(sum)
    };
    ensure!(locked()? == 4, "{} KiB are locked", locked()?);
    scene.qmp.call("block_resize", json!({ "disk": "vda", "size": 8_u64 << 30 }))?;
    ensure!(locked()? == 4, "{} KiB are locked after the disk has grown", locked()?);
    Ok(())
}
