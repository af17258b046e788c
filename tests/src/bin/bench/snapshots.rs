//! What snapshots cost: guests' writes, their creation, reading them, memory.
//!
//! Always: a row that fails is reported and costs no other row. Absent: whether what a snapshot shows is
//! right; the suites judge that.

mod creation;
mod footprint;
mod held;
mod reading;
pub(crate) mod touch;

use anyhow::Result;

use crate::contender::{Bench, Contender};
use crate::machine::Medium;
use crate::{Options, Results};

const MEDIA: [Medium; 2] = [Medium::Disk, Medium::Shm];

/// What takes part in the interleaved rounds.
pub(crate) fn round(bench: &Bench, options: &Options, round: usize, results: &mut Results) {
    touch::round(bench, options, round, results);
}

/// What has rounds or pairs of its own.
pub(crate) fn rest(bench: &Bench, options: &Options, results: &mut Results) {
    if !options.wants(Contender::Ebbtide) {
        return;
    }
    for medium in MEDIA {
        attempt(options, results, &held::row(medium), |row, results| {
            held::measure(bench, options, row, medium, results)
        });
    }
    for disk in creation::DISKS {
        attempt(options, results, disk.row, |row, results| {
            creation::measure(bench, options, row, disk, results)
        });
    }
    for view in reading::views() {
        attempt(options, results, &view.row(), |row, results| {
            reading::measure(bench, options, row, view, results)
        });
    }
    attempt(options, results, footprint::ROW, |row, results| {
        footprint::measure(bench, options, row, results)
    });
}

/// Measures `row` if it is wanted. What it noted before it failed counts.
pub(crate) fn attempt(
    options: &Options,
    results: &mut Results,
    row: &str,
    measure: impl FnOnce(&str, &mut Results) -> Result<()>,
) {
    if !options.wants_row(row) {
        return;
    }
    eprintln!("{row}");
    if let Err(error) = measure(row, results) {
        results.failures.push(format!("{row}: {error:#}"));
    }
}
