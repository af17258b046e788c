//! Exports of writable views: an overlay in the words of NBD.
//!
//! Invariant: all connections see the same bytes and a flush on one covers all, so several may be open.
//! Absent: bitmaps; changes of an overlay are not tracked. Which exports there are; the daemon decides that.

use std::ops::Range;

use cow_engine::cbt::ByteRange;
use cow_engine::memory::{Source, Target};
use cow_engine::{Durability, Lane, Overlay, Storage, Zeroing};

use crate::export::{Context, Errno, Export, ExportError, ExportInfo, ZeroMode};
use crate::status::{Extents, Status};
use crate::views::explain;

/// A snapshot's overlay as an export, for one connection.
pub struct OverlayExport<S: Storage> {
    io: S,
    overlay: Overlay<S>,
    lane: Lane,
    info: ExportInfo,
}

impl<S: Storage> OverlayExport<S> {
    /// An export of `overlay` called `name`.
    pub fn new(io: S, overlay: Overlay<S>, name: &str, description: &str) -> Self {
        let mut info = ExportInfo::writable(name, overlay.capacity());
        info.description = description.to_owned();
        info.can_multi_conn = true;
        Self { io, lane: overlay.lane(), overlay, info }
    }
}

fn durability(fua: bool) -> Durability {
    if fua { Durability::Durable } else { Durability::Cached }
}

impl<S: Storage> Export for OverlayExport<S> {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.overlay.read(&self.io, offset, Target::of(buf)).await.map_err(explain)
    }

    async fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        let data = Source::of(data);
        self.overlay.write(&self.io, self.lane, offset, data, durability(fua)).await.map_err(explain)
    }

    async fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Result<(), ExportError> {
        let zeroing = if mode.no_hole { Zeroing::Keep } else { Zeroing::Unmap };
        let range = ByteRange::new(range.start, range.end);
        let zeroed = self.overlay.write_zeroes(&self.io, self.lane, range, zeroing, durability(mode.fua));
        zeroed.await.map_err(explain)
    }

    async fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
        self.write_zeroes(range, ZeroMode { fua, ..ZeroMode::default() }).await
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.overlay.flush(&self.io).await.map_err(explain)
    }

    async fn status(
        &self,
        context: Context,
        range: Range<u64>,
        out: &mut Extents,
    ) -> Result<(), ExportError> {
        let Context::Allocation = context else {
            return Err(ExportError::new(Errno::Inval, "this export has no bitmaps"));
        };
        let range = ByteRange::new(range.start, range.end);
        for extent in self.overlay.extents(&self.io, range).map_err(explain)? {
            let status = if extent.hole { Status::HOLE } else { Status::DATA };
            if !out.push(extent.range.len(), status) {
                break;
            }
        }
        Ok(())
    }
}
