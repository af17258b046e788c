//! Exporting a history: from a state directory that no daemon uses, and from a disk that is being served.
//!
//! Invariant: from the instant of an export on no change is made by this host, unless a new generation has
//! begun or the operator has taken the export back. Order and crash argument: see the parent.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use cbt::{BlockGrid, CELLS_PER_PAGE, ChangeId, Epoch, PAGE_BYTES};

use super::file::{Encoder, Head, Kind, Run, Writer};
use super::{Moved, Place};
use crate::away::Closed;
use crate::away::sample::SAMPLE_FILE;
use crate::disk::{Disk, now_ns};
use crate::error::Error;
use crate::format::{DiskState, MAP_FILE, SUPERBLOCK_FILE, Superblock};
use crate::group::Admin;
use crate::open::{self, bytes_of, cells_of, is_proved, read_superblock, write_superblock};
use crate::rewind::NO_REWIND;
use crate::sample::{self, Numbers};
use crate::storage::Storage;
use crate::tracker::{Identity, Tracker};
use crate::walk;

/// Grains of the image that are sampled, one of each of as many equal parts.
const SPREAD: u64 = 1024;
/// Blocks that are sampled among those that changed last: a guest that goes on changes them again first.
const NEWEST: usize = 512;
/// Bytes of such a block that are looked at, from its beginning.
const NEWEST_BYTES: u64 = 64 << 10;

/// A state directory that no daemon uses, and its image, which nobody else writes.
pub struct Left<'a, S: Storage> {
    /// The state directory.
    pub dir: &'a S::Dir,
    /// The image, opened and locked.
    pub image: &'a S::File,
    /// What tells the image from others, now.
    pub identity: Identity,
    /// The host's boot.
    pub boot: [u8; 16],
}

fn refuse(why: impl Into<String>) -> Error {
    Error::NotMovable { why: why.into() }
}

/// Exports the history of a disk that was closed in order, and hands the disk over.
///
/// The same may be done again, with another file: nothing has changed meanwhile.
///
/// # Errors
/// [`Error::NotMovable`] if the history cannot be proved to be that of the image; those of the files, `AlreadyExists`
/// if there is a file of that name. If the disk is handed over by then, the error says so.
pub async fn export<S: Storage>(io: &S, left: &Left<'_, S>, to: Place<'_, S>) -> Result<Moved, Error> {
    let names = io.list(left.dir).map_err(Error::io("reading the state directory"))?;
    let (superblock_file, found) = newest(io, left.dir, &names).await?;
    check_left(&found, left)?;
    let grid =
        BlockGrid::new(found.block_bytes).map_err(|_| refuse("changes of the disk are not tracked"))?;
    if found.switched_off {
        return Err(refuse("tracking of the disk is switched off"));
    }
    let cells = cells_of::<S::Cells>(Some(grid), found.capacity);
    if !names.iter().any(|name| name == MAP_FILE) {
        return Err(refuse("its change map is missing"));
    }
    let map = io.open(left.dir, MAP_FILE).map_err(Error::io("opening the change map"))?;
    // It may be longer, of a disk that was larger.
    if io.len(&map).map_err(Error::io("opening the change map"))? < bytes_of(cells) {
        return Err(refuse("its change map is shorter than the disk needs"));
    }
    let map_and_len = Some((&map, bytes_of(cells)));
    let (dir, image) = (left.dir, left.image);
    let closed = Closed { dir, image, names: &names, found: &found, map: map_and_len, medium: None };
    if let Some(doubt) = closed.compare(io).await? {
        return Err(refuse(doubt.what));
    }
    let mapped = io.map(&map, cells).map_err(Error::io("mapping the change map"))?;
    let tracker = Tracker::new(std::sync::Arc::new(mapped), grid, found.capacity);
    let snapshots = open::names_of_snapshots(io, left.dir, &found.disk, &names).await;
    let source = Source { map: &map, tracker: &tracker, image: left.image };
    let instant = Instant { superblock: &found, identity: left.identity };
    let file = io.create(to.dir, to.name).map_err(Error::io("making the history file"))?;
    let written = async {
        let (writer, head) = write_body(io, &source, &instant, &file).await?;
        let mut next = found.clone();
        (next.sequence, next.state) = (found.sequence + 1, DiskState::HandedOver);
        write_superblock(io, &superblock_file, &next).await?;
        Ok((writer, head))
    };
    let (writer, head) = match written.await {
        Ok(written) => written,
        Err(error) => {
            let _ = io.remove(to.dir, to.name);
            return Err(error);
        }
    };
    seal(io, &writer, &head, to).await?;
    Ok(moved(&head, snapshots))
}

/// Takes an export back: the history file must not be used, and the disk goes on as if it had not been made.
///
/// # Errors
/// [`Error::NotMovable`] if the disk is not handed over; those of the files.
pub async fn cancel<S: Storage>(io: &S, dir: &S::Dir) -> Result<(), Error> {
    let names = io.list(dir).map_err(Error::io("reading the state directory"))?;
    let (file, found) = newest(io, dir, &names).await?;
    if found.state != DiskState::HandedOver {
        return Err(refuse("its history is not handed over"));
    }
    // One that was served and not closed since has stores and indexes in the page cache only: a stop of the host ends it.
    let is_closed = names.iter().any(|name| name == SAMPLE_FILE);
    let state = if is_closed { DiskState::Clean } else { DiskState::Doubtful };
    let sequence = found.sequence + 1;
    // With the identity of that instant: the next start sees whether the image was changed since.
    write_superblock(io, &file, &Superblock { sequence, state, ..found }).await
}

async fn newest<S: Storage>(io: &S, dir: &S::Dir, names: &[String]) -> Result<(S::File, Superblock), Error> {
    if !names.iter().any(|name| name == SUPERBLOCK_FILE) {
        return Err(refuse("it is no state directory: it has no superblock"));
    }
    let (file, copies) = read_superblock(io, dir).await?;
    match copies.newest {
        Some(found) if !copies.one_damaged => Ok((file, found)),
        _ => Err(refuse("its superblock is damaged")),
    }
}

/// Refuses a history that cannot be proved to be that of the image as it is.
fn check_left<S: Storage>(found: &Superblock, left: &Left<'_, S>) -> Result<(), Error> {
    match found.state {
        DiskState::Clean | DiskState::HandedOver => {}
        DiskState::Doubtful => {
            return Err(refuse(
                "it counts as closed until the host stops only: serve it once more, and stop the daemon; if that changes nothing, a flush of its change map had failed, and a full backup is needed",
            ));
        }
        _ => return Err(refuse("the disk was not closed in order: serve it once more, and stop the daemon")),
    }
    if !is_proved(found, &left.identity, &left.boot) || found.capacity != left.identity.len {
        return Err(refuse("the image was changed or replaced since the disk was closed"));
    }
    if found.growing_to.is_some() {
        return Err(refuse("a resize is not finished: serve the disk once more, and stop the daemon"));
    }
    if found.rewind != NO_REWIND {
        return Err(refuse(
            "a rewind is under way, so the image alone is not the disk: serve it until that is complete",
        ));
    }
    Ok(())
}

async fn seal<S: Storage>(
    io: &S,
    writer: &Writer<'_, S>,
    head: &Head,
    to: Place<'_, S>,
) -> Result<(), Error> {
    let sealed = async {
        writer.seal(head).await?;
        io.sync_dir(to.dir).map_err(Error::io("flushing the history file's directory"))
    };
    sealed.await.map_err(|error| Error::HandedOverWithoutFile { source: Box::new(error) })
}

fn moved(head: &Head, snapshots: Vec<String>) -> Moved {
    Moved {
        change_id: ChangeId { generation: head.generation, epoch: head.epoch.previous() },
        capacity: head.capacity,
        grid: head.grid,
        changed_blocks: head.marked,
        file_bytes: head.body_bytes + crate::format::PAGE as u64,
        image_path: head.path.clone(),
        snapshots,
    }
}

impl<S: Storage> Disk<S> {
    /// Exports the history of this disk, and hands it over: from then on every change of it is refused, until
    /// the daemon lets go of it; opened again, it begins a new generation. Reading goes on.
    ///
    /// The caller has seen that no front end is connected. `identity` is asked once everything is flushed.
    ///
    /// # Errors
    /// [`Error::HandedOver`], [`Error::RewindActive`], [`Error::NotTracked`], [`Error::ResizeUnfinished`],
    /// [`Error::NotMovable`]; [`Error::GateTimeout`] if changes in flight did not end within `deadline`; those of
    /// the files. After an error the disk goes on as before, unless the error says that it is handed over.
    pub async fn hand_over(
        &self,
        _admin: &mut Admin,
        io: &S,
        to: Place<'_, S>,
        deadline: Duration,
        identity: impl FnOnce() -> std::io::Result<Identity>,
    ) -> Result<Moved, Error> {
        self.check_unwound()?;
        let untracked = || Error::NotTracked { disk: self.name.clone() };
        let tracker = self.marking().ok_or_else(untracked)?;
        if let Some(size) = self.growing_to() {
            return Err(Error::ResizeUnfinished { disk: self.name.clone(), size });
        }
        if self.control.map_in_doubt(&self.boot()) {
            return Err(refuse("a flush of its change map has failed since the host was started"));
        }
        let map = io.open(&self.dir, MAP_FILE).map_err(Error::io("opening the change map"))?;
        let Some(closed) = self.gate.close_within(io, deadline).await else {
            return Err(Error::GateTimeout { disk: self.name.clone(), seconds: deadline.as_secs() });
        };
        self.flush(io).await?;
        if self.control.flush_failed() {
            return Err(Error::Poisoned);
        }
        // Durable before it is relied on, here too: the export may be taken back.
        self.sync_map(io, tracker.cells()).await?;
        let identity = identity().map_err(Error::io("asking for the image's identity"))?;
        let superblock = self.superblock_now();
        let source = Source { map: &map, tracker: &tracker, image: &self.image };
        let instant = Instant { superblock: &superblock, identity };
        let file = io.create(to.dir, to.name).map_err(Error::io("making the history file"))?;
        let written = async {
            let (writer, head) = write_body(io, &source, &instant, &file).await?;
            self.write_superblock(io, |superblock| {
                superblock.state = DiskState::HandedOver;
                superblock.identity = identity;
            })
            .await?;
            Ok((writer, head))
        };
        let (writer, head) = match written.await {
            Ok(written) => written,
            Err(error) => {
                let _ = io.remove(to.dir, to.name);
                return Err(error);
            }
        };
        self.handed_over.store(true, SeqCst);
        let snapshots = self.snapshots().iter().map(|one| one.name.clone()).collect();
        let sealed = seal(io, &writer, &head, to).await;
        // Who waits for the gate finds the disk handed over.
        drop(closed);
        sealed.map(|()| moved(&head, snapshots))
    }

    /// Whether the disk's history was handed over to another host.
    pub fn is_handed_over(&self) -> bool {
        self.handed_over.load(SeqCst)
    }

    /// Refuses what would change a disk that was handed over.
    pub(crate) fn check_kept(&self) -> Result<(), Error> {
        match self.is_handed_over() {
            true => Err(Error::HandedOver { disk: self.name.clone() }),
            false => Ok(()),
        }
    }
}

/// What an export is made of. Nothing of it changes meanwhile.
struct Source<'a, S: Storage> {
    map: &'a S::File,
    tracker: &'a Tracker<S::Cells>,
    image: &'a S::File,
}

/// Whose it is, and as of when.
struct Instant<'a> {
    superblock: &'a Superblock,
    identity: Identity,
}

/// Writes everything but the head, durably.
async fn write_body<'a, S: Storage>(
    io: &'a S,
    source: &Source<'_, S>,
    instant: &Instant<'_>,
    file: &'a S::File,
) -> Result<(Writer<'a, S>, Head), Error> {
    let Source { map, tracker, image } = *source;
    let superblock = instant.superblock;
    let mut writer = Writer::begin(io, file, uuid::Uuid::new_v4().into_bytes()).await?;
    let mut runs = Runs::new(superblock, tracker.grid());
    for pages in walk::strides(tracker.page_count()) {
        let touched =
            walk::touched(io, map, pages).map_err(Error::io("looking for holes of the change map"))?;
        for page in touched.into_iter().flatten() {
            let mut cells = Box::new([0; PAGE_BYTES]);
            tracker.copy_page(page, &mut cells);
            for chunk in runs.page(page, &cells) {
                writer.chunk(Kind::Map, &chunk).await?;
            }
        }
    }
    let (last, marked, newest) = runs.end();
    for chunk in last {
        writer.chunk(Kind::Map, &chunk).await?;
    }
    let seed = superblock.generation.to_bytes();
    let mut places = sample::spread(&seed, superblock.capacity, SPREAD);
    places.extend(newest);
    places.sort_unstable();
    places.dedup();
    let mut sampled = Vec::with_capacity(places.len());
    for place in places {
        sampled.push((place, sample::checksum(io, image, place).await?));
    }
    writer.sample(&sampled).await?;
    let mut head = Head {
        export: [0; 16],
        disk: superblock.disk,
        generation: superblock.generation,
        epoch: superblock.epoch,
        grid: tracker.grid(),
        capacity: superblock.capacity,
        identity: instant.identity,
        created_ns: now_ns(),
        chunks: 0,
        body_bytes: 0,
        marked,
        path: superblock.path.clone(),
    };
    writer.end(&mut head).await?;
    Ok((writer, head))
}

/// Makes runs of the pages of a map.
struct Runs {
    encoder: Encoder,
    newest: Epoch,
    blocks: u64,
    grid: BlockGrid,
    capacity: u64,
    open: Option<Run>,
    marked: u64,
    /// The runs that changed last; among those of one epoch, drawn.
    last_changed: BinaryHeap<Reverse<(Epoch, u64, u64)>>,
    numbers: Numbers,
}

impl Runs {
    fn new(superblock: &Superblock, grid: BlockGrid) -> Self {
        Self {
            encoder: Encoder::new(superblock.epoch),
            newest: superblock.epoch,
            blocks: grid.count(superblock.capacity),
            grid,
            capacity: superblock.capacity,
            open: None,
            marked: 0,
            last_changed: BinaryHeap::with_capacity(NEWEST + 1),
            numbers: Numbers::new(&superblock.generation.to_bytes()),
        }
    }

    /// Takes in a page; pages come in order. Chunks that are full are answered.
    fn page(&mut self, page: u64, cells: &[u8; PAGE_BYTES]) -> Vec<Vec<u8>> {
        let base = page * CELLS_PER_PAGE as u64;
        let mut full = Vec::new();
        for (block, cell) in (base..self.blocks).zip(cells.as_chunks::<4>().0) {
            let epoch = Epoch::new(u32::from_le_bytes(*cell)).min(self.newest);
            if epoch == Epoch::NEVER {
                continue;
            }
            match &mut self.open {
                Some(open) if open.end() == block && open.epoch == epoch => open.count += 1,
                _ => full.extend(self.begin(Run { first: block, count: 1, epoch })),
            }
        }
        full
    }

    /// Begins a run, and ends the one before.
    fn begin(&mut self, run: Run) -> Option<Vec<u8>> {
        self.open.replace(run).and_then(|done| self.finish(done))
    }

    fn finish(&mut self, run: Run) -> Option<Vec<u8>> {
        self.marked += run.count;
        let drawn = self.numbers.next();
        let block = run.first + self.numbers.next() % run.count;
        self.last_changed.push(Reverse((run.epoch, drawn, block)));
        if self.last_changed.len() > NEWEST {
            self.last_changed.pop();
        }
        self.encoder.push(run)
    }

    /// The last chunks, how many blocks are marked, and places in those that changed last.
    fn end(mut self) -> (Vec<Vec<u8>>, u64, Vec<sample::Place>) {
        let full = self.open.take().and_then(|run| self.finish(run));
        let last = full.into_iter().chain(self.encoder.end()).collect();
        let place = |block: u64| {
            let range = self.grid.range(block..block + 1, self.capacity);
            let len = u32::try_from(range.len().min(NEWEST_BYTES)).unwrap_or(0);
            sample::Place { at: range.start(), len }
        };
        (last, self.marked, self.last_changed.iter().map(|Reverse((_, _, block))| place(*block)).collect())
    }
}
