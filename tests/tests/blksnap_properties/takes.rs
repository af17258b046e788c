//! The take is one instant, for requests in flight and for several disks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ebbtide_tests::scene::{Scene, disk, on_one_queue_and_on_four};
use ebbtide_tests::stamped::rig::{Rig, Setup};
use ebbtide_tests::vhost_client::{Client, Op, PATIENCE};

/// Requests in flight at the take are in an image wholly or not at all, from the first read on, and none
/// is lost between an image and the changes after it.
#[test]
fn b_missing_in_flight_write_at_the_take() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut rig = Rig::start(Setup { queues, seed: 40, ..Setup::default() })?;
        rig.begin_load()?;
        let mut previous = rig.freeze("first")?;
        for round in 0..8 {
            rig.wait_for(64)?;
            let now = rig.freeze(&format!("s{round}"))?;
            rig.expect_progress(&previous, &now)?;
            // All that was in flight at the take has ended by now.
            rig.wait_for(64 * queues as u64)?;
            rig.expect_same(&now)?;
            rig.scene.delete(&previous.name)?;
            previous = now;
        }
        rig.end_load()
    })
}

/// A guest that writes to the second disk once its write to the first has ended: no image has the second
/// without the first, and none is a write further behind.
#[test]
fn b_missing_two_disks_causal_order() -> Result<()> {
    const OVER: u64 = u64::MAX;
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
        let mut guests = [scene.guest("vda", queues)?, scene.guest("vdb", queues)?];
        let reached = AtomicU64::new(0);
        std::thread::scope(|scope| -> Result<()> {
            let writer = scope.spawn(|| -> Result<()> {
                // Until the other side puts an end there.
                while let Ok(last) = reached.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |number| {
                    (number != OVER).then(|| number + 1)
                }) {
                    write_pair(&mut guests, last + 1)?;
                }
                Ok(())
            });
            let checked = (0..15).try_for_each(|_| check_pair(&mut scene, &reached));
            reached.store(OVER, Ordering::SeqCst);
            writer.join().expect("no panic")?;
            checked
        })
    })
}

fn write_pair(guests: &mut [Client; 2], number: u64) -> Result<()> {
    let data = number.to_le_bytes().repeat(512);
    for guest in guests {
        let queue = usize::try_from(number)? % guest.queues.len();
        guest.run(&Op { queue, ..Op::write(64, &data) })?.ok()?;
    }
    Ok(())
}

/// Takes a snapshot once there are new pairs, and compares what the two disks show.
fn check_pair(scene: &mut Scene, reached: &AtomicU64) -> Result<()> {
    let (before, deadline) = (reached.load(Ordering::SeqCst), Instant::now() + PATIENCE);
    while reached.load(Ordering::SeqCst) < before + 3 {
        ensure!(Instant::now() < deadline, "the guest does not get on");
        std::thread::sleep(Duration::from_micros(100));
    }
    scene.freeze("s", &["vda", "vdb"])?;
    let (first, second) = (number_of(scene, "vda")?, number_of(scene, "vdb")?);
    ensure!(second == first || second + 1 == first, "the first has {first}, the second {second}");
    Ok(scene.delete("s")?)
}

fn number_of(scene: &Scene, disk: &str) -> Result<u64> {
    let data = scene.open(disk, "s")?.read(64 * 512, 4096)?;
    ensure!(data.chunks(8).all(|word| *word == data[..8]), "{disk} is torn");
    Ok(u64::from_le_bytes(data[..8].try_into()?))
}
