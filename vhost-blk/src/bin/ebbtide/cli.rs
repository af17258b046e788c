//! Commands that talk to a running daemon over its control socket.
//!
//! Exit codes: 0 done, 1 the daemon refused or the talk failed, 2 the command line is wrong (clap),
//! 3 no daemon answers.

use std::process::ExitCode;
use std::time::Duration;

use control::commands::{
    BlockResize, CheckpointCreate, CheckpointDelete, Command as Verb, DiskRevert, MarkRange, NbdExportAdd,
    NbdExportDel, PageLimit, QueryChangeMap, QueryChangedBlocks, QueryCheckpoints, QueryDisks, QueryExports,
    QueryIncremental, QuerySnapshots, QueryStatus, QueryTracker, SnapshotClose, SnapshotCreate,
    SnapshotDelete, SnapshotOpen, StoreAppend, StoreLimit, TrackerDetails, TrackerDisable, TrackerEnable,
    TrackerExport, TrackerMark, TrackerReset,
};
use control::{Client, ClientError, paths, render};
use serde::Serialize;

use crate::args::{
    Changes, CheckpointCommand, Command, DiskCommand, ExportCommand, Incremental, Query, SnapshotCommand,
    StoreCommand, TrackerCommand,
};
use crate::{output, picture};

/// How long a daemon may take to answer: a snapshot waits for a flush of its images.
const PATIENCE: Duration = Duration::from_secs(120);

/// Carries out `command`, which talks to a daemon.
pub(crate) fn run(command: Command) -> ExitCode {
    let told = match command {
        Command::Changes(changes) => list_changes(changes),
        other => answer(other).map_err(anyhow::Error::from),
    };
    match told {
        Ok(text) => output::end_with(&text),
        Err(error) => {
            eprintln!("ebbtide: {error}");
            match error.downcast_ref() {
                Some(ClientError::NoDaemon { .. }) => ExitCode::from(3),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The daemon's answer, as text to print.
fn answer(command: Command) -> Result<String, ClientError> {
    let some = |names: Vec<String>| (!names.is_empty()).then_some(names);
    match command {
        Command::Serve(_) | Command::Check(_) | Command::Dump(_) => unreachable!("they talk to no daemon"),
        Command::Tracker(TrackerCommand::HandOver { disk, file, query }) => {
            // The daemon has another working directory.
            let file = std::path::absolute(&file).unwrap_or(file).display().to_string();
            call(&query, &TrackerExport { disk, file }, crate::moves::exported)
        }
        Command::Tracker(TrackerCommand::Show { disk, query }) => {
            call(&query, &QueryTracker { disk }, |all| render::trackers(all))
        }
        Command::Tracker(TrackerCommand::Reset { disk, query }) => {
            let text = |now: &TrackerDetails| format!("A new generation begins with {}\n", now.change_id);
            call(&query, &TrackerReset { disk }, text)
        }
        Command::Tracker(TrackerCommand::Enable { disk, query }) => {
            let text = |now: &TrackerDetails| format!("Changes are tracked since {}\n", now.change_id);
            call(&query, &TrackerEnable { disk }, text)
        }
        Command::Tracker(TrackerCommand::Disable { disk, query }) => {
            let text = |now: &TrackerDetails| format!("Changes of {} are not tracked any more\n", now.disk);
            call(&query, &TrackerDisable { disk }, text)
        }
        Command::Tracker(_) => unreachable!("they talk to no daemon"),
        Command::Disks(query) => call(&query, &QueryDisks {}, |all| render::disks(all)),
        Command::Disk(DiskCommand::Resize { disk, size, shrink, query }) => {
            call(&query, &BlockResize { disk, size, shrink }, render::resized)
        }
        Command::Disk(DiskCommand::Mark { disk, ranges, query }) => {
            let text = format!("Marked: the next snapshot of {disk} has it among its changes\n");
            let ranges = ranges.into_iter().map(|(offset, length)| MarkRange { offset, length }).collect();
            call(&query, &TrackerMark { disk, ranges }, |_| text)
        }
        Command::Status(query) => call(&query, &QueryStatus {}, render::status),
        Command::Snapshot(SnapshotCommand::Create {
            name,
            disks,
            on_overflow,
            hold_deadline,
            limit,
            query,
        }) => {
            let verb = SnapshotCreate { name, disks: some(disks), on_overflow, hold_deadline, limit };
            call(&query, &verb, render::snapshot_created)
        }
        Command::Store(StoreCommand::Append { disk, path, size, query }) => {
            // The daemon has another working directory.
            let path = std::path::absolute(&path).unwrap_or(path).display().to_string();
            call(&query, &StoreAppend { disk, path, size }, |area| format!("Added {}\n", area.path))
        }
        Command::Store(StoreCommand::Limit { bytes, disk, snapshot, query }) => {
            let text = bytes
                .0
                .map_or_else(|| "No limit\n".to_owned(), |bytes| format!("Limited to {bytes} bytes\n"));
            call(&query, &StoreLimit { disk, snapshot, bytes: bytes.0 }, |_| text)
        }
        Command::Snapshot(SnapshotCommand::List { disk, query }) => {
            call(&query, &QuerySnapshots { disk }, |all| render::snapshots(all))
        }
        Command::Snapshot(SnapshotCommand::Open { snapshot, name, disk, keep, socket, query }) => {
            // The daemon has another working directory.
            let socket = socket.map(|path| std::path::absolute(&path).unwrap_or(path).display().to_string());
            let verb = SnapshotOpen { disk, snapshot, name, writable: true, keep, socket };
            call(&query, &verb, render::overlay_opened)
        }
        Command::Snapshot(SnapshotCommand::Close { snapshot, name, disk, force, query }) => {
            let text = format!("Closed {name} of {snapshot} of {disk}\n");
            call(&query, &SnapshotClose { disk, snapshot, name, force }, |_| text)
        }
        Command::Snapshot(SnapshotCommand::Revert { name, disk, force, query }) => {
            let verb = DiskRevert { disk: disk.clone(), snapshot: name, force };
            call(&query, &verb, |rewind| render::rewound(&disk, rewind))
        }
        Command::Snapshot(SnapshotCommand::Delete { name, disks, query }) => {
            call(&query, &SnapshotDelete { name, disks: some(disks) }, |done| {
                format!("Deleted {} of {}\n", done.name, done.disks.join(", "))
            })
        }
        Command::Changes(_) => unreachable!("they may be drawn"),
        Command::Checkpoint(CheckpointCommand::Create { name, snapshot, disks, query }) => {
            let verb = CheckpointCreate { name, snapshot, disks: some(disks) };
            call(&query, &verb, render::checkpoint_created)
        }
        Command::Checkpoint(CheckpointCommand::List { disk, query }) => {
            call(&query, &QueryCheckpoints { disk }, |all| render::checkpoints(all))
        }
        Command::Checkpoint(CheckpointCommand::Delete { name, disks, query }) => {
            call(&query, &CheckpointDelete { name, disks: some(disks) }, |done| {
                format!("Deleted checkpoint {} of {}\n", done.name, done.disks.join(", "))
            })
        }
        Command::Incremental(Incremental { since, disks, query }) => {
            call(&query, &QueryIncremental { since, disks: some(disks) }, |all| render::incremental(all))
        }
        Command::Export(ExportCommand::Add {
            name,
            disk,
            snapshot,
            bitmap,
            release_on_trim,
            description,
            query,
        }) => {
            let verb = NbdExportAdd { name, disk, snapshot, bitmap, release_on_trim, description };
            call(&query, &verb, |export| format!("{}\n", export.uri))
        }
        Command::Export(ExportCommand::List { query }) => {
            call(&query, &QueryExports {}, |all| render::exports(all))
        }
        Command::Export(ExportCommand::Delete { name, query }) => {
            let text = format!("Deleted the export {name}\n");
            call(&query, &NbdExportDel { name }, |_| text)
        }
    }
}

fn list_changes(changes: Changes) -> anyhow::Result<String> {
    let Changes { disk, since, snapshot, until, picture, query } = changes;
    let (Some(since), false) = (since.clone(), picture.is_wanted()) else {
        let verb = QueryChangeMap { disk, cells: picture::cells(&picture), since };
        let map = connect(&query)?.call(&verb)?;
        if query.json && picture.png.is_none() {
            return Ok(show(&query, &map, |_| String::new()));
        }
        return picture::draw(&map, &picture);
    };
    let verb = QueryChangedBlocks { disk, since, snapshot, until, offset: 0, limit: PageLimit::MAX };
    let found = connect(&query)?.changed_blocks(&verb)?;
    Ok(show(&query, &found, render::changes))
}

fn call<C: Verb>(
    query: &Query,
    verb: &C,
    render: impl FnOnce(&C::Answer) -> String,
) -> Result<String, ClientError>
where
    C::Answer: Serialize,
{
    let answer = connect(query)?.call(verb)?;
    Ok(show(query, &answer, render))
}

fn connect(query: &Query) -> Result<Client, ClientError> {
    Client::connect(&paths::control_socket_for_client(query.control.clone()), PATIENCE)
}

fn show<T: Serialize>(query: &Query, answer: &T, render: impl FnOnce(&T) -> String) -> String {
    match serde_json::to_string_pretty(answer) {
        Ok(json) if query.json => json + "\n",
        _ => render(answer),
    }
}
