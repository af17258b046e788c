//! An export of either kind: a snapshot's view, or an overlay on one.

use std::ops::Range;

use cow_engine::host::HostStorage;
use nbd_export::{Context, Export, ExportError, ExportInfo, Extents, OverlayExport, ViewExport, ZeroMode};

/// What a client is offered.
pub(crate) enum Offered {
    View(ViewExport<HostStorage>),
    Overlay(OverlayExport<HostStorage>),
}

impl Export for Offered {
    fn info(&self) -> &ExportInfo {
        match self {
            Self::View(export) => export.info(),
            Self::Overlay(export) => export.info(),
        }
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        match self {
            Self::View(export) => export.read(offset, buf).await,
            Self::Overlay(export) => export.read(offset, buf).await,
        }
    }

    async fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), ExportError> {
        match self {
            Self::View(export) => export.write(offset, data, fua).await,
            Self::Overlay(export) => export.write(offset, data, fua).await,
        }
    }

    async fn write_zeroes(&self, range: Range<u64>, mode: ZeroMode) -> Result<(), ExportError> {
        match self {
            Self::View(export) => export.write_zeroes(range, mode).await,
            Self::Overlay(export) => export.write_zeroes(range, mode).await,
        }
    }

    async fn trim(&self, range: Range<u64>, fua: bool) -> Result<(), ExportError> {
        match self {
            Self::View(export) => export.trim(range, fua).await,
            Self::Overlay(export) => export.trim(range, fua).await,
        }
    }

    async fn flush(&self) -> Result<(), ExportError> {
        match self {
            Self::View(export) => export.flush().await,
            Self::Overlay(export) => export.flush().await,
        }
    }

    async fn status(
        &self,
        context: Context,
        range: Range<u64>,
        out: &mut Extents,
    ) -> Result<(), ExportError> {
        match self {
            Self::View(export) => export.status(context, range, out).await,
            Self::Overlay(export) => export.status(context, range, out).await,
        }
    }
}
