//! The command line, and the configuration file that stands for part of it.
//!
//! Two shapes share one program: sub-commands for people, and the conventions for vhost-user back end
//! programs of QEMU's `docs/interop/vhost-user.rst` without one, for front ends that start their own.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::disk_spec::{DiskSpec, Keys};

/// What `--print-capabilities` prints: exactly the features that the schema has for block back ends.
pub(crate) const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// Virtual disks that remember what changed, and that backup programs can freeze.
#[derive(Debug, Parser)]
#[command(name = "ebbtide", version, args_conflicts_with_subcommands = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) program: BackendProgram,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// A vhost-user back end program as front ends start one.
#[derive(Debug, Args)]
#[command(next_help_heading = "As a back end program that a front end starts, without a command")]
pub(crate) struct BackendProgram {
    /// Listen for the front end on this socket
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub(crate) socket_path: Option<PathBuf>,
    /// Use this open socket, listening or connected
    #[arg(long, value_name = "FDNUM")]
    pub(crate) fd: Option<i32>,
    /// The image to serve
    #[arg(long, value_name = "PATH")]
    pub(crate) blk_file: Option<PathBuf>,
    /// Let the guest only read
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    pub(crate) print_capabilities: bool,
    #[command(flatten)]
    pub(crate) doors: Doors,
}

/// Where the daemon is reached besides by guests.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Doors {
    /// Control socket (QMP's wire)
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// NBD socket for backup programs
    #[arg(long, value_name = "PATH")]
    pub(crate) nbd: Option<PathBuf>,
    /// Serve NBD over TCP too, without encryption: on this port of the loopback address, or where ADDRESS says
    #[arg(long, value_name = "[ADDRESS:]PORT", value_parser = tcp_address)]
    pub(crate) nbd_tcp: Option<std::net::SocketAddr>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve disks to virtual machines
    Serve(Serve),
    /// List the disks of a running daemon
    Disks(Query),
    /// Take, list and delete snapshots, and open them for writing
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// List what changed between an older instant and a snapshot
    Changes(Changes),
    /// Add, list and delete NBD exports
    #[command(subcommand)]
    Export(ExportCommand),
    /// Tell how the daemon is
    Status(Query),
}

const DISK_HELP: &str = "A disk: name=NAME,path=IMAGE,socket=PATH[,queues=N][,read-only][,serial=S]\
    [,logical-block-size=512|4096][,cache=writeback|writethrough][,discard=unmap|ignore]\
    [,direct=on|off][,tracking=on|off][,block-size=BYTES][,state=DIR]; once for each disk";

#[derive(Debug, Args)]
pub(crate) struct Serve {
    // Not a doc comment, which would read the brackets as links.
    #[arg(long = "disk", value_name = "KEYS", value_parser = disk, help = DISK_HELP)]
    pub(crate) disks: Vec<DiskSpec>,
    /// Read disks and sockets from a TOML file: `disk` tables with the same keys; control, nbd, nbd-tcp
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) doors: Doors,
}

/// How the daemon is found and the answer shown.
#[derive(Debug, Args)]
pub(crate) struct Query {
    /// The daemon's control socket; EBBTIDE_CONTROL and a default stand in
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// Print the answer as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Freeze disks at one instant
    Create {
        /// The snapshot's name
        name: String,
        /// A disk to freeze; all of them if none is named
        #[arg(long = "disk", value_name = "NAME")]
        disks: Vec<String>,
        #[command(flatten)]
        query: Query,
    },
    /// List snapshots
    List {
        /// Of this disk only
        #[arg(long, value_name = "NAME")]
        disk: Option<String>,
        #[command(flatten)]
        query: Query,
    },
    /// Open a snapshot for writing: as an NBD export, and on a vhost-user socket if one is named
    Open {
        /// The snapshot's name
        snapshot: String,
        /// A name for what is written to it
        name: String,
        /// The disk
        #[arg(long, value_name = "NAME")]
        disk: String,
        /// Keep it when the daemon ends
        #[arg(long)]
        keep: bool,
        /// Serve it to a virtual machine on this socket
        #[arg(long, value_name = "PATH")]
        socket: Option<PathBuf>,
        #[command(flatten)]
        query: Query,
    },
    /// Close a snapshot that was opened for writing, and discard what was written
    Close {
        /// The snapshot's name
        snapshot: String,
        /// The name that it was opened with
        name: String,
        /// The disk
        #[arg(long, value_name = "NAME")]
        disk: String,
        /// Also while a front end is connected
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        query: Query,
    },
    /// Delete a snapshot and what was kept for it
    Delete {
        /// The snapshot's name
        name: String,
        /// A disk to delete it of; all that have it if none is named
        #[arg(long = "disk", value_name = "NAME")]
        disks: Vec<String>,
        #[command(flatten)]
        query: Query,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Changes {
    /// The disk
    pub(crate) disk: String,
    /// The older instant: a snapshot's name or a change id
    #[arg(long, value_name = "SNAPSHOT|CHANGE-ID")]
    pub(crate) since: String,
    /// The snapshot up to which changes count
    #[arg(long, value_name = "NAME")]
    pub(crate) snapshot: String,
    #[command(flatten)]
    pub(crate) query: Query,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// Export a snapshot under a name of its own, with exactly one bitmap or none
    Add {
        /// The export's name
        name: String,
        /// The disk
        #[arg(long, value_name = "NAME")]
        disk: String,
        /// The snapshot
        #[arg(long, value_name = "NAME")]
        snapshot: String,
        /// An older snapshot whose changes since the bitmap shows
        #[arg(long, value_name = "NAME")]
        bitmap: Option<String>,
        /// A line for people
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        #[command(flatten)]
        query: Query,
    },
    /// List exports, those that every snapshot has included
    List {
        #[command(flatten)]
        query: Query,
    },
    /// Delete an export that was added
    Delete {
        /// The export's name
        name: String,
        #[command(flatten)]
        query: Query,
    },
}

impl Serve {
    /// Takes in the configuration file. What the command line says counts, where both speak.
    pub(crate) fn with_config(mut self) -> Result<Self, String> {
        let Some(path) = self.config.take() else { return Ok(self) };
        let fail = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| fail(&error))?;
        let mut table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| fail(&error.to_string().trim().replace('\n', " ")))?;
        match table.remove("disk") {
            Some(toml::Value::Array(disks)) => {
                for (index, disk) in disks.iter().enumerate() {
                    let wrong = |error: String| fail(&format!("disk {}: {error}", index + 1));
                    let keys = disk.as_table().ok_or_else(|| wrong("expected a [[disk]] table".into()))?;
                    self.disks.push(Keys::from_table(keys).and_then(Keys::finish).map_err(wrong)?);
                }
            }
            Some(_) => return Err(fail(&"disks are written as [[disk]] tables")),
            None => {}
        }
        let mut text = |key: &str| match table.remove(key) {
            Some(toml::Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(fail(&format!("{key}: expected a text in quotes"))),
            None => Ok(None),
        };
        let (control, nbd, tcp) = (text("control")?, text("nbd")?, text("nbd-tcp")?);
        if let Some(key) = table.keys().next() {
            return Err(fail(&format!("there is no key '{key}'; there are disk, control, nbd, nbd-tcp")));
        }
        self.doors.control = self.doors.control.or(control.map(PathBuf::from));
        self.doors.nbd = self.doors.nbd.or(nbd.map(PathBuf::from));
        if let (None, Some(tcp)) = (self.doors.nbd_tcp, tcp) {
            self.doors.nbd_tcp = Some(tcp_address(&tcp).map_err(|error| fail(&error))?);
        }
        Ok(self)
    }
}

/// Refuses disks that would get in each other's way.
pub(crate) fn check_disks(disks: &[DiskSpec]) -> Result<(), String> {
    if disks.is_empty() {
        return Err("no disk to serve: say --disk or --config (see 'ebbtide serve --help')".into());
    }
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    for (index, disk) in disks.iter().enumerate() {
        for other in &disks[..index] {
            let both = format!("of the disks '{}' and '{}'", other.name, disk.name);
            if disk.name == other.name {
                return Err(format!("two disks are called '{}'", disk.name));
            }
            if real(&disk.path) == real(&other.path) {
                return Err(format!("the image {both} is the same: {}", disk.path.display()));
            }
            if disk.socket.is_some() && disk.socket == other.socket {
                return Err(format!("the socket {both} is the same"));
            }
            if disk.state.is_some() && disk.state == other.state {
                return Err(format!("the state directory {both} is the same"));
            }
        }
    }
    Ok(())
}

fn disk(text: &str) -> Result<DiskSpec, String> {
    Keys::parse(text)?.finish()
}

fn tcp_address(text: &str) -> Result<std::net::SocketAddr, String> {
    let loopback = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    if let Ok(port) = text.parse::<u16>() {
        return Ok((loopback, port).into());
    }
    text.parse().map_err(|_| format!("'{text}' is no port and no ADDRESS:PORT"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_port_alone_is_on_the_loopback_address() {
        assert_eq!(tcp_address("10809").unwrap().to_string(), "127.0.0.1:10809");
        assert_eq!(tcp_address("0.0.0.0:1").unwrap().to_string(), "0.0.0.0:1");
        assert!(tcp_address("localhost").is_err());
    }

    #[test]
    fn a_file_and_the_command_line_add_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ebbtide.toml");
        std::fs::write(&file, "nbd = 'n'\ncontrol = 'c'\n[[disk]]\nname='b'\npath='b'\nsocket='bs'\n")
            .unwrap();
        let text = file.to_str().unwrap();
        let line =
            ["ebbtide", "serve", "--config", text, "--control", "d", "--disk", "name=a,path=a,socket=as"];
        let Some(Command::Serve(serve)) = Cli::parse_from(line).command else { panic!("serve") };
        let serve = serve.with_config().unwrap();
        let names: Vec<_> = serve.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(serve.doors.control.as_deref(), Some(Path::new("d")));
        assert_eq!(serve.doors.nbd.as_deref(), Some(Path::new("n")));
    }
}
