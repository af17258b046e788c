//! Looking at a state directory that no daemon uses: what is in it, what is wrong with it, and what
//! opening would make of that.
//!
//! Invariant: nothing is written, whatever the bytes are nothing panics, and memory stays bounded by what
//! the directory takes on its medium. What opening would do is asked of the engine's own judgement
//! (`open` and `format`), not decided a second time.
//! Absent: areas of a store in other places; only their list is looked at. Absent: repair. Opening repairs what can be repaired, and says what it gave up.
//!
//! A structure more is a reader in `read`, a judge in `judge` and its fields in `facts`; those of a rewind
//! and of checkpoints are in `rewind` and `checkpoint`.

mod checkpoint;
mod facts;
mod files;
mod judge;
mod read;
mod rewind;

use std::io;

use crate::away::sample::Found;
use crate::format::GRAIN;
use crate::index::Slot;
use crate::tracker::Identity;

pub use facts::{Fact, Value};
pub use files::{Files, HostFiles};

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// What a stop left: opening tidies it up, and nothing is lost.
    Left,
    /// Something is lost, or is not what it should be.
    Wrong,
}

/// Something that check has to say of a state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub grade: Grade,
    /// A stable code for programs.
    pub code: &'static str,
    /// The file.
    pub file: String,
    /// The byte in it, where one can be named.
    pub at: Option<u64>,
    /// What is wrong.
    pub what: String,
    /// What opening does about it.
    pub opening: String,
    /// What is lost; empty if nothing is.
    pub lost: String,
}

/// What is known of the world around a state directory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around {
    /// The image, if it is there: it is compared with what was stamped.
    pub image: Option<Identity>,
    /// The host's boot, if the directory is looked at on its own host.
    pub boot: Option<[u8; 16]>,
    /// When that began, in nanoseconds since 1970.
    pub boot_began_ns: Option<i64>,
    /// What the image is on; see [`crate::Meanwhile`].
    pub medium: Option<u64>,
}

/// A state directory as it was found.
pub struct Inspection {
    state: read::State,
}

impl Inspection {
    /// Reads everything but the content of slots and overlays.
    ///
    /// # Errors
    /// Those of the files; damage is no error.
    pub fn read(files: &impl Files) -> io::Result<Self> {
        Ok(Self { state: read::State::read(files)? })
    }

    /// The image's path, as the superblock has it; the end of it if it is long.
    pub fn image_path(&self) -> Option<&str> {
        self.state.superblock().map(|superblock| superblock.path.as_str())
    }

    /// Compares what was sampled of the image when the disk was closed with what `read` finds at a byte of it now.
    /// What cannot be read is not compared.
    pub fn compare_image(&mut self, mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) {
        let Found::Sample(sample) = &self.state.sample else { return };
        let mut buffer = [0; GRAIN];
        for (place, then) in sample.places() {
            let bytes = &mut buffer[..(place.len as usize).min(GRAIN)];
            if read(place.at, bytes).is_ok() {
                self.state.differ.compare(place.at, then, crc32c::crc32c(bytes));
            }
        }
    }

    /// What is wrong, in the order in which opening meets it.
    pub fn findings(&self, around: &Around) -> Vec<Finding> {
        judge::findings(&self.state, around)
    }

    /// What is there, structure by structure.
    pub fn facts(&self) -> Vec<Fact> {
        facts::all(&self.state)
    }

    /// Every record of every snapshot whose head can be read, in the order of their places.
    ///
    /// # Errors
    /// Those of the files.
    pub fn records(&self, files: &impl Files, mut each: impl FnMut(Fact)) -> io::Result<()> {
        for index in &self.state.indexes {
            let read::Head::Valid(head) = &index.head else { continue };
            read::each_record(files, &index.file, index.len, head, |place, record| {
                each(facts::record(head.sequence, place, record));
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Bytes of the store up to the end of a slot.
fn end_of(slot: Slot) -> u64 {
    match slot {
        Slot::Zero => 0,
        Slot::At(slot) => crate::store::bytes(slot) + GRAIN as u64,
    }
}

#[cfg(test)]
mod tests;
