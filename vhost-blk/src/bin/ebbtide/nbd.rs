//! The NBD server's sockets: accept loops, a thread and a ring per connection, deadlines.
//!
//! Invariant: what one client does costs the others nothing but processor time and requests in flight: connections are
//! bounded in number, a handshake in time, the memory for all their data by one budget.

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cow_engine::Storage;
use cow_engine::host::{Executor, HostStorage};
use nbd_export::{Budget, Connection, Export, Socket, SocketHalf};

use crate::catalog::{Catalog, Offer};

/// How long a client may take to agree on an export.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Connections at a time; nbdcopy opens four.
const MAX_CONNECTIONS: usize = 128;
/// Replies that a client of the host has not taken yet: several whole ones, so that it is not woken, nor the
/// sender, for each part of one. A socket's usual 208 KiB is less than one reply.
const SEND_BUFFER_BYTES: usize = 1 << 20;
/// Memory for the data of all clients, besides what each has to itself ([`nbd_export::OWN_BYTES`]).
const DATA_BYTES: usize = 256 << 20;
/// Submissions of a connection between two system calls: its requests, and a read of its socket.
const RING_ENTRIES: u32 = 64;

/// Open connections by number: their sockets, to end them from outside, and their threads.
type Open = HashMap<u64, (Socket, Option<JoinHandle<()>>)>;

struct Shared {
    catalog: Arc<Catalog>,
    budget: Arc<Budget>,
    stopping: AtomicBool,
    next: AtomicU64,
    open: Mutex<Open>,
}

/// A running NBD server.
pub(crate) struct NbdServer {
    shared: Arc<Shared>,
    listeners: Vec<(OwnedFd, JoinHandle<()>)>,
}

impl NbdServer {
    /// A server without a door yet.
    pub(crate) fn new(catalog: Arc<Catalog>) -> Self {
        let shared = Shared {
            catalog,
            budget: Arc::new(Budget::new(DATA_BYTES)),
            stopping: AtomicBool::new(false),
            next: AtomicU64::new(0),
            open: Mutex::default(),
        };
        Self { shared: Arc::new(shared), listeners: Vec::new() }
    }

    /// Accepts clients on a socket of the host.
    pub(crate) fn listen_unix(&mut self, listener: UnixListener) -> io::Result<()> {
        let handle = OwnedFd::from(listener.try_clone()?);
        self.listen(handle, move || {
            let (socket, _) = listener.accept()?;
            // What the system grants of it will do.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER_BYTES);
            Ok(Socket::Unix(socket))
        })
    }

    /// Accepts clients on a TCP port.
    pub(crate) fn listen_tcp(&mut self, listener: TcpListener) -> io::Result<()> {
        let handle = OwnedFd::from(listener.try_clone()?);
        self.listen(handle, move || {
            let (socket, _) = listener.accept()?;
            socket.set_nodelay(true)?;
            Ok(Socket::Tcp(socket))
        })
    }

    fn listen(
        &mut self,
        handle: OwnedFd,
        accept: impl FnMut() -> io::Result<Socket> + Send + 'static,
    ) -> io::Result<()> {
        let shared = self.shared.clone();
        let thread = crate::thread("nbd", move || accept_loop(&shared, accept))?;
        self.listeners.push((handle, thread));
        Ok(())
    }

    /// Ends the doors and the connections, and waits for their threads.
    pub(crate) fn stop(self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for (listener, thread) in self.listeners {
            // Wakes the thread that accepts on it.
            let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
            let _ = thread.join();
        }
        let open: Vec<_> = self.shared.open().drain().map(|(_, connection)| connection).collect();
        for (socket, thread) in open {
            let _ = socket.shutdown(Shutdown::Both);
            if let Some(thread) = thread {
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept_loop(shared: &Arc<Shared>, mut accept: impl FnMut() -> io::Result<Socket>) {
    loop {
        let socket = accept();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let started = socket.and_then(|socket| {
            if shared.open().len() >= MAX_CONNECTIONS {
                return Err(io::Error::other("too many NBD clients; one more was turned away"));
            }
            start(shared, socket)
        });
        if let Err(error) = started {
            log::warn!("NBD: {error}");
            // Out of descriptors or threads, for instance: give those that end a chance.
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn start(shared: &Arc<Shared>, socket: Socket) -> io::Result<()> {
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    let outside = socket.try_clone()?;
    shared.open().insert(id, (outside, None));
    let mine = shared.clone();
    let thread = crate::thread("nbd-client", move || {
        if let Err(error) = serve(&mine, socket) {
            log::debug!("NBD client {id}: {error}");
        }
        mine.open().remove(&id);
    });
    match thread {
        Ok(thread) => {
            if let Some(entry) = shared.open().get_mut(&id) {
                entry.1 = Some(thread);
            }
            Ok(())
        }
        Err(error) => {
            shared.open().remove(&id);
            Err(error)
        }
    }
}

/// One client, from its first byte to its last.
fn serve(shared: &Shared, socket: Socket) -> anyhow::Result<()> {
    let catalog = &shared.catalog;
    let executor = Executor::new(RING_ENTRIES)?;
    let io = executor.storage();
    let agreed = Rc::new(Cell::new(false));
    executor.spawn(deadline(io.clone(), socket.try_clone()?, agreed.clone()));
    executor.block_on(async {
        let (reader, writer) = SocketHalf::pair(&io, socket);
        let mut connection = Connection::new(reader, writer).sharing(shared.budget.clone());
        let offer = Offer { catalog: catalog.clone(), io: io.clone() };
        let Some(session) = connection.handshake(&offer).await? else { return Ok(()) };
        agreed.set(true);
        let _counted = catalog.client(&session.export().info().name);
        connection.transmission(session).await?;
        Ok(())
    })
}

/// Ends the stream of a client that has not agreed on an export in time.
async fn deadline(io: HostStorage, socket: Socket, agreed: Rc<Cell<bool>>) {
    io.sleep(HANDSHAKE_DEADLINE).await;
    if !agreed.get() {
        let _ = socket.shutdown(Shutdown::Both);
    }
}
