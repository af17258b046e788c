//! A rewind's files: what is in them, and whether opening goes on with it.

use std::io;

use super::judge::{left, wrong};
use super::read::State;
use super::{Around, Files, Finding, end_of};
use crate::areas::OWN_SLOTS;
use crate::error::Error;
use crate::format::{GRAIN, PAGE};
use crate::index::Slot;
use crate::notes::is_telling;
use crate::rewind::{
    DONE_FILE, Found, HEAD_FILE, NO_REWIND, RewindHead, Runs, SYNCED_FILE, bytes_needed, in_force,
};
use crate::tracker::Identity;

/// The files of a rewind.
pub(super) const FILES: [&str; 3] = [HEAD_FILE, DONE_FILE, SYNCED_FILE];

/// What is left of a rewind.
pub(super) struct Rewind {
    /// `None` if it was never written whole.
    pub(super) head: Result<Option<RewindHead>, Error>,
    /// Grains of all its runs, or how these are damaged; 0 without a head.
    pub(super) grains: Result<u64, Error>,
    pub(super) done_len: Option<u64>,
    pub(super) synced_len: Option<u64>,
}

impl Rewind {
    /// Reads it; `None` if it has no files.
    pub(super) fn read(files: &impl Files, names: &[String], store_len: u64) -> io::Result<Option<Self>> {
        let len = |file: &str| names.iter().any(|name| name == file).then(|| files.len(file)).transpose();
        let (head_len, done_len, synced_len) = (len(HEAD_FILE)?, len(DONE_FILE)?, len(SYNCED_FILE)?);
        if head_len.or(done_len).or(synced_len).is_none() {
            return Ok(None);
        }
        let head_len = head_len.unwrap_or(0);
        let head = read_head(files, head_len)?;
        let grains = match &head {
            Ok(Some(head)) => read_runs(files, head, store_len, head_len)?,
            _ => Ok(0),
        };
        Ok(Some(Self { head, grains, done_len, synced_len }))
    }
}

fn read_head(files: &impl Files, len: u64) -> io::Result<Result<Option<RewindHead>, Error>> {
    if len < PAGE as u64 {
        return Ok(Ok(None));
    }
    let mut page = [0; PAGE];
    files.read(HEAD_FILE, 0, &mut page)?;
    Ok(RewindHead::of_page(&page))
}

/// Grains of the runs, or how they are damaged.
fn read_runs(
    files: &impl Files,
    head: &RewindHead,
    store_len: u64,
    len: u64,
) -> io::Result<Result<u64, Error>> {
    let check = |slot: u32| match slot < OWN_SLOTS && end_of(Slot::At(slot)) > store_len {
        true => Err(Error::Corrupt { what: "the end of the difference store", at: store_len }),
        false => Ok(()),
    };
    let mut runs = match Runs::of(head, check, len) {
        Ok(runs) => runs,
        Err(error) => return Ok(Err(error)),
    };
    while let Some((at, len)) = runs.next() {
        let mut bytes = vec![0; len];
        files.read(HEAD_FILE, at, &mut bytes)?;
        if let Err(error) = runs.take(at, &bytes, |_| {}) {
            return Ok(Err(error));
        }
    }
    Ok(runs.finish().map(|()| runs.grains))
}

/// Judges it as opening does, which refuses a disk of which it cannot tell what it is.
pub(super) fn judge(state: &State, around: &Around, found: &mut Vec<Finding>) {
    let superblock = state.superblock();
    if state.rewind.is_none() && superblock.is_none_or(|superblock| superblock.rewind == NO_REWIND) {
        return;
    }
    let then = superblock.map(|superblock| (superblock.boot, superblock.identity));
    let boot = around.boot.or(then.map(|(boot, _)| boot)).unwrap_or_default();
    let same_boot = then.is_some_and(|(then, _)| then == boot);
    let head = match &state.rewind {
        Some(rewind) => rewind.head.as_ref().map(Option::as_ref),
        None => Ok(None),
    };
    let words = state.words.as_ref();
    let lost = same_boot && words.is_some_and(|words| words.control.words_lost(&boot));
    let unsure = lost && superblock.is_some_and(is_telling);
    let void = same_boot && words.is_some_and(|words| words.rewind_void);
    let nowhere = Identity { device: 0, inode: 0, len: 0, mtime_ns: 0 };
    let judged = in_force(
        &Found {
            superblock,
            one_damaged: state.verdict.one_damaged,
            void: (!unsure).then_some(void),
            boot,
            // Without an image there is nothing to say against it.
            identity: around.image.or(then.map(|(_, identity)| identity)).unwrap_or(nowhere),
        },
        head,
    );
    let name = head.ok().flatten().map(|head| head.name.clone());
    let lost = |at, why: String| {
        let mut one = wrong("rewind-lost", HEAD_FILE, at, why, "the disk is not opened");
        one.lost = match &name {
            Some(name) => format!("the disk, which was to become snapshot '{name}' again"),
            None => "the disk, which was to become a snapshot again".to_owned(),
        };
        one
    };
    found.push(match judged {
        Err(Error::RewindLost { reason, .. }) => lost(None, reason),
        Err(error) => lost(None, error.to_string()),
        Ok(false) => {
            left(HEAD_FILE, "no rewind is under way, and there are files of one", "they are removed")
        }
        Ok(true) => match state.rewind.as_ref().map(|rewind| whole(rewind, same_boot)) {
            Some(Ok(bytes)) => {
                let name = name.as_deref().unwrap_or_default();
                let what = format!("the disk is on its way back to snapshot '{name}', {bytes} bytes of it");
                left(HEAD_FILE, &what, "the rewind goes on")
            }
            Some(Err((at, why))) => lost(at, why),
            None => return,
        },
    });
}

/// Bytes that a rewind which is in force lists, or what it lacks, and where.
fn whole(rewind: &Rewind, same_boot: bool) -> Result<u64, (Option<u64>, String)> {
    let grains = match &rewind.grains {
        Ok(grains) => *grains,
        Err(Error::Corrupt { what, at }) => return Err((Some(*at), format!("{what} is damaged"))),
        Err(error) => return Err((None, error.to_string())),
    };
    let bytes = Some(bytes_needed(grains));
    // After a stop of the host only the synced copy counts.
    if rewind.synced_len != bytes || same_boot && rewind.done_len != bytes {
        return Err((None, "what says which of it is back is missing, or of a wrong length".to_owned()));
    }
    Ok(grains.saturating_mul(GRAIN as u64))
}
