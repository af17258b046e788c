//! A guest's writes without a snapshot, at the first touch of what one holds, and when everything has
//! been preserved: Ebbtide beside QEMU's copy-before-write.
//!
//! QEMU copies a cluster of 64 KiB where Ebbtide copies a grain of 4 KiB, so what "first touch" means
//! for a load of 4 KiB depends on where it goes. There are two loads:
//!
//! - **first touch**: every write goes to a cluster in which nothing was written before, so each is a
//!   first touch for both. This is a guest that writes here and there on a large disk.
//! - **dense**: every grain of a small region once, in scattered order. Each write is a first touch for
//!   Ebbtide, and one in sixteen for QEMU, which has copied the neighbours already. This is the best that
//!   large clusters can do. Beside QEMU it has no goal: in memory, a multiple of QEMU's rate is more than
//!   either reaches without a snapshot.
//!
//! A first touch reads the image, writes it, and has as much written to the store. So what `fio` does of all three at once
//! on the disk is measured as well: more than that a disk does not do for long. A round is shorter: what it appends is in
//! the host's page cache when it ends.

use std::collections::BTreeMap;

use anyhow::Result;
use ebbtide_tests::load::Outcome;

use crate::contender::{Bench, COPIES, Contender};
use crate::findings::Goal;
use crate::launch::Setup;
use crate::machine::Medium;
use crate::subject::Subject;
use crate::{Options, Results, Row, record};

use super::MEDIA;

/// The region of the dense load, and of what is written before and after it.
const REGION_BYTES: u64 = 128 << 20;

/// QEMU's unit of copying.
const CLUSTER_BYTES: u64 = 64 << 10;

const GRAIN_BYTES: u64 = 4 << 10;
const LARGE_BYTES: u64 = 1 << 20;

const NONE: &str = "no snapshot";
const FIRST: &str = "first touch";
const DENSE: &str = "first touch, dense";
const ALL: &str = "all touched";
const READS: &str = "reads";

const OF_COPIES: &str = "first touch ÷ a read, a write and an append of fio's";
const COPIES_OF_OWN: &str = "a read, a write and an append of fio's ÷ own without a snapshot";

/// Who is compared.
pub(crate) const SERVERS: [Contender; 2] = [Contender::Qsd, Contender::Ebbtide];

/// The states in which writes are measured, in the order of the table.
pub(crate) const STATES: [&str; 5] = [NONE, FIRST, DENSE, ALL, READS];

/// What each state came to, in the order measured; one may occur twice.
type Touches = Vec<(&'static str, Outcome)>;

/// How the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Random,
    Sequential,
}

impl Load {
    fn row(self, medium: Medium) -> String {
        let load = match self {
            Self::Random => "snapshot-randwrite-4k-d32",
            Self::Sequential => "snapshot-seqwrite-1m-d4",
        };
        format!("{}/{load}", medium.name())
    }

    /// What a copy before each of them asks of the disk.
    fn copies(self, medium: Medium) -> Row {
        let (random, block_size, depth) = match self {
            Self::Random => (true, 4096, 32),
            Self::Sequential => (false, 1 << 20, 4),
        };
        Row { name: self.row(medium), medium, mix: COPIES, random, block_size, depth }
    }
}

/// The rows, in the order of the table.
pub(crate) fn rows() -> Vec<String> {
    MEDIA
        .into_iter()
        .flat_map(|medium| [Load::Random, Load::Sequential].map(|load| load.row(medium)))
        .collect()
}

/// The column of a server in a state.
pub(crate) fn column(server: Contender, state: &str) -> String {
    format!("{}, {state}", server.name())
}

/// Measures all rows once.
pub(crate) fn round(bench: &Bench, options: &Options, round: usize, results: &mut Results) {
    for medium in MEDIA {
        for load in [Load::Random, Load::Sequential] {
            let row = load.row(medium);
            if !options.wants_row(&row) {
                continue;
            }
            let mut servers: Vec<_> = SERVERS.into_iter().filter(|each| options.wants(*each)).collect();
            let turn = round % servers.len().max(1);
            servers.rotate_left(turn);
            let image = bench.image(medium);
            let mut rates = Rates::default();
            for server in servers {
                eprintln!("round {}: {row} {}", round + 1, server.name());
                let setup = Setup::plain(server, &image, medium);
                let measured = match load {
                    Load::Random => random(bench, options, setup),
                    Load::Sequential => sequential(bench, options, setup),
                };
                match measured {
                    Ok(touches) => {
                        for (state, outcome) in touches {
                            rates.add(server, state, outcome.iops);
                            record(&mut results.cells, &row, &column(server, state), outcome);
                        }
                    }
                    Err(error) => results.failures.push(format!("{row} {}: {error:#}", server.name())),
                }
            }
            let copies = if medium == Medium::Disk && options.wants(Contender::Fio) {
                match bench.fio(&load.copies(medium), options.seconds()) {
                    Ok(outcome) => Some(outcome.iops),
                    Err(error) => {
                        results.failures.push(format!("{row} fio: {error:#}"));
                        None
                    }
                }
            } else {
                None
            };
            judge(load, medium, &rates, copies, results);
        }
    }
}

/// IOPS of one round by server and state.
#[derive(Default)]
struct Rates(BTreeMap<(&'static str, &'static str), Vec<f64>>);

impl Rates {
    fn add(&mut self, server: Contender, state: &'static str, iops: f64) {
        self.0.entry((server.name(), state)).or_default().push(iops);
    }

    /// The mean, for a state that was measured before and after.
    fn of(&self, server: Contender, state: &'static str) -> Option<f64> {
        let all = self.0.get(&(server.name(), state))?;
        Some(all.iter().sum::<f64>() / all.len() as f64)
    }
}

fn judge(load: Load, medium: Medium, rates: &Rates, copies: Option<f64>, results: &mut Results) {
    let row = load.row(medium);
    let ours = |state| rates.of(Contender::Ebbtide, state);
    let theirs = |state| rates.of(Contender::Qsd, state);
    let mut ratio = |figure, goal: Option<Goal>, above, below| {
        results.findings.ratio(&row, figure, goal, above, below);
    };
    if load == Load::Sequential {
        ratio("first touch ÷ qsd's", Some(Goal::AtLeast(1.3)), ours(FIRST), theirs(FIRST));
        ratio("first touch ÷ own without a snapshot", None, ours(FIRST), ours(NONE));
        ratio(OF_COPIES, None, ours(FIRST), copies);
        ratio(COPIES_OF_OWN, None, copies, ours(NONE));
        return;
    }
    // In memory a copy costs about what the write itself costs; on a disk the write takes longer.
    let of_own = (medium == Medium::Disk).then_some(Goal::AtLeast(0.45));
    ratio("first touch ÷ qsd's", Some(Goal::AtLeast(2.5)), ours(FIRST), theirs(FIRST));
    ratio("first touch, dense ÷ qsd's", None, ours(DENSE), theirs(DENSE));
    ratio("first touch ÷ own without a snapshot", of_own, ours(FIRST), ours(NONE));
    ratio("first touch, dense ÷ own without a snapshot", of_own, ours(DENSE), ours(NONE));
    ratio(OF_COPIES, None, ours(FIRST), copies);
    ratio(COPIES_OF_OWN, None, copies, ours(NONE));
    ratio("all touched ÷ own without a snapshot", Some(Goal::AtLeast(0.95)), ours(ALL), ours(NONE));
    ratio("all touched ÷ own without a snapshot, qsd", None, theirs(ALL), theirs(NONE));
}

fn random(bench: &Bench, options: &Options, setup: Setup<'_>) -> Result<Touches> {
    let mut subject = Subject::start(bench, setup)?;
    let region = REGION_BYTES.min(options.size_bytes());
    let anywhere = |subject: &Subject<'_>, mix: &str, length: u64| {
        subject.load(|load| {
            load.args(["--mix", mix, "--depth", "32", "--length", &length.to_string()]);
            load.args(["--seconds", &options.seconds().to_string()]);
        })
    };
    let once = |subject: &Subject<'_>, stride: u64, length: u64| {
        subject.load(|load| {
            load.args(["--mix", "write", "--depth", "32", "--pattern", "once"]);
            load.args(["--stride", &stride.to_string(), "--length", &length.to_string()]);
            load.args(["--requests", &u64::MAX.to_string()]);
        })
    };
    let mut touches = vec![(NONE, anywhere(&subject, "write", region)?)];

    subject.take()?;
    touches.push((DENSE, once(&subject, GRAIN_BYTES, region)?));
    touches.push((ALL, anywhere(&subject, "write", region)?));
    subject.expect_preserved(region)?;
    subject.release_all_but(0)?;
    // Once more, so that a machine that drifts meanwhile does so for both sides of a ratio.
    touches.push((NONE, anywhere(&subject, "write", region)?));
    let whole = options.size_bytes();
    touches.push((READS, anywhere(&subject, "read", whole)?));

    subject.take()?;
    touches.push((FIRST, once(&subject, CLUSTER_BYTES, whole)?));
    let unit = if setup.contender == Contender::Qsd { CLUSTER_BYTES } else { GRAIN_BYTES };
    subject.expect_preserved(whole / CLUSTER_BYTES * unit)?;
    subject.stop()?;
    Ok(touches)
}

fn sequential(bench: &Bench, options: &Options, setup: Setup<'_>) -> Result<Touches> {
    let mut subject = Subject::start(bench, setup)?;
    let requests = options.size_bytes() / LARGE_BYTES;
    let once = |subject: &Subject<'_>| {
        subject.load(|load| {
            load.args(["--mix", "write", "--depth", "4", "--pattern", "sequential"]);
            load.args(["--block-size", &LARGE_BYTES.to_string(), "--requests", &requests.to_string()]);
        })
    };
    let mut touches = vec![(NONE, once(&subject)?)];
    subject.take()?;
    touches.push((FIRST, once(&subject)?));
    subject.expect_preserved(requests * LARGE_BYTES)?;
    subject.stop()?;
    Ok(touches)
}
