//! The standard output of commands.
//!
//! What always holds: a command whose output did not go out in full ends with an error. A list of changes that was
//! cut off by a full file system is still a list, and what is missing in it would not be backed up.
//! A closed pipe is the reader's choice, and no error.

use std::io::{ErrorKind, Result, Write};
use std::process::ExitCode;

/// Prints `text`, to the last byte.
///
/// # Errors
/// Those of the standard output.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    unless_closed(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Prints `text` as the end of a command.
pub(crate) fn end_with(text: &str) -> ExitCode {
    match print(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Says that the output is not whole.
pub(crate) fn failed(error: &std::io::Error) -> ExitCode {
    eprintln!("ebbtide: cannot write to the standard output: {error}");
    ExitCode::FAILURE
}

/// What became of a write, if a closed pipe is no error.
fn unless_closed(written: Result<()>) -> Result<()> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
