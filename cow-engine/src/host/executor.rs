//! Tasks of one thread, driven by the completions of its ring.
//!
//! Invariant: tasks run on the thread that made the executor, first woken first run. A wake from
//! another thread goes through a list and an eventfd that the ring polls.
//! Absent: time slices and fairness beyond first in, first out: a task that does not wait is run
//! to completion.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::ThreadId;

use io_uring::types;
use rustix::event::{EventfdFlags, eventfd};

use super::ring::{Polling, Ring};
use super::storage::HostStorage;

thread_local! {
    /// Tasks of this thread's executor that may run, in the order they were woken.
    static READY: RefCell<VecDeque<usize>> = const { RefCell::new(VecDeque::new()) };
}

/// The future that `block_on` drives; spawned tasks count from zero.
const MAIN: usize = usize::MAX;

/// What other threads reach of an executor.
struct Remote {
    thread: ThreadId,
    woken: Mutex<Vec<usize>>,
    doorbell: OwnedFd,
}

/// Wakes one task; made once per task.
struct TaskWaker {
    task: usize,
    /// Woken and not polled since.
    queued: AtomicBool,
    remote: Arc<Remote>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if std::thread::current().id() == self.remote.thread {
            READY.with_borrow_mut(|ready| ready.push_back(self.task));
            return;
        }
        let mut woken = self.remote.woken.lock().unwrap_or_else(PoisonError::into_inner);
        woken.push(self.task);
        if woken.len() == 1 {
            // Fails only when the counter is full, and then the executor is awake anyway.
            #[allow(clippy::host_endian_bytes, reason = "an eventfd counts in the host's byte order")]
            let _ = rustix::io::write(&self.remote.doorbell, &1u64.to_ne_bytes());
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    /// Absent while it is polled, and after its end.
    task: Option<Task>,
    notify: Arc<TaskWaker>,
    waker: Waker,
}

pub(super) struct Inner {
    pub(super) ring: Ring,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<usize>>,
    remote: Arc<Remote>,
    main: Arc<TaskWaker>,
    driving: Cell<bool>,
}

/// A single-threaded executor on its own io_uring.
///
/// Costs nothing per operation but the operation: tasks are made once (a worker keeps one per
/// request slot) and wakers once per task. One executor per thread.
pub struct Executor {
    inner: Rc<Inner>,
}

/// Says what may be done about an io_uring that cannot be had.
fn explained(error: io::Error) -> io::Error {
    let why = match error.kind() {
        io::ErrorKind::OutOfMemory => "the limit of locked memory (RLIMIT_MEMLOCK) is too small",
        _ => "this needs Linux 6.1 or later, and that nothing forbids it (kernel.io_uring_disabled, seccomp)",
    };
    io::Error::new(error.kind(), format!("cannot start an io_uring: {why}: {error}"))
}

impl Executor {
    /// An executor for this thread, with room for `entries` submissions between system calls.
    ///
    /// # Errors
    /// Those of `io_uring_setup`: an old kernel (below 6.1), a seccomp filter, a limit.
    pub fn new(entries: u32) -> io::Result<Self> {
        let remote = Arc::new(Remote {
            thread: std::thread::current().id(),
            woken: Mutex::new(Vec::new()),
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let main = Arc::new(TaskWaker { task: MAIN, queued: AtomicBool::new(false), remote: remote.clone() });
        let inner = Inner {
            ring: Ring::new(entries).map_err(explained)?,
            slots: RefCell::default(),
            free: RefCell::default(),
            remote,
            main,
            driving: Cell::new(false),
        };
        Ok(Self { inner: Rc::new(inner) })
    }

    /// The storage whose operations this executor drives.
    pub fn storage(&self) -> HostStorage {
        HostStorage::new(self.inner.clone())
    }

    /// Starts a task; it runs when [`Executor::block_on`] next gives it a turn, and is dropped
    /// with the executor if it has not ended.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let free = self.inner.free.borrow_mut().pop();
        let mut slots = self.inner.slots.borrow_mut();
        let index = free.unwrap_or(slots.len());
        let notify = Arc::new(TaskWaker {
            task: index,
            queued: AtomicBool::new(false),
            remote: self.inner.remote.clone(),
        });
        let waker = Waker::from(notify.clone());
        waker.wake_by_ref();
        let slot = Slot { task: Some(Box::pin(task)), notify, waker };
        if index == slots.len() {
            slots.push(slot);
        } else {
            slots[index] = slot;
        }
    }

    /// Drives tasks and `future` until `future` is ready.
    ///
    /// # Panics
    /// If called from within one of its own tasks, or if the ring fails for good.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        assert!(!self.inner.driving.replace(true), "block_on within a task of the same executor");
        let mut future = pin!(future);
        let inner = &self.inner;
        let mut doorbell = Polling::new(&inner.ring, types::Fd(inner.remote.doorbell.as_raw_fd()));
        let doorbell_waker = Waker::noop();
        let main = Waker::from(inner.main.clone());
        main.wake_by_ref();
        let answer = 'drive: loop {
            while let Some(task) = READY.with_borrow_mut(VecDeque::pop_front) {
                if task == MAIN {
                    inner.main.queued.store(false, Ordering::Release);
                    if let Poll::Ready(answer) = future.as_mut().poll(&mut Context::from_waker(&main)) {
                        break 'drive answer;
                    }
                } else {
                    inner.run(task);
                }
            }
            let rung = doorbell.poll_fired(&mut Context::from_waker(doorbell_waker));
            match rung {
                Poll::Ready(Ok(())) => {
                    inner.take_remote();
                    continue;
                }
                Poll::Ready(Err(error)) => panic!("the ring refused its own doorbell: {error}"),
                Poll::Pending => {}
            }
            if READY.with_borrow(VecDeque::is_empty) {
                inner.ring.wait().expect("a thread waits on its own ring");
            }
        };
        drop(doorbell);
        inner.driving.set(false);
        answer
    }

    /// Whether a task waits for its turn. A task may use it to see if it is the last of a round.
    pub fn is_busy(&self) -> bool {
        READY.with_borrow(|ready| !ready.is_empty())
    }

    /// Takes in completions that are there, without a system call, and wakes their tasks.
    pub fn reap(&self) {
        self.inner.ring.reap();
    }

    /// Watches a descriptor for input, edge-triggered, without ever reading it; see [`Watch`].
    pub fn watch<F: AsFd>(&self, fd: F) -> Watch<F> {
        Watch::new(self.inner.clone(), fd)
    }
}

impl Inner {
    fn run(&self, index: usize) {
        let (mut task, waker) = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[index];
            slot.notify.queued.store(false, Ordering::Release);
            let Some(task) = slot.task.take() else { return };
            (task, slot.waker.clone())
        };
        match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => self.slots.borrow_mut()[index].task = Some(task),
            Poll::Ready(()) => {
                drop(task);
                self.free.borrow_mut().push(index);
            }
        }
    }

    fn take_remote(&self) {
        let mut woken = self.remote.woken.lock().unwrap_or_else(PoisonError::into_inner);
        READY.with_borrow_mut(|ready| ready.extend(woken.drain(..)));
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // Tasks hold storages, which hold `inner`: end them here, or neither would ever go.
        // Their destructors wait for what they have in flight.
        let tasks: Vec<_> = self.inner.slots.borrow_mut().iter_mut().map(|slot| slot.task.take()).collect();
        drop(tasks);
        READY.with_borrow_mut(VecDeque::clear);
    }
}

/// A descriptor watched for input, edge-triggered: [`Watch::fired`] is ready once for any number of
/// events since the last time. The descriptor is only polled, never read.
pub struct Watch<F: AsFd> {
    // Dropped in this order: the poll ends before the descriptor closes.
    polling: Option<Polling<'static>>,
    _inner: Rc<Inner>,
    _fd: F,
}

impl<F: AsFd> Watch<F> {
    fn new(inner: Rc<Inner>, fd: F) -> Self {
        let raw = types::Fd(BorrowedFd::as_raw_fd(&fd.as_fd()));
        // SAFETY: the ring lives in `inner`, which this value holds for longer than `polling`
        // (fields drop in order), and its address is fixed by the `Rc`.
        // JUSTIFICATION: a watch is kept in tasks that must be 'static.
        let ring: &'static Ring = unsafe { &*std::ptr::from_ref(&inner.ring) };
        Self { polling: Some(Polling::new(ring, raw)), _inner: inner, _fd: fd }
    }

    /// Ready when the descriptor had input since this was last ready.
    pub fn poll_fired(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.polling {
            Some(polling) => polling.poll_fired(cx),
            None => Poll::Pending,
        }
    }

    /// Waits until the descriptor had input since this was last ready.
    pub async fn fired(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_fired(cx)).await
    }
}

impl<F: AsFd> Drop for Watch<F> {
    fn drop(&mut self) {
        self.polling = None;
    }
}
