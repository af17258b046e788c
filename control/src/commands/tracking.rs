//! What an operator tells a disk's tracker.

use serde::{Deserialize, Serialize};

use super::checks::bad_argument;
use super::{Command, Nothing};
use crate::service::CommandError;

/// Ranges that one call may name.
const MAX_RANGES: usize = 8192;

/// A range to mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MarkRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Marks ranges of a disk as changed, as if the guest had written them with what they hold: after a backup
/// that failed, or a block that did not verify.
///
/// Marks belong to the next instant: the next snapshot's changes have them. What a snapshot that is held
/// answers never changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrackerMark {
    /// The disk's name.
    pub disk: String,
    /// What to mark, rounded out to whole blocks, in any order: 1 to 8192 ranges. One of no bytes marks
    /// nothing.
    pub ranges: Vec<MarkRange>,
}

impl Command for TrackerMark {
    const NAME: &'static str = "tracker-mark";
    type Answer = Nothing;

    fn check(&self) -> Result<(), CommandError> {
        if !(1..=MAX_RANGES).contains(&self.ranges.len()) {
            return Err(bad_argument("ranges", &format!("1 to {MAX_RANGES} ranges in a call")));
        }
        match self.ranges.iter().find(|range| range.offset.checked_add(range.length).is_none()) {
            None => Ok(()),
            Some(range) => {
                let text =
                    format!("ranges on the disk, not {} bytes at offset {}", range.length, range.offset);
                Err(bad_argument("ranges", &text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_names_some_ranges_and_not_too_many() {
        let mark = |count: usize| TrackerMark {
            disk: "vda".to_owned(),
            ranges: vec![MarkRange { offset: 0, length: 1 }; count],
        };
        assert!(mark(1).check().is_ok() && mark(MAX_RANGES).check().is_ok());
        for wrong in [mark(0), mark(MAX_RANGES + 1)] {
            assert!(wrong.check().unwrap_err().desc.contains("8192"));
        }
    }

    #[test]
    fn a_range_that_wraps_is_refused() {
        let range = MarkRange { offset: u64::MAX, length: 1 };
        let mark = TrackerMark { disk: "vda".to_owned(), ranges: vec![range] };
        assert!(mark.check().unwrap_err().desc.contains("18446744073709551615"));
    }
}
