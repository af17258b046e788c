//! Block devices as images, changed by others while no daemon serves them: what is noticed begins a generation with its
//! reason, and what cannot be noticed is shown too, with what an operator says about it.
//!
//! Invariant: where the daemon says that the history goes on, the test knows that nothing that can be seen has changed.
//! Absent: files (`tests/e2e/offline`), another boot of the host (`tests/e2e/power-cut`).
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::host::Loop;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{BLOCK, Scene, blocks};
use ebbtide_tests::server::{ebbtide, output_of};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

const BYTES: u64 = 64 << 20;
const GRAIN: u64 = 4096;

/// A disk on a loop device over a file.
struct Device {
    scene: Scene,
    device: Loop,
    /// What is below the device.
    backing: PathBuf,
    options: &'static str,
    names: u32,
    _dir: TempDir,
}

impl Device {
    /// `None` if there is no such device.
    fn begin(options: &str) -> Result<Option<Self>> {
        let dir = tempfile::Builder::new().prefix("ebbtide-test-").tempdir()?;
        let backing = dir.path().join("backing");
        File::create(&backing)?.set_len(BYTES)?;
        let Some(device) = Loop::over(&backing)? else { return Ok(None) };
        let place = tempfile::Builder::new().prefix("ebbtide-test-").tempdir()?;
        symlink(device.path(), place.path().join("vda.img"))?;
        let state = place.path().join("state");
        // Disks of a scene live as long as the program.
        let options = format!("block-size=65536,state={},{options}", state.display());
        let options: &'static str = options.trim_end_matches(',').to_owned().leak();
        let scene = Scene::start_in(place, &[disk(options)])?;
        Ok(Some(Self { scene, device, backing, options, names: 0, _dir: dir }))
    }

    fn state(&self) -> PathBuf {
        self.scene.daemon.dir().join("state")
    }

    /// The guest writes a block, and an instant passes. Answers its change id.
    fn lives(&mut self, block: u64) -> Result<String> {
        self.scene.guest("vda", 1)?.write(block * BLOCK / 512, &bytes(block, 4096))?;
        self.names += 1;
        let name = format!("s{}", self.names);
        let id = self.scene.freeze(&name, &["vda"])?.remove(0);
        self.scene.delete(&name)?;
        Ok(id)
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        self.scene.daemon.end(signal)
    }

    /// Kills the daemon when its last sign of life says that nothing was changed since.
    fn end_in_quiet(&mut self) -> Result<()> {
        let map = File::open(self.state().join("map"))?;
        let deadline = Instant::now() + Duration::from_secs(60);
        // FORMAT.md, "Sign of life": word 16 of the map is neither 0 nor 1 then.
        let mut word = [0; 4];
        while u32::from_le_bytes(word) < 2 {
            ensure!(Instant::now() < deadline, "no sign of life that says so");
            std::thread::sleep(Duration::from_millis(20));
            map.read_exact_at(&mut word, 64)?;
        }
        self.end(Signal::KILL)
    }

    /// What looking from outside finds wrong, as codes in brackets.
    fn found(&self) -> Result<String> {
        let mut command = Command::new(ebbtide()?);
        command.arg("check").arg(self.state());
        // It ends with 1 if something is wrong, and what it printed is in the error then.
        Ok(output_of(command, &[], Duration::from_secs(60)).unwrap_or_else(|error| format!("{error:#}")))
    }

    fn start(&mut self, more: &str) -> Result<String> {
        let options: &'static str =
            format!("{},{more}", self.options).trim_end_matches(',').to_owned().leak();
        self.scene.serve_next(&[disk(options)]);
        // It has ended already.
        self.scene.restart(Signal::KILL)?;
        let disks = self.scene.qmp.call("query-disks", json!({}))?;
        Ok(disks[0]["tracker"]["reason"].as_str().context("a reason")?.to_owned())
    }

    /// Starts, expecting a new generation for this reason, in which what changed since `id` is refused.
    fn begins_anew(&mut self, id: &str, more: &str, reason: &str) -> Result<()> {
        let told = self.start(more)?;
        ensure!(told == reason, "{told} and not {reason}");
        let told = self.scene.qmp.call("query-incremental", json!({ "since": id }))?;
        let desc = told[0]["desc"].as_str().unwrap_or_default();
        ensure!(told[0]["possible"] == false && told[0]["reason"] == "generation-differs", "{told}");
        ensure!(desc.contains(reason), "{told}");
        self.scene.freeze("t", &["vda"])?;
        let refused = self.scene.changed("vda", id, "t").expect_err("of another generation").to_string();
        ensure!(refused.contains("generation-differs") && refused.contains(reason), "{refused}");
        self.scene.delete("t")?;
        Ok(())
    }

    /// Starts, expecting the history to go on, and these blocks to have changed since `id`.
    fn goes_on(&mut self, id: &str, expected: &[u64]) -> Result<()> {
        let told = self.start("")?;
        ensure!(told == "kept", "{told}");
        self.scene.freeze("t", &["vda"])?;
        let changed = blocks(&self.scene.changed("vda", id, "t")?);
        ensure!(changed.iter().eq(expected), "{changed:?} and not {expected:?}");
        self.scene.delete("t")?;
        Ok(())
    }

    /// Another program of this host writes to the device.
    fn others_write(&self, at: u64) -> Result<()> {
        scribble(self.device.path(), at).map(drop)
    }

    /// Somebody writes below the device: another host, or whoever holds what it is made of.
    fn others_write_below(&self, at: u64) -> Result<()> {
        scribble(&self.backing, at).map(drop)
    }

    /// Writes below the device where no sample was taken, which looking from outside tells.
    fn others_write_unseen(&self) -> Result<(u64, Vec<u8>)> {
        let file = OpenOptions::new().read(true).write(true).open(&self.backing)?;
        for grain in 1..BYTES / GRAIN - 1 {
            let mut was = [0; 512];
            file.read_exact_at(&mut was, grain * GRAIN)?;
            let data = scribble(&self.backing, grain * GRAIN)?;
            if self.found()?.contains("nothing is wrong") {
                return Ok((grain * GRAIN, data));
            }
            file.write_all_at(&was, grain * GRAIN)?;
        }
        anyhow::bail!("every grain was sampled")
    }
}

fn disk(more: &'static str) -> Disk {
    Disk { name: "vda", bytes: BYTES, queues: 1, read_only: false, more }
}

/// Writes a sector that was never written before, all the way to where it goes; what it holds.
fn scribble(path: &Path, at: u64) -> Result<Vec<u8>> {
    static NEXT: AtomicU64 = AtomicU64::new(1000);
    let data = bytes(NEXT.fetch_add(1, Ordering::Relaxed), 512);
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&data, at)?;
    file.sync_all()?;
    Ok(data)
}

#[test]
fn after_a_stop_writes_to_the_device_and_to_sampled_places_are_noticed() -> Result<()> {
    let Some(mut device) = Device::begin("")? else { return Ok(()) };
    let id = device.lives(1)?;
    device.scene.guest("vda", 1)?.write(3 * BLOCK / 512, &[7; 512])?;
    device.end(Signal::TERM)?;
    ensure!(device.found()?.contains("nothing is wrong"), "{}", device.found()?);
    device.goes_on(&id, &[3])?;
    // Anywhere: the kernel counts them.
    for at in [0, 5 * BLOCK, BYTES / 2 + 512, BYTES - 512] {
        let id = device.lives(1)?;
        device.end(Signal::TERM)?;
        device.others_write(at)?;
        let found = device.found()?;
        ensure!(found.contains("(not-as-left)"), "at {at}: {found}");
        device.begins_anew(&id, "", "image-changed")?;
    }
    // The first and the last grain are sampled always.
    for at in [512, BYTES - 512] {
        let id = device.lives(2)?;
        device.end(Signal::TERM)?;
        device.others_write_below(at)?;
        let found = device.found()?;
        ensure!(found.contains("(image-changed)"), "below, at {at}: {found}");
        device.begins_anew(&id, "", "image-changed")?;
    }
    // And in a new generation everything is as ever.
    let id = device.lives(4)?;
    device.scene.guest("vda", 1)?.write(5 * BLOCK / 512, &[7; 512])?;
    device.end(Signal::TERM)?;
    device.goes_on(&id, &[5])
}

#[test]
fn after_a_stop_writes_below_the_device_may_be_missed_unless_it_is_said() -> Result<()> {
    let Some(mut device) = Device::begin("")? else { return Ok(()) };
    let id = device.lives(1)?;
    device.end(Signal::TERM)?;
    let (at, data) = device.others_write_unseen()?;
    // So it cannot be told, and README says so.
    device.goes_on(&id, &[])?;
    let seen = device.scene.guest("vda", 1)?.read(at / 512, 512)?;
    ensure!(seen == data, "it is there all the same");
    device.end(Signal::TERM)?;
    device.begins_anew(&id, "assume-changed", "assumed-changed")?;
    // It is said for one start.
    let id = device.lives(2)?;
    device.end(Signal::TERM)?;
    device.goes_on(&id, &[])
}

#[test]
fn after_a_kill_in_quiet_writes_to_the_device_are_noticed_and_those_below_are_not() -> Result<()> {
    let Some(mut device) = Device::begin("")? else { return Ok(()) };
    let id = device.lives(1)?;
    device.end_in_quiet()?;
    device.goes_on(&id, &[])?;
    let id = device.lives(2)?;
    device.end_in_quiet()?;
    device.others_write(9 * BLOCK)?;
    let found = device.found()?;
    ensure!(found.contains("(image-changed)"), "{found}");
    device.begins_anew(&id, "", "image-changed")?;
    let id = device.lives(3)?;
    device.end_in_quiet()?;
    // Not even in the first grain: samples are of stopped disks.
    device.others_write_below(0)?;
    device.goes_on(&id, &[])?;
    for signal in [Signal::KILL, Signal::TERM] {
        let id = device.lives(4)?;
        device.end(signal)?;
        device.begins_anew(&id, "assume-changed", "assumed-changed")?;
    }
    Ok(())
}

/// The page cache tells the device later, so nothing can be said of what it counted after a kill.
#[test]
fn through_the_page_cache_a_kill_hides_the_writes_of_others_and_a_stop_does_not() -> Result<()> {
    let Some(mut device) = Device::begin("direct=off")? else { return Ok(()) };
    let id = device.lives(1)?;
    device.scene.guest("vda", 1)?.write(3 * BLOCK / 512, &[7; 512])?;
    device.end(Signal::KILL)?;
    device.others_write(9 * BLOCK)?;
    device.goes_on(&id, &[3])?;
    device.end(Signal::KILL)?;
    device.begins_anew(&id, "assume-changed", "assumed-changed")?;
    let id = device.lives(2)?;
    device.end(Signal::TERM)?;
    device.goes_on(&id, &[])?;
    device.end(Signal::TERM)?;
    device.others_write(9 * BLOCK)?;
    device.begins_anew(&id, "", "image-changed")
}

/// A guest that writes up to a kill is no change by others, however much is in flight.
#[test]
fn a_kill_under_load_goes_on_exactly() -> Result<()> {
    let Some(mut device) = Device::begin("")? else { return Ok(()) };
    let id = device.lives(1)?;
    for round in 0..5 {
        let mut guest = device.scene.guest("vda", 1)?;
        for block in 8..8 + 4 * round {
            guest.write(block * BLOCK / 512, &bytes(round, 4096))?;
        }
        device.end(Signal::KILL)?;
        drop(guest);
        let expected: Vec<_> = (8..8 + 4 * round).collect();
        device.goes_on(&id, &expected)?;
    }
    Ok(())
}
