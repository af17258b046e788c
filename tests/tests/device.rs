//! The device that Ebbtide shows to a guest and its front end: what a good one sees, and what a bad
//! one can do, which is nothing to others.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

mod common;

use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::{Daemon, Disk, Program};
use ebbtide_tests::random::Random;
use ebbtide_tests::vhost_client::{Client, Descriptor, Op, Options};
use ebbtide_tests::virtio::{config, descriptor, feature, request, status};
use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend as _;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

const EBBTIDE: Program = Program::Ebbtide;
/// Long enough to see most answers, short enough to try many things: nothing fails if it passes.
const GLANCE: Duration = Duration::from_millis(100);

#[test]
fn config_space_is_readable_at_any_offset_and_length() -> Result<()> {
    common::config_space_is_readable_at_any_offset_and_length(EBBTIDE)
}

#[test]
fn what_is_written_is_read_and_is_on_the_host() -> Result<()> {
    common::what_is_written_is_read_and_is_on_the_host(EBBTIDE)
}

#[test]
fn buffers_may_lie_and_be_cut_anyhow() -> Result<()> {
    common::buffers_may_lie_and_be_cut_anyhow(EBBTIDE)
}

#[test]
fn buffers_may_cross_touching_regions() -> Result<()> {
    common::buffers_may_cross_touching_regions(EBBTIDE)
}

#[test]
fn requests_past_the_end_are_errors() -> Result<()> {
    common::requests_past_the_end_are_errors(EBBTIDE)
}

#[test]
fn unknown_types_are_unsupported() -> Result<()> {
    common::unknown_types_are_unsupported(EBBTIDE)
}

#[test]
fn discards_and_zeroes_touch_only_their_range() -> Result<()> {
    common::discards_and_zeroes_touch_only_their_range(EBBTIDE)
}

#[test]
fn a_read_only_disk_is_not_written() -> Result<()> {
    common::a_read_only_disk_is_not_written(EBBTIDE)
}

#[test]
fn two_disks_are_served_at_once() -> Result<()> {
    common::two_disks_are_served_at_once(EBBTIDE)
}

#[test]
fn every_request_comes_back_once() -> Result<()> {
    for options in common::manners() {
        common::every_request_comes_back_once(EBBTIDE, &options).with_context(|| format!("{options:?}"))?;
    }
    Ok(())
}

#[test]
fn what_is_offered_is_what_was_promised() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let wanted = feature::VERSION_1
        | feature::EVENT_IDX
        | feature::INDIRECT_DESC
        | feature::SEG_MAX
        | feature::SIZE_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::FLUSH
        | feature::CONFIG_WCE
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::MQ
        | feature::PROTOCOL_FEATURES;
    ensure!(client.offered & wanted == wanted, "{:#x} of {wanted:#x}", client.offered);
    ensure!(client.offered & feature::RO == 0, "read-only");
    let protocol = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::STATUS;
    ensure!(client.offered_protocol.contains(protocol), "{:?}", client.offered_protocol);
    ensure!(client.call(|frontend| frontend.get_queue_num())? >= 4, "queues");
    ensure!(client.call(|frontend| frontend.get_max_mem_slots())? >= 509, "memory slots");
    Ok(())
}

#[test]
fn any_part_of_256_bytes_of_configuration_can_be_read() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let space = client.config(0, 256)?;
    ensure!(space[config::BYTES..].iter().all(|byte| *byte == 0), "zeroes behind the structure");
    ensure!(space[config::WRITEBACK] == 1, "writes go to a cache: flushes matter");
    for offset in 0..256_u32 {
        for length in [1, 2, 3, 4, 8, 57, 60, 256 - offset] {
            if length >= 1 && offset + length <= 256 {
                let part = client.config(offset, length)?;
                ensure!(part == space[offset as usize..(offset + length) as usize], "{offset}+{length}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_cache_mode_can_be_changed_and_nothing_else() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let at = u32::try_from(config::WRITEBACK)?;
    for mode in [0, 1, 0] {
        client.set_config(at, &[mode])?;
        ensure!(client.config(at, 1)? == [mode]);
        client.write(0, &[mode; 512])?;
        ensure!(client.read(0, 512)? == [mode; 512]);
    }
    // Refused or ignored; the connection may end over it.
    let _ = client.set_config(0, &[9; 8]);
    drop(client);
    let mut client = daemon.connect("vda", &Options::default())?;
    ensure!(client.config(0, 8)? == common::SECTORS.to_le_bytes(), "the capacity stays");
    Ok(())
}

#[test]
fn the_serial_is_what_was_given() -> Result<()> {
    let daemon = Daemon::start(EBBTIDE, &[Disk { more: "serial=EBB-12345", ..Disk::default() }])?;
    let mut client = daemon.connect("vda", &Options::default())?;
    ensure!(client.get_id()? == b"EBB-12345");
    let longest = Daemon::start(EBBTIDE, &[Disk { more: "serial=12345678901234567890", ..Disk::default() }])?;
    let mut client = longest.connect("vda", &Options::default())?;
    ensure!(client.get_id()? == b"12345678901234567890");
    Ok(())
}

#[test]
fn as_many_segments_as_promised() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let most = common::u32_at(&client.config(0, 60)?, config::SEG_MAX);
    for indirect in [false, true] {
        let data = common::bytes(1, most as usize * 512);
        let segments = vec![512; most as usize];
        let write = Op { segments: segments.clone(), indirect, ..Op::write(8, &data) };
        ensure!(client.run(&write)?.status == status::OK, "write {most} segments, indirect {indirect}");
        let read = Op { segments, indirect, ..Op::read(8, most * 512) };
        ensure!(client.run(&read)?.ok()? == data, "read {most} segments, indirect {indirect}");
    }
    Ok(())
}

#[test]
fn several_ranges_in_one_discard() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let space = client.config(0, 60)?;
    let ranges = common::u32_at(&space, config::MAX_WRITE_ZEROES_SEG).min(4);
    let whole = common::bytes(3, 64 * 512);
    client.write(0, &whole)?;
    let list: Vec<_> = (0..ranges).map(|number| (u64::from(number) * 16 + 3, 5, 0)).collect();
    ensure!(client.run(&Op::write_zeroes(&list))?.status == status::OK);
    let mut wanted = whole;
    for &(first, sectors, _) in &list {
        let from = usize::try_from(first)? * 512;
        wanted[from..from + sectors as usize * 512].fill(0);
    }
    ensure!(client.read(0, 64 * 512)? == wanted);
    // One bad range: nothing is done.
    let list = [(0, 8, 0), (common::SECTORS, 8, 0)];
    ensure!(client.run(&Op::write_zeroes(&list))?.status == status::IOERR);
    ensure!(client.read(0, 64 * 512)? == wanted, "half of a bad request was done");
    for (what, output) in
        [("nothing", vec![]), ("half a range", vec![0; 8]), ("too many", vec![0; 16 * 4000])]
    {
        for kind in [request::DISCARD, request::WRITE_ZEROES] {
            let reply = client.run(&Op { kind, output: output.clone(), ..Op::default() })?;
            ensure!(reply.status == status::IOERR, "{what}, type {kind}: {}", reply.status);
        }
    }
    let most = common::u32_at(&space, config::MAX_DISCARD_SECTORS);
    if let Some(more) = most.checked_add(1) {
        ensure!(client.run(&Op::discard(&[(0, more, 0)]))?.status == status::IOERR, "too long a range");
    }
    Ok(())
}

#[test]
fn odd_lengths_are_errors() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    for length in [1, 511, 513, 4095] {
        ensure!(client.run(&Op::read(0, length))?.status == status::IOERR, "read {length}");
        let write = client.run(&Op::write(0, &vec![1; length as usize]))?;
        ensure!(write.status == status::IOERR, "write {length}");
    }
    // Of no data at all either answer is right.
    let none = client.run(&Op::read(0, 0))?.status;
    ensure!(none == status::OK || none == status::IOERR, "read nothing: {none}");
    ensure!(client.read(0, 512)? == [0; 512], "half a write was done");
    Ok(())
}

#[test]
fn logical_blocks_of_4096_bytes() -> Result<()> {
    let daemon = Daemon::start(EBBTIDE, &[Disk { more: "logical-block-size=4096", ..Disk::default() }])?;
    let mut client = daemon.connect("vda", &Options::default())?;
    ensure!(common::u32_at(&client.config(0, 60)?, config::BLK_SIZE) == 4096);
    client.write(8, &[3; 4096])?;
    ensure!(client.read(8, 4096)? == [3; 4096]);
    ensure!(client.run(&Op::read(1, 4096))?.status == status::IOERR, "at half a block");
    ensure!(client.run(&Op::read(8, 512))?.status == status::IOERR, "half a block");
    Ok(())
}

#[test]
fn stopping_a_ring_drains_it_and_it_goes_on_later() -> Result<()> {
    let daemon = common::one_disk(Program::Ebbtide)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let mut begun = 0_u16;
    for round in 0..5_u64 {
        let mut tickets = Vec::new();
        for number in 0..60 {
            tickets.push(client.place(&Op::write(number * 8, &common::bytes(round * 100 + number, 4096)))?);
            begun += 1;
        }
        client.queues[0].kick()?;
        let base = client.stop_queue(0)?;
        let used = client.queues[0].used_index();
        ensure!(base == u32::from(used), "stopped at {base}, but {used} are used");
        ensure!(used <= begun, "{used} used of {begun}");
        std::thread::sleep(Duration::from_millis(20));
        ensure!(client.queues[0].used_index() == used, "it goes on after it was stopped");
        client.configure_queue(0, u16::try_from(base)?)?;
        client.enable_queue(0, true)?;
        for ticket in tickets {
            client.finish(ticket)?.ok()?;
        }
        for number in 0..60 {
            ensure!(client.read(number * 8, 4096)? == common::bytes(round * 100 + number, 4096));
            begun += 1;
        }
    }
    Ok(())
}

#[test]
fn rings_may_be_enabled_before_they_are_configured() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = Client::open(&daemon.socket("vda"), &Options { queues: 2, ..Options::default() })?;
    client.negotiate()?;
    client.share_memory()?;
    // As QEMU does: one ring configured, both enabled.
    client.enable_queue(1, true)?;
    client.configure_queue(0, 0)?;
    client.enable_queue(0, true)?;
    client.write(0, &[1; 512])?;
    // And the other one at last.
    client.configure_queue(1, 0)?;
    let op = Op { queue: 1, ..Op::read(0, 512) };
    ensure!(client.run(&op)?.ok()? == [1; 512]);
    Ok(())
}

#[test]
fn a_disabled_ring_waits() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options { queues: 2, ..Options::default() })?;
    for _ in 0..3 {
        client.enable_queue(0, false)?;
        let ticket = client.start(&Op::write(0, &[7; 512]))?;
        client.queues[0].kick()?;
        ensure!(client.queues[0].wait_within(GLANCE)?.is_none(), "a disabled ring was served");
        let other = Op { queue: 1, ..Op::read(8, 512) };
        client.run(&other)?.ok()?;
        client.enable_queue(0, true)?;
        client.finish(ticket)?.ok()?;
    }
    Ok(())
}

#[test]
fn a_reset_device_can_be_set_up_again() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    for round in 0..3 {
        client.write(0, &[round; 512])?;
        client.call(|frontend| frontend.reset_device())?;
        // Where a ring stands is forgotten or kept; we say it again.
        client.start_queue(0)?;
        ensure!(client.read(0, 512)? == [round; 512], "round {round}");
    }
    Ok(())
}

#[test]
fn memory_comes_and_goes_while_rings_run() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    let (far, _) = client.memory.region(2);
    for _ in 0..10 {
        let ticket = client.start(&Op::write(0, &[1; 65536]))?;
        client.set_region_shared(2, false)?;
        client.finish(ticket)?.ok()?;
        let code = common::transfer(&mut client, request::OUT, 8, far, 512)?;
        ensure!(code == status::IOERR, "memory that is gone: {code}");
        client.set_region_shared(2, true)?;
        let code = common::transfer(&mut client, request::OUT, 8, far, 512)?;
        ensure!(code == status::OK, "memory that is back: {code}");
    }
    Ok(())
}

/// Descriptors that are open when all queues of `vda` have been used once: a queue's thread may stay.
fn descriptors_after_first_use(daemon: &Daemon) -> Result<usize> {
    let mut client = daemon.connect("vda", &Options { queues: 4, ..Options::default() })?;
    client.read(0, 512)?;
    drop(client);
    Ok(daemon.resting_descriptors()?.len())
}

#[test]
fn front_ends_come_and_go_and_leave_nothing_behind() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let before = descriptors_after_first_use(&daemon)?;
    for round in 0..60_u8 {
        let mut client = daemon.connect("vda", &Options { queues: 4, ..Options::default() })?;
        client.write(u64::from(round), &[round; 512])?;
        for earlier in 0..=round {
            ensure!(client.read(earlier.into(), 512)? == [earlier; 512], "round {round}");
        }
    }
    // Some that end at every step on the way.
    for steps in 0..24 {
        let mut client = Client::open(&daemon.socket("vda"), &Options::default())?;
        // What fails here because the one before is still leaving is tried by the next.
        if steps % 4 >= 1 && client.negotiate().is_ok() && steps % 4 >= 2 && client.share_memory().is_ok() {
            let _ = client.configure_queue(0, 0);
        }
    }
    daemon.expect_descriptors(before)
}

#[test]
fn a_front_end_may_die_in_the_middle_of_requests() -> Result<()> {
    let disks = [Disk::default(), Disk { name: "vdb", ..Disk::default() }];
    let mut daemon = Daemon::start(EBBTIDE, &disks)?;
    let mut other = daemon.connect("vdb", &Options::default())?;
    let before = descriptors_after_first_use(&daemon)?;
    for round in 0..20 {
        let mut client = daemon.connect("vda", &Options::default())?;
        for number in 0..60 {
            let op =
                if number % 2 == 0 { Op::write(number * 8, &[9; 4096]) } else { Op::read(number * 8, 4096) };
            let _ticket = client.start(&op)?;
        }
        drop(client);
        other.write(round, &[3; 512])?;
        ensure!(other.read(round, 512)? == [3; 512], "the other disk, round {round}");
    }
    ensure!(daemon.server().is_alive());
    let mut client = daemon.connect("vda", &Options::default())?;
    client.write(0, &[4; 512])?;
    ensure!(client.read(0, 512)? == [4; 512]);
    drop(client);
    daemon.expect_descriptors(before)
}

#[test]
fn a_killed_daemon_comes_back_with_what_was_written() -> Result<()> {
    let disks = [Disk::default()];
    let mut daemon = Daemon::start(EBBTIDE, &disks)?;
    for (round, signal) in [Signal::KILL, Signal::TERM, Signal::KILL].into_iter().enumerate() {
        let round = round as u64;
        let mut client = daemon.connect("vda", &Options::default())?;
        for number in 0..50 {
            client.write(number * 8, &common::bytes(round * 100 + number, 4096))?;
        }
        daemon.restart(signal, &disks)?;
        let mut client = daemon.connect("vda", &Options::default())?;
        for number in 0..50 {
            let wanted = common::bytes(round * 100 + number, 4096);
            ensure!(client.read(number * 8, 4096)? == wanted, "round {round}, write {number}");
        }
    }
    Ok(())
}

/// A way to spoil one request, and whether it must come back, and not as done: otherwise the device
/// may also leave the chain alone or do what can be done.
struct Spoiled {
    what: &'static str,
    chain: Vec<Descriptor>,
    refused: bool,
}

/// Valid chains with one thing wrong in each. `header` and `state` lie in guest memory; so do
/// 8 KiB at `data`.
fn spoiled_chains(header: u64, data: u64, state: u64, nowhere: u64, last_page: u64) -> Vec<Spoiled> {
    let good =
        [Descriptor::readable(header, 16), Descriptor::readable(data, 4096), Descriptor::writable(state, 1)];
    let mut all = Vec::new();
    let mut with = |what, refused, change: &dyn Fn(&mut Vec<Descriptor>)| {
        let mut chain = good.to_vec();
        change(&mut chain);
        all.push(Spoiled { what, chain, refused });
    };
    with("header too short by a byte", true, &|chain| chain[0].len = 15);
    with("header of no bytes", true, &|chain| chain[0].len = 0);
    with("header outside memory", true, &|chain| chain[0].addr = nowhere);
    with("header at the end of the address space", true, &|chain| chain[0].addr = u64::MAX - 7);
    with("header writable", false, &|chain| chain[0].flags = descriptor::WRITE);
    with("data outside memory", true, &|chain| chain[1].addr = nowhere);
    with("data that leaves its region", true, &|chain| chain[1].addr = last_page + 2048);
    with("data that wraps around", true, &|chain| chain[1].addr = u64::MAX - 100);
    with("data of 4 GiB", true, &|chain| chain[1].len = u32::MAX);
    with("data of no bytes", false, &|chain| chain[1].len = 0);
    with("data to write that the device should fill", true, &|chain| chain[1].flags = descriptor::WRITE);
    with("status outside memory", false, &|chain| chain[2].addr = nowhere);
    with("status of no bytes", false, &|chain| chain[2].len = 0);
    with("status readable", false, &|chain| chain[2].flags = 0);
    with("no status", false, &|chain| chain.truncate(2));
    with("a header alone", false, &|chain| chain.truncate(1));
    with("a status alone", false, &|chain| drop(chain.drain(..2)));
    with("a readable segment behind a writable one", false, &|chain| chain.swap(1, 2));
    with("flags that mean nothing", false, &|chain| chain[1].flags |= 0xfff8);
    with("an indirect table in the middle", false, &|chain| chain[1].flags |= descriptor::INDIRECT);
    with("an indirect table outside memory", false, &|chain| {
        *chain = vec![Descriptor { addr: nowhere, len: 64, flags: descriptor::INDIRECT, next: 0 }];
    });
    with("an indirect table of half a descriptor", false, &|chain| {
        *chain = vec![Descriptor { addr: data, len: 24, flags: descriptor::INDIRECT, next: 0 }];
    });
    with("an indirect table of no bytes", false, &|chain| {
        *chain = vec![Descriptor { addr: data, len: 0, flags: descriptor::INDIRECT, next: 0 }];
    });
    with("an indirect table of 4 GiB", false, &|chain| {
        *chain = vec![Descriptor { addr: data, len: 0xffff_fff0, flags: descriptor::INDIRECT, next: 0 }];
    });
    with("an indirect table of zeroes", false, &|chain| {
        *chain = vec![Descriptor { addr: data, len: 64, flags: descriptor::INDIRECT, next: 0 }];
    });
    all
}

/// A daemon with a victim `vda` and a witness `vdb`.
fn victim_and_witness() -> Result<(Daemon, Client)> {
    let disks = [Disk::default(), Disk { name: "vdb", ..Disk::default() }];
    let daemon = Daemon::start(EBBTIDE, &disks)?;
    let witness = daemon.connect("vdb", &Options::default())?;
    Ok((daemon, witness))
}

/// After `what`, the daemon lives, its other disk is served, and so is the victim again.
fn all_is_well(daemon: &mut Daemon, witness: &mut Client, what: &str) -> Result<()> {
    ensure!(daemon.server().is_alive(), "{what} ended the daemon:\n{}", daemon.server().output());
    witness.write(0, &[5; 512]).with_context(|| format!("the other disk after {what}"))?;
    ensure!(witness.read(0, 512)? == [5; 512]);
    let mut client = daemon.connect("vda", &Options::default()).with_context(|| format!("after {what}"))?;
    ensure!(client.read(common::SECTORS - 8, 4096)? == [0; 4096], "{what} wrote something");
    Ok(())
}

#[test]
fn spoiled_chains_hurt_nobody() -> Result<()> {
    let (mut daemon, mut witness) = victim_and_witness()?;
    let sector = common::SECTORS - 8;
    let count = spoiled_chains(0, 0, 0, 0, 0).len();
    for number in 0..count {
        let mut client = daemon.connect("vda", &Options::default())?;
        let header = client.memory.alloc(0, 16, 16)?;
        let data = client.memory.alloc(0, 8192, 4096)?;
        let state = client.memory.alloc(0, 1, 1)?;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&request::OUT.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        client.memory.store(header, &bytes);
        client.memory.store(state, &[0xee]);
        let (last, length) = client.memory.region(2);
        let chains = spoiled_chains(header, data, state, 0x7_0000_0000, last + length - 4096);
        let Spoiled { what, chain, refused } = &chains[number];
        let queue = &mut client.queues[0];
        queue.submit(chain)?;
        if *refused {
            queue.wait().with_context(|| (*what).to_owned())?;
            let code = client.memory.load(state, 1)[0];
            ensure!(code != status::OK, "{what} is no error");
            // It was one bad request, not a bad guest: the ring goes on.
            client.read(0, 512).with_context(|| format!("the same ring after {what}"))?;
        } else {
            // Given back or not, all is well.
            queue.wait_within(GLANCE).with_context(|| (*what).to_owned())?;
        }
        drop(client);
        if !matches!(*what, "data of no bytes" | "flags that mean nothing") {
            all_is_well(&mut daemon, &mut witness, what)?;
        }
    }
    Ok(())
}

#[test]
fn spoiled_rings_hurt_nobody() -> Result<()> {
    type Spoil = fn(&mut Client) -> Result<()>;
    let spoils: [(&str, Spoil); 11] = [
        ("a head beyond the table", |client| {
            client.queues[0].publish(60_000);
            Ok(client.queues[0].kick()?)
        }),
        ("a chain that points at itself", |client| {
            let indices = client.queues[0].take_descriptors(1)?;
            let (addr, _) = client.memory.region(1);
            let flags = descriptor::NEXT;
            client.queues[0]
                .set_descriptor(indices[0], Descriptor { addr, len: 16, flags, next: indices[0] });
            client.queues[0].expect(indices[0], indices.clone());
            client.queues[0].publish(indices[0]);
            Ok(client.queues[0].kick()?)
        }),
        ("a chain that goes round", |client| {
            let indices = client.queues[0].take_descriptors(3)?;
            let (addr, _) = client.memory.region(1);
            for position in 0..3 {
                let next = indices[(position + 1) % 3];
                let element = Descriptor { addr, len: 16, flags: descriptor::NEXT, next };
                client.queues[0].set_descriptor(indices[position], element);
            }
            client.queues[0].expect(indices[0], indices.clone());
            client.queues[0].publish(indices[0]);
            Ok(client.queues[0].kick()?)
        }),
        ("a chain that leaves the table", |client| {
            let indices = client.queues[0].take_descriptors(1)?;
            let (addr, _) = client.memory.region(1);
            let element = Descriptor { addr, len: 16, flags: descriptor::NEXT, next: 50_000 };
            client.queues[0].set_descriptor(indices[0], element);
            client.queues[0].expect(indices[0], indices.clone());
            client.queues[0].publish(indices[0]);
            Ok(client.queues[0].kick()?)
        }),
        ("an available index far ahead", |client| {
            client.queues[0].corrupt_avail_index(30_000);
            Ok(client.queues[0].kick()?)
        }),
        ("an available index that went back", |client| {
            client.read(0, 512)?;
            client.queues[0].corrupt_avail_index(0);
            Ok(client.queues[0].kick()?)
        }),
        ("one chain twice", |client| {
            let ticket = client.place(&Op::read(0, 65536))?;
            // Its head is the first descriptor that was free.
            client.queues[0].publish(0);
            client.queues[0].kick()?;
            drop(ticket);
            Ok(())
        }),
        ("the memory of a request taken away", |client| {
            let (addr, _) = client.memory.region(2);
            for part in 0..8 {
                let header = Descriptor::readable(addr + part * 0x1000, 16);
                client.queues[0].place(&[header, Descriptor::writable(addr + 0x10_0000 + part, 1)])?;
            }
            client.memory.shrink(2, 0)?;
            Ok(client.queues[0].kick()?)
        }),
        ("the memory of a ring taken away", |client| {
            drop(client.place(&Op::read(0, 4096))?);
            client.memory.shrink(0, 0)?;
            Ok(client.queues[0].kick()?)
        }),
        ("a storm of kicks without buffers", |client| {
            for _ in 0..10_000 {
                client.queues[0].kick()?;
            }
            Ok(())
        }),
        ("a table of noise", |client| {
            let mut random = Random::new(99);
            for index in 0..256_u16 {
                let words = (random.next().to_le_bytes(), random.next().to_le_bytes());
                let element = Descriptor {
                    // Some in memory, most not.
                    addr: u64::from_le_bytes(words.0) >> (random.below(40) + 8),
                    len: u32::from_le_bytes(words.1[..4].try_into()?) >> random.below(32),
                    flags: u16::from_le_bytes(words.1[4..6].try_into()?) & 7,
                    next: u16::from_le_bytes(words.1[6..].try_into()?) & 0xff,
                };
                client.queues[0].set_descriptor(index, element);
            }
            for head in 0..200 {
                client.queues[0].publish(head);
            }
            Ok(client.queues[0].kick()?)
        }),
    ];
    let (mut daemon, mut witness) = victim_and_witness()?;
    let before = descriptors_after_first_use(&daemon)?;
    for (what, spoil) in spoils {
        let mut client = daemon.connect("vda", &Options::default())?;
        spoil(&mut client).with_context(|| what.to_owned())?;
        std::thread::sleep(GLANCE);
        drop(client);
        all_is_well(&mut daemon, &mut witness, what)?;
    }
    daemon.expect_descriptors(before)
}

#[test]
fn spoiled_messages_hurt_nobody() -> Result<()> {
    let (mut daemon, mut witness) = victim_and_witness()?;
    let before = descriptors_after_first_use(&daemon)?;
    let pair = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
    let region = |gpa: u64, size: u64, user: u64, offset: u64| {
        [0, gpa, size, user, offset].map(u64::to_le_bytes).concat()
    };
    let addresses = |index: u32, at: u64| {
        let mut body = pair(index, 0);
        for _ in 0..4 {
            body.extend(at.to_le_bytes());
        }
        body
    };
    let zeroes = |count: usize| vec![0; count];
    let config = |offset: u32, size: u32, payload: usize| {
        [offset, size, 0].map(u32::to_le_bytes).concat().into_iter().chain(zeroes(payload)).collect()
    };
    // (what, request, body, descriptors sent with it)
    let messages: Vec<(&str, u32, Vec<u8>, usize)> = vec![
        ("an unknown request", 200, vec![], 0),
        ("request 0", 0, vec![], 0),
        ("GET_FEATURES with a body", 1, zeroes(8), 0),
        ("SET_FEATURES without a body", 2, vec![], 0),
        ("SET_FEATURES with bits that were not offered", 2, u64::MAX.to_le_bytes().to_vec(), 0),
        ("SET_FEATURES with a descriptor", 2, 0_u64.to_le_bytes().to_vec(), 1),
        ("SET_OWNER twice", 3, vec![], 0),
        ("SET_MEM_TABLE of nothing", 5, zeroes(8), 0),
        ("SET_MEM_TABLE that promises 8 regions", 5, pair(8, 0), 8),
        ("SET_MEM_TABLE that promises 2^32 regions", 5, pair(u32::MAX, 0), 0),
        ("SET_VRING_NUM 0", 8, pair(0, 0), 0),
        ("SET_VRING_NUM 3", 8, pair(0, 3), 0),
        ("SET_VRING_NUM 65536", 8, pair(0, 65536), 0),
        ("SET_VRING_NUM of a ring that does not exist", 8, pair(9999, 128), 0),
        ("SET_VRING_ADDR outside memory", 9, addresses(0, 0xdead_beef_0000), 0),
        ("SET_VRING_ADDR of a ring that does not exist", 9, addresses(1 << 20, 0), 0),
        ("SET_VRING_BASE of 2^32", 10, pair(0, u32::MAX), 0),
        ("GET_VRING_BASE of a ring that does not exist", 11, pair(500, 0), 0),
        ("GET_VRING_BASE of a ring that never ran", 11, pair(3, 0), 0),
        ("SET_VRING_KICK without its descriptor", 12, 0_u64.to_le_bytes().to_vec(), 0),
        ("SET_VRING_KICK with three descriptors", 12, 0_u64.to_le_bytes().to_vec(), 3),
        ("SET_VRING_KICK of ring 255", 12, 255_u64.to_le_bytes().to_vec(), 1),
        ("SET_VRING_CALL with a descriptor that is a file", 13, 0_u64.to_le_bytes().to_vec(), 1),
        ("SET_VRING_ENABLE of a ring that does not exist", 18, pair(70_000, 1), 0),
        ("SET_VRING_ENABLE 7", 18, pair(0, 7), 0),
        ("GET_CONFIG of nothing", 24, config(0, 0, 0), 0),
        ("GET_CONFIG far out", 24, config(1 << 30, 8, 8), 0),
        ("GET_CONFIG of 4 GiB", 24, config(0, u32::MAX, 16), 0),
        ("SET_CONFIG of more than it brings", 25, config(0, 200, 4), 0),
        ("ADD_MEM_REG without its descriptor", 37, region(0x1000, 0x1000, 0, 0), 0),
        ("ADD_MEM_REG of nothing", 37, region(0x1000, 0, 0, 0), 1),
        ("ADD_MEM_REG that wraps around", 37, region(u64::MAX - 4095, 0x2000, 0, 0), 1),
        ("ADD_MEM_REG larger than its file", 37, region(0x10_0000_0000, 1 << 40, 0, 0), 1),
        ("ADD_MEM_REG behind the end of its file", 37, region(0x10_0000_0000, 4096, 0, 1 << 40), 1),
        ("ADD_MEM_REG over another region", 37, region(0x10_0000, 0x1000, 0, 0), 1),
        ("ADD_MEM_REG with eight descriptors", 37, region(0x10_0000_0000, 4096, 0, 0), 8),
        ("REM_MEM_REG of what is not there", 38, region(0x7777_0000, 0x1000, 0, 0), 0),
        ("SET_STATUS of 0xffff", 39, 0xffff_u64.to_le_bytes().to_vec(), 0),
        ("a body of 64 KiB", 2, zeroes(65_536), 0),
    ];
    let file = tempfile::tempfile()?;
    file.set_len(4096)?;
    for (what, request, body, descriptors) in messages {
        let mut client = daemon.connect("vda", &Options::default())?;
        let fds = vec![file.as_fd(); descriptors];
        // Refused, accepted or answered by hanging up: but answered.
        client.ask(request, &body, &fds).with_context(|| what.to_owned())?;
        drop(client);
        all_is_well(&mut daemon, &mut witness, what)?;
    }
    // Messages that are not even messages.
    let mut random = Random::new(7);
    let mut noises = vec![
        ("half a header", vec![1, 0, 0, 0, 1]),
        ("a header without its body", [2_u32, 9, 8].map(u32::to_le_bytes).concat()),
        ("version 3", [1_u32, 3, 0].map(u32::to_le_bytes).concat()),
        ("a reply", [1_u32, 5, 0].map(u32::to_le_bytes).concat()),
        ("a length of 4 GiB", [2_u32, 9, u32::MAX].map(u32::to_le_bytes).concat()),
    ];
    for _ in 0..20 {
        noises.push(("noise", (0..40).map(|_| random.next().to_le_bytes()[0]).collect()));
    }
    for (what, noise) in noises {
        let client = daemon.connect("vda", &Options::default())?;
        // It may have hung up in the middle.
        let _ = client.send_bytes(&noise, &[]);
        drop(client);
        all_is_well(&mut daemon, &mut witness, what)?;
        let client = Client::open(&daemon.socket("vda"), &Options::default())?;
        let _ = client.send_bytes(&noise, &[]);
        drop(client);
        all_is_well(&mut daemon, &mut witness, what)?;
    }
    daemon.expect_descriptors(before)
}

/// A front end that stops in the middle of a message must not stop the other disk.
#[test]
fn a_front_end_that_stops_halfway_holds_up_nobody_else() -> Result<()> {
    let (mut daemon, mut witness) = victim_and_witness()?;
    let stuck = Client::open(&daemon.socket("vda"), &Options::default())?;
    stuck.send_bytes(&[1, 0, 0, 0, 1], &[])?;
    for round in 0..50 {
        witness.write(round, &[1; 512])?;
    }
    drop(stuck);
    all_is_well(&mut daemon, &mut witness, "a front end that stops halfway")
}

#[test]
fn device_status_is_kept() -> Result<()> {
    let daemon = common::one_disk(EBBTIDE)?;
    let mut client = daemon.connect("vda", &Options::default())?;
    for value in [8_u64, 15] {
        ensure!(client.ask(39, &value.to_le_bytes(), &[])? == Some(0), "SET_STATUS {value}");
        client.send_message(40, 0, &[], &[])?;
        let (request, _, body) = client.receive_message()?.context("hung up")?;
        ensure!(request == 40 && body == value.to_le_bytes(), "GET_STATUS: {body:?}");
    }
    ensure!(client.read(0, 512)? == [0; 512]);
    Ok(())
}
