//! What happens when old content cannot be preserved, most often because the difference store is full.
//!
//! The operator says it with each snapshot: the snapshot breaks (the default, which no guest notices), or
//! the guest's change waits for space, or it fails. Of the snapshots that would break together the most
//! protective word counts, so that a later snapshot never takes back what was promised for an older one.
//!
//! ```text
//! pass the gate, freeze, mark, preserve   (fails: claims, buffers and slots were let go)
//! leave the gate                          (so that creations, merges and stops do not wait for this one)
//! wait                                    (for space, for the deadline, for a stop of the queue)
//! from the beginning                      (in the epoch and for the newest snapshot of that time)
//! ```
//!
//! Invariant: a change that waits or fails was not submitted, so no snapshot needed it to be preserved. What
//! was marked for it stays marked: a block that counts as changed and is not. Who waits holds nothing.
//! After the deadline it is tried once more, and what fails then breaks the snapshot, inside the gate: never
//! one that has left the chain meanwhile.
//! A flush of the store that fails breaks the snapshots whatever was said: what they need may be lost.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use cbt::ByteRange;

use crate::disk::{Disk, Event, with_sources};
use crate::error::Error;
use crate::format::SnapshotState;
use crate::gate::{Lane, Pass};
use crate::snapshot::Snapshot;
use crate::storage::Storage;

/// What becomes of a guest's change whose old content cannot be preserved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnOverflow {
    /// The snapshot breaks, and the change is made.
    #[default]
    BreakSnapshot,
    /// The change waits until there is space or the deadline has passed, which breaks the snapshot.
    HoldWrites,
    /// The change fails, and the snapshot stays as it is.
    FailWrites,
}

/// On which terms a snapshot is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// See there.
    pub on_overflow: OnOverflow,
    /// How long a change may wait, in seconds: 1 to [`Terms::MAX_HOLD_SECONDS`].
    pub hold_seconds: u32,
    /// Bytes of old content that the snapshot may hold itself; 0 for any number.
    pub limit: u64,
}

impl Terms {
    /// How long a change may wait at most: a guest's kernel gives up a request some time.
    pub const MAX_HOLD_SECONDS: u32 = 3600;
    /// How long it waits unless said otherwise: Linux's own limit for a request of a SCSI disk.
    pub const HOLD_SECONDS: u32 = 30;
}

impl Default for Terms {
    fn default() -> Self {
        Self { on_overflow: OnOverflow::default(), hold_seconds: Self::HOLD_SECONDS, limit: 0 }
    }
}

/// Why a change waits no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GiveUp {
    /// The deadline has passed, of so many seconds.
    Late(u32),
    /// Its queue is being stopped.
    Stopped,
}

/// A change that cannot be made for now, or at all.
pub(crate) struct Stuck {
    error: Error,
    terms: Terms,
}

impl Stuck {
    /// Why.
    pub(crate) fn into_error(self) -> Error {
        self.error
    }
}

/// How often an operator is told that changes wait or fail.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// Changes that wait for space.
#[derive(Default)]
pub(crate) struct Holds {
    state: Mutex<Waiting>,
    /// Queues that are being stopped.
    hurried: AtomicU32,
}

#[derive(Default)]
struct Waiting {
    /// Counts the times at which there may have come space.
    round: u64,
    wakers: Vec<Waker>,
    held: u64,
    told: Option<Instant>,
}

impl Holds {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There may be space: those who wait try again.
    pub(crate) fn retry(&self) {
        let mut state = self.lock();
        state.round += 1;
        state.wakers.drain(..).for_each(Waker::wake);
    }

    /// Waits for the next round after `seen`; or why to wait no longer.
    async fn wait(
        &self,
        seen: u64,
        seconds: u32,
        mut timer: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<GiveUp> {
        poll_fn(|cx| {
            if self.hurried.load(SeqCst) > 0 {
                return Poll::Ready(Some(GiveUp::Stopped));
            }
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Some(GiveUp::Late(seconds)));
            }
            let mut state = self.lock();
            if state.round != seen {
                return Poll::Ready(None);
            }
            if !state.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.wakers.push(cx.waker().clone());
            }
            // Looked again: who hurries counts first and wakes second.
            if self.hurried.load(SeqCst) > 0 { Poll::Ready(Some(GiveUp::Stopped)) } else { Poll::Pending }
        })
        .await
    }
}

/// Counts a change that waits.
struct Held<'a>(&'a Holds);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.lock().held -= 1;
    }
}

impl<S: Storage> Disk<S> {
    /// Changes of guests that wait for space at this moment.
    pub fn writes_held(&self) -> u64 {
        self.holds.lock().held
    }

    /// While a queue is being stopped no change waits for space: the snapshots that they waited for break.
    ///
    /// Counted: as many calls with `false` as with `true` must follow.
    pub fn hurry(&self, hurry: bool) {
        if hurry {
            self.holds.hurried.fetch_add(1, SeqCst);
            self.holds.retry();
        } else {
            self.holds.hurried.fetch_sub(1, SeqCst);
        }
    }

    /// Passes the gate, and does everything that must have happened before `range` changes.
    ///
    /// # Errors
    /// Only if the operator chose so: what could not be preserved, or that the disk was handed over.
    pub(crate) async fn admit(&self, io: &S, lane: Lane, range: ByteRange) -> Result<Pass<'_>, Error> {
        let pass = self.gate.enter(lane).await;
        self.check_kept()?;
        // Within the gate: the disk becomes smaller behind a closed one.
        self.check(range.start(), range.len())?;
        match self.before_change(io, lane, range, None).await {
            Ok(()) => Ok(pass),
            Err(stuck) => {
                drop(pass);
                Box::pin(self.hold(io, lane, range, stuck)).await
            }
        }
    }

    /// Waits for space, holding nothing, and tries again.
    async fn hold(&self, io: &S, lane: Lane, range: ByteRange, stuck: Box<Stuck>) -> Result<Pass<'_>, Error> {
        let seconds = stuck.terms.hold_seconds;
        let mut timer = Box::pin(io.sleep(Duration::from_secs(seconds.into())));
        let mut give_up = None;
        let mut held = None;
        let mut last = *stuck;
        loop {
            self.tell_overflow(&last);
            if last.terms.on_overflow == OnOverflow::FailWrites {
                return Err(last.error);
            }
            held.get_or_insert_with(|| {
                self.holds.lock().held += 1;
                Held(&self.holds)
            });
            // Before the attempt: space that comes after it begins another round.
            let seen = self.holds.lock().round;
            let pass = self.gate.enter(lane).await;
            self.check_kept()?;
            self.check(range.start(), range.len())?;
            match self.before_change(io, lane, range, give_up).await {
                Ok(()) => return Ok(pass),
                Err(stuck) => last = *stuck,
            }
            drop(pass);
            if last.terms.on_overflow == OnOverflow::HoldWrites {
                give_up = self.holds.wait(seen, seconds, timer.as_mut()).await;
            }
        }
    }

    /// What was to be preserved for `snapshot` was not: breaks it, or says that the change cannot be made.
    pub(crate) async fn give_way(
        &self,
        io: &S,
        snapshot: &Snapshot<S>,
        error: Error,
        give_up: Option<GiveUp>,
    ) -> Result<(), Box<Stuck>> {
        let terms = self.terms_of(snapshot);
        let error = match (terms.on_overflow, give_up) {
            (OnOverflow::BreakSnapshot, _) => error,
            (OnOverflow::HoldWrites, Some(GiveUp::Late(seconds))) => {
                Error::HeldTooLong { seconds, source: Box::new(error) }
            }
            (OnOverflow::HoldWrites, Some(GiveUp::Stopped)) => Error::HoldEnded { source: Box::new(error) },
            (OnOverflow::HoldWrites, None) | (OnOverflow::FailWrites, _) => {
                return Err(Box::new(Stuck { error, terms }));
            }
        };
        self.break_snapshot(io, snapshot, &error).await;
        Ok(())
    }

    /// The most protective terms of those that would break with `snapshot`.
    fn terms_of(&self, snapshot: &Snapshot<S>) -> Terms {
        let mut terms = Terms::default();
        let list = self.chain.now();
        let concerned = list.iter().filter(|one| {
            one.sequence <= snapshot.sequence
                && one.state() != SnapshotState::Deleted
                && one.broken().is_none()
        });
        for one in concerned {
            let other = one.terms();
            if other.on_overflow > terms.on_overflow {
                terms = other;
            } else if other.on_overflow == terms.on_overflow {
                terms.hold_seconds = terms.hold_seconds.max(other.hold_seconds);
            }
        }
        terms
    }

    /// Says that changes wait or fail, now and then.
    fn tell_overflow(&self, stuck: &Stuck) {
        {
            let mut state = self.holds.lock();
            if state.told.is_some_and(|told| told.elapsed() < TELL_EVERY) {
                return;
            }
            state.told = Some(Instant::now());
        }
        let reason = with_sources(&stuck.error);
        let seconds = stuck.terms.hold_seconds;
        let fails = stuck.terms.on_overflow == OnOverflow::FailWrites;
        match fails {
            true => log::error!("{}: writes fail, as was chosen for a snapshot: {reason}", self.name),
            false => log::error!("{}: writes wait up to {seconds} s for space: {reason}", self.name),
        }
        (self.events)(Event::Overflow { disk: self.name.clone(), fails, hold_seconds: seconds, reason });
    }
}
