//! The structures of a state directory as names and values, for people and programs to read.

use super::read::{CopyFound, Found, Head, Index, Overlay, State};
use super::rewind::Rewind;
use crate::areas::{Entry, LIST_FILE};
use crate::away::sample::{self, SAMPLE_FILE};
use crate::format::{
    DiskState, Entry as RecordEntry, GRAIN, MAP_FILE, PAGE, RECORD, STORE_FILE, SUPERBLOCK_FILE,
    SnapshotState, Superblock,
};
use crate::index::{Key, Slot};
use crate::overflow::OnOverflow;
use crate::overlay::head_file;
use crate::rewind::{HEAD_FILE, NO_REWIND, RewindState};

/// A value of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A number; sizes and places are in bytes.
    Number(u64),
    /// Yes or no.
    Flag(bool),
    /// Anything else.
    Text(String),
}

/// A structure that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is.
    pub structure: &'static str,
    /// The file that it is in; empty for a record, of which there may be many.
    pub file: String,
    /// Its fields, named as in FORMAT.md where they are stored.
    pub fields: Vec<(&'static str, Value)>,
}

impl Fact {
    pub(super) fn new(structure: &'static str, file: &str, fields: Vec<(&'static str, Value)>) -> Self {
        Self { structure, file: file.to_owned(), fields }
    }
}

pub(super) fn number(value: impl Into<u64>) -> Value {
    Value::Number(value.into())
}

pub(super) fn text(value: impl Into<String>) -> Value {
    Value::Text(value.into())
}

pub(super) fn id(bytes: &[u8; 16]) -> Value {
    text(uuid::Uuid::from_bytes(*bytes).to_string())
}

/// Everything but records.
pub(super) fn all(state: &State) -> Vec<Fact> {
    let mut facts = Vec::new();
    for (nth, copy) in (0u64..).zip(&state.copies) {
        let mut fields = vec![("at", number(nth * PAGE as u64))];
        match copy {
            CopyFound::Valid(superblock) => {
                let newest = state.superblock().is_some_and(|newest| newest.sequence == superblock.sequence);
                fields.extend([("valid", Value::Flag(true)), ("newest", Value::Flag(newest))]);
                fields.extend(of_superblock(superblock));
            }
            CopyFound::Unused => fields.push(("unused", Value::Flag(true))),
            CopyFound::Version(version) => {
                fields.extend([("valid", Value::Flag(false)), ("version", number(*version))]);
            }
            CopyFound::Damaged => fields.push(("valid", Value::Flag(false))),
        }
        facts.push(Fact::new("superblock", SUPERBLOCK_FILE, fields));
    }
    if let Some(len) = state.map_len {
        let mut fields = vec![("bytes", number(len))];
        if let Some(words) = &state.words {
            fields.push(("broken_up_to", number(words.broken_up_to)));
            fields.push(("flush_failed", Value::Flag(words.flush_failed)));
            fields.push(("rewind_void", Value::Flag(words.rewind_void)));
            if let Some(note) = state.superblock().and_then(|newest| words.control.note(&newest.boot)) {
                fields.push(("alive_at_ns", number(note.at_ns.cast_unsigned())));
                fields.push(("alive_mtime_ns", number(note.mtime_ns.cast_unsigned())));
                fields.push(("quiet", Value::Flag(note.quiet)));
            }
        }
        facts.push(Fact::new("map", MAP_FILE, fields));
    }
    if let sample::Found::Sample(sample) = &state.sample {
        let fields = vec![
            ("capacity", number(sample.capacity)),
            ("medium", number(sample.medium)),
            ("places", number(sample.places().count() as u64)),
        ];
        facts.push(Fact::new("sample", SAMPLE_FILE, fields));
    }
    if let Some(len) = state.store_len {
        let named = state.named_slots;
        let fields = vec![
            ("bytes", number(len)),
            ("slots_named", number(named)),
            ("bytes_named", number(named.saturating_mul(GRAIN as u64))),
        ];
        facts.push(Fact::new("store", STORE_FILE, fields));
    }
    facts.extend(state.areas.entries.iter().map(of_area));
    facts.extend(state.indexes.iter().map(|index| of_index(state, index)));
    facts.extend(state.overlays.iter().map(of_overlay));
    facts.extend(state.checkpoints.iter().map(super::checkpoint::fact));
    facts.extend(state.rewind.as_ref().map(of_rewind));
    facts.extend(state.unknown.iter().map(|file| Fact::new("unknown", file, Vec::new())));
    facts
}

fn of_superblock(superblock: &Superblock) -> Vec<(&'static str, Value)> {
    let state = match superblock.state {
        DiskState::Clean => "clean",
        DiskState::Serving => "serving",
        DiskState::Unlogged => "serving without an intent log",
        DiskState::Doubtful => "clean until the host stops",
        DiskState::Resetting => "resetting",
        DiskState::HandedOver => "handed over",
    };
    let mut fields = vec![
        ("state", text(state)),
        ("sequence", number(superblock.sequence)),
        ("disk", id(&superblock.disk)),
        ("generation", id(&superblock.generation.to_bytes())),
        ("boot", id(&superblock.boot)),
        ("epoch", number(superblock.epoch.get())),
        ("block_bytes", number(superblock.block_bytes)),
        ("capacity", number(superblock.capacity)),
        ("device", number(superblock.identity.device)),
        ("inode", number(superblock.identity.inode)),
        ("image_len", number(superblock.identity.len)),
        ("mtime_ns", text(superblock.identity.mtime_ns.to_string())),
        ("path", text(superblock.path.clone())),
    ];
    fields.extend(superblock.growing_to.map(|to| ("growing_to", number(to))));
    if superblock.rewind != NO_REWIND {
        fields.push(("rewind", id(&superblock.rewind)));
    }
    fields
}

fn of_index(state: &State, index: &Index) -> Fact {
    let mut fields = vec![("sequence", number(index.sequence)), ("bytes", number(index.len))];
    let head = match &index.head {
        Head::Valid(head) => head,
        other => {
            fields.push((
                "head",
                text(match other {
                    Head::Unmade => "cut off",
                    Head::Foreign => "another's",
                    Head::Version(_) => "of an unknown version",
                    _ => "damaged",
                }),
            ));
            return Fact::new("snapshot", &index.file, fields);
        }
    };
    let kind = match head.state {
        SnapshotState::Prepared => "prepared",
        SnapshotState::Active => "active",
        SnapshotState::Deleted => "deleted",
    };
    let on_overflow = match head.terms.on_overflow {
        OnOverflow::BreakSnapshot => "break-snapshot",
        OnOverflow::HoldWrites => "hold-writes",
        OnOverflow::FailWrites => "fail-writes",
    };
    fields.extend([
        ("name", text(head.name.clone())),
        ("state", text(kind)),
        ("newer", number(head.newer)),
        ("group", id(&head.group)),
        ("generation", id(&head.generation.to_bytes())),
        ("epoch", number(head.epoch.get())),
        ("tracked", Value::Flag(head.tracked)),
        ("capacity", number(head.capacity)),
        ("created_ns", number(head.created_ns)),
        ("on_overflow", text(on_overflow)),
        ("hold_seconds", number(head.terms.hold_seconds)),
        ("limit", number(head.terms.limit)),
    ]);
    match &head.broken {
        Some(broken) => fields.extend([
            ("broken", text(broken.reason.clone())),
            ("broken_errno", number(broken.errno)),
            ("broken_ns", number(broken.at_ns)),
        ]),
        None => {
            let counted = state.words.as_ref().map_or(0, |words| words.records(index.sequence));
            fields.extend([
                ("records", number(index.records.written)),
                ("records_counted", number(counted)),
                ("records_damaged", number(index.records.damaged)),
                ("slots", number(index.records.slots)),
                (
                    "grains_released",
                    number(index.records.released.iter().map(|run| run.end - run.start).sum::<u64>()),
                ),
            ]);
        }
    }
    Fact::new("snapshot", &index.file, fields)
}

fn of_overlay(overlay: &Overlay) -> Fact {
    let mut fields = vec![("number", number(overlay.number))];
    match &overlay.head {
        Ok(Some(head)) => fields.extend([
            ("name", text(head.name.clone())),
            ("snapshot", number(head.snapshot)),
            ("state", text(if head.clean { "clean" } else { "in use" })),
            ("keep", Value::Flag(head.keep)),
            ("disk", id(&head.disk)),
            ("group", id(&head.group)),
            ("boot", id(&head.boot)),
            ("capacity", number(head.capacity)),
            ("note", text(head.note.clone())),
        ]),
        Ok(None) => fields.push(("head", text("missing"))),
        Err(_) => fields.push(("head", text("damaged"))),
    }
    fields.extend(overlay.data_len.map(|len| ("data_bytes", number(len))));
    fields.extend(overlay.cells_len.map(|len| ("cells_bytes", number(len))));
    Fact::new("overlay", &head_file(overlay.number), fields)
}

/// An area as the list has it; the area itself is not looked at.
fn of_area(area: &Entry) -> Fact {
    let fields = vec![
        ("number", number(area.number)),
        ("path", text(area.path.clone())),
        ("base", number(area.base)),
        ("slots", number(area.slots)),
        ("id", id(&area.uuid)),
    ];
    Fact::new("area", LIST_FILE, fields)
}

fn of_rewind(rewind: &Rewind) -> Fact {
    let mut fields = Vec::new();
    match &rewind.head {
        Ok(Some(head)) => {
            let state = match head.state {
                RewindState::Prepared => "prepared",
                RewindState::UnderWay => "under way",
                RewindState::Finished => "finished",
            };
            fields.extend([
                ("state", text(state)),
                ("disk", id(&head.disk)),
                ("id", id(&head.id)),
                ("capacity", number(head.capacity)),
                ("name", text(head.name.clone())),
                ("runs", number(head.runs)),
            ]);
            fields.push(match &rewind.grains {
                Ok(grains) => ("bytes_listed", number(grains.saturating_mul(GRAIN as u64))),
                Err(_) => ("runs_valid", Value::Flag(false)),
            });
        }
        Ok(None) => fields.push(("head", text("missing"))),
        Err(_) => fields.push(("head", text("damaged"))),
    }
    fields.extend(rewind.done_len.map(|len| ("done_bytes", number(len))));
    fields.extend(rewind.synced_len.map(|len| ("synced_bytes", number(len))));
    Fact::new("rewind", HEAD_FILE, fields)
}

/// A record at `place` of the index of snapshot `sequence`.
pub(super) fn record(sequence: u32, place: u64, found: Found) -> Fact {
    let mut fields = vec![
        ("sequence", number(sequence)),
        ("place", number(place)),
        ("at", number(PAGE as u64 + place * RECORD as u64)),
    ];
    match found {
        Ok(Some(RecordEntry::Released(run))) => fields.extend([
            ("released", Value::Flag(true)),
            ("grain", number(run.start)),
            ("grains", number(run.end - run.start)),
        ]),
        Ok(Some(RecordEntry::Kept(key, slot))) => {
            let page = Key::map_page(0).to_raw();
            match key.to_raw() {
                raw if raw & page != 0 => fields.push(("map_page", number(raw & !page))),
                raw => fields.push(("grain", number(raw))),
            }
            fields.push(match slot {
                Slot::Zero => ("zero", Value::Flag(true)),
                Slot::At(slot) => ("slot", number(slot)),
            });
        }
        _ => fields.push(("valid", Value::Flag(false))),
    }
    Fact::new("record", "", fields)
}
