//! Defects of what was written, and of who asks for it.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::nbd;
use ebbtide_tests::random::{Random, bytes};
use ebbtide_tests::scene::{
    BLOCK, Scene, blocks, disk, kick, on_one_queue_and_on_four, run_together, write_over,
};
use ebbtide_tests::stamped::rig::{Rig, Setup};
use ebbtide_tests::vhost_client::{Client, Op};
use ebbtide_tests::virtio::status;
use serde_json::json;

const DISK_BYTES: usize = 4 << 20;
const BLOCKS: u64 = DISK_BYTES as u64 / BLOCK;

/// D1: the count of snapshots wraps at 255, and whoever holds an older one is told that nothing changed.
#[test]
fn a10_d1_change_ids_stay_in_order_past_255_snapshots() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    let mut previous: Option<String> = None;
    for number in 0..260 {
        let name = format!("s{number}");
        guest.write(number % BLOCKS * BLOCK / 512, &[1; 512])?;
        let id = scene.freeze(&name, &["vda"])?.remove(0);
        if let Some(previous) = previous {
            ensure!(epoch(&previous)? < epoch(&id)?, "{previous}, then {id}");
            let changed = scene.changed("vda", &previous, &name)?;
            ensure!(blocks(&changed) == BTreeSet::from([number % BLOCKS]), "since {previous}: {changed:?}");
        }
        scene.delete(&name)?;
        previous = Some(id);
    }
    Ok(())
}

/// Generation and epoch of a change id.
fn epoch(id: &str) -> Result<(&str, u64)> {
    let (generation, epoch) = id.split_once('/').with_context(|| format!("a change id: {id}"))?;
    Ok((generation, epoch.parse()?))
}

/// D2: an error of the change map, such as a write past its end, switches copy-before-write off.
#[test]
fn a10_d2_trouble_with_tracking_does_not_stop_preserving() -> Result<()> {
    let untracked = Disk { more: "tracking=off", ..disk("vdb") };
    let mut scene = Scene::start(&[disk("vda"), untracked])?;
    for name in ["vda", "vdb"] {
        let mut guest = scene.guest(name, 1)?;
        let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
        write_over(&mut guest, &old)?;
        scene.freeze("s", &[name])?;
        let end = BLOCKS * BLOCK / 512;
        for sector in [end, end - 1, end + 1000, u64::MAX / 512, u64::MAX] {
            let reply = guest.run(&Op::write(sector, &[9; 4096]))?;
            ensure!(reply.status == status::IOERR, "{name}: a write at {sector}: {}", reply.status);
        }
        write_over(&mut guest, &new)?;
        ensure!(scene.view(name, "s")? == old, "{name}: what was written after that is in the image");
        scene.freeze("t", &[name])?;
        scene.delete("s")?;
        scene.delete("t")?;
    }
    let query = json!({ "disk": "vdb", "since": "x/1", "snapshot": "t" });
    ensure!(scene.qmp.call("query-changed-blocks", query).is_err(), "changes that nobody recorded");
    Ok(())
}

/// D3: a detached filter stops preserving while its snapshot is held. Here nothing detaches a disk from its
/// snapshots; what a front end can end is its queues and itself.
#[test]
fn a10_d3_nothing_a_front_end_ends_stops_preserving() -> Result<()> {
    let endings: [fn(&mut Client) -> Result<()>; 4] = [
        |guest| Ok(guest.call(reset).and_then(|()| guest.start_queue(0))?),
        |guest| {
            let base = u16::try_from(guest.stop_queue(0)?)?;
            guest.configure_queue(0, base)?;
            Ok(guest.enable_queue(0, true)?)
        },
        |guest| {
            guest.enable_queue(0, false)?;
            Ok(guest.enable_queue(0, true)?)
        },
        |guest| Ok(guest.set_region_shared(2, false).and_then(|()| guest.set_region_shared(2, true))?),
    ];
    let mut scene = Scene::start(&[disk("vda")])?;
    let old = bytes(1, DISK_BYTES);
    write_over(&mut scene.guest("vda", 1)?, &old)?;
    scene.freeze("s", &["vda"])?;
    for (number, end) in endings.into_iter().enumerate() {
        let mut guest = scene.guest("vda", 1)?;
        end(&mut guest).with_context(|| format!("ending {number}"))?;
        // Each writes more than the one before.
        write_over(&mut guest, &bytes(2, (number + 1) << 20))?;
        ensure!(scene.view("vda", "s")? == old, "ending {number}");
    }
    Ok(())
}

fn reset(frontend: &mut vhost::vhost_user::Frontend) -> vhost::Result<()> {
    use vhost::vhost_user::VhostUserFrontend as _;
    frontend.reset_device()
}

/// D4: an offset past the end underflows, and the kernel's memory behind the map is given out.
#[test]
fn a10_d4_nothing_is_given_out_past_the_end() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    scene.freeze("s0", &["vda"])?;
    scene.freeze("s1", &["vda"])?;
    let size = DISK_BYTES as u64;
    for offset in [size + 1, u64::from(u32::MAX) + 1, u64::MAX - 4096, u64::MAX] {
        let query = json!({ "disk": "vda", "since": "s0", "snapshot": "s1", "offset": offset });
        let error = scene.qmp.call("query-changed-blocks", query).expect_err("there is nothing");
        ensure!(error.reason() == "bad-argument", "changes from {offset} on: {error}");
    }
    let mut view = scene.open("vda", "s0")?;
    for (offset, len) in [(size, 1), (size - 512, 1024), (size + 1, 4096), (u64::MAX - 4095, 4096)] {
        let read = view.read(offset, len);
        ensure!(matches!(read, Err(nbd::Error::Errno(_))), "{len} bytes from {offset} on: {read:?}");
    }
    ensure!(view.read(size - 512, 512)? == [0; 512], "the connection goes on");
    Ok(())
}

/// D5: without a snapshot the map that is read is an old one, or zeros.
#[test]
fn a10_d5_changes_are_told_only_up_to_a_snapshot_that_is_held() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    let id = scene.freeze("s0", &["vda"])?.remove(0);
    guest.write(0, &[1; 512])?;
    scene.delete("s0")?;
    for snapshot in ["s0", "never", ""] {
        for since in [id.as_str(), "s0", "never"] {
            let query = json!({ "disk": "vda", "since": since, "snapshot": snapshot });
            let error = scene.qmp.call("query-changed-blocks", query).expect_err("nothing to answer from");
            ensure!(error.reason() == "snapshot-not-found", "since {since} up to '{snapshot}': {error}");
        }
    }
    scene.freeze("s1", &["vda"])?;
    ensure!(blocks(&scene.changed("vda", &id, "s1")?) == BTreeSet::from([0]), "nothing was forgotten");
    Ok(())
}

/// D9: writes below the filter when it freezes are in neither backup. Here a chain of incremental backups,
/// taken while the guest writes, is the disk.
#[test]
fn a10_d9_no_write_falls_between_two_backups() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut rig = Rig::start(Setup { queues, units: 1024, ..Setup::default() })?;
        rig.begin_load()?;
        let mut previous = rig.freeze("full")?;
        let mut backup = previous.views[0].clone();
        for round in 0..10 {
            rig.wait_for(32)?;
            let now = rig.freeze(&format!("s{round}"))?;
            for range in rig.scene.changed("vda", &previous.change_ids[0], &now.name)? {
                let range = usize::try_from(range.start)?..usize::try_from(range.end)?;
                backup[range.clone()].copy_from_slice(&now.views[0][range]);
            }
            ensure!(backup == now.views[0], "round {round}: the backup is not the disk");
            rig.scene.delete(&previous.name)?;
            previous = now;
        }
        rig.end_load()
    })
}

/// D10: requests that come by another path than the usual one pass by the filter. Here all come by rings;
/// these are all the shapes that a request may have.
#[test]
fn a10_d10_requests_of_any_shape_are_preserved_and_tracked() -> Result<()> {
    let sector = |block: u64| block * BLOCK / 512;
    let data = vec![7; 8192];
    let write = |block: u64| Op::write(sector(block), &data);
    let range = |block: u64| (sector(block), 8, 0);
    let shapes = [
        write(0),
        Op { indirect: true, ..write(1) },
        Op { segments: vec![1, 511, 4096], ..write(2) },
        Op { segments: vec![512; 15], indirect: true, misalign: 3, ..write(3) },
        Op { queue: 1, ..write(4) },
        Op { queue: 3, ..Op::write(sector(5) + 127, &data) },
        Op::discard(&[range(7)]),
        Op { queue: 2, ..Op::write_zeroes(&[range(8)]) },
        Op::write_zeroes(&[range(9), range(11), range(30)]),
        Op { indirect: true, segments: vec![16], ..Op::write_zeroes(&[(sector(12) + 3, 1, 1), range(13)]) },
        Op::write(sector(BLOCKS - 1) + 127, &data[..512]),
    ];
    let touched = BTreeSet::from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 30, 12, 13, BLOCKS - 1]);
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 4)?;
    let old = bytes(1, DISK_BYTES);
    write_over(&mut guest, &old)?;
    scene.freeze("s0", &["vda"])?;
    for (number, op) in shapes.iter().enumerate() {
        let reply = guest.run(op)?;
        ensure!(reply.status == status::OK, "shape {number}: status {}", reply.status);
    }
    scene.freeze("s1", &["vda"])?;
    ensure!(scene.view("vda", "s0")? == old, "the image");
    ensure!(blocks(&scene.changed("vda", "s0", "s1")?) == touched, "the changes");
    // All at once.
    run_together(&mut guest, shapes)?;
    scene.freeze("s2", &["vda"])?;
    ensure!(blocks(&scene.changed("vda", "s1", "s2")?) == touched, "the changes, all at once");
    ensure!(scene.view("vda", "s0")? == old, "the image, all at once");
    Ok(())
}

/// D12: marking no sectors at sector 0 marks the whole map. Here nothing is marked but by requests; those
/// of no sectors mark nothing, and those with an empty range among others only the others.
#[test]
fn a10_d12_requests_of_no_sectors_mark_nothing() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    scene.freeze("s0", &["vda"])?;
    for op in [Op::write(0, &[]), Op::discard(&[(0, 0, 0)]), Op::write_zeroes(&[(0, 0, 1)])] {
        // Done or refused.
        let _ = guest.run(&op)?;
    }
    let mixed = guest.run(&Op::write_zeroes(&[(0, 0, 0), (3 * BLOCK / 512, 8, 0)]))?;
    scene.freeze("s1", &["vda"])?;
    let expected = if mixed.status == status::OK { BTreeSet::from([3]) } else { BTreeSet::new() };
    let reported = blocks(&scene.changed("vda", "s0", "s1")?);
    ensure!(reported == expected, "{reported:?}, not {expected:?}");
    Ok(())
}

/// D14: every write of a disk takes one lock, and a take copies the whole map under it. How long that
/// lasts depends on the host; what can be told for certain is that a take copies nothing that grows with
/// the disk.
#[test]
fn a10_d14_a_take_copies_no_map() -> Result<()> {
    const TIB: u64 = 1 << 40;
    const FAR_LESS_THAN_THE_MAP: u64 = 16 << 20;
    let mut scene = Scene::start(&[Disk { bytes: TIB, ..disk("vda") }])?;
    let mut guest = scene.guest("vda", 4)?;
    // What the first time needs does not count.
    scene.freeze("first", &["vda"])?;
    guest.write(0, &[1; 512])?;
    let before = scene.daemon.server().memory_bytes("VmRSS")?;
    for number in 0..8 {
        let name = format!("s{number}");
        scene.freeze(&name, &["vda"])?;
        guest.write(TIB / 512 / 8 * number, &[1; 512])?;
    }
    let after = scene.daemon.server().memory_bytes("VmRSS")?;
    ensure!(after < before + FAR_LESS_THAN_THE_MAP, "{before} bytes of memory, then {after}");
    for snapshot in scene.snapshots("vda")? {
        let held = snapshot["held"].as_u64().context("bytes held")?;
        ensure!(held < 1 << 20, "{snapshot}");
    }
    Ok(())
}

/// D15: the test of changed block tracking is not implemented. This one compares what is reported with what
/// was written, block by block, both ways.
#[test]
fn a10_d15_what_is_reported_is_what_was_written() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let mut guest = scene.guest("vda", queues)?;
        let mut random = Random::new(15);
        // Change ids, and what was written since each.
        let mut past: Vec<(String, BTreeSet<u64>)> = Vec::new();
        for round in 0..20 {
            let written = random_requests(&mut guest, &mut random)?;
            past.iter_mut().for_each(|(_, since)| since.extend(&written));
            let name = format!("s{round}");
            let id = scene.freeze(&name, &["vda"])?.remove(0);
            for (older, since) in &past {
                let reported = blocks(&scene.changed("vda", older, &name)?);
                ensure!(reported == *since, "{name} since {older}: {reported:?}, not {since:?}");
            }
            past.push((id, BTreeSet::new()));
        }
        Ok(())
    })
}

/// Some writes, discards, write-zeroes and reads in flight together; the blocks that they wrote.
fn random_requests(guest: &mut Client, random: &mut Random) -> Result<BTreeSet<u64>> {
    let mut written = BTreeSet::new();
    let mut tickets = Vec::new();
    for _ in 0..random.below(12) {
        let sectors = 1 + u32::try_from(random.below(200))?;
        let sector = random.below(BLOCKS * BLOCK / 512 - u64::from(sectors));
        let choice = random.below(5);
        let op = match choice {
            0 => Op::read(sector, sectors * 512),
            1 => Op::discard(&[(sector, sectors, 0)]),
            2 => Op::write_zeroes(&[(sector, sectors, 0)]),
            _ => Op::write(sector, &vec![1; sectors as usize * 512]),
        };
        if choice != 0 {
            let range = sector * 512..(sector + u64::from(sectors)) * 512;
            written.extend(blocks(std::slice::from_ref(&range)));
        }
        let queue = random.index(guest.queues.len());
        tickets.push(guest.place(&Op { queue, ..op })?);
    }
    kick(guest)?;
    for ticket in tickets {
        guest.finish(ticket)?.ok()?;
    }
    Ok(written)
}
