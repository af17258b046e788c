//! Images show their instant, and what cannot be shown is an error.

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::nbd;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{Scene, blocks, disk, on_one_queue_and_on_four, run_together, write_over};
use ebbtide_tests::stamped::rig::{Rig, Setup};
use ebbtide_tests::vhost_client::{Client, Op};
use ebbtide_tests::virtio::request;
use rustix::process::{Resource, Signal};

const DISK_BYTES: usize = 4 << 20;

#[test]
fn b_1000_simple_two_disks_one_snapshot() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
        let old = [bytes(1, DISK_BYTES), bytes(2, DISK_BYTES)];
        let new = [bytes(3, DISK_BYTES), bytes(4, DISK_BYTES)];
        let mut guests = [scene.guest("vda", queues)?, scene.guest("vdb", queues)?];
        for (guest, data) in guests.iter_mut().zip(&old) {
            write_over(guest, data)?;
        }
        scene.freeze("s", &["vda", "vdb"])?;
        for (name, data) in ["vda", "vdb"].iter().zip(&old) {
            ensure!(scene.view(name, "s")? == *data, "{name} at the take");
        }
        for (guest, data) in guests.iter_mut().zip(&new) {
            write_over(guest, data)?;
        }
        for (name, data) in ["vda", "vdb", "vda", "vdb"].iter().zip(old.iter().cycle()) {
            ensure!(scene.view(name, "s")? == *data, "{name} after the guest wrote");
        }
        scene.delete("s")?;
        ensure!(matches!(scene.open("vda", "s"), Err(nbd::Error::Refused(_))), "an image of nothing");
        for guest in &mut guests {
            guest.flush()?;
        }
        drop(guests);
        scene.restart(Signal::TERM)?;
        for (name, data) in ["vda", "vdb"].iter().zip(&new) {
            ensure!(scene.image(name)? == *data, "{name} itself, after all");
        }
        Ok(())
    })
}

/// blksnap cannot preserve what inline encryption hides from it; here it is the store that cannot be
/// written. Either way the image fails, with an event, and the guest does not notice.
#[test]
fn b_8000_what_cannot_be_preserved_fails_its_image_only() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
    let (mut guest, mut other) = (scene.guest("vda", 4)?, scene.guest("vdb", 4)?);
    let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
    write_over(&mut guest, &old)?;
    write_over(&mut other, &old)?;
    scene.freeze("s", &["vda", "vdb"])?;
    // The stores have the second half by now, behind which they go on.
    for guest in [&mut guest, &mut other] {
        let half = new.chunks(64 << 10).enumerate().skip(32);
        run_together(guest, half.map(|(number, part)| Op::write(number as u64 * 128, part)))?;
    }
    scene.daemon.server().limit(Resource::Fsize, Some(1 << 20))?;
    guest.write(0, &new[..1 << 16])?;
    let event = scene.qmp.wait_for_event("SNAPSHOT_BROKEN")?;
    ensure!(event["name"] == "s" && event["disk"] == "vda" && event["desc"] != "", "{event}");
    scene.daemon.server().limit(Resource::Fsize, None)?;
    write_over(&mut guest, &new)?;
    guest.flush()?;
    ensure!(scene.image("vda")? == new, "the guest's writes");

    let snapshots = scene.snapshots("vda")?;
    ensure!(snapshots[0]["state"] == "broken" && snapshots[0]["reason"].is_string(), "{snapshots:?}");
    let read = scene.open("vda", "s").and_then(|mut view| view.read_all());
    ensure!(matches!(read, Err(nbd::Error::Errno(5))), "a broken image answers {:?}", read.map(|_| "data"));
    ensure!(scene.view("vdb", "s")? == old, "the image of the other disk");
    scene.delete("s")?;
    scene.freeze("t", &["vda", "vdb"])?;
    write_over(&mut guest, &old)?;
    ensure!(scene.view("vda", "t")? == new, "the next snapshot");
    Ok(())
}

#[test]
fn b_9000_two_snapshots_destroyed_in_reverse() -> Result<()> {
    for order in [["sb", "sa"], ["sa", "sb"]] {
        let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
        let mut guests = [scene.guest("vda", 4)?, scene.guest("vdb", 4)?];
        let data: Vec<_> = (0..4).map(|seed| bytes(seed, DISK_BYTES)).collect();
        for (guest, data) in guests.iter_mut().zip(&data) {
            write_over(guest, data)?;
        }
        scene.freeze("sa", &["vda"])?;
        write_over(&mut guests[0], &data[2])?;
        scene.freeze("sb", &["vdb"])?;
        write_over(&mut guests[1], &data[3])?;
        ensure!(scene.view("vda", "sa")? == data[0] && scene.view("vdb", "sb")? == data[1], "both");
        ensure!(matches!(scene.open("vdb", "sa"), Err(nbd::Error::Refused(_))), "an image of the other disk");
        scene.delete(order[0])?;
        let (name, left) = if order[0] == "sb" { ("vda", &data[0]) } else { ("vdb", &data[1]) };
        ensure!(scene.view(name, order[1])? == *left, "the one that is left");
        scene.delete(order[1])?;
        for guest in &mut guests {
            guest.flush()?;
        }
        ensure!(scene.image("vda")? == data[2] && scene.image("vdb")? == data[3], "the disks");
    }
    Ok(())
}

/// Sectors at the borders of grains and blocks, one and two at a time.
#[test]
fn b_cpp_boundary() -> Result<()> {
    const GRAIN: u64 = 4096 / 512;
    const BLOCK: u64 = (64 << 10) / 512;
    const LAST: u64 = (DISK_BYTES / 512) as u64;
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let mut guest = scene.guest("vda", queues)?;
        let mut live = bytes(1, DISK_BYTES);
        write_over(&mut guest, &live)?;
        let at_border = |border: u64| [(border - 1, 1), (border, 1), (border - 1, 2)];
        let borders = [GRAIN, 3 * GRAIN, BLOCK, 5 * BLOCK].into_iter().flat_map(at_border);
        for (number, (sector, sectors)) in borders.chain([(0, 1), (LAST - 1, 1)]).enumerate() {
            let name = format!("s{number}");
            scene.freeze(&name, &["vda"])?;
            let frozen = live.clone();
            let data = bytes(100 + sector, sectors * 512);
            let op = Op { queue: number % queues, ..Op::write(sector, &data) };
            guest.run(&op)?.ok()?;
            let from = usize::try_from(sector)? * 512;
            live[from..from + data.len()].copy_from_slice(&data);
            ensure!(scene.view("vda", &name)? == frozen, "image, sector {sector}+{sectors}");
            ensure!(read_over(&mut guest)? == live, "disk, sector {sector}+{sectors}");
        }
        Ok(())
    })
}

/// The whole disk as its guest reads it.
fn read_over(guest: &mut Client) -> Result<Vec<u8>> {
    let sectors = (DISK_BYTES / 512) as u64;
    let parts = (0..sectors).step_by(128).map(|sector| Ok(guest.read(sector, 64 << 10)?));
    Ok(parts.collect::<Result<Vec<_>>>()?.concat())
}

/// Every sector carries its disk, place, number and checksum: images hold no later one than the take's,
/// and later ones lie inside what is reported as changed.
#[test]
fn b_cpp_corrupt() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut rig = Rig::start(Setup {
            disks: 2,
            queues,
            unit_bytes: 512,
            more: "block-size=4096",
            ..Setup::default()
        })?;
        rig.begin_load()?;
        let mut previous = rig.freeze("s")?;
        for round in 0..8 {
            rig.wait_for(64)?;
            let now = rig.freeze(&format!("s{round}"))?;
            rig.expect_progress(&previous, &now).with_context(|| format!("round {round}"))?;
            rig.scene.delete(&previous.name)?;
            previous = now;
        }
        rig.end_load()
    })
}

/// Makes a request out of a first sector and a number of sectors.
type Make = fn(u64, u32) -> Op;

/// Discards and write-zeroes are preserved and tracked as writes are, at any length.
#[test]
fn b_missing_discard_and_write_zeroes() -> Result<()> {
    let kinds: [Make; 3] = [
        |sector, sectors| Op::discard(&[(sector, sectors, 0)]),
        |sector, sectors| Op::write_zeroes(&[(sector, sectors, 0)]),
        |sector, sectors| Op::write_zeroes(&[(sector, sectors, request::UNMAP)]),
    ];
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let mut guest = scene.guest("vda", queues)?;
        for (number, make) in kinds.into_iter().enumerate() {
            zero_some(&mut scene, &mut guest, number, make).with_context(|| format!("kind {number}"))?;
        }
        Ok(())
    })
}

/// Makes requests of one kind between two snapshots, writes over their places, and checks all that is told.
fn zero_some(scene: &mut Scene, guest: &mut Client, number: usize, make: Make) -> Result<()> {
    let places = [(0, 8), (8, 1), (15, 2), (100, 333), (1024, 1024), (4096, 7), (8191, 1)];
    let queues = guest.queues.len();
    let turns = |make: Make| {
        let op = move |(turn, (sector, sectors))| Op { queue: turn % queues, ..make(sector, sectors) };
        places.into_iter().enumerate().map(op)
    };
    let old = bytes(1, DISK_BYTES);
    write_over(guest, &old)?;
    let (before, after) = (format!("s{number}"), format!("t{number}"));
    scene.freeze(&before, &["vda"])?;
    run_together(guest, turns(make))?;
    scene.freeze(&after, &["vda"])?;
    ensure!(scene.view("vda", &before)? == old, "before");
    ensure!(scene.view("vda", &after)? == scene.image("vda")?, "after");
    let touched = places.map(|(sector, sectors)| sector * 512..(sector + u64::from(sectors)) * 512);
    let reported = scene.changed("vda", &before, &after)?;
    ensure!(blocks(&reported) == blocks(&touched), "{reported:?}, not {touched:?}");
    run_together(guest, turns(|sector, sectors| Op::write(sector, &vec![7; sectors as usize * 512])))?;
    ensure!(scene.view("vda", &before)? == old, "before, when all was written over");
    Ok(())
}
