//! One io_uring and the operations in flight on it.
//!
//! Invariant: an [`Op`] that is dropped before it has ended is cancelled and waited for, so the
//! kernel never touches memory or descriptors that a dropped future lent it.
//! Absent: which task runs when; that is [`super::executor`].

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// Where an operation stands.
enum State {
    Free {
        next: Option<usize>,
    },
    InFlight(Option<Waker>),
    Ended(i32),
    /// A poll that goes on: how often it has fired since it was last asked.
    Polling {
        waker: Option<Waker>,
        fired: bool,
        armed: bool,
        error: i32,
    },
}

/// Operations by index; the index is the completion's `user_data`.
struct Ops {
    states: Vec<State>,
    free: Option<usize>,
}

impl Ops {
    fn insert(&mut self, state: State) -> usize {
        match self.free {
            Some(key) => {
                let State::Free { next } = std::mem::replace(&mut self.states[key], state) else {
                    unreachable!("the free list holds free slots");
                };
                self.free = next;
                key
            }
            None => {
                self.states.push(state);
                self.states.len() - 1
            }
        }
    }

    fn remove(&mut self, key: usize) {
        self.states[key] = State::Free { next: self.free };
        self.free = Some(key);
    }
}

/// Operations that are submitted together. Fewer, and a device that had nothing to do is told of each of them, which
/// costs an exit of a virtual machine; more, and it waits while they are prepared.
const TOGETHER: usize = 8;

/// Bytes of operations that are not kept waiting for others: a device is busy with them for longer than it takes to
/// be told.
const LARGE: usize = 128 << 10;

/// Completions of cancel requests: nobody waits for them.
const CANCEL: u64 = u64::MAX;

/// An io_uring of one thread.
pub(super) struct Ring {
    uring: RefCell<IoUring>,
    ops: RefCell<Ops>,
    /// Operations in flight, those that wait for their submission included.
    in_flight: Cell<usize>,
    /// Bytes of operations that wait for their submission, at most.
    queued_bytes: Cell<usize>,
}

impl Ring {
    /// A ring with room for `entries` submissions between two system calls.
    pub(super) fn new(entries: u32) -> io::Result<Self> {
        // Completions run when this thread asks for them, in its own context: no interrupts of
        // the processor, and the kernel need not lock the ring against other submitters.
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_clamp()
            .build(entries)?;
        Ok(Self {
            uring: RefCell::new(uring),
            ops: RefCell::new(Ops { states: Vec::new(), free: None }),
            in_flight: Cell::new(0),
            queued_bytes: Cell::new(0),
        })
    }

    /// Submits what is queued and waits until at least one operation has ended or fired.
    pub(super) fn wait(&self) -> io::Result<()> {
        self.queued_bytes.set(0);
        loop {
            match self.uring.borrow().submit_and_wait(1) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory or its completion queue is full: reap and go on.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => break,
                Err(error) => return Err(error),
            }
        }
        // A kernel from 6.14 on takes in one completion for a wait that slept, however many there are.
        if self.uring.borrow_mut().submission().taskrun()
            && let Err(error) = self.uring.borrow().submit()
        {
            log::debug!("the rest of the completions is taken in later: {error}");
        }
        self.reap();
        Ok(())
    }

    /// Takes in the completions that are there, without a system call.
    pub(super) fn reap(&self) {
        let mut uring = self.uring.borrow_mut();
        let mut ops = self.ops.borrow_mut();
        for entry in uring.completion() {
            if entry.user_data() == CANCEL {
                continue;
            }
            let key = usize::try_from(entry.user_data()).expect("an index of an operation");
            match &mut ops.states[key] {
                State::InFlight(waker) => {
                    let waker = waker.take();
                    self.in_flight.set(self.in_flight.get() - 1);
                    ops.states[key] = State::Ended(entry.result());
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
                State::Polling { waker, fired, armed, error } => {
                    *fired = true;
                    *error = entry.result().min(0);
                    *armed = cqueue::more(entry.flags());
                    if let Some(waker) = waker {
                        waker.wake_by_ref();
                    }
                }
                State::Free { .. } | State::Ended(_) => unreachable!("a completion of nothing in flight"),
            }
        }
    }

    /// Queues one entry, making room by a system call if the queue is full.
    fn push(&self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: whoever built the entry keeps what it points to alive until the operation has
            // ended: `Op` borrows it and waits in its destructor.
            // JUSTIFICATION: the kernel's interface.
            if unsafe { self.uring.borrow_mut().submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match self.uring.borrow().submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                    self.reap_in_full_queue()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Submits what is queued, unless it is little: then it goes with the next ones, or with the next wait.
    fn submit_soon(&self, bytes: usize) -> io::Result<()> {
        let queued = self.queued_bytes.get().saturating_add(bytes);
        if self.uring.borrow_mut().submission().len() < TOGETHER && queued < LARGE {
            self.queued_bytes.set(queued);
            return Ok(());
        }
        self.queued_bytes.set(0);
        match self.uring.borrow().submit() {
            Ok(_) => Ok(()),
            // The next wait submits it.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn reap_in_full_queue(&self) -> io::Result<()> {
        self.reap();
        match self.uring.borrow().submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn cancel(&self, key: usize) {
        let entry = opcode::AsyncCancel::new(key as u64).build().user_data(CANCEL);
        if let Err(error) = self.push(&entry) {
            log::error!("could not cancel an operation, waiting for it instead: {error}");
        }
    }
}

/// One operation, from its submission to its end. Answers the kernel's result.
///
/// `'a` borrows the memory and the file that the kernel uses meanwhile.
pub(super) struct Op<'a> {
    ring: &'a Ring,
    entry: Option<squeue::Entry>,
    bytes: usize,
    key: usize,
    _lent: PhantomData<&'a mut [u8]>,
}

impl<'a> Op<'a> {
    /// An operation of so many bytes for a device that is queued when first polled.
    ///
    /// # Safety
    /// What `entry` points to lives for `'a`, and the value is not leaked while pending.
    pub(super) unsafe fn new(ring: &'a Ring, entry: squeue::Entry, bytes: usize) -> Self {
        Self { ring, entry: Some(entry), bytes, key: usize::MAX, _lent: PhantomData }
    }
}

impl Future for Op<'_> {
    type Output = io::Result<u32>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<u32>> {
        if let Some(entry) = self.entry.take() {
            let key = self.ring.ops.borrow_mut().insert(State::InFlight(Some(cx.waker().clone())));
            if let Err(error) = self.ring.push(&entry.user_data(key as u64)) {
                self.ring.ops.borrow_mut().remove(key);
                return Poll::Ready(Err(error));
            }
            self.key = key;
            self.ring.in_flight.set(self.ring.in_flight.get() + 1);
            // The operation is queued: from here on an error of the ring is not its own.
            if let Err(error) = self.ring.submit_soon(self.bytes) {
                log::error!("cannot submit to the ring: {error}");
            }
            return Poll::Pending;
        }
        if self.key == usize::MAX {
            return Poll::Ready(Err(io::Error::other("an operation was polled after its end")));
        }
        let mut ops = self.ring.ops.borrow_mut();
        match &mut ops.states[self.key] {
            State::Ended(result) => {
                let result = *result;
                ops.remove(self.key);
                drop(ops);
                self.key = usize::MAX;
                Poll::Ready(to_result(result))
            }
            State::InFlight(waker) => {
                match waker {
                    Some(held) if held.will_wake(cx.waker()) => {}
                    _ => *waker = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            State::Free { .. } | State::Polling { .. } => unreachable!("the slot is this operation's"),
        }
    }
}

impl Drop for Op<'_> {
    fn drop(&mut self) {
        if self.entry.is_some() || self.key == usize::MAX {
            return;
        }
        if matches!(self.ring.ops.borrow().states[self.key], State::InFlight(_)) {
            self.ring.cancel(self.key);
        }
        while matches!(self.ring.ops.borrow().states[self.key], State::InFlight(_)) {
            if let Err(error) = self.ring.wait() {
                // Going on would let the kernel write into memory that is about to be freed.
                log::error!("cannot wait for an operation in flight: {error}");
                std::process::abort();
            }
        }
        self.ring.ops.borrow_mut().remove(self.key);
    }
}

/// A descriptor that is polled for input for as long as this lives, edge-triggered.
///
/// An eventfd that is only polled is never read: each write to it fires again, and its counter
/// cannot run over in the life of a machine. This saves a system call per kick.
pub(super) struct Polling<'a> {
    ring: &'a Ring,
    fd: types::Fd,
    key: usize,
}

impl<'a> Polling<'a> {
    /// Polls `fd`, which the caller keeps open for longer than this.
    pub(super) fn new(ring: &'a Ring, fd: types::Fd) -> Self {
        let state = State::Polling { waker: None, fired: false, armed: false, error: 0 };
        let key = ring.ops.borrow_mut().insert(state);
        Self { ring, fd, key }
    }

    /// Ready when the descriptor had input since the last time this was ready.
    pub(super) fn poll_fired(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let arm = {
            let mut ops = self.ring.ops.borrow_mut();
            let State::Polling { waker, fired, armed, error } = &mut ops.states[self.key] else {
                unreachable!("the slot is this poll's");
            };
            if !waker.as_ref().is_some_and(|held| held.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
            let was_armed = std::mem::replace(armed, true);
            if std::mem::take(fired) {
                *armed = was_armed;
                return Poll::Ready(to_result(std::mem::take(error)).map(drop));
            }
            !was_armed
        };
        if arm {
            let poll = opcode::PollAdd::new(self.fd, libc::POLLIN as u32).multi(true);
            self.ring.push(&poll.build().user_data(self.key as u64))?;
        }
        Poll::Pending
    }
}

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        let armed = |ring: &Ring, key: usize| match &ring.ops.borrow().states[key] {
            State::Polling { armed, .. } => *armed,
            _ => false,
        };
        if armed(self.ring, self.key) {
            self.ring.cancel(self.key);
        }
        while armed(self.ring, self.key) {
            if let Err(error) = self.ring.wait() {
                log::error!("cannot wait for a poll in flight: {error}");
                std::process::abort();
            }
        }
        self.ring.ops.borrow_mut().remove(self.key);
    }
}

/// A completion's result: a count, or a negated errno.
fn to_result(result: i32) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}
