//! The servers that are compared, how each is started, and one measurement of one of them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use ebbtide_tests::load::{Outcome, Pair};
use ebbtide_tests::raw::ended_children_cpu_ns;
use ebbtide_tests::server::{self, output_of};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::launch::{Setup, text};
use crate::machine::Medium;
use crate::{Options, Row, limit, write_image};

/// The client's CPU, and the one of whoever does the I/O.
pub(crate) const CLIENT_CPU: usize = 0;
pub(crate) const SERVER_CPU: usize = 1;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// fio on the file itself: the limit
    Fio,
    /// qemu-storage-daemon, aio=io_uring
    Qsd,
    /// The framework vhost-user-backend: io_uring on the disk, system calls in memory
    Baseline,
    /// Ebbtide
    Ebbtide,
    /// Ebbtide without change tracking
    Untracked,
}

impl Contender {
    pub(crate) const ALL: [Self; 4] = [Self::Fio, Self::Qsd, Self::Baseline, Self::Ebbtide];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::Qsd => "qsd",
            Self::Baseline => "baseline",
            Self::Ebbtide => "ebbtide",
            Self::Untracked => "untracked",
        }
    }
}

/// What copying before each write asks of a disk, for fio only: a read and a write of the image in equal parts, and as
/// many bytes in order to another file.
pub(crate) const COPIES: &str = "rw";

/// Bytes of one of those appends at least.
const APPEND_BYTES: usize = 128 << 10;

/// What all measurements share: the files and the programs.
#[derive(Debug)]
pub(crate) struct Bench {
    options: Options,
    pub(crate) myself: PathBuf,
    pub(crate) ebbtide: Option<PathBuf>,
    disk: TempDir,
    memory: TempDir,
    /// Sockets and logs; short, since a socket's path may not be long.
    run: TempDir,
}

impl Bench {
    pub(crate) fn prepare(options: &Options) -> Result<Self> {
        let ebbtide = if !options.wants(Contender::Ebbtide) && !options.wants(Contender::Untracked) {
            None
        } else if let Some(path) = &options.ebbtide {
            Some(path.canonicalize().with_context(|| format!("no {}", path.display()))?)
        } else {
            Some(server::ebbtide()?.to_owned())
        };
        let dir = crate::machine::disk_dir(options)?;
        let within = |path: &Path| {
            tempfile::Builder::new()
                .prefix("ebbtide-bench-")
                .tempdir_in(path)
                .with_context(|| format!("cannot write to {}", path.display()))
        };
        let bench = Self {
            options: options.clone(),
            myself: std::env::current_exe()?,
            ebbtide,
            disk: within(&dir)?,
            memory: within(&options.shm)?,
            run: within(&std::env::temp_dir())?,
        };
        for medium in [Medium::Disk, Medium::Shm] {
            eprintln!("writing and reading {}", bench.image(medium).display());
            write_image(&bench.image(medium), options.size_bytes())?;
        }
        Ok(bench)
    }

    pub(crate) fn image(&self, medium: Medium) -> PathBuf {
        self.dir(medium).join("image.raw")
    }

    /// A directory on `medium`, removed at the end.
    pub(crate) fn dir(&self, medium: Medium) -> &Path {
        match medium {
            Medium::Disk => self.disk.path(),
            Medium::Shm => self.memory.path(),
        }
    }

    /// A socket or a log of the server that runs.
    pub(crate) fn run(&self, name: &str) -> PathBuf {
        self.run.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run("vda.sock")
    }

    /// That of the disk beside the first one, if there is one.
    pub(crate) fn second_socket(&self) -> PathBuf {
        self.run("vdb.sock")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.run("control.sock")
    }

    pub(crate) fn nbd(&self) -> PathBuf {
        self.run("nbd.sock")
    }

    /// One line for each program in the comparison.
    pub(crate) fn versions(&self) -> Vec<String> {
        let version = |program: &Path| {
            let mut command = Command::new(program);
            command.arg("--version");
            output_of(command, &[], Duration::from_secs(20))
                .map(|text| text.lines().next().unwrap_or_default().to_owned())
                .unwrap_or_else(|error| format!("{}: {error:#}", program.display()))
        };
        let mut all = Vec::new();
        if self.options.wants(Contender::Fio) {
            all.push(version("fio".as_ref()));
        }
        if self.options.wants(Contender::Qsd) {
            all.push(version("qemu-storage-daemon".as_ref()));
        }
        all.extend(self.ebbtide.as_deref().map(version));
        all
    }

    pub(crate) fn measure(&self, row: &Row, contender: Contender, seconds: f64) -> Result<Outcome> {
        if contender == Contender::Fio {
            return self.fio(row, seconds);
        }
        let server = self.start(Setup::plain(contender, &self.image(row.medium), row.medium))?;
        let outcome = self.load(server.pid(), |load| {
            load.args(["--mix", row.mix, "--pattern"])
                .arg(if row.random { "random" } else { "sequential" })
                .args(["--block-size", &row.block_size.to_string()])
                .args(["--depth", &row.depth.to_string()])
                .args(["--seconds", &seconds.to_string()]);
        })?;
        server.stop()?;
        Ok(outcome)
    }

    /// Runs the load client on its CPU against the server that was started last, whose process is `pid`.
    pub(crate) fn load(&self, pid: u32, arguments: impl FnOnce(&mut Command)) -> Result<Outcome> {
        let outcome: Outcome = self.client("load", pid, arguments)?;
        ensure!(outcome.errors == 0, "{} requests failed", outcome.errors);
        ensure!(outcome.requests > 0, "no request was completed");
        Ok(outcome)
    }

    /// Runs the load client in turns on the disks of [`Bench::start_both`]. A pair is of the tracked disk and of the other.
    pub(crate) fn turns(&self, pid: u32, arguments: impl FnOnce(&mut Command)) -> Result<Vec<Pair>> {
        self.client("turns", pid, |command| {
            command.arg("--beside").arg(self.second_socket());
            arguments(command);
        })
    }

    fn client<T: DeserializeOwned>(
        &self,
        what: &str,
        pid: u32,
        arguments: impl FnOnce(&mut Command),
    ) -> Result<T> {
        let mut command = Command::new(&self.myself);
        command.arg(what).arg("--socket").arg(self.socket());
        command.args(["--server-pid", &pid.to_string()]);
        if self.options.poll {
            command.arg("--poll");
        }
        arguments(&mut command);
        let printed =
            output_of(command, &[CLIENT_CPU], limit(self.options.seconds())).with_context(|| {
                let said = std::fs::read_to_string(self.run("server.log")).unwrap_or_default();
                format!("server said: {}", said.trim())
            })?;
        Ok(serde_json::from_str(printed.trim())?)
    }

    /// Measures what is possible on the file itself.
    pub(crate) fn fio(&self, row: &Row, seconds: f64) -> Result<Outcome> {
        let order = if row.random { "rand" } else { "" };
        let mut command = Command::new("fio");
        command
            .args(["--name=limit", "--ioengine=io_uring", "--output-format=json", "--time_based"])
            .args(["--norandommap", "--randrepeat=0", "--invalidate=0"])
            .arg(format!("--filename={}", text(&self.image(row.medium))?))
            .arg(format!("--direct={}", u8::from(row.medium == Medium::Disk)))
            .arg(format!("--rw={order}{}", row.mix))
            .arg(format!("--bs={}", row.block_size))
            .arg(format!("--iodepth={}", row.depth))
            .arg(format!("--runtime={}ms", Duration::from_secs_f64(seconds).as_millis()));
        let mut cpus = vec![SERVER_CPU];
        if row.mix == COPIES {
            self.append_beside(&mut command, row, seconds)?;
            // Two processes, which wait for each other: what is asked for is the disk's limit.
            cpus.push(CLIENT_CPU);
        }
        // fio's own figure leaves out io_uring's workers, which do most of the work in memory.
        let cpu_before = ended_children_cpu_ns();
        let printed = output_of(command, &cpus, limit(seconds))?;
        let cpu_ns = ended_children_cpu_ns() - cpu_before;
        // Notes may come before the object.
        let begin = printed.find('{').context("fio printed no JSON")?;
        let json: serde_json::Value = serde_json::from_str(&printed[begin..])?;
        let job = &json["jobs"][0];
        // A read and a write count as one.
        let part = &job[if row.mix == COPIES { "read" } else { row.mix }];
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
        let percentile = |which: &str| number(&part["clat_ns"]["percentile"][which]) / 1000.0;
        let iops = number(&part["iops"]);
        ensure!(iops > 0.0, "fio did nothing: {printed}");
        let requests = part["total_ios"].as_u64().unwrap_or_default().max(1);
        Ok(Outcome {
            requests,
            seconds: number(&part["runtime"]) / 1000.0,
            iops,
            p50_us: percentile("50.000000"),
            p99_us: percentile("99.000000"),
            max_us: number(&part["clat_ns"]["max"]) / 1000.0,
            // The start of fio is in it: some 30 ms.
            server_cpu_us: Some(cpu_ns as f64 / 1000.0 / requests as f64),
            errors: job["total_err"].as_u64().unwrap_or_default(),
        })
    }

    /// A second job of fio's, as fast as the first one reads: in order, in large pieces, to a file that was written before.
    fn append_beside(&self, command: &mut Command, row: &Row, seconds: f64) -> Result<()> {
        let file = self.dir(row.medium).join("append.raw");
        if !file.exists() {
            write_image(&file, self.options.size_bytes())?;
        }
        let bytes = row.block_size.max(APPEND_BYTES);
        // Weights of I/Os: of the first job's every other one is a read.
        command.args(["--flow_id=1", &format!("--flow={}", 2 * bytes / row.block_size)]);
        command
            .args(["--name=append", "--ioengine=io_uring", "--time_based", "--rw=write", "--iodepth=1"])
            .args(["--flow_id=1", "--flow=1"])
            .arg(format!("--filename={}", text(&file)?))
            .arg(format!("--direct={}", u8::from(row.medium == Medium::Disk)))
            .arg(format!("--bs={bytes}"))
            .arg(format!("--runtime={}ms", Duration::from_secs_f64(seconds).as_millis()));
        Ok(())
    }
}
