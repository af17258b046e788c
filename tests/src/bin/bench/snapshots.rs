//! What a snapshot costs the guest's writes: without one, at the first touch of each grain, and
//! when every grain has been preserved.

use anyhow::Result;
use ebbtide_tests::load::Outcome;

use crate::contender::{Bench, Contender};
use crate::machine::Medium;
use crate::{Cells, Options, record};

/// The part of the disk that is written; each of its grains once for the first touch.
const REGION_BYTES: u64 = 128 << 20;

pub(crate) const COLUMNS: [&str; 3] = ["no snapshot", "first touch", "all touched"];

/// The row for `medium`.
pub(crate) fn row_name(medium: Medium) -> String {
    format!("{}/snapshot-randwrite-4k-d32", medium.name())
}

/// Measures both media once.
pub(crate) fn round(bench: &Bench, options: &Options, cells: &mut Cells, failures: &mut Vec<String>) {
    for medium in [Medium::Disk, Medium::Shm] {
        let row = row_name(medium);
        if !options.wants_row(&row) {
            continue;
        }
        eprintln!("{row}");
        match measure(bench, medium, options) {
            Ok(outcomes) => {
                for (column, outcome) in COLUMNS.into_iter().zip(outcomes) {
                    record(cells, &row, column, outcome);
                }
            }
            Err(error) => failures.push(format!("{row}: {error:#}")),
        }
    }
}

fn measure(bench: &Bench, medium: Medium, options: &Options) -> Result<[Outcome; 3]> {
    let server = bench.start(Contender::Ebbtide, &bench.image(medium), medium)?;
    let region = REGION_BYTES.min(options.size_bytes()).to_string();
    let write = |pattern: &str| {
        bench.load(&server, |load| {
            load.args(["--mix", "write", "--depth", "32", "--length", &region]);
            load.args(["--pattern", pattern]);
            if pattern == "once" {
                load.args(["--requests", &u64::MAX.to_string()]);
            } else {
                load.args(["--seconds", &options.seconds().to_string()]);
            }
        })
    };
    let without = write("random")?;
    bench.ask_ebbtide(&["snapshot", "create", "bench"])?;
    let first = write("once")?;
    let after = write("random")?;
    bench.ask_ebbtide(&["snapshot", "delete", "bench"])?;
    server.stop()?;
    Ok([without, first, after])
}
