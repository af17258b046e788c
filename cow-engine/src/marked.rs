//! Which pages of the change map may hold marks. Of a large disk few do, and the others are not read.
//!
//! A bit for each page is set before something in it is marked. What was marked before the map was mapped is looked for
//! once, among the parts of its file that are no holes; until that has been done, and where it cannot be, every page may
//! hold marks.
//!
//! A disk that grows has a map of more pages, and shares the bits of those that it had: a change that is on its way
//! marks through the map of the old size, however late.
//!
//! Invariant: a page that held a mark at an instant is told whenever somebody asks after it. A bit is never taken
//! back, so a page whose marks were cleared is told too.
//! Absent: what is in the pages; and frozen ones, since a page is frozen because it is about to be marked.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};

use cbt::PageIndex;

use crate::disk::Disk;
use crate::error::Error;
use crate::format::MAP_FILE;
use crate::storage::Storage;
use crate::tracker::Tracker;
use crate::walk;

/// Words that maps of several sizes share together: those of 32,768 pages.
const WORDS: usize = 512;

/// See the module.
pub(crate) struct Marked {
    pages: u64,
    words: Box<[Arc<[AtomicU64; WORDS]>]>,
    /// The words have what was marked earlier, too.
    complete: Arc<AtomicBool>,
}

impl Marked {
    pub(crate) fn new(pages: u64) -> Self {
        Self { pages: 0, words: Box::default(), complete: Arc::default() }.grown(pages)
    }

    /// Of a map that has as many pages, of which the first ones are the same. Whoever lets others see it notes first
    /// what may be marked in the others.
    pub(crate) fn grown(&self, pages: u64) -> Self {
        let more = std::iter::repeat_with(|| Arc::new([const { AtomicU64::new(0) }; WORDS]));
        let count = place(pages.div_ceil(64).div_ceil(WORDS as u64));
        let words = self.words.iter().cloned().chain(more).take(count).collect();
        Self { pages, words, complete: self.complete.clone() }
    }

    /// Notes pages that are about to be marked. Whoever sees a mark that a gate has published sees this.
    pub(crate) fn note(&self, pages: Range<PageIndex>) {
        for page in pages {
            let (word, bit) = (self.word(page), 1 << (page % 64));
            // Nearly always set: the line stays shared between the queues' processors.
            if word.load(Relaxed) & bit == 0 {
                word.fetch_or(bit, Relaxed);
            }
        }
    }

    /// Everything that was marked earlier is noted now.
    pub(crate) fn complete(&self) {
        self.complete.store(true, Release);
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Acquire)
    }

    /// Runs of pages within `pages`, in order and apart from each other.
    pub(crate) fn runs(&self, pages: Range<PageIndex>) -> impl Iterator<Item = Range<PageIndex>> + '_ {
        let (all, mut at) = (!self.is_complete(), pages.start);
        std::iter::from_fn(move || {
            let start = if all { at } else { self.next(at, pages.end, true) };
            if start >= pages.end {
                return None;
            }
            at = if all { pages.end } else { self.next(start, pages.end, false) };
            Some(start..at)
        })
    }

    /// The first page from `at` on that is marked, or is not; `end` if there is none.
    fn next(&self, mut at: PageIndex, end: PageIndex, marked: bool) -> PageIndex {
        while at < end {
            let word = self.word(at).load(Relaxed);
            let wanted = (if marked { word } else { !word }) >> (at % 64);
            if wanted != 0 {
                return end.min(at + u64::from(wanted.trailing_zeros()));
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn word(&self, page: PageIndex) -> &AtomicU64 {
        debug_assert!(page < self.pages);
        let word = place(page / 64);
        &self.words[word / WORDS][word % WORDS]
    }
}

/// The number of pages is a usize.
fn place(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

impl<S: Storage> Disk<S> {
    /// Looks for what was marked before the disk was opened, if nobody has. To be called once at leisure, so that
    /// no question waits for it.
    pub async fn look_for_marks(&self, io: &S) {
        if let Some(tracker) = self.watch.tracker() {
            self.look_for_marks_in(io, &tracker).await;
        }
    }

    pub(crate) async fn look_for_marks_in(&self, io: &S, tracker: &Tracker<S::Cells>) {
        if !tracker.marked().is_complete()
            && let Err(error) = self.find_marks(io, tracker).await
        {
            log::debug!("{}: every page of the change map is read: {error}", self.name);
        }
    }

    /// Notes all pages that are no holes of the map's file.
    async fn find_marks(&self, io: &S, tracker: &Tracker<S::Cells>) -> Result<(), Error> {
        // First: there are file systems that take what was stored through a mapping, and is not written yet, for
        // a hole. What no flush could write may pass for one ever after; but once one has failed nothing that was marked
        // before is told any more.
        self.sync_map(io, &self.map_cells()).await?;
        let map = io.open(&self.dir, MAP_FILE).map_err(Error::io("opening the change map"))?;
        for part in walk::strides(tracker.page_count()) {
            let touched = walk::touched(io, &map, part);
            for run in touched.map_err(Error::io("looking for holes of the change map"))? {
                tracker.marked().note(run);
            }
        }
        tracker.marked().complete();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn until_it_was_looked_for_every_page_may_be_marked() {
        let marked = Marked::new(200);
        marked.note(3..4);
        assert!(marked.runs(1..199).flatten().eq(1..199));
        marked.complete();
        assert!(marked.runs(1..199).flatten().eq(3..4));
    }

    #[test]
    fn pages_that_were_there_before_are_shared() {
        let old = Marked::new(70);
        old.complete();
        old.note(1..2);
        let new = old.grown(40_000);
        new.note(70..71);
        new.note(39_999..40_000);
        // As by a change that was on its way.
        old.note(69..70);
        assert!(new.runs(0..40_000).flatten().eq([1, 69, 70, 39_999]));
        let later = Marked::new(70);
        let new = later.grown(71);
        later.complete();
        assert!(new.is_complete(), "what was looked for meanwhile");
    }

    proptest! {
        #[test]
        fn runs_are_what_was_noted(
            notes in prop::collection::vec((0u64..300, 1u64..90), 0..12), start in 0u64..300, len in 0u64..300,
        ) {
            let marked = Marked::new(300);
            let mut model = [false; 300];
            for (first, count) in notes {
                let run = first..300.min(first + count);
                marked.note(run.clone());
                run.for_each(|page| model[usize::try_from(page).unwrap()] = true);
            }
            marked.complete();
            let asked = start..300.min(start + len);
            let runs: Vec<_> = marked.runs(asked.clone()).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            let want: Vec<_> = asked.filter(|&page| model[usize::try_from(page).unwrap()]).collect();
            prop_assert_eq!(runs.into_iter().flatten().collect::<Vec<_>>(), want);
        }
    }
}
