//! From a verb's name to the method that serves it, and from its answer to JSON.
//!
//! What always holds: a method is called with checked arguments only, and an answer that goes
//! out fits in the line that clients read.

use std::time::Instant;

use serde_json::value::{RawValue, to_raw_value};

use crate::arguments;
use crate::commands::{
    BlockResize, CheckpointCreate, CheckpointDelete, Command, CommandInfo, DiskRevert, NbdExportAdd,
    NbdExportDel, QmpCapabilities, QueryChangeMap, QueryChangedBlocks, QueryCheckpoints, QueryCommands,
    QueryDisks, QueryExports, QueryIncremental, QuerySnapshots, QueryStatus, QueryTracker, QueryVersion,
    Quit, SnapshotClose, SnapshotCreate, SnapshotDelete, SnapshotOpen, StoreAppend, StoreLimit,
    TrackerDisable, TrackerEnable, TrackerExport, TrackerMark, TrackerReset, VERBS, VersionInfo,
};
use crate::request::{Request, excerpt};
use crate::service::{Answer, CommandError, ErrorClass, Service, reason};
use crate::wire::MAX_ANSWER_BYTES;

/// What the server does besides sending the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// Nothing.
    Nothing,
    /// The negotiation is over: events may follow the answer.
    Negotiated,
    /// When the answer is out, the daemon stops.
    Quit,
}

/// Runs a request for a client that has `negotiated` or not.
pub(crate) fn run(
    service: &dyn Service,
    negotiated: bool,
    request: &Request<'_>,
    client: u64,
) -> (Answer<Box<RawValue>>, After) {
    let began = Instant::now();
    let (answer, after) = match (negotiated, request.execute.as_str()) {
        (false, QmpCapabilities::NAME) => (negotiate(request), After::Negotiated),
        (true, Quit::NAME) => (answer::<Quit>(request, |_| Ok(Default::default())), After::Quit),
        (false, _) => {
            (Err(not_now("Expecting capabilities negotiation with 'qmp_capabilities'")), After::Nothing)
        }
        (true, QmpCapabilities::NAME) => {
            (Err(not_now("Capabilities negotiation is already complete, command ignored")), After::Nothing)
        }
        (true, _) => (serve(service, request), After::Nothing),
    };
    let took = began.elapsed();
    let verb = excerpt(&request.execute);
    match &answer {
        Ok(_) => log::debug!(target: "control::cmd", "client {client}: {verb:?} in {took:?}"),
        Err(error) => log::debug!(
            target: "control::cmd",
            "client {client}: {verb:?} refused in {took:?}: {} ({})", error.desc, error.reason
        ),
    }
    let after = if answer.is_ok() { after } else { After::Nothing };
    (answer, after)
}

fn serve(service: &dyn Service, request: &Request<'_>) -> Answer<Box<RawValue>> {
    match request.execute.as_str() {
        QueryVersion::NAME => answer::<QueryVersion>(request, |_| Ok(VersionInfo::current())),
        QueryCommands::NAME => answer::<QueryCommands>(request, |_| Ok(verbs())),
        QueryStatus::NAME => answer(request, |a: QueryStatus| service.query_status(a)),
        QueryDisks::NAME => answer(request, |a: QueryDisks| service.query_disks(a)),
        QuerySnapshots::NAME => answer(request, |a: QuerySnapshots| service.query_snapshots(a)),
        QueryExports::NAME => answer(request, |a: QueryExports| service.query_exports(a)),
        QueryChangedBlocks::NAME => answer(request, |a: QueryChangedBlocks| service.query_changed_blocks(a)),
        QueryCheckpoints::NAME => answer(request, |a: QueryCheckpoints| service.query_checkpoints(a)),
        QueryIncremental::NAME => answer(request, |a: QueryIncremental| service.query_incremental(a)),
        CheckpointCreate::NAME => answer(request, |a: CheckpointCreate| service.checkpoint_create(a)),
        CheckpointDelete::NAME => answer(request, |a: CheckpointDelete| service.checkpoint_delete(a)),
        SnapshotCreate::NAME => answer(request, |a: SnapshotCreate| service.snapshot_create(a)),
        SnapshotDelete::NAME => answer(request, |a: SnapshotDelete| service.snapshot_delete(a)),
        SnapshotOpen::NAME => answer(request, |a: SnapshotOpen| service.snapshot_open(a)),
        SnapshotClose::NAME => answer(request, |a: SnapshotClose| service.snapshot_close(a)),
        BlockResize::NAME => answer(request, |a: BlockResize| service.block_resize(a)),
        QueryChangeMap::NAME => answer(request, |a: QueryChangeMap| service.query_change_map(a)),
        QueryTracker::NAME => answer(request, |a: QueryTracker| service.query_tracker(a)),
        TrackerExport::NAME => answer(request, |a: TrackerExport| service.tracker_export(a)),
        TrackerMark::NAME => answer(request, |a: TrackerMark| service.tracker_mark(a)),
        TrackerEnable::NAME => answer(request, |a: TrackerEnable| service.tracker_enable(a)),
        TrackerDisable::NAME => answer(request, |a: TrackerDisable| service.tracker_disable(a)),
        TrackerReset::NAME => answer(request, |a: TrackerReset| service.tracker_reset(a)),
        DiskRevert::NAME => answer(request, |a: DiskRevert| service.disk_revert(a)),
        StoreAppend::NAME => answer(request, |a: StoreAppend| service.store_append(a)),
        StoreLimit::NAME => answer(request, |a: StoreLimit| service.store_limit(a)),
        NbdExportAdd::NAME => answer(request, |a: NbdExportAdd| service.nbd_export_add(a)),
        NbdExportDel::NAME => answer(request, |a: NbdExportDel| service.nbd_export_del(a)),
        unknown => Err(CommandError::new(
            ErrorClass::CommandNotFound,
            reason::UNKNOWN_COMMAND,
            format!("The command {} has not been found", excerpt(unknown)),
        )),
    }
}

fn negotiate(request: &Request<'_>) -> Answer<Box<RawValue>> {
    answer::<QmpCapabilities>(request, |_| Ok(Default::default()))
}

fn verbs() -> Vec<CommandInfo> {
    let info = |&name: &&str| CommandInfo { name: name.to_owned() };
    VERBS.iter().map(info).collect()
}

/// Arguments in, check, serve, answer out.
fn answer<C: Command>(
    request: &Request<'_>,
    serve: impl FnOnce(C) -> Answer<C::Answer>,
) -> Answer<Box<RawValue>> {
    let arguments: C = arguments::read(request.arguments)?;
    arguments.check()?;
    let answer = to_raw_value(&serve(arguments)?).map_err(|error| {
        CommandError::generic(reason::IO, format!("The answer has no JSON form: {error}"))
    })?;
    // Escaping makes at most six bytes out of one.
    let escaped: usize = answer.get().bytes().map(|b| if b < 0x80 { 1 } else { 6 }).sum();
    if escaped > MAX_ANSWER_BYTES {
        return Err(CommandError::generic(
            reason::ANSWER_TOO_LONG,
            format!("The answer would be longer than {MAX_ANSWER_BYTES} bytes; ask for less"),
        ));
    }
    Ok(answer)
}

fn not_now(desc: &str) -> CommandError {
    CommandError::new(ErrorClass::CommandNotFound, reason::NEGOTIATION, desc)
}
