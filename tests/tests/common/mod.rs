//! What a virtio block device does, whoever serves it: run on Ebbtide, and on
//! `qemu-storage-daemon` to check the checks.

use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use ebbtide_tests::daemon::{Daemon, Disk, Program};
use ebbtide_tests::random::Random;
pub(crate) use ebbtide_tests::random::bytes;
use ebbtide_tests::vhost_client::{Client, Error, Op, Options};
use ebbtide_tests::virtio::{config, feature, request, status};

pub(crate) const SECTORS: u64 = (64 << 20) / 512;

/// A daemon with one disk `vda` of [`SECTORS`].
pub(crate) fn one_disk(program: Program) -> Result<Daemon> {
    Daemon::start(program, &[Disk::default()])
}

pub(crate) fn u32_at(space: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(space[at..at + 4].try_into().expect("four bytes"))
}

/// What lies in the image on the host, the page cache included.
pub(crate) fn on_host(daemon: &Daemon, sector: u64, count: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; count];
    std::fs::File::open(daemon.image("vda"))?.read_exact_at(&mut data, sector * 512)?;
    Ok(data)
}

pub(crate) fn status_of<T: std::fmt::Debug>(result: Result<T, Error>) -> Result<u8> {
    match result {
        Ok(_) => Ok(status::OK),
        Err(Error::Status(code)) => Ok(code),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn config_space_is_readable_at_any_offset_and_length(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let space = client.config(0, 60)?;
    let capacity = u64::from_le_bytes(space[config::CAPACITY..8].try_into()?);
    ensure!(capacity == SECTORS, "capacity is {capacity} sectors");
    ensure!(u32_at(&space, config::BLK_SIZE) == 512, "block size");
    ensure!(u32_at(&space, config::SEG_MAX) >= 1, "segments");
    ensure!(u32_at(&space, config::MAX_DISCARD_SECTORS) >= 1, "discard");
    ensure!(u32_at(&space, config::MAX_DISCARD_SEG) >= 1, "discard ranges");
    ensure!(u32_at(&space, config::MAX_WRITE_ZEROES_SECTORS) >= 1, "write zeroes");
    ensure!(u32_at(&space, config::MAX_WRITE_ZEROES_SEG) >= 1, "write zeroes ranges");
    // What QEMU asks for.
    ensure!(client.config(0, 57)? == space[..57]);
    Ok(())
}

pub(crate) fn what_is_written_is_read_and_is_on_the_host(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    ensure!(client.read(0, 4096)? == [0; 4096], "a hole reads as zeroes");
    for (sector, count) in [(0, 512), (1, 512), (7, 4096), (100, 65536), (SECTORS - 1, 512)] {
        let data = bytes(sector, count);
        client.write(sector, &data)?;
        ensure!(client.read(sector, u32::try_from(count)?)? == data, "sector {sector}");
        client.flush()?;
        ensure!(on_host(&daemon, sector, count)? == data, "sector {sector} on the host");
    }
    ensure!(client.get_id()?.len() <= 20, "serial");
    Ok(())
}

pub(crate) fn buffers_may_lie_and_be_cut_anyhow(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let shapes: [&[u32]; 6] = [&[], &[512], &[1], &[1, 510, 2, 511], &[4095, 1, 4097], &[100; 40]];
    let mut sector = 3;
    for (number, segments) in shapes.into_iter().enumerate() {
        for misalign in [0, 1, 4, 511] {
            for indirect in [false, true] {
                let indirect = indirect && client.features & feature::INDIRECT_DESC != 0;
                let data = bytes(sector, 17 * 512);
                let shape = Op { segments: segments.to_vec(), misalign, indirect, ..Op::default() };
                let write = Op { kind: request::OUT, sector, output: data.clone(), ..shape.clone() };
                let context = format!("shape {number}, {misalign} off, indirect {indirect}");
                ensure!(client.run(&write)?.status == status::OK, "write: {context}");
                let read = Op { kind: request::IN, sector, input: 17 * 512, ..shape };
                ensure!(client.run(&read)?.ok()? == data, "read: {context}");
                ensure!(client.read(sector, 17 * 512)? == data, "plain read: {context}");
                sector += 19;
            }
        }
    }
    Ok(())
}

pub(crate) fn buffers_may_cross_touching_regions(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let (begin, length) = client.memory.region(0);
    for before in [512, 1, 4096, 4095] {
        let data = bytes(before, 8192);
        let at = begin + length - before;
        client.memory.store(at, &data);
        ensure!(transfer(&mut client, request::OUT, 64, at, 8192)? == status::OK);
        ensure!(client.read(64, 8192)? == data, "written from {before} before the border");
        client.memory.store(at, &[0; 8192]);
        ensure!(transfer(&mut client, request::IN, 64, at, 8192)? == status::OK);
        ensure!(client.memory.load(at, 8192) == data, "read to {before} before the border");
    }
    // A region far away, and the last bytes of it.
    let (begin, length) = client.memory.region(2);
    for at in [begin, begin + length - 512] {
        client.memory.store(at, &bytes(at, 512));
        ensure!(transfer(&mut client, request::OUT, 9, at, 512)? == status::OK);
        ensure!(client.read(9, 512)? == bytes(at, 512), "far region");
    }
    Ok(())
}

/// One request with one data segment where the test wants it.
pub(crate) fn transfer(client: &mut Client, kind: u32, sector: u64, at: u64, len: u32) -> Result<u8> {
    use ebbtide_tests::vhost_client::Descriptor;
    let head = client.memory.alloc(0, 32, 16)?;
    let mut header = [0; 32];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..16].copy_from_slice(&sector.to_le_bytes());
    header[16] = 0xee;
    client.memory.store(head, &header);
    let data =
        if kind == request::IN { Descriptor::writable(at, len) } else { Descriptor::readable(at, len) };
    let chain = [Descriptor::readable(head, 16), data, Descriptor::writable(head + 16, 1)];
    client.queues[0].submit(&chain)?;
    client.queues[0].wait()?;
    let code = client.memory.load(head + 16, 1)[0];
    client.memory.release(head, 32);
    Ok(code)
}

pub(crate) fn requests_past_the_end_are_errors(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let beyond = [(SECTORS, 512), (SECTORS - 1, 1024), (SECTORS - 7, 4096), (u64::MAX, 512), (1 << 55, 512)];
    for (sector, count) in beyond {
        let read = client.run(&Op::read(sector, count))?;
        ensure!(read.status == status::IOERR, "read at {sector}: {}", read.status);
        let write = client.run(&Op::write(sector, &bytes(1, count as usize)))?;
        ensure!(write.status == status::IOERR, "write at {sector}: {}", write.status);
    }
    let len = std::fs::metadata(daemon.image("vda"))?.len();
    ensure!(len == SECTORS * 512, "the image became {len} bytes long");
    ensure!(client.read(SECTORS - 8, 4096)? == [0; 4096], "nothing of it was written");
    Ok(())
}

pub(crate) fn unknown_types_are_unsupported(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    for kind in [2, 3, 5, 14, 77, 0x7fff_ffff] {
        let reply = client.run(&Op { kind, input: 512, ..Op::default() })?;
        ensure!(reply.status == status::UNSUPP, "type {kind}: {}", reply.status);
    }
    Ok(())
}

pub(crate) fn discards_and_zeroes_touch_only_their_range(program: Program) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let whole = bytes(5, 128 * 512);
    // Ranges that do and do not fit the host's blocks.
    for (first, sectors) in [(8_u32, 8), (1, 7), (3, 100), (0, 128)] {
        for unmap in [false, true] {
            client.write(0, &whole)?;
            client.write_zeroes(first.into(), sectors, unmap)?;
            let mut wanted = whole.clone();
            let (from, to) = (first as usize * 512, (first + sectors) as usize * 512);
            wanted[from..to].fill(0);
            ensure!(client.read(0, 128 * 512)? == wanted, "zeroes {first}+{sectors}, {unmap}");
        }
        client.write(0, &whole)?;
        client.discard(first.into(), sectors)?;
        let now = client.read(0, 128 * 512)?;
        let (from, to) = (first as usize * 512, (first + sectors) as usize * 512);
        ensure!(now[..from] == whole[..from] && now[to..] == whole[to..], "discard {first}+{sectors}");
    }
    ensure!(status_of(client.discard(SECTORS - 1, 2))? == status::IOERR, "discard past the end");
    ensure!(status_of(client.write_zeroes(SECTORS, 1, true))? == status::IOERR, "zeroes past the end");
    ensure!(status_of(client.write_zeroes(u64::MAX, 1, true))? == status::IOERR, "zeroes far past the end");
    // VIRTIO 1.2 §5.2.6.2
    let reserved = client.run(&Op::write_zeroes(&[(0, 8, 2)]))?;
    ensure!(reserved.status == status::UNSUPP, "a reserved flag: {}", reserved.status);
    let unmap = client.run(&Op::discard(&[(0, 8, request::UNMAP)]))?;
    ensure!(unmap.status == status::UNSUPP, "unmap in a discard: {}", unmap.status);
    Ok(())
}

pub(crate) fn a_read_only_disk_is_not_written(program: Program) -> Result<()> {
    let daemon = Daemon::start(program, &[Disk { read_only: true, ..Disk::default() }])?;
    let mut client = daemon.connect("vda", &Options::default())?;
    ensure!(client.offered & feature::RO != 0, "it says so");
    ensure!(client.read(8, 4096)? == [0; 4096]);
    client.flush()?;
    let write = client.run(&Op::write(8, &[1; 4096]))?;
    ensure!(write.status == status::IOERR, "write: {}", write.status);
    for op in [Op::discard(&[(8, 8, 0)]), Op::write_zeroes(&[(8, 8, 0)])] {
        let reply = client.run(&op)?;
        ensure!(reply.status != status::OK, "type {} is done", op.kind);
    }
    ensure!(client.read(8, 4096)? == [0; 4096], "nothing was written");
    Ok(())
}

/// Many requests at once, in several queues, with the ring's indices about to wrap.
pub(crate) fn every_request_comes_back_once(program: Program, options: &Options) -> Result<()> {
    let daemon = one_disk(program)?;
    let mut client = daemon.connect("vda", options)?;
    let mut random = Random::new(u64::from(options.queue_size));
    let queues = client.queues.len();
    let most = usize::from(options.queue_size) / 4;
    let indirect = client.features & feature::INDIRECT_DESC != 0;
    for _ in 0..12 {
        let mut tickets = Vec::new();
        for number in 0..most {
            for queue in 0..queues {
                // No two in flight touch the same sectors.
                let sector = ((number * queues + queue) * 8) as u64;
                let indirect = indirect && random.below(2) == 0;
                let data = bytes(random.next(), 4096);
                let op = Op { queue, indirect, ..Op::write(sector, &data) };
                tickets.push((client.place(&op)?, sector, data));
            }
        }
        for queue in &mut client.queues {
            queue.kick_if_wanted()?;
        }
        let mut written = Vec::new();
        for (ticket, sector, data) in tickets {
            client.finish(ticket)?.ok()?;
            written.push((sector, data));
        }
        for (number, (sector, data)) in written.into_iter().enumerate() {
            let queue = number % queues;
            ensure!(client.run(&Op { queue, ..Op::read(sector, 4096) })?.ok()? == data, "sector {sector}");
        }
    }
    for queue in &mut client.queues {
        let more = queue.wait_within(Duration::ZERO)?;
        ensure!(more.is_none() && queue.flying() == 0, "something came twice: {more:?}");
    }
    Ok(())
}

/// The ways to present oneself that every device must know.
pub(crate) fn manners() -> Vec<Options> {
    let plain = Options::default();
    vec![
        plain.clone(),
        Options { features: !feature::EVENT_IDX, ..plain.clone() },
        Options { features: !feature::INDIRECT_DESC, ..plain.clone() },
        Options { base: 65_500, ..plain.clone() },
        Options { queues: 4, base: 65_535, queue_size: 64, ..plain.clone() },
        Options { queue_size: 1024, ..plain.clone() },
        Options { queue_size: 16, ..plain.clone() },
        Options { mem_table: true, need_reply: false, ..plain },
    ]
}

pub(crate) fn two_disks_are_served_at_once(program: Program) -> Result<()> {
    let disks = [Disk::default(), Disk { name: "vdb", ..Disk::default() }];
    let daemon = Daemon::start(program, &disks)?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = ["vda", "vdb"]
            .into_iter()
            .enumerate()
            .map(|(number, name)| {
                let daemon = &daemon;
                scope.spawn(move || -> Result<()> {
                    let mut client = daemon.connect(name, &Options::default())?;
                    for round in 0..100 {
                        let data = bytes(number as u64 * 1000 + round, 4096);
                        client.write(round * 8, &data)?;
                        ensure!(client.read(round * 8, 4096)? == data, "{name}, round {round}");
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    })
}
