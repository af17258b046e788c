//! A server that takes snapshots: Ebbtide, or `qemu-storage-daemon` with its copy-before-write
//! filter.
//!
//! QEMU's way is that of its fleecing: a qcow2 file of 64 KiB clusters takes the old content, through
//! the page cache, as Ebbtide's store does, and lies beside the image, as that does.
//! Absent: more than one snapshot at a time of QEMU, and exports of what it froze.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use control::client::Client;
use ebbtide_tests::load::Outcome;
use ebbtide_tests::server::{Server, output_of};
use serde_json::{Value, json};

use crate::contender::{Bench, CLIENT_CPU, Contender};
use crate::launch::Setup;

/// No verb takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the load gets before the first snapshot, to be under way and measured.
const LEAD: Duration = Duration::from_millis(600);

/// Snapshots that were taken while the guest wrote.
#[derive(Debug, Default)]
pub(crate) struct UnderLoad {
    pub(crate) outcome: Outcome,
    /// How many were taken before the load ended.
    pub(crate) taken: usize,
    /// The longest that a command took.
    pub(crate) longest_ms: f64,
    /// The longest that the server says it held writes.
    pub(crate) held_writes_ms: f64,
}

/// A running server, with its snapshots.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    bench: &'a Bench,
    contender: Contender,
    image: PathBuf,
    server: Server,
    control: Client,
    /// Names of the snapshots that are held, the oldest first.
    held: Vec<String>,
    taken: usize,
}

impl<'a> Subject<'a> {
    pub(crate) fn start(bench: &'a Bench, setup: Setup<'_>) -> Result<Self> {
        let contender = setup.contender;
        let server = bench.start(Setup { snapshots: true, ..setup })?;
        let control = Client::connect(&bench.control(), PATIENCE)?;
        let image = setup.image.to_owned();
        Ok(Self { bench, contender, image, server, control, held: Vec::new(), taken: 0 })
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Runs the load client against it.
    pub(crate) fn load(&self, arguments: impl FnOnce(&mut Command)) -> Result<Outcome> {
        self.bench.load(self.server.pid(), arguments)
    }

    /// Takes a snapshot and returns what the server answered.
    pub(crate) fn take(&mut self) -> Result<Value> {
        let name = format!("bench{}", self.taken);
        let answer = match self.contender {
            Contender::Qsd => self.insert_filter()?,
            _ => self.control.call_value("snapshot-create", &json!({ "name": name }))?,
        };
        self.taken += 1;
        self.held.push(name);
        Ok(answer)
    }

    /// Takes up to `count` snapshots, evenly, while the guest runs what `arguments` say for `seconds`.
    pub(crate) fn take_under_load(
        &mut self,
        count: usize,
        seconds: f64,
        arguments: impl FnOnce(&mut Command) + Send,
    ) -> Result<UnderLoad> {
        let (bench, pid) = (self.bench, self.server.pid());
        let pause = Duration::from_secs_f64(seconds / count as f64);
        let mut run = UnderLoad::default();
        std::thread::scope(|scope| -> Result<()> {
            let load = scope.spawn(move || {
                bench.load(pid, |load| {
                    arguments(load);
                    let lead = LEAD.as_secs_f64();
                    load.args(["--warmup", &(lead / 2.0).to_string()]);
                    load.args(["--seconds", &(seconds + lead).to_string()]);
                })
            });
            let begin = Instant::now() + LEAD;
            for index in 0..u32::try_from(count)? {
                std::thread::sleep((begin + pause * index).saturating_duration_since(Instant::now()));
                if load.is_finished() {
                    break;
                }
                let before = Instant::now();
                let answer = self.take()?;
                run.taken += 1;
                run.longest_ms = run.longest_ms.max(before.elapsed().as_secs_f64() * 1000.0);
                let held_us = answer["held-writes-us"].as_f64().unwrap_or_default();
                run.held_writes_ms = run.held_writes_ms.max(held_us / 1000.0);
            }
            run.outcome = load.join().expect("the load does not panic")?;
            Ok(())
        })?;
        Ok(run)
    }

    /// Name of the newest snapshot that is held.
    pub(crate) fn newest(&self) -> Result<&str> {
        self.held.last().map(String::as_str).context("no snapshot is held")
    }

    /// Fails unless the newest snapshot is whole and holds at least `bytes` of old content: a store that
    /// gave up is fast.
    pub(crate) fn expect_preserved(&mut self, bytes: u64) -> Result<()> {
        let holds = match self.contender {
            Contender::Qsd => self.fleece().metadata()?.blocks() * 512,
            _ => {
                let all = self.control.call_value("query-snapshots", &json!({}))?;
                let name = self.newest()?;
                let all = all.as_array().context("no list of snapshots")?;
                let mine = all.iter().find(|each| each["name"] == name).context("the snapshot is gone")?;
                ensure!(mine["state"] == "active", "the snapshot is {}", mine["state"]);
                mine["held"].as_u64().context("no number of bytes held")?
            }
        };
        ensure!(holds >= bytes, "{holds} bytes were preserved, not {bytes}");
        Ok(())
    }

    /// Lets go of all snapshots but the newest `keep`, the oldest first.
    pub(crate) fn release_all_but(&mut self, keep: usize) -> Result<()> {
        while self.held.len() > keep {
            let name = self.held.remove(0);
            match self.contender {
                Contender::Qsd => self.remove_filter()?,
                _ => {
                    self.control.call_value("snapshot-delete", &json!({ "name": name }))?;
                }
            }
        }
        Ok(())
    }

    /// Ends the server. What it held goes with it.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.release_all_but(0)?;
        self.server.stop()?;
        Ok(())
    }

    fn fleece(&self) -> PathBuf {
        self.image.with_extension("fleece.qcow2")
    }

    fn insert_filter(&mut self) -> Result<Value> {
        if !self.held.is_empty() {
            bail!("one snapshot of QEMU at a time");
        }
        let fleece = self.fleece();
        create_fleece(&fleece, self.image.metadata()?.len())?;
        let file = json!({ "driver": "file", "filename": fleece, "discard": "unmap" });
        self.qmp(
            "blockdev-add",
            json!({ "driver": "qcow2", "node-name": "fleece0", "discard": "unmap", "file": file }),
        )?;
        self.qmp(
            "blockdev-add",
            json!({
                "driver": "copy-before-write", "node-name": "cbw0", "file": "disk0", "target": "fleece0",
                "on-cbw-error": "break-snapshot", "cbw-timeout": 45,
            }),
        )?;
        self.put_below_the_export("cbw0")
    }

    fn remove_filter(&mut self) -> Result<()> {
        self.put_below_the_export("disk0")?;
        for node in ["cbw0", "fleece0"] {
            self.qmp("blockdev-del", json!({ "node-name": node }))?;
        }
        Ok(std::fs::remove_file(self.fleece())?)
    }

    fn put_below_the_export(&mut self, node: &str) -> Result<Value> {
        let top = json!({ "driver": "raw", "node-name": "top", "file": node });
        self.qmp("blockdev-reopen", json!({ "options": [top] }))
    }

    fn qmp(&mut self, verb: &str, arguments: Value) -> Result<Value> {
        self.control.call_value(verb, &arguments).with_context(|| format!("{verb} {arguments}"))
    }
}

/// Makes an empty qcow2 file, with QEMU's default clusters of 64 KiB.
fn create_fleece(path: &Path, bytes: u64) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).arg(path).arg(bytes.to_string());
    output_of(command, &[CLIENT_CPU], PATIENCE).map(drop)
}
