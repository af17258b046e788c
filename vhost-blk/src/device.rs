//! A disk on offer: its sockets, its one front end at a time, and its queues' threads.
//!
//! Invariant: one connection is served at a time; the next one waits until the last one's rings are
//! stopped. Queues' threads are made when a queue first starts and kept for later connections.
//! Lock order: `serving`, then `workers`, `connection` or `channel`, which are never held together.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::backend::Backend;
use crate::channel::Channel;
use crate::counters::{Counters, QueueCounters};
use crate::events::Quiet;
use crate::options::{Cache, Options, OptionsError};
use crate::session;
use crate::threads;
use crate::worker::{Common, Worker};

/// How long to wait when connections cannot be accepted, for descriptors to be free again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What happened to a device's front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// It has connected.
    Up,
    /// It has gone, and all of its rings are stopped.
    Down,
}

type Hook = Box<dyn Fn(Connection) + Send + Sync>;

/// What the device's threads share.
pub(crate) struct Inner<B: Backend> {
    options: Options,
    common: Arc<Common<B>>,
    /// The `writeback` byte of the configuration space.
    writeback: AtomicBool,
    /// Held while a connection is served.
    serving: Mutex<()>,
    /// The connection that is served.
    connection: Mutex<Option<UnixStream>>,
    workers: Mutex<Vec<Option<Arc<Worker>>>>,
    /// Where the front end is told that the configuration space has changed.
    channel: Mutex<Option<Channel>>,
    hook: OnceLock<Hook>,
    quiet: Mutex<Quiet>,
    stopping: AtomicBool,
    /// Readable when stopping.
    stop: OwnedFd,
}

/// A disk on offer to front ends.
///
/// Dropping it stops it.
pub struct Device<B: Backend> {
    inner: Arc<Inner<B>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Its options do not fit the disk.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The system refused a descriptor.
    #[error("could not make an eventfd")]
    Eventfd(#[source] io::Error),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend> Device<B> {
    /// A disk over `backend`, on offer to nobody yet.
    ///
    /// # Errors
    /// If the options do not fit the disk.
    pub fn new(backend: B, options: Options) -> Result<Arc<Self>, DeviceError> {
        options.check(backend.capacity())?;
        let queues = usize::from(options.queues);
        let common = Common {
            name: options.name.clone(),
            id: options.id(),
            backend,
            write_through: AtomicBool::new(true),
            counters: (0..queues).map(|_| QueueCounters::default()).collect(),
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| DeviceError::Eventfd(error.into()))?;
        let inner = Arc::new(Inner {
            writeback: AtomicBool::new(options.cache == Cache::Writeback),
            options,
            common: Arc::new(common),
            serving: Mutex::new(()),
            connection: Mutex::new(None),
            workers: Mutex::new((0..queues).map(|_| None).collect()),
            channel: Mutex::default(),
            hook: OnceLock::new(),
            quiet: Mutex::default(),
            stopping: AtomicBool::new(false),
            stop,
        });
        Ok(Arc::new(Self { inner, threads: Mutex::default() }))
    }

    /// Calls `hook` whenever a front end comes or goes, on the thread that serves it. The first hook
    /// stays; set it before the device is on offer.
    pub fn on_connection(&self, hook: impl Fn(Connection) + Send + Sync + 'static) {
        let _ = self.inner.hook.set(Box::new(hook));
    }

    /// Serves front ends that connect to `listener`, one at a time, until [`Device::stop`].
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn listen(&self, listener: UnixListener) -> io::Result<()> {
        let inner = self.inner.clone();
        self.keep(threads::spawn(self.thread_name(), move || inner.accept(&listener))?);
        Ok(())
    }

    /// Serves the front end at the other end of `stream`, in a thread of its own.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn attach(&self, stream: UnixStream) -> io::Result<()> {
        let inner = self.inner.clone();
        self.keep(threads::spawn(self.thread_name(), move || inner.serve(stream))?);
        Ok(())
    }

    fn thread_name(&self) -> String {
        format!("{}:vhost", self.inner.options.name)
    }

    fn keep(&self, thread: JoinHandle<()>) {
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// Ends the connection, if there is one, after all requests in flight have been returned, and
    /// ends all threads. A listener's file is left to its owner.
    pub fn stop(&self) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        #[allow(clippy::host_endian_bytes, reason = "an eventfd counts in the host's byte order")]
        let _ = rustix::io::write(&self.inner.stop, &1u64.to_ne_bytes());
        if let Some(stream) = &*lock(&self.inner.connection) {
            // It may have gone by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            if thread.join().is_err() {
                log::error!("{}: a control thread panicked", self.inner.options.name);
            }
        }
        let workers: Vec<_> = lock(&self.inner.workers).iter_mut().map(Option::take).collect();
        drop(workers);
    }

    /// What the disk's queues have done since it was made.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for queue in &self.inner.common.counters {
            queue.add_to(&mut sum);
        }
        sum
    }

    /// Whether a front end is connected.
    pub fn is_connected(&self) -> bool {
        lock(&self.inner.connection).is_some()
    }

    /// Whether the guest is told of a volatile cache, which it may change (`CONFIG_WCE`).
    pub fn is_writeback(&self) -> bool {
        self.inner.writeback.load(Ordering::Relaxed)
    }

    /// Tells the front end that the disk's size has changed; whether it could be told. One that has no
    /// channel for that sees it when it reads the configuration space, at its next connection at the latest.
    pub fn announce_size(&self) -> bool {
        let mut channel = lock(&self.inner.channel);
        match channel.as_ref().map(Channel::config_changed) {
            None => false,
            Some(Ok(())) => true,
            Some(Err(error)) => {
                log::warn!("{}: cannot tell the front end of a new size: {error}", self.inner.name());
                *channel = None;
                false
            }
        }
    }

    /// What is behind the disk.
    pub fn backend(&self) -> &B {
        &self.inner.common.backend
    }

    /// What the operator chose.
    pub fn options(&self) -> &Options {
        &self.inner.options
    }
}

impl<B: Backend> Drop for Device<B> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<B: Backend> Inner<B> {
    fn accept(self: Arc<Self>, listener: &UnixListener) {
        loop {
            let mut polled = [PollFd::new(&self.stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("{}: cannot wait for connections: {error}", self.name());
                    std::thread::sleep(ACCEPT_PAUSE);
                    continue;
                }
            }
            let (stop, ready) = (polled[0].revents(), polled[1].revents());
            if !stop.is_empty() {
                return;
            }
            if ready.is_empty() {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => self.serve(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    if let Some(held) = self.quiet() {
                        log::warn!("{}: cannot accept: {error} ({held} more held back)", self.name());
                    }
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Serves a connection until it ends.
    fn serve(self: &Arc<Self>, stream: UnixStream) {
        let _serving = lock(&self.serving);
        match stream.set_nonblocking(false).and_then(|()| stream.try_clone()) {
            Ok(clone) => *lock(&self.connection) = Some(clone),
            Err(error) => {
                log::warn!("{}: cannot serve a connection: {error}", self.name());
                return;
            }
        }
        // Stopping after this line shuts the stream down; before it, we see it here.
        if !self.stopping.load(Ordering::SeqCst) {
            self.tell(Connection::Up);
            if let Err(error) = session::run(self, stream)
                && let Some(held) = self.quiet()
            {
                log::warn!("{}: closed the connection: {error} ({held} more held back)", self.name());
            }
            *lock(&self.connection) = None;
            self.tell(Connection::Down);
        }
        *lock(&self.connection) = None;
    }

    fn tell(&self, what: Connection) {
        log::debug!("{}: front end {what:?}", self.name());
        if let Some(hook) = self.hook.get() {
            hook(what);
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.options.name
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn common(&self) -> &Common<B> {
        &self.common
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.common.backend.capacity()
    }

    pub(crate) fn quiet(&self) -> Option<u64> {
        lock(&self.quiet).pass()
    }

    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    pub(crate) fn keep_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
    }

    /// Keeps the front end's channel, in place of one that it gave before.
    pub(crate) fn set_channel(&self, channel: Option<Channel>) {
        *lock(&self.channel) = channel;
    }

    /// Puts the cache mode back to what the operator chose.
    pub(crate) fn reset_writeback(&self, features: u64) {
        self.set_writeback(self.options.cache == Cache::Writeback, features);
    }

    /// The thread of a queue that was started before.
    pub(crate) fn worker(&self, index: usize) -> Option<Arc<Worker>> {
        lock(&self.workers).get(index).cloned().flatten()
    }

    /// The thread of a queue, made if it has none.
    pub(crate) fn start_worker(&self, index: usize) -> io::Result<Arc<Worker>> {
        let mut workers = lock(&self.workers);
        let Some(place) = workers.get_mut(index) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if let Some(worker) = place {
            return Ok(worker.clone());
        }
        let number = u16::try_from(index).map_err(io::Error::other)?;
        let worker = Arc::new(Worker::start(self.common.clone(), number)?);
        *place = Some(worker.clone());
        Ok(worker)
    }
}
