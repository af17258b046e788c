//! One connection of a front end: the vhost-user messages, and what a ring needs to be started.
//!
//! Invariant: an answer to the front end is sent only when the queues' threads have done what was
//! asked: a stopped ring has nothing in flight, memory that was taken away is not used any more.
//! When the connection ends, however it ends, all rings are stopped and the memory is let go.
//!
//! The `vhost` crate reads and writes the messages. What it does not know (`SET_STATUS`,
//! `GET_STATUS`, messages of the future) or cannot do (`SET_BACKEND_REQ_FD`, for it has no message of a
//! config change) is seen by a look at the header before it reads it.
//!
//! Errors: a request that cannot be done is [`Error::ReqHandlerError`]; it is answered with a
//! negative acknowledgement if the front end asked for one, and the connection lives on. Everything
//! else has left the stream in an unknown state and closes it.
//!
//! Absent, each with its place: the in-flight region (`get_inflight_fd`, `set_inflight_fd`, and the
//! base in `Session::setup`), the dirty log (`set_log_base`, the flags of `set_vring_addr`,
//! `VHOST_F_LOG_ALL`), device state
//! (`set_device_state_fd`, `check_device_state`). None of their features is offered.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{RecvFlags, recv};
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::backend::Backend;
use crate::channel::{self, Channel};
use crate::config;
use crate::device::Inner;
use crate::events::Event;
use crate::guest_mem::{MAX_REGIONS, Memory, RegionSpec};
use crate::options::feature;
use crate::request::Rules;
use crate::ring::{Addresses, Shape};
use crate::worker::{Setup, Worker};

/// Bytes in a message's header: request, flags, size.
const HEADER_BYTES: usize = 12;
/// Flags of an answer: version 1, and that it is one.
const FLAGS_REPLY: u32 = 0x5;
/// The sender wants an acknowledgement.
const FLAG_NEED_REPLY: u32 = 0x8;
/// Bytes of a message that are read and thrown away at most.
const MAX_BODY_BYTES: u32 = 0x1000;

/// A request that cannot be done, told and survived.
fn refused(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(reason))
}

/// What the front end has said about one ring.
#[derive(Default)]
struct Vring {
    size: Option<u16>,
    addresses: Option<Addresses>,
    base: u16,
    kick: Option<Event>,
    call: Option<Event>,
    err: Option<Event>,
    enabled: bool,
    started: bool,
}

/// A front end's view of the device.
pub(crate) struct Session<B: Backend> {
    device: Arc<Inner<B>>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    memory: Arc<Memory>,
    vrings: Vec<Vring>,
    status: u8,
}

/// Serves one connection until it ends.
pub(crate) fn run<B: Backend>(device: &Arc<Inner<B>>, stream: UnixStream) -> Result<()> {
    let session = Arc::new(Mutex::new(Session::new(device.clone())));
    let own = stream.try_clone().map_err(Error::SocketError)?;
    let mut handler = BackendReqHandler::from_stream(stream, session.clone());
    let ended = loop {
        match next(&session, &own, &mut handler) {
            Ok(()) => {}
            Err(Error::ReqHandlerError(error)) => {
                if let Some(held) = device.quiet() {
                    log::warn!("{}: refused a message: {error} ({held} more held back)", device.name());
                }
            }
            Err(error) => break error,
        }
    };
    session.lock().unwrap_or_else(PoisonError::into_inner).end();
    match ended {
        Error::Disconnected => Ok(()),
        Error::SocketBroken(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        error => Err(error),
    }
}

/// Reads and does one message.
fn next<B: Backend>(
    session: &Arc<Mutex<Session<B>>>,
    mut own: &UnixStream,
    handler: &mut BackendReqHandler<Mutex<Session<B>>>,
) -> Result<()> {
    let mut header = [0; HEADER_BYTES];
    let seen = loop {
        match recv(own, &mut header, RecvFlags::PEEK) {
            Ok((_, seen)) => break seen,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::SocketBroken(error.into())),
        }
    };
    if seen == 0 {
        return Err(Error::Disconnected);
    }
    // Fewer bytes than the request's number are of a front end that sends headers in pieces.
    let Some(request) = word(&header[..seen], 0) else { return handler.handle_request() };
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    let offered = session.protocol.contains(VhostUserProtocolFeatures::STATUS);
    let set_status = request == FrontendReq::SET_STATUS as u32 && offered;
    let get_status = request == FrontendReq::GET_STATUS as u32 && offered;
    let unknown = FrontendReq::try_from(request).is_err();
    let set_channel = request == FrontendReq::SET_BACKEND_REQ_FD as u32
        && session.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ);
    if !set_status && !get_status && !set_channel && !unknown {
        drop(session);
        return handler.handle_request();
    }
    let descriptors = channel::receive_header(own, &mut header).map_err(Error::SocketBroken)?;
    let (Some(flags), Some(size)) = (word(&header, 4), word(&header, 8)) else {
        return Err(Error::InvalidMessage);
    };
    if size > MAX_BODY_BYTES {
        return Err(Error::OversizedMsg);
    }
    let mut body = vec![0; size as usize];
    own.read_exact(&mut body).map_err(Error::SocketBroken)?;
    let wants_ack =
        flags & FLAG_NEED_REPLY != 0 && session.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
    let answer = if get_status {
        Some(u64::from(session.status))
    } else if set_status {
        let [status, ..] = body[..] else { return Err(Error::InvalidMessage) };
        session.status = status;
        wants_ack.then_some(0)
    } else if set_channel {
        let channel = descriptors.into_iter().next().and_then(Channel::of);
        let answer = u64::from(channel.is_none());
        session.device.set_channel(channel);
        wants_ack.then_some(answer)
    } else if wants_ack {
        Some(1)
    } else {
        // Whether it is owed an answer cannot be known.
        return Err(Error::InvalidMessage);
    };
    if let Some(answer) = answer {
        let mut reply = [0; HEADER_BYTES + 8];
        reply[..4].copy_from_slice(&request.to_le_bytes());
        reply[4..8].copy_from_slice(&FLAGS_REPLY.to_le_bytes());
        reply[8..12].copy_from_slice(&8u32.to_le_bytes());
        reply[12..].copy_from_slice(&answer.to_le_bytes());
        own.write_all(&reply).map_err(Error::SocketBroken)?;
    }
    Ok(())
}

/// A 32-bit field of a message's header. The protocol has the machine's byte order; the machines
/// that we run on are little-endian, as the rings are.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

impl<B: Backend> Session<B> {
    fn new(device: Arc<Inner<B>>) -> Self {
        let vrings = (0..device.options().queues).map(|_| Vring::default()).collect();
        // A front end that comes back does not say again what its guest chose.
        device.set_writeback(device.writeback(), 0);
        Self {
            device,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            memory: Arc::default(),
            vrings,
            status: 0,
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or_else(|| refused(format!("there is no queue {index}")))
    }

    /// The thread of a started ring.
    fn worker(&self, index: usize) -> Option<Arc<Worker>> {
        self.vrings[index].started.then(|| self.device.worker(index)).flatten()
    }

    /// What starting a ring takes, if all of it has been said.
    fn setup(&self, index: usize) -> Option<Setup> {
        let vring = &self.vrings[index];
        if self.memory.is_empty() {
            return None;
        }
        let (size, addresses, kick) = (vring.size?, vring.addresses?, vring.kick.clone()?);
        let options = self.device.options();
        Some(Setup {
            memory: self.memory.clone(),
            addresses,
            shape: Shape {
                size,
                event_idx: self.has(feature::EVENT_IDX),
                indirect: self.has(feature::INDIRECT_DESC),
            },
            base: vring.base,
            rules: Rules {
                capacity: self.device.capacity(),
                block_bytes: options.logical_block.bytes().into(),
                read_only: options.read_only,
                discard: self.has(feature::DISCARD),
                write_zeroes: self.has(feature::WRITE_ZEROES),
                unmap: options.discard == crate::options::DiscardMode::Unmap,
            },
            kick,
            call: vring.call.clone(),
            err: vring.err.clone(),
        })
    }

    /// Starts a ring as soon as all of it has been said, in whatever order.
    ///
    /// A ring that is not enabled is not started, for its memory may still come; enabling one that
    /// was never configured succeeds and starts nothing.
    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        if self.vrings[index].started || !self.vrings[index].enabled {
            return Ok(());
        }
        let Some(setup) = self.setup(index) else { return Ok(()) };
        let worker = self.device.start_worker(index).map_err(Error::ReqHandlerError)?;
        worker.start_ring(setup).map_err(refused)?.map_err(refused)?;
        self.vrings[index].started = true;
        log::debug!("{}: queue {index} started", self.device.name());
        Ok(())
    }

    /// Stops a ring once its requests are returned. What was said about it is kept but for the kick:
    /// another one starts it again.
    fn stop(&mut self, index: usize) -> Result<()> {
        let worker = self.worker(index);
        let vring = &mut self.vrings[index];
        vring.started = false;
        vring.kick = None;
        if let Some(worker) = worker
            && let Some(base) = worker.stop_ring().map_err(refused)?
        {
            vring.base = base;
            log::debug!("{}: queue {index} stopped at {base}", self.device.name());
        }
        Ok(())
    }

    /// Goes on in another memory generation. Returns when the old one is not used any more if
    /// `wait` says so.
    fn set_memory(&mut self, memory: Memory, wait: bool) -> Result<()> {
        self.memory = Arc::new(memory);
        let mut releases = Vec::new();
        let mut first_error = Ok(());
        for index in 0..self.vrings.len() {
            let Some(worker) = self.worker(index) else { continue };
            let (placed, release) = worker.place(self.memory.clone(), None).map_err(refused)?;
            match placed {
                Ok(()) => releases.push(release),
                Err(error) => {
                    // The ring itself was taken away: nothing can be returned to it.
                    self.stop(index)?;
                    first_error = first_error.and(Err(refused(error)));
                }
            }
        }
        for index in 0..self.vrings.len() {
            if let Err(error) = self.start_if_ready(index) {
                log::debug!("{}: queue {index} waits for memory: {error}", self.device.name());
            }
        }
        if wait {
            for release in releases {
                // An error says that the thread has dropped it, with all that was in flight.
                let _ = release.recv();
            }
        }
        first_error
    }

    /// Stops all rings and forgets what was said about them.
    fn reset_rings(&mut self) {
        for index in 0..self.vrings.len() {
            if let Err(error) = self.stop(index) {
                log::error!("{}: queue {index}: {error}", self.device.name());
            }
            self.vrings[index] = Vring::default();
        }
    }

    /// The connection has ended.
    fn end(&mut self) {
        self.reset_rings();
        self.memory = Arc::default();
        self.device.set_channel(None);
    }
}

fn spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// An event descriptor, or the want of one.
fn event(file: Option<File>) -> Result<Option<Event>> {
    file.map(|file| Event::of(file).ok_or_else(|| refused("the descriptor is no eventfd"))).transpose()
}

impl<B: Backend> VhostUserBackendReqHandlerMut for Session<B> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; the specification lets a back end ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset_rings();
        self.status = 0;
        self.device.reset_writeback(self.features);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.options().features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.device.options().features();
        if unknown != 0 {
            return Err(refused(format!("features {unknown:#x} are not offered")));
        }
        let changed = features ^ self.features;
        if changed != 0 && self.vrings.iter().any(|vring| vring.started) {
            return Err(refused("features cannot change while rings run"));
        }
        self.features = features;
        self.device.set_writeback(self.device.writeback(), features);
        if !self.has(feature::PROTOCOL_FEATURES) {
            for index in 0..self.vrings.len() {
                self.vrings[index].enabled = true;
                self.start_if_ready(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let table = regions.iter().map(spec).zip(files);
        let memory = Memory::of(table).map_err(refused)?;
        self.set_memory(memory, true)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.started {
            return Err(refused("a running ring keeps its size"));
        }
        vring.size = Some(Shape::check_size(num).map_err(refused)?);
        self.start_if_ready(index as usize)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses { desc: descriptor, avail: available, used };
        let vring = self.vring(index)?;
        let same = vring.addresses.replace(addresses) == Some(addresses);
        match self.worker(index as usize) {
            // A front end says them again to change a flag.
            Some(_) if same => Ok(()),
            Some(worker) => {
                let (placed, _) = worker.place(self.memory.clone(), Some(addresses)).map_err(refused)?;
                placed.map_err(refused)
            }
            None => self.start_if_ready(index as usize),
        }
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.started {
            return Err(refused("a running ring keeps its place"));
        }
        vring.base = u16::try_from(base).map_err(|_| refused(format!("a base of {base}")))?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // There is no way to answer that it cannot be told, so an error closes the connection.
        if index as usize >= self.vrings.len() {
            return Err(Error::InvalidParam);
        }
        self.stop(index as usize).map_err(|_| Error::BackendInternalError)?;
        Ok(VhostUserVringState::new(index, self.vrings[index as usize].base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = event(fd)?.ok_or_else(|| refused("rings without a kick are not served"))?;
        self.vring(index.into())?.kick = Some(kick.clone());
        match self.worker(index.into()) {
            Some(worker) => {
                worker.set_kick(kick);
                Ok(())
            }
            None => self.start_if_ready(index.into()),
        }
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = event(fd)?;
        self.vring(index.into())?.call.clone_from(&call);
        if let Some(worker) = self.worker(index.into()) {
            worker.set_call(call);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let err = event(fd)?;
        self.vring(index.into())?.err.clone_from(&err);
        if let Some(worker) = self.worker(index.into()) {
            worker.set_err(err);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !protocol_features().bits();
        if unknown != 0 {
            return Err(refused(format!("protocol features {unknown:#x} are not offered")));
        }
        self.protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        match self.worker(index as usize) {
            Some(worker) => worker.enable(enable).map_err(refused),
            None => self.start_if_ready(index as usize),
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let device = &self.device;
        let config = config::bytes(device.options(), device.capacity(), device.writeback());
        config::read(&config, offset, size).map_err(refused)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let writeback = config::written(offset, buf).map_err(refused)?;
        if !self.has(feature::CONFIG_WCE) {
            return Err(refused("the cache mode was not negotiated to be settable"));
        }
        self.device.set_writeback(writeback, self.features);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(refused("this is no display"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refused("there are no shared objects"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("the in-flight region is not offered"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(refused("the in-flight region is not offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        let memory = self.memory.with(spec(region), &fd).map_err(refused)?;
        self.set_memory(memory, false)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(spec(region)).map_err(refused)?;
        self.set_memory(memory, true)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(refused("device state is not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(refused("device state is not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory regions are not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("the dirty log is not offered"))
    }
}

/// The protocol features to offer.
fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::STATUS
        | VhostUserProtocolFeatures::BACKEND_REQ
}

impl<B: Backend> Inner<B> {
    /// Whether writes must be durable, given what was negotiated: a driver that cannot flush, or
    /// does not know of the cache, takes an answered write for a durable one (VIRTIO 1.2 §5.2.6.2).
    pub(crate) fn set_writeback(&self, writeback: bool, features: u64) {
        let durable = !writeback || features & feature::FLUSH == 0;
        self.common().write_through.store(durable, Ordering::Relaxed);
        self.keep_writeback(writeback);
    }
}
