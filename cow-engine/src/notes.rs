//! What the control page of a map says that was left, and whether it is believed.
//!
//! Invariant: within a boot of the host the page is flushed before a word of it is believed. The daemon that noted
//! something kept the page in memory; once that has ended, a page that the kernel could not write may have left memory,
//! and what is read then is older. The flush is told of that, once: so the page notes at once that its words are lost, and
//! says so until they are right again. Whoever ends before that leaves the same to the next.
//!
//! Lost words may have told that snapshots broke, that the intent log lacks regions, that a flush of the image failed,
//! and that a rewind is none: a new generation begins without snapshots and with a new log, the image's flushes count as failed,
//! and a rewind that the superblock names refuses the opening. A disk that was closed had noted neither of the last two. A
//! page that is not there was removed by somebody, not by a failure that it could have told: it counts as one that said nothing.
//! Absent: what a disk that is served notes ([`crate::tracker`]).

use std::sync::Arc;

use crate::disk::with_sources;
use crate::error::Error;
use crate::format::{Broken, Superblock};
use crate::open::{DiskOptions, bytes_of};
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::tracker::{CONTROL_CELLS, Control};

/// The control words of a map that was left.
pub(crate) struct Notes<S: Storage> {
    /// As they are found; none if there is no page.
    pub(crate) words: Option<Control<S::Cells>>,
    /// They may be older than what was noted.
    pub(crate) lost: bool,
    /// The intent log may lack regions.
    pub(crate) log_in_doubt: bool,
    /// Whether the rewind that the superblock may name is none; `None` if that is not known.
    pub(crate) rewind_void: Option<bool>,
    this_boot: bool,
    /// They are lost of a disk that may have noted more than its superblock tells.
    unsure: bool,
}

impl<S: Storage> Notes<S> {
    /// Reads the first page of a map, of a length in bytes, and flushes it.
    pub(crate) fn read(
        io: &S,
        map: Option<&(S::File, u64)>,
        found: Option<&Superblock>,
        options: &DiskOptions<S>,
    ) -> Result<Self, Error> {
        let words = match map {
            Some((map, len)) => words_of(io, map, *len)?,
            None => None,
        };
        let this_boot = found.is_some_and(|found| found.boot == options.boot);
        let lost = this_boot && words.as_ref().is_some_and(|words| is_lost(io, words, options));
        let unsure = lost && found.is_some_and(is_telling);
        if let Some(words) = words.as_ref().filter(|_| unsure) {
            words.note_flush_failed(true);
        }
        let log_in_doubt = lost || words.as_ref().is_some_and(|words| words.log_in_doubt(&options.boot));
        let void = this_boot && words.as_ref().is_some_and(Control::rewind_void);
        Ok(Self { words, lost, log_in_doubt, rewind_void: (!unsure).then_some(void), this_boot, unsure })
    }

    /// Whether a flush of the image has failed in this boot, as far as is known now.
    pub(crate) fn flush_failed(&self) -> bool {
        self.unsure || self.this_boot && self.words.as_ref().is_some_and(Control::flush_failed)
    }
}

/// The control words of a map, if it is long enough to have any.
fn words_of<S: Storage>(io: &S, map: &S::File, len: u64) -> Result<Option<Control<S::Cells>>, Error> {
    if len < bytes_of(CONTROL_CELLS) {
        return Ok(None);
    }
    let mapped = io.map(map, CONTROL_CELLS).map_err(Error::io("mapping the change map"))?;
    // Until the disk's own mapping is there. Who is not allowed to is told then.
    let _ = io.hold_cells(&mapped, CONTROL_CELLS);
    Ok(Some(Control::new(Arc::new(mapped))))
}

/// Flushes the words of this boot; whether what is read may be older than what was noted.
fn is_lost<S: Storage>(io: &S, words: &Control<S::Cells>, options: &DiskOptions<S>) -> bool {
    let (disk, boot) = (&options.name, &options.boot);
    if let Err(source) = io.sync_cells(words.cells()) {
        // At once: nobody is told again.
        words.note_words_lost(boot);
        let error = Error::Io { what: "flushing the change map", source };
        log::error!(
            "{disk}: what the last daemon noted may be lost, so no snapshot and no change since is believed: {}",
            with_sources(&error)
        );
    }
    words.words_lost(boot)
}

/// Whether words may tell of a failed flush of the image, or of a rewind, what the superblock does not.
pub(crate) fn is_telling(found: &Superblock) -> bool {
    !found.state.is_closed()
}

/// Keeps the words of a disk that is about to be served in memory, even if the kernel cannot write them.
pub(crate) fn hold<S: Storage>(io: &S, words: &Control<S::Cells>, disk: &str) {
    if let Err(error) = io.hold_cells(words.cells(), CONTROL_CELLS) {
        log::warn!(
            "{disk}: a page of 4096 bytes cannot be kept in memory (RLIMIT_MEMLOCK): should the state directory's medium fail, notes of what broke may be lost: {error}"
        );
    }
}

/// Takes over breaks that were noted without their heads being written.
pub(crate) fn take_breaks<S: Storage>(words: &Control<S::Cells>, chain: &[Arc<Snapshot<S>>], disk: &str) {
    let upto = words.broken_up_to();
    for snapshot in chain.iter().filter(|one| one.sequence <= upto) {
        let reason = "it broke before the daemon was restarted".to_owned();
        if snapshot.set_broken(Broken { reason, errno: 0, at_ns: 0 }) {
            log::warn!("{disk}: snapshot '{}' broke before the daemon was restarted", snapshot.name);
        }
    }
}
