//! The test's own tools against other people's servers: what fails here is the tool's fault.
//!
//! Tests of `qemu-storage-daemon` pass without doing anything where it is not installed.

mod common;

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ebbtide_tests::baseline::Engine;
use ebbtide_tests::daemon::Program;
use ebbtide_tests::server::{Server, output_of};
use ebbtide_tests::vhost_client::{Client, Op, Options};

/// Runs `check` on `qemu-storage-daemon`, if there is one.
fn on_qsd(check: impl FnOnce(Program) -> Result<()>) -> Result<()> {
    if Command::new("qemu-storage-daemon").arg("--version").output().is_err() {
        eprintln!("skipped: no qemu-storage-daemon");
        return Ok(());
    }
    check(Program::Qsd)
}

#[test]
fn qsd_config_space() -> Result<()> {
    on_qsd(common::config_space_is_readable_at_any_offset_and_length)
}

#[test]
fn qsd_round_trip() -> Result<()> {
    on_qsd(common::what_is_written_is_read_and_is_on_the_host)
}

#[test]
fn qsd_shapes_of_buffers() -> Result<()> {
    on_qsd(common::buffers_may_lie_and_be_cut_anyhow)
}

#[test]
fn qsd_buffers_over_regions() -> Result<()> {
    on_qsd(common::buffers_may_cross_touching_regions)
}

#[test]
fn qsd_past_the_end() -> Result<()> {
    on_qsd(common::requests_past_the_end_are_errors)
}

#[test]
fn qsd_unknown_types() -> Result<()> {
    on_qsd(common::unknown_types_are_unsupported)
}

#[test]
fn qsd_discard_and_zeroes() -> Result<()> {
    on_qsd(common::discards_and_zeroes_touch_only_their_range)
}

#[test]
fn qsd_read_only() -> Result<()> {
    on_qsd(common::a_read_only_disk_is_not_written)
}

#[test]
fn qsd_exactly_once() -> Result<()> {
    on_qsd(|program| {
        for options in common::manners() {
            common::every_request_comes_back_once(program, &options)
                .with_context(|| format!("{options:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn qsd_two_disks() -> Result<()> {
    on_qsd(common::two_disks_are_served_at_once)
}

/// Starts the baseline on an empty file.
fn baseline(dir: &std::path::Path, engine: Engine) -> Result<Server> {
    let image = dir.join("image");
    std::fs::File::create(&image)?.set_len(16 << 20)?;
    let socket = dir.join("sock");
    let mut command = Command::new(env!("CARGO_BIN_EXE_baseline"));
    command.arg("--path").arg(image).arg("--socket").arg(&socket);
    command.args(["--engine", if engine == Engine::Sync { "sync" } else { "uring" }]);
    Server::start(command, &dir.join("log"), &[], &[&socket])
}

#[test]
fn the_baseline_keeps_what_is_written() -> Result<()> {
    for engine in [Engine::Uring, Engine::Sync] {
        let dir = tempfile::tempdir()?;
        let server = baseline(dir.path(), engine)?;
        let mut client = Client::connect(&dir.path().join("sock"), &Options::default())?;
        let mut tickets = Vec::new();
        for number in 0..64 {
            tickets.push(client.start(&Op::write(number * 9, &common::bytes(number, 4608)))?);
        }
        for ticket in tickets {
            client.finish(ticket)?.ok()?;
        }
        client.flush()?;
        for number in 0..64 {
            ensure!(client.read(number * 9, 4608)? == common::bytes(number, 4608), "{engine:?}");
        }
        drop(client);
        server.stop()?;
    }
    Ok(())
}

#[test]
fn the_load_client_counts_its_requests() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let server = baseline(dir.path(), Engine::Uring)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
    command.arg("--socket").arg(dir.path().join("sock"));
    command.args(["--server-pid", &server.pid().to_string(), "--pattern", "once"]);
    command.args(["--requests", "1000000", "--mix", "write", "--depth", "8"]);
    let line = output_of(command, &[], Duration::from_secs(120))?;
    let outcome: ebbtide_tests::load::Outcome = serde_json::from_str(line.trim())?;
    ensure!(outcome.requests == (16 << 20) / 4096, "each block once, not {}", outcome.requests);
    ensure!(outcome.errors == 0 && outcome.iops > 0.0 && outcome.p50_us <= outcome.max_us);
    ensure!(outcome.server_cpu_us.is_some_and(|us| us > 0.0), "the server used some CPU");
    let image = std::fs::read(dir.path().join("image"))?;
    ensure!(image.chunks(4096).all(|block| block.iter().any(|byte| *byte != 0)), "a block is empty");
    Ok(())
}
