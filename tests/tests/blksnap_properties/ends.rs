//! Front ends, media and snapshots go while they are in use.

use anyhow::{Result, ensure};
use ebbtide_tests::nbd::{self, Nbd};
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{Scene, disk, kick, on_one_queue_and_on_four, write_over};
use ebbtide_tests::stamped::rig::{Rig, Setup};
use ebbtide_tests::vhost_client::Op;
use rustix::process::Signal;

const DISK_BYTES: usize = 4 << 20;

/// A disk that vanishes is a front end that goes, without a word and with requests in flight.
#[test]
fn b_5000_pullout() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
        let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
        write_over(&mut scene.guest("vda", queues)?, &old)?;
        let resting = scene.daemon.resting_descriptors()?.len();
        scene.freeze("s", &["vda"])?;
        let with_snapshot = scene.daemon.resting_descriptors()?.len();
        for round in 0..5 {
            let mut guest = scene.guest("vda", queues)?;
            for number in 0..16 * queues {
                let sector = (number as u64 + round) % 64 * 128;
                let op = Op { queue: number % queues, ..Op::write(sector, &new[..64 << 10]) };
                let _never_awaited = guest.place(&op)?;
            }
            kick(&mut guest)?;
            drop(guest);
            ensure!(scene.view("vda", "s")? == old, "round {round}");
        }
        write_over(&mut scene.guest("vda", queues)?, &new)?;
        ensure!(scene.view("vda", "s")? == old, "after a new front end wrote everything");
        scene.daemon.expect_descriptors(with_snapshot)?;
        scene.delete("s")?;
        scene.daemon.expect_descriptors(resting)
    })
}

/// The medium goes away under the daemon: errors or what is left of it, no hang, and nobody else is
/// concerned.
#[test]
fn b_5000_pullout_of_the_image() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
    let (mut guest, mut other) = (scene.guest("vda", 1)?, scene.guest("vdb", 1)?);
    let old = bytes(1, DISK_BYTES);
    write_over(&mut guest, &old)?;
    write_over(&mut other, &old)?;
    scene.freeze("s", &["vda", "vdb"])?;
    std::fs::OpenOptions::new().write(true).open(scene.daemon.image("vda"))?.set_len(0)?;
    for sector in (0..DISK_BYTES as u64 / 512).step_by(999) {
        // Any status will do; it has to come.
        let _ = guest.run(&Op::read(sector / 8 * 8, 4096))?;
        let _ = guest.run(&Op::write(sector / 8 * 8, &[1; 4096]))?;
    }
    let _ = scene.open("vda", "s").and_then(|mut view| view.read_all());
    write_over(&mut other, &bytes(2, DISK_BYTES))?;
    ensure!(scene.view("vdb", "s")? == old, "the other disk's image");
    scene.delete("s")?;
    drop((guest, other));
    scene.restart(Signal::TERM)
}

#[test]
fn b_7000_destroy_under_concurrent_io() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        // Large enough that much of it is still untouched when the snapshot goes.
        let mut rig = Rig::start(Setup { queues, units: 4096, ..Setup::default() })?;
        rig.begin_load()?;
        for round in 0..4 {
            let frozen = rig.freeze(&format!("s{round}"))?;
            // Two readers are at work when the snapshot goes, and see nothing but it.
            let views = [rig.scene.open("vda", &frozen.name)?, rig.scene.open("vda", &frozen.name)?];
            std::thread::scope(|scope| -> Result<()> {
                let shown = &frozen.views[0];
                let readers = views.map(|view| scope.spawn(move || read_while_it_lasts(view, shown)));
                rig.scene.delete(&frozen.name)?;
                readers.into_iter().try_for_each(|reader| reader.join().expect("no panic"))
            })?;
            ensure!(matches!(rig.scene.open("vda", &frozen.name), Err(nbd::Error::Refused(_))));
            rig.wait_for(32)?;
        }
        rig.end_load()?;
        let last = rig.freeze("last")?;
        rig.expect_on_host(&last)
    })
}

/// Reads a view until that is an error, and compares all that is read.
fn read_while_it_lasts(mut view: Nbd, shown: &[u8]) -> Result<()> {
    for _ in 0..3 {
        match view.read_all() {
            Ok(data) => ensure!(data == shown, "a view changed as it went"),
            Err(_) => break,
        }
    }
    Ok(())
}

/// A front end that goes and comes back finds its snapshot held, and its writes preserved.
#[test]
fn b_missing_detach_under_snapshot() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let old = bytes(1, DISK_BYTES);
        write_over(&mut scene.guest("vda", queues)?, &old)?;
        scene.freeze("s", &["vda"])?;
        for seed in 2..5 {
            // A part by each front end.
            write_over(&mut scene.guest("vda", queues)?, &bytes(seed, usize::try_from(seed)? << 20))?;
            ensure!(scene.view("vda", "s")? == old, "front end {seed}");
        }
        Ok(())
    })
}
