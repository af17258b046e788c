//! Epochs, generations, and the change ids that backup programs keep.
//!
//! A change id names an instant: "everything up to and including epoch E of generation G".
//! Within one generation the history is complete; across two of them nothing can be said.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// A stretch of time between two instants of one disk. Counts up from 1; never wraps: when the
/// numbers that a cell can hold run out, a new generation begins.
///
/// Analogue: blksnap's `changes_number`, which is one byte and wraps after 255 snapshots.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u32);

impl Epoch {
    /// Before every write of a generation: what a block that never changed holds.
    pub const NEVER: Self = Self(0);
    /// The first epoch in which blocks are marked.
    pub const FIRST: Self = Self(1);
    /// The last epoch of a generation.
    pub const LAST: Self = Self(u32::MAX - 1);

    /// The epoch with this number.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number as cells and change ids hold it.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The next epoch, or `None` after [`Epoch::LAST`].
    pub fn next(self) -> Option<Self> {
        (self < Self::LAST).then(|| Self(self.0 + 1))
    }

    /// The epoch before, at least [`Epoch::NEVER`].
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

/// An unbroken history of a disk. A new one begins wherever completeness cannot be proved.
///
/// Analogue: blksnap's `generation_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(Uuid);

impl Generation {
    /// A fresh, random generation.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The generation with these 16 bytes (RFC 9562 order).
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// Its 16 bytes (RFC 9562 order).
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names an instant of a disk: all writes of `generation` up to and including `epoch`.
///
/// Text form `GENERATION/EPOCH`, for example `6f9619ff-8b86-4011-b42d-00c04fc964ff/7`.
/// The number is decimal and may be read as 64 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChangeId {
    /// The history the instant belongs to.
    pub generation: Generation,
    /// The last epoch that the instant includes.
    pub epoch: Epoch,
}

impl fmt::Display for ChangeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.generation, self.epoch.0)
    }
}

/// A text that is no change id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no change id: expected GENERATION/EPOCH, a UUID and a decimal number")]
pub struct ParseChangeIdError {
    text: String,
}

impl FromStr for ChangeId {
    type Err = ParseChangeIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || ParseChangeIdError { text: text.chars().take(80).collect() };
        let (generation, epoch) = text.split_once('/').ok_or_else(refuse)?;
        let generation = Uuid::try_parse(generation).map_err(|_| refuse())?;
        if !epoch.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refuse());
        }
        let epoch = epoch.parse().map_err(|_| refuse())?;
        Ok(Self { generation: Generation(generation), epoch: Epoch(epoch) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_id_survives_its_text_form() {
        let id = ChangeId { generation: Generation::random(), epoch: Epoch::new(4_000_000_000) };
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn texts_that_are_no_change_ids_are_refused() {
        for text in [
            "",
            "/",
            "x/1",
            "6f9619ff-8b86-4011-b42d-00c04fc964ff",
            "6f9619ff-8b86-4011-b42d-00c04fc964ff/-1",
            "6f9619ff-8b86-4011-b42d-00c04fc964ff/+1",
            "6f9619ff-8b86-4011-b42d-00c04fc964ff/4294967296",
        ] {
            assert!(text.parse::<ChangeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn epochs_end_instead_of_wrapping() {
        assert_eq!(Epoch::LAST.next(), None);
        assert_eq!(Epoch::FIRST.next(), Some(Epoch::new(2)));
    }
}
