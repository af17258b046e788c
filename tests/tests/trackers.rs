//! What an operator asks and tells a disk's tracker, on a real daemon with a guest over vhost-user.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use std::ops::Range;

use anyhow::{Context as _, Result, bail, ensure};
use ebbtide_tests::daemon::Disk;
use ebbtide_tests::qmp;
use ebbtide_tests::scene::Scene;
use rustix::process::Signal;
use serde_json::{Value, json};

const BYTES: u64 = 8 << 20;

fn disk(name: &'static str) -> Disk {
    Disk { name, bytes: BYTES, queues: 1, read_only: false, more: "block-size=65536" }
}

fn tracker(scene: &mut Scene, disk: &str) -> Result<Value> {
    let all = scene.qmp.call("query-tracker", json!({ "disk": disk }))?;
    all.get(0).cloned().with_context(|| format!("{all}"))
}

#[test]
fn a_tracker_tells_how_it_is() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
    let all = scene.qmp.call("query-tracker", json!({}))?;
    ensure!(all.as_array().is_some_and(|all| all.len() == 2), "{all}");
    let fresh = tracker(&mut scene, "vda")?;
    ensure!(fresh["on"] == true && fresh["block-size"] == 65536 && fresh["size"] == BYTES, "{fresh}");
    ensure!(fresh["reason"] == "new" && fresh["began"].is_object() | fresh["began"].is_string(), "{fresh}");
    ensure!(fresh["hot-regions"] == 0 && fresh["presumed-bytes"] == 0, "nothing was written: {fresh}");
    ensure!(fresh["at-risk"] == false && fresh["ends-with-host"] == false, "{fresh}");
    ensure!(fresh["map-bytes"] == 8192 && fresh["checkpoints"] == 0, "{fresh}");
    let mut guest = scene.guest("vda", 1)?;
    guest.write(0, &[7; 4096])?;
    let hot = tracker(&mut scene, "vda")?;
    ensure!(hot["hot-regions"] == 1 && hot["presumed-bytes"] == hot["region-size"], "{hot}");
    ensure!(tracker(&mut scene, "vdb")?["hot-regions"] == 0, "the other disk's tracker is its own");
    drop(guest);
    scene.restart(Signal::KILL)?;
    let kept = tracker(&mut scene, "vda")?;
    ensure!(
        kept["reason"] == "new" && kept["began"] == fresh["began"] && kept["change-id"] == hot["change-id"],
        "{kept}"
    );
    let text = scene.daemon.ask(&["tracker", "show", "vda"])?;
    ensure!(text.contains("the history goes on") && text.contains("new") && !text.contains("vdb"), "{text}");
    let error = scene.qmp.call("query-tracker", json!({ "disk": "none" })).unwrap_err();
    ensure!(error.to_string().contains("none"), "{error}");
    Ok(())
}

#[test]
fn a_reset_begins_a_new_generation_and_ends_what_was_based_on_the_old_one() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda")])?;
    let mut guest = scene.guest("vda", 1)?;
    guest.write(0, &[1; 4096])?;
    scene.freeze("s", &["vda"])?;
    scene.qmp.call("checkpoint-create", json!({ "name": "base", "snapshot": "s" }))?;
    let error = scene.qmp.call("tracker-reset", json!({ "disk": "vda" })).unwrap_err().to_string();
    ensure!(error.contains("holds snapshot 's'"), "{error}");
    scene.delete("s")?;
    let before = tracker(&mut scene, "vda")?;
    let reset = scene.qmp.call("tracker-reset", json!({ "disk": "vda" }))?;
    ensure!(reset["generation"] != before["generation"] && reset["reason"] == "operator", "{reset}");
    let mut event = scene.qmp.wait_for_event("TRACKER_RESET")?;
    while event["reason"] == "new" {
        event = scene.qmp.wait_for_event("TRACKER_RESET")?;
    }
    ensure!(event["generation"] == reset["generation"] && event["reason"] == "operator", "{event}");
    let all = scene.qmp.call("query-incremental", json!({ "since": "base" }))?;
    ensure!(all[0]["possible"] == false && all.to_string().contains("operator"), "{all}");
    guest.write(1024, &[2; 4096])?;
    drop(guest);
    scene.restart(Signal::KILL)?;
    let after = tracker(&mut scene, "vda")?;
    ensure!(after["change-id"] == reset["change-id"] && after["reason"] == "operator", "{after}");
    scene.freeze("t", &["vda"])?;
    let since = reset["change-id"].as_str().context("a change id")?;
    let changed = scene.changed("vda", since, "t")?;
    let later = (512 << 10)..(576 << 10);
    ensure!(
        changed == std::slice::from_ref(&later),
        "what changed since the reset, and no more: {changed:?}"
    );
    Ok(())
}

#[test]
fn tracking_is_switched_off_and_on_by_command_lines_while_the_guest_writes() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), Disk { read_only: true, ..disk("vdr") }])?;
    let mut guest = scene.guest("vda", 1)?;
    guest.write(0, &[1; 4096])?;
    let before = tracker(&mut scene, "vda")?;
    for (verb, wanted) in
        [("reset", "A new generation begins with"), ("disable", "vda are not tracked any more")]
    {
        let text = scene.daemon.ask(&["tracker", verb, "vda"])?;
        ensure!(text.contains(wanted), "{verb}: {text}");
    }
    let off = tracker(&mut scene, "vda")?;
    ensure!(off["on"] == false && off["reason"] == "tracking-disabled", "{off}");
    ensure!(off["generation"] != before["generation"] && off["block-size"] == 0, "{off}");
    let since = before["change-id"].as_str().context("a change id")?;
    let all = scene.qmp.call("query-incremental", json!({ "since": since, "disks": ["vda"] }))?;
    ensure!(all[0]["possible"] == false && all.to_string().contains("tracking-off"), "{all}");
    guest.write(2048, &[3; 4096])?;
    scene.freeze("untracked", &["vda"])?;
    for (verb, disk, wanted) in [
        ("tracker-disable", "vda", "off already"),
        ("tracker-reset", "vda", "does not track"),
        ("tracker-enable", "none", "none"),
        ("tracker-enable", "vdr", "read-only"),
        ("tracker-disable", "vdr", "read-only"),
    ] {
        let error = scene.qmp.call(verb, json!({ "disk": disk })).unwrap_err().to_string();
        ensure!(error.contains(wanted), "{verb} {disk}: {error}");
    }
    drop(guest);
    scene.restart(Signal::KILL)?;
    let text = scene.daemon.ask(&["tracker", "show", "vda"])?;
    ensure!(text.contains("tracking-disabled"), "a restart does not forget it: {text}");
    let text = scene.daemon.ask(&["tracker", "enable", "vda"])?;
    ensure!(text.contains("are tracked since"), "{text}");
    let on = tracker(&mut scene, "vda")?;
    ensure!(on["on"] == true && on["reason"] == "tracking-enabled", "{on}");
    let error = scene.qmp.call("tracker-enable", json!({ "disk": "vda" })).unwrap_err().to_string();
    ensure!(error.contains("on already"), "{error}");
    let mut guest = scene.guest("vda", 1)?;
    guest.write(1024, &[2; 4096])?;
    drop(guest);
    scene.freeze("t", &["vda"])?;
    let since = on["change-id"].as_str().context("a change id")?;
    let changed = scene.changed("vda", since, "t")?;
    let later = (512 << 10)..(576 << 10);
    ensure!(changed == std::slice::from_ref(&later), "what changed since it is on: {changed:?}");
    Ok(())
}

const SMALL: u64 = 4096;
const LARGE: u64 = 1 << 20;

fn disk_of(name: &'static str, more: &'static str) -> Disk {
    Disk { more, ..disk(name) }
}

/// Changes between two checkpoints.
fn between(scene: &mut Scene, since: &str, until: &str) -> Result<Value> {
    let query = json!({ "disk": "vda", "since": since, "until": until });
    Ok(scene.qmp.call("query-changed-blocks", query)?)
}

/// Expects `answer` to be a refusal of an id of another generation, for this reason.
fn refused<T: std::fmt::Debug>(answer: qmp::Result<T>, why: &str) -> Result<()> {
    match answer {
        Err(qmp::Error::Refused { class, reason, desc })
            if class == "GenericError" && reason == "generation-differs" && desc.contains(why) =>
        {
            Ok(())
        }
        other => bail!("{other:?}"),
    }
}

/// Every way to ask for what changed since an instant of another generation is refused, for this reason; of the
/// disk beside it nothing is.
fn ended(scene: &mut Scene, id: &str, why: &str) -> Result<()> {
    let told = scene.qmp.call("query-incremental", json!({ "since": id, "disks": ["vda"] }))?;
    let is_told = told[0]["reason"] == "generation-differs" && told[0]["desc"].to_string().contains(why);
    ensure!(told[0]["possible"] == false && is_told, "{told}");
    let told = scene.qmp.call("query-incremental", json!({ "since": "first" }))?;
    let possible: Vec<_> = told.as_array().context("a list")?.iter().map(|one| &one["possible"]).collect();
    ensure!(possible == [false, true], "{told}");
    let text = scene.daemon.ask(&["incremental", "first"])?;
    ensure!(text.contains("vda: no, ") && text.contains(why) && text.contains("vdb: yes"), "{text}");
    scene.freeze("asked", &["vda"])?;
    for since in [id, "first"] {
        let query = json!({ "disk": "vda", "since": since, "snapshot": "asked" });
        refused(scene.qmp.call("query-changed-blocks", query), why)?;
    }
    Ok(scene.delete("asked")?)
}

/// What changed since `id`, all of it, in blocks of `size`.
fn goes_on(scene: &mut Scene, id: &str, size: u64, expected: &[Range<u64>]) -> Result<()> {
    let now = tracker(scene, "vda")?;
    ensure!(now["block-size"] == size && now["reason"] == "block-size-changed", "{now}");
    scene.freeze("asked", &["vda"])?;
    let query = json!({ "disk": "vda", "since": id, "snapshot": "asked" });
    let told = scene.qmp.call("query-changed-blocks", query)?;
    ensure!(told["block-size"] == size, "{told}");
    let changed = scene.changed("vda", id, "asked")?;
    ensure!(changed == expected, "in blocks of {size}: {changed:?} and not {expected:?}");
    Ok(scene.delete("asked")?)
}

/// By a stop in order and by a kill, to smaller blocks, to larger ones, and back to those of before.
#[test]
fn another_block_size_begins_a_generation_that_says_so() -> Result<()> {
    let mut scene = Scene::start(&[disk("vda"), disk("vdb")])?;
    let mut guest = scene.guest("vda", 1)?;
    guest.write(0, &[1; 4096])?;
    let first = scene.freeze("held", &["vda", "vdb"])?.remove(0);
    scene.qmp.call("checkpoint-create", json!({ "name": "first", "snapshot": "held" }))?;
    guest.write(2048, &[2; 512])?;
    scene.freeze("s", &["vda"])?;
    scene.qmp.call("checkpoint-create", json!({ "name": "second", "snapshot": "s" }))?;
    scene.delete("s")?;
    let told = between(&mut scene, "first", "second")?;
    let content = scene.view("vda", "held")?;
    guest.write(0, &[3; 512])?;
    let mut ids = vec![first];
    let why = "block-size-changed";
    let rounds = [
        (Signal::TERM, "block-size=4096", SMALL, 3 * SMALL),
        (Signal::KILL, "block-size=1M", LARGE, LARGE + 4096),
        (Signal::KILL, "block-size=65536", 65536, 65536),
        (Signal::TERM, "block-size=64K", 65536, 0),
    ];
    for (signal, more, size, at) in rounds {
        drop(guest);
        let old = tracker(&mut scene, "vda")?;
        scene.serve_next(&[disk_of("vda", more), disk("vdb")]);
        scene.restart(signal)?;
        let new = tracker(&mut scene, "vda")?;
        guest = scene.guest("vda", 1)?;
        if old["block-size"] == size {
            // The same size in other words.
            ensure!(new["generation"] == old["generation"], "{new}");
            continue;
        }
        ensure!(new["generation"] != old["generation"], "{new}");
        ensure!(new["map-bytes"] == 4096 + (BYTES / size * 4).next_multiple_of(4096), "{new}");
        ensure!(new["hot-regions"] == 0, "nothing was changed in it: {new}");
        let log = scene.daemon.server().output();
        ensure!(log.contains("begins anew") && log.contains("another block size was asked for"), "{log}");
        let other = tracker(&mut scene, "vdb")?;
        ensure!(other["block-size"] == 65536 && other["reason"] == "new", "{other}");
        // Nothing was lost but the history: the snapshot is there, and what was between two past instants.
        ensure!(scene.view("vda", "held")? == content, "what is held");
        let query = json!({ "disk": "vda", "since": "first", "snapshot": "held" });
        refused(scene.qmp.call("query-changed-blocks", query), why)?;
        ensure!(between(&mut scene, "first", "second")? == told, "told again");
        let listed = scene.qmp.call("query-checkpoints", json!({ "disk": "vda" }))?;
        ensure!(listed[0]["current"] == false && listed[0]["ended"] == why, "{listed}");
        let since = new["change-id"].as_str().context("a change id")?.to_owned();
        let block = at / size * size..at / size * size + size;
        for signal in [None, Some(Signal::KILL), Some(Signal::TERM), Some(Signal::KILL)] {
            if let Some(signal) = signal {
                drop(guest);
                scene.restart(signal)?;
                guest = scene.guest("vda", 1)?;
            } else {
                goes_on(&mut scene, &since, size, &[])?;
                guest.write(at / 512, &[4; 512])?;
            }
            goes_on(&mut scene, &since, size, std::slice::from_ref(&block))?;
            ids.iter().try_for_each(|id| ended(&mut scene, id, why))?;
        }
        // In the next generation this one's are as old.
        ids.push(since);
    }
    Ok(())
}
