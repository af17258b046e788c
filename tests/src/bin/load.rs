//! `load`: sends a load to a vhost-user-blk disk and prints one line of JSON.

use clap::Parser;
use ebbtide_tests::load::{Load, run};

/// Sends a load to a vhost-user-blk disk and prints one line of JSON: IOPS, latencies, server CPU.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    load: Load,
}

fn main() -> anyhow::Result<()> {
    let outcome = run(&Cli::parse().load)?;
    println!("{}", serde_json::to_string(&outcome)?);
    anyhow::ensure!(outcome.errors == 0, "{} requests failed", outcome.errors);
    Ok(())
}
