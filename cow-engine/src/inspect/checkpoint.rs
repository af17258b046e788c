//! Checkpoints' files: what is in them, and what opening makes of them.

use std::io;

use super::facts::{Fact, id, number, text};
use super::judge::{left, wrong};
use super::read::State;
use super::{Files, Finding};
use crate::checkpoint::{CheckpointHead, CheckpointState, RunsPage, file_of};
use crate::format::{Damaged, PAGE};

/// Bytes of runs that are read together.
const CHUNK: u64 = 64 << 10;

/// A checkpoint as it was found.
pub(super) struct Checkpoint {
    pub(super) file: String,
    pub(super) len: u64,
    /// `None` if it was never written.
    pub(super) head: Result<Option<CheckpointHead>, Damaged>,
    /// How many runs there are, or what is damaged and where; 0 without a head.
    pub(super) runs: Result<u64, (u64, &'static str)>,
}

impl Checkpoint {
    pub(super) fn read(files: &impl Files, number: u32) -> io::Result<Self> {
        let file = file_of(number);
        let len = files.len(&file)?;
        let mut page = [0; PAGE];
        let has_page = len >= PAGE as u64;
        if has_page {
            files.read(&file, 0, &mut page)?;
        }
        let head = match CheckpointHead::from_page(&page) {
            _ if !has_page || page.iter().all(|&byte| byte == 0) => Ok(None),
            None => Err(Damaged),
            head => Ok(head),
        };
        let runs = match &head {
            Ok(Some(head)) => read_runs(files, &file, len, head)?,
            _ => Ok(0),
        };
        Ok(Self { file, len, head, runs })
    }
}

/// Reads all runs; how many, or what is damaged and where.
fn read_runs(
    files: &impl Files,
    file: &str,
    len: u64,
    head: &CheckpointHead,
) -> io::Result<Result<u64, (u64, &'static str)>> {
    if len < head.file_len() {
        return Ok(Err((len, "it ends before its runs do")));
    }
    let (mut at, mut next, mut runs) = (PAGE as u64, 0, 0);
    let mut buffer = Vec::new();
    while at < head.file_len() {
        let here = (head.file_len() - at).min(CHUNK);
        buffer.resize(usize::try_from(here).unwrap_or(PAGE), 0);
        files.read(file, at, &mut buffer)?;
        for bytes in buffer.chunks(PAGE) {
            let place = at / PAGE as u64 - 1;
            match RunsPage::from_bytes(bytes, &head.id, place, head.blocks()) {
                Some(page) if page.first == next => {
                    next = page.end();
                    runs += page.runs.len() as u64;
                }
                _ => return Ok(Err((at, "a page of its runs is damaged"))),
            }
            at += PAGE as u64;
        }
    }
    Ok(if next == head.blocks() { Ok(runs) } else { Err((at, "its runs end before the disk does")) })
}

pub(super) fn judge(state: &State, found: &mut Vec<Finding>) {
    for one in &state.checkpoints {
        let head = match &one.head {
            Ok(Some(head)) => head,
            Ok(None) => {
                found.push(left(&one.file, "it was never made whole", "it is removed"));
                continue;
            }
            Err(Damaged) => {
                let what = "its head is damaged".to_owned();
                let mut damaged = wrong("damaged-checkpoint", &one.file, Some(0), what, "it is removed");
                "a checkpoint".clone_into(&mut damaged.lost);
                found.push(damaged);
                continue;
            }
        };
        if head.state == CheckpointState::Prepared {
            let opening = "it is removed, unless another disk has a confirmed one of its group";
            found.push(left(&one.file, "it was never confirmed", opening));
        } else if let Err((at, what)) = one.runs {
            let opening = "it stays; changes since it can be told, changes up to it cannot";
            let mut damaged = wrong("damaged-runs", &one.file, Some(at), what.to_owned(), opening);
            damaged.lost = format!("what changed up to checkpoint '{}'", head.name);
            found.push(damaged);
        }
    }
}

pub(super) fn fact(one: &Checkpoint) -> Fact {
    let mut fields = vec![("bytes", number(one.len))];
    match &one.head {
        Ok(Some(head)) => {
            let state = match head.state {
                CheckpointState::Prepared => "prepared",
                CheckpointState::Active => "active",
            };
            fields.extend([
                ("name", text(head.name.clone())),
                ("state", text(state)),
                ("id", id(&head.id)),
                ("disk", id(&head.disk)),
                ("group", id(&head.group)),
                ("generation", id(&head.change_id.generation.to_bytes())),
                ("epoch", number(head.change_id.epoch.get())),
                ("capacity", number(head.capacity)),
                ("block_bytes", number(head.grid.bytes())),
                ("created_ns", number(head.created_ns)),
                ("pages", number(head.pages)),
            ]);
            if !head.ended.is_empty() {
                fields.push(("ended", text(head.ended.clone())));
            }
            fields.push(match one.runs {
                Ok(runs) => ("runs", number(runs)),
                Err(_) => ("runs_valid", super::Value::Flag(false)),
            });
        }
        Ok(None) => fields.push(("head", text("missing"))),
        Err(Damaged) => fields.push(("head", text("damaged"))),
    }
    Fact::new("checkpoint", &one.file, fields)
}
