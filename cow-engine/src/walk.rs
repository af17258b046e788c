//! Walking over a change map without touching what nothing was ever marked in.
//!
//! Invariant: a page that holds a mark is never left out: a hole of a file reads as zeros, and a page that
//! was stored to through a mapping is none. What is left out is neither read nor made resident.
//! Absent: what is looked for; and freezing, so marks that are made meanwhile may be seen or not.

use std::io;
use std::ops::Range;

use cbt::{ByteRange, PAGE_BYTES, PageIndex};

use crate::storage::Storage;
use crate::tracker::CONTROL_PAGES;

/// Pages whose holes are asked for at a time, so that the answer is bounded.
const STRIDE: u64 = 4096;

/// All pages of a map, in parts for [`touched`].
pub(crate) fn strides(pages: u64) -> impl Iterator<Item = Range<PageIndex>> {
    (0..pages.div_ceil(STRIDE)).map(move |nth| nth * STRIDE..pages.min((nth + 1) * STRIDE))
}

/// Runs of pages of the map, within `pages`, that may hold marks, in order and apart from each other.
///
/// `map` is the map's file, which is as long as that. The answer is bounded by the length of `pages`.
pub(crate) fn touched<S: Storage>(
    io: &S,
    map: &S::File,
    pages: Range<PageIndex>,
) -> io::Result<Vec<Range<PageIndex>>> {
    let bytes = |page: PageIndex| (page + CONTROL_PAGES) * PAGE_BYTES as u64;
    let mut runs: Vec<Range<PageIndex>> = Vec::new();
    let all = ByteRange::new(bytes(pages.start), bytes(pages.end));
    for extent in io.extents(map, all)?.into_iter().map(|extent| extent.within(all)) {
        if extent.hole {
            continue;
        }
        // A file system's blocks may be smaller than pages.
        let start = extent.range.start() / PAGE_BYTES as u64 - CONTROL_PAGES;
        let end = extent.range.end().div_ceil(PAGE_BYTES as u64) - CONTROL_PAGES;
        match runs.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => runs.push(start..end),
        }
    }
    Ok(runs)
}
