//! `outage`: what runs beside the daemon in a machine that is to lose power: a backup, a load, and a judge.
//!
//! Writes are numbered, and the number says where a write goes, so that the judge needs no journal but
//! the last number that was flushed. That is told on standard output, which somebody outside keeps.
//!
//! Absent: the outage; `tests/e2e/power-cut` does that from outside.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use ebbtide_tests::nbd::Nbd;
use ebbtide_tests::qmp::Qmp;
use ebbtide_tests::random::Random;
use ebbtide_tests::stamped::unit;
use ebbtide_tests::vhost_client::{Client, Op, Options};
use serde_json::json;

/// Bytes of a unit of the load.
const UNIT: usize = 4096;

/// Writes that are in flight together.
const WINDOW: u64 = 16;

/// Writes between two flushes, at most.
const BETWEEN_FLUSHES: u64 = 96;

#[derive(Parser)]
struct Cli {
    /// The folder of the daemon's sockets, `control`, `nbd` and `vda`
    #[arg(long)]
    folder: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a full backup and prints its change id
    Full { backup: PathBuf },
    /// Writes until the power goes, from this write on, and prints what is flushed
    Load { first: u64 },
    /// Makes an incremental backup over the last one, judges it, and prints its change id
    Incremental {
        backup: PathBuf,
        /// The change id of the last backup
        since: String,
        /// The first write that is not known to be flushed
        flushed: u64,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let folder = &cli.folder;
    match cli.command {
        Command::Full { backup } => full(folder, &backup),
        Command::Load { first } => load(folder, first),
        Command::Incremental { backup, since, flushed } => incremental(folder, &backup, &since, flushed),
    }
}

/// The unit that write `number` goes to, of `units`: mostly near where the last ones went.
fn place(number: u64, units: u64) -> u64 {
    let mut random = Random::new(number);
    let near = (number / 2048 * 977) % units;
    if random.below(64) == 0 { random.below(units) } else { (near + random.below(units / 16)) % units }
}

/// A snapshot, its view whole, and its change id.
fn freeze(folder: &Path, qmp: &mut Qmp) -> Result<(Vec<u8>, String)> {
    let answer = qmp.call("snapshot-create", json!({ "name": "backup", "disks": ["vda"] }))?;
    let id = answer["disks"][0]["change-id"].as_str().context("a change id")?.to_owned();
    let view = Nbd::open(&folder.join("nbd"), "vda@backup")?.read_all()?;
    Ok((view, id))
}

fn keep(backup: &Path, data: &[u8]) -> Result<()> {
    let mut file = std::fs::File::create(backup)?;
    file.write_all(data)?;
    Ok(file.sync_all()?)
}

fn full(folder: &Path, backup: &Path) -> Result<()> {
    let mut qmp = Qmp::connect(&folder.join("control"))?;
    let (view, id) = freeze(folder, &mut qmp)?;
    keep(backup, &view)?;
    qmp.call("snapshot-delete", json!({ "name": "backup" }))?;
    println!("backup {id}");
    Ok(())
}

fn load(folder: &Path, first: u64) -> Result<()> {
    let mut guest = Client::connect(&folder.join("vda"), &Options::default())?;
    let capacity = guest.config(0, 8)?;
    let sectors = u64::from_le_bytes(capacity[..8].try_into()?);
    let units = sectors * 512 / UNIT as u64;
    let mut next = first;
    let mut flushed = first;
    loop {
        let mut window = BTreeMap::new();
        while (window.len() as u64) < WINDOW {
            let unit = place(next, units);
            if window.contains_key(&unit) {
                break;
            }
            let mut data = vec![0; UNIT];
            unit::fill(&mut data, 0, unit, next);
            window.insert(unit, guest.start(&Op::write(unit * (UNIT as u64 / 512), &data))?);
            next += 1;
        }
        for (unit, ticket) in window {
            guest.finish(ticket)?.ok().with_context(|| format!("writing unit {unit}"))?;
        }
        if next - flushed >= BETWEEN_FLUSHES {
            guest.flush()?;
            flushed = next;
            println!("flushed {flushed}");
        }
    }
}

fn incremental(folder: &Path, backup: &Path, since: &str, flushed: u64) -> Result<()> {
    let mut qmp = Qmp::connect(&folder.join("control"))?;
    let (view, id) = freeze(folder, &mut qmp)?;
    let mut restored = std::fs::read(backup)?;
    ensure!(restored.len() == view.len(), "the disk has another size");
    let mut changed = 0;
    for range in changes(&mut qmp, since)? {
        let range = usize::try_from(range.start)?..usize::try_from(range.end)?;
        changed += range.len();
        restored[range.clone()].copy_from_slice(&view[range]);
    }
    let wrong = restored.chunks(UNIT).zip(view.chunks(UNIT)).position(|(one, other)| one != other);
    if let Some(unit) = wrong {
        let differ = restored.chunks(UNIT).zip(view.chunks(UNIT)).filter(|(one, other)| one != other).count();
        anyhow::bail!("{differ} units changed and were not reported, the first is {unit}");
    }
    judge(&view, flushed)?;
    keep(backup, &restored)?;
    qmp.call("snapshot-delete", json!({ "name": "backup" }))?;
    println!("restored {changed} of {}", view.len());
    println!("backup {id}");
    Ok(())
}

fn changes(qmp: &mut Qmp, since: &str) -> Result<Vec<Range<u64>>> {
    let mut all = Vec::new();
    let mut offset = Some(0);
    while let Some(from) = offset {
        let query = json!({ "disk": "vda", "since": since, "snapshot": "backup", "offset": from });
        let page = qmp.call("query-changed-blocks", query)?;
        for range in page["ranges"].as_array().context("ranges")? {
            let number = |name: &str| range[name].as_u64().with_context(|| format!("{name} of {range}"));
            let (first, length) = (number("offset")?, number("length")?);
            all.push(first..first + length);
        }
        offset = page["next-offset"].as_u64();
    }
    Ok(all)
}

/// Every write before `flushed` is there, or a later one in its place.
fn judge(view: &[u8], flushed: u64) -> Result<()> {
    let units = (view.len() / UNIT) as u64;
    let mut least = BTreeMap::new();
    for number in 1..flushed {
        least.insert(place(number, units), number);
    }
    for (unit, data) in (0..).zip(view.chunks(UNIT)) {
        let found = unit::read(data, 0, unit).map_err(anyhow::Error::msg);
        let found = found.with_context(|| format!("unit {unit}"))?;
        if let Some(&number) = least.get(&unit) {
            ensure!(
                found.is_some_and(|found| found >= number),
                "unit {unit}: write {number} was flushed and is lost, it has {found:?}"
            );
        }
        ensure!(
            found.is_none_or(|found| place(found, units) == unit),
            "unit {unit} has write {found:?}, which went elsewhere"
        );
    }
    Ok(())
}
