//! Marks without writes: an operator's word that ranges changed.
//!
//! A mark goes the way of a write's mark, and no further:
//!
//! ```text
//! pass the gate                     (a snapshot in creation waits for us, or we for it)
//! freeze the pages of the map       (into the newest snapshot, before their first mark since)
//! mark the blocks                   (in the current epoch)
//! ```
//!
//! and when all are marked, the map is made durable, and the command is answered.
//!
//! So marks belong to the next instant: the next snapshot's changes have them, since whatever older instant
//! they are asked, and what a snapshot that is held answers never changes.
//!
//! A stop between pieces leaves some of the blocks marked, which over-reports. What was answered outlives the
//! process, and the host too. The intent log has no part in it: one flush is less than one for each
//! region, and none of them becomes hot for a mark that is durable.
//!
//! Analogue: blksnap's `cbt_map_mark_dirty_blocks`, which marks the map of the held snapshot too.

use cbt::ByteRange;

use crate::disk::Disk;
use crate::error::Error;
use crate::gate::Lane;
use crate::storage::Storage;

/// Pages of the map that are marked in one pass of the gate, so that a snapshot does not wait long.
const PAGES_AT_ONCE: u64 = 16;

impl<S: Storage> Disk<S> {
    /// Marks the blocks that `ranges` touch as changed, in any order, twice or once. Empty ranges touch none.
    ///
    /// A page of the map that cannot be frozen breaks the snapshot, as a write would, unless its operator
    /// chose that writes wait or fail.
    ///
    /// # Errors
    /// [`Error::NotTracked`]; [`Error::PastEnd`] if one passes the disk's end, and then none is marked; what could
    /// not be frozen, if writes would wait or fail for it. Those of the map's file: then all are marked, and a
    /// stop of the host may lose them.
    pub async fn mark_changed(&self, io: &S, lane: Lane, ranges: &[ByteRange]) -> Result<(), Error> {
        let grid = self.block_grid().ok_or_else(|| Error::NotTracked { disk: self.name.clone() })?;
        let capacity = self.capacity();
        for range in ranges {
            self.check(range.start(), range.len())?;
        }
        for blocks in joined(ranges.iter().map(|range| grid.covering(*range))) {
            let piece_blocks = PAGES_AT_ONCE * cbt::CELLS_PER_PAGE as u64;
            let mut at = blocks.start;
            while at < blocks.end {
                let end = blocks.end.min((at / piece_blocks + 1) * piece_blocks);
                self.mark_piece(io, lane, grid.range(at..end, capacity)).await?;
                at = end;
            }
        }
        self.sync_map(io, &self.map_cells()).await
    }

    async fn mark_piece(&self, io: &S, lane: Lane, range: ByteRange) -> Result<(), Error> {
        let _pass = self.gate.enter(lane).await;
        self.check_kept()?;
        // The disk may have become smaller: what is past its end is no part of it any more.
        let range = range.intersect(ByteRange::new(0, self.capacity()));
        if range.is_empty() {
            return Ok(());
        }
        let newest = self.watch.newest().filter(|snapshot| snapshot.broken().is_none());
        let preserving = newest.as_ref().and_then(|snapshot| snapshot.begin_preserving());
        let snapshot = newest.as_ref().filter(|_| preserving.is_some());
        self.freeze_and_mark(io, lane, snapshot, range, None).await.map_err(|stuck| stuck.into_error())
    }
}

/// Runs of blocks in order, apart from each other: what is said often is done once.
fn joined(runs: impl Iterator<Item = std::ops::Range<u64>>) -> Vec<std::ops::Range<u64>> {
    let mut sorted: Vec<_> = runs.filter(|run| !run.is_empty()).collect();
    sorted.sort_unstable_by_key(|run| run.start);
    let mut joined: Vec<std::ops::Range<u64>> = Vec::new();
    for run in sorted {
        match joined.last_mut() {
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_where_they_touch() {
        let runs = [5..7, 0..2, 9..9, 1..3, 7..8, 20..21];
        assert_eq!(joined(runs.into_iter()), [0..3, 5..8, 20..21]);
    }
}
