//! Importing a history, before a daemon serves the disk here.
//!
//! Invariant: a superblock that names the imported generation is written when the whole map is durable, and
//! the map is never changed under a superblock of another valid generation. Order and crash argument: see the
//! parent.

use std::sync::Arc;

use cbt::{BlockGrid, ByteRange, ChangeId};

use super::Moved;
use super::file::{Chunk, Decoder, Head, Reader, bad};
use crate::away::sample::SAMPLE_FILE;
use crate::error::Error;
use crate::format::{DiskState, MAP_FILE, PAGE, SUPERBLOCK_FILE, Superblock};
use crate::intent::INTENT_FILE;
use crate::open::{bytes_of, cells_of, read_superblock, sequences, write_superblock};
use crate::overlay;
use crate::rewind::{self, HEAD_FILE as REWIND_FILE, NO_REWIND};
use crate::sample;
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::tracker::{Identity, Tracker};

/// Places that may differ and still be named.
const NAMED: usize = 3;

/// A disk that has arrived.
pub struct Arrival<'a, S: Storage> {
    /// The history file.
    pub file: &'a S::File,
    /// The image, opened and locked.
    pub image: &'a S::File,
    /// The image's absolute path, as people know it.
    pub image_path: String,
    /// What tells the image from others, now.
    pub identity: Identity,
    /// The state directory, which exists and nobody else uses.
    pub dir: &'a S::Dir,
    /// The host's boot.
    pub boot: [u8; 16],
    /// A history that is there already may be given up, with its snapshots.
    pub replace: bool,
}

/// Imports a history: the next opening of the disk goes on with it. Durable when it answers.
///
/// # Errors
/// [`Error::BadHistory`] if the file is damaged, [`Error::ImageDiffers`] if the image is not what it was at the
/// export, [`Error::HistoryExists`], [`Error::ForeignState`], [`Error::NotMovable`]: then nothing is changed. Those
/// of the files: then either the same, or there is no history any more.
pub async fn import<S: Storage>(io: &S, arrival: &Arrival<'_, S>) -> Result<Moved, Error> {
    // It may have been copied a moment ago. What was flushed is compared, and what a power cut would take back is not.
    io.sync(arrival.image).await.map_err(Error::io("flushing the image"))?;
    let head = check_file(io, arrival).await?;
    let names = io.list(arrival.dir).map_err(Error::io("reading the state directory"))?;
    let old = Old::look(io, arrival, &names).await?;
    let next = Superblock {
        sequence: old.sequence + 1,
        disk: old.disk.unwrap_or_else(|| uuid::Uuid::new_v4().into_bytes()),
        generation: head.generation,
        boot: arrival.boot,
        state: DiskState::Clean,
        epoch: head.epoch,
        block_bytes: head.grid.bytes(),
        capacity: head.capacity,
        identity: arrival.identity,
        rewind: NO_REWIND,
        path: arrival.image_path.clone(),
        growing_to: None,
        began_ns: 0,
        began_reason: 0,
        switched_off: false,
    };
    let next = end_old(io, arrival, old.superblock.as_ref(), next).await?;
    remove_old(io, arrival.dir, &names)?;
    if let Err(error) = fill_map(io, arrival, &head).await {
        let _ = io.remove(arrival.dir, MAP_FILE);
        return Err(error);
    }
    let fail = || Error::io("making the superblock");
    // The map's name, and that nothing of an older history is there any more.
    io.sync_dir(arrival.dir).map_err(fail())?;
    let superblock = match old.superblock {
        Some(file) => file,
        None => io.create(arrival.dir, SUPERBLOCK_FILE).map_err(fail())?,
    };
    write_superblock(io, &superblock, &next).await?;
    io.sync_dir(arrival.dir).map_err(fail())?;
    Ok(Moved {
        change_id: ChangeId { generation: head.generation, epoch: head.epoch.previous() },
        capacity: head.capacity,
        grid: head.grid,
        changed_blocks: head.marked,
        file_bytes: head.body_bytes + PAGE as u64,
        image_path: head.path,
        snapshots: Vec::new(),
    })
}

/// Reads the whole file, and compares the image with it.
async fn check_file<S: Storage>(io: &S, arrival: &Arrival<'_, S>) -> Result<Head, Error> {
    let mut reader = Reader::begin(io, arrival.file).await?;
    let (then, now) = (reader.head.capacity, arrival.identity.len);
    if then != now {
        return Err(Error::ImageDiffers { why: format!("it has {now} bytes and had {then}") });
    }
    let mut decoder = Decoder::new(&reader.head);
    let (mut sampled, mut differ) = (0, Vec::new());
    while let Some(chunk) = reader.chunk().await? {
        match chunk {
            Chunk::Map(content) => decoder.chunk(&content, |_| {})?,
            Chunk::Sample(places) => {
                for (place, then) in places {
                    sampled += 1;
                    if sample::checksum(io, arrival.image, place).await? != then {
                        differ.push(place.at);
                    }
                }
            }
        }
    }
    if decoder.marked != reader.head.marked {
        return Err(bad("its map has another number of blocks than its head says"));
    }
    if sampled == 0 {
        return Err(bad("it has no sample of the image"));
    }
    if differ.is_empty() {
        return Ok(reader.head);
    }
    let named: Vec<String> = differ.iter().take(NAMED).map(u64::to_string).collect();
    let more = if differ.len() > NAMED { ", …" } else { "" };
    let (count, named) = (differ.len(), named.join(", "));
    Err(Error::ImageDiffers {
        why: format!("{count} of {sampled} sampled places differ, at byte {named}{more}"),
    })
}

/// What is in the state directory already.
struct Old<S: Storage> {
    superblock: Option<S::File>,
    sequence: u64,
    disk: Option<[u8; 16]>,
}

impl<S: Storage> Old<S> {
    /// Looks, and refuses what must not be given up.
    async fn look(io: &S, arrival: &Arrival<'_, S>, names: &[String]) -> Result<Self, Error> {
        let has = |file: &str| names.iter().any(|name| name == file);
        if !has(SUPERBLOCK_FILE) {
            // An import that was cut off leaves a map, and nothing else.
            let left = !sequences(names).is_empty() || has(INTENT_FILE) || has(REWIND_FILE);
            if left && !arrival.replace {
                return Err(Error::HistoryExists);
            }
            return Ok(Self { superblock: None, sequence: 0, disk: None });
        }
        let (file, copies) = read_superblock(io, arrival.dir).await?;
        if !arrival.replace && (copies.newest.is_some() || copies.one_damaged) {
            return Err(Error::HistoryExists);
        }
        if copies.one_damaged && has(REWIND_FILE)
            || copies.newest.as_ref().is_some_and(|old| old.rewind != NO_REWIND)
        {
            let why = "a rewind of the disk is under way here: serve it until that is complete".to_owned();
            return Err(Error::NotMovable { why });
        }
        match copies.newest {
            Some(old) if old.path != arrival.image_path => {
                Err(Error::ForeignState { owner: old.path, image: arrival.image_path.clone() })
            }
            Some(old) => Ok(Self { superblock: Some(file), sequence: old.sequence, disk: Some(old.disk) }),
            // Both copies are written over, so that none that is damaged stays.
            None => Ok(Self { superblock: Some(file), sequence: u64::from(copies.one_damaged), disk: None }),
        }
    }
}

/// Ends the history that is there. What is written is of no image, so nothing that hangs on one is believed.
async fn end_old<S: Storage>(
    io: &S,
    arrival: &Arrival<'_, S>,
    superblock: Option<&S::File>,
    next: Superblock,
) -> Result<Superblock, Error> {
    let Some(file) = superblock.filter(|_| next.sequence > 1) else { return Ok(next) };
    let nobody = Identity { device: 0, inode: 0, len: 0, mtime_ns: 0 };
    let ended = Superblock {
        state: DiskState::Resetting,
        generation: cbt::Generation::random(),
        identity: nobody,
        ..next.clone()
    };
    write_superblock(io, file, &ended).await?;
    io.sync_dir(arrival.dir).map_err(Error::io("flushing the state directory"))?;
    Ok(Superblock { sequence: ended.sequence + 1, ..next })
}

/// Removes what belongs to an older history. The areas of its store stay, and what is in them is given back
/// when the disk is opened.
fn remove_old<S: Storage>(io: &S, dir: &S::Dir, names: &[String]) -> Result<(), Error> {
    for sequence in sequences(names) {
        Snapshot::<S>::remove_file(io, dir, sequence)?;
    }
    for number in overlay::numbers(names) {
        overlay::remove_files(io, dir, number)?;
    }
    rewind::remove_files(io, dir)?;
    for name in [INTENT_FILE, MAP_FILE, SAMPLE_FILE] {
        if names.iter().any(|one| one == name) {
            io.remove(dir, name).map_err(Error::io("removing an older history"))?;
        }
    }
    Ok(())
}

/// Makes the map and fills it, durably. The file is checked again: it is not ours.
async fn fill_map<S: Storage>(io: &S, arrival: &Arrival<'_, S>, checked: &Head) -> Result<(), Error> {
    let fail = || Error::io("making the change map");
    let grid: BlockGrid = checked.grid;
    let cells = cells_of::<S::Cells>(Some(grid), checked.capacity);
    let map = io.create(arrival.dir, MAP_FILE).map_err(fail())?;
    io.allocate(&map, bytes_of(cells)).map_err(fail())?;
    let mapped = Arc::new(io.map(&map, cells).map_err(fail())?);
    let tracker = Tracker::new(mapped.clone(), grid, checked.capacity);
    let mut reader = Reader::begin(io, arrival.file).await?;
    if reader.head != *checked {
        return Err(bad("it was changed while it was read"));
    }
    let mut decoder = Decoder::new(checked);
    while let Some(chunk) = reader.chunk().await? {
        let Chunk::Map(content) = chunk else { continue };
        decoder.chunk(&content, |run| {
            let range: ByteRange = grid.range(run.first..run.end(), checked.capacity);
            tracker.mark(range, run.epoch);
        })?;
    }
    io.sync_cells(&mapped).map_err(Error::io("flushing the change map"))?;
    io.sync(&map).await.map_err(Error::io("flushing the change map"))
}
