//! `ebbtide check` and `ebbtide dump`: state directories that no daemon uses, looked at without changing
//! them.
//!
//! Exit codes: 0 nothing is wrong, 1 something is or could not be read, 2 the command line is wrong (clap).

use std::fmt::Write as _;
use std::fs::{File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use cow_engine::host::{HostFile, ImageOptions};
use cow_engine::inspect::{Around, Fact, Finding, Grade, HostFiles, Inspection, Value};
use serde_json::{Map, json};

use crate::args::{Check, Dump};
use crate::output;

/// Carries out `ebbtide check`.
pub(crate) fn check(check: &Check) -> ExitCode {
    let mut worst = None;
    let mut failed = false;
    for dir in &check.dirs {
        match findings(dir) {
            Ok(found) => {
                worst = worst.max(found.iter().map(|one| one.grade).max());
                if let Err(error) = output::print(&told(dir, &found, check.json)) {
                    return output::failed(&error);
                }
            }
            Err(error) => {
                failed = true;
                eprintln!("ebbtide: {error:#}");
            }
        }
    }
    if failed || worst == Some(Grade::Wrong) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Carries out `ebbtide dump`.
pub(crate) fn dump(dump: &Dump) -> ExitCode {
    match write_dump(dump) {
        Ok(()) => ExitCode::SUCCESS,
        // A closed pipe is the reader's choice.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ebbtide: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn findings(dir: &Path) -> anyhow::Result<Vec<Finding>> {
    let _held = hold(dir)?;
    let mut inspection = read(&HostFiles::new(dir), dir)?;
    let image = inspection.image_path().and_then(|path| {
        let options = ImageOptions { read_only: true, direct: false, logical_block_bytes: 512 };
        HostFile::open_image(Path::new(path), options).ok()
    });
    let mut around = Around { boot: crate::serve::boot_id().ok(), ..Around::default() };
    if let Some(image) = &image {
        around.image = image.identity().ok();
        if let Ok(meanwhile) = image.meanwhile() {
            (around.boot_began_ns, around.medium) = (meanwhile.boot_began_ns, Some(meanwhile.medium));
        }
        if let Ok(file) = image.as_fd().try_clone_to_owned().map(File::from) {
            inspection.compare_image(|at, out| file.read_exact_at(out, at));
        }
    }
    Ok(inspection.findings(&around))
}

fn write_dump(dump: &Dump) -> anyhow::Result<()> {
    let _held = hold(&dump.dir)?;
    let files = HostFiles::new(&dump.dir);
    let inspection = read(&files, &dump.dir)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let mut show = |fact: &Fact| {
        if dump.json { writeln!(out, "{}", json_of(fact)) } else { write!(out, "{}", text_of(fact)) }
    };
    for fact in inspection.facts() {
        show(&fact)?;
    }
    if dump.records {
        let mut shown = Ok(());
        inspection.records(&files, |fact| {
            if shown.is_ok() {
                shown = show(&fact);
            }
        })?;
        shown?;
    }
    out.flush()?;
    Ok(())
}

fn read(files: &HostFiles, dir: &Path) -> anyhow::Result<Inspection> {
    Inspection::read(files).with_context(|| format!("cannot read the state directory {}", dir.display()))
}

/// Keeps daemons out for as long as the answer is held, without making a file.
fn hold(dir: &Path) -> anyhow::Result<Option<File>> {
    let path = dir.join("lock");
    let fail = || format!("cannot open {}", path.display());
    if !dir.is_dir() {
        bail!("{} is no directory", dir.display());
    }
    if !std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
        return Ok(None);
    }
    let file = File::open(&path).with_context(fail)?;
    match file.try_lock_shared() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => bail!(
            "the state directory {} is in use by a daemon: stop it first, or ask it (ebbtide status)",
            dir.display()
        ),
        Err(TryLockError::Error(error)) => Err(error).with_context(fail),
    }
}

/// What was found in a directory.
fn told(dir: &Path, found: &[Finding], as_json: bool) -> String {
    let mut text = String::new();
    if as_json {
        for one in found {
            let grade = if one.grade == Grade::Wrong { "wrong" } else { "left" };
            let line = json!({
                "directory": dir.display().to_string(), "grade": grade, "code": one.code, "file": one.file,
                "at": one.at, "what": one.what, "opening": one.opening, "lost": one.lost,
            });
            let _ = writeln!(text, "{line}");
        }
        return text;
    }
    let wrong = found.iter().filter(|one| one.grade == Grade::Wrong).count();
    let sum = match wrong {
        0 => "nothing is wrong".to_owned(),
        1 => "1 thing is wrong".to_owned(),
        count => format!("{count} things are wrong"),
    };
    let _ = writeln!(text, "{}: {sum}", dir.display());
    for one in found {
        let at = one.at.map_or(String::new(), |at| format!(" at byte {at}"));
        let mark = if one.grade == Grade::Wrong { "wrong" } else { "left by a stop" };
        let _ =
            writeln!(text, "  {}{at}: {mark}: {} ({})", printable(&one.file), printable(&one.what), one.code);
        let _ = writeln!(text, "    opening: {}", one.opening);
        if !one.lost.is_empty() {
            let _ = writeln!(text, "    lost: {}", printable(&one.lost));
        }
    }
    text
}

fn text_of(fact: &Fact) -> String {
    let mut text = fact.structure.to_owned();
    if !fact.file.is_empty() {
        let _ = write!(text, " in {}", printable(&fact.file));
    }
    // Of records there may be many: a line each.
    let between = if fact.file.is_empty() { " " } else { "\n  " };
    for (name, value) in &fact.fields {
        let value = match value {
            Value::Number(number) => number.to_string(),
            Value::Flag(true) => "yes".to_owned(),
            Value::Flag(false) => "no".to_owned(),
            Value::Text(text) => printable(text),
        };
        let _ = write!(text, "{between}{name}={value}");
    }
    text.push('\n');
    text
}

fn json_of(fact: &Fact) -> serde_json::Value {
    let mut object = Map::new();
    object.insert("structure".into(), fact.structure.into());
    if !fact.file.is_empty() {
        object.insert("file".into(), fact.file.clone().into());
    }
    for (name, value) in &fact.fields {
        let value = match value {
            Value::Number(number) => (*number).into(),
            Value::Flag(flag) => (*flag).into(),
            Value::Text(text) => text.clone().into(),
        };
        object.insert((*name).into(), value);
    }
    object.into()
}

/// A text of the disk on one line, without what would steer a terminal.
fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}
