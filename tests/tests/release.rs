//! A reader that releases what it has read, with a real daemon and libnbd; and what readers are told when
//! a snapshot cannot be read.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::daemon::{Daemon, Disk, Program};
use ebbtide_tests::random::Random;
use ebbtide_tests::vhost_client::{Client, Op, Options};
use rustix::process::{Resource, Signal};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 48 * MIB;
/// How far ahead of the reader the guest writes.
const AHEAD: u64 = 8 * MIB;
/// What the reader reads and trims at once: not a multiple of a grain, to be rounded in.
const STEP: u64 = 512 * 1024;
const DISKS: [Disk; 1] = [Disk { name: "vda", bytes: BYTES, queues: 2, read_only: false, more: "" }];

/// Whether there is a libnbd to read with.
fn is_ready() -> bool {
    let ready = Command::new("/usr/bin/python3").args(["-c", "import nbd"]).output();
    let ready = ready.is_ok_and(|done| done.status.success());
    if !ready {
        eprintln!("skipped: no libnbd for python3");
    }
    ready
}

fn start() -> Result<Daemon> {
    Daemon::start(Program::Ebbtide, &DISKS)
}

/// libnbd in a process of its own.
struct Reader {
    child: Child,
    stdin: ChildStdin,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Reader {
    /// Connects to an export; `copy` is the file that is copied to.
    fn connect(daemon: &Daemon, export: &str, copy: &Path) -> Result<Self> {
        let uri = format!("nbd+unix:///{export}?socket={}", daemon.nbd().display());
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/release.py");
        let mut command = Command::new("/usr/bin/python3");
        command.arg(script).arg(uri).arg(copy).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("python3 with libnbd's module")?;
        let stdin = child.stdin.take().context("its input")?;
        let lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        Ok(Self { child, stdin, lines })
    }

    /// Does one thing; the answer's line.
    fn ask(&mut self, verb: &str, at: u64, len: u64) -> Result<String> {
        writeln!(self.stdin, "{verb} {at} {len}")?;
        Ok(self.lines.next().with_context(|| format!("no answer to {verb} {at} {len}"))??)
    }

    fn done(&mut self, verb: &str, at: u64, len: u64) -> Result<String> {
        let answer = self.ask(verb, at, len)?;
        match answer.strip_prefix("ok ") {
            Some(text) => Ok(text.to_owned()),
            None => bail!("{verb} {at} {len}: {answer}"),
        }
    }

    /// Expects an error of this name that says this.
    fn refused(&mut self, verb: &str, at: u64, name: &str, text: &str) -> Result<()> {
        let answer = self.ask(verb, at, 4096)?;
        ensure!(
            answer.starts_with(name) && answer.contains(text),
            "{verb}: {answer}; expected {name} {text}"
        );
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that overwrites everything behind the reader and some way ahead of it, until it is told to
/// stop or its disk goes away.
fn load(mut client: Client, place: &AtomicU64, stop: &AtomicBool, seed: u64) {
    let mut random = Random::new(seed);
    while !stop.load(SeqCst) {
        let limit = (place.load(SeqCst) + AHEAD).min(BYTES);
        let at = random.next() % (limit / 4096) * 4096;
        let len = usize::try_from((random.next() % 16 + 1) * 4096)
            .unwrap_or(4096)
            .min(usize::try_from(limit - at).unwrap_or(0));
        let bytes: Vec<u8> = (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        let Ok(ticket) = client.start(&Op::write(at / 512, &bytes)) else { return };
        // A daemon that was killed does not answer.
        while !client.ends_within(&ticket, Duration::from_millis(20)).unwrap_or(true) {
            if stop.load(SeqCst) {
                return;
            }
        }
        if client.finish(ticket).is_err() {
            return;
        }
    }
}

/// Fills the disk with numbers; what is on it then.
fn fill(daemon: &Daemon) -> Result<Vec<u8>> {
    let mut client = daemon.connect("vda", &Options::default())?;
    let mut random = Random::new(1);
    let bytes: Vec<u8> = (0..BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    for (at, part) in (0..).step_by(128 * 1024).zip(bytes.chunks(128 * 1024)) {
        client.write(at / 512, part)?;
    }
    Ok(bytes)
}

fn snapshot(daemon: &Daemon, name: &str) -> Result<Value> {
    let text = daemon.ask(&["snapshot", "list", "--json"])?;
    let all: Value = serde_json::from_str(&text)?;
    let all = all.as_array().context("a list")?;
    all.iter().find(|one| one["name"] == name).cloned().with_context(|| format!("snapshot {name}"))
}

fn export(daemon: &Daemon, name: &str, of: &str, releasing: bool) -> Result<()> {
    let mut words = vec!["export", "add", name, "--disk", "vda", "--snapshot", of];
    words.extend(releasing.then_some("--release-on-trim"));
    daemon.ask(&words).map(drop)
}

fn empty_copy(daemon: &Daemon) -> Result<PathBuf> {
    let copy = daemon.dir().join("copy");
    std::fs::File::create(&copy)?.set_len(BYTES)?;
    Ok(copy)
}

/// Reads and releases from `at` on, up to `end`, while a guest writes; the most bytes that were held.
fn copy_on(daemon: &Daemon, copy: &Path, at: &AtomicU64, end: u64) -> Result<u64> {
    let client = daemon.connect("vda", &Options::default())?;
    let stop = AtomicBool::new(false);
    let mut most = 0;
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| load(client, at, &stop, at.load(SeqCst)));
        let mut work = || -> Result<()> {
            let mut reader = Reader::connect(daemon, "once", copy)?;
            // What was copied last may not have been trimmed.
            if let Some(last) = at.load(SeqCst).checked_sub(STEP) {
                reader.done("trim", last, STEP)?;
            }
            while at.load(SeqCst) < end {
                let (from, len) = (at.load(SeqCst), STEP.min(BYTES - at.load(SeqCst)));
                reader.done("copy", from, len)?;
                at.store(from + len, SeqCst);
                reader.done("trim", from, len)?;
                if from % (2 * STEP) == 0 {
                    most = most.max(snapshot(daemon, "s")?["held"].as_u64().context("bytes held")?);
                }
            }
            Ok(())
        };
        let done = work();
        stop.store(true, SeqCst);
        done
    })?;
    Ok(most)
}

#[test]
fn what_is_read_is_released_while_a_guest_writes_and_over_a_kill() -> Result<()> {
    if !is_ready() {
        return Ok(());
    }
    let mut daemon = start()?;
    let before = fill(&daemon)?;
    daemon.ask(&["snapshot", "create", "s"])?;
    export(&daemon, "once", "s", true)?;
    let (copy, at) = (empty_copy(&daemon)?, Arc::new(AtomicU64::new(0)));
    let most = copy_on(&daemon, &copy, &at, BYTES / 2)?;
    ensure!(most < AHEAD + 4 * STEP, "{most} bytes were held");

    // Killed while a guest writes and a reader releases.
    let (place, pid) = (at.clone(), daemon.server().pid());
    let killer = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(20);
        while place.load(SeqCst) < BYTES / 4 * 3 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        rustix::process::Pid::from_raw(pid.cast_signed())
            .map(|pid| rustix::process::kill_process(pid, Signal::KILL))
    });
    let cut_off = copy_on(&daemon, &copy, &at, BYTES);
    killer.join().expect("the killer's thread").context("a process number")??;
    ensure!(cut_off.is_err() && at.load(SeqCst) < BYTES, "the daemon was killed too late: {cut_off:?}");
    daemon.restart(Signal::KILL, &DISKS)?;
    export(&daemon, "once", "s", true)?;
    ensure!(snapshot(&daemon, "s")?["state"] == "active");
    let most = copy_on(&daemon, &copy, &at, BYTES)?;
    ensure!(most < AHEAD + 4 * STEP, "{most} bytes were held after the kill");

    ensure!(std::fs::read(&copy)? == before, "the copy is not what was frozen");
    let found = snapshot(&daemon, "s")?;
    ensure!(found["released"] == BYTES && found["bytes-freed-by-delete"] == found["held"], "{found}");
    // Its space is given back by and by.
    let store = daemon.image("vda").with_extension("img.ebb").join("store");
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::fs::metadata(&store)?.blocks() * 512 > MIB {
        ensure!(Instant::now() < deadline, "{} bytes are stored", std::fs::metadata(&store)?.blocks() * 512);
        std::thread::sleep(Duration::from_millis(50));
    }
    // What changed can be asked all the same.
    daemon.ask(&["snapshot", "create", "t"])?;
    let changes = daemon.ask(&["changes", "vda", "--since", "s", "--snapshot", "t"])?;
    ensure!(changes.contains("changed on vda"), "{changes}");
    Ok(())
}

#[test]
fn what_is_released_cannot_be_read_and_nothing_else_is_touched() -> Result<()> {
    if !is_ready() {
        return Ok(());
    }
    let daemon = start()?;
    let before = fill(&daemon)?;
    daemon.ask(&["snapshot", "create", "s"])?;
    daemon.ask(&["snapshot", "create", "t"])?;
    for name in ["s", "t"] {
        export(&daemon, &format!("once-{name}"), name, true)?;
    }
    let copy = empty_copy(&daemon)?;
    // A newer one is needed by the older: a trim does nothing.
    let mut newer = Reader::connect(&daemon, "once-t", &copy)?;
    ensure!(newer.done("flags", 0, 0)? == "False True False True");
    newer.done("trim", 0, 64 * 1024)?;
    newer.done("copy", 0, 64 * 1024)?;

    let mut oldest = Reader::connect(&daemon, "once-s", &copy)?;
    oldest.done("trim", 4095, 4098)?;
    oldest.done("copy", 0, 4096)?;
    oldest.refused("copy", 4096, "EIO", "snapshot 's' does not hold byte 4096 any more")?;
    ensure!(oldest.ask("copy", 0, 65536)?.contains("byte 4096 "), "the first byte is named");
    oldest.done("copy", 8192, 65536)?;
    ensure!(!oldest.done("status", 4096, 4096)?.contains(":3"), "no claim of zeros");
    oldest.refused("write", 0, "EPERM", "cannot be written")?;
    // Not by others that show it, and not by an overlay.
    let mut plain = Reader::connect(&daemon, "vda@s", &copy)?;
    ensure!(plain.done("flags", 0, 0)? == "True False False True");
    plain.refused("copy", 4096, "EIO", "snapshot 's' does not hold byte 4096")?;
    plain.refused("trim", 0, "EPERM", "read-only")?;
    let opened = daemon.ask(&["snapshot", "open", "s", "x", "--disk", "vda"]);
    ensure!(opened.is_err_and(|error| format!("{error:#}").contains("released part of it")));
    newer.done("copy", 0, BYTES.min(MIB))?;
    ensure!(std::fs::read(&copy)?[..65536] == before[..65536]);

    // Below an overlay nothing is released.
    daemon.ask(&["snapshot", "delete", "s"])?;
    daemon.ask(&["snapshot", "open", "t", "x", "--disk", "vda"])?;
    newer.refused("trim", 0, "EPERM", "close x first")?;
    daemon.ask(&["snapshot", "close", "t", "x", "--disk", "vda"])?;
    newer.done("trim", 0, BYTES)?;
    newer.refused("copy", 0, "EIO", "does not hold byte 0 any more")
}

#[test]
fn every_error_of_a_view_reaches_clients_with_its_text() -> Result<()> {
    if !is_ready() {
        return Ok(());
    }
    let mut daemon = start()?;
    fill(&daemon)?;
    let copy = empty_copy(&daemon)?;
    daemon.ask(&["snapshot", "create", "s"])?;
    let mut guest = daemon.connect("vda", &Options::default())?;
    for at in (MIB..2 * MIB).step_by(64 * 1024) {
        guest.write(at / 512, &[1; 64 * 1024])?;
    }
    let mut reader = Reader::connect(&daemon, "vda@s", &copy)?;
    reader.done("copy", MIB, 4096)?;

    // The store loses what it had.
    let store = daemon.image("vda").with_extension("img.ebb").join("store");
    std::fs::File::options().write(true).open(&store)?.set_len(0)?;
    reader.refused("copy", MIB, "EIO", "reading the difference store failed: ")?;

    // No room in the store, but in the image: the next first write breaks it.
    daemon.server().limit(Resource::Fsize, Some(MIB / 2))?;
    guest.write(0, &[1; 4096])?;
    daemon.server().limit(Resource::Fsize, None)?;
    for verb in ["copy", "status"] {
        reader.refused(verb, 0, "EIO", "snapshot 's' is broken: writing to the difference store failed: ")?;
    }
    daemon.ask(&["snapshot", "delete", "s"])?;
    daemon.ask(&["snapshot", "create", "s"])?;
    let mut reader = Reader::connect(&daemon, "vda@s", &copy)?;
    reader.done("copy", 0, 4096)?;
    daemon.ask(&["snapshot", "delete", "s"])?;
    for verb in ["copy", "status"] {
        reader.refused(verb, 0, "ESHUTDOWN", "snapshot 's' was deleted")?;
    }
    Ok(())
}
