//! The machine, and what makes numbers from it meaningless.

use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::thread::sched_getaffinity;
use serde::Serialize;

use crate::Options;

const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Where the file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Medium {
    /// A disk, by O_DIRECT.
    Disk,
    /// Memory.
    Shm,
}

impl Medium {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Shm => "shm",
        }
    }
}

/// The header of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Vec<String>,
    pub(crate) programs: Vec<String>,
    pub(crate) warnings: Vec<String>,
}

impl Report {
    pub(crate) fn of_this_machine(options: &Options) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let mut warnings = Vec::new();

        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown CPU", |(_, model)| model);
        let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        if cpuinfo.lines().any(|line| line.starts_with("flags") && line.contains(" hypervisor")) {
            warnings.push("a virtual machine, its CPUs and its disk are shared with others".into());
        }
        let usable = sched_getaffinity(None)?;
        if !usable.is_set(0) || !usable.is_set(1) {
            warnings.push("CPUs 0 and 1 are not both ours: client and server cannot be kept apart".into());
        }
        let governor = read("/sys/devices/system/cpu/cpu1/cpufreq/scaling_governor");
        if !governor.is_empty() && governor.trim() != "performance" {
            warnings.push(format!("CPU frequency governor is {}", governor.trim()));
        }
        if cfg!(debug_assertions) {
            warnings.push("a debug build: run with --release".into());
        }
        let before = CpuTimes::now();
        std::thread::sleep(Duration::from_millis(1000));
        let busy = CpuTimes::now().busy_share_since(&before);
        if busy > 0.05 {
            warnings
                .push(format!("something else uses {:.0} % of this machine before we begin", busy * 100.0));
        }
        let dir = disk_dir(options)?;
        if file_system_is_tmpfs(&dir)? {
            warnings.push(format!("{} lies in memory, not on a disk", dir.display()));
        } else if !takes_o_direct(&dir) {
            warnings.push(format!("{} refuses O_DIRECT", dir.display()));
        }
        if !file_system_is_tmpfs(&options.shm)? {
            warnings.push(format!("{} does not lie in memory", options.shm.display()));
        }
        let uname = rustix::system::uname();
        let memory_gib = read("/proc/meminfo")
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
            .map_or(0, |kib: u64| kib >> 20);
        Ok(Self {
            machine: vec![
                format!("CPU: {model}, {cpus} logical; {memory_gib} GiB of memory"),
                format!("Kernel: {}", uname.release().to_string_lossy()),
                format!("Disk: {}; file of {} MiB", disk_of(&dir)?, options.size_bytes() >> 20),
            ],
            programs: Vec::new(),
            warnings,
        })
    }
}

/// The directory on the disk: as told, or where this program lies.
pub(crate) fn disk_dir(options: &Options) -> Result<PathBuf> {
    match &options.dir {
        Some(dir) => Ok(dir.clone()),
        None => {
            let myself = std::env::current_exe()?;
            Ok(myself.parent().context("a program lies in a directory")?.to_owned())
        }
    }
}

fn file_system_is_tmpfs(dir: &Path) -> Result<bool> {
    let stat = rustix::fs::statfs(dir).with_context(|| format!("no {}", dir.display()))?;
    Ok(stat.f_type == TMPFS_MAGIC)
}

fn takes_o_direct(dir: &Path) -> bool {
    let open = |path: &Path| {
        std::fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
    };
    tempfile::tempdir_in(dir).is_ok_and(|probe| open(&probe.path().join("probe")).is_ok())
}

/// File system, device and model behind `dir`.
fn disk_of(dir: &Path) -> Result<String> {
    let device = std::fs::metadata(dir)?.dev();
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some(number.as_str()));
    let mut after = mount.and_then(|line| line.split_once(" - ")).map_or("", |part| part.1).split(' ');
    let (kind, source) = (after.next().unwrap_or("?"), after.next().unwrap_or("?"));
    let sys = PathBuf::from(format!("/sys/dev/block/{number}"));
    let attribute = |name: &str| {
        let whole = sys.join("..").join(name);
        let text = std::fs::read_to_string(sys.join(name)).or_else(|_| std::fs::read_to_string(whole));
        text.map(|text| text.trim().to_owned()).ok().filter(|text| !text.is_empty())
    };
    let mut text = format!("{kind} on {source}");
    if let Some(model) = attribute("device/model") {
        text += &format!(" ({model})");
    }
    if let Some(rotational) = attribute("queue/rotational") {
        text += if rotational == "1" { ", rotating" } else { ", not rotating" };
    }
    Ok(text)
}

/// Time that a hypervisor took from us during the whole run.
pub(crate) struct Steal(CpuTimes);

impl Steal {
    pub(crate) fn begin() -> Self {
        Self(CpuTimes::now())
    }

    pub(crate) fn warning(&self) -> Option<String> {
        let now = CpuTimes::now();
        let share = (now.stolen - self.0.stolen) as f64 / (now.all - self.0.all).max(1) as f64;
        (share > 0.01).then(|| format!("{:.0} % of CPU time was stolen by the host", share * 100.0))
    }
}

/// Sums over all CPUs, in clock ticks.
struct CpuTimes {
    all: u64,
    idle: u64,
    stolen: u64,
}

impl CpuTimes {
    fn now() -> Self {
        let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks: Vec<u64> = text
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .take(8)
            .filter_map(|number| number.parse().ok())
            .collect();
        // user nice system idle iowait irq softirq steal
        let at = |index: usize| ticks.get(index).copied().unwrap_or(0);
        Self { all: ticks.iter().sum(), idle: at(3) + at(4), stolen: at(7) }
    }

    fn busy_share_since(&self, before: &Self) -> f64 {
        let all = (self.all - before.all).max(1);
        1.0 - (self.idle - before.idle) as f64 / all as f64
    }
}
