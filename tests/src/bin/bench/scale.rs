//! Large disks with little in them: how long a start takes, and a question about changes.
//!
//! The disk of 64 TiB is a sparse file in memory, since ext4 has none above 16 TiB; its state, of which the change map
//! is allocated in full (4 GiB with blocks of 64 KiB), is on the disk. The other row is the engine alone, in this
//! process, without a socket or JSON. Absent: load; nothing else runs meanwhile.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use control::client::Client;
use cow_engine::cbt::{BlockGrid, ByteRange};
use cow_engine::group::{self, Admin};
use cow_engine::host::{Executor, HostDir, HostFile, ImageOptions};
use cow_engine::{Disk, DiskOptions, StorePlan, View};
use ebbtide_tests::random::Random;
use ebbtide_tests::server::Server;
use serde_json::json;

use crate::contender::{Bench, Contender};
use crate::findings::{Goal, Unit};
use crate::launch::{Setup, text};
use crate::machine::Medium;
use crate::snapshots::attempt;
use crate::{Options, Results};

const HUGE: &str = "shm/scale-64t";
const DENSE: &str = "engine/scale-1t-1-percent";

const HUGE_BYTES: u64 = 64 << 40;
/// Places that are written on it: one every 16 GiB.
const PLACES: u64 = 4096;
const BLOCK: u64 = 64 << 10;
const DENSE_BYTES: u64 = 1 << 40;

const PATIENCE: Duration = Duration::from_secs(60);

/// Measures the rows that are wanted.
pub(crate) fn measure(bench: &Bench, options: &Options, results: &mut Results) {
    if !options.wants(Contender::Ebbtide) {
        return;
    }
    attempt(options, results, HUGE, |_, results| huge(bench, options, results));
    attempt(options, results, DENSE, |_, results| dense(bench, options, results));
}

fn millis(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1000.0
}

fn huge(bench: &Bench, options: &Options, results: &mut Results) -> Result<()> {
    let image = bench.dir(Medium::Shm).join("scale.raw");
    File::create(&image)?.set_len(HUGE_BYTES)?;
    let state = bench.dir(Medium::Disk).join("scale.state");
    let keys = format!(",state={}", text(&state)?);
    let setup = Setup { keys: &keys, ..Setup::plain(Contender::Ebbtide, &image, Medium::Shm) };
    let measured = on_huge(bench, options, setup, results);
    std::fs::remove_file(&image)?;
    std::fs::remove_dir_all(&state)?;
    measured
}

fn on_huge(bench: &Bench, options: &Options, setup: Setup<'_>, results: &mut Results) -> Result<()> {
    let start = |figure, results: &mut Results| -> Result<Server> {
        let begin = Instant::now();
        let server = bench.start(setup)?;
        results.findings.note(HUGE, figure, Unit::Milliseconds, Goal::AtMost(1000.0), millis(begin));
        Ok(server)
    };
    let mut server = start("first start", results)?;
    for round in 0..options.rounds() {
        let mut control = Client::connect(&bench.control(), PATIENCE)?;
        let (before, after) = (format!("b{round}"), format!("a{round}"));
        control.call_value("snapshot-create", &json!({ "name": before }))?;
        bench.load(server.pid(), |load| {
            let stride = (HUGE_BYTES / PLACES).to_string();
            load.args(["--mix", "write", "--pattern", "once", "--stride", &stride]);
            load.args(["--requests", &PLACES.to_string(), "--seed", &(round + 1).to_string()]);
        })?;
        control.call_value("snapshot-create", &json!({ "name": after }))?;
        for figure in ["first question about 4,096 changes", "the same again"] {
            let begin = Instant::now();
            let changes = count_changes(&mut control, &before, &after)?;
            results.findings.note(HUGE, figure, Unit::Milliseconds, Goal::AtMost(50.0), millis(begin));
            ensure!(changes == PLACES, "{changes} ranges changed, not {PLACES}");
        }
        let resident = server.memory_bytes("RssFile")? + server.memory_bytes("RssAnon")?;
        let mib = resident as f64 / f64::from(1 << 20);
        results.findings.note(HUGE, "resident, MiB", Unit::Count, None, mib);
        for name in [before, after] {
            control.call_value("snapshot-delete", &json!({ "name": name }))?;
        }
        server.stop()?;
        server = start("start after a clean stop", results)?;
        server.kill();
        server = start("start after a kill", results)?;
    }
    server.stop().map(drop)
}

fn count_changes(control: &mut Client, since: &str, snapshot: &str) -> Result<u64> {
    let (mut count, mut offset) = (0, Some(0));
    while let Some(from) = offset {
        let query = json!({ "disk": "vda", "since": since, "snapshot": snapshot, "offset": from });
        let page = control.call_value("query-changed-blocks", &query)?;
        count += page["ranges"].as_array().context("no ranges")?.len() as u64;
        offset = page["next-offset"].as_u64();
    }
    Ok(count)
}

fn dense(bench: &Bench, options: &Options, results: &mut Results) -> Result<()> {
    let dir = bench.dir(Medium::Disk).join("dense");
    std::fs::create_dir(&dir)?;
    let measured = on_dense(&dir, options, results);
    std::fs::remove_dir_all(&dir)?;
    measured
}

fn on_dense(dir: &Path, options: &Options, results: &mut Results) -> Result<()> {
    let path = dir.join("image");
    File::create(&path)?.set_len(DENSE_BYTES)?;
    let state = dir.join("state");
    std::fs::create_dir(&state)?;
    let image = ImageOptions { read_only: false, direct: false, logical_block_bytes: 512 };
    let image = HostFile::open_image(&path, image)?;
    let executor = Executor::new(64)?;
    let io = executor.storage();
    let disk_options = DiskOptions {
        name: "vda".into(),
        image_path: text(&path)?.into(),
        identity: image.identity()?,
        meanwhile: image.meanwhile()?,
        image,
        dir: HostDir::new(state),
        tracking: Some(BlockGrid::new(BLOCK)?),
        boot: [1; 16],
        events: Arc::new(|_| {}),
        merge_step: 1000,
        store: StorePlan::default(),
        region_bytes: None,
    };
    executor.block_on(async {
        let (disk, _) = Disk::open(&io, disk_options).await?;
        let disks = std::slice::from_ref(&disk);
        let mut admin = Admin::new();
        let mut random = Random::new(1);
        for round in 0..options.rounds() {
            let (before, after) = (format!("b{round}"), format!("a{round}"));
            group::create(&mut admin, &io, disks, &before, 0, PATIENCE).await?;
            let blocks = DENSE_BYTES / BLOCK;
            let mut places: Vec<_> = (0..blocks / 100).map(|_| random.below(blocks) * BLOCK).collect();
            places.sort_unstable();
            let changed: Vec<_> = places.iter().map(|&at| ByteRange::new(at, at + BLOCK)).collect();
            disk.mark_changed(&io, disk.lane(), &changed).await?;
            group::create(&mut admin, &io, disks, &after, 0, PATIENCE).await?;
            let since = disk.snapshot(&before)?.change_id().epoch;
            let view = View::new(disk.clone(), disk.snapshot(&after)?);
            for figure in ["first answer", "the same again"] {
                let begin = Instant::now();
                let whole = ByteRange::new(0, DENSE_BYTES);
                let found = view.changes(&io, since, whole, usize::MAX).await?;
                results.findings.note(DENSE, figure, Unit::Milliseconds, Goal::AtMost(10.0), millis(begin));
                ensure!(found.len() as u64 > blocks / 110, "{} ranges", found.len());
            }
            disk.delete_snapshot(&io, &before).await?;
            disk.delete_snapshot(&io, &after).await?;
        }
        Ok(())
    })
}
