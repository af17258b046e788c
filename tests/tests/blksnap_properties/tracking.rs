//! Changes are told exactly, of any older instant, for as long as anyone asks.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::random::{Random, bytes};
use ebbtide_tests::scene::{BLOCK, Scene, blocks, disk, on_one_queue_and_on_four, run_together};
use ebbtide_tests::vhost_client::{Client, Op};
use serde_json::json;

const BLOCKS: u64 = (4 << 20) / BLOCK;

/// Writes a sector into each of some blocks.
fn touch(guest: &mut Client, blocks: &BTreeSet<u64>) -> Result<()> {
    let queues = guest.queues.len();
    let ops = blocks.iter().enumerate().map(|(turn, block)| Op {
        queue: turn % queues,
        ..Op::write(block * BLOCK / 512 + block % 128, &[1; 512])
    });
    run_together(guest, ops)
}

fn some_blocks(random: &mut Random) -> BTreeSet<u64> {
    (0..20).map(|_| random.below(BLOCKS)).collect()
}

#[test]
fn b_3000_cbt_map_read_twice_is_identical() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let mut guest = scene.guest("vda", queues)?;
        let mut random = Random::new(3000);
        let [first, second, third] = std::array::from_fn(|_| some_blocks(&mut random));
        scene.freeze("s0", &["vda"])?;
        touch(&mut guest, &first)?;
        scene.freeze("s1", &["vda"])?;
        let map = scene.changed("vda", "s0", "s1")?;
        ensure!(blocks(&map) == first, "{map:?}, not {first:?}");
        touch(&mut guest, &second)?;
        ensure!(scene.changed("vda", "s0", "s1")? == map, "the map changed under its snapshot");
        scene.freeze("s2", &["vda"])?;
        touch(&mut guest, &third)?;
        ensure!(scene.changed("vda", "s0", "s1")? == map, "the map changed under a newer snapshot");
        ensure!(blocks(&scene.changed("vda", "s1", "s2")?) == second, "the next map has the writes between");
        let both: BTreeSet<u64> = first.union(&second).copied().collect();
        ensure!(blocks(&scene.changed("vda", "s0", "s2")?) == both, "the map since the older instant");
        Ok(())
    })
}

/// blksnap counts its snapshots in a byte and begins anew after 255.
#[test]
fn b_missing_wrap_more_than_255_snapshots() -> Result<()> {
    const SNAPSHOTS: u64 = 260;
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    let place = |number: u64| (number % BLOCKS, bytes(number, 512));
    for number in 0..SNAPSHOTS {
        let (block, data) = place(number);
        guest.write(block * BLOCK / 512, &data)?;
        scene.freeze(&format!("s{number}"), &["vda"])?;
    }
    ensure!(scene.snapshots("vda")?.len() as u64 == SNAPSHOTS, "all of them are held");
    for number in [0, 1, 100, 253, 254, 255, 256, 257, SNAPSHOTS - 1] {
        let mut view = scene.open("vda", &format!("s{number}"))?;
        for past in number.saturating_sub(BLOCKS - 1)..=number {
            let (block, data) = place(past);
            ensure!(view.read(block * BLOCK, 512)? == data, "s{number}, what was written before s{past}");
        }
        for since in [0, 1, 200, 254, 255, 256] {
            if since < number {
                let changed = scene.changed("vda", &format!("s{since}"), &format!("s{number}"))?;
                let expected: BTreeSet<u64> = (since + 1..=number).map(|past| place(past).0).collect();
                ensure!(blocks(&changed) == expected, "s{since} to s{number}: {changed:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn b_missing_cbt_offset_past_the_end() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    scene.freeze("s0", &["vda"])?;
    touch(&mut guest, &(0..BLOCKS).collect())?;
    scene.freeze("s1", &["vda"])?;
    let size = BLOCKS * BLOCK;
    let mut ask = |offset: u64| {
        let query = json!({ "disk": "vda", "since": "s0", "snapshot": "s1", "offset": offset });
        scene.qmp.call("query-changed-blocks", query)
    };
    for past in [size + 1, size + BLOCK, 1 << 32, u64::MAX - 1, u64::MAX] {
        let error = ask(past).expect_err("there is nothing");
        ensure!(error.reason() == "bad-argument", "offset {past}: {error}");
    }
    let none = ask(size)?;
    ensure!(none["ranges"] == json!([]) && none["next-offset"].is_null(), "at the end: {none}");
    let last = ask(size - 1)?;
    ensure!(last["ranges"] == json!([{ "offset": size - 1, "length": 1 }]), "the last byte: {last}");
    Ok(())
}

/// Nothing asked for is an error, and nothing written is no change.
#[test]
fn b_missing_cbt_count_of_zero() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    scene.freeze("s0", &["vda"])?;
    for sector in [0, 8, BLOCKS * BLOCK / 512] {
        for op in
            [Op::write(sector, &[]), Op::discard(&[(sector, 0, 0)]), Op::write_zeroes(&[(sector, 0, 0)])]
        {
            // Done or refused, it changes nothing.
            let _ = guest.run(&op)?;
        }
    }
    scene.freeze("s1", &["vda"])?;
    ensure!(scene.changed("vda", "s0", "s1")?.is_empty(), "nothing was written");
    let query = json!({ "disk": "vda", "since": "s0", "snapshot": "s1", "limit": 0 });
    let error = scene.qmp.call("query-changed-blocks", query).expect_err("a page of nothing");
    ensure!(error.reason() == "bad-argument", "{error}");
    Ok(())
}

/// A change id outlives its snapshot and the daemon.
#[test]
fn b_missing_change_ids_of_deleted_snapshots() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut random = Random::new(7);
    let mut past: Vec<(String, BTreeSet<u64>)> = Vec::new();
    for number in 0..6 {
        let mut guest = scene.guest("vda", 1)?;
        let touched = some_blocks(&mut random);
        touch(&mut guest, &touched)?;
        drop(guest);
        past.iter_mut().for_each(|(_, since)| since.extend(&touched));
        let name = format!("s{number}");
        let id = scene.freeze(&name, &["vda"])?.remove(0);
        for (older, since) in &past {
            let changed = scene.changed("vda", older, &name).with_context(|| format!("since {older}"))?;
            ensure!(blocks(&changed) == *since, "{name} since {older}");
        }
        scene.delete(&name)?;
        past.push((id, BTreeSet::new()));
        if number == 3 {
            scene.restart(rustix::process::Signal::TERM)?;
        }
    }
    Ok(())
}
