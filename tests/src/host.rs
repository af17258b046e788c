//! What tests need of the host that not everybody may have: small file systems, block devices.
//!
//! Always: they go with their value, as far as nobody uses them any more. Who cannot have one is told `None`, and the
//! test's output says so even if it passes.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

fn skipped<T>(what: &str) -> Option<T> {
    // Past the test harness, which shows the output of failed tests only.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}");
    None
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Whether a process may have mounts of its own.
pub fn can_unshare_mounts() -> bool {
    let can = succeeds(Command::new("unshare").args(["--mount", "true"]));
    can || skipped::<()>("no process can have mounts of its own here").is_some()
}

/// A file system under a directory of its own.
#[derive(Debug)]
pub struct Mounted(TempDir);

impl Mounted {
    /// In memory, of so many bytes; `None` where this is not allowed.
    ///
    /// # Errors
    /// If there can be no directory.
    pub fn tmpfs(bytes: u64) -> Result<Option<Self>> {
        let options = format!("size={bytes}");
        Self::mount(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]))
    }

    /// A new ext4 in the file `device`; `None` where this is not allowed.
    ///
    /// # Errors
    /// If there can be no directory.
    pub fn ext4(device: &Path) -> Result<Option<Self>> {
        if !succeeds(Command::new("mkfs.ext4").args(["-q", "-F", "-m0"]).arg(device)) {
            return Ok(skipped("there is no mkfs.ext4"));
        }
        Self::mount(Command::new("mount").args(["-o", "loop"]).arg(device))
    }

    fn mount(command: &mut Command) -> Result<Option<Self>> {
        let at = tempfile::Builder::new().prefix("ebbtide-test-").tempdir()?;
        if succeeds(command.arg(at.path())) {
            return Ok(Some(Self(at)));
        }
        Ok(skipped("no file system can be mounted here"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves no space.
    ///
    /// # Errors
    /// If the file that takes it cannot be made.
    pub fn fill(&self) -> Result<()> {
        let mut file = File::create(self.filler())?;
        while file.write(&[1; 4096]).is_ok() {}
        Ok(())
    }

    /// Gives the space back that [`Mounted::fill`] took.
    ///
    /// # Errors
    /// If it did not.
    pub fn drain(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.path().join("filler")
    }

    /// Bytes that are free.
    ///
    /// # Errors
    /// If it does not say.
    pub fn free_bytes(&self) -> Result<u64> {
        let room = rustix::fs::statvfs(self.path())?;
        Ok(room.f_bavail * room.f_frsize)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A daemon of the test may not have ended yet.
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

/// A block device over a file.
#[derive(Debug)]
pub struct Loop(PathBuf);

impl Loop {
    /// `None` if this host has none to give.
    ///
    /// # Errors
    /// If its name is no text.
    pub fn over(file: &Path) -> Result<Option<Self>> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(made) if made.status.success() => {
                let path = String::from_utf8(made.stdout).context("the name of a device")?;
                Ok(Some(Self(PathBuf::from(path.trim()))))
            }
            _ => Ok(skipped("there is no loop device")),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // While somebody has it open, it goes when they close it.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
