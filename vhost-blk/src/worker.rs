//! One queue's thread: takes chains off the ring, runs them to completion, returns them.
//!
//! The thread is one executor on one io_uring, which carries the requests, the kick and the wakes of
//! the control thread, so that an idle queue waits in one system call. Its main future ([`Duty`])
//! takes chains in batches and hands each to an idle slot, a task that lives as long as the thread.
//! Slots return their chains; [`Duty`], which runs behind all slots that were ready, shows them to
//! the driver together. A slot shows them itself when a few have gathered and the driver sleeps, so
//! that guest and server overlap even if a whole batch completes on the spot.
//!
//! Invariant: a ring is stopped or parked only when no chain of it is in flight; an answer to the
//! control thread says so. Nothing here blocks but the executor's wait.
//! Absent: the in-flight region. Its record belongs where [`Duty::take_batch`] hands a chain to a
//! slot, its clearing where [`Queue::finish`] returns it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cow_engine::Durability;
use cow_engine::host::{Executor, HostStorage, Watch};

use crate::backend::Backend;
use crate::counters::QueueCounters;
use crate::events::{Event, Quiet};
use crate::guest_mem::Memory;
use crate::request::{self, Request, RequestError, Rules, STATUS_IOERR, STATUS_OK, ZeroRange};
use crate::ring::{Addresses, Chain, Ring, RingError, Shape};
use crate::threads;

/// Submissions that fit between two system calls.
const RING_ENTRIES: u32 = 256;

/// Completions after which a slot shows them to the driver without waiting for the rest of its batch.
/// Fewer overlap guest and server better, and wake the guest more often.
const SHOW_EVERY: u32 = 8;

/// Longest look at an idle ring before the thread sleeps: about what a sleep and a kick cost both sides.
const MAX_SPIN: Duration = Duration::from_micros(20);

/// A sleep longer than this would not have been saved by looking longer.
const SHORT_SLEEP: Duration = Duration::from_micros(40);

/// What all queues of a device share.
pub(crate) struct Common<B> {
    /// The disk's name.
    pub(crate) name: String,
    pub(crate) backend: B,
    /// What `GET_ID` answers.
    pub(crate) id: [u8; request::ID_BYTES],
    /// Writes are durable when answered.
    pub(crate) write_through: AtomicBool,
    /// By queue.
    pub(crate) counters: Box<[QueueCounters]>,
}

/// A ring to start.
pub(crate) struct Setup {
    pub(crate) memory: Arc<Memory>,
    pub(crate) addresses: Addresses,
    pub(crate) shape: Shape,
    /// The available index to go on from.
    pub(crate) base: u16,
    pub(crate) rules: Rules,
    pub(crate) kick: Event,
    pub(crate) call: Option<Event>,
    pub(crate) err: Option<Event>,
}

/// What the control thread asks of a queue's thread.
enum Command {
    Start(Box<Setup>, Sender<Result<(), RingError>>),
    /// Another memory generation, or another place in it. The second answer comes when the old
    /// generation is not used any more.
    Place(Arc<Memory>, Option<Addresses>, Sender<Result<(), RingError>>, Sender<()>),
    Kick(Event),
    Call(Option<Event>),
    Err(Option<Event>),
    /// Take requests, or park; the answer comes when parked.
    Enable(bool, Sender<()>),
    /// Return what is in flight and let the ring go; answers where the driver's index stood.
    Stop(Sender<Option<u16>>),
    Quit,
}

/// Commands on their way.
#[derive(Default)]
struct Mailbox {
    /// `None` when the thread has ended.
    commands: Mutex<Option<VecDeque<Command>>>,
    /// Something is in it: looked at without the lock.
    filled: AtomicBool,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Command>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, command: Command) {
        if let Some(commands) = &mut *self.lock() {
            commands.push_back(command);
            self.filled.store(true, Ordering::Release);
        }
    }

    fn take(&self) -> Option<Command> {
        if !self.filled.load(Ordering::Acquire) {
            return None;
        }
        let mut commands = self.lock();
        let command = commands.as_mut().and_then(VecDeque::pop_front);
        if command.is_none() {
            self.filled.store(false, Ordering::Release);
        }
        command
    }
}

/// Closes the mailbox when the thread ends, however it ends, so that nobody waits for an answer.
struct CloseOnDrop(Arc<Mailbox>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// A queue's thread, as the control thread sees it. Ends with this value.
pub(crate) struct Worker {
    mailbox: Arc<Mailbox>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

/// The queue's thread has ended, which only a failure of the kernel's can do.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the queue's thread has ended")]
pub(crate) struct Ended;

impl Worker {
    /// Starts the thread of queue `index`.
    pub(crate) fn start<B: Backend>(common: Arc<Common<B>>, index: u16) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox { commands: Mutex::new(Some(VecDeque::new())), ..Mailbox::default() });
        let (started, waker) = channel();
        let name = format!("{}:{index}", common.name);
        let theirs = mailbox.clone();
        let thread = threads::spawn(name, move || run(common, index, theirs, started))?;
        let waker =
            waker.recv().unwrap_or_else(|_| Err(io::Error::other("a queue's thread did not start")))?;
        Ok(Self { mailbox, waker, thread: Some(thread) })
    }

    fn send(&self, command: Command) {
        self.mailbox.put(command);
        self.waker.wake_by_ref();
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, Ended> {
        let (sender, answer) = channel();
        self.send(command(sender));
        answer.recv().map_err(|_| Ended)
    }

    /// Starts a ring. The first answer of it, an interrupt, is sent at once.
    pub(crate) fn start_ring(&self, setup: Setup) -> Result<Result<(), RingError>, Ended> {
        self.ask(|sender| Command::Start(Box::new(setup), sender))
    }

    /// Goes on in another memory generation, or elsewhere. The receiver answers when requests of the
    /// old one have ended.
    pub(crate) fn place(
        &self,
        memory: Arc<Memory>,
        addresses: Option<Addresses>,
    ) -> Result<(Result<(), RingError>, Receiver<()>), Ended> {
        let (released, release) = channel();
        let placed = self.ask(|sender| Command::Place(memory, addresses, sender, released))?;
        Ok((placed, release))
    }

    pub(crate) fn set_kick(&self, event: Event) {
        self.send(Command::Kick(event));
    }

    pub(crate) fn set_call(&self, event: Option<Event>) {
        self.send(Command::Call(event));
    }

    pub(crate) fn set_err(&self, event: Option<Event>) {
        self.send(Command::Err(event));
    }

    /// Takes requests or parks; after parking, none is in flight.
    pub(crate) fn enable(&self, enabled: bool) -> Result<(), Ended> {
        self.ask(|sender| Command::Enable(enabled, sender))
    }

    /// Stops the ring when all its requests are returned; answers the next available index, or
    /// `None` if no ring was started.
    pub(crate) fn stop_ring(&self) -> Result<Option<u16>, Ended> {
        self.ask(Command::Stop)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.send(Command::Quit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a queue's thread panicked");
        }
    }
}

/// The thread.
fn run<B: Backend>(
    common: Arc<Common<B>>,
    index: u16,
    mailbox: Arc<Mailbox>,
    started: Sender<io::Result<Waker>>,
) {
    let _close = CloseOnDrop(mailbox.clone());
    let executor = match Executor::new(RING_ENTRIES) {
        Ok(executor) => executor,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let queue = Rc::new(Queue {
        lane: common.backend.lane(),
        io: executor.storage(),
        index: usize::from(index),
        active: RefCell::new(None),
        idle: RefCell::default(),
        unseen: Cell::new(0),
        main: RefCell::new(Waker::noop().clone()),
        mistakes: Quiet::default(),
        failures: Quiet::default(),
        common,
    });
    let mut duty = Duty {
        executor: &executor,
        queue,
        mailbox,
        slots: Vec::new(),
        kick: None,
        parking: Vec::new(),
        stopping: Vec::new(),
        releasing: Vec::new(),
        spin: Duration::ZERO,
        slept: None,
        quit: false,
        hurrying: false,
    };
    let mut started = Some(started);
    executor.block_on(poll_fn(|cx| {
        if let Some(started) = started.take() {
            *duty.queue.main.borrow_mut() = cx.waker().clone();
            let _ = started.send(Ok(cx.waker().clone()));
        }
        duty.poll(cx)
    }));
}

/// A request's task and the place where its next chain is put.
#[derive(Default)]
struct Slot {
    work: Cell<Option<Box<Work>>>,
    waker: RefCell<Option<Waker>>,
}

impl Slot {
    async fn next(&self) -> Box<Work> {
        poll_fn(|cx| match self.work.take() {
            Some(work) => Poll::Ready(work),
            None => {
                let mut waker = self.waker.borrow_mut();
                if waker.is_none() {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }

    fn give(&self, work: Box<Work>) {
        self.work.set(Some(work));
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }
}

/// What a request needs, kept from one to the next.
struct Work {
    slot: usize,
    chain: Chain,
    ranges: Vec<ZeroRange>,
}

/// A started ring and what goes with it.
struct Active {
    ring: Ring,
    rules: Rules,
    call: Option<Event>,
    err: Option<Event>,
    enabled: bool,
    broken: bool,
}

impl Active {
    fn serving(&self) -> bool {
        self.enabled && !self.broken
    }

    /// Shows the driver what was returned, and wakes it if it wants.
    fn show(&mut self, counters: &QueueCounters) {
        if self.ring.publish()
            && let Some(call) = &self.call
        {
            call.signal();
            counters.interrupts.add(1);
        }
    }

    fn call_now(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }
}

/// What [`Duty`] and the slots share.
struct Queue<B: Backend> {
    common: Arc<Common<B>>,
    lane: B::Lane,
    io: HostStorage,
    index: usize,
    active: RefCell<Option<Active>>,
    #[allow(clippy::vec_box, reason = "a box moves to its slot and back by its address")]
    idle: RefCell<Vec<Box<Work>>>,
    /// Completions that the driver was not shown.
    unseen: Cell<u32>,
    /// Wakes [`Duty`].
    main: RefCell<Waker>,
    /// Holds back what the guest can cause.
    mistakes: Quiet,
    /// Holds back what the storage causes.
    failures: Quiet,
}

impl<B: Backend> Queue<B> {
    fn counters(&self) -> &QueueCounters {
        &self.common.counters[self.index]
    }

    fn durability(&self) -> Durability {
        if self.common.write_through.load(Ordering::Relaxed) {
            Durability::Durable
        } else {
            Durability::Cached
        }
    }

    /// A slot's task.
    async fn serve(self: Rc<Self>, slot: Rc<Slot>) {
        loop {
            let mut work = slot.next().await;
            let rules = self.active.borrow().as_ref().map(|active| active.rules);
            // The disk may have grown since the ring was started.
            let rules = rules.map(|rules| Rules { capacity: self.common.backend.capacity(), ..rules });
            let (status, data_bytes) = match rules {
                Some(rules) => self.request(&mut work, &rules).await,
                None => (STATUS_IOERR, 0),
            };
            self.finish(work, status, data_bytes);
        }
    }

    /// Does one request; answers its status, and how many bytes of data were written to the guest.
    async fn request(&self, work: &mut Work, rules: &Rules) -> (u8, u64) {
        let request = match request::parse(&mut work.chain, rules, &mut work.ranges) {
            Ok(request) => request,
            Err(error) => return (self.refuse(error), 0),
        };
        let counters = self.counters();
        let mut data_bytes = 0;
        let done = match request {
            Request::Read { at } => {
                let len = work.chain.writable.len();
                let into = work.chain.writable.target();
                let done = self.common.backend.read(&self.io, self.lane, at, into).await;
                if done.is_ok() {
                    data_bytes = len;
                    counters.reads.add(1);
                    counters.read_bytes.add(len);
                }
                done
            }
            Request::Write { at } => {
                let from = work.chain.readable.source();
                let durability = self.durability();
                let done = self.common.backend.write(&self.io, self.lane, at, from, durability).await;
                if done.is_ok() {
                    counters.writes.add(1);
                    counters.written_bytes.add(work.chain.readable.len());
                }
                done
            }
            Request::Flush => {
                let done = self.common.backend.flush(&self.io, self.lane).await;
                if done.is_ok() {
                    counters.flushes.add(1);
                }
                done
            }
            Request::Discard => {
                let done = self.discard(&work.ranges).await;
                if done.is_ok() {
                    counters.discards.add(1);
                    counters.discarded_bytes.add(work.ranges.iter().map(|zero| zero.range.len()).sum());
                }
                done
            }
            Request::WriteZeroes => {
                let done = self.write_zeroes(&work.ranges).await;
                if done.is_ok() {
                    counters.write_zeroes.add(1);
                }
                done
            }
            Request::GetId => {
                let mut into = work.chain.writable.target();
                let len = into.len().min(request::ID_BYTES);
                into.copy_from(0, &self.common.id[..len]);
                data_bytes = len as u64;
                Ok(())
            }
        };
        match done {
            Ok(()) => (STATUS_OK, data_bytes),
            Err(error) => {
                counters.errors.add(1);
                if let Some(held) = self.failures.pass() {
                    let name = &self.common.name;
                    log::warn!("{name}: {request:?} failed: {error} ({held} more messages held back)");
                }
                (STATUS_IOERR, 0)
            }
        }
    }

    async fn discard(&self, ranges: &[ZeroRange]) -> Result<(), B::Error> {
        for ZeroRange { range, .. } in ranges {
            if !range.is_empty() {
                self.common.backend.discard(&self.io, self.lane, *range).await?;
            }
        }
        Ok(())
    }

    async fn write_zeroes(&self, ranges: &[ZeroRange]) -> Result<(), B::Error> {
        let durability = self.durability();
        for ZeroRange { range, zeroing } in ranges {
            if !range.is_empty() {
                let backend = &self.common.backend;
                backend.write_zeroes(&self.io, self.lane, *range, *zeroing, durability).await?;
            }
        }
        Ok(())
    }

    fn refuse(&self, error: RequestError) -> u8 {
        self.counters().refused.add(1);
        if log::log_enabled!(target: "vhost_blk::data", log::Level::Debug)
            && let Some(held) = self.mistakes.pass()
        {
            log::debug!(
                target: "vhost_blk::data",
                "{}: refused {error} ({held} more messages held back)", self.common.name,
            );
        }
        error.status()
    }

    /// Returns a request's chain to the ring, and its work to those that are idle.
    fn finish(&self, mut work: Box<Work>, status: u8, data_bytes: u64) {
        let told = work.chain.writable.set_last(status);
        let len = if told { data_bytes + 1 } else { 0 };
        work.chain.readable.clear();
        work.chain.writable.clear();
        if let Some(active) = &mut *self.active.borrow_mut() {
            active.ring.push_used(work.chain.head, u32::try_from(len).unwrap_or(u32::MAX));
            let unseen = self.unseen.get() + 1;
            // Event indices make an early look cheap: a driver that is awake is not interrupted.
            if unseen >= SHOW_EVERY && active.ring.event_idx() {
                active.show(self.counters());
                self.unseen.set(0);
            } else {
                self.unseen.set(unseen);
            }
        }
        self.idle.borrow_mut().push(work);
        self.main.borrow().wake_by_ref();
    }
}

/// What [`Duty::take_batch`] came to.
enum Batch {
    /// Chains were handed to slots.
    Taken,
    /// There was no chain.
    Empty,
    /// As many chains are in flight as the ring can have, or it does not serve.
    Full,
}

/// The main future of the thread.
struct Duty<'a, B: Backend> {
    executor: &'a Executor,
    queue: Rc<Queue<B>>,
    mailbox: Arc<Mailbox>,
    slots: Vec<Rc<Slot>>,
    kick: Option<Watch<Arc<OwnedFd>>>,
    parking: Vec<Sender<()>>,
    stopping: Vec<Sender<Option<u16>>>,
    /// Old generations, and whom to tell when they are gone.
    releasing: Vec<(Weak<Arc<Memory>>, Sender<()>)>,
    /// How long to look at an idle ring before sleeping; adapts to what it saves.
    spin: Duration,
    /// When the thread went to sleep with nothing in flight.
    slept: Option<Instant>,
    quit: bool,
    /// The backend was told to hurry.
    hurrying: bool,
}

impl<B: Backend> Drop for Duty<'_, B> {
    fn drop(&mut self) {
        self.hurry(false);
    }
}

impl<B: Backend> Duty<'_, B> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(command) = self.mailbox.take() {
            self.obey(command);
        }
        self.wait_for_kick(cx);
        let again = self.serve();
        self.answer();
        if self.quit && self.queue.active.borrow().is_none() {
            return Poll::Ready(());
        }
        if again {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn obey(&mut self, command: Command) {
        let queue = self.queue.clone();
        let mut active = queue.active.borrow_mut();
        match command {
            Command::Start(setup, sender) => {
                let Setup { memory, addresses, shape, base, rules, kick, call, err } = *setup;
                let started = Ring::start(memory, addresses, shape, base).map(|ring| {
                    *active = Some(Active { ring, rules, call, err, enabled: true, broken: false });
                    self.kick = Some(self.executor.watch(kick.fd()));
                    self.spin = Duration::ZERO;
                });
                let _ = sender.send(started);
            }
            Command::Place(memory, addresses, sender, released) => {
                let Some(active) = &mut *active else {
                    let _ = sender.send(Ok(()));
                    return;
                };
                active.show(queue.counters());
                match active.ring.place(memory, addresses) {
                    Ok(old) => {
                        self.releasing.push((Rc::downgrade(&old), released));
                        let _ = sender.send(Ok(()));
                    }
                    Err(error) => {
                        let _ = sender.send(Err(error));
                    }
                }
            }
            Command::Kick(event) => {
                if active.is_some() {
                    self.kick = Some(self.executor.watch(event.fd()));
                }
            }
            Command::Call(event) => {
                if let Some(active) = &mut *active {
                    active.call = event;
                    // What the old descriptor was told may have been lost with it.
                    active.ring.forget_signal();
                    active.call_now();
                }
            }
            Command::Err(event) => {
                if let Some(active) = &mut *active {
                    active.err = event;
                }
            }
            Command::Enable(enabled, sender) => {
                if let Some(active) = &mut *active {
                    active.enabled = enabled;
                }
                if enabled {
                    let _ = sender.send(());
                } else {
                    self.parking.push(sender);
                }
            }
            Command::Stop(sender) => {
                if let Some(active) = &mut *active {
                    active.enabled = false;
                }
                self.stopping.push(sender);
            }
            Command::Quit => {
                if let Some(active) = &mut *active {
                    active.enabled = false;
                }
                self.quit = true;
            }
        }
    }

    /// Takes in kicks, and asks for more.
    fn wait_for_kick(&mut self, cx: &mut Context<'_>) {
        while let Some(kick) = &mut self.kick {
            match kick.poll_fired(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    log::warn!("{}: cannot wait for kicks: {error}", self.queue.common.name);
                    self.kick = None;
                }
                Poll::Pending => break,
            }
        }
    }

    /// Shows what was returned and takes what is there; `true` if it shall be called again after the
    /// slots have had their turn.
    fn serve(&mut self) -> bool {
        let queue = self.queue.clone();
        if let Some(active) = &mut *queue.active.borrow_mut() {
            active.show(queue.counters());
            queue.unseen.set(0);
            queue.counters().in_flight.set(active.ring.in_flight().into());
        }
        loop {
            match self.take_batch() {
                Batch::Taken => {
                    self.woke();
                    return true;
                }
                Batch::Full => return false,
                Batch::Empty => {}
            }
            let mut active = queue.active.borrow_mut();
            let Some(active) = &mut *active else { return false };
            if active.ring.in_flight() == 0 && self.look_before_sleep(&active.ring) {
                continue;
            }
            if !active.ring.enable_kicks() {
                if active.ring.in_flight() == 0 && self.slept.is_none() {
                    self.slept = Some(Instant::now());
                }
                return false;
            }
        }
    }

    /// Looks at the ring for a moment before the thread sleeps, if that has paid of late.
    fn look_before_sleep(&self, ring: &Ring) -> bool {
        if self.spin.is_zero() || self.executor.is_busy() {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..16 {
                if ring.has_available() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.spin || self.mailbox.filled.load(Ordering::Relaxed) {
                return false;
            }
        }
    }

    /// A chain came: was the sleep before it so short that looking longer would have saved it?
    fn woke(&mut self) {
        let Some(slept) = self.slept.take() else { return };
        self.spin = if slept.elapsed() < SHORT_SLEEP {
            (self.spin * 2).clamp(MAX_SPIN / 8, MAX_SPIN)
        } else {
            self.spin / 2
        };
        if self.spin < MAX_SPIN / 8 {
            self.spin = Duration::ZERO;
        }
    }

    /// Hands all available chains to slots.
    fn take_batch(&mut self) -> Batch {
        let queue = self.queue.clone();
        let mut taken = false;
        let mut guard = queue.active.borrow_mut();
        let Some(active) = &mut *guard else { return Batch::Full };
        if !active.serving() {
            return Batch::Full;
        }
        active.ring.disable_kicks();
        let end = loop {
            if active.ring.in_flight() >= active.ring.size() {
                break Batch::Full;
            }
            let idle = queue.idle.borrow_mut().pop();
            let mut work = idle.unwrap_or_else(|| self.new_slot());
            match active.ring.pop(&mut work.chain) {
                Ok(true) => {
                    taken = true;
                    let slot = work.slot;
                    self.slots[slot].give(work);
                }
                Ok(false) => {
                    queue.idle.borrow_mut().push(work);
                    break Batch::Empty;
                }
                Err(error) => {
                    queue.idle.borrow_mut().push(work);
                    active.broken = true;
                    self.tell_broken(error, active.err.as_ref());
                    break Batch::Full;
                }
            }
        };
        queue.counters().in_flight.set(active.ring.in_flight().into());
        if taken { Batch::Taken } else { end }
    }

    fn new_slot(&mut self) -> Box<Work> {
        let slot = Rc::new(Slot::default());
        self.slots.push(slot.clone());
        self.executor.spawn(self.queue.clone().serve(slot));
        Box::new(Work { slot: self.slots.len() - 1, chain: Chain::default(), ranges: Vec::new() })
    }

    fn tell_broken(&self, error: RingError, err: Option<&Event>) {
        if let Some(held) = self.queue.mistakes.pass() {
            let (name, index) = (&self.queue.common.name, self.queue.index);
            log::warn!(
                "{name}: queue {index} is broken and stays stopped until the guest resets it: {error} \
                 ({held} more messages held back)"
            );
        }
        if let Some(err) = err {
            err.signal();
        }
    }

    /// Tells the backend whether requests in flight are waited for.
    fn hurry(&mut self, hurry: bool) {
        if hurry != self.hurrying {
            self.hurrying = hurry;
            self.queue.common.backend.hurry(hurry);
        }
    }

    /// Answers the control thread what has come true.
    fn answer(&mut self) {
        self.answer_now();
        let asked = !self.parking.is_empty() || !self.stopping.is_empty() || !self.releasing.is_empty();
        let in_flight = self.queue.active.borrow().as_ref().is_some_and(|active| active.ring.in_flight() > 0);
        self.hurry(in_flight && (self.quit || asked));
    }

    fn answer_now(&mut self) {
        self.releasing.retain(|(old, sender)| {
            let gone = old.strong_count() == 0;
            if gone {
                let _ = sender.send(());
            }
            !gone
        });
        let mut active = self.queue.active.borrow_mut();
        if active.as_ref().is_some_and(|active| active.ring.in_flight() > 0) {
            return;
        }
        for sender in self.parking.drain(..) {
            let _ = sender.send(());
        }
        if self.quit || !self.stopping.is_empty() {
            let base = active.take().map(|active| active.ring.next_avail());
            self.kick = None;
            self.slept = None;
            for sender in self.stopping.drain(..) {
                let _ = sender.send(base);
            }
        }
    }
}
