//! The superblock's file: its two copies read and written, and the superblock that an opening serves under.
//!
//! Invariant: a copy is on the medium before the other one is written over; once there are two, one of them is whole
//! after any stop.
//!
//! Absent: what a superblock is believed to say; see `verdict`.

use cbt::{BlockGrid, Epoch, Generation};

use super::{DiskOptions, ResetReason};
use crate::disk::now_ns;
use crate::error::Error;
use crate::format::{DiskState, PAGE, SUPERBLOCK_FILE, Superblock};
use crate::memory::{Source, Target};
use crate::rewind::NO_REWIND;
use crate::storage::Storage;

/// The copies of a superblock that were found.
#[derive(Default)]
pub(crate) struct Copies {
    pub(crate) newest: Option<Superblock>,
    /// One is neither valid nor unused: it may have been the newer one, which knew of later epochs.
    pub(crate) one_damaged: bool,
}

impl Copies {
    /// What the pages of the file say; zeros for one that is not there.
    pub(crate) fn of(pages: &[[u8; PAGE]; 2]) -> Self {
        let valid: Vec<Superblock> = pages.iter().filter_map(|page| Superblock::from_page(page)).collect();
        let unused = pages.iter().filter(|page| page.iter().all(|&byte| byte == 0)).count();
        let newest = valid.iter().max_by_key(|copy| copy.sequence).cloned();
        // Once there was a second copy there always are two.
        let both_used = newest.as_ref().is_some_and(|newest| newest.sequence > 1);
        let one_damaged = valid.len() + unused < 2 || both_used && valid.len() < 2;
        Self { newest, one_damaged }
    }
}

/// Opens or makes the superblock's file and reads the newest valid copy.
pub(super) async fn open_superblock<S: Storage>(
    io: &S,
    options: &DiskOptions<S>,
    existed: bool,
) -> Result<(S::File, Copies), Error> {
    let fail = || Error::io("opening the superblock");
    if !existed {
        return Ok((io.create(&options.dir, SUPERBLOCK_FILE).map_err(fail())?, Copies::default()));
    }
    read_superblock(io, &options.dir).await
}

/// Opens the superblock's file, which is there, and reads its copies.
pub(crate) async fn read_superblock<S: Storage>(io: &S, dir: &S::Dir) -> Result<(S::File, Copies), Error> {
    let fail = || Error::io("opening the superblock");
    let file = io.open(dir, SUPERBLOCK_FILE).map_err(fail())?;
    // A killed process may have written a copy and not flushed it: the other one stays until it is on the medium, or
    // a stop of the host could tear both.
    io.sync(&file).await.map_err(fail())?;
    let len = io.len(&file).map_err(fail())?;
    let mut pages = [[0; PAGE]; 2];
    for (page, at) in pages.iter_mut().zip([0, PAGE as u64]) {
        // Of one that is cut off what is there: it may be whole again once the file is longer, and then be
        // newer than what was written meanwhile.
        let there = usize::try_from(len.saturating_sub(at)).unwrap_or(PAGE).min(PAGE);
        if there > 0 {
            io.read(&file, at, Target::of(&mut page[..there])).await.map_err(fail())?;
        }
    }
    Ok((file, Copies::of(&pages)))
}

/// Writes a superblock over the older of the two copies, durably.
pub(crate) async fn write_superblock<S: Storage>(
    io: &S,
    file: &S::File,
    superblock: &Superblock,
) -> Result<(), Error> {
    let at = superblock.sequence % 2 * PAGE as u64;
    let page = superblock.to_page();
    let fail = || Error::io("writing the superblock");
    io.write(file, at, Source::of(&page[..])).await.map_err(fail())?;
    io.sync(file).await.map_err(fail())
}

/// The superblock to serve under.
pub(super) fn next_superblock<S: Storage>(
    found: Option<&Superblock>,
    options: &DiskOptions<S>,
    capacity: u64,
    reset: Option<&ResetReason>,
) -> Superblock {
    let block_bytes = options.tracking.map_or(0, BlockGrid::bytes);
    let (sequence, disk) = match found {
        Some(found) => (found.sequence + 1, found.disk),
        None => (1, uuid::Uuid::new_v4().into_bytes()),
    };
    let (generation, epoch) = match found {
        Some(found) if reset.is_none() => (found.generation, found.epoch),
        _ => (Generation::random(), Epoch::FIRST),
    };
    let (began_reason, began_ns) = match (reset, found) {
        (Some(reason), _) => (reason.number(), now_ns()),
        (None, found) => found.map_or((0, 0), |found| (found.began_reason, found.began_ns)),
    };
    Superblock {
        sequence,
        disk,
        generation,
        boot: options.boot,
        state: DiskState::Serving,
        epoch,
        block_bytes,
        capacity,
        identity: options.identity,
        rewind: NO_REWIND,
        path: options.image_path.clone(),
        growing_to: Some(options.identity.len).filter(|&len| len > capacity),
        began_ns,
        began_reason,
        // The operator's word, until the operator takes it back.
        switched_off: found.is_some_and(|found| found.switched_off),
    }
}

/// The disk's size to begin with: the image's length, but for one that a resize had begun to make longer.
pub(super) fn capacity_of(found: Option<&Superblock>, image_len: u64) -> u64 {
    let growing = found.filter(|found| found.growing_to == Some(image_len));
    growing.map_or(image_len, |found| found.capacity)
}
