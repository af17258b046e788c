//! The command line, and the configuration file that stands for part of it.
//!
//! Two shapes share one program: sub-commands for people, and the conventions for vhost-user back end
//! programs of QEMU's `docs/interop/vhost-user.rst` without one, for front ends that start their own.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use control::commands::OnOverflow;

use crate::disk_spec::{DiskSpec, Keys, size};

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
    /// Change a disk of a running daemon
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Take, list and delete snapshots, open them for writing, and go back to one
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// List what changed between two instants
    Changes(Changes),
    /// Name, list and delete instants that outlive their snapshots
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Tell whether the next backup can be incremental
    Incremental(Incremental),
    /// Add, list and delete NBD exports
    #[command(subcommand)]
    Export(ExportCommand),
    /// Give difference stores more space, and limit them
    #[command(subcommand)]
    Store(StoreCommand),
    /// Show, reset and switch change tracking; take a disk's history along to another host
    #[command(subcommand)]
    Tracker(TrackerCommand),
    /// Tell how the daemon is
    Status(Query),
    /// Say what is wrong with state directories that no daemon uses
    Check(Check),
    /// Print what is in a state directory that no daemon uses
    Dump(Dump),
}

const DISK_HELP: &str = "A disk: name=NAME,path=IMAGE,socket=PATH[,queues=N][,read-only][,serial=S]\
    [,logical-block-size=512|4096][,cache=writeback|writethrough][,discard=unmap|ignore]\
    [,direct=on|off][,tracking=on|off][,block-size=BYTES][,state=DIR][,store=PATH[:SIZE]]...[,store-limit=BYTES]\
    [,low-space=SECONDS][,assume-changed]; once for each disk";

#[derive(Debug, Args)]
pub(crate) struct Serve {
    // Not a doc comment, which would read the brackets as links.
    #[arg(long = "disk", value_name = "KEYS", value_parser = disk, help = DISK_HELP)]
    pub(crate) disks: Vec<DiskSpec>,
    /// Read disks and sockets from a TOML file: `disk` tables with the same keys; control, nbd, nbd-tcp
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Bytes of old content that the snapshots of all disks may hold together
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) store_limit: Option<u64>,
    /// Take the images of all disks for changed while nobody served them: their next backups are full ones
    #[arg(long)]
    pub(crate) assume_changed: bool,
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
pub(crate) enum DiskCommand {
    /// Make a disk larger, or smaller with --shrink, and its image if that is a file
    Resize {
        /// The disk
        disk: String,
        /// The new size in bytes, or with K, M, G or T for powers of 1024
        #[arg(value_parser = size_of)]
        size: u64,
        /// Let the disk become smaller: what is past its new end is lost
        #[arg(long)]
        shrink: bool,
        #[command(flatten)]
        query: Query,
    },
    /// Mark ranges as changed: the next snapshot's changes have them
    Mark {
        /// The disk
        disk: String,
        /// Bytes to mark, as OFFSET+LENGTH
        #[arg(required = true, value_name = "OFFSET+LENGTH", value_parser = range)]
        ranges: Vec<(u64, u64)>,
        #[command(flatten)]
        query: Query,
    },
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
        /// What happens when there is no space for old content: break-snapshot, hold-writes or fail-writes
        #[arg(long, value_name = "POLICY", value_parser = policy, default_value = "break-snapshot")]
        on_overflow: OnOverflow,
        /// How long writes wait for space, in seconds [default: 30]
        #[arg(long, value_name = "SECONDS")]
        hold_deadline: Option<u32>,
        /// Bytes of old content that it may hold on each disk
        #[arg(long, value_name = "BYTES", value_parser = bytes)]
        limit: Option<u64>,
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
    /// Make a disk a snapshot again; all snapshots stay
    Revert {
        /// The snapshot's name
        name: String,
        /// The disk
        #[arg(long, value_name = "NAME")]
        disk: String,
        /// Also while a front end is connected, whose guest knows nothing of it
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
pub(crate) struct Check {
    /// The directories, such as IMAGE.ebb; nothing in them is changed
    #[arg(value_name = "STATE_DIR", required = true)]
    pub(crate) dirs: Vec<PathBuf>,
    /// Print a JSON object a line, for each finding
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Dump {
    /// The directory, such as IMAGE.ebb; nothing in it is changed
    #[arg(value_name = "STATE_DIR")]
    pub(crate) dir: PathBuf,
    /// Print every record of every snapshot too
    #[arg(long)]
    pub(crate) records: bool,
    /// Print a JSON object a line, for each structure
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TrackerCommand {
    /// Tell how the trackers are, and what a stop of the host would do to them
    Show {
        /// The disk; all if not said
        disk: Option<String>,
        #[command(flatten)]
        query: Query,
    },
    /// Begin a new generation of a disk that is served: the next backup is a full one
    Reset {
        /// The disk
        disk: String,
        #[command(flatten)]
        query: Query,
    },
    /// Track the changes of a disk again, from now on: the next backup is a full one
    Enable {
        /// The disk
        disk: String,
        #[command(flatten)]
        query: Query,
    },
    /// Track the changes of a disk no more, until it is enabled again: its history ends, snapshots stay
    Disable {
        /// The disk
        disk: String,
        #[command(flatten)]
        query: Query,
    },
    /// Export the history of a disk that no daemon uses, and hand the disk over: opened here again, it begins anew
    Export {
        /// The state directory, such as IMAGE.ebb
        #[arg(value_name = "STATE_DIR")]
        state: PathBuf,
        /// The history file to make
        file: PathBuf,
    },
    /// Export the history of a disk that is served and has no front end, and hand it over: it cannot be written any more
    HandOver {
        /// The disk
        disk: String,
        /// The history file to make
        file: PathBuf,
        #[command(flatten)]
        query: Query,
    },
    /// Take an export back whose file is not used: the disk goes on here
    CancelExport {
        /// The state directory, such as IMAGE.ebb
        #[arg(value_name = "STATE_DIR")]
        state: PathBuf,
    },
    /// Import a history, before a daemon serves the disk here. Each file belongs to one place: import it once
    Import {
        /// The history file
        file: PathBuf,
        /// The image, with the content that it had at the export
        #[arg(long, value_name = "PATH")]
        image: PathBuf,
        /// The state directory; IMAGE.ebb if not said
        #[arg(long, value_name = "DIR")]
        state: Option<PathBuf>,
        /// Give up a history that is there already, with its snapshots
        #[arg(long)]
        replace: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Changes {
    /// The disk
    pub(crate) disk: String,
    /// The older instant: a snapshot's or a checkpoint's name, or a change id
    #[arg(long, value_name = "NAME|CHANGE-ID", required_unless_present_any = ["map", "png", "top"])]
    pub(crate) since: Option<String>,
    /// The snapshot up to which changes count
    #[arg(long, value_name = "NAME", conflicts_with = "until",
        required_unless_present_any = ["until", "map", "png", "top"])]
    pub(crate) snapshot: Option<String>,
    /// The instant up to which changes count: a snapshot's or a checkpoint's name, or the change id of one
    #[arg(long, value_name = "NAME|CHANGE-ID")]
    pub(crate) until: Option<String>,
    #[command(flatten)]
    pub(crate) picture: Picture,
    #[command(flatten)]
    pub(crate) query: Query,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// Name the instant of a snapshot, so that it outlives it
    Create {
        /// The checkpoint's name
        name: String,
        /// The snapshot
        #[arg(long, value_name = "NAME")]
        snapshot: String,
        /// A disk whose snapshot is meant; all that have it if none is named
        #[arg(long = "disk", value_name = "NAME")]
        disks: Vec<String>,
        #[command(flatten)]
        query: Query,
    },
    /// List checkpoints
    List {
        /// Of this disk only
        #[arg(long, value_name = "NAME")]
        disk: Option<String>,
        #[command(flatten)]
        query: Query,
    },
    /// Delete a checkpoint
    Delete {
        /// The checkpoint's name
        name: String,
        /// A disk to delete it of; all that have it if none is named
        #[arg(long = "disk", value_name = "NAME")]
        disks: Vec<String>,
        #[command(flatten)]
        query: Query,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Incremental {
    /// The instant of the last backup: a checkpoint's or a snapshot's name, or a change id
    pub(crate) since: String,
    /// A disk to ask about; all of them if none is named
    #[arg(long = "disk", value_name = "NAME")]
    pub(crate) disks: Vec<String>,
    #[command(flatten)]
    pub(crate) query: Query,
}

/// Pictures of the change map as it is now.
#[derive(Debug, Args)]
#[command(next_help_heading = "A picture of the disk as it is now, instead of a list")]
pub(crate) struct Picture {
    /// Draw the disk, coloured by how many snapshots ago each part of it changed last
    #[arg(long, conflicts_with_all = ["snapshot", "until"])]
    pub(crate) map: bool,
    /// Write the same as a PNG
    #[arg(long, value_name = "FILE", conflicts_with_all = ["snapshot", "until"])]
    pub(crate) png: Option<PathBuf>,
    /// List the regions with most blocks changed since --since, or since the newest instant after which anything
    /// changed; a block that was written often counts once
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "10",
        conflicts_with_all = ["snapshot", "until"])]
    pub(crate) top: Option<usize>,
}

impl Picture {
    /// Whether a picture is asked for.
    pub(crate) fn is_wanted(&self) -> bool {
        self.map || self.png.is_some() || self.top.is_some()
    }
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
        /// An older snapshot or a checkpoint: the bitmap shows what changed since
        #[arg(long, value_name = "NAME")]
        bitmap: Option<String>,
        /// Give back the space of what clients trim, which can never be read again
        #[arg(long)]
        release_on_trim: bool,
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

#[derive(Debug, Subcommand)]
pub(crate) enum StoreCommand {
    /// Add a directory, a file or a block device to where a disk's old content is kept
    Append {
        /// The disk
        disk: String,
        /// The directory, the file, which is made if it is missing, or the block device
        path: PathBuf,
        /// Bytes of old content in it at most
        #[arg(long, value_name = "BYTES", value_parser = bytes)]
        size: Option<u64>,
        #[command(flatten)]
        query: Query,
    },
    /// Limit what snapshots hold: of all disks, of one, or one snapshot
    Limit {
        /// How many bytes of old content, or none
        #[arg(value_name = "BYTES|none", value_parser = bytes_or_none)]
        bytes: Limit,
        /// The disk
        #[arg(long, value_name = "NAME")]
        disk: Option<String>,
        /// The snapshot of the disk
        #[arg(long, value_name = "NAME", requires = "disk")]
        snapshot: Option<String>,
        #[command(flatten)]
        query: Query,
    },
}

/// Bytes, or no limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit(pub(crate) Option<u64>);

fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no number of bytes such as 4096, 64K, 10M or 1G");
    size(text).filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

fn bytes_or_none(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit(None)) } else { bytes(text).map(|bytes| Limit(Some(bytes))) }
}

fn policy(text: &str) -> Result<OnOverflow, String> {
    use OnOverflow::{BreakSnapshot, FailWrites, HoldWrites};
    let all = [BreakSnapshot, HoldWrites, FailWrites];
    let found = all.into_iter().find(|one| one.name() == text);
    found.ok_or_else(|| "there are break-snapshot, hold-writes and fail-writes".to_owned())
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
        let limit =
            text("store-limit")?.map(|text| bytes(&text)).transpose().map_err(|error| fail(&error))?;
        if let Some(key) = table.keys().next() {
            let known = "disk, control, nbd, nbd-tcp, store-limit";
            return Err(fail(&format!("there is no key '{key}'; there are {known}")));
        }
        self.store_limit = self.store_limit.or(limit);
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
            let shared = disk.store.iter().find(|area| other.store.iter().any(|one| one.path == area.path));
            if let Some(area) = shared.filter(|area| !Path::new(&area.path).is_dir()) {
                return Err(format!("the store {both} is the same: {}", area.path));
            }
            if disk.state.is_some() && disk.state == other.state {
                return Err(format!("the state directory {both} is the same"));
            }
        }
        for area in &disk.store {
            if let Some(other) = disks.iter().find(|other| is_part(Path::new(&area.path), &other.path)) {
                let (path, name) = (&area.path, &other.name);
                return Err(format!(
                    "the store {path} of the disk '{}' is, or is on, the disk '{name}' itself",
                    disk.name
                ));
            }
        }
    }
    Ok(())
}

/// Whether an area at `path` would be the image, or lie on the device that is the image.
pub(crate) fn is_part(path: &Path, image: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let Ok(of) = std::fs::metadata(image) else { return false };
    let device = of.file_type().is_block_device();
    if let Ok(on) = std::fs::metadata(path) {
        let both = on.file_type().is_block_device() && device;
        let same = if both { on.rdev() == of.rdev() } else { (on.dev(), on.ino()) == (of.dev(), of.ino()) };
        return same || device && on.dev() == of.rdev();
    }
    let parent = path.parent().and_then(|parent| std::fs::metadata(parent).ok());
    device && parent.is_some_and(|parent| parent.dev() == of.rdev())
}

fn disk(text: &str) -> Result<DiskSpec, String> {
    Keys::parse(text)?.finish()
}

fn size_of(text: &str) -> Result<u64, String> {
    size(text).ok_or_else(|| format!("'{text}' is no size, such as 20G"))
}

/// Reads `OFFSET+LENGTH`, both a number of bytes with a unit or none.
fn range(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('+').map(|(offset, length)| (size(offset), size(length)));
    match parts {
        Some((Some(_), Some(0))) => Err(format!("'{text}' has no bytes")),
        Some((Some(offset), Some(length))) => Ok((offset, length)),
        _ => Err(format!("'{text}' is no OFFSET+LENGTH, such as 0+64K")),
    }
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
    fn ranges_are_two_sizes() {
        assert_eq!(range("0+512"), Ok((0, 512)));
        assert_eq!(range("1M+64K"), Ok((1 << 20, 64 << 10)));
        for wrong in ["", "512", "+", "1+", "-1+5", "1-5", "1+x", "1+0"] {
            assert!(range(wrong).is_err(), "{wrong}");
        }
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
