//! What changed between two instants, in pages.

use serde::{Deserialize, Serialize};

use super::Command;
use super::checks::bad_argument;
use crate::service::CommandError;

/// Asks what changed between an older instant and a snapshot or a checkpoint.
///
/// An answer, once given, is given again for as long as the younger end is there, from any offset. Answers come
/// in pages. For whole backups read the export's `qemu:dirty-bitmap:` context
/// over NBD instead: it is made for bulk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryChangedBlocks {
    /// The disk's name.
    pub disk: String,
    /// The older instant: a change id `GENERATION/EPOCH`, or the name of an older snapshot or a checkpoint of
    /// the disk. Names contain no `/`; see [`since`](Self::since).
    pub since: String,
    /// The snapshot that holds the younger instant; or else `until`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The younger instant: the name of a snapshot that is held or of a checkpoint, or the change id of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// First byte of interest; 0 when absent. To go on, the previous page's `next-offset`.
    #[serde(default)]
    pub offset: u64,
    /// How many ranges the page has at most.
    #[serde(default)]
    pub limit: PageLimit,
}

/// The older instant of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since<'a> {
    /// A text meant as a change id, not yet parsed.
    ChangeId(&'a str),
    /// The name of a snapshot or a checkpoint.
    Name(&'a str),
}

impl QueryChangedBlocks {
    /// What kind of text `since` is.
    pub fn since(&self) -> Since<'_> {
        if self.since.contains('/') { Since::ChangeId(&self.since) } else { Since::Name(&self.since) }
    }
}

impl Command for QueryChangedBlocks {
    const NAME: &'static str = "query-changed-blocks";
    type Answer = ChangedBlocks;

    fn check(&self) -> Result<(), CommandError> {
        match (&self.snapshot, &self.until) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            (None, None) => Err(CommandError::generic(
                crate::service::reason::MISSING_ARGUMENT,
                "Parameter 'until' is missing",
            )),
            (Some(_), Some(_)) => Err(bad_argument("until", "not to be there beside 'snapshot'")),
        }
    }
}

/// How many ranges a page has at most: 1 to 65536, 1024 when absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u64", try_from = "u64")]
pub struct PageLimit(u32);

impl PageLimit {
    /// The largest page. About 3 MB of JSON, well below what clients read in one line.
    pub const MAX: Self = Self(65_536);

    /// The limit as a number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl Default for PageLimit {
    fn default() -> Self {
        Self(1_024)
    }
}

impl From<PageLimit> for u64 {
    fn from(limit: PageLimit) -> Self {
        limit.0.into()
    }
}

impl TryFrom<u64> for PageLimit {
    type Error = PageLimitError;

    fn try_from(ranges: u64) -> Result<Self, PageLimitError> {
        match u32::try_from(ranges) {
            Ok(limit) if (1..=Self::MAX.0).contains(&limit) => Ok(Self(limit)),
            _ => Err(PageLimitError(ranges)),
        }
    }
}

/// A page of no ranges, or of too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not between 1 and 65536")]
pub struct PageLimitError(u64);

/// A page of changed ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedBlocks {
    /// The disk's name.
    pub disk: String,
    /// The younger end's name: that of a snapshot, or of a checkpoint.
    pub snapshot: String,
    /// The older instant as a change id, however it was asked for.
    pub since: String,
    /// The younger end's change id: the `since` of the next backup.
    pub until: String,
    /// Size of the disk at the younger instant, in bytes.
    pub size: u64,
    /// Unit of tracking in bytes: ranges begin and end at multiples of it, except where the
    /// `offset` asked for or the end of the disk cuts one.
    pub block_size: u64,
    /// What changed, in ascending order, no two touching; some of it may have been written with
    /// the content it had.
    pub ranges: Vec<ChangedRange>,
    /// Where the next page begins; null when this is the last.
    pub next_offset: Option<u64>,
}

/// A range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedRange {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_id_is_told_from_a_name_by_its_slash() {
        let query = |since: &str| QueryChangedBlocks { since: since.to_owned(), ..Default::default() };
        assert_eq!(query("g/7").since(), Since::ChangeId("g/7"));
        assert_eq!(query("s1").since(), Since::Name("s1"));
    }

    #[test]
    fn there_is_one_younger_end() {
        let query = |snapshot: Option<&str>, until: Option<&str>| QueryChangedBlocks {
            snapshot: snapshot.map(str::to_owned),
            until: until.map(str::to_owned),
            ..Default::default()
        };
        assert_eq!(query(Some("s"), None).check(), Ok(()));
        assert_eq!(query(None, Some("c")).check(), Ok(()));
        assert_eq!(query(None, None).check().unwrap_err().reason, "missing-argument");
        assert_eq!(query(Some("s"), Some("c")).check().unwrap_err().reason, "bad-argument");
    }

    #[test]
    fn the_wire_is_kebab_case_and_the_last_page_says_null() {
        let page = ChangedBlocks {
            disk: "vda".to_owned(),
            snapshot: "s2".to_owned(),
            since: "g/1".to_owned(),
            until: "g/2".to_owned(),
            size: 1 << 30,
            block_size: 65_536,
            ranges: vec![ChangedRange { offset: 0, length: 65_536 }],
            next_offset: None,
        };
        let expected = r#"{"disk":"vda","snapshot":"s2","since":"g/1","until":"g/2","size":1073741824,"block-size":65536,"ranges":[{"offset":0,"length":65536}],"next-offset":null}"#;
        assert_eq!(serde_json::to_string(&page).unwrap(), expected);
    }

    #[test]
    fn a_full_page_of_far_away_ranges_fits_a_line() {
        let range = ChangedRange { offset: u64::MAX, length: u64::MAX };
        let length = serde_json::to_string(&range).unwrap().len() + 1;
        let page = length * PageLimit::MAX.get() as usize;
        assert!(page + 4096 < crate::wire::MAX_ANSWER_BYTES);
    }
}
