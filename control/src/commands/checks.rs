//! What names and lists of them must look like, whatever the engine knows.

use std::collections::BTreeSet;

use crate::service::{CommandError, reason};

/// Refuses names that a snapshot cannot have.
///
/// A name has 1 to 128 ASCII letters, digits and `. _ - + :`, and begins with a letter or a
/// digit. So it is never taken for a change id (`/`), never ambiguous in an export's
/// `DISK@SNAPSHOT`, fits NBD's limits, and is safe in file names, URIs and on a terminal.
///
/// # Errors
/// Names `argument`, and says what a name looks like.
pub fn check_name(argument: &str, name: &str) -> Result<(), CommandError> {
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+:".contains(c);
    if starts && name.len() <= 128 && name.chars().all(plain) {
        return Ok(());
    }
    Err(bad_argument(argument, "1 to 128 letters, digits or any of '._-+:', the first a letter or digit"))
}

/// NBD proto.md, "Values": strings have at most 4096 bytes.
pub(super) fn check_nbd_text(argument: &str, text: &str) -> Result<(), CommandError> {
    if text.len() <= 4096 && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(bad_argument(argument, "at most 4096 bytes without control characters"))
}

/// unix(7): an address holds 108 bytes, the last of which ends the path.
pub(super) fn check_socket(argument: &str, path: Option<&str>) -> Result<(), CommandError> {
    let Some(path) = path else { return Ok(()) };
    if (1..108).contains(&path.len()) && path.starts_with('/') && !path.chars().any(char::is_control) {
        return Ok(());
    }
    Err(bad_argument(argument, "an absolute path of at most 107 bytes without control characters"))
}

pub(super) fn check_disks(disks: Option<&[String]>) -> Result<(), CommandError> {
    let Some(disks) = disks else { return Ok(()) };
    let distinct: BTreeSet<_> = disks.iter().collect();
    if !disks.is_empty() && distinct.len() == disks.len() {
        return Ok(());
    }
    Err(bad_argument("disks", "at least one disk, none of them twice; leave it out to mean all"))
}

pub(super) fn bad_argument(argument: &str, expected: &str) -> CommandError {
    CommandError::generic(reason::BAD_ARGUMENT, format!("Parameter '{argument}' expects {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_be_ambiguous_or_unsafe_are_refused() {
        for good in ["s1", "2026-11-22T15:51:12", "a.b_c+d", &"x".repeat(128)] {
            assert_eq!(check_name("name", good), Ok(()), "{good}");
        }
        for bad in ["", "a/1", "a@b", "-x", ".x", "a b", "é", "a\n", &"x".repeat(129)] {
            let error = check_name("name", bad).unwrap_err();
            assert_eq!(error.reason, reason::BAD_ARGUMENT, "{bad}");
        }
    }
}
