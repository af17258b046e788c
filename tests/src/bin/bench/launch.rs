//! How each server is started.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::server::Server;

use crate::contender::{Bench, Contender, SERVER_CPU};
use crate::machine::Medium;

/// What a server is started for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) contender: Contender,
    pub(crate) image: &'a Path,
    pub(crate) medium: Medium,
    /// Further keys of Ebbtide's disk, each with a comma before it.
    pub(crate) keys: &'a str,
    /// Whether snapshots will be taken. It costs QEMU a node above the disk, which no other
    /// measurement should have.
    pub(crate) snapshots: bool,
}

impl<'a> Setup<'a> {
    /// `contender` on `image` and nothing else.
    pub(crate) fn plain(contender: Contender, image: &'a Path, medium: Medium) -> Self {
        Self { contender, image, medium, keys: "", snapshots: false }
    }
}

impl Bench {
    /// Starts a server on its CPU. What an earlier one left is removed.
    pub(crate) fn start(&self, setup: Setup<'_>) -> Result<Server> {
        let (socket, control, nbd) = (self.socket(), self.control(), self.nbd());
        for path in [&socket, &control, &nbd] {
            absent(std::fs::remove_file(path))?;
        }
        let mut sockets = vec![socket.as_path()];
        let command = match setup.contender {
            Contender::Fio => bail!("fio is no server"),
            Contender::Qsd => {
                if setup.snapshots {
                    sockets.push(&control);
                }
                self.qsd(setup)?
            }
            Contender::Baseline => self.baseline(setup)?,
            Contender::Ebbtide | Contender::Untracked => {
                absent(std::fs::remove_dir_all(state_of(setup.image)))?;
                sockets.extend([control.as_path(), nbd.as_path()]);
                self.ebbtide(setup)?
            }
        };
        Server::start(command, &self.run("server.log"), &[SERVER_CPU], &sockets)
    }

    fn qsd(&self, setup: Setup<'_>) -> Result<Command> {
        let mut command = Command::new("qemu-storage-daemon");
        let direct = if setup.medium == Medium::Disk { "on" } else { "off" };
        let (image, socket, control) = (text(setup.image)?, self.socket(), self.control());
        if setup.snapshots {
            let path = text(&control)?;
            command
                .arg("--chardev")
                .arg(format!("socket,id=control,path={path},server=on,wait=off"))
                .args(["--monitor", "chardev=control"]);
        }
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=file0,filename={image},aio=io_uring,cache.direct={direct}"))
            .args(["--blockdev", "driver=raw,node-name=disk0,file=file0"]);
        let exported = if setup.snapshots {
            // The filter goes below this one and above the disk, while the guest is served.
            command.args(["--blockdev", "driver=raw,node-name=top,file=disk0"]);
            "top"
        } else {
            "disk0"
        };
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=vda,node-name={exported},addr.type=unix,addr.path={},writable=on,\
             num-queues=1",
            text(&socket)?
        ));
        Ok(command)
    }

    fn baseline(&self, setup: Setup<'_>) -> Result<Command> {
        let mut command = Command::new(&self.myself);
        command.arg("baseline").arg("--path").arg(setup.image).arg("--socket").arg(self.socket());
        if setup.medium == Medium::Disk {
            command.args(["--direct", "--engine", "uring"]);
        } else {
            command.args(["--engine", "sync"]);
        }
        Ok(command)
    }

    fn ebbtide(&self, setup: Setup<'_>) -> Result<Command> {
        let off = if setup.contender == Contender::Untracked { TRACKING_OFF } else { "" };
        let keys = format!("{off}{}", setup.keys);
        self.ebbtide_with(&[disk("vda", setup.image, &self.socket(), &keys)?])
    }

    fn ebbtide_with(&self, disks: &[String]) -> Result<Command> {
        let mut command = Command::new(self.ebbtide.as_ref().context("no ebbtide")?);
        command.arg("serve");
        for disk in disks {
            command.args(["--disk", disk]);
        }
        command.arg("--control").arg(self.control()).arg("--nbd").arg(self.nbd());
        Ok(command)
    }

    /// Starts Ebbtide with two disks: a tracked one and, at [`Bench::second_socket`], one without tracking, which the
    /// process has first if that is said.
    pub(crate) fn start_both(
        &self,
        tracked: &Path,
        untracked: &Path,
        untracked_first: bool,
    ) -> Result<Server> {
        let (socket, second) = (self.socket(), self.second_socket());
        let (control, nbd) = (self.control(), self.nbd());
        let sockets = [socket.as_path(), &second, &control, &nbd];
        for path in sockets {
            absent(std::fs::remove_file(path))?;
        }
        for image in [tracked, untracked] {
            absent(std::fs::remove_dir_all(state_of(image)))?;
        }
        let on = disk("vda", tracked, &socket, "")?;
        let off = disk("vdb", untracked, &second, TRACKING_OFF)?;
        let command = self.ebbtide_with(&if untracked_first { [off, on] } else { [on, off] })?;
        Server::start(command, &self.run("server.log"), &[SERVER_CPU], &sockets)
    }
}

/// What a disk without tracking is given.
const TRACKING_OFF: &str = ",tracking=off";

/// A disk of Ebbtide, with further keys, each with a comma before it.
fn disk(name: &str, image: &Path, socket: &Path, keys: &str) -> Result<String> {
    Ok(format!("name={name},path={},socket={},queues=1{keys}", text(image)?, text(socket)?))
}

/// `path` as part of a server's options.
pub(crate) fn text(path: &Path) -> Result<&str> {
    let text = path.to_str().with_context(|| format!("{} is no text", path.display()))?;
    ensure!(!text.contains(','), "a comma in {text} would split the servers' options");
    Ok(text)
}

/// Where Ebbtide keeps its state of `image`.
pub(crate) fn state_of(image: &Path) -> PathBuf {
    let mut state = image.to_owned().into_os_string();
    state.push(".ebb");
    state.into()
}

/// What was not there need not be removed.
fn absent(removed: std::io::Result<()>) -> std::io::Result<()> {
    removed.or_else(|error| if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}
