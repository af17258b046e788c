//! What change ids and checkpoints outlive, and that what was answered once is answered again: real daemons, guests
//! over vhost-user, real files.
//!
//! Invariant of each test: a model of blocks says what has to be told, no less; and no more where nothing was unsure.
//! Absent: an image that somebody else changed (`tests/e2e/offline`), a real power cut (`tests/e2e/power-cut`), damage
//! (`damage.rs`).
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::host::Mounted;
use ebbtide_tests::random::{Random, bytes};
use ebbtide_tests::scene::{BLOCK, Scene, blocks};
use ebbtide_tests::server::{ebbtide, output_of};
use ebbtide_tests::vhost_client::Op;
use ebbtide_tests::virtio::status;
use rustix::process::{Resource, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;

const BYTES: u64 = 8 << 20;

fn disk(more: &str) -> Disk {
    // Disks of a scene live as long as the program.
    let more = format!("block-size=65536,{more}").trim_end_matches(',').to_owned().leak();
    Disk { name: "vda", bytes: BYTES, queues: 1, read_only: false, more }
}

fn in_memory() -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("ebbtide-test-").tempdir_in("/dev/shm")?)
}

/// A disk, an instant of it, and what has changed since.
struct Chain {
    scene: Scene,
    id: String,
    size: u64,
    changed: BTreeSet<u64>,
    random: Random,
    names: u32,
}

impl Chain {
    fn begin() -> Result<Self> {
        let mut scene = Scene::start(&[disk("")])?;
        scene.guest("vda", 1)?.write(0, &bytes(1, 64 << 10))?;
        let id = scene.freeze("base", &["vda"])?.remove(0);
        scene.delete("base")?;
        let changed = BTreeSet::new();
        Ok(Self { scene, id, size: BYTES, changed, random: Random::new(77), names: 0 })
    }

    /// Writes, discards and zeroes a little, anywhere, and in the last sector.
    fn work(&mut self) -> Result<()> {
        let mut guest = self.scene.guest("vda", 1)?;
        for nth in 0..6 {
            let sector = match nth {
                0 => self.size / 512 - 1,
                _ => self.random.below(self.size / 512),
            };
            match nth % 3 {
                0 => guest.write(sector, &bytes(sector, 512))?,
                1 => guest.discard(sector, 1)?,
                _ => guest.write_zeroes(sector, 1, true)?,
            }
            self.changed.insert(sector * 512 / BLOCK);
        }
        Ok(())
    }

    /// Whether the id is still good, and all that changed is told.
    fn check(&mut self, what: &str) -> Result<()> {
        let told = self.scene.qmp.call("query-incremental", json!({ "since": self.id }))?;
        ensure!(told[0]["possible"] == true, "{what}: {told}");
        let name = format!("s{}", self.names);
        self.names += 1;
        self.scene.freeze(&name, &["vda"])?;
        let found = self.scene.changed("vda", &self.id, &name).with_context(|| what.to_owned())?;
        ensure!(blocks(&found) == self.changed, "{what}: {:?} and not {:?}", blocks(&found), self.changed);
        self.scene.delete(&name)?;
        Ok(())
    }

    fn restart(&mut self, signal: Signal, what: &str) -> Result<()> {
        self.scene.restart(signal)?;
        self.check(what)
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        let resize = json!({ "disk": "vda", "size": size, "shrink": true });
        self.scene.qmp.call("block_resize", resize)?;
        let old = std::mem::replace(&mut self.size, size);
        self.changed.retain(|block| block * BLOCK < size);
        if old < size {
            self.changed.extend(old / BLOCK..size.div_ceil(BLOCK));
        }
        Ok(())
    }

    /// Moves to another host: a daemon of its own, a copy of the image, and the history file.
    fn move_away(&mut self) -> Result<()> {
        let mut there = Scene::start(&[disk("")])?;
        for scene in [&mut self.scene, &mut there] {
            scene.daemon.server().signal(Signal::TERM)?;
            while scene.daemon.server().is_alive() {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        std::fs::remove_dir_all(there.daemon.dir().join("vda.img.ebb"))?;
        std::fs::copy(self.scene.daemon.image("vda"), there.daemon.image("vda"))?;
        let file = there.daemon.dir().join("history");
        tracker(&["export", text(&self.scene.daemon.dir().join("vda.img.ebb"))?, text(&file)?])?;
        tracker(&["import", text(&file)?, "--image", text(&there.daemon.image("vda"))?])?;
        there.restart(Signal::TERM)?;
        self.scene = there;
        Ok(())
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// Runs `ebbtide tracker …`.
fn tracker(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(ebbtide()?);
    command.arg("tracker").args(arguments);
    output_of(command, &[], Duration::from_secs(60))
}

/// One id, asked again after everything that a change id outlives, in two orders.
#[test]
fn a_change_id_outlives_restarts_kills_resizes_and_moves() -> Result<()> {
    let mut chain = Chain::begin()?;
    for round in 0..2 {
        chain.work()?;
        chain.restart(Signal::TERM, "a restart")?;
        chain.work()?;
        chain.restart(Signal::KILL, "a kill")?;
        chain.work()?;
        chain.resize(BYTES + 5 * BLOCK + 512)?;
        chain.work()?;
        chain.restart(Signal::KILL, "growing, and a kill")?;
        chain.resize(BYTES / 2 + 3 * 512)?;
        chain.restart(Signal::KILL, "shrinking, and a kill")?;
        chain.work()?;
        chain.resize(BYTES + round * BLOCK)?;
        chain.restart(Signal::TERM, "shrinking, growing, and a restart")?;
        chain.work()?;
        chain.move_away()?;
        chain.check("a move")?;
        chain.work()?;
        // Several in a row, with and without a change between them, and none is looked at.
        for nth in 0..5 {
            if nth % 2 == 0 {
                chain.work()?;
            }
            chain.scene.restart(Signal::KILL)?;
        }
        chain.check("several kills in a row")?;
    }
    Ok(())
}

/// Far more than there may be snapshots, epochs in a byte, or entries in any table of a fixed size.
#[test]
fn any_number_of_checkpoints_is_kept_and_asked() -> Result<()> {
    const COUNT: u64 = 1500;
    let state = in_memory()?;
    let mut scene = Scene::start(&[disk(&format!("state={}", state.path().display()))])?;
    let mut guest = scene.guest("vda", 1)?;
    for nth in 0..COUNT {
        if nth % 50 == 0 {
            guest.write(nth % 128 * BLOCK / 512, &bytes(nth, 512))?;
            scene.freeze(&format!("s{nth}"), &["vda"])?;
        }
        let made = json!({ "name": format!("c{nth}"), "snapshot": format!("s{}", nth / 50 * 50) });
        scene.qmp.call("checkpoint-create", made)?;
        if nth % 50 == 49 {
            scene.delete(&format!("s{}", nth / 50 * 50))?;
        }
    }
    drop(guest);
    for signal in [Signal::KILL, Signal::TERM] {
        scene.restart(signal)?;
        let listed = scene.qmp.call("query-checkpoints", json!({ "disk": "vda" }))?;
        ensure!(listed.as_array().map(Vec::len) == usize::try_from(COUNT).ok(), "after {signal:?}");
        for (since, until) in [(0, 50), (0, 1499), (49, 50), (777, 1201), (1449, 1450)] {
            let found = between(&mut scene, &format!("c{since}"), &format!("c{until}"), 0, 1000)?.0;
            let expected = (since / 50 + 1..=until / 50).map(|nth| nth * 50 % 128).collect();
            ensure!(blocks(&found) == expected, "c{since} to c{until}: {found:?}");
        }
        let same = between(&mut scene, "c1450", "c1499", 0, 1000);
        ensure!(same.is_ok_and(|(found, next)| found.is_empty() && next.is_none()), "of one instant");
    }
    Ok(())
}

/// One answer, and where the next begins.
fn between(
    scene: &mut Scene,
    since: &str,
    until: &str,
    offset: u64,
    limit: u64,
) -> Result<(Vec<Range<u64>>, Option<u64>)> {
    let query = json!({ "disk": "vda", "since": since, "until": until, "offset": offset, "limit": limit });
    let page = scene.qmp.call("query-changed-blocks", query)?;
    let number =
        |range: &Value, name: &str| range[name].as_u64().with_context(|| format!("{name} of {range}"));
    let ranges = page["ranges"].as_array().context("ranges")?.iter();
    let ranges = ranges.map(|range| {
        let first = number(range, "offset")?;
        Ok(first..first + number(range, "length")?)
    });
    Ok((ranges.collect::<Result<_>>()?, page["next-offset"].as_u64()))
}

/// The part of `all` from `offset` on.
fn rest(all: &[Range<u64>], offset: u64) -> Vec<Range<u64>> {
    let cut = all.iter().map(|range| range.start.max(offset)..range.end);
    cut.filter(|range| range.start < range.end).collect()
}

/// Both ends in the past; asked from anywhere, in pages of any size, while the guest goes on, and over restarts.
#[test]
fn what_changed_between_two_past_instants_is_resumed_at_any_offset() -> Result<()> {
    let mut scene = Scene::start(&[disk("")])?;
    let mut random = Random::new(3);
    let mut guest = scene.guest("vda", 1)?;
    for name in ["a", "b", "c"] {
        for _ in 0..25 {
            guest.write(random.below(BYTES / 512), &[1; 512])?;
        }
        scene.freeze(name, &["vda"])?;
        scene.qmp.call("checkpoint-create", json!({ "name": format!("at-{name}"), "snapshot": name }))?;
        scene.delete(name)?;
    }
    let (all, next) = between(&mut scene, "at-a", "at-b", 0, 10_000)?;
    ensure!(all.len() > 10 && next.is_none(), "{all:?}");
    for round in 0..60 {
        guest.write(random.below(BYTES / 512), &[2; 512])?;
        if round % 25 == 24 {
            drop(guest);
            scene.restart(if round % 2 == 0 { Signal::KILL } else { Signal::TERM })?;
            guest = scene.guest("vda", 1)?;
        }
        let begin = match round % 3 {
            // Borders of ranges, and anywhere.
            0 => all[usize::try_from(random.below(all.len() as u64))?].end,
            1 => all[usize::try_from(random.below(all.len() as u64))?].start,
            _ => random.below(BYTES + 1),
        };
        let limit = 1 + random.below(7);
        let (mut found, mut offset) = (Vec::new(), Some(begin));
        while let Some(from) = offset {
            let (page, next) = between(&mut scene, "at-a", "at-b", from, limit)?;
            ensure!(page.len() as u64 <= limit && next.is_none_or(|next| next > from), "{page:?}, {next:?}");
            found.extend(page);
            offset = next;
        }
        ensure!(found == rest(&all, begin), "from {begin} by {limit}: {found:?}");
    }
    Ok(())
}

/// What fails may have been done in part: it counts, whatever it was.
#[test]
fn what_failed_counts_as_changed() -> Result<()> {
    let mut scene = Scene::start(&[disk("")])?;
    scene.freeze("s0", &["vda"])?;
    let mut guest = scene.guest("vda", 1)?;
    // Nothing of the image from here on can be written.
    let wall = 2 << 20;
    scene.daemon.server().limit(Resource::Fsize, Some(wall))?;
    let sector = |block: u64| block * BLOCK / 512;
    let failing = [Op::write(sector(100), &[1; 4096]), Op::write(sector(110) + 1, &[2; 512])];
    for op in &failing {
        let answer = guest.run(op)?;
        ensure!(answer.status == status::IOERR, "a write that fails: {}", answer.status);
    }
    // One that is done in part.
    let across = Op::write(wall / 512 - 8, &[3; 8192]);
    ensure!(guest.run(&across)?.status == status::IOERR, "a write that fails in the middle");
    // Done or refused, as the host likes; either counts.
    let _ = guest.run(&Op::discard(&[(sector(50), 8, 0)]))?;
    let _ = guest.run(&Op::write_zeroes(&[(sector(51), 8, 0)]))?;
    scene.daemon.server().limit(Resource::Fsize, None)?;
    scene.freeze("s1", &["vda"])?;
    let expected: BTreeSet<u64> = [31, 32, 50, 51, 100, 110].into();
    let told = blocks(&scene.changed("vda", "s0", "s1")?);
    ensure!(told == expected, "{told:?} and not {expected:?}");
    drop(guest);
    scene.restart(Signal::KILL)?;
    ensure!(blocks(&scene.changed("vda", "s0", "s1")?) == expected, "after a kill");
    // Not even the daemon's last words can be written: it ends with an error, and the next one goes on.
    let server = scene.daemon.server();
    server.limit(Resource::Fsize, Some(0))?;
    server.signal(Signal::TERM)?;
    let ended = server.ended()?;
    ensure!(ended.code() == Some(1), "{ended}");
    scene.restart(Signal::TERM)?;
    ensure!(blocks(&scene.changed("vda", "s0", "s1")?) == expected, "after an end without a word");
    Ok(())
}

fn resize(scene: &mut Scene, size: u64) -> ebbtide_tests::qmp::Result<Value> {
    scene.qmp.call("block_resize", json!({ "disk": "vda", "size": size, "shrink": true }))
}

/// Everything that has to be kept has its place already; what has not is refused, and costs nothing.
#[test]
fn a_disk_is_resized_and_tracked_while_its_state_has_no_space() -> Result<()> {
    let Some(state) = Mounted::tmpfs(2 << 20)? else { return Ok(()) };
    let mut scene = Scene::start(&[disk(&format!("state={}/state", state.path().display()))])?;
    let mut guest = scene.guest("vda", 1)?;
    let id = scene.freeze("s0", &["vda"])?.remove(0);
    scene.delete("s0")?;
    state.fill()?;
    guest.write(0, &[1; 512])?;
    resize(&mut scene, BYTES / 2)?;
    guest.write(BLOCK / 512, &[1; 512])?;
    ensure!(guest.run(&Op::write(BYTES / 1024, &[1; 512]))?.status != 0, "past the new end");
    // Not even a page for a snapshot's head.
    scene.freeze("s1", &["vda"]).expect_err("there is no space for a snapshot");
    let error = resize(&mut scene, 1 << 40).expect_err("there is no space for such a map");
    ensure!(error.reason() == "io" && error.to_string().contains("change map"), "{error}");
    for (verb, on) in [("tracker-disable", false), ("tracker-enable", true)] {
        let told = scene.qmp.call(verb, json!({ "disk": "vda" }))?;
        ensure!(told["on"] == on, "{verb}: {told}");
    }
    guest.write(2 * BLOCK / 512, &[1; 512])?;
    drop(guest);
    state.drain()?;
    scene.restart(Signal::KILL)?;
    let now = scene.qmp.call("query-disks", json!({}))?[0].take();
    ensure!(now["size"] == BYTES / 2 && now["tracker"]["reason"] == "kept", "{now}");
    let since = now["tracker"]["change-id"].as_str().context("a change id")?.to_owned();
    scene.freeze("s2", &["vda"])?;
    ensure!(blocks(&scene.changed("vda", &since, "s2")?) == [2].into(), "since it is on");
    let error = scene.changed("vda", &id, "s2").expect_err("tracking was off meanwhile");
    ensure!(
        error.to_string().contains("tracking-enabled"),
        "the reason is known after a restart too: {error}"
    );
    Ok(())
}

/// The same goes for a disk whose tracking is switched off: its map grows with it.
#[test]
fn a_map_that_finds_no_space_gives_back_what_it_took() -> Result<()> {
    let Some(state) = Mounted::tmpfs(16 << 20)? else { return Ok(()) };
    // A file system that keeps what an allocation had before it found no more.
    let device = state.path().join("device");
    std::fs::File::create(&device)?.set_len(12 << 20)?;
    let Some(state) = Mounted::ext4(&device)? else { return Ok(()) };
    let mut scene = Scene::start(&[disk(&format!("state={}/state", state.path().display()))])?;
    for verb in ["tracker-disable", "tracker-enable"] {
        scene.qmp.call(verb, json!({ "disk": "vda" }))?;
        let before = state.free_bytes()?;
        let error = resize(&mut scene, 1 << 40).expect_err("there is no space for such a map");
        ensure!(error.reason() == "io" && error.to_string().contains("change map"), "{error}");
        let after = state.free_bytes()?;
        ensure!(after + (64 << 10) >= before, "{verb}: {before} bytes were free, and {after} are left");
        ensure!(scene.qmp.call("query-disks", json!({}))?[0]["size"] == BYTES, "the size is the old one");
    }
    Ok(())
}
