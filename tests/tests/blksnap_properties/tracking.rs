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

/// blksnap shows marks in the map of the snapshot that is held; here they belong to the next instant, for what a
/// held one answers never changes.
#[test]
fn b_3000_mark_dirty() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 4)?;
    let written: BTreeSet<u64> = [3, 17].into();
    let marked: BTreeSet<u64> = [0, 3, 20, 21, 22, BLOCKS - 1].into();
    scene.freeze("s0", &["vda"])?;
    touch(&mut guest, &written)?;
    scene.freeze("s1", &["vda"])?;
    let held = scene.changed("vda", "s0", "s1")?;
    let before = scene.view("vda", "s1")?;
    let size = BLOCKS * BLOCK;
    // Parts of blocks, borders and overlaps, in no order, and nothing at the end.
    let ranges = json!([
        { "offset": size - 1, "length": 1 },
        { "offset": 21 * BLOCK, "length": BLOCK + 1 },
        { "offset": 3 * BLOCK + 5, "length": 1 },
        { "offset": 20 * BLOCK, "length": BLOCK + 1 },
        { "offset": 0, "length": BLOCK },
        { "offset": size, "length": 0 },
    ]);
    scene.qmp.call("tracker-mark", json!({ "disk": "vda", "ranges": ranges }))?;
    ensure!(scene.changed("vda", "s0", "s1")? == held, "a mark changed what a held snapshot answers");
    scene.freeze("s2", &["vda"])?;
    ensure!(blocks(&scene.changed("vda", "s1", "s2")?) == marked, "the next snapshot has the marks");
    let all: BTreeSet<u64> = written.union(&marked).copied().collect();
    ensure!(blocks(&scene.changed("vda", "s0", "s2")?) == all, "and so since an older one");
    ensure!(scene.changed("vda", "s0", "s1")? == held, "nor later");
    ensure!(scene.view("vda", "s2")? == before, "marks change no content");
    // As safe as a write's: they are there after a kill.
    scene
        .qmp
        .call("tracker-mark", json!({ "disk": "vda", "ranges": [{ "offset": 5 * BLOCK, "length": 1 }] }))?;
    drop(guest);
    scene.restart(rustix::process::Signal::KILL)?;
    scene.freeze("s3", &["vda"])?;
    ensure!(blocks(&scene.changed("vda", "s2", "s3")?) == [5].into(), "after a kill");

    let range = |offset: u64, length: u64| json!([{ "offset": offset, "length": length }]);
    let many = json!(vec![json!({ "offset": 0, "length": 1 }); 8193]);
    for (disk, ranges, reason, mention) in [
        ("vdx", range(0, 1), "disk-not-found", "vdx"),
        ("vda", range(size, 1), "bad-argument", "4194304 bytes"),
        ("vda", range(0, size + 1), "bad-argument", "4194305 bytes"),
        ("vda", range(u64::MAX, 1), "bad-argument", "18446744073709551615"),
        ("vda", json!([]), "bad-argument", "8192"),
        ("vda", many, "bad-argument", "8192"),
        ("vda", json!([{ "offset": 0 }]), "bad-argument", "length"),
        ("vda", json!([{ "offset": -1, "length": 1 }]), "bad-argument", "ranges"),
    ] {
        let error = scene.qmp.call("tracker-mark", json!({ "disk": disk, "ranges": ranges }));
        let error = error.expect_err("bad input");
        ensure!(error.reason() == reason && error.to_string().contains(mention), "{mention}: {error}");
    }
    scene.freeze("s4", &["vda"])?;
    ensure!(scene.changed("vda", "s3", "s4")?.is_empty(), "what is refused marks nothing");
    Ok(())
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
