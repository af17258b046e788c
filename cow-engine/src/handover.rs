//! A disk moves to another host, and its history goes with it.
//!
//! A *history file* holds everything that the change map knows, and a sample of what the image held at that
//! instant. The state directory that it came from is *handed over* from then on: the image may be changed
//! elsewhere, which this host would never see (a block device on shared storage tells each host its own
//! writes only), and two hosts that went on with one generation would give the same change ids to
//! different contents. So a disk that is opened there again begins a new generation, without its snapshots,
//! unless the operator has said that the file is not used ([`cancel`]).
//!
//! An export of a disk that is still written to would be stale the moment it is made: what is written
//! afterwards is in the image that is copied, and in no map. So it is made of a disk that was closed in order
//! ([`export`]), or of one that no front end is connected to, and which refuses every change from that instant
//! on ([`Disk::hand_over`](crate::Disk::hand_over)).
//!
//! **The export**, of which a stop leaves:
//!
//! | step | a stop after it leaves |
//! |---|---|
//! | 1. the file, without its head, flushed | a file that nobody takes for one, and the disk as it was |
//! | 2. the superblock *handed over*, with the image's identity, flushed | the same, and a disk that is handed over: export again, or cancel |
//! | 3. the file's head, flushed; its name, flushed | the file |
//!
//! Were 3 before 2, a stop in between would leave a file that can be used and a source that goes on.
//!
//! **The import**, of which a stop leaves:
//!
//! | step | a stop after it leaves |
//! |---|---|
//! | 1. the image flushed; the whole file checked, and the image against it | nothing |
//! | 2. an older history, if it is to be replaced, ended: the superblock *resetting*, of no image, flushed | a new generation, without snapshots |
//! | 3. its other files removed | the same; nothing, where there was no history |
//! | 4. the map made, filled, flushed, and its name flushed | the same |
//! | 5. the superblock *clean*, with the image's identity, flushed, and its name flushed | the whole history |
//!
//! Step 5 is one page with a checksum: it is there or it is not, and all that it speaks of was durable before. Were the
//! image not flushed, a power cut could take back parts of a fresh copy under a stamp that vouches for it.
//!
//! Snapshots do not travel. Checkpoints have a place in the file, and will.

mod file;
mod give;
mod take;

use cbt::{BlockGrid, ChangeId};

pub use give::{Left, cancel, export};
pub use take::{Arrival, import};

/// Where a history file goes, or comes from.
pub struct Place<'a, S: crate::Storage> {
    /// Its directory.
    pub dir: &'a S::Dir,
    /// Its name in there.
    pub name: &'a str,
}

impl<S: crate::Storage> Clone for Place<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: crate::Storage> Copy for Place<'_, S> {}

/// A history that was exported or imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The last instant that was taken: what changed since then is what is marked in the current epoch.
    pub change_id: ChangeId,
    /// The disk's size in bytes.
    pub capacity: u64,
    /// The blocks that are tracked.
    pub grid: BlockGrid,
    /// Blocks that have changed in the generation.
    pub changed_blocks: u64,
    /// Bytes of the history file.
    pub file_bytes: u64,
    /// The image's path where the history was exported; the end of it if it is long.
    pub image_path: String,
    /// Names of snapshots that stay behind.
    pub snapshots: Vec<String>,
}
