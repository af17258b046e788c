//! Reading a snapshot over NBD with `nbdcopy`, beside `qemu-nbd` on the plain image.
//!
//! The view is copied when it is fresh, so that all of it comes from the image, and when a fifth of its
//! grains, evenly spread, were overwritten since, so that it is as patchy as views become.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use ebbtide_tests::server::{Server, output_of};

use super::MEDIA;
use crate::contender::{Bench, CLIENT_CPU, Contender, SERVER_CPU};
use crate::findings::Goal;
use crate::launch::{Setup, text};
use crate::machine::Medium;
use crate::subject::Subject;
use crate::{Options, Results};

/// Far more than a copy of the file takes.
const PATIENCE: Duration = Duration::from_secs(60);

const GRAIN_BYTES: u64 = 4 << 10;

/// From one grain that was overwritten to the next.
const PATCH_BYTES: u64 = 5 * GRAIN_BYTES;

/// A view to copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View {
    medium: Medium,
    /// Whether parts of it were overwritten since.
    patchy: bool,
}

impl View {
    pub(crate) fn row(self) -> String {
        let patchy = if self.patchy { "-patchy" } else { "" };
        format!("{}/snapshot-nbdcopy{patchy}", self.medium.name())
    }
}

pub(crate) fn views() -> impl Iterator<Item = View> {
    MEDIA.into_iter().flat_map(|medium| [false, true].map(|patchy| View { medium, patchy }))
}

pub(crate) fn measure(
    bench: &Bench,
    options: &Options,
    row: &str,
    view: View,
    results: &mut Results,
) -> Result<()> {
    let image = bench.image(view.medium);
    for round in 0..options.rounds() {
        eprintln!("round {}: {row}", round + 1);
        let before = of_image(bench, &image, view.medium)?;
        let ours = of_view(bench, options, &image, view)?;
        let after = of_image(bench, &image, view.medium)?;
        // Rates are to be compared, and these are times.
        let theirs = f64::midpoint(before, after);
        let figure = "nbdcopy of the view ÷ from qemu-nbd on the image";
        results.findings.ratio(row, figure, Goal::AtLeast(0.9), Some(theirs), Some(ours));
    }
    Ok(())
}

/// Seconds for the image from `qemu-nbd`.
fn of_image(bench: &Bench, image: &Path, medium: Medium) -> Result<f64> {
    let socket = bench.nbd();
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    command.args(["--read-only", "--format=raw", "--persistent", "--shared=8"]).arg("--socket").arg(&socket);
    // As Ebbtide reads it: not from the page cache. No other setting is faster on a cold file.
    if medium == Medium::Disk {
        command.args(["--cache=none", "--aio=io_uring"]);
    }
    command.arg(image);
    let server = Server::start(command, &bench.run("server.log"), &[SERVER_CPU], &[&socket])?;
    let seconds = copy(&format!("nbd+unix:///?socket={}", text(&socket)?))?;
    server.stop()?;
    Ok(seconds)
}

/// Seconds for the view from Ebbtide.
fn of_view(bench: &Bench, options: &Options, image: &Path, view: View) -> Result<f64> {
    let mut subject = Subject::start(bench, Setup::plain(Contender::Ebbtide, image, view.medium))?;
    subject.take()?;
    if view.patchy {
        subject.load(|load| {
            load.args(["--mix", "write", "--depth", "32", "--pattern", "once"]);
            load.args(["--stride", &PATCH_BYTES.to_string(), "--requests", &u64::MAX.to_string()]);
        })?;
        subject.expect_preserved(options.size_bytes() / PATCH_BYTES * GRAIN_BYTES)?;
    }
    let nbd = bench.nbd();
    let seconds = copy(&format!("nbd+unix:///vda@{}?socket={}", subject.newest()?, text(&nbd)?))?;
    subject.stop()?;
    Ok(seconds)
}

fn copy(uri: &str) -> Result<f64> {
    let mut command = Command::new("nbdcopy");
    command.args([uri, "null:"]);
    let begin = Instant::now();
    output_of(command, &[CLIENT_CPU], PATIENCE)?;
    Ok(begin.elapsed().as_secs_f64())
}
