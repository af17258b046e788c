//! Flushes of one file, one at a time.
//!
//! The kernel tells a failed write-back once, to whichever flush of the descriptor looks first; one that runs at the
//! same time then succeeds over what is lost. So nobody's flush is answered before the result of those that
//! began before it was *acted upon*: whoever poisons the file does it before the next one's turn.
//!
//! Who waits meanwhile shares one flush: many callers cost as many as there are turns.
//!
//! Invariant: an answer of success follows a flush that began after the call, and no failure came before it
//! that the caller's `sync` could not have seen.
//! Absent: what a failure means. `sync` is to note it, and to look for an earlier one's note.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use crate::claims::Claims;

/// See the module.
#[derive(Default)]
pub(crate) struct Flushes {
    turn: Claims,
    begun: AtomicU64,
    /// The last that ended well.
    done: AtomicU64,
}

impl Flushes {
    /// Calls `sync`, unless one has ended well that began after this was called.
    pub(crate) async fn flush<E>(&self, sync: impl AsyncFnOnce() -> Result<(), E>) -> Result<(), E> {
        let before = self.begun.load(SeqCst);
        let _turn = self.turn.claim(0..1).await;
        if self.done.load(SeqCst) > before {
            return Ok(());
        }
        let this = self.begun.fetch_add(1, SeqCst) + 1;
        sync().await?;
        self.done.store(this, SeqCst);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{Future, poll_fn};
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// A flush that lasts until `ended`.
    async fn lasting(begun: &Cell<u32>, ended: &Cell<bool>) -> Result<(), &'static str> {
        begun.set(begun.get() + 1);
        poll_fn(|_| if ended.get() { Poll::Ready(Ok(())) } else { Poll::Pending }).await
    }

    #[test]
    fn those_who_wait_share_the_next_flush_and_not_the_one_that_had_begun() {
        let (flushes, begun, ended) = (Flushes::default(), Cell::new(0), Cell::new(false));
        let one = || flushes.flush(|| lasting(&begun, &ended));
        let (mut first, mut second, mut third) = (pin!(one()), pin!(one()), pin!(one()));
        assert!(poll(first.as_mut()).is_pending());
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        assert_eq!(begun.get(), 1);
        ended.set(true);
        assert_eq!(poll(first.as_mut()), Poll::Ready(Ok(())));
        assert_eq!(poll(second.as_mut()), Poll::Ready(Ok(())));
        assert_eq!(poll(third.as_mut()), Poll::Ready(Ok(())));
        assert_eq!(begun.get(), 2);
    }

    #[test]
    fn a_failure_is_nobody_elses_success() {
        let flushes = Flushes::default();
        let mut failing = pin!(flushes.flush(async || Err("lost")));
        assert_eq!(poll(failing.as_mut()), Poll::Ready(Err("lost")));
        let mut next = pin!(flushes.flush(async || Err("poisoned")));
        assert_eq!(poll(next.as_mut()), Poll::Ready(Err("poisoned")));
    }
}
