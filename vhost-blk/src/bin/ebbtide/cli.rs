//! Commands that talk to a running daemon over its control socket.
//!
//! Exit codes: 0 done, 1 the daemon refused or the talk failed, 2 the command line is wrong (clap),
//! 3 no daemon answers.

use std::process::ExitCode;
use std::time::Duration;

use control::commands::{
    Command as Verb, NbdExportAdd, NbdExportDel, PageLimit, QueryChangedBlocks, QueryDisks, QueryExports,
    QuerySnapshots, QueryStatus, SnapshotClose, SnapshotCreate, SnapshotDelete, SnapshotOpen,
};
use control::{Client, ClientError, paths, render};
use serde::Serialize;

use crate::args::{Changes, Command, ExportCommand, Query, SnapshotCommand};

/// How long a daemon may take to answer: a snapshot waits for a flush of its images.
const PATIENCE: Duration = Duration::from_secs(120);

/// Carries out `command`, which is not `serve`.
pub(crate) fn run(command: Command) -> ExitCode {
    match answer(command) {
        Ok(text) => {
            // A closed pipe is the reader's choice.
            let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ebbtide: {error}");
            match error {
                ClientError::NoDaemon { .. } => ExitCode::from(3),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// The daemon's answer, as text to print.
fn answer(command: Command) -> Result<String, ClientError> {
    let some = |names: Vec<String>| (!names.is_empty()).then_some(names);
    match command {
        Command::Serve(_) => unreachable!("serve talks to guests"),
        Command::Disks(query) => call(&query, &QueryDisks {}, |all| render::disks(all)),
        Command::Status(query) => call(&query, &QueryStatus {}, render::status),
        Command::Snapshot(SnapshotCommand::Create { name, disks, query }) => {
            call(&query, &SnapshotCreate { name, disks: some(disks) }, render::snapshot_created)
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
        Command::Snapshot(SnapshotCommand::Delete { name, disks, query }) => {
            call(&query, &SnapshotDelete { name, disks: some(disks) }, |done| {
                format!("Deleted {} of {}\n", done.name, done.disks.join(", "))
            })
        }
        Command::Changes(changes) => list_changes(changes),
        Command::Export(ExportCommand::Add { name, disk, snapshot, bitmap, description, query }) => {
            let verb = NbdExportAdd { name, disk, snapshot, bitmap, description };
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

fn list_changes(changes: Changes) -> Result<String, ClientError> {
    let Changes { disk, since, snapshot, query } = changes;
    let verb = QueryChangedBlocks { disk, since, snapshot, offset: 0, limit: PageLimit::MAX };
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
