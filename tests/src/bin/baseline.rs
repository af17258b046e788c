//! `baseline`: serves a file by the framework `vhost-user-backend`, for comparison only.

use clap::Parser;
use ebbtide_tests::baseline::{Baseline, serve};

/// Serves a file as a vhost-user-blk disk by the framework `vhost-user-backend`: for comparison
/// in benchmarks only, never for data that matters.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    baseline: Baseline,
}

fn main() -> anyhow::Result<()> {
    serve(&Cli::parse().baseline)
}
