//! Answers as people read them: aligned tables, sizes with units.
//!
//! What always holds: whatever a text from the daemon contains, it is shown without control
//! characters, so that nothing a name or path holds reaches the terminal as a command. Every
//! result ends with a newline.
//!
//! Absent: colours, and the terminal's width. The JSON form is for programs.

mod table;

use self::table::{Align, Table, printable};
use crate::commands::{
    BlockResized, ChangedBlocks, CheckpointCreated, CheckpointInfo, DiskInfo, ExportInfo, IncrementalInfo,
    OverlayInfo, RewindInfo, RunState, SnapshotCreated, SnapshotInfo, SnapshotState, StatusInfo,
    TrackerDetails,
};

/// The answer of `query-status`, one fact a line.
pub fn status(status: &StatusInfo) -> String {
    let state = match status.status {
        RunState::Starting => "starting",
        RunState::Running => "running",
        RunState::Stopping => "stopping",
    };
    let mut table = Table::new(&[("", Align::Left), ("", Align::Left)]);
    let mut fact = |name: &str, value: String| table.row(vec![name.to_owned(), value]);
    fact("Status", state.to_owned());
    fact("Process", status.pid.to_string());
    fact("Up", duration(status.uptime));
    fact("Disks", status.disks.to_string());
    fact("Snapshots", status.snapshots.to_string());
    fact("Control", status.control_socket.clone());
    fact("NBD", status.nbd.clone().unwrap_or_else(|| "off".to_owned()));
    table.finish()
}

/// The answer of `query-disks`.
pub fn disks(disks: &[DiskInfo]) -> String {
    if disks.is_empty() {
        return "no disks\n".to_owned();
    }
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("MODE", Align::Left),
        ("FRONT END", Align::Left),
        ("TRACKING", Align::Left),
        ("SNAPSHOTS", Align::Right),
        ("HELD", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("ERRORS", Align::Right),
        ("CHANGE ID", Align::Left),
        ("IMAGE", Align::Left),
    ]);
    for disk in disks {
        let tracker = &disk.tracker;
        table.row(vec![
            disk.name.clone(),
            size(disk.size),
            (match disk {
                DiskInfo { handed_over: true, .. } => "handed over",
                DiskInfo { read_only: true, .. } => "ro",
                _ => "rw",
            })
            .to_owned(),
            (if disk.connected { "connected" } else { "-" }).to_owned(),
            if tracker.on { size(tracker.block_size) } else { format!("off: {}", tracker.reason) },
            disk.snapshots.to_string(),
            size(disk.held),
            size(disk.io.read_bytes),
            size(disk.io.write_bytes),
            disk.io.errors.to_string(),
            if tracker.on { tracker.change_id.clone() } else { "-".to_owned() },
            disk.image.clone(),
        ]);
    }
    let rewinds = disks.iter().filter_map(|disk| Some(rewound(&disk.name, disk.rewind.as_ref()?)));
    table.finish() + &rewinds.collect::<String>()
}

/// The answer of `query-tracker`.
pub fn trackers(trackers: &[TrackerDetails]) -> String {
    if trackers.is_empty() {
        return "no disks\n".to_owned();
    }
    let mut table = Table::new(&[
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("TRACKING", Align::Left),
        ("CHANGE ID", Align::Left),
        ("EPOCH", Align::Right),
        ("BEGAN", Align::Left),
        ("WHY", Align::Left),
        ("MAP", Align::Right),
        ("HOT REGIONS", Align::Right),
        ("PRESUMED", Align::Right),
        ("CHECKPOINTS", Align::Right),
        ("IF THE HOST STOPS", Align::Left),
    ]);
    for one in trackers {
        let outlook = match one {
            TrackerDetails { on: false, .. } => "-",
            TrackerDetails { at_risk: true, .. } => "changes may be lost: make a full backup now",
            TrackerDetails { ends_with_host: true, .. } => "the history ends",
            _ => "the history goes on",
        };
        table.row(vec![
            one.disk.clone(),
            size(one.size),
            if one.on { size(one.block_size) } else { "off".to_owned() },
            if one.on { one.change_id.clone() } else { "-".to_owned() },
            one.epoch.to_string(),
            one.began.map_or_else(|| "-".to_owned(), |began| began.to_string()),
            one.reason.clone(),
            size(one.map_bytes),
            one.hot_regions.to_string(),
            size(one.presumed_bytes),
            one.checkpoints.to_string(),
            outlook.to_owned(),
        ]);
    }
    table.finish()
}

/// The answer of `disk-revert` for `disk`.
pub fn rewound(disk: &str, rewind: &RewindInfo) -> String {
    let (disk, snapshot) = (printable(disk), printable(&rewind.snapshot));
    if rewind.bytes_left == 0 && rewind.trouble.is_none() {
        return format!("{disk} is as in {snapshot}: nothing was to be copied back\n");
    }
    let (left, all) = (size(rewind.bytes_left), size(rewind.bytes));
    let trouble = rewind.trouble.as_ref();
    let trouble = trouble.map_or(String::new(), |why| format!(", which fails: {}", printable(why)));
    format!("{disk} becomes {snapshot} again: {left} of {all} are to be copied back{trouble}\n")
}

/// The answer of `block_resize`, one line.
pub fn resized(done: &BlockResized) -> String {
    let told = match done.announced {
        true => "the guest was told",
        false => "the guest sees it when its front end connects again",
    };
    format!("{} has {} bytes now; {told}\n", printable(&done.disk), done.size)
}

/// The answer of `query-snapshots`, with a second table if some are open for writing.
pub fn snapshots(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return "no snapshots\n".to_owned();
    }
    let mut table = Table::new(&[
        ("SNAPSHOT", Align::Left),
        ("DISK", Align::Left),
        ("CREATED", Align::Left),
        ("SIZE", Align::Right),
        ("HELD", Align::Right),
        ("FREES", Align::Right),
        ("STATE", Align::Left),
        ("CHANGE ID", Align::Left),
        ("EXPORTS", Align::Left),
    ]);
    for snapshot in snapshots {
        let state = match (snapshot.state, &snapshot.reason) {
            (SnapshotState::Active, _) if snapshot.released > 0 => {
                format!("active, {} released", size(snapshot.released))
            }
            (SnapshotState::Active, _) => "active".to_owned(),
            (SnapshotState::Broken, None) => "broken".to_owned(),
            (SnapshotState::Broken, Some(reason)) => format!("broken: {reason}"),
        };
        table.row(vec![
            snapshot.name.clone(),
            snapshot.disk.clone(),
            snapshot.created.to_string(),
            size(snapshot.size),
            size(snapshot.held),
            size(snapshot.bytes_freed_by_delete),
            state,
            snapshot.change_id.clone(),
            list(&snapshot.exports),
        ]);
    }
    let overlays: Vec<_> = snapshots.iter().flat_map(|snapshot| &snapshot.overlays).collect();
    if overlays.is_empty() { table.finish() } else { format!("{}\n{}", table.finish(), open(&overlays)) }
}

fn open(overlays: &[&OverlayInfo]) -> String {
    let mut table = Table::new(&[
        ("OVERLAY", Align::Left),
        ("SNAPSHOT", Align::Left),
        ("DISK", Align::Left),
        ("USED", Align::Right),
        ("KEEP", Align::Left),
        ("CLIENTS", Align::Right),
        ("FRONT END", Align::Left),
        ("EXPORT", Align::Left),
        ("SOCKET", Align::Left),
    ]);
    for overlay in overlays {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        table.row(vec![
            overlay.name.clone(),
            overlay.snapshot.clone(),
            overlay.disk.clone(),
            size(overlay.used),
            (if overlay.keep { "yes" } else { "no" }).to_owned(),
            overlay.clients.to_string(),
            (if overlay.connected { "connected" } else { "-" }).to_owned(),
            or_none(&overlay.export),
            or_none(&overlay.socket),
        ]);
    }
    table.finish()
}

/// The answer of `snapshot-open`: where to reach it, a door a line.
pub fn overlay_opened(overlay: &OverlayInfo) -> String {
    let doors = [overlay.uri.as_ref(), overlay.socket.as_ref()];
    let lines: String = doors.into_iter().flatten().map(|door| printable(door) + "\n").collect();
    if lines.is_empty() {
        "open, but the daemon has no NBD server and there is no socket\n".to_owned()
    } else {
        lines
    }
}

/// The answer of `snapshot-create`.
pub fn snapshot_created(created: &SnapshotCreated) -> String {
    let mut table = Table::new(&[("DISK", Align::Left), ("SIZE", Align::Right), ("CHANGE ID", Align::Left)]);
    for point in &created.disks {
        let cells = [&point.disk, &size(point.size), &point.change_id];
        table.row(cells.map(Clone::clone).to_vec());
    }
    format!(
        "snapshot {} at {}; writes waited {}\n{}",
        printable(&created.name),
        created.created,
        microseconds(created.held_writes_us),
        table.finish()
    )
}

/// The answer of `checkpoint-create`.
pub fn checkpoint_created(created: &CheckpointCreated) -> String {
    let mut table = Table::new(&[("DISK", Align::Left), ("SIZE", Align::Right), ("CHANGE ID", Align::Left)]);
    for point in &created.disks {
        table.row(vec![point.disk.clone(), size(point.size), point.change_id.clone()]);
    }
    format!("checkpoint {}\n{}", printable(&created.name), table.finish())
}

/// The answer of `query-checkpoints`.
pub fn checkpoints(checkpoints: &[CheckpointInfo]) -> String {
    if checkpoints.is_empty() {
        return "no checkpoints\n".to_owned();
    }
    let mut table = Table::new(&[
        ("CHECKPOINT", Align::Left),
        ("DISK", Align::Left),
        ("CREATED", Align::Left),
        ("SIZE", Align::Right),
        ("HELD", Align::Right),
        ("STATE", Align::Left),
        ("CHANGE ID", Align::Left),
    ]);
    for one in checkpoints {
        let state = match (one.current, &one.ended, &one.damaged) {
            (true, _, None) => "current".to_owned(),
            (true, _, Some(_)) => "current, damaged".to_owned(),
            (false, None, _) => "of an earlier generation".to_owned(),
            (false, Some(why), _) => format!("of an earlier generation: {why}"),
        };
        table.row(vec![
            one.name.clone(),
            one.disk.clone(),
            one.created.to_string(),
            size(one.size),
            size(one.held),
            state,
            one.change_id.clone(),
        ]);
    }
    table.finish()
}

/// The answer of `query-incremental`, a line a disk.
pub fn incremental(disks: &[IncrementalInfo]) -> String {
    let line = |one: &IncrementalInfo| {
        let disk = printable(&one.disk);
        match (one.possible, &one.reason, &one.desc) {
            (true, ..) => format!("{disk}: yes\n"),
            (false, Some(reason), Some(desc)) => {
                format!("{disk}: no, {} ({})\n", printable(desc), printable(reason))
            }
            _ => format!("{disk}: no\n"),
        }
    };
    disks.iter().map(line).collect()
}

/// The answer of `query-changed-blocks`, with a line that sums it up.
pub fn changes(changes: &ChangedBlocks) -> String {
    let total = changes.ranges.iter().fold(0u64, |sum, range| sum.saturating_add(range.length));
    let mut out = String::new();
    if !changes.ranges.is_empty() {
        let mut table = Table::new(&[("OFFSET", Align::Right), ("LENGTH", Align::Right)]);
        for range in &changes.ranges {
            table.row(vec![range.offset.to_string(), range.length.to_string()]);
        }
        out += &table.finish();
    }
    let ranges = changes.ranges.len();
    out += &printable(&format!(
        "{} of {} changed on {} from {} to {} ({}), in {ranges} range{}, blocks of {}",
        size(total),
        size(changes.size),
        changes.disk,
        changes.since,
        changes.snapshot,
        changes.until,
        if ranges == 1 { "" } else { "s" },
        size(changes.block_size),
    ));
    if let Some(offset) = changes.next_offset {
        out += &format!("; more from offset {offset}");
    }
    out.push('\n');
    out
}

/// The answer of `query-exports`.
pub fn exports(exports: &[ExportInfo]) -> String {
    if exports.is_empty() {
        return "no exports\n".to_owned();
    }
    let mut table = Table::new(&[
        ("EXPORT", Align::Left),
        ("DISK", Align::Left),
        ("SNAPSHOT", Align::Left),
        ("SIZE", Align::Right),
        ("MODE", Align::Left),
        ("CLIENTS", Align::Right),
        ("BITMAPS", Align::Left),
        ("URI", Align::Left),
    ]);
    for export in exports {
        let name = if export.name.is_empty() { "(default)".to_owned() } else { export.name.clone() };
        table.row(vec![
            name,
            export.disk.clone(),
            export.snapshot.clone().unwrap_or_else(|| "(live)".to_owned()),
            size(export.size),
            (match export {
                ExportInfo { release_on_trim: true, .. } => "ro, trim releases",
                ExportInfo { read_only: true, .. } => "ro",
                _ => "rw",
            })
            .to_owned(),
            export.clients.to_string(),
            list(&export.bitmaps),
            export.uri.clone(),
        ]);
    }
    table.finish()
}

/// A size in bytes with a binary unit: three digits at most before the point, one behind it
/// where it says something. Rounded down, so that nothing looks larger than it is.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut whole = bytes;
    let mut rest = 0;
    while whole >= 1024 {
        rest = whole % 1024;
        whole /= 1024;
        unit += 1;
    }
    let tenth = rest * 10 / 1024;
    if tenth == 0 || whole >= 100 {
        format!("{whole} {}", UNITS[unit])
    } else {
        format!("{whole}.{tenth} {}", UNITS[unit])
    }
}

/// Seconds as the two largest units that matter.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

fn microseconds(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{}.{} ms", us / 1_000, us / 100 % 10),
        _ => format!("{}.{} s", us / 1_000_000, us / 100_000 % 10),
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "-".to_owned();
    }
    names.join(",")
}

#[cfg(test)]
mod tests;
