//! Copy-before-write: keeps old content for the snapshots before it is overwritten.
//!
//! Invariant: look-up, copy and publication of a key happen under its one claim.
//! Absent: the choice of *whether* to preserve. [`crate::Disk`] decides, this module does.

use std::future::poll_fn;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::fence;
use std::task::Poll;

use cbt::BlockGrid;

use crate::append::Item;
use crate::disk::Disk;
use crate::error::Error;
use crate::format::GRAIN;
use crate::gate::Lane;
use crate::index::Key;
use crate::snapshot::Snapshot;
use crate::storage::Storage;

/// Keys that are copied together at most: 256 KiB of grains. The longer the pieces, the longer the image
/// waits while one is appended; the shorter, the more transfers there are.
const MAX_RUN: u64 = (256 << 10) / GRAIN as u64;
const _: () = assert!(MAX_RUN <= u64::BITS as u64, "a bit for each");

/// Grains that are preserved together once guests have touched some of them, at most: 64 KiB.
const STRETCH: u64 = 16;

/// So many of them, beside the one that is to be preserved.
const WARM: u32 = 2;

/// Pieces of a long range that are under way at a time.
const ABREAST: u64 = 4;

/// Preserves what `snapshot` does not have of `keys`; `old` fills a buffer with their content.
///
/// Waits for others who preserve the same keys, never while holding a claim. Answers when every key
/// is published, or the snapshot is broken, which makes it moot.
pub(crate) async fn preserve<S: Storage>(
    io: &S,
    disk: &Disk<S>,
    lane: Lane,
    snapshot: &Arc<Snapshot<S>>,
    keys: Range<Key>,
    old: impl AsyncFn(Range<Key>, &mut [u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let (mut at, end) = (keys.start.to_raw(), keys.end.to_raw());
    let piece = async |keys: Range<u64>| preserve_piece(io, disk, lane, snapshot, keys, &old).await;
    while end - at > MAX_RUN {
        // One is read while another is appended, each with claims of its own.
        let here = at..end.min(at + ABREAST * MAX_RUN);
        at = here.end;
        let starts = here.clone().step_by(usize::try_from(MAX_RUN).unwrap_or(1));
        let pieces = starts.map(|start| Box::pin(piece(start..here.end.min(start + MAX_RUN))));
        join_all(pieces.collect()).await?;
    }
    piece(at..end).await
}

/// Waits for all; the first error, once all have ended.
pub(crate) async fn join_all<F: Future<Output = Result<(), Error>>>(
    mut futures: Vec<Pin<Box<F>>>,
) -> Result<(), Error> {
    let mut result = Ok(());
    poll_fn(|cx| {
        futures.retain_mut(|future| match future.as_mut().poll(cx) {
            Poll::Ready(ended) => {
                if result.is_ok() {
                    result = ended;
                }
                false
            }
            Poll::Pending => true,
        });
        if futures.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}

async fn preserve_piece<S: Storage>(
    io: &S,
    disk: &Disk<S>,
    lane: Lane,
    snapshot: &Arc<Snapshot<S>>,
    keys: Range<u64>,
    old: &impl AsyncFn(Range<Key>, &mut [u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let Range { start: mut at, end } = keys;
    while at < end {
        let claim = snapshot.claims.claim(at..end).await;
        at = claim.run().end;
        let mut within = claim.run();
        // Looked for only now: someone may have preserved part of it while we waited.
        while let Some((run, wanted)) = missing(snapshot, within.clone()) {
            if snapshot.broken().is_some() {
                return Ok(());
            }
            within.start = run.end;
            let mut buffer = disk.buffers.grains(run.end - run.start).await;
            let first = Key::from_raw(run.start);
            // What lies between and is there already is read with the rest: one transfer, not several.
            old(first..Key::from_raw(run.end), &mut buffer).await?;
            // Whatever made `old` wrong came after the break that we now look for.
            fence(Acquire);
            // Once it is broken others overwrite without preserving, so what was read may be new; and
            // an older snapshot, which looks through this one, would take it for old.
            if snapshot.broken().is_some() {
                return Ok(());
            }
            let item = Item { snapshot: snapshot.clone(), first, old: buffer, wanted };
            disk.appender.append(io, disk, lane, item).await?;
        }
    }
    Ok(())
}

/// The part of `keys`, at most [`MAX_RUN`] long, from the first to the last that the snapshot does not have; and
/// a bit for each of its keys that it does not have.
fn missing<S: Storage>(snapshot: &Snapshot<S>, mut keys: Range<u64>) -> Option<(Range<u64>, u64)> {
    let start = keys.find(|&key| !snapshot.has(Key::from_raw(key)))?;
    let limit = keys.end.min(start + MAX_RUN);
    let mut wanted = 1;
    for key in start + 1..limit {
        wanted |= u64::from(!snapshot.has(Key::from_raw(key))) << (key - start);
    }
    Some((start..start + u64::from(u64::BITS - wanted.leading_zeros()), wanted))
}

/// `grains` of `snapshot` and the rest of the stretch that they lie in, if guests have touched so much of it that
/// they will probably touch the rest too; `None` if not.
///
/// A stretch passes the end of no tracked block. So whoever counts what was preserved as changed, as a rewind
/// does, names no block in which nothing was.
pub(crate) fn stretch<S: Storage>(
    snapshot: &Snapshot<S>,
    blocks: Option<BlockGrid>,
    grains: &Range<u64>,
) -> Option<Range<u64>> {
    let len = blocks.map_or(STRETCH, |blocks| STRETCH.min(blocks.bytes() / GRAIN as u64));
    let start = grains.start / len * len;
    let end = start + len;
    let warm = !grains.is_empty() && grains.end <= end && snapshot.known_in(start..end) >= WARM;
    warm.then(|| start..end.min(snapshot.grains()))
}
