//! A plain vhost-user-blk back end on the framework `vhost-user-backend`, to compare with.
//!
//! It is what one writes in a day: one queue, the framework's loop, zero copy, io_uring (its
//! completions through an eventfd, since the framework owns the loop) or plain system calls. It
//! tracks nothing, keeps nothing, and treats a short transfer as an error.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, anyhow};
use clap::{Args, ValueEnum};
use io_uring::{IoUring, opcode, types};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT as _};
use virtio_queue::QueueOwnedT as _;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap,
    Permissions,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::{config, feature, request, status};

const QUEUE_SIZE: u16 = 1024;
/// The framework's numbers below this are its own: the queue, its exit event.
const COMPLETION: u16 = 7;

/// A disk to serve.
#[derive(Args, Clone, Debug)]
pub struct Baseline {
    /// The image, a regular file
    #[arg(long)]
    pub path: PathBuf,
    /// Where to listen
    #[arg(long)]
    pub socket: PathBuf,
    /// How to do the I/O
    #[arg(long, value_enum, default_value_t = Engine::Uring)]
    pub engine: Engine,
    /// Open the image with O_DIRECT
    #[arg(long)]
    pub direct: bool,
}

/// How the baseline does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// io_uring, completions by eventfd
    Uring,
    /// preadv and pwritev on the queue's thread
    Sync,
}

/// Serves one connection and returns when it ends.
///
/// # Errors
/// If the image or the socket cannot be opened, or the framework gives up.
pub fn serve(options: &Baseline) -> Result<()> {
    let mut open = OpenOptions::new();
    open.read(true).write(true);
    if options.direct {
        open.custom_flags(libc::O_DIRECT);
    }
    let file = open.open(&options.path).context("open the image")?;
    let completed = EventFd::new(EFD_NONBLOCK)?;
    let ring = IoUring::new(u32::from(QUEUE_SIZE))?;
    ring.submitter().register_eventfd(completed.as_raw_fd())?;
    let wakeup = completed.as_raw_fd();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let disk = Disk {
        sectors: file.metadata()?.len() / 512,
        file,
        engine: options.engine,
        ring,
        completed,
        flying: Vec::new(),
        free: Vec::new(),
        memory: memory.clone(),
    };
    let mut daemon = VhostUserDaemon::new("baseline".into(), Arc::new(Mutex::new(disk)), memory)
        .map_err(|error| anyhow!("{error}"))?;
    daemon.get_epoll_handlers()[0].register_listener(wakeup, EventSet::IN, COMPLETION.into())?;
    daemon.serve(&options.socket).map_err(|error| anyhow!("{error}"))
}

/// A request between the available and the used ring.
struct Flying {
    head: u16,
    /// Keeps the mapping that `buffers` and `status` point into.
    memory: Arc<GuestMemoryMmap>,
    buffers: Vec<libc::iovec>,
    status: GuestAddress,
    /// Bytes the operation must transfer.
    expected: u32,
    /// Bytes written to the guest, less the status byte.
    written: u32,
}

// SAFETY: the pointers in `buffers` point into `memory`, which the request owns a share of; they
// are handed to the kernel only.
unsafe impl Send for Flying {}
// SAFETY: as above; a shared reference reads the pointers and never follows them.
unsafe impl Sync for Flying {}

struct Disk {
    file: File,
    sectors: u64,
    engine: Engine,
    ring: IoUring,
    completed: EventFd,
    flying: Vec<Option<Flying>>,
    free: Vec<usize>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        feature::VERSION_1
            | feature::EVENT_IDX
            | feature::INDIRECT_DESC
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::MQ
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = [0; 256];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(config::CAPACITY, &self.sectors.to_le_bytes());
        put(config::SEG_MAX, &126_u32.to_le_bytes());
        put(config::BLK_SIZE, &512_u32.to_le_bytes());
        put(config::NUM_QUEUES, &1_u16.to_le_bytes());
        let from = (offset as usize).min(space.len());
        let to = (from + size as usize).min(space.len());
        space[from..to].to_vec()
    }

    fn update_memory(&mut self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let vring = &vrings[0];
        if event == COMPLETION {
            // Only wakes us; an empty eventfd has been read already.
            let _ = self.completed.read();
            return self.reap(vring);
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.take(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

impl Disk {
    fn take(&mut self, vring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.memory().into_inner();
        let chains: Vec<_> = {
            let mut state = vring.get_mut();
            let queue = state.get_queue_mut();
            let iterator = queue.iter(Arc::clone(&memory)).map_err(io::Error::other)?;
            iterator.map(|chain| (chain.head_index(), chain.collect::<Vec<_>>())).collect()
        };
        let mut signal = false;
        for (head, descriptors) in chains {
            if let Some((written, code)) = self.begin(&memory, head, &descriptors) {
                let last = descriptors.last().map(|last| last.addr().0 + u64::from(last.len()) - 1);
                // A chain without a place for its status is given back as it is.
                let _ = memory.write_obj(code, GuestAddress(last.unwrap_or(0)));
                vring.add_used(head, written + 1).map_err(io::Error::other)?;
                signal = true;
            }
        }
        self.ring.submit()?;
        if signal && vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(())
    }

    /// Begins a request; if it is over already, returns the bytes written and its status.
    fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        head: u16,
        descriptors: &[Descriptor],
    ) -> Option<(u32, u8)> {
        let [header, data @ .., last] = descriptors else {
            return Some((0, status::IOERR));
        };
        let Ok(head_bytes) = memory.read_obj::<[u8; 16]>(header.addr()) else {
            return Some((0, status::IOERR));
        };
        let kind = u32::from_le_bytes(head_bytes[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(head_bytes[8..].try_into().expect("eight bytes"));
        let mut buffers = Vec::with_capacity(data.len());
        let mut bytes = 0_u32;
        for descriptor in data {
            let access = if kind == request::OUT { Permissions::Read } else { Permissions::Write };
            let slices =
                GuestMemory::get_slices(&**memory, descriptor.addr(), descriptor.len() as usize, access);
            let Ok(slices) = slices else { return Some((0, status::IOERR)) };
            for slice in slices {
                let Ok(slice) = slice else { return Some((0, status::IOERR)) };
                buffers.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            bytes = bytes.checked_add(descriptor.len())?;
        }
        match kind {
            request::IN | request::OUT => {
                if sector + u64::from(bytes.div_ceil(512)) > self.sectors {
                    return Some((0, status::IOERR));
                }
            }
            request::FLUSH => {}
            request::GET_ID => {
                let done = memory.write_slice(&[b'b'; 20], data.first()?.addr());
                return Some(done.map_or((0, status::IOERR), |()| (20, status::OK)));
            }
            _ => return Some((0, status::UNSUPP)),
        }
        let flying = Flying {
            head,
            memory: Arc::clone(memory),
            buffers,
            status: GuestAddress(last.addr().0 + u64::from(last.len()) - 1),
            expected: if kind == request::FLUSH { 0 } else { bytes },
            written: if kind == request::IN { bytes } else { 0 },
        };
        match self.engine {
            Engine::Sync => {
                let code = self.run(&flying, kind, sector * 512);
                Some((flying.written, code))
            }
            Engine::Uring => {
                self.submit(flying, kind, sector * 512);
                None
            }
        }
    }

    fn run(&self, flying: &Flying, kind: u32, offset: u64) -> u8 {
        let fd = self.file.as_raw_fd();
        let (at, count) = (offset.cast_signed(), vector_count(&flying.buffers).cast_signed());
        let vectors = flying.buffers.as_ptr();
        // SAFETY: the vectors point into guest memory that `flying` keeps mapped; only the kernel
        // touches it.
        let result = unsafe {
            match kind {
                request::IN => libc::preadv(fd, vectors, count, at),
                request::OUT => libc::pwritev(fd, vectors, count, at),
                _ => libc::fdatasync(fd) as isize,
            }
        };
        if result == flying.expected as isize { status::OK } else { status::IOERR }
    }

    fn submit(&mut self, flying: Flying, kind: u32, offset: u64) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flying.push(None);
            self.flying.len() - 1
        });
        let fd = types::Fd(self.file.as_raw_fd());
        let (vectors, count) = (flying.buffers.as_ptr(), vector_count(&flying.buffers));
        let entry = match kind {
            request::IN => opcode::Readv::new(fd, vectors, count).offset(offset).build(),
            request::OUT => opcode::Writev::new(fd, vectors, count).offset(offset).build(),
            _ => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        }
        .user_data(slot as u64);
        self.flying[slot] = Some(flying);
        // SAFETY: `flying` keeps the vectors (their heap block does not move) and the mapping
        // until its completion is reaped.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.ring.submit().expect("the ring takes what it has room for");
        }
    }

    fn reap(&mut self, vring: &VringRwLock) -> io::Result<()> {
        let mut any = false;
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            let slot = usize::try_from(entry.user_data()).map_err(io::Error::other)?;
            let flying = self.flying[slot].take().expect("completed once");
            self.free.push(slot);
            let fine = u32::try_from(entry.result()) == Ok(flying.expected);
            let code = if fine { status::OK } else { status::IOERR };
            flying.memory.write_obj(code, flying.status).map_err(io::Error::other)?;
            vring.add_used(flying.head, flying.written + 1).map_err(io::Error::other)?;
            any = true;
        }
        if any && vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(())
    }
}

fn vector_count(buffers: &[libc::iovec]) -> u32 {
    u32::try_from(buffers.len()).expect("a chain is no longer than its queue")
}
