//! A simulated host: a medium, a scheduler and faults, all drawn from one seed.
//!
//! The engine runs on it as it is: [`SimStorage`] is a [`Storage`](crate::Storage), and [`Sim`] drives
//! the engine's futures. The same seed and the same calls give the same run, step by step.
//!
//! What it can do:
//! - **Order.** A step runs one ready task or one piece of one operation in flight, chosen at random;
//!   some operations are slow and stay in flight for long. Transfers of an image are made of pieces of
//!   whole sectors in random order with other tasks between, so reads are torn by concurrent writes.
//!   Writes of state files tear at pages of 4096 bytes.
//! - **[`Sim::kill`].** The process ends at any step, also between two calls that do not wait (making
//!   and removing names, syncing the map). The page cache and mapped cells stay; of each operation in
//!   flight the remaining pieces land all, none, or each by chance. The boot stays the same.
//! - **[`Sim::power_cut`].** As above, and then each sector that was not synced is old or new by chance
//!   (sometimes all old or all new), each page of mapped cells what it was or what was synced, a file's
//!   length and time of change old or new, and of the names made and removed since the directory was
//!   synced a random beginning is kept. Another boot begins.
//! - **Faults** by chance, aimed at kinds of operation and of file ([`Rule`]). A write that fails leaves
//!   some of its pieces. A sync that fails leaves sectors that no later sync will write, and if its process
//!   ended before it was told, the next sync fails: both as Linux does.
//!   So does the kernel's own writing back of a page of mapped cells: the page is clean, may leave memory, and the next
//!   flush of that file fails, once.
//! - **Damage** of a state file between two lives ([`Damage`]).
//! - **Defects** of the medium itself ([`Defect`]), to see that a suite notices.
//! - **Deadlock.** When nothing can go on but timers, the run panics: a wake-up was lost.
//!
//! What it cannot do: threads (tasks interleave where they wait; stores to memory are never seen out of
//! order), sectors or 512-byte parts of cells that tear within, a lying disk that forgets what it synced,
//! short transfers (they are resumed below the seam), clocks that stand still or jump (a step takes a
//! millisecond, some time passes between lives, and every change of an image but a hidden one has a later time
//! than the one before), and files changed behind the engine while it runs.

#![forbid(unsafe_code)]

mod executor;
mod files;
mod medium;
mod random;
mod storage;
mod world;

pub use executor::Sim;
pub use files::SimFiles;
pub use random::Random;
pub use storage::{SimCells, SimDir, SimFile, SimStorage};
pub use world::{Damage, Defect, OpKind, Rule};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A guest's data.
    Image,
    /// The engine's own.
    State,
}
