//! The sign of life: words of the map's control page that outlive the process without an I/O.
//!
//! Two slots are written in turn, each with a count and a checksum, so a stop in the midst of one leaves the
//! other. The word *quiet* is the checksum of the slot that it belongs to: it says that nothing was in flight when
//! the image's time of change was asked, and that nothing came since.
//!
//! ```text
//! a change:  counted inside the gate → the word looked at, and cleared if need be → submitted
//! a beat:    the word "arming" → nobody inside the gate? → the image asked → the slot → the word, if still "arming"
//! ```
//!
//! Whichever of "counted" and "arming" comes later in the one order of SeqCst sees the other: a change that
//! is not counted when the beat looks comes to the word later, and clears it.
//!
//! Invariant: while the word names a slot, the image's time of change is the slot's.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

use cbt::Cells;

use crate::format::checksum;
use crate::tracker::Control;

/// How long after its last sign of life a daemon may have changed the image itself, in nanoseconds: signs come
/// once a second, and a thread may have to wait for its processor.
pub(crate) const GRACE_NS: i64 = 5_000_000_000;

/// The control word that says whether everything is quiet.
pub(crate) const QUIET: usize = 16;
/// The control words of the slots.
pub(crate) const SLOTS: [usize; 2] = [24, 32];
/// Words of a slot: a count, twice two halves of a number, and a checksum.
pub(crate) const SLOT_WORDS: usize = 6;
/// A beat is looking whether it is quiet.
const ARMING: u32 = 1;

/// The last sign of life that a daemon gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    /// When, in nanoseconds since 1970.
    pub(crate) at_ns: i64,
    /// The image's time of change then.
    pub(crate) mtime_ns: i64,
    /// Nothing was changed since.
    pub(crate) quiet: bool,
}

impl Note {
    /// Whether an image that has this time of change now was changed by somebody else.
    pub(crate) fn tells_change(&self, mtime_ns: i64) -> bool {
        let later = mtime_ns > self.at_ns.saturating_add(GRACE_NS);
        mtime_ns != self.mtime_ns && (self.quiet || mtime_ns < self.mtime_ns || later)
    }
}

/// A slot's words but the checksum.
type Body = [u32; SLOT_WORDS - 1];

fn body_of(count: u32, at_ns: i64, mtime_ns: i64) -> Body {
    let halves = |number: i64| {
        let bytes = number.to_le_bytes();
        let (low, high) = bytes.split_at(4);
        [low, high].map(|half| u32::from_le_bytes(half.try_into().unwrap_or_default()))
    };
    let ([at_low, at_high], [mtime_low, mtime_high]) = (halves(at_ns), halves(mtime_ns));
    [count, at_low, at_high, mtime_low, mtime_high]
}

fn number(low: u32, high: u32) -> i64 {
    (u64::from(low) | u64::from(high) << 32).cast_signed()
}

/// Never what the word *quiet* may hold otherwise.
fn checksum_of(boot: &[u8; 16], slot: usize, body: &Body) -> u32 {
    let bytes = body.map(u32::to_le_bytes);
    let place = [u8::try_from(slot).unwrap_or(u8::MAX)];
    checksum(&[b"note", boot, &place, bytes.as_flattened()]).get() | 2
}

impl<C: Cells> Control<C> {
    /// The last sign of life in `boot`; `None` if there is none that is whole.
    pub(crate) fn note(&self, boot: &[u8; 16]) -> Option<Note> {
        let (_, body, tag) = self.newest_note(boot)?;
        let [_, at_low, at_high, mtime_low, mtime_high] = body;
        let (at_ns, mtime_ns) = (number(at_low, at_high), number(mtime_low, mtime_high));
        Some(Note { at_ns, mtime_ns, quiet: self.quiet().load(SeqCst) == tag })
    }

    /// The slot that counts: which one, what it says, its checksum.
    fn newest_note(&self, boot: &[u8; 16]) -> Option<(usize, Body, u32)> {
        let read = |slot: usize| {
            let word = |nth: usize| self.word(SLOTS[slot] + nth).load(SeqCst);
            let body: Body = std::array::from_fn(word);
            let tag = word(SLOT_WORDS - 1);
            (tag == checksum_of(boot, slot, &body)).then_some((slot, body, tag))
        };
        match (read(0), read(1)) {
            // Counts go on from each other, modulo 2^32.
            (Some(a), Some(b)) if b.1[0].wrapping_sub(a.1[0]).cast_signed() > 0 => Some(b),
            (a, b) => a.or(b),
        }
    }

    /// Writes a sign of life over the older one; its checksum.
    pub(crate) fn give_sign(&self, boot: &[u8; 16], at_ns: i64, mtime_ns: i64) -> u32 {
        let (slot, count) = match self.newest_note(boot) {
            Some((slot, body, _)) => (1 - slot, body[0].wrapping_add(1)),
            None => (0, 0),
        };
        let body = body_of(count, at_ns, mtime_ns);
        let tag = checksum_of(boot, slot, &body);
        for (nth, word) in body.into_iter().chain([tag]).enumerate() {
            self.word(SLOTS[slot] + nth).store(word, SeqCst);
        }
        tag
    }

    /// Something is about to change the image. Inside the gate, before it is submitted.
    pub(crate) fn stir(&self) {
        if self.quiet().load(SeqCst) != 0 {
            self.quiet().store(0, SeqCst);
        }
    }

    /// Begins to look whether it is quiet.
    pub(crate) fn arm(&self) {
        self.quiet().store(ARMING, SeqCst);
    }

    /// Ends that: quiet as of the slot with this checksum, or not. Answers whether it is.
    pub(crate) fn settle(&self, tag: Option<u32>) -> bool {
        let settled = self.quiet().compare_exchange(ARMING, tag.unwrap_or(0), SeqCst, SeqCst);
        settled.is_ok() && tag.is_some()
    }

    fn quiet(&self) -> &AtomicU32 {
        self.word(QUIET)
    }
}

/// Whether a control word means something only while the disk is served, and differs from beat to beat.
pub(crate) fn is_of_a_note(word: usize) -> bool {
    word == QUIET || SLOTS.iter().any(|&slot| (slot..slot + SLOT_WORDS).contains(&word))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::tracker::CONTROL_CELLS;

    const BOOT: [u8; 16] = [3; 16];
    const SECOND: i64 = 1_000_000_000;

    fn control() -> Control<Box<[AtomicU32]>> {
        let cells: Box<[AtomicU32]> = (0..CONTROL_CELLS).map(|_| AtomicU32::new(0)).collect();
        Control::new(Arc::new(cells))
    }

    #[test]
    fn the_newer_sign_counts_and_a_torn_one_leaves_the_older() {
        let control = control();
        assert_eq!(control.note(&BOOT), None);
        for at in 1..6 {
            control.give_sign(&BOOT, at * SECOND, -at);
            let note = Note { at_ns: at * SECOND, mtime_ns: -at, quiet: false };
            assert_eq!(control.note(&BOOT), Some(note));
        }
        assert_eq!(control.note(&[4; 16]), None, "a sign of another boot");
        // The fifth is in the first slot.
        control.word(SLOTS[0] + 2).fetch_xor(1 << 7, SeqCst);
        assert_eq!(control.note(&BOOT).map(|note| note.mtime_ns), Some(-4));
        control.word(SLOTS[1] + 5).fetch_xor(1, SeqCst);
        assert_eq!(control.note(&BOOT), None);
    }

    #[test]
    fn quiet_ends_with_the_first_change() {
        let control = control();
        control.arm();
        let tag = control.give_sign(&BOOT, 0, 5);
        assert!(control.settle(Some(tag)));
        assert!(control.note(&BOOT).is_some_and(|note| note.quiet));
        control.stir();
        assert!(control.note(&BOOT).is_some_and(|note| !note.quiet));
        control.arm();
        let tag = control.give_sign(&BOOT, 0, 6);
        control.stir();
        assert!(!control.settle(Some(tag)), "a change came in between");
        assert!(control.note(&BOOT).is_some_and(|note| !note.quiet));
    }

    #[test]
    fn what_the_daemon_may_have_done_itself_is_no_change() {
        let note = |quiet| Note { at_ns: 100 * SECOND, mtime_ns: 90 * SECOND, quiet };
        for (mtime, busy, idle) in [
            (90 * SECOND, false, false),
            (90 * SECOND + 1, false, true),
            (100 * SECOND, false, true),
            (100 * SECOND + GRACE_NS, false, true),
            (100 * SECOND + GRACE_NS + 1, true, true),
            (90 * SECOND - 1, true, true),
        ] {
            assert_eq!(note(false).tells_change(mtime), busy, "{mtime}");
            assert_eq!(note(true).tells_change(mtime), idle, "{mtime}");
        }
        // Who set the time to the year 2100 before has done nothing since.
        let ahead = Note { at_ns: 100 * SECOND, mtime_ns: 4_102_444_800 * SECOND, quiet: false };
        assert!(!ahead.tells_change(ahead.mtime_ns));
    }
}
