//! A device in this process, and a front end with a small driver that shares a memory file with it.

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cow_engine::cbt::ByteRange;
use cow_engine::host::HostStorage;
use cow_engine::memory::{Source, Target};
use cow_engine::{Durability, Storage, Zeroing};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_blk::{Backend, Cache, Connection, Device, Options};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const CAPACITY: usize = 4 << 20;
const MEMORY: u64 = 4 << 20;
const USER: u64 = 0x7f12_3450_0000;
const GUEST: u64 = 0x1_0000_0000;
const SIZE: u16 = 16;

const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const EVENT_IDX: u64 = 1 << 29;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// A disk in memory, whose requests may take their time.
struct Ram {
    bytes: Mutex<Vec<u8>>,
    delay_us: AtomicU64,
    fail: AtomicBool,
    durable_writes: AtomicU32,
    flushes: AtomicU32,
}

impl Ram {
    fn new() -> Self {
        Self {
            bytes: Mutex::new(vec![0; CAPACITY]),
            delay_us: AtomicU64::new(0),
            fail: AtomicBool::new(false),
            durable_writes: AtomicU32::new(0),
            flushes: AtomicU32::new(0),
        }
    }

    async fn pause(&self, io: &HostStorage) -> Result<(), &'static str> {
        let delay = self.delay_us.load(Ordering::Relaxed);
        if delay > 0 {
            io.sleep(Duration::from_micros(delay)).await;
        }
        if self.fail.load(Ordering::Relaxed) { Err("told to fail") } else { Ok(()) }
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

impl Backend for Ram {
    type Lane = ();
    type Error = &'static str;

    fn capacity(&self) -> u64 {
        CAPACITY as u64
    }

    fn lane(&self) {}

    async fn read(
        &self,
        io: &HostStorage,
        (): (),
        at: u64,
        mut into: Target<'_>,
    ) -> Result<(), &'static str> {
        self.pause(io).await?;
        let len = into.len();
        into.copy_from(0, &self.bytes.lock().unwrap()[index(at)..index(at) + len]);
        Ok(())
    }

    async fn write(
        &self,
        io: &HostStorage,
        (): (),
        at: u64,
        from: Source<'_>,
        durability: Durability,
    ) -> Result<(), &'static str> {
        self.pause(io).await?;
        if durability == Durability::Durable {
            self.durable_writes.fetch_add(1, Ordering::Relaxed);
        }
        from.copy_to(0, &mut self.bytes.lock().unwrap()[index(at)..index(at) + from.len()]);
        Ok(())
    }

    async fn flush(&self, io: &HostStorage, (): ()) -> Result<(), &'static str> {
        self.pause(io).await?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn discard(&self, io: &HostStorage, (): (), range: ByteRange) -> Result<(), &'static str> {
        self.pause(io).await?;
        self.bytes.lock().unwrap()[index(range.start())..index(range.end())].fill(0xdd);
        Ok(())
    }

    async fn write_zeroes(
        &self,
        io: &HostStorage,
        (): (),
        range: ByteRange,
        _zeroing: Zeroing,
        _durability: Durability,
    ) -> Result<(), &'static str> {
        self.pause(io).await?;
        self.bytes.lock().unwrap()[index(range.start())..index(range.end())].fill(0);
        Ok(())
    }
}

/// A queue of the driver, in its own part of the guest's memory.
struct Queue {
    at: u64,
    kick: EventFd,
    call: EventFd,
    avail: Cell<u16>,
    seen: Cell<u16>,
}

struct Guest {
    frontend: Frontend,
    socket: UnixStream,
    memory: File,
    queues: Vec<Queue>,
}

fn region(memory: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST,
        memory_size: MEMORY,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: memory.as_raw_fd(),
    }
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

impl Guest {
    /// Connects and negotiates, without rings.
    fn connect(device: &Device<Ram>, without: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        device.attach(theirs).unwrap();
        Self::negotiate(ours, memfd(MEMORY), without)
    }

    fn negotiate(socket: UnixStream, memory: File, without: u64) -> Self {
        let mut frontend = Frontend::from_stream(socket.try_clone().unwrap(), 64);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        assert_ne!(features & PROTOCOL_FEATURES, 0);
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(Protocol::MQ | Protocol::CONFIG | Protocol::CONFIGURE_MEM_SLOTS));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features & !without).unwrap();
        Self { frontend, socket, memory, queues: Vec::new() }
    }

    /// Connects with `queues` running rings.
    fn start(device: &Device<Ram>, queues: usize, without: u64) -> Self {
        let mut guest = Self::connect(device, without);
        guest.frontend.add_mem_region(&region(&guest.memory)).unwrap();
        for index in 0..queues {
            guest.start_ring(index, 0);
        }
        guest
    }

    fn start_ring(&mut self, index: usize, base: u16) {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let at = index as u64 * 0x8_0000;
        let queue = Queue {
            at,
            kick: event(),
            call: event(),
            avail: Cell::new(base),
            seen: Cell::new(self.get16(at + 0x2002)),
        };
        self.frontend.set_vring_num(index, SIZE).unwrap();
        self.frontend.set_vring_base(index, base).unwrap();
        self.frontend.set_vring_addr(index, &Self::addresses(at)).unwrap();
        self.frontend.set_vring_call(index, &queue.call).unwrap();
        self.frontend.set_vring_kick(index, &queue.kick).unwrap();
        self.frontend.set_vring_enable(index, true).unwrap();
        self.queues.truncate(index);
        self.queues.push(queue);
    }

    fn addresses(at: u64) -> VringConfigData {
        VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: USER + at,
            avail_ring_addr: USER + at + 0x1000,
            used_ring_addr: USER + at + 0x2000,
            log_addr: None,
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    /// Where request `n` of a queue has its header, its status 16 bytes on, and its data a page on.
    fn place(&self, queue: usize, n: u16) -> u64 {
        self.queues[queue].at + 0x1_0000 + 0x2000 * u64::from(n % 5)
    }

    /// Makes a request available from descriptors `3 * n`, without a kick.
    fn offer(&self, queue: usize, n: u16, kind: u32, sector: u64, data: &[u8], reads: bool) {
        let q = &self.queues[queue];
        let place = self.place(queue, n);
        self.put(place, &kind.to_le_bytes());
        self.put(place + 8, &sector.to_le_bytes());
        self.put(place + 16, &[0xff]);
        self.put(place + 0x1000, data);
        let mut parts = vec![(place, 16, 0u16)];
        if !data.is_empty() {
            parts.push((place + 0x1000, data.len(), if reads { 2 } else { 0 }));
        }
        parts.push((place + 16, 1, 2));
        let head = n % 5 * 3;
        let last = parts.len() - 1;
        for (i, (at, len, flags)) in parts.into_iter().enumerate() {
            let desc = q.at + 16 * (u64::from(head) + i as u64);
            let next = head + u16::try_from(i).unwrap() + 1;
            self.put(desc, &(GUEST + at).to_le_bytes());
            self.put(desc + 8, &u32::try_from(len).unwrap().to_le_bytes());
            self.put(desc + 12, &(flags | u16::from(i < last)).to_le_bytes());
            self.put(desc + 14, &next.to_le_bytes());
        }
        let avail = q.avail.get();
        self.put(q.at + 0x1004 + 2 * u64::from(avail % SIZE), &head.to_le_bytes());
        q.avail.set(avail.wrapping_add(1));
        self.put(q.at + 0x1002, &q.avail.get().to_le_bytes());
    }

    /// Waits for one more used element; answers its head and length. Sleeps until interrupted, as a
    /// driver does: an interrupt that is not sent shows as a failure.
    fn wait(&self, queue: usize) -> (u32, u32) {
        let q = &self.queues[queue];
        let until = Instant::now() + Duration::from_secs(5);
        let seen = q.seen.get();
        // Ask for an interrupt at the next element (used_event), then look.
        self.put(q.at + 0x1004 + 2 * u64::from(SIZE), &seen.to_le_bytes());
        while self.get16(q.at + 0x2002) == seen {
            while q.call.read().is_err() {
                assert!(Instant::now() < until, "no interrupt came");
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        q.seen.set(seen.wrapping_add(1));
        let element = q.at + 0x2004 + 8 * u64::from(seen % SIZE);
        (u32::from_le_bytes(self.get(element)), u32::from_le_bytes(self.get(element + 4)))
    }

    /// Does one request; answers its status, used length and data.
    fn request(&self, kind: u32, sector: u64, data: &[u8; 512], reads: bool) -> (u8, u32, [u8; 512]) {
        self.offer(0, 0, kind, sector, data, reads);
        self.queues[0].kick.write(1).unwrap();
        let (head, len) = self.wait(0);
        assert_eq!(head, 0);
        (self.get::<1>(self.place(0, 0) + 16)[0], len, self.get(self.place(0, 0) + 0x1000))
    }

    fn write(&self, sector: u64, fill: u8) {
        assert_eq!(self.request(1, sector, &[fill; 512], false), (0, 1, [fill; 512]));
    }

    fn read(&self, sector: u64) -> u8 {
        let (status, len, data) = self.request(0, sector, &[0xee; 512], true);
        assert_eq!((status, len), (0, 513));
        assert!(data.iter().all(|byte| *byte == data[0]));
        data[0]
    }
}

fn device() -> Arc<Device<Ram>> {
    device_with(Options { queues: 4, serial: "EBB1".into(), ..Options::default() })
}

fn device_with(options: Options) -> Arc<Device<Ram>> {
    Device::new(Ram::new(), options).unwrap()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn requests_go_through_and_are_counted() {
    let device = device();
    let guest = Guest::start(&device, 1, 0);
    guest.write(5, 0x11);
    guest.write(8191, 0x22);
    assert_eq!((guest.read(5), guest.read(8191), guest.read(6)), (0x11, 0x22, 0));
    let (status, len, _) = guest.request(0, 8192, &[0; 512], true);
    assert_eq!((status, len), (1, 1));
    let (status, len, _) = guest.request(77, 0, &[0; 512], true);
    assert_eq!((status, len), (2, 1));
    let (status, len, id) = guest.request(8, 0, &[0xee; 512], true);
    assert_eq!((status, len, &id[..21]), (0, 21, &b"EBB1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xee"[..]));
    guest.offer(0, 0, 4, 0, &[], false);
    guest.queues[0].kick.write(1).unwrap();
    assert_eq!(guest.wait(0), (0, 1));
    device.backend().fail.store(true, Ordering::Relaxed);
    assert_eq!(guest.request(0, 0, &[0; 512], true).0, 1);
    let counters = device.counters();
    assert_eq!((counters.reads, counters.writes, counters.flushes), (3, 2, 1));
    assert_eq!((counters.read_bytes, counters.refused, counters.errors), (1536, 2, 1));
    drop(guest);
    eventually("the connection ends", || !device.is_connected());
    device.stop();
}

#[test]
fn discards_and_zeroes_reach_the_backend() {
    let device = device();
    let guest = Guest::start(&device, 1, 0);
    guest.write(1, 0x33);
    for (kind, flags, fill) in [(11u32, 0u32, 0xdd), (13, 1, 0)] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&1u64.to_le_bytes());
        range[8..12].copy_from_slice(&1u32.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        guest.offer(0, 0, kind, 0, &range, false);
        guest.queues[0].kick.write(1).unwrap();
        assert_eq!(guest.wait(0), (0, 1));
        assert_eq!(guest.read(1), fill);
    }
}

#[test]
fn many_requests_in_flight_on_two_queues_complete_once_each() {
    for (delay, without) in [(0, 0), (200, 0), (0, EVENT_IDX), (200, EVENT_IDX)] {
        let device = device();
        device.backend().delay_us.store(delay, Ordering::Relaxed);
        let guest = Guest::start(&device, 2, without);
        for round in 0..200u64 {
            for queue in 0..2 {
                for n in 0..5u8 {
                    let sector = round * 10 + queue as u64 * 5 + u64::from(n);
                    guest.offer(queue, n.into(), 1, sector, &[n + 1; 512], false);
                }
                guest.queues[queue].kick.write(1).unwrap();
            }
            for queue in 0..2 {
                let mut heads: Vec<_> = (0..5).map(|_| guest.wait(queue).0).collect();
                heads.sort_unstable();
                assert_eq!(heads, [0, 3, 6, 9, 12]);
            }
        }
        assert_eq!(device.counters().writes, 2000);
        let bytes = device.backend().bytes.lock().unwrap();
        assert!((0..2000).all(|sector| usize::from(bytes[sector * 512]) == sector % 5 + 1));
    }
}

#[test]
fn writes_are_durable_unless_the_guest_can_flush() {
    let durable = |device: &Device<Ram>| device.backend().durable_writes.swap(0, Ordering::Relaxed);
    let device = device();
    let mut guest = Guest::start(&device, 1, 0);
    guest.write(0, 1);
    assert_eq!(durable(&device), 0);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    guest.write(0, 2);
    assert_eq!(durable(&device), 1);
    drop(guest);
    // Another connection may be the same guest.
    let guest = Guest::start(&device, 1, 0);
    guest.write(0, 3);
    assert_eq!(durable(&device), 1);
    drop(guest);
    let fresh = device_with(Options::default());
    Guest::start(&fresh, 1, FLUSH | CONFIG_WCE).write(0, 3);
    assert_eq!(durable(&fresh), 1);
    let through = device_with(Options { cache: Cache::Writethrough, ..Options::default() });
    Guest::start(&through, 1, 0).write(0, 3);
    assert_eq!(durable(&through), 1);
}

#[test]
fn the_configuration_space_is_read_in_parts() {
    let device = device();
    let mut guest = Guest::connect(&device, 0);
    for len in [57u32, 60, 64, 256] {
        let (_, bytes) = guest
            .frontend
            .get_config(0, len, VhostUserConfigFlags::WRITABLE, &vec![0; len as usize])
            .unwrap();
        assert_eq!(bytes.len(), len as usize);
        assert_eq!(bytes[..8], (CAPACITY as u64 / 512).to_le_bytes());
    }
    assert!(guest.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[9; 8]).is_err());
    assert_eq!(guest.frontend.get_queue_num().unwrap(), 4);
    assert_eq!(guest.frontend.get_max_mem_slots().unwrap(), 509);
}

#[test]
fn stopping_a_ring_waits_for_its_requests_and_tells_where_it_stood() {
    let device = device();
    device.backend().delay_us.store(50_000, Ordering::Relaxed);
    let mut guest = Guest::start(&device, 1, 0);
    for n in 0..5 {
        guest.offer(0, n, 1, n.into(), &[7; 512], false);
    }
    guest.queues[0].kick.write(1).unwrap();
    eventually("the requests are taken", || device.counters().in_flight == 5);
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 5);
    assert_eq!(guest.get16(0x2002), 5);
    assert_eq!(device.counters().in_flight, 0);
    // It starts again where it was, and finds what was offered meanwhile.
    let seen = guest.queues[0].seen.get();
    assert_eq!(seen, 0);
    for _ in 0..5 {
        guest.wait(0);
    }
    guest.offer(0, 0, 1, 9, &[8; 512], false);
    guest.start_ring(0, 5);
    guest.queues[0].avail.set(6);
    assert_eq!(guest.wait(0).0, 0);
    assert_eq!(device.backend().bytes.lock().unwrap()[9 * 512], 8);
    // Asked about a ring that was never started, the base is what was set.
    assert_eq!(guest.frontend.get_vring_base(1).unwrap(), 0);
}

#[test]
fn a_parked_ring_takes_nothing_until_it_is_enabled() {
    let device = device();
    let mut guest = Guest::start(&device, 1, 0);
    // Rings that were never configured can be enabled and disabled.
    guest.frontend.set_vring_enable(3, true).unwrap();
    guest.frontend.set_vring_enable(3, false).unwrap();
    assert!(guest.frontend.set_vring_enable(4, true).is_err());
    guest.write(0, 1);
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.offer(0, 0, 1, 1, &[2; 512], false);
    guest.queues[0].kick.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(device.counters().writes, 1);
    guest.frontend.set_vring_enable(0, true).unwrap();
    guest.wait(0);
    assert_eq!(device.counters().writes, 2);
}

#[test]
fn a_kick_before_enabling_is_not_lost() {
    let device = device();
    let mut guest = Guest::start(&device, 1, 0);
    guest.write(0, 1);
    guest.frontend.get_vring_base(0).unwrap();
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.offer(0, 0, 1, 1, &[2; 512], false);
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    kick.write(1).unwrap();
    guest.frontend.set_vring_kick(0, &kick).unwrap();
    guest.frontend.set_vring_enable(0, true).unwrap();
    guest.wait(0);
    assert_eq!(device.counters().writes, 2);
}

#[test]
fn memory_comes_and_goes_under_a_running_ring() {
    let device = device();
    let mut guest = Guest::start(&device, 1, 0);
    guest.write(0, 1);
    let extra = memfd(1 << 20);
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST + MEMORY,
        memory_size: 1 << 20,
        userspace_addr: USER + MEMORY,
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    guest.frontend.add_mem_region(&info).unwrap();
    assert!(guest.frontend.add_mem_region(&info).is_err(), "it overlaps itself");
    assert_eq!(guest.read(0), 1);
    // With requests in flight, taking a region away waits for them.
    device.backend().delay_us.store(30_000, Ordering::Relaxed);
    guest.offer(0, 0, 1, 3, &[4; 512], false);
    guest.queues[0].kick.write(1).unwrap();
    eventually("the request is taken", || device.counters().in_flight == 1);
    guest.frontend.remove_mem_region(&info).unwrap();
    assert_eq!(device.counters().writes, 2);
    guest.wait(0);
    assert!(guest.frontend.remove_mem_region(&info).is_err());
    device.backend().delay_us.store(0, Ordering::Relaxed);
    // The whole table anew: the same ring elsewhere in our address space.
    guest.frontend.set_mem_table(&[region(&guest.memory)]).unwrap();
    assert_eq!(guest.read(3), 4);
    // A file that is shorter than its region is refused, and the ring goes on.
    let short = VhostUserMemoryRegionInfo { memory_size: 2 << 20, ..info };
    assert!(guest.frontend.add_mem_region(&short).is_err());
    assert_eq!(guest.read(3), 4);
    // A table without the ring stops it.
    assert!(guest.frontend.set_mem_table(&[info]).is_err());
}

#[test]
fn the_ring_may_be_set_up_in_any_order_and_wrongly() {
    let device = device();
    let mut guest = Guest::connect(&device, 0);
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.frontend.set_vring_kick(0, &kick).unwrap();
    guest.frontend.set_vring_enable(0, true).unwrap();
    for bad in [0, 3, 2048] {
        assert!(guest.frontend.set_vring_num(0, bad).is_err());
    }
    guest.frontend.set_vring_num(0, SIZE).unwrap();
    guest.frontend.set_vring_addr(0, &Guest::addresses(0)).unwrap();
    guest.frontend.add_mem_region(&region(&guest.memory)).unwrap();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let call = event();
    guest.frontend.set_vring_call(0, &call).unwrap();
    guest.queues.push(Queue { at: 0, kick, call, avail: Cell::new(0), seen: Cell::new(0) });
    guest.write(0, 6);
    assert!(guest.frontend.set_vring_num(0, 32).is_err(), "a running ring");
    assert!(guest.frontend.set_vring_base(0, 3).is_err(), "a running ring");
    guest.frontend.set_vring_addr(0, &Guest::addresses(0)).unwrap();
    assert_eq!(guest.read(0), 6);
}

#[test]
fn a_broken_ring_stops_alone_and_says_so() {
    let device = device();
    let mut guest = Guest::start(&device, 2, 0);
    let err = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.frontend.set_vring_err(0, &err).unwrap();
    guest.put(0x1002, &100u16.to_le_bytes());
    guest.queues[0].kick.write(1).unwrap();
    eventually("the error is signalled", || err.read().is_ok());
    guest.offer(1, 0, 1, 0, &[1; 512], false);
    guest.queues[1].kick.write(1).unwrap();
    guest.wait(1);
    // A reset of the ring makes it whole.
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 0);
    guest.put(0x1002, &0u16.to_le_bytes());
    let second = guest.queues.pop().unwrap();
    guest.start_ring(0, 0);
    guest.queues.push(second);
    guest.write(7, 7);
}

#[test]
fn a_front_end_comes_back_any_number_of_times() {
    let device = device();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let hook = seen.clone();
    device.on_connection(move |what| hook.lock().unwrap().push(what));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blk.sock");
    device.listen(UnixListener::bind(&path).unwrap()).unwrap();
    let memory = memfd(MEMORY);
    let mut base = 0;
    for round in 0..20u8 {
        let stream = UnixStream::connect(&path).unwrap();
        let mut guest = Guest::negotiate(stream, memory.try_clone().unwrap(), 0);
        guest.frontend.add_mem_region(&region(&memory)).unwrap();
        guest.start_ring(0, base);
        if round > 0 {
            assert_eq!(guest.read(3), round);
        }
        guest.write(3, round + 1);
        base = guest.queues[0].avail.get();
        if round % 2 == 0 {
            // It dies with a request in flight, which is still returned.
            device.backend().delay_us.store(5_000, Ordering::Relaxed);
            guest.offer(0, 0, 1, 4, &[9; 512], false);
            guest.queues[0].kick.write(1).unwrap();
            eventually("it is taken", || device.counters().in_flight == 1);
            base += 1;
            drop(guest);
            eventually("it is returned", || device.counters().in_flight == 0);
            device.backend().delay_us.store(0, Ordering::Relaxed);
        }
    }
    eventually("all have gone", || seen.lock().unwrap().len() == 40);
    let seen = seen.lock().unwrap();
    assert!(seen.chunks(2).all(|pair| pair == [Connection::Up, Connection::Down]));
    device.stop();
}

#[test]
fn resetting_the_device_stops_its_rings() {
    let device = device();
    let mut guest = Guest::start(&device, 1, 0);
    guest.write(0, 1);
    guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    guest.frontend.reset_device().unwrap();
    guest.put(0x1002, &[0, 0]);
    guest.put(0x2002, &[0, 0]);
    guest.start_ring(0, 0);
    guest.write(0, 2);
    assert_eq!(device.backend().durable_writes.load(Ordering::Relaxed), 0);
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, flags, u32::try_from(body.len()).unwrap()] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(body);
    bytes
}

#[test]
fn status_is_kept_and_messages_of_the_future_are_refused() {
    let device = device();
    let guest = Guest::start(&device, 1, 0);
    let mut socket = &guest.socket;
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket.write_all(&message(39, 1, &7u64.to_le_bytes())).unwrap();
    socket.write_all(&message(40, 1, &[])).unwrap();
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..], message(40, 5, &7u64.to_le_bytes()));
    socket.write_all(&message(39, 9, &3u64.to_le_bytes())).unwrap();
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..], message(39, 5, &0u64.to_le_bytes()));
    socket.write_all(&message(1000, 9, &[1; 40])).unwrap();
    socket.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..], message(1000, 5, &1u64.to_le_bytes()));
    guest.write(0, 1);
}

#[test]
fn nonsense_closes_the_connection_and_only_that() {
    let device = device();
    let nonsense: [Vec<u8>; 7] = [
        vec![0xff; 100],
        message(1000, 1, &[]),
        message(5, 1, &[0xff; 40]),
        message(24, 1, &[0xff; 8]),
        message(11, 1, &[0xff; 8]),
        message(1, 0, &[]),
        vec![1],
    ];
    for bytes in nonsense {
        let guest = Guest::start(&device, 1, 0);
        guest.write(0, 1);
        let mut socket = &guest.socket;
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.write_all(&bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        // What it left unread may make it a reset.
        let _ = socket.read_to_end(&mut rest);
        drop(guest);
        eventually("the connection is closed", || !device.is_connected());
    }
    Guest::start(&device, 1, 0).write(0, 1);
}

#[test]
fn a_descriptor_that_is_no_eventfd_is_refused() {
    let device = device();
    let guest = Guest::start(&device, 1, 0);
    let file = tempfile::tempfile().unwrap();
    let fake: EventFd = {
        use std::os::fd::{FromRawFd, IntoRawFd};
        #[allow(unsafe_code)]
        // SAFETY: the descriptor is open and owned by nobody else.
        // JUSTIFICATION: `EventFd` has no safe way to hold what is none, which is what is tested.
        unsafe {
            EventFd::from_raw_fd(file.into_raw_fd())
        }
    };
    assert!(guest.frontend.set_vring_call(0, &fake).is_err());
    assert!(guest.frontend.set_vring_kick(0, &fake).is_err());
    guest.write(0, 1);
}

#[test]
fn stopping_ends_connections_listeners_and_threads() {
    let device = device();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("blk.sock");
    device.listen(UnixListener::bind(&path).unwrap()).unwrap();
    device.backend().delay_us.store(20_000, Ordering::Relaxed);
    let guest = Guest::start(&device, 2, 0);
    guest.offer(0, 0, 1, 0, &[5; 512], false);
    guest.queues[0].kick.write(1).unwrap();
    eventually("it is taken", || device.counters().in_flight == 1);
    let before = Instant::now();
    device.stop();
    assert!(before.elapsed() < Duration::from_secs(2));
    assert_eq!(device.counters().writes, 1);
    assert_eq!(guest.get16(0x2002), 1, "what was in flight is returned");
    assert!(!device.is_connected());
}
