//! Exports of snapshots: what a view has, in the words of NBD.
//!
//! Invariant: an export names the older snapshots it can compare with when a client asks for it;
//! their epochs are fixed then, so that a bitmap goes on to answer after its snapshot was deleted.
//! Absent: which exports there are; the daemon decides that.

use std::ops::Range;

use cow_engine::cbt::{ByteRange, Epoch};
use cow_engine::{Storage, View};

use crate::export::{Context, Errno, Export, ExportError, ExportInfo};
use crate::status::{Extents, Status};

/// Changed ranges that are looked up for one answer; a client asks on from where it ends.
const CHANGES_AT_ONCE: usize = 16 << 10;

/// An older instant that a view is compared with, and the bitmap's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Clients see it as `qemu:dirty-bitmap:NAME`.
    pub name: String,
    /// Blocks that were changed after this epoch are dirty.
    pub epoch: Epoch,
}

/// A snapshot's view as an export.
pub struct ViewExport<S: Storage> {
    io: S,
    view: View<S>,
    bases: Vec<Base>,
    info: ExportInfo,
}

impl<S: Storage> ViewExport<S> {
    /// An export of `view` called `name`, with a bitmap for each of `bases`.
    pub fn new(io: S, view: View<S>, name: &str, description: &str, bases: Vec<Base>) -> Self {
        let mut info = ExportInfo::read_only(name, view.capacity());
        info.description = description.to_owned();
        info.bitmaps = bases.iter().map(|base| base.name.clone()).collect();
        Self { io, view, bases, info }
    }

    /// The same, for a reader that trims what it has read: that is released, see [`View::release`].
    ///
    /// It is not offered as read-only, since clients send no trims to what is; writes are refused.
    #[must_use]
    pub fn releasing(mut self) -> Self {
        self.info.read_only = false;
        self.info.can_trim = true;
        self
    }

    async fn allocation(&self, range: ByteRange, out: &mut Extents) -> Result<(), ExportError> {
        let extents = self.view.extents(&self.io, range).map_err(explain)?;
        for extent in extents {
            let status = if extent.hole { Status::HOLE } else { Status::DATA };
            if !out.push(extent.range.len(), status) {
                break;
            }
        }
        Ok(())
    }

    async fn changes(&self, base: Epoch, range: ByteRange, out: &mut Extents) -> Result<(), ExportError> {
        let changed = self.view.changes(&self.io, base, range, CHANGES_AT_ONCE).await.map_err(explain)?;
        let mut at = range.start();
        for dirty in &changed {
            let more = out.push(dirty.start() - at, Status::CLEAN) && out.push(dirty.len(), Status::DIRTY);
            if !more {
                return Ok(());
            }
            at = dirty.end();
        }
        // What follows the last of a full answer is not known yet.
        if changed.len() < CHANGES_AT_ONCE {
            out.push(range.end() - at, Status::CLEAN);
        }
        Ok(())
    }
}

impl<S: Storage> Export for ViewExport<S> {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.view.read(&self.io, offset, buf).await.map_err(explain)
    }

    async fn trim(&self, range: Range<u64>, _fua: bool) -> Result<(), ExportError> {
        if !self.info.can_trim {
            return Err(ExportError::new(Errno::Perm, "this export cannot be written"));
        }
        // It outlives this process when it is answered, and no snapshot outlives a stop of the host.
        let range = ByteRange::new(range.start, range.end);
        self.view.release(&self.io, range).await.map(|_| ()).map_err(explain)
    }

    async fn status(
        &self,
        context: Context,
        range: Range<u64>,
        out: &mut Extents,
    ) -> Result<(), ExportError> {
        let range = ByteRange::new(range.start, range.end);
        match context {
            Context::Allocation => self.allocation(range, out).await,
            Context::Bitmap(index) => match self.bases.get(index) {
                Some(base) => self.changes(base.epoch, range, out).await,
                None => Err(ExportError::new(Errno::Inval, "this export has no such bitmap")),
            },
        }
    }
}

/// The engine's error for a client, with its sources: a lost snapshot says why.
pub(crate) fn explain(error: cow_engine::Error) -> ExportError {
    let errno = match error {
        cow_engine::Error::SnapshotDeleted { .. } | cow_engine::Error::OverlayClosed { .. } => {
            Errno::Shutdown
        }
        cow_engine::Error::NotTracked { .. } | cow_engine::Error::OtherGeneration { .. } => Errno::NotSup,
        cow_engine::Error::SnapshotInUse { .. } => Errno::Perm,
        _ if error.is_out_of_space() => Errno::NoSpc,
        _ => Errno::Io,
    };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(why) = source {
        text = format!("{text}: {why}");
        source = why.source();
    }
    match error {
        cow_engine::Error::ContentReleased { at, .. } => ExportError::new(errno, text).at(at),
        _ => ExportError::new(errno, text),
    }
}
