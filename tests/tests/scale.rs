//! A huge disk with little in it: what was never touched costs no memory, over starts and questions.
//!
//! How long that takes is measured by the program `bench`; a test must not fail because a machine is slow.

#![forbid(unsafe_code)]

use anyhow::{Result, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::scene::{Scene, disk};
use rustix::process::Signal;

/// About the most that ext4 can have; its change map has 1 GiB with blocks of 64 KiB.
const BYTES: u64 = 15 << 40;
const PLACES: u64 = 200;
const BLOCK: u64 = 64 << 10;

/// What may be resident of files: of the program itself, and a few pages of the map for each place.
const MOST_RESIDENT: u64 = 48 << 20;

fn expect_small(scene: &mut Scene, when: &str) -> Result<()> {
    let server = scene.daemon.server();
    let resident = server.memory_bytes("RssFile")? + server.memory_bytes("RssAnon")?;
    println!("{when}: {} KiB resident", resident >> 10);
    ensure!(resident < MOST_RESIDENT, "{when}: {resident} bytes are resident");
    Ok(())
}

#[test]
fn what_was_never_touched_costs_no_memory() -> Result<()> {
    let disks = [Disk { bytes: BYTES, more: "block-size=64K", ..disk("vda") }];
    let mut scene = Scene::start(&disks)?;
    expect_small(&mut scene, "at the first start")?;
    scene.freeze("before", &["vda"])?;
    let mut guest = scene.guest("vda", 1)?;
    let stride = BYTES / PLACES / BLOCK * BLOCK;
    for place in 0..PLACES {
        guest.write(place * stride / 512, &[7; 512])?;
    }
    drop(guest);
    scene.freeze("after", &["vda"])?;
    let expected: Vec<_> = (0..PLACES).map(|place| place * stride..place * stride + BLOCK).collect();
    for (signal, when) in [
        (None, "asked at once"),
        (Some(Signal::TERM), "after a clean stop"),
        (Some(Signal::KILL), "after a kill"),
    ] {
        if let Some(signal) = signal {
            scene.restart(signal)?;
        }
        ensure!(scene.changed("vda", "before", "after")? == expected, "{when}");
        expect_small(&mut scene, when)?;
    }
    Ok(())
}
