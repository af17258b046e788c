//! Programs under test as child processes: started, waited for, looked at, ended.
//!
//! Always: a server dies with its [`Server`], with the thread that started it, and never by name.
//! Absent: what is sent to it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::raw::die_with_parent;

/// Far more than any program here needs to start or to end, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a process has asked of the system: bytes, also of the page cache, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Bytes that it read.
    pub read: u64,
    /// Bytes that it wrote.
    pub written: u64,
    /// Reads and writes.
    pub calls: u64,
    /// Pages of its memory and of mapped files that it touched for the first time.
    pub faults: u64,
}

/// A running child process, ended when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts `command` on `cpus` (anywhere if none) with its output in the file `log`, and waits
    /// until every one of `sockets` exists.
    ///
    /// # Errors
    /// If it cannot be started, or ends or is not ready in time; its last output is in the error.
    pub fn start(mut command: Command, log: &Path, cpus: &[usize], sockets: &[&Path]) -> Result<Self> {
        let output = File::create(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        die_with_parent(&mut command);
        let child =
            on_cpus(cpus, || command.spawn().with_context(|| format!("start {:?}", command.get_program())))??;
        let mut server = Self { child, log: log.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while !sockets.iter().all(|socket| socket.exists()) {
            if let Some(status) = server.child.try_wait()? {
                bail!("ended at once, {status}:\n{}", server.output());
            }
            ensure!(Instant::now() < deadline, "not ready in time:\n{}", server.output());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Open descriptors, by what they point to.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn descriptors(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid()))? {
            // One that was closed in between is simply not counted.
            if let Ok(target) = std::fs::read_link(entry?.path()) {
                all.push(target.to_string_lossy().into_owned());
            }
        }
        all.sort();
        Ok(all)
    }

    /// A figure of `/proc/PID/status`, such as `VmRSS`, in bytes.
    ///
    /// # Errors
    /// If the process is gone or the kernel has no such line.
    pub fn memory_bytes(&self, line: &str) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        status
            .lines()
            .find_map(|text| text.strip_prefix(line)?.strip_prefix(':'))
            .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * 1024)
            .with_context(|| format!("no {line} in the process's status"))
    }

    /// What it has asked of the system since it was started.
    ///
    /// # Errors
    /// If the process is gone, or the kernel does not count.
    pub fn effort(&self) -> Result<Effort> {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.pid()))?;
        let field = |name: &str| {
            let line = io.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|rest| rest.trim_start_matches(':').trim().parse().ok());
            number.with_context(|| format!("no {name} in the process's io"))
        };
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // Behind the name, which may hold anything: proc_pid_stat(5), field 3 on.
        let rest = stat.rsplit_once(')').context("the process's stat")?.1;
        let faults =
            |nth: usize| rest.split_whitespace().nth(nth - 3).and_then(|word| word.parse::<u64>().ok());
        let faults = faults(10).zip(faults(12)).context("the process's faults")?;
        Ok(Effort {
            read: field("rchar")?,
            written: field("wchar")?,
            calls: field("syscr")? + field("syscw")?,
            faults: faults.0 + faults.1,
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Lowers what it may use of `resource` from now on; `None` lifts the limit again.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn limit(&self, resource: Resource, most: Option<u64>) -> Result<()> {
        let maximum = getrlimit(resource).maximum;
        let limits = Rlimit { current: most.or(maximum), maximum };
        prlimit(Some(Pid::from_child(&self.child)), resource, limits)?;
        Ok(())
    }

    /// Asks it to end and waits; after a while it is killed.
    ///
    /// # Errors
    /// If it did not end by itself.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.ended()
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// If it does not.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        bail!("does not end:\n{}", self.output())
    }

    /// Kills it at once (`kill -9`) and waits until it is gone.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        // Of a process that has ended already there is nothing left to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Restricts the calling thread to `cpus`.
///
/// # Errors
/// If there is no such CPU, or this process may not use it.
pub fn pin_this_thread(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu);
    }
    sched_setaffinity(None, &set).with_context(|| format!("run on CPUs {cpus:?}"))
}

/// Runs `start` with the calling thread, and so its future children, on `cpus`.
fn on_cpus<T>(cpus: &[usize], start: impl FnOnce() -> T) -> Result<T> {
    if cpus.is_empty() {
        return Ok(start());
    }
    let all = sched_getaffinity(None)?;
    pin_this_thread(cpus)?;
    let started = start();
    sched_setaffinity(None, &all)?;
    Ok(started)
}

/// Runs `command` to its end on `cpus` within `limit` and returns what it printed.
///
/// # Errors
/// If it cannot be started, fails, or takes too long (it is killed then).
pub fn output_of(mut command: Command, cpus: &[usize], limit: Duration) -> Result<String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    die_with_parent(&mut command);
    let name = format!("{:?}", command.get_program());
    let mut child = on_cpus(cpus, || command.spawn())?.with_context(|| format!("start {name}"))?;
    let mut stdout = child.stdout.take().expect("piped");
    let mut stderr = child.stderr.take().expect("piped");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let complaints = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("{name} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = reader.join().expect("the reader does not panic")?;
    let complaints = complaints.join().expect("the reader does not panic")?;
    ensure!(status.success(), "{name}: {status}\n{complaints}{text}");
    Ok(text)
}

/// The program `ebbtide`: `$EBBTIDE` if set, otherwise built by cargo in the profile and target
/// directory of the running test (once per process; nothing to do if it is fresh).
///
/// # Errors
/// If there is none and it cannot be built.
pub fn ebbtide() -> Result<&'static Path> {
    static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match FOUND.get_or_init(|| find_ebbtide().map_err(|error| format!("{error:#}"))) {
        Ok(path) => Ok(path),
        Err(error) => bail!("no ebbtide to test: {error}"),
    }
}

fn find_ebbtide() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("EBBTIDE") {
        let path = PathBuf::from(path);
        ensure!(path.exists(), "EBBTIDE={} does not exist", path.display());
        return Ok(path);
    }
    // target/PROFILE/bench or target/PROFILE/deps/device-0123
    let here = std::env::current_exe()?;
    let mut profile = here.parent().context("an executable lies in a directory")?;
    if profile.file_name() == Some(OsStr::new("deps")) {
        profile = profile.parent().context("deps lies in a directory")?;
    }
    let target = profile.parent().context("a profile lies in a target directory")?;
    let path = profile.join("ebbtide");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build
        .args(["build", "--quiet", "--package", "vhost-blk", "--bin", "ebbtide", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"))
        .arg("--target-dir")
        .arg(target);
    if profile.file_name() == Some(OsStr::new("release")) {
        build.arg("--release");
    }
    let built = output_of(build, &[], Duration::from_secs(1800));
    if path.exists() && built.as_ref().is_err_and(|error| error.is::<std::io::Error>()) {
        // No cargo here, but a program: that will do.
        return Ok(path);
    }
    built.context("build ebbtide")?;
    Ok(path)
}

/// Connects to a Unix socket, which may be there a moment before anybody listens on it.
///
/// # Errors
/// If nobody does in time, or there is no such socket.
pub fn reach(path: &Path) -> std::io::Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
}

/// Whether something answers on the Unix socket `path`.
pub fn answers(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}
