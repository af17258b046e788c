//! Checkpoints: instants that have a name and outlive their snapshot.
//!
//! The change map keeps the epoch of each block's last write only. So what had changed *up to* a past instant
//! is known while its snapshot is held, and not after that. A checkpoint is the snapshot's frozen map, as runs
//! in a file of its own. As the older end of a comparison it is no more than a change id; as the younger end
//! its runs tell everything, for as long as the file is there, whatever becomes of snapshots and generations.
//!
//! ```text
//! runs and heads of every disk       (heads say "prepared"; read from the snapshots' frozen pages)
//! flush the files, then their names
//! heads say "active", flushed        (one disk after the other)
//! told                               (in memory; then the answer)
//! ```
//!
//! A stop before the first "active" leaves prepared files that nobody was told of: they are removed at the next
//! start. A stop after it leaves a group of which one member is active, which proves that the runs of all are on
//! the medium: [`crate::group::settle`] makes the others active too. A head is one sector, old or new.
//!
//! *Complete as the older end*: its snapshot's creation reserved the next epoch durably and flushed the image
//! before it was answered, so every change after the instant is marked in a later epoch, by a mark or by the
//! intent log, for as long as the generation goes on. *Complete as the younger end*: a page of the map is read
//! as [`View`] reads it, frozen or not marked since; and a page that is not noted as marked (module `marked`)
//! was not by then.
//!
//! When a generation ends, heads of its checkpoints say why. They stay until they are deleted: between two
//! of them changes can be told as before, only not up to now.
//!
//! Invariant: an answer, once given, is given again; what is not whole is an error. Damage of the runs costs the
//! younger end only.
//! Absent: which instants a backup program needs. The base moves when it says so.

mod head;
mod registry;
mod runs;

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cbt::{BlockGrid, ByteRange, CELLS_PER_PAGE, ChangeId, Epoch, PAGE_BYTES};

#[cfg(test)]
pub(crate) use head::tests::compare as compare_format;

use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::PAGE;
use crate::group::{Admin, check_name};
use crate::memory::{Source, Target};
use crate::storage::Storage;
use crate::view::View;

pub(crate) use head::{Head as CheckpointHead, State as CheckpointState, file_of, number_of, numbers};
pub(crate) use registry::Checkpoints;
pub(crate) use registry::settle;
pub(crate) use runs::Page as RunsPage;
use runs::{Collector, Encoder};

/// Bytes of runs that are written or read together.
const AT_ONCE: usize = 256 << 10;

/// An instant of one disk that has a name. See the module.
///
/// Price: 8 bytes of the state directory for each run of blocks that were last written in one epoch, twice
/// the map at worst; some 400 bytes of memory.
#[derive(Debug)]
pub struct Checkpoint {
    number: u32,
    head: Mutex<CheckpointHead>,
    name: String,
    change_id: ChangeId,
    /// Why it is lost as the younger end.
    lost: OnceLock<String>,
    deleted: AtomicBool,
    bytes: AtomicU64,
}

impl Checkpoint {
    fn new(number: u32, head: CheckpointHead, bytes: u64) -> Self {
        let (name, change_id) = (head.name.clone(), head.change_id);
        Self {
            number,
            head: Mutex::new(head),
            name,
            change_id,
            lost: OnceLock::new(),
            deleted: AtomicBool::new(false),
            bytes: AtomicU64::new(bytes),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The instant.
    pub fn change_id(&self) -> ChangeId {
        self.change_id
    }

    /// Bytes of the disk at the instant.
    pub fn capacity(&self) -> u64 {
        self.head().capacity
    }

    /// The grid in which changes up to it are told.
    pub fn block_grid(&self) -> BlockGrid {
        self.head().grid
    }

    /// When the instant was, in nanoseconds since 1970.
    pub fn created_ns(&self) -> u64 {
        self.head().created_ns
    }

    /// Bytes that it takes in the state directory.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(SeqCst)
    }

    /// Why its generation ended, as a stable code, if it did and that is known.
    pub fn ended(&self) -> Option<String> {
        Some(self.head().ended).filter(|code| !code.is_empty())
    }

    /// Why changes up to it cannot be told any more, if that was found. As the older end it is good.
    pub fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    fn head(&self) -> CheckpointHead {
        self.head.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Names the instant of the held snapshot `snapshot` on all of `disks`, or on none.
///
/// Answers the checkpoints, in the order of the disks; they are durable then.
///
/// # Errors
/// [`Error::BadName`], [`Error::CheckpointExists`]; [`Error::SnapshotExists`] if another instant has that name;
/// [`Error::NoSuchSnapshot`], [`Error::SnapshotBroken`]; [`Error::NotTracked`] if changes of the disk are not tracked,
/// [`Error::OtherGeneration`] if the snapshot is of an earlier one; [`Error::CheckpointNumbersExhausted`]; those of
/// the files. After an error there is none of them.
pub async fn create<S: Storage>(
    _admin: &mut Admin,
    io: &S,
    disks: &[Arc<Disk<S>>],
    name: &str,
    snapshot: &str,
) -> Result<Vec<Arc<Checkpoint>>, Error> {
    check_name(name)?;
    let views: Vec<View<S>> =
        disks.iter().map(|disk| check(disk, name, snapshot)).collect::<Result<_, _>>()?;
    let group = uuid::Uuid::new_v4().into_bytes();
    let mut made: Vec<Arc<Checkpoint>> = Vec::new();
    let whole = async {
        for view in &views {
            let disk = view.disk();
            let number = disk.checkpoints.next_number();
            let number =
                number.ok_or_else(|| Error::CheckpointNumbersExhausted { disk: disk.name.clone() })?;
            let head = prepare(io, view, name, group, number).await?;
            let bytes = head.file_len();
            made.push(Arc::new(Checkpoint::new(number, head, bytes)));
        }
        for disk in disks {
            io.sync_dir(&disk.dir).map_err(Error::io("flushing the state directory"))?;
        }
        for (disk, one) in disks.iter().zip(&made) {
            one.set_state(io, &disk.dir, CheckpointState::Active).await?;
        }
        Ok(())
    };
    if let Err(error) = whole.await {
        // Active ones first: while one is there, a stop makes the others active.
        for (disk, one) in disks.iter().zip(&made) {
            undo(io, disk, one.number);
        }
        return Err(error);
    }
    for (disk, one) in disks.iter().zip(&made) {
        disk.checkpoints.add(one.clone());
    }
    Ok(made)
}

/// Removes the file of a checkpoint that nobody was told of, durably.
fn undo<S: Storage>(io: &S, disk: &Disk<S>, number: u32) {
    let removed = registry::remove_file(io, &disk.dir, number)
        .and_then(|()| io.sync_dir(&disk.dir).map_err(Error::io("flushing the state directory")));
    if let Err(error) = removed {
        log::warn!("{}: what is left of a checkpoint stays: {}", disk.name, with_sources(&error));
    }
}

/// The view of `snapshot`, if its instant can have the name `name`.
fn check<S: Storage>(disk: &Arc<Disk<S>>, name: &str, snapshot: &str) -> Result<View<S>, Error> {
    let named = |error: fn(String, String) -> Error| error(disk.name.clone(), name.to_owned());
    if disk.checkpoint(name).is_ok() {
        return Err(named(|disk, name| Error::CheckpointExists { disk, name }));
    }
    // A name of a disk is one instant, whatever it is asked as.
    if name != snapshot && disk.snapshot(name).is_ok() {
        return Err(named(|disk, name| Error::SnapshotExists { disk, name }));
    }
    let snapshot = disk.snapshot(snapshot)?;
    if let Some(reason) = snapshot.broken() {
        return Err(Error::SnapshotBroken { name: snapshot.name.clone(), reason: reason.to_owned() });
    }
    if disk.block_grid().is_none() {
        return Err(Error::NotTracked { disk: disk.name.clone() });
    }
    let id = snapshot.change_id();
    if !snapshot.tracked || id.generation != disk.change_id().generation {
        return Err(disk.other_generation(id, snapshot.name()));
    }
    Ok(View::new(disk.clone(), snapshot))
}

/// Makes the file of a checkpoint, prepared, and makes it durable but for its name.
async fn prepare<S: Storage>(
    io: &S,
    view: &View<S>,
    name: &str,
    group: [u8; 16],
    number: u32,
) -> Result<CheckpointHead, Error> {
    let (disk, snapshot) = (view.disk(), view.snapshot());
    let head = CheckpointHead {
        state: CheckpointState::Prepared,
        id: uuid::Uuid::new_v4().into_bytes(),
        disk: disk.id,
        group,
        change_id: snapshot.change_id(),
        capacity: snapshot.capacity,
        grid: view.block_grid()?,
        created_ns: snapshot.created_ns,
        pages: 0,
        name: name.to_owned(),
        ended: String::new(),
    };
    // What an unlucky removal may have left under this number belongs to nothing.
    registry::remove_file(io, &disk.dir, number)?;
    let file = io.create(&disk.dir, &file_of(number)).map_err(Error::io("making a checkpoint"))?;
    let made = async {
        let pages = write_runs(io, view, &file, &head).await?;
        let head = CheckpointHead { pages, ..head };
        write_head(io, &file, &head).await?;
        Ok(head)
    };
    let made = made.await;
    if made.is_err() {
        undo(io, disk, number);
    }
    made
}

/// Writes a head, durably, and what was written before it.
async fn write_head<S: Storage>(io: &S, file: &S::File, head: &CheckpointHead) -> Result<(), Error> {
    let page = head.to_page();
    let fail = || Error::io("writing the head of a checkpoint");
    io.write(file, 0, Source::of(&page[..])).await.map_err(fail())?;
    io.sync(file).await.map_err(fail())
}

/// Writes the map of `view` as runs; how many pages.
async fn write_runs<S: Storage>(
    io: &S,
    view: &View<S>,
    file: &S::File,
    head: &CheckpointHead,
) -> Result<u64, Error> {
    let (disk, blocks) = (view.disk(), head.blocks());
    let (mut encoder, tracker) = (Encoder::new(head.id), view.tracked()?);
    disk.look_for_marks_in(io, &tracker).await;
    let mut cells = Box::new([0; PAGE_BYTES]);
    let mut told = 0;
    for run in tracker.marked().runs(0..blocks.div_ceil(CELLS_PER_PAGE as u64)) {
        encoder.push(run.start * CELLS_PER_PAGE as u64 - told, Epoch::NEVER);
        for page in run {
            view.read_map_page(io, &tracker, page, &mut cells).await?;
            let first = page * CELLS_PER_PAGE as u64;
            told = blocks.min(first + CELLS_PER_PAGE as u64);
            encoder.push_cells(&cells, usize::try_from(told - first).unwrap_or(CELLS_PER_PAGE));
            if encoder.ready() >= AT_ONCE {
                write_ready(io, file, &mut encoder).await?;
            }
        }
    }
    encoder.push(blocks - told, Epoch::NEVER);
    let pages = encoder.finish();
    write_ready(io, file, &mut encoder).await?;
    // What was read counts only if the snapshot is still held and whole, and nothing was lost before.
    view.settle_marks(io).await?;
    view.check()?;
    Ok(pages)
}

async fn write_ready<S: Storage>(io: &S, file: &S::File, encoder: &mut Encoder) -> Result<(), Error> {
    let (before, bytes) = encoder.take();
    if bytes.is_empty() {
        return Ok(());
    }
    let at = (before + 1) * PAGE as u64;
    let written = io.write(file, at, Source::of(&bytes)).await;
    written.map_err(Error::io("writing the runs of a checkpoint"))
}

/// The map of a disk as it was at a checkpoint: the younger end of comparisons, without a snapshot.
pub struct Past<S: Storage> {
    disk: Arc<Disk<S>>,
    checkpoint: Arc<Checkpoint>,
}

impl<S: Storage> Past<S> {
    /// Of `checkpoint`, which is one of `disk`'s.
    pub fn new(disk: Arc<Disk<S>>, checkpoint: Arc<Checkpoint>) -> Self {
        Self { disk, checkpoint }
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// The ranges within `range` that changed after epoch `since` up to the checkpoint's instant: exactly what
    /// [`View::changes`] of its snapshot answered or would have.
    ///
    /// Costs a look at some twenty pages to find the beginning, then reads what it tells of.
    ///
    /// # Errors
    /// [`Error::CheckpointDamaged`] if its runs are not what was written; [`Error::NoSuchCheckpoint`] if it was
    /// deleted; those of its file.
    pub async fn changes(
        &self,
        io: &S,
        since: Epoch,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<ByteRange>, Error> {
        let answer = self.collect(io, since, range, limit).await;
        if self.checkpoint.deleted.load(SeqCst) {
            let (disk, name) = (self.disk.name.clone(), self.checkpoint.name.clone());
            return Err(Error::NoSuchCheckpoint { disk, name });
        }
        match answer {
            Err(error) if error.is_damage() => Err(self.lose(&error)),
            answer => answer,
        }
    }

    async fn collect(
        &self,
        io: &S,
        since: Epoch,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<ByteRange>, Error> {
        let head = self.checkpoint.head();
        let mut collector = Collector::new(head.grid, head.capacity, since, range, limit);
        let wanted = head.grid.covering(range);
        if wanted.is_empty() {
            return Ok(collector.finish());
        }
        let file = file_of(self.checkpoint.number);
        let file = io.open(&self.disk.dir, &file).map_err(Error::io("opening a checkpoint"))?;
        let runs = Runs { io, file: &file, head: &head };
        let mut number = runs.find(wanted.start).await?;
        // Where the next page must begin, once that is known.
        let mut next = None;
        loop {
            let pages = runs.read(number, AT_ONCE).await?;
            for page in &pages {
                if next.is_some_and(|next| next != page.first) {
                    return Err(damaged(number));
                }
                next = Some(page.end());
                number += 1;
                if !collector.take(page) {
                    return Ok(collector.finish());
                }
            }
            if number == head.pages {
                return Err(damaged(number));
            }
        }
    }

    /// It is lost as the younger end, and says so from now on.
    fn lose(&self, error: &Error) -> Error {
        let (name, reason) = (self.checkpoint.name.clone(), with_sources(error));
        if self.checkpoint.lost.set(reason.clone()).is_ok() {
            log::warn!("{}: changes up to checkpoint '{name}' are lost: {reason}", self.disk.name);
            (self.disk.events)(crate::Event::CheckpointDamaged {
                disk: self.disk.name.clone(),
                checkpoint: name.clone(),
                reason: reason.clone(),
            });
        }
        Error::CheckpointDamaged { name, reason }
    }
}

fn damaged(page: u64) -> Error {
    Error::Corrupt {
        what: "a page of a checkpoint's runs",
        at: page.saturating_add(1).saturating_mul(PAGE as u64),
    }
}

/// The runs of a checkpoint in its file.
struct Runs<'a, S: Storage> {
    io: &'a S,
    file: &'a S::File,
    head: &'a CheckpointHead,
}

impl<S: Storage> Runs<'_, S> {
    /// The page that has `block`, by halving.
    async fn find(&self, block: u64) -> Result<u64, Error> {
        let (mut low, mut high) = (0, self.head.pages);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let page = self.read(middle, PAGE).await?;
            match page.first() {
                Some(page) if page.first > block => high = middle,
                _ => low = middle,
            }
        }
        // Whether it has the block is seen when it is read: pages follow each other without a gap.
        match self.read(low, PAGE).await?.first() {
            Some(page) if (page.first..page.end()).contains(&block) => Ok(low),
            _ => Err(damaged(low)),
        }
    }

    /// Reads pages from `number` on, of at most so many bytes.
    async fn read(&self, number: u64, bytes: usize) -> Result<Vec<RunsPage>, Error> {
        let left = self.head.pages.saturating_sub(number);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(bytes / PAGE);
        let mut buffer = vec![0; count * PAGE];
        let at = (number + 1) * PAGE as u64;
        let read = self.io.read(self.file, at, Target::of(&mut buffer)).await;
        read.map_err(Error::io("reading the runs of a checkpoint"))?;
        let pages = (number..).zip(buffer.chunks(PAGE)).map(|(number, bytes)| {
            RunsPage::from_bytes(bytes, &self.head.id, number, self.head.blocks())
                .ok_or_else(|| damaged(number))
        });
        pages.collect()
    }
}

/// The younger end of a comparison.
pub enum Until<S: Storage> {
    /// A snapshot that is held.
    Snapshot(View<S>),
    /// A checkpoint, whose snapshot may be gone.
    Checkpoint(Past<S>),
}

impl<S: Storage> Until<S> {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Snapshot(view) => view.snapshot().name(),
            Self::Checkpoint(past) => past.checkpoint.name(),
        }
    }

    /// The instant.
    pub fn change_id(&self) -> ChangeId {
        match self {
            Self::Snapshot(view) => view.snapshot().change_id(),
            Self::Checkpoint(past) => past.checkpoint.change_id(),
        }
    }

    /// Bytes of the disk at the instant.
    pub fn capacity(&self) -> u64 {
        match self {
            Self::Snapshot(view) => view.capacity(),
            Self::Checkpoint(past) => past.checkpoint.capacity(),
        }
    }

    /// The grid in which changes are told.
    ///
    /// # Errors
    /// [`Error::NotTracked`].
    pub fn block_grid(&self) -> Result<BlockGrid, Error> {
        match self {
            Self::Snapshot(view) => view.block_grid(),
            Self::Checkpoint(past) => Ok(past.checkpoint.block_grid()),
        }
    }

    /// As [`View::changes`] and [`Past::changes`].
    ///
    /// # Errors
    /// As those.
    pub async fn changes(
        &self,
        io: &S,
        since: Epoch,
        range: ByteRange,
        limit: usize,
    ) -> Result<Vec<ByteRange>, Error> {
        match self {
            Self::Snapshot(view) => view.changes(io, since, range, limit).await,
            Self::Checkpoint(past) => past.changes(io, since, range, limit).await,
        }
    }
}

impl<S: Storage> Disk<S> {
    /// The instant that `text` names: a change id, or the name of a snapshot or a checkpoint.
    ///
    /// # Errors
    /// [`Error::BadChangeId`], [`Error::NoSuchInstant`]; [`Error::AmbiguousName`] if a snapshot and a checkpoint of
    /// different instants have the name.
    pub fn instant(&self, text: &str) -> Result<ChangeId, Error> {
        if text.contains('/') {
            return text.parse().map_err(|source| Error::BadChangeId { source });
        }
        let snapshot = self.snapshot(text).ok().map(|one| one.change_id());
        let checkpoint = self.checkpoint(text).ok().map(|one| one.change_id());
        match (snapshot, checkpoint) {
            // What could not be undone of a failed creation may come back at a start.
            (Some(one), Some(other)) if one != other => {
                Err(Error::AmbiguousName { disk: self.name.clone(), name: text.to_owned() })
            }
            (Some(id), _) | (None, Some(id)) => Ok(id),
            (None, None) => Err(self.no_instant(text)),
        }
    }

    /// The snapshot or checkpoint that `text` names, by name or by change id, up to which changes can be told.
    ///
    /// # Errors
    /// As [`Disk::instant`].
    pub fn until(self: &Arc<Self>, text: &str) -> Result<Until<S>, Error> {
        let id = self.instant(text)?;
        let by_name = !text.contains('/');
        let snapshot = self.snapshots().into_iter().find(|one| match by_name {
            true => one.name() == text,
            false => one.change_id() == id,
        });
        let checkpoint = self.checkpoints().into_iter().find(|one| match by_name {
            true => one.name() == text,
            false => one.change_id() == id,
        });
        match (snapshot, checkpoint) {
            (Some(snapshot), None) => Ok(Until::Snapshot(View::new(self.clone(), snapshot))),
            (Some(snapshot), _) if snapshot.broken().is_none() => {
                Ok(Until::Snapshot(View::new(self.clone(), snapshot)))
            }
            (_, Some(checkpoint)) => Ok(Until::Checkpoint(Past::new(self.clone(), checkpoint))),
            (None, None) => Err(self.no_instant(text)),
        }
    }

    /// The epoch after which changes count, if those since `since` up to `until` can be told in full.
    ///
    /// # Errors
    /// [`Error::OtherGeneration`], [`Error::SinceNotOlder`].
    pub fn resolve(&self, since: ChangeId, until: ChangeId) -> Result<Epoch, Error> {
        if since.generation != until.generation {
            return Err(self.other_generation(since, &since.to_string()));
        }
        if since.epoch > until.epoch {
            let (since, until) = (since.to_string(), until.to_string());
            return Err(Error::SinceNotOlder { disk: self.name.clone(), since, until });
        }
        Ok(since.epoch)
    }

    /// Whether the next snapshot's changes since `since` will be told in full.
    ///
    /// # Errors
    /// [`Error::NotTracked`], [`Error::MarksLost`], [`Error::OtherGeneration`], [`Error::SinceNotOlder`] say why not.
    pub fn check_incremental(&self, since: ChangeId) -> Result<(), Error> {
        if self.block_grid().is_none() {
            return Err(Error::NotTracked { disk: self.name.clone() });
        }
        if self.control.map_in_doubt(&self.boot()) {
            return Err(Error::MarksLost { disk: self.name.clone() });
        }
        self.resolve(since, self.change_id()).map(drop)
    }

    fn no_instant(&self, text: &str) -> Error {
        Error::NoSuchInstant { disk: self.name.clone(), name: text.chars().take(200).collect() }
    }

    /// `what` belongs to a generation that the disk is not in, or that is not the other end's.
    pub(crate) fn other_generation(&self, id: ChangeId, what: &str) -> Error {
        let known = self.checkpoints().into_iter().filter(|one| one.change_id.generation == id.generation);
        let ended = known.filter_map(|one| one.ended()).next();
        let reason =
            ended.or_else(|| self.ever_began().map(|began| began.code.to_owned())).unwrap_or_default();
        Error::OtherGeneration { disk: self.name.clone(), what: what.to_owned(), reason }
    }
}

#[cfg(test)]
mod tests;
