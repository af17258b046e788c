//! Everything at once: guests write, several operators give any verbs in any order, a backup program goes on with its
//! chain, and the daemon is killed in the midst of it, again and again.
//!
//! What has to be so: the daemon runs until it is killed; what a guest was answered is there; a snapshot reads the same
//! whenever it is read, also after a kill; a backup and what changed since it are the next backup, or it is said that
//! they are not.
//! Absent: which of the verbs are refused, and why; other tests know.
//!
//! `ROUNDS=n` runs more rounds, `SEED=n` others. `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::nbd::Nbd;
use ebbtide_tests::qmp::{self, Qmp};
use ebbtide_tests::random::{Random, bytes};
use ebbtide_tests::scene::Scene;
use ebbtide_tests::vhost_client::{Client, Op, Options};
use ebbtide_tests::virtio::status;
use rustix::process::{Resource, Signal};
use serde_json::{Value, json};

const SECTOR: usize = 512;
/// Bytes that the disk always has.
const SAFE: u64 = 3 << 20;
const SIZES: [u64; 4] = [4 << 20, (5 << 20) + 512, 6 << 20, (9 << 20) - 3 * 512];
/// Reasons for which a backup cannot be incremental.
const NO_INCREMENT: [&str; 3] = ["generation-differs", "tracking-off", "since-not-older"];

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Where the daemon is reached.
struct Doors {
    control: PathBuf,
    nbd: PathBuf,
    disk: PathBuf,
    stop: AtomicBool,
}

impl Doors {
    fn is_over(&self) -> bool {
        self.stop.load(SeqCst)
    }

    /// A control connection; none once the daemon is killed.
    fn control(&self) -> Result<Option<Qmp>> {
        self.unless_over(Qmp::connect(&self.control).map_err(Into::into))
    }

    /// An error is none once the daemon is killed.
    fn unless_over<T>(&self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            // It is told a moment after the kill.
            Err(error) => {
                std::thread::sleep(Duration::from_millis(100));
                if self.is_over() { Ok(None) } else { Err(error) }
            }
        }
    }
}

/// What a guest knows of each sector: which of its writes is there, 0 for zeros, or nothing.
struct Guest {
    sectors: Vec<Option<u64>>,
    random: Random,
    writes: u64,
    /// Requests may fail.
    faults: bool,
}

impl Guest {
    fn content(write: u64) -> Vec<u8> {
        if write == 0 { vec![0; SECTOR] } else { bytes(write, SECTOR) }
    }

    /// Works until the daemon is killed.
    fn work(&mut self, doors: &Doors, checked: bool) -> Result<()> {
        let Some(mut client) = doors.unless_over(connect(&doors.disk))? else { return Ok(()) };
        while !doors.is_over() {
            let mut tickets = Vec::new();
            for part in 0..4 {
                let quarter = SAFE / SECTOR as u64 / 4;
                let count = 1 + self.random.below(20);
                let first = part * quarter + self.random.below(quarter - count);
                let (op, wanted) = self.draw(first, count);
                tickets.push((client.start(&op)?, op.kind, first, count, wanted));
            }
            for (ticket, kind, first, count, wanted) in tickets {
                while !client.ends_within(&ticket, Duration::from_millis(50))? {
                    if doors.is_over() {
                        return Ok(());
                    }
                }
                let reply = client.finish(ticket)?;
                if self.faults && reply.status == status::IOERR {
                    continue;
                }
                ensure!(reply.status == status::OK, "request {kind} of {first}+{count}: {}", reply.status);
                let places = usize::try_from(first)?..usize::try_from(first + count)?;
                match wanted {
                    Some(write) => self.sectors[places].fill(write),
                    None if checked => self.compare(places, &reply.data)?,
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// A request, and what its sectors hold once it is done; nothing if it reads.
    fn draw(&mut self, first: u64, count: u64) -> (Op, Option<Option<u64>>) {
        let places = usize::try_from(first).unwrap_or(0)..usize::try_from(first + count).unwrap_or(0);
        let sectors = u32::try_from(count).unwrap_or(1);
        let kind = self.random.below(10);
        if kind < 3 {
            return (Op::read(first, sectors * 512), None);
        }
        // Until it is answered it may be there or not.
        self.sectors[places].fill(None);
        match kind {
            3 => (Op::discard(&[(first, sectors, 0)]), Some(None)),
            4 => (Op::write_zeroes(&[(first, sectors, 1)]), Some(Some(0))),
            _ => {
                self.writes += 1;
                let data = Self::content(self.writes).repeat(usize::try_from(count).unwrap_or(1));
                (Op::write(first, &data), Some(Some(self.writes)))
            }
        }
    }

    fn compare(&self, places: std::ops::Range<usize>, found: &[u8]) -> Result<()> {
        for (place, data) in places.zip(found.chunks(SECTOR)) {
            if let Some(write) = self.sectors[place] {
                ensure!(data == Self::content(write), "sector {place}: write {write} is not there");
            }
        }
        Ok(())
    }
}

fn connect(path: &Path) -> Result<Client> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Client::connect(path, &Options { queues: 1, ..Options::default() }) {
            Ok(client) => return Ok(client),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Any verb, with any arguments that make sense.
fn any_verb(random: &mut Random, switches: bool, reverts: bool) -> (&'static str, Value) {
    let mut of = |most: u64| random.below(most);
    let snapshot = format!("a{}", of(4));
    let overlay = format!("o{}", of(2));
    // Each of them ends all chains of backups: in some rounds only.
    if switches && of(8) == 0 {
        let verb = ["tracker-disable", "tracker-enable", "tracker-enable", "tracker-reset"];
        return (verb[usize::try_from(of(4)).unwrap_or(0)], json!({ "disk": "vda" }));
    }
    // Rarely: until it is done most verbs are refused.
    if reverts && of(60) == 0 {
        return ("disk-revert", json!({ "disk": "vda", "snapshot": snapshot, "force": true }));
    }
    match of(19) {
        0..=3 => ("snapshot-create", json!({ "name": snapshot })),
        4..=6 => ("snapshot-delete", json!({ "name": snapshot })),
        7 | 8 => {
            let size = SIZES[usize::try_from(of(4)).unwrap_or(0)];
            ("block_resize", json!({ "disk": "vda", "size": size, "shrink": of(2) == 0 }))
        }
        9..=12 => ("query-incremental", json!({ "since": "c0" })),
        13 => {
            let range = json!({ "offset": of(SAFE), "length": of(SAFE / 8) });
            ("tracker-mark", json!({ "disk": "vda", "ranges": [range] }))
        }
        14 => ("checkpoint-create", json!({ "name": format!("c{}", of(3)), "snapshot": snapshot })),
        15 => ("checkpoint-delete", json!({ "name": format!("c{}", of(3)) })),
        16 => {
            let open = json!({ "disk": "vda", "snapshot": snapshot, "name": overlay, "writable": true, "keep": of(2) == 0 });
            ("snapshot-open", open)
        }
        17 => ("snapshot-close", json!({ "disk": "vda", "snapshot": snapshot, "name": overlay })),
        _ => match of(5) {
            0 => ("query-snapshots", json!({})),
            1 => ("query-tracker", json!({})),
            2 => ("query-change-map", json!({ "disk": "vda" })),
            3 => ("query-checkpoints", json!({})),
            _ => {
                let until = format!("c{}", of(3));
                ("query-changed-blocks", json!({ "disk": "vda", "since": "c0", "until": until }))
            }
        },
    }
}

/// Gives verbs until the daemon is killed; how often each was done and refused.
fn operate(doors: &Doors, seed: u64, switches: bool, reverts: bool) -> Result<BTreeMap<String, u64>> {
    let (mut random, mut told) = (Random::new(seed), BTreeMap::new());
    let Some(mut qmp) = doors.control()? else { return Ok(told) };
    while !doors.is_over() {
        let (verb, arguments) = any_verb(&mut random, switches, reverts);
        let outcome = match qmp.call(verb, arguments) {
            Ok(_) => "done".to_owned(),
            Err(qmp::Error::Refused { reason, .. }) => reason,
            Err(error) => {
                doors.unless_over::<()>(Err(error.into()))?;
                break;
            }
        };
        *told.entry(format!("{verb}: {outcome}")).or_insert(0) += 1;
    }
    Ok(told)
}

/// What must never be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Wrong(String);

/// A backup program: its last backup, and the snapshot that it reads.
#[derive(Default)]
struct Backup {
    last: Option<(String, Vec<u8>)>,
    held: Option<(String, Option<Vec<u8>>)>,
    count: u64,
    increments: u64,
    /// Snapshots may break, and not be read.
    faults: bool,
}

impl Backup {
    /// Makes one backup after the other until the daemon is killed.
    fn work(&mut self, doors: &Doors) -> Result<()> {
        let Some(mut qmp) = doors.control()? else { return Ok(()) };
        while !doors.is_over() {
            match self.one(doors, &mut qmp) {
                Err(error) if self.faults && !error.is::<Wrong>() => {
                    std::thread::sleep(Duration::from_millis(100));
                    if doors.is_over() {
                        return Ok(());
                    }
                    let Some(again) = doors.control()? else { return Ok(()) };
                    qmp = again;
                    self.abandon(&mut qmp);
                }
                done => {
                    if doors.unless_over(done)?.is_none() {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Something failed that may.
    fn abandon(&mut self, qmp: &mut Qmp) {
        if let Some((name, _)) = self.held.take() {
            let _ = qmp.call("snapshot-delete", json!({ "name": name }));
        }
    }

    fn one(&mut self, doors: &Doors, qmp: &mut Qmp) -> Result<()> {
        self.count += 1;
        let name = format!("b{}", self.count);
        self.held = Some((name.clone(), None));
        let id = match qmp.call("snapshot-create", json!({ "name": name })) {
            Ok(answer) => answer["disks"][0]["change-id"].as_str().context("a change id")?.to_owned(),
            // A rewind is under way, or writes took too long.
            Err(qmp::Error::Refused { .. }) => {
                self.held = None;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let mut view = Nbd::open(&doors.nbd, &format!("vda@{name}"))?;
        let content = view.read_all()?;
        self.held = Some((name.clone(), Some(content.clone())));
        if let Some((since, mut restored)) = self.last.clone() {
            match changed(qmp, &since, &name) {
                Ok(ranges) => {
                    restored.resize(content.len(), 0xee);
                    for (first, length) in ranges {
                        restored[first..first + length].copy_from_slice(&content[first..first + length]);
                    }
                    let differs = restored.iter().zip(&content).position(|(a, b)| a != b);
                    if let Some(at) = differs {
                        return Err(Wrong(format!("{name} since {since}: byte {at} is in no change")).into());
                    }
                    self.increments += 1;
                }
                Err(qmp::Error::Refused { reason, .. }) if NO_INCREMENT.contains(&reason.as_str()) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if view.read_all()? != content {
            return Err(Wrong(format!("{name} reads otherwise the second time")).into());
        }
        self.last = Some((id, content));
        drop(view);
        qmp.call("snapshot-delete", json!({ "name": name }))?;
        self.held = None;
        Ok(())
    }

    /// After a kill: what was read of a snapshot is still there, if the snapshot is.
    fn look_again(&mut self, scene: &mut Scene) -> Result<()> {
        let Some((name, content)) = self.held.take() else { return Ok(()) };
        let found = scene.snapshots("vda")?;
        let Some(found) = found.iter().find(|one| one["name"] == name.as_str()) else { return Ok(()) };
        if let Some(content) = content.filter(|_| !self.faults || found["state"] == "active") {
            ensure!(found["state"] == "active", "{found}");
            ensure!(scene.view("vda", &name)? == content, "{name} reads otherwise after the kill");
        }
        Ok(scene.delete(&name)?)
    }
}

fn changed(qmp: &mut Qmp, since: &str, snapshot: &str) -> qmp::Result<Vec<(usize, usize)>> {
    let (mut all, mut offset) = (Vec::new(), Some(0));
    while let Some(from) = offset {
        let query = json!({ "disk": "vda", "since": since, "snapshot": snapshot, "offset": from });
        let page = qmp.call("query-changed-blocks", query)?;
        let number =
            |range: &Value, name: &str| usize::try_from(range[name].as_u64().unwrap_or(0)).unwrap_or(0);
        let ranges = page["ranges"].as_array().into_iter().flatten();
        all.extend(ranges.map(|range| (number(range, "offset"), number(range, "length"))));
        offset = page["next-offset"].as_u64();
    }
    Ok(all)
}

/// What may happen besides.
#[derive(Clone, Copy, Default)]
struct Besides {
    /// The disk is rewound now and then, so no guest knows what it holds.
    reverts: bool,
    /// Writes of files fail from some byte on, now and then.
    faults: bool,
}

fn run(seed: u64, besides: Besides) -> Result<()> {
    let Besides { reverts, faults } = besides;
    let more = "block-size=4096";
    let spec = Disk { name: "vda", bytes: SIZES[2], queues: 1, read_only: false, more };
    let mut scene = Scene::start(&[spec])?;
    let sectors = vec![Some(0); usize::try_from(SAFE)? / SECTOR];
    let mut guest = Guest { sectors, random: Random::new(seed), writes: 0, faults };
    let (mut backup, mut told) = (Backup { faults, ..Backup::default() }, BTreeMap::new());
    let mut random = Random::new(seed ^ 0xc0de);
    for round in 0..number("ROUNDS", 6) {
        let doors = Doors {
            control: scene.daemon.control(),
            nbd: scene.daemon.nbd(),
            disk: scene.daemon.socket("vda"),
            stop: AtomicBool::new(false),
        };
        // The daemon goes on with a rewind a second after its start.
        let time = Duration::from_millis(100 + random.below(700) + if reverts { 1200 } else { 0 });
        let signal = if random.below(4) == 0 { Signal::TERM } else { Signal::KILL };
        std::thread::scope(|scope| -> Result<()> {
            let (doors, at) = (&doors, seed * 1000 + round * 10);
            let operators: Vec<_> = (0..3)
                .map(|nth| scope.spawn(move || operate(doors, at + nth, round % 4 == 1, reverts)))
                .collect();
            let backups = scope.spawn(|| backup.work(doors));
            let guests = scope.spawn(|| guest.work(doors, !reverts));
            let server = scene.daemon.server();
            let over = Instant::now() + time;
            while Instant::now() < over && server.is_alive() {
                let most = [None, None, Some(0), Some(4096), Some(16 << 10), Some(1 << 20), Some(2 << 20)];
                let most = most[usize::try_from(random.below(7))?];
                // It may have ended; that is seen below.
                let _ = server.limit(Resource::Fsize, most.filter(|_| faults));
                std::thread::sleep(Duration::from_millis(10 + random.below(60)));
            }
            let alive = server.is_alive();
            doors.stop.store(true, SeqCst);
            if !alive {
                bail!("it ended by itself: {}", server.output());
            }
            server.signal(signal)?;
            let of = |what: &str| format!("round {round} of seed {seed}: {what}");
            for operator in operators {
                for (what, times) in operator.join().expect("no panic").context(of("operators"))? {
                    *told.entry(what).or_insert(0) += times;
                }
            }
            backups.join().expect("no panic").context(of("backups"))?;
            guests.join().expect("no panic").context(of("guests"))?;
            Ok(())
        })?;
        scene.restart(signal)?;
        // It may have been left off; or it is on, which is refused.
        let _ = scene.qmp.call("tracker-enable", json!({ "disk": "vda" }));
        backup.look_again(&mut scene).with_context(|| format!("after round {round} of seed {seed}"))?;
        if !reverts {
            let mut client = scene.guest("vda", 1)?;
            for (first, places) in (0..).step_by(128).zip(0..guest.sectors.len() / 128) {
                let data = client.read(first, 128 * 512)?;
                guest
                    .compare(places * 128..(places + 1) * 128, &data)
                    .with_context(|| format!("after {signal:?} in round {round} of seed {seed}"))?;
            }
        }
    }
    println!("{} backups, {} incremental; {told:?}", backup.count, backup.increments);
    ensure!(backup.increments > 0 || faults, "no backup was incremental: {told:?}");
    Ok(())
}

#[test]
fn nothing_is_lost_whatever_verbs_come_together() -> Result<()> {
    run(number("SEED", 1), Besides::default())
}

#[test]
fn a_chain_of_backups_goes_on_over_rewinds_and_any_other_verbs() -> Result<()> {
    run(number("SEED", 2), Besides { reverts: true, ..Besides::default() })
}

#[test]
fn files_that_cannot_be_written_cost_no_answered_write_and_no_change() -> Result<()> {
    run(number("SEED", 3), Besides { faults: true, ..Besides::default() })
}
