//! Difference stores: where they are, how much they take, and what happens when that is not enough.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::host::Loop;
use ebbtide_tests::nbd;
use ebbtide_tests::qmp;
use ebbtide_tests::random::bytes;
use ebbtide_tests::scene::{Scene, disk, on_one_queue_and_on_four, write_over};
use ebbtide_tests::vhost_client::{Client, Op};
use ebbtide_tests::virtio::status;
use rustix::process::Signal;
use serde_json::{Value, json};

const DISK_BYTES: usize = 4 << 20;
const MIB: u64 = 1 << 20;
/// The same, of a buffer.
const PART: usize = 1 << 20;

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// The disk `vda`, whose store is at `path`.
fn stored_at(path: &Path, size: Option<u64>) -> Result<Disk> {
    let path = text(path)?;
    let key = size.map_or(format!("store={path}"), |size| format!("store={path}:{size}"));
    // Disks of a scene live as long as the program.
    Ok(Disk { more: Box::leak(key.into_boxed_str()), ..disk("vda") })
}

/// Adds an area to the store of `vda`.
fn append(scene: &mut Scene, path: &Path, size: Option<u64>) -> Result<qmp::Result<Value>> {
    let path = text(path)?;
    let arguments = match size {
        Some(size) => json!({ "disk": "vda", "path": path, "size": size }),
        None => json!({ "disk": "vda", "path": path }),
    };
    Ok(scene.qmp.call("store-append", arguments))
}

/// What the daemon tells of the store of `vda`.
fn store(scene: &mut Scene) -> Result<Value> {
    Ok(scene.qmp.call("query-disks", json!({}))?[0]["store"].clone())
}

fn freeze_with(scene: &mut Scene, name: &str, terms: &Value) -> Result<()> {
    let mut arguments = json!({ "name": name, "disks": ["vda"] });
    for (key, value) in terms.as_object().context("an object")? {
        arguments[key] = value.clone();
    }
    scene.qmp.call("snapshot-create", arguments)?;
    Ok(())
}

fn limit(scene: &mut Scene, bytes: Option<u64>) -> qmp::Result<Value> {
    scene.qmp.call("store-limit", json!({ "disk": "vda", "bytes": bytes }))
}

/// A snapshot whose old content is in an area at `path`, over writes, a kill, a clean end and a deletion.
fn keeps_old_content_at(path: &Path, size: Option<u64>) -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let text = text(path)?.to_owned();
        let mut scene = Scene::start(&[stored_at(path, size)?])?;
        let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
        write_over(&mut scene.guest("vda", queues)?, &old)?;
        scene.freeze("s", &["vda"])?;
        write_over(&mut scene.guest("vda", queues)?, &new)?;
        ensure!(scene.view("vda", "s")? == old, "after the guest wrote");
        let held = store(&mut scene)?;
        let area = &held["areas"][0];
        ensure!(area["path"] == json!(text), "{held}");
        ensure!(area["used"].as_u64() >= Some(DISK_BYTES as u64), "{held}");
        let own = scene.daemon.dir().join("vda.img.ebb/store");
        ensure!(std::fs::metadata(&own)?.len() == 0, "something is in the state directory");
        for signal in [Signal::KILL, Signal::TERM] {
            scene.restart(signal)?;
            ensure!(scene.view("vda", "s")? == old, "after {signal:?}");
            ensure!(scene.image("vda")? == new, "the image after {signal:?}");
        }
        scene.delete("s")?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while store(&mut scene)?["used"] != json!(0) {
            ensure!(Instant::now() < deadline, "space is not given back");
            std::thread::sleep(Duration::from_millis(50));
        }
        // Nobody's any more: the next disk of this test begins with it.
        drop(scene);
        forget(path)
    })
}

/// Takes an area's header away, as an operator does who gives it to another disk.
fn forget(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        for entry in std::fs::read_dir(path)? {
            std::fs::remove_file(entry?.path())?;
        }
    } else if metadata.is_file() {
        std::fs::remove_file(path)?;
    } else {
        let device = std::fs::OpenOptions::new().write(true).open(path)?;
        device.write_all_at(&vec![0; 16 << 20], 0)?;
        device.sync_all()?;
    }
    Ok(())
}

#[test]
fn b_1100_store_on_a_block_device() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("device");
    File::create(&file)?.set_len(16 * MIB)?;
    match Loop::over(&file)? {
        Some(device) => keeps_old_content_at(device.path(), None),
        None => {
            eprintln!("no loop device here: a file of a fixed size stands for one");
            std::fs::remove_file(&file)?;
            keeps_old_content_at(&file, Some(16 * MIB))
        }
    }
}

#[test]
fn b_1200_store_on_tmpfs() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("ebbtide-test-").tempdir_in("/dev/shm")?;
    keeps_old_content_at(dir.path(), None)
}

#[test]
fn b_1300_store_in_a_directory() -> Result<()> {
    let dir = tempfile::tempdir()?;
    keeps_old_content_at(dir.path(), None)
}

#[test]
fn b_1400_store_in_a_raw_file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    keeps_old_content_at(&dir.path().join("raw"), Some(8 * MIB))
}

/// A file in memory, growing while a load overwrites the disk.
#[test]
fn b_4000_store_on_fast_memory() -> Result<()> {
    let dir = tempfile::Builder::new().prefix("ebbtide-test-").tempdir_in("/dev/shm")?;
    let mut scene = Scene::start(&[stored_at(&dir.path().join("memory"), Some(64 * MIB))?])?;
    let mut old = bytes(1, DISK_BYTES);
    let mut guest = scene.guest("vda", 4)?;
    write_over(&mut guest, &old)?;
    for round in 2..6 {
        scene.freeze(&format!("s{round}"), &["vda"])?;
        let new = bytes(round, DISK_BYTES);
        write_over(&mut guest, &new)?;
        ensure!(scene.view("vda", &format!("s{round}"))? == old, "round {round}");
        old = new;
    }
    Ok(())
}

/// Grows in steps up to its limit, which is said in time; past it the snapshot is gone, and nothing else.
#[test]
fn b_2000_stretch() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
        let mut guest = scene.guest("vda", queues)?;
        write_over(&mut guest, &old)?;
        limit(&mut scene, Some(2 * MIB))?;
        freeze_with(&mut scene, "s", &json!({}))?;
        let step = 256 << 10;
        let mut low = false;
        for part in 0..7 {
            for sector in (part * step / 512..(part + 1) * step / 512).step_by(128) {
                let at = sector * 512;
                guest.write(sector as u64, &new[at..at + (64 << 10)])?;
            }
            ensure!(scene.view("vda", "s")? == old, "step {part}");
            low |= is_low(&mut scene)?;
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while !low {
            ensure!(Instant::now() < deadline, "nobody was told that space gets low");
            low = is_low(&mut scene)?;
        }
        // Two MiB hold 512 grains; the page of the map is one of them.
        write_over(&mut guest, &new)?;
        let broken = scene.qmp.wait_for_event("SNAPSHOT_BROKEN")?;
        ensure!(broken["reason"] == json!("store-full"), "{broken}");
        let told = &scene.snapshots("vda")?[0];
        ensure!(told["state"] == json!("broken") && told["broken-time"].is_object(), "{told}");
        let error = scene.open("vda", "s").and_then(|mut view| view.read_all());
        ensure!(matches!(error, Err(nbd::Error::Errno(5))), "{error:?}");
        ensure!(scene.image("vda")? == new, "the origin");
        // It is as good as new for the next one.
        scene.delete("s")?;
        scene.freeze("t", &["vda"])?;
        ensure!(scene.view("vda", "t")? == new, "the next snapshot");
        Ok(())
    })
}

fn is_low(scene: &mut Scene) -> Result<bool> {
    while let Some(event) = scene.qmp.event_within(Duration::from_millis(200))? {
        if event["event"] == json!("LOW_SPACE") {
            ensure!(event["data"]["bound-by"] == json!("store-limit"), "{event}");
            return Ok(true);
        }
    }
    Ok(false)
}

/// The store overflows under load from all queues: nothing hangs, every write succeeds, and is there.
#[test]
fn b_2100_overflow() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let mut guest = scene.guest("vda", queues)?;
        write_over(&mut guest, &bytes(1, DISK_BYTES))?;
        for round in 2..6 {
            let name = format!("s{round}");
            freeze_with(&mut scene, &name, &json!({ "limit": round * 100_000 }))?;
            let new = bytes(round, DISK_BYTES);
            write_over(&mut guest, &new)?;
            guest.flush()?;
            ensure!(scene.image("vda")? == new, "round {round}");
            let told = scene.snapshots("vda")?;
            ensure!(told.iter().all(|one| one["state"] == json!("broken")), "{told:?}");
        }
        Ok(())
    })
}

/// The store lies among other files of its file system, which are full to the brim, and harms none.
#[test]
fn b_cpp_diff_storage() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let size = MIB + (64 << 10);
    let mut scene = Scene::start(&[stored_at(&dir.path().join("area-0"), Some(size))?, disk("vdb")])?;
    let neighbour = |number: u64| dir.path().join(format!("neighbour-{number}"));
    let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
    let mut guest = scene.guest("vda", 4)?;
    write_over(&mut guest, &old)?;
    for number in 0..4 {
        std::fs::write(neighbour(2 * number), bytes(100 + 2 * number, 300_001))?;
        if number > 0 {
            append(&mut scene, &dir.path().join(format!("area-{number}")), Some(size))??;
        }
    }
    scene.freeze("s", &["vda"])?;
    for (number, part) in (0..).zip(new.chunks(DISK_BYTES / 4)) {
        for (nth, data) in (0..).zip(part.chunks(64 << 10)) {
            guest.write(number * (DISK_BYTES as u64 / 4 / 512) + nth * 128, data)?;
        }
        std::fs::write(neighbour(2 * number + 1), bytes(101 + 2 * number, 300_001))?;
    }
    ensure!(scene.view("vda", "s")? == old, "the snapshot");
    for number in 0..8 {
        ensure!(std::fs::read(neighbour(number))? == bytes(100 + number, 300_001), "neighbour {number}");
    }
    // What is not ours is not taken.
    for other in
        [neighbour(0), scene.daemon.image("vda"), scene.daemon.image("vdb"), dir.path().join("area-0")]
    {
        let before = std::fs::read(&other)?;
        let refused = append(&mut scene, &other, None)?;
        ensure!(
            refused.as_ref().is_err_and(|error| error.reason() == "store-refused"),
            "{other:?}: {refused:?}"
        );
        ensure!(std::fs::read(&other)? == before, "{} was written to", other.display());
    }
    let others =
        scene.qmp.call("store-append", json!({ "disk": "vdb", "path": text(&dir.path().join("area-1"))? }));
    ensure!(others.is_err_and(|error| error.reason() == "store-refused"), "another disk's");
    Ok(())
}

/// Under `fail-writes` the guest gets errors, the snapshot stays exact, and both go on when there is space.
#[test]
fn writes_fail_if_that_was_chosen_and_the_snapshot_stays() -> Result<()> {
    on_one_queue_and_on_four(|queues| {
        let mut scene = Scene::start(&[disk("vda")])?;
        let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
        let mut guest = scene.guest("vda", queues)?;
        write_over(&mut guest, &old)?;
        limit(&mut scene, Some(MIB))?;
        freeze_with(&mut scene, "s", &json!({ "on-overflow": "fail-writes" }))?;
        let mut now = old.clone();
        let mut failed = 0;
        for (nth, data) in new.chunks(64 << 10).enumerate() {
            let reply = guest.run(&Op::write(nth as u64 * 128, data))?;
            match reply.status {
                status::OK => now[nth << 16..(nth + 1) << 16].copy_from_slice(data),
                status::IOERR => failed += 1,
                other => bail!("status {other}"),
            }
        }
        ensure!(failed > 32 && failed < 64, "{failed} of 64 writes failed");
        let trimmed = guest.run(&Op::discard(&[(6144, 128, 0)]))?.status;
        let zeroed = guest.run(&Op::write_zeroes(&[(6144, 128, 0)]))?.status;
        ensure!(
            (trimmed, zeroed) == (status::IOERR, status::IOERR),
            "discards and zeroes: {trimmed} {zeroed}"
        );
        let told = scene.qmp.wait_for_event("STORE_OVERFLOW")?;
        ensure!(told["action"] == json!("fail-writes"), "{told}");
        ensure!(scene.view("vda", "s")? == old, "the snapshot");
        ensure!(scene.image("vda")? == now, "the image");
        scene.restart(Signal::KILL)?;
        ensure!(scene.snapshots("vda")?[0]["on-overflow"] == json!("fail-writes"));
        let mut guest = scene.guest("vda", queues)?;
        write_over(&mut guest, &new)?;
        ensure!(scene.view("vda", "s")? == old, "the snapshot, once there was space");
        Ok(())
    })
}

/// Places a write that has to wait for space, and sees that it does.
fn held(scene: &mut Scene, guest: &mut Client, new: &[u8]) -> Result<ebbtide_tests::vhost_client::Ticket> {
    let ticket = guest.start(&Op::write(2048, &new[PART..PART + (64 << 10)]))?;
    ensure!(!guest.ends_within(&ticket, Duration::from_millis(300))?, "it does not wait");
    ensure!(store(scene)?["writes-held"] == json!(1), "{}", store(scene)?);
    Ok(ticket)
}

/// Under `hold-writes` the guest waits, and goes on with whatever ends the lack of space.
#[test]
fn writes_wait_if_that_was_chosen_until_there_is_space() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
    for what in ["append", "raise", "delete", "deadline", "stop", "end"] {
        let mut scene = Scene::start(&[disk("vda")])?;
        let mut guest = scene.guest("vda", 1)?;
        write_over(&mut guest, &old)?;
        let seconds = if what == "deadline" { 2 } else { 300 };
        let terms = json!({ "on-overflow": "hold-writes", "hold-deadline": seconds, "limit": MIB });
        if what == "append" {
            // One area that is full; not a limit.
            drop(guest);
            scene = Scene::start(&[stored_at(&dir.path().join("small"), Some(MIB))?])?;
            guest = scene.guest("vda", 1)?;
            write_over(&mut guest, &old)?;
            freeze_with(&mut scene, "s", &json!({ "on-overflow": "hold-writes", "hold-deadline": seconds }))?;
        } else {
            freeze_with(&mut scene, "s", &terms)?;
        }
        // All but the page of the map fits.
        write_over(&mut guest, &new[..PART - (64 << 10)])?;
        let ticket = held(&mut scene, &mut guest, &new)?;
        ensure!(guest.queues[0].flying() == 1, "{what}");
        let reader = scene.view("vda", "s");
        ensure!(reader? == old, "{what}: readers go on");
        let began = Instant::now();
        match what {
            "append" => {
                append(&mut scene, &dir.path().join("more"), None)??;
                guest.finish(ticket)?.ok()?;
                ensure!(scene.view("vda", "s")? == old, "{what}");
            }
            "raise" => {
                let low =
                    scene.qmp.call("store-limit", json!({ "disk": "vda", "snapshot": "s", "bytes": 4096 }));
                ensure!(low.is_err_and(|error| error.reason() == "limit-in-use"));
                scene.qmp.call("store-limit", json!({ "disk": "vda", "snapshot": "s", "bytes": null }))?;
                guest.finish(ticket)?.ok()?;
                ensure!(scene.view("vda", "s")? == old, "{what}");
            }
            "delete" => {
                // A snapshot can be taken meanwhile; the held one goes on the operator's word.
                scene.freeze("t", &["vda"])?;
                scene.delete("t")?;
                scene.delete("s")?;
                guest.finish(ticket)?.ok()?;
            }
            "deadline" => {
                guest.finish(ticket)?.ok()?;
                let told = scene.snapshots("vda")?;
                ensure!(told[0]["state"] == json!("broken"), "{told:?}");
                ensure!(told[0]["reason"].as_str().is_some_and(|text| text.contains("2 s")), "{told:?}");
            }
            "stop" => {
                guest.stop_queue(0)?;
                ensure!(scene.snapshots("vda")?[0]["state"] == json!("broken"));
            }
            _ => scene.restart(Signal::TERM)?,
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "{what} took {:?}", began.elapsed());
        let at = PART;
        ensure!(
            scene.image("vda")?[at..at + (64 << 10)] == new[at..at + (64 << 10)],
            "{what}: the write is there"
        );
    }
    Ok(())
}

/// An area that is gone takes with it what was in it, and nothing else.
#[test]
fn a_lost_area_breaks_its_snapshots_and_the_disk_is_served() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let area = dir.path().join("area");
    let (old, new) = (bytes(1, DISK_BYTES), bytes(2, DISK_BYTES));
    let mut scene = Scene::start(&[stored_at(&area, None)?])?;
    write_over(&mut scene.guest("vda", 1)?, &old)?;
    scene.freeze("s", &["vda"])?;
    write_over(&mut scene.guest("vda", 1)?, &new)?;
    scene.freeze("later", &["vda"])?;
    std::fs::rename(&area, dir.path().join("elsewhere"))?;
    scene.restart(Signal::KILL)?;
    let told = scene.snapshots("vda")?;
    let state =
        |name: &str| told.iter().find(|one| one["name"] == json!(name)).map(|one| one["state"].clone());
    ensure!(state("s") == Some(json!("broken")) && state("later") == Some(json!("active")), "{told:?}");
    ensure!(scene.image("vda")? == new);
    ensure!(scene.view("vda", "later")? == new);
    // It was made anew, for those to come.
    write_over(&mut scene.guest("vda", 1)?, &old)?;
    ensure!(scene.view("vda", "later")? == new, "what came later");
    scene.restart(Signal::KILL)?;
    ensure!(scene.view("vda", "later")? == new, "what came later, after a restart");
    Ok(())
}
