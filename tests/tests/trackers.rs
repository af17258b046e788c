//! What an operator asks and tells a disk's tracker, on a real daemon with a guest over vhost-user.
//!
//! `$EBBTIDE` names another program to test; otherwise it is built.

#![forbid(unsafe_code)]

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::daemon::Disk;
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
