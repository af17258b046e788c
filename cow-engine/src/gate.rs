//! The gate that every change of a disk passes, and that closes for the instant of a snapshot.
//!
//! Invariant: while the gate is closed and [`Gate::close`] has answered, no change is between
//! entering and completing. Reads do not pass here.
//! Lanes keep queues from sharing a cache line: a queue enters and leaves on its own counter.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize};
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use crate::storage::Storage;

/// Counters of a gate. More queues than these share them, which costs speed only.
pub(crate) const LANES: usize = 64;

/// The counter that one queue uses.
#[derive(Clone, Copy, Debug)]
pub struct Lane(usize);

impl Lane {
    /// Below [`LANES`].
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

#[repr(align(128))]
#[derive(Default)]
struct Counter(AtomicU32);

#[derive(Default)]
struct Waiting {
    changes: Vec<Waker>,
    closer: Option<Waker>,
}

/// See the module.
pub(crate) struct Gate {
    closed: AtomicBool,
    inside: Box<[Counter]>,
    waiting: Mutex<Waiting>,
    next_lane: AtomicUsize,
}

/// A gate that is closed; opens when dropped.
pub(crate) struct Closed<'a> {
    gate: &'a Gate,
}

impl<'a> Closed<'a> {
    /// Counts in who holds the gate closed, to change the disk itself. To be dropped before the gate opens.
    pub(crate) fn pass(&self, lane: Lane) -> Pass<'a> {
        self.gate.inside[lane.0].0.fetch_add(1, SeqCst);
        Pass { gate: self.gate, lane }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.open();
    }
}

/// The right to change the disk; ends when dropped.
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    lane: Lane,
}

impl Gate {
    /// An open gate.
    pub(crate) fn new() -> Self {
        Self {
            closed: AtomicBool::new(false),
            inside: (0..LANES).map(|_| Counter::default()).collect(),
            waiting: Mutex::default(),
            next_lane: AtomicUsize::new(0),
        }
    }

    /// A counter for one more queue.
    pub(crate) fn lane(&self) -> Lane {
        Lane(self.next_lane.fetch_add(1, SeqCst) % LANES)
    }

    /// Waits while the gate is closed, then counts the caller in.
    pub(crate) async fn enter(&self, lane: Lane) -> Pass<'_> {
        loop {
            if let Some(pass) = self.try_enter(lane) {
                return pass;
            }
            poll_fn(|cx| {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if !self.closed.load(SeqCst) {
                    return Poll::Ready(());
                }
                waiting.changes.push(cx.waker().clone());
                Poll::Pending
            })
            .await;
        }
    }

    fn try_enter(&self, lane: Lane) -> Option<Pass<'_>> {
        // Counted first, looked second; the closer closes first and counts second. Whichever of the
        // two comes later in the one order of SeqCst sees the other.
        self.inside[lane.0].0.fetch_add(1, SeqCst);
        let pass = Pass { gate: self, lane };
        if self.closed.load(SeqCst) { None } else { Some(pass) }
    }

    /// Closes the gate and waits until nobody is inside. [`Gate::open`] must follow, also if the
    /// future is dropped before it is ready.
    pub(crate) fn close(&self) -> impl Future<Output = ()> {
        self.closed.store(true, SeqCst);
        poll_fn(|cx| {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.closer = Some(cx.waker().clone());
            // A counter read as zero stays without a pass: whoever comes now sees the gate closed.
            if self.is_empty() {
                waiting.closer = None;
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
    }

    /// Whether nobody was inside, lane by lane: who came meanwhile may have been passed over.
    pub(crate) fn is_empty(&self) -> bool {
        self.inside.iter().all(|lane| lane.0.load(SeqCst) == 0)
    }

    /// Closes the gate, if those inside leave within `limit`. It opens again when the answer is dropped.
    pub(crate) async fn close_within<S: Storage>(&self, io: &S, limit: Duration) -> Option<Closed<'_>> {
        let closed = Closed { gate: self };
        let mut closing = pin!(self.close());
        let mut timer = pin!(io.sleep(limit));
        poll_fn(|cx| {
            if closing.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Some(()));
            }
            timer.as_mut().poll(cx).map(|()| None)
        })
        .await
        .map(|()| closed)
    }

    /// Opens the gate and lets in who waited.
    pub(crate) fn open(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(false, SeqCst);
        waiting.closer = None;
        for waker in waiting.changes.drain(..) {
            waker.wake();
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.inside[self.lane.0].0.fetch_sub(1, SeqCst);
        if self.gate.closed.load(SeqCst) {
            let waiting = self.gate.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(closer) = &waiting.closer {
                closer.wake_by_ref();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Context;

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn the_gate_waits_for_those_inside_and_keeps_others_out() {
        let gate = Gate::new();
        let (a, b) = (gate.lane(), gate.lane());
        let Poll::Ready(inside) = poll(pin!(gate.enter(a))) else { panic!("an open gate lets in") };
        let mut closing = pin!(gate.close());
        assert!(poll(closing.as_mut()).is_pending());
        let mut late = pin!(gate.enter(b));
        assert!(poll(late.as_mut()).is_pending());
        drop(inside);
        assert!(poll(closing.as_mut()).is_ready());
        assert!(poll(late.as_mut()).is_pending());
        gate.open();
        assert!(poll(late.as_mut()).is_ready());
    }

    #[test]
    fn no_change_is_inside_a_closed_gate_under_load() {
        let gate = Gate::new();
        let inside = AtomicU32::new(0);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let lane = gate.lane();
                    while !stop.load(SeqCst) {
                        if let Some(pass) = gate.try_enter(lane) {
                            inside.fetch_add(1, SeqCst);
                            inside.fetch_sub(1, SeqCst);
                            drop(pass);
                        }
                    }
                });
            }
            for _ in 0..2000 {
                let mut closing = pin!(gate.close());
                while poll(closing.as_mut()).is_pending() {
                    std::hint::spin_loop();
                }
                assert_eq!(inside.load(SeqCst), 0);
                gate.open();
            }
            stop.store(true, SeqCst);
        });
    }
}
