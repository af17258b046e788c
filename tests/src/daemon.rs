//! A daemon with disks of its own in a temporary directory: Ebbtide, or `qemu-storage-daemon` where
//! a test wants a second opinion on itself.
//!
//! Always: the directory and the process go with the [`Daemon`]. Absent: what the disks hold; they
//! begin as holes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::server::{self, Server, output_of};
use crate::vhost_client::{Client, Options};

/// Whose daemon it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `ebbtide serve`
    Ebbtide,
    /// `qemu-storage-daemon`
    Qsd,
}

/// A disk to begin with.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its name.
    pub name: &'static str,
    /// Its size in bytes.
    pub bytes: u64,
    /// Queues that it offers.
    pub queues: usize,
    /// Whether the guest may not write.
    pub read_only: bool,
    /// More of Ebbtide's options, such as `serial=X`, comma-separated.
    pub more: &'static str,
}

impl Default for Disk {
    fn default() -> Self {
        Self { name: "vda", bytes: 64 << 20, queues: 4, read_only: false, more: "" }
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    server: Server,
    program: Program,
    dir: TempDir,
}

impl Daemon {
    /// Starts `program` with new, empty `disks`.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(program: Program, disks: &[Disk]) -> Result<Self> {
        Self::start_in(tempfile::Builder::new().prefix("ebbtide-test-").tempdir()?, program, disks)
    }

    /// Starts `program` in `dir` with `disks`. Images that are there (`NAME.img`, also as a link) are served as they are.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_in(dir: TempDir, program: Program, disks: &[Disk]) -> Result<Self> {
        for disk in disks {
            let image = dir.path().join(format!("{}.img", disk.name));
            if !image.exists() {
                File::create(image)?.set_len(disk.bytes)?;
            }
        }
        let server = launch(program, dir.path(), disks, None)?;
        Ok(Self { server, program, dir })
    }

    /// Ends the daemon by `signal`, if it has not ended, and starts it again on the same files.
    ///
    /// # Errors
    /// If it does not end on a SIGTERM, or does not come up again.
    pub fn restart(&mut self, signal: Signal, disks: &[Disk]) -> Result<()> {
        self.end(signal)?;
        for disk in disks {
            // Its new incarnation is ready when it has made them anew.
            let _ = std::fs::remove_file(self.socket(disk.name));
        }
        let _ = std::fs::remove_file(self.control());
        self.server = launch(self.program, self.dir.path(), disks, None)?;
        Ok(())
    }

    /// Kills the daemon and starts it again as if the host had been started anew meanwhile: to it this boot is another
    /// one, which began after the images were last changed. What was not written back is there all the same.
    ///
    /// # Errors
    /// As [`Daemon::restart`]; where a process cannot have mounts of its own.
    pub fn restart_in_another_boot(&mut self, disks: &[Disk]) -> Result<()> {
        self.end(Signal::KILL)?;
        let boot = self.dir.path().join("boot_id");
        std::fs::write(&boot, format!("{:08x}-0000-4000-8000-000000000000\n", self.server.pid()))?;
        for disk in disks {
            let image = File::options().write(true).open(self.image(disk.name))?;
            image.set_modified(SystemTime::UNIX_EPOCH + Duration::from_hours(24))?;
            let _ = std::fs::remove_file(self.socket(disk.name));
        }
        let _ = std::fs::remove_file(self.control());
        self.server = launch(self.program, self.dir.path(), disks, Some(&boot))?;
        Ok(())
    }

    /// Ends the daemon by `signal`, if it has not ended.
    ///
    /// # Errors
    /// If it does not end on a SIGTERM.
    pub fn end(&mut self, signal: Signal) -> Result<()> {
        if self.server.is_alive() {
            self.server.signal(signal)?;
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.server.is_alive() {
            ensure!(Instant::now() < deadline, "does not end:\n{}", self.server.output());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The vhost-user socket of a disk.
    pub fn socket(&self, disk: &str) -> PathBuf {
        self.dir.path().join(format!("{disk}.sock"))
    }

    /// The image of a disk.
    pub fn image(&self, disk: &str) -> PathBuf {
        self.dir.path().join(format!("{disk}.img"))
    }

    /// The control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// The NBD socket.
    pub fn nbd(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its process.
    pub fn server(&mut self) -> &mut Server {
        &mut self.server
    }

    /// Connects to a disk and starts its queues.
    ///
    /// # Errors
    /// If the daemon refuses; what it printed is in the error.
    pub fn connect(&self, disk: &str, options: &Options) -> Result<Client> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match Client::connect(&self.socket(disk), options) {
                Ok(client) => return Ok(client),
                // The one before may still be on its way out, and this one refused meanwhile.
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Err(error) => {
                    return Err(error).with_context(|| format!("daemon said: {}", self.server.output()));
                }
            }
        }
    }

    /// Runs `ebbtide ARGUMENTS` against this daemon.
    ///
    /// # Errors
    /// If it fails.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(server::ebbtide()?);
        command.args(arguments).arg("--control").arg(self.control());
        output_of(command, &[], Duration::from_secs(60))
    }

    /// Open descriptors when no front end is connected: waits until the number has not changed
    /// for a while.
    ///
    /// # Errors
    /// If the daemon is gone or never comes to rest.
    pub fn resting_descriptors(&self) -> Result<Vec<String>> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut last = self.server.descriptors()?;
        let mut same = 0;
        while same < 20 {
            ensure!(Instant::now() < deadline, "descriptors do not come to rest: {last:?}");
            std::thread::sleep(Duration::from_millis(10));
            let now = self.server.descriptors()?;
            same = if now.len() == last.len() { same + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    /// Waits until no more than `most` descriptors are open.
    ///
    /// # Errors
    /// If some are never closed; the error names all that are open.
    pub fn expect_descriptors(&self, most: usize) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = self.server.descriptors()?;
            if now.len() <= most {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} descriptors, {most} before: {now:#?}", now.len());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// In a boot of its own if there is a file that names one.
fn launch(program: Program, dir: &Path, disks: &[Disk], boot: Option<&Path>) -> Result<Server> {
    let at = |name: String| -> Result<String> {
        let path = dir.join(name);
        Ok(path.to_str().context("a temporary directory whose name is no text")?.to_owned())
    };
    let mut sockets = Vec::new();
    let mut command = match program {
        Program::Ebbtide => {
            let ebbtide = server::ebbtide()?;
            let mut command = match boot {
                Some(boot) => in_a_boot_of_its_own(ebbtide, boot),
                None => Command::new(ebbtide),
            };
            command.arg("serve");
            command.args(["--control", &at("control.sock".into())?, "--nbd", &at("nbd.sock".into())?]);
            sockets.push(dir.join("control.sock"));
            command
        }
        Program::Qsd => Command::new("qemu-storage-daemon"),
    };
    for Disk { name, queues, read_only, more, .. } in disks {
        let (image, socket) = (at(format!("{name}.img"))?, at(format!("{name}.sock"))?);
        match program {
            Program::Ebbtide => {
                let read_only = if *read_only { ",read-only" } else { "" };
                let comma = if more.is_empty() { "" } else { "," };
                command.arg("--disk").arg(format!(
                    "name={name},path={image},socket={socket},queues={queues}{read_only}{comma}{more}"
                ));
            }
            Program::Qsd => {
                if !more.is_empty() {
                    bail!("qemu-storage-daemon knows no {more}");
                }
                let (ro, writable) = if *read_only { ("on", "off") } else { ("off", "on") };
                command.arg("--blockdev").arg(format!(
                    "driver=file,node-name={name},filename={image},read-only={ro},discard=unmap"
                ));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id={name},node-name={name},addr.type=unix,\
                     addr.path={socket},writable={writable},num-queues={queues}"
                ));
            }
        }
        sockets.push(dir.join(format!("{name}.sock")));
    }
    let sockets: Vec<_> = sockets.iter().map(PathBuf::as_path).collect();
    Server::start(command, &dir.join("log"), &[], &sockets)
}

/// Arguments that are added are the program's.
fn in_a_boot_of_its_own(program: &Path, boot: &Path) -> Command {
    let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(boot).arg(program);
    command
}
