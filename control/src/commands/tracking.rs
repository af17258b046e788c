//! What an operator tells a disk's tracker.

use serde::{Deserialize, Serialize};

use super::checks::bad_argument;
use super::{Command, Nothing, Timestamp};
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

/// Begins a new generation, while the disk is served: the next backup is a full one. For when the tracker or a
/// chain of backups is not to be trusted.
///
/// Change ids and checkpoints of the generation that ends are refused from then on, with the reason `operator`.
/// Refused while snapshots are held, or a rewind or a resize is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrackerReset {
    /// The disk's name.
    pub disk: String,
}

impl Command for TrackerReset {
    const NAME: &'static str = "tracker-reset";
    type Answer = TrackerDetails;
}

/// Tracks the changes of a disk again, from now on, while it is served: the next backup is a full one.
///
/// A new generation begins, with the reason `tracking-enabled`; guests' writes wait for a flush of the image. Refused if
/// changes are tracked already, on a read-only disk, or while a rewind or a resize is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrackerEnable {
    /// The disk's name.
    pub disk: String,
}

impl Command for TrackerEnable {
    const NAME: &'static str = "tracker-enable";
    type Answer = TrackerDetails;
}

/// Tracks the changes of a disk no more, also after a restart, until [`TrackerEnable`]: guests' writes cost no marks.
///
/// The generation ends, with the reason `tracking-disabled`. Snapshots stay, and can be taken, but answer
/// no changes. Refused as that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct TrackerDisable {
    /// The disk's name.
    pub disk: String,
}

impl Command for TrackerDisable {
    const NAME: &'static str = "tracker-disable";
    type Answer = TrackerDetails;
}

/// Asks how the trackers of one disk or of all are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryTracker {
    /// The disk's name; all disks if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

impl Command for QueryTracker {
    const NAME: &'static str = "query-tracker";
    type Answer = Vec<TrackerDetails>;
}

/// How the tracker of a disk is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TrackerDetails {
    /// The disk's name.
    pub disk: String,
    /// Whether changes are recorded.
    pub on: bool,
    /// The UUID of the unbroken history that now runs.
    pub generation: String,
    /// The epoch that writes are now marked with.
    pub epoch: u64,
    /// The last completed epoch as a change id, `GENERATION/EPOCH`.
    pub change_id: String,
    /// Unit of tracking in bytes; 0 if changes are not recorded.
    pub block_size: u64,
    /// Capacity of the disk in bytes.
    pub size: u64,
    /// Bytes that the change map takes in the state directory.
    pub map_bytes: u64,
    /// Bytes of a region of the intent log.
    pub region_size: u64,
    /// Regions in which marks may not be on their medium yet.
    pub hot_regions: u64,
    /// Bytes that would count as changed if the host stopped now.
    pub presumed_bytes: u64,
    /// A stop of the host now may lose changes and nobody would notice: make a full backup, or restart the
    /// daemon.
    pub at_risk: bool,
    /// If the host stops before a new start of the daemon after a reboot, the generation ends, and the next
    /// backup must be a full one.
    pub ends_with_host: bool,
    /// When the generation began, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<Timestamp>,
    /// Why it began, as a stable code (`tracking-disabled` if an operator switched tracking off); `kept` if that is not known, for its superblock was of an older version.
    pub reason: String,
    /// Checkpoints of the disk.
    pub checkpoints: u32,
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
