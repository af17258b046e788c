//! Images on file systems that have no space left: the guest is told, nothing that changed is missing in any answer,
//! snapshots are exact or say that they are broken, and once there is space everything goes on.
//!
//! Invariant: a snapshot is compared with what the guest saw at its instant. Absent: full stores with an image that has space (`tests/e2e/store-full`).
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::fs::symlink;

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::host::Mounted;
use ebbtide_tests::nbd::{self, Nbd};
use ebbtide_tests::random::{Random, bytes};
use ebbtide_tests::scene::{BLOCK, Scene, blocks, kick};
use ebbtide_tests::vhost_client::{Client, Op};
use ebbtide_tests::virtio::status;
use rustix::process::Signal;
use serde_json::json;

const BYTES: u64 = 4 << 20;
/// Some of it is the file system's own; what is left is less than the disk, so that it is full before the end.
const ROOM: u64 = 12 << 20;
const SECTOR: u64 = 512;

/// What changed since an instant: what must be told, and what may be.
#[derive(Clone, Debug, Default)]
struct Changed {
    must: BTreeSet<u64>,
    may: BTreeSet<u64>,
}

/// An instant, and what is known of it.
struct Instant {
    name: String,
    id: String,
    content: Vec<u8>,
    since: Changed,
}

/// A disk on a small file system, and what was done to it.
struct Cramped {
    room: Mounted,
    scene: Scene,
    instants: Vec<Instant>,
    random: Random,
    is_full: bool,
    names: u32,
    failed: u32,
    broken: BTreeSet<String>,
}

impl Cramped {
    /// The state directory is beside the image, or elsewhere.
    fn begin(room: Mounted, beside: bool, seed: u64) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ebbtide-test-").tempdir()?;
        std::fs::File::create(room.path().join("image"))?.set_len(BYTES)?;
        symlink(room.path().join("image"), dir.path().join("vda.img"))?;
        let more = match beside {
            true => "block-size=65536".to_owned(),
            false => format!("block-size=65536,state={}/state", dir.path().display()),
        };
        // Disks of a scene live as long as the program.
        let disk = Disk { name: "vda", bytes: BYTES, queues: 1, read_only: false, more: more.leak() };
        let scene = Scene::start_in(dir, &[disk])?;
        let (instants, random, broken) = (Vec::new(), Random::new(seed), BTreeSet::new());
        Ok(Self { room, scene, instants, random, is_full: false, names: 0, failed: 0, broken })
    }

    fn touch(&mut self, range: Range<u64>, must: bool) {
        let touched: BTreeSet<u64> = (range.start / BLOCK..range.end.div_ceil(BLOCK)).collect();
        for instant in &mut self.instants {
            instant.since.may.extend(&touched);
            if must {
                instant.since.must.extend(&touched);
            }
        }
    }

    /// One request of any kind; answers whether it was done.
    fn change(&mut self, guest: &mut Client) -> Result<bool> {
        let before = whole(guest)?;
        let sectors = 1 + self.random.below(64);
        let first = self.random.below(BYTES / SECTOR - sectors);
        let range = first * SECTOR..(first + sectors) * SECTOR;
        let data = bytes(self.random.next(), usize::try_from(sectors * SECTOR)?);
        let kind = self.random.below(8);
        let span = u32::try_from(sectors)?;
        let op = match kind {
            0 => Op::discard(&[(first, span, 0)]),
            1 => Op::write_zeroes(&[(first, span, 0)]),
            2 => Op::write_zeroes(&[(first, span, 1)]),
            _ => Op::write(first, &data),
        };
        let reply = guest.run(&op)?;
        let done = reply.status == status::OK;
        ensure!(done || reply.status == status::IOERR, "an answer of {}", reply.status);
        ensure!(done || self.is_full, "there is space, and request {kind} of {range:?} failed");
        self.failed += u32::from(!done);
        let now = whole(guest)?;
        let (from, to) = (usize::try_from(range.start)?, usize::try_from(range.end)?);
        ensure!(now[..from] == before[..from] && now[to..] == before[to..], "another place was changed");
        let wanted = if kind < 3 { vec![0; to - from] } else { data };
        // A discard is a hint.
        ensure!(!done || kind == 0 || now[from..to] == wanted, "request {kind} of {range:?} was not done");
        self.touch(range.clone(), done || kind > 2);
        Ok(done)
    }

    /// Writes to many places that are in flight together: some find space, some do not.
    fn burst(&mut self, guest: &mut Client) -> Result<()> {
        let sectors = BLOCK / SECTOR;
        let mut wanted = Vec::new();
        for part in 0..BYTES / BLOCK / 4 {
            let first = (part * 4 + self.random.below(4)) * sectors + self.random.below(sectors / 2);
            let data = bytes(self.random.next(), 16 << 10);
            let ticket = guest.place(&Op::write(first, &data))?;
            wanted.push((first * SECTOR, data, ticket));
        }
        kick(guest)?;
        let mut done = Vec::new();
        for (at, data, ticket) in wanted {
            let reply = guest.finish(ticket)?;
            ensure!([status::OK, status::IOERR].contains(&reply.status), "an answer of {}", reply.status);
            ensure!(reply.status == status::OK || self.is_full, "there is space for {at}");
            self.failed += u32::from(reply.status != status::OK);
            self.touch(at..at + data.len() as u64, true);
            if reply.status == status::OK {
                done.push((at, data));
            }
        }
        let now = whole(guest)?;
        let is_there = |(at, data): &(u64, Vec<u8>)| {
            usize::try_from(*at).is_ok_and(|at| now[at..at + data.len()] == data[..])
        };
        ensure!(done.iter().all(is_there), "what was answered is not there");
        Ok(())
    }

    fn freeze(&mut self, guest: &mut Client) -> Result<()> {
        let name = format!("s{}", self.names);
        self.names += 1;
        match self.scene.freeze(&name, &["vda"]) {
            Ok(mut ids) => {
                let (id, content) = (ids.remove(0), whole(guest)?);
                self.instants.push(Instant { name, id, content, since: Changed::default() });
                Ok(())
            }
            // Not even a page of the state has space.
            Err(error) if self.is_full => {
                ensure!(!error.reason().is_empty(), "{error}");
                ensure!(self.scene.snapshots("vda")?.iter().all(|one| one["name"] != name), "half made");
                Ok(())
            }
            Err(error) => bail!("there is space: {error}"),
        }
    }

    fn fill(&mut self) -> Result<()> {
        self.is_full = true;
        self.room.fill()
    }

    fn drain(&mut self) -> Result<()> {
        self.is_full = false;
        self.room.drain()
    }

    /// Every snapshot is what it was, or is broken and says why; and what changed between any two is told.
    fn check(&mut self, what: &str) -> Result<()> {
        self.snapshots().with_context(|| what.to_owned())?;
        self.changes().with_context(|| what.to_owned())
    }

    fn snapshots(&mut self) -> Result<()> {
        let told = self.scene.snapshots("vda")?;
        ensure!(told.len() == self.instants.len(), "{told:?}");
        for (one, told) in self.instants.iter().zip(told) {
            let view = self.scene.open("vda", &one.name).and_then(|mut view| view.read_all());
            if told["state"] == "active" {
                ensure!(!self.broken.contains(&one.name), "{} is whole again", one.name);
                ensure!(view.is_ok_and(|view| view == one.content), "{} is not exact", one.name);
                continue;
            }
            let reason = told["reason"].as_str().unwrap_or_default();
            ensure!(told["state"] == "broken" && !reason.is_empty() && view.is_err(), "{told}: {view:?}");
            self.broken.insert(one.name.clone());
        }
        Ok(())
    }

    fn changes(&mut self) -> Result<()> {
        for since in 0..self.instants.len() {
            for until in since + 1..self.instants.len() {
                let (older, younger) = (&self.instants[since], &self.instants[until]);
                if self.broken.contains(&younger.name) {
                    continue;
                }
                let (id, name) = (older.id.clone(), younger.name.clone());
                let all = blocks(&self.scene.changed("vda", &id, &name)?);
                let differ = (0..BYTES / BLOCK).filter(|&block| {
                    let of = |instant: usize| {
                        let from = usize::try_from(block * BLOCK).expect("small");
                        &self.instants[instant].content[from..][..usize::try_from(BLOCK).expect("small")]
                    };
                    of(since) != of(until)
                });
                let missing: Vec<_> = differ.filter(|block| !all.contains(block)).collect();
                ensure!(missing.is_empty(), "{id} to {name}: {missing:?} are missing");
            }
        }
        Ok(())
    }

    /// What is told since each instant up to now. There is space.
    fn check_now(&mut self, what: &str) -> Result<()> {
        self.scene.freeze("now", &["vda"])?;
        for one in &self.instants {
            let told = blocks(&self.scene.changed("vda", &one.id, "now")?);
            let Changed { must, may } = &one.since;
            ensure!(must.is_subset(&told), "{what}: since {}, {must:?} and not {told:?}", one.name);
            ensure!(told.is_subset(may), "{what}: since {}, {told:?}, more than {may:?}", one.name);
        }
        Ok(self.scene.delete("now")?)
    }
}

/// The disk as its guest sees it. The host's page cache may hold something else for a request that was refused.
fn whole(guest: &mut Client) -> Result<Vec<u8>> {
    let part = u32::try_from(BLOCK)?;
    let parts = (0..BYTES / BLOCK).map(|block| Ok(guest.read(block * BLOCK / SECTOR, part)?));
    Ok(parts.collect::<Result<Vec<_>>>()?.concat())
}

/// Changes with and without space, snapshots, kills and restarts.
fn goes_through(room: Mounted, beside: bool, seed: u64) -> Result<()> {
    let mut all = Cramped::begin(room, beside, seed)?;
    let mut guest = all.scene.guest("vda", 1)?;
    // Half of it has its place.
    for part in 0..BYTES / 2 / BLOCK {
        guest.write(part * BLOCK / SECTOR, &bytes(part, usize::try_from(BLOCK)?))?;
    }
    all.freeze(&mut guest)?;
    for round in 0..4 {
        all.fill()?;
        let (mut done, mut failed) = (0, 0);
        for nth in 0..60 {
            match all.change(&mut guest)? {
                true => done += 1,
                false => failed += 1,
            }
            if nth % 20 == 10 {
                all.freeze(&mut guest)?;
            }
        }
        all.burst(&mut guest)?;
        println!("seed {seed}, round {round}: {done} done, {failed} refused, {} broken", all.broken.len());
        guest.flush()?;
        all.check("full")?;
        drop(guest);
        // At an end in order there may be no space for what it leaves.
        all.scene.restart(if round % 3 == 1 { Signal::TERM } else { Signal::KILL })?;
        all.check("ended when it was full")?;
        guest = all.scene.guest("vda", 1)?;
        for _ in 0..5 {
            all.change(&mut guest)?;
        }
        all.drain()?;
        all.burst(&mut guest)?;
        for _ in 0..20 {
            ensure!(all.change(&mut guest)?, "there is space");
        }
        guest.flush()?;
        all.check_now("with space")?;
        all.check("with space")?;
        drop(guest);
        all.scene.restart(if round % 2 == 0 { Signal::TERM } else { Signal::KILL })?;
        all.check_now("started with space")?;
        guest = all.scene.guest("vda", 1)?;
    }
    ensure!(all.failed > 20, "{} were refused", all.failed);
    ensure!(beside || all.broken.is_empty(), "the store had space: {:?}", all.broken);
    Ok(())
}

#[test]
fn on_a_full_tmpfs_with_the_state_elsewhere() -> Result<()> {
    for seed in 0..3 {
        let Some(room) = Mounted::tmpfs(ROOM)? else { return Ok(()) };
        goes_through(room, false, seed).with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

#[test]
fn on_a_full_tmpfs_with_the_state_beside_it() -> Result<()> {
    for seed in 3..6 {
        let Some(room) = Mounted::tmpfs(ROOM)? else { return Ok(()) };
        goes_through(room, true, seed).with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

/// By direct I/O, which the file system has to find space for at once.
#[test]
fn on_a_full_ext4() -> Result<()> {
    for (seed, beside) in [(6, false), (7, true)] {
        let Some(below) = Mounted::tmpfs(2 * ROOM)? else { return Ok(()) };
        let device = below.path().join("device");
        std::fs::File::create(&device)?.set_len(ROOM + ROOM / 2)?;
        let Some(room) = Mounted::ext4(&device)? else { return Ok(()) };
        goes_through(room, beside, seed).with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

/// An overlay's own content finds no space: who writes is told, and what was not written is the snapshot's.
#[test]
fn an_overlay_on_a_full_tmpfs() -> Result<()> {
    let Some(room) = Mounted::tmpfs(ROOM)? else { return Ok(()) };
    let mut all = Cramped::begin(room, true, 9)?;
    let mut guest = all.scene.guest("vda", 1)?;
    (0..BYTES / BLOCK).try_for_each(|block| guest.write(block * BLOCK / SECTOR, &bytes(block, 65536)))?;
    all.freeze(&mut guest)?;
    let open = json!({ "disk": "vda", "snapshot": "s0", "name": "o", "writable": true });
    all.scene.qmp.call("snapshot-open", open)?;
    let mut overlay = Nbd::open(&all.scene.daemon.nbd(), "vda@s0/o")?;
    let mut wanted = all.instants[0].content.clone();
    let (place, part) = (usize::try_from(BLOCK)?, u32::try_from(BLOCK)?);
    overlay.write(0, &bytes(100, place), 0)?;
    wanted[..place].copy_from_slice(&bytes(100, place));
    all.fill()?;
    for block in [3, 7, 11] {
        let data = bytes(200 + block, place);
        let refused = overlay.write(block * BLOCK + SECTOR, &data, 0).expect_err("there is no space");
        ensure!(matches!(refused, nbd::Error::Errno(28)), "{refused}");
        // Grain by grain, it was done or it was not.
        let from = usize::try_from(block)? * place;
        let seen = overlay.read(block * BLOCK, part)?;
        for (nth, grain) in seen.chunks(4096).enumerate().skip(1) {
            let at = nth * 4096;
            let is_old = grain == &wanted[from + at..][..4096];
            ensure!(is_old || grain == &data[at - 512..][..4096], "grain {nth} of block {block}");
        }
        wanted[from..from + place].copy_from_slice(&seen);
    }
    // What has its place can be written.
    overlay.write(SECTOR, &bytes(101, 4096), 0)?;
    wanted[512..][..4096].copy_from_slice(&bytes(101, 4096));
    ensure!(overlay.read_all()? == wanted, "the overlay");
    all.check("full")?;
    all.drain()?;
    overlay.write(3 * BLOCK, &bytes(102, place), nbd::FUA)?;
    wanted[3 * place..4 * place].copy_from_slice(&bytes(102, place));
    ensure!(overlay.read_all()? == wanted, "the overlay, with space");
    all.check("with space")
}
