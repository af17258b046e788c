//! Claims on runs of keys: look-up, copy and publication of a grain are one critical section.
//!
//! Invariant: no two live claims overlap. Whoever waits for a claim holds none, so nobody waits in
//! a circle. Readers never claim.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

#[derive(Default)]
struct Held {
    /// As many as requests in flight, so a walk is cheap.
    runs: Vec<Range<u64>>,
    waiting: Vec<Waker>,
}

/// Runs that are being worked on.
#[derive(Default)]
pub(crate) struct Claims {
    held: Mutex<Held>,
}

/// A run that only its holder works on; ends when dropped.
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    run: Range<u64>,
}

impl Claims {
    /// Claims the longest free part of `run` that begins at its start, waiting until there is one.
    ///
    /// # Panics
    /// If `run` is empty.
    pub(crate) async fn claim(&self, run: Range<u64>) -> Claim<'_> {
        assert!(!run.is_empty(), "a claim is on something");
        poll_fn(|cx| {
            let mut held = self.lock();
            let mut end = run.end;
            for other in &held.runs {
                if other.contains(&run.start) {
                    held.waiting.push(cx.waker().clone());
                    return Poll::Pending;
                }
                if other.start > run.start {
                    end = end.min(other.start);
                }
            }
            let run = run.start..end;
            held.runs.push(run.clone());
            Poll::Ready(Claim { claims: self, run })
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim<'_> {
    /// What is claimed.
    pub(crate) fn run(&self) -> Range<u64> {
        self.run.clone()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.lock();
        let at = held.runs.iter().position(|run| *run == self.run);
        if let Some(at) = at {
            held.runs.swap_remove(at);
        }
        for waker in held.waiting.drain(..) {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_claim_ends_where_another_begins() {
        let claims = Claims::default();
        let Poll::Ready(first) = poll(pin!(claims.claim(5..8))) else { panic!("free") };
        let Poll::Ready(second) = poll(pin!(claims.claim(2..10))) else { panic!("its start is free") };
        assert_eq!((first.run(), second.run()), (5..8, 2..5));
    }

    #[test]
    fn who_wants_a_claimed_key_waits_for_its_release() {
        let claims = Claims::default();
        let Poll::Ready(first) = poll(pin!(claims.claim(5..8))) else { panic!("free") };
        let mut second = pin!(claims.claim(7..9));
        assert!(poll(second.as_mut()).is_pending());
        drop(first);
        let Poll::Ready(second) = poll(second) else { panic!("released") };
        assert_eq!(second.run(), 7..9);
    }
}
