//! A vhost-user front end and virtio-blk driver for tests, which can also say what no driver says.
//!
//! The messages go through the `vhost` crate's `Frontend`, or as raw bytes over the same socket;
//! the guest memory and the split rings are ours. The usual life of a test:
//!
//! ```no_run
//! # use ebbtide_tests::vhost_client::{Client, Op, Options};
//! # fn main() -> Result<(), ebbtide_tests::vhost_client::Error> {
//! let mut client = Client::connect("/run/vda.sock".as_ref(), &Options::default())?;
//! client.write(8, &[7; 4096])?;
//! assert_eq!(client.read(8, 4096)?, [7; 4096]);
//! let reply = client.run(&Op { segments: vec![512, 100, 412], ..Op::read(0, 1024) })?;
//! # Ok(()) }
//! ```
//!
//! Always: guest addresses, front end addresses and host addresses differ, so that a back end that
//! mixes them up is found out; a used element that was not asked for, or came twice, is an
//! [`Error::Device`]; no call waits longer than [`PATIENCE`].
//! Absent: packed rings, and any judgement of the data read.

mod memory;
mod op;
mod ring;
mod watchdog;

use std::io::{IoSlice, Read as _};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VringConfigData};

pub use memory::Memory;
pub use op::{Op, Reply, Ticket};
pub use ring::{Descriptor, Queue, Used};
use watchdog::Watchdog;

use crate::raw::readable;
use crate::server::reach;
use crate::virtio::{feature, request, status};

/// No answer takes longer than this on a machine that works at all.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// What lies between the guest's addresses and those the front end claims to see them at.
const USER_SHIFT: u64 = 0x5500_0000_0000;
/// Status bytes hold this until the device writes them.
pub const UNTOUCHED: u8 = 0xee;

/// What can go wrong between this client and a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The back end refused a message, or the connection ended.
    #[error("vhost-user: {0}")]
    VhostUser(#[from] vhost::Error),
    /// A system call of ours failed.
    #[error("client: {0}")]
    Io(#[from] std::io::Error),
    /// Nothing happened for [`PATIENCE`].
    #[error("no {0} within {PATIENCE:?}")]
    Late(&'static str),
    /// The device broke the rules of the ring.
    #[error("the device broke the ring's rules: {0}")]
    Device(String),
    /// A request ended with another status than OK.
    #[error("status {0}")]
    Status(u8),
    /// This client ran out of guest memory or descriptors.
    #[error("the test asks for more {0} than it set up")]
    Exhausted(&'static str),
}

/// A result with this module's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// How a [`Client`] presents itself.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to set up.
    pub queues: usize,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// Virtio features to accept where offered, as a mask.
    pub features: u64,
    /// Protocol features to accept where offered.
    pub protocol: VhostUserProtocolFeatures,
    /// Guest memory as (guest address, bytes), ascending; neighbours may touch.
    pub regions: Vec<(u64, usize)>,
    /// Share the memory by one SET_MEM_TABLE instead of an ADD_MEM_REG for each region.
    pub mem_table: bool,
    /// Set NEED_REPLY on every message, where REPLY_ACK was negotiated.
    pub need_reply: bool,
    /// Where the ring indices begin, as after a reconnection.
    pub base: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            features: u64::MAX,
            protocol: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::RESET_DEVICE
                | VhostUserProtocolFeatures::STATUS,
            // Two that touch and one far away.
            regions: vec![(0x0010_0000, 16 << 20), (0x0110_0000, 4 << 20), (0x8_0000_0000, 4 << 20)],
            mem_table: false,
            need_reply: true,
            base: 0,
        }
    }
}

/// A connection to a back end.
pub struct Client {
    frontend: Frontend,
    socket: UnixStream,
    watchdog: Watchdog,
    options: Options,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The rings.
    pub queues: Vec<Queue>,
    /// Virtio features that the back end offers.
    pub offered: u64,
    /// Virtio features in force.
    pub features: u64,
    /// Protocol features that the back end offers.
    pub offered_protocol: VhostUserProtocolFeatures,
}

impl Client {
    /// Connects, negotiates, shares the memory and starts all queues.
    ///
    /// # Errors
    /// If the back end cannot be reached or refuses.
    pub fn connect(path: &Path, options: &Options) -> Result<Self> {
        let mut client = Self::open(path, options)?;
        client.negotiate()?;
        client.share_memory()?;
        for index in 0..client.queues.len() {
            client.start_queue(index)?;
        }
        Ok(client)
    }

    /// Connects and says nothing yet.
    ///
    /// # Errors
    /// If the back end cannot be reached.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let socket = reach(path)?;
        let frontend = Frontend::from_stream(socket.try_clone()?, 256);
        let memory = Arc::new(Memory::new(&options.regions)?);
        let queues = (0..options.queues)
            .map(|index| Queue::new(index, options.queue_size, &memory, options.base))
            .collect::<Result<_>>()?;
        Ok(Self {
            frontend,
            watchdog: Watchdog::new(socket.try_clone()?),
            socket,
            options: options.clone(),
            memory,
            queues,
            offered: 0,
            features: 0,
            offered_protocol: VhostUserProtocolFeatures::empty(),
        })
    }

    /// SET_OWNER, the features and the protocol features.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn negotiate(&mut self) -> Result<()> {
        let wanted = self.options.features;
        self.call(|frontend| frontend.set_owner())?;
        self.offered = self.call(|frontend| frontend.get_features())?;
        self.features = self.offered & wanted;
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            self.offered_protocol = self.call(|frontend| frontend.get_protocol_features())?;
            let protocol = self.offered_protocol & self.options.protocol;
            self.call(|frontend| frontend.set_protocol_features(protocol))?;
            if self.options.need_reply && protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        let features = self.features;
        self.call(|frontend| frontend.set_features(features))?;
        for queue in &mut self.queues {
            queue.event_idx = features & feature::EVENT_IDX != 0;
        }
        Ok(())
    }

    /// Shares all regions, by the way that the options say.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn share_memory(&mut self) -> Result<()> {
        let infos: Vec<_> = (0..self.options.regions.len()).map(|index| self.memory.info(index)).collect();
        if self.options.mem_table {
            self.call(|frontend| frontend.set_mem_table(&infos))?;
        } else {
            for info in &infos {
                self.call(|frontend| frontend.add_mem_region(info))?;
            }
        }
        Ok(())
    }

    /// Takes region `index` away from the back end, or gives it back.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_region_shared(&mut self, index: usize, shared: bool) -> Result<()> {
        let info = self.memory.info(index);
        self.call(|frontend| {
            if shared {
                frontend.add_mem_region(&info).map(|_| ())
            } else {
                frontend.remove_mem_region(&info)
            }
        })
    }

    /// Configures queue `index` from where it stands and enables it.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn start_queue(&mut self, index: usize) -> Result<()> {
        let base = self.queues[index].next_used;
        self.configure_queue(index, base)?;
        self.enable_queue(index, true)
    }

    /// NUM, BASE, ADDR, CALL and KICK of queue `index`.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn configure_queue(&mut self, index: usize, base: u16) -> Result<()> {
        let queue = &self.queues[index];
        let config = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: queue.table + USER_SHIFT,
            used_ring_addr: queue.used + USER_SHIFT,
            avail_ring_addr: queue.avail + USER_SHIFT,
            log_addr: None,
        };
        let (size, kick, call) = (queue.size, queue.kick.try_clone()?, queue.call.try_clone()?);
        self.call(|frontend| {
            frontend.set_vring_num(index, size)?;
            frontend.set_vring_base(index, base)?;
            frontend.set_vring_addr(index, &config)?;
            frontend.set_vring_call(index, &call)?;
            frontend.set_vring_kick(index, &kick)
        })
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn enable_queue(&mut self, index: usize, enable: bool) -> Result<()> {
        self.call(|frontend| frontend.set_vring_enable(index, enable))
    }

    /// GET_VRING_BASE: stops queue `index` and returns where it stands.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn stop_queue(&mut self, index: usize) -> Result<u32> {
        self.call(|frontend| frontend.get_vring_base(index))
    }

    /// `bytes` of the configuration space from `offset` on.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn config(&mut self, offset: u32, bytes: u32) -> Result<Vec<u8>> {
        let empty = vec![0; bytes as usize];
        let flags = VhostUserConfigFlags::empty();
        self.call(|frontend| frontend.get_config(offset, bytes, flags, &empty)).map(|(_, payload)| payload)
    }

    /// Writes to the configuration space.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.call(|frontend| frontend.set_config(offset, flags, bytes))
    }

    /// Any call of the `vhost` crate's front end, ended after [`PATIENCE`] by closing the socket.
    ///
    /// # Errors
    /// Those of the call.
    pub fn call<T>(&mut self, call: impl FnOnce(&mut Frontend) -> vhost::Result<T>) -> Result<T> {
        self.watchdog.arm(Some(Instant::now() + PATIENCE));
        let result = call(&mut self.frontend);
        self.watchdog.arm(None);
        Ok(result?)
    }

    /// Sends a message of any type, body and descriptors. `flags` are those of the header, without
    /// the version.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn send_message(
        &self,
        request: u32,
        flags: u32,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let mut bytes = Vec::new();
        bytes.extend(request.to_le_bytes());
        bytes.extend((flags | 1).to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes()[..4].iter());
        bytes.extend(body);
        self.send_bytes(&bytes, descriptors)
    }

    /// Sends raw bytes.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let mut space = vec![std::mem::MaybeUninit::uninit(); 4096];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into())
        }
    }

    /// Receives one message as (request, flags, body); `None` if the connection has ended.
    ///
    /// # Errors
    /// If nothing comes within [`PATIENCE`].
    pub fn receive_message(&mut self) -> Result<Option<(u32, u32, Vec<u8>)>> {
        let mut header = [0; 12];
        if !self.receive_bytes(&mut header)? {
            return Ok(None);
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let mut body = vec![0; word(8).min(1 << 16) as usize];
        if !self.receive_bytes(&mut body)? {
            return Ok(None);
        }
        Ok(Some((word(0), word(4), body)))
    }

    fn receive_bytes(&mut self, bytes: &mut [u8]) -> Result<bool> {
        let mut filled = 0;
        while filled < bytes.len() {
            if !readable(&self.socket, PATIENCE)? {
                return Err(Error::Late("message"));
            }
            match self.socket.read(&mut bytes[filled..]) {
                Ok(0) => return Ok(false),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Sends a message with NEED_REPLY and returns the answer's first number: 0 means accepted.
    /// `None` if the back end ended the connection instead.
    ///
    /// # Errors
    /// If nothing comes within [`PATIENCE`].
    pub fn ask(&mut self, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<Option<u64>> {
        let sent = self.send_message(request, 8, body, descriptors);
        if let Err(Error::Io(error)) = &sent
            && matches!(error.kind(), std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset)
        {
            return Ok(None);
        }
        sent?;
        Ok(self.receive_message()?.map(|(_, _, body)| {
            let mut number = [0; 8];
            let known = body.len().min(8);
            number[..known].copy_from_slice(&body[..known]);
            u64::from_le_bytes(number)
        }))
    }

    /// Hands `op` to the device.
    ///
    /// # Errors
    /// If this client has no room for it.
    pub fn start(&mut self, op: &Op) -> Result<Ticket> {
        let ticket = self.place(op)?;
        self.queues[op.queue].kick_if_wanted()?;
        Ok(ticket)
    }

    /// Like [`Client::start`], without telling the device: several may go with one kick.
    ///
    /// # Errors
    /// If this client has no room for it.
    pub fn place(&mut self, op: &Op) -> Result<Ticket> {
        let memory = Arc::clone(&self.memory);
        let mut owned = Vec::new();
        let mut alloc = |bytes: u64, align: u64| -> Result<u64> {
            let at = memory.alloc(0, bytes, align)?;
            owned.push((at, bytes));
            Ok(at)
        };
        let header = alloc(16, 16)?;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&op.kind.to_le_bytes());
        bytes[8..].copy_from_slice(&op.sector.to_le_bytes());
        memory.store(header, &bytes);
        let status = alloc(1, 1)?;
        memory.store(status, &[UNTOUCHED]);

        let mut chain = vec![Descriptor::readable(header, 16)];
        let mut input = Vec::new();
        let total = u32::try_from(op.output.len()).map_err(std::io::Error::other)? + op.input;
        let mut rest = total;
        let mut written = 0;
        let last = (!op.segments.is_empty()).then_some(u32::MAX);
        let mut lengths = op.segments.iter().copied().chain(last.or(Some(u32::MAX)));
        while rest > 0 {
            let len = lengths.next().unwrap_or(u32::MAX).min(rest);
            let at = alloc(u64::from(len) + op.misalign, 512)? + op.misalign;
            if op.output.is_empty() {
                memory.store(at, &vec![UNTOUCHED; len as usize]);
                chain.push(Descriptor::writable(at, len));
                input.push((at, len));
            } else {
                memory.store(at, &op.output[written..written + len as usize]);
                written += len as usize;
                chain.push(Descriptor::readable(at, len));
            }
            rest -= len;
        }
        chain.push(Descriptor::writable(status, 1));
        let queue = &mut self.queues[op.queue];
        let head = if op.indirect {
            let table = alloc(16 * chain.len() as u64, 16)?;
            queue.place_indirect(table, &chain)?
        } else {
            queue.place(&chain)?
        };
        Ok(Ticket { queue: op.queue, head, kind: op.kind, input, status, owned })
    }

    /// Waits at most `limit` for the end of a request; if it comes, [`Client::finish`] has it at once.
    ///
    /// # Errors
    /// If the device breaks a rule of the ring.
    pub fn ends_within(&mut self, ticket: &Ticket, limit: Duration) -> Result<bool> {
        self.queues[ticket.queue].collect(ticket.head, limit)
    }

    /// Waits for the end of a request.
    ///
    /// # Errors
    /// If it does not come, or what the device says it wrote cannot be.
    pub fn finish(&mut self, ticket: Ticket) -> Result<Reply> {
        let used = self.queues[ticket.queue].wait_for(ticket.head)?.len;
        let status = self.memory.load(ticket.status, 1)[0];
        let data =
            ticket.input.iter().flat_map(|&(at, len)| self.memory.load(at, len as usize)).collect::<Vec<_>>();
        for (at, bytes) in ticket.owned {
            self.memory.release(at, bytes);
        }
        let most = data.len() as u64 + 1;
        let exact = status == status::OK && ticket.kind == request::IN;
        if u64::from(used) > most || (exact && u64::from(used) != most) {
            return Err(Error::Device(format!("used.len is {used}, writable were {most}")));
        }
        Ok(Reply { status, data, used })
    }

    /// Runs `op` to its end.
    ///
    /// # Errors
    /// As [`Client::start`] and [`Client::finish`]; a status other than OK is no error here.
    pub fn run(&mut self, op: &Op) -> Result<Reply> {
        let ticket = self.start(op)?;
        self.finish(ticket)
    }

    /// Reads `bytes` from `sector` on.
    ///
    /// # Errors
    /// [`Error::Status`] if the device does not want to.
    pub fn read(&mut self, sector: u64, bytes: u32) -> Result<Vec<u8>> {
        self.run(&Op::read(sector, bytes))?.ok()
    }

    /// Writes `data` from `sector` on.
    ///
    /// # Errors
    /// [`Error::Status`] if the device does not want to.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        self.run(&Op::write(sector, data))?.ok().map(|_| ())
    }

    /// Flushes.
    ///
    /// # Errors
    /// [`Error::Status`] if the device does not want to.
    pub fn flush(&mut self) -> Result<()> {
        self.run(&Op::flush())?.ok().map(|_| ())
    }

    /// Discards `sectors` from `sector` on.
    ///
    /// # Errors
    /// [`Error::Status`] if the device does not want to.
    pub fn discard(&mut self, sector: u64, sectors: u32) -> Result<()> {
        self.run(&Op::discard(&[(sector, sectors, 0)]))?.ok().map(|_| ())
    }

    /// Writes zeroes to `sectors` from `sector` on; with `unmap`, the device may deallocate them.
    ///
    /// # Errors
    /// [`Error::Status`] if the device does not want to.
    pub fn write_zeroes(&mut self, sector: u64, sectors: u32, unmap: bool) -> Result<()> {
        let flags = if unmap { request::UNMAP } else { 0 };
        self.run(&Op::write_zeroes(&[(sector, sectors, flags)]))?.ok().map(|_| ())
    }

    /// The serial, up to its first zero byte.
    ///
    /// # Errors
    /// [`Error::Status`] if the device does not want to.
    pub fn get_id(&mut self) -> Result<Vec<u8>> {
        let mut id = self.run(&Op::get_id())?.ok()?;
        if let Some(end) = id.iter().position(|&byte| byte == 0) {
            id.truncate(end);
        }
        Ok(id)
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Client").field("features", &self.features).finish_non_exhaustive()
    }
}
