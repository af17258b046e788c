//! A summary of the change map, to be drawn.

use serde::{Deserialize, Serialize};

use super::Command;

/// Newest epochs that a summary tells apart.
pub const RECENT: usize = 8;

/// Asks how recently, and how much, each part of a disk has changed, up to now.
///
/// Answered from the live change map in some milliseconds, whatever the size of the disk; guests notice nothing.
/// It is for pictures: for backups ask [`QueryChangedBlocks`](super::QueryChangedBlocks).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct QueryChangeMap {
    /// The disk's name.
    pub disk: String,
    /// Parts of equal size that the disk is cut into, at most: whole blocks each.
    #[serde(default)]
    pub cells: CellCount,
    /// An older instant, as a change id or the name of a snapshot or a checkpoint: `blocks-since` counts what changed after it. When
    /// absent, the newest instant after which anything changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

impl Command for QueryChangeMap {
    const NAME: &'static str = "query-change-map";
    type Answer = ChangeMap;
}

/// How many cells a summary has at most: 1 to 16384, 1024 when absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u64", try_from = "u64")]
pub struct CellCount(u16);

impl CellCount {
    /// The most.
    pub const MAX: Self = Self(16_384);

    /// `count`, or the nearest that is allowed.
    pub fn near(count: usize) -> Self {
        Self(u16::try_from(count).unwrap_or(u16::MAX).clamp(1, Self::MAX.0))
    }

    /// As a number.
    pub fn get(self) -> u64 {
        self.0.into()
    }
}

impl Default for CellCount {
    fn default() -> Self {
        Self(1_024)
    }
}

impl From<CellCount> for u64 {
    fn from(count: CellCount) -> Self {
        count.get()
    }
}

impl TryFrom<u64> for CellCount {
    type Error = CellCountError;

    fn try_from(cells: u64) -> Result<Self, CellCountError> {
        match u16::try_from(cells) {
            Ok(count) if (1..=Self::MAX.0).contains(&count) => Ok(Self(count)),
            _ => Err(CellCountError(cells)),
        }
    }
}

/// A summary of no cells, or of too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not between 1 and 16384")]
pub struct CellCountError(u64);

/// A summary of the change map.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangeMap {
    /// The disk's name.
    pub disk: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes of a tracked block.
    pub block_size: u64,
    /// The last instant that was taken; what changed since then is in the current epoch.
    pub change_id: String,
    /// The current epoch. A block of epoch *e* changed last between the instants *e* - 1 and *e*.
    pub epoch: u64,
    /// The instant after which `blocks-since` counts, as a change id.
    pub since: String,
    /// How many cells there are.
    pub cells: u64,
    /// Bytes of a cell; the last one may have fewer.
    pub cell_size: u64,
    /// Snapshots of this generation that are held, oldest first.
    pub snapshots: Vec<MapInstant>,
    /// The cells in which something has changed, in order.
    pub changed: Vec<ChangedCell>,
    /// Whether every page of the map was looked at. If not, the numbers of blocks are estimates.
    pub exact: bool,
}

/// A snapshot as a point in the history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MapInstant {
    /// Its name.
    pub name: String,
    /// The last epoch that it includes.
    pub epoch: u64,
}

/// A part of the disk in which something has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangedCell {
    /// Which; the first is 0.
    pub cell: u64,
    /// The newest epoch of its blocks.
    pub newest: u64,
    /// Blocks that have changed in the generation.
    pub blocks: u64,
    /// Blocks that have changed after the instant `since`.
    pub blocks_since: u64,
    /// Blocks that changed last in the current epoch, in the one before it, and so on: eight numbers.
    pub recent: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_answer_fits_a_line() {
        let cell = ChangedCell {
            cell: 16_383,
            newest: u32::MAX.into(),
            blocks: 1 << 40,
            blocks_since: 1 << 40,
            recent: vec![1 << 40; RECENT],
        };
        let bytes = serde_json::to_string(&cell).unwrap().len() + 1;
        assert!(bytes * usize::from(CellCount::MAX.0) + 65_536 < crate::wire::MAX_ANSWER_BYTES);
    }

    #[test]
    fn counts_have_bounds() {
        assert!(CellCount::try_from(0).is_err() && CellCount::try_from(16_385).is_err());
        assert_eq!(CellCount::try_from(16_384).unwrap(), CellCount::MAX);
        assert_eq!((CellCount::near(0).get(), CellCount::near(1 << 30).get()), (1, 16_384));
    }
}
