//! Opening a disk and closing it: what is believed of what was left, and why.
//!
//! Invariant: whatever cannot be proved complete ends the generation, with a reason; a map is never
//! cleared under a generation that is still valid. Each step may be the last before a stop: the next
//! opening comes to the same decision or finds the work done.
//!
//! | left as | image | the map | snapshots |
//! |---|---|---|---|
//! | clean | as stamped | as it is | kept |
//! | clean | changed | new generation | dropped |
//! | serving, same boot | same file and size | as it is (marks were made in the page cache) | kept |
//! | serving, another boot | any | new generation | dropped |
//! | resetting | any | new generation | by the rows above |
//! | no valid superblock | any | new generation | dropped |
//!
//! A map that is missing, or of a length that is not its own, takes the snapshots with it: its first page
//! may have said that some are broken.

use std::fmt;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;
use cbt::{BlockGrid, Cells, Epoch, Generation};

use crate::append::Appender;
use crate::buffers::Buffers;
use crate::chain::Chain;
use crate::disk::{Disk, EventSink, with_sources};
use crate::error::Error;
use crate::format::{
    self, Broken, DiskState, MAP_FILE, PAGE, STORE_FILE, SUPERBLOCK_FILE, SnapshotState, Superblock,
};
use crate::gate::Gate;
use crate::index::Slot;
use crate::memory::{Source, Target};
use crate::overlay::{Left, Overlays};
use crate::snapshot::Snapshot;
use crate::storage::{Durability, Storage};
use crate::store::Store;
use crate::tracker::{CONTROL_CELLS, Control, History, Identity, Tracker};

/// What to open, and how.
pub struct DiskOptions<S: Storage> {
    /// The disk's name among the daemon's.
    pub name: String,
    /// The image, opened and locked.
    pub image: S::File,
    /// The image's absolute path, as people know it.
    pub image_path: String,
    /// What tells the image from others, now.
    pub identity: Identity,
    /// The directory of the disk's state, which exists and nobody else uses.
    pub dir: S::Dir,
    /// Blocks to track, or `None` to track nothing.
    pub tracking: Option<BlockGrid>,
    /// The host's boot (`/proc/sys/kernel/random/boot_id`).
    pub boot: [u8; 16],
    /// Who is told of what happens.
    pub events: EventSink,
    /// Records that one step of a merge takes in; see [`crate::MERGE_STEP`].
    pub merge_step: u64,
}

/// Why a new generation began.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetReason {
    /// There was no state: the disk is new here.
    New,
    /// The superblock, or the map, is not what it should be.
    Damaged,
    /// The host stopped without a clean end, so marks may be lost.
    HostStopped,
    /// The image is not as it was left.
    ImageChanged,
    /// Another block size was asked for, or tracking was switched on or off.
    BlockSizeChanged,
    /// An earlier beginning of a new generation was interrupted.
    Interrupted,
    /// The numbers of epochs were about to run out.
    EpochsExhausted,
}

impl ResetReason {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Damaged => "damaged",
            Self::HostStopped => "host-stopped",
            Self::ImageChanged => "image-changed",
            Self::BlockSizeChanged => "block-size-changed",
            Self::Interrupted => "interrupted",
            Self::EpochsExhausted => "epochs-exhausted",
        }
    }
}

impl fmt::Display for ResetReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "the disk is new here",
            Self::Damaged => "the tracker's files are damaged",
            Self::HostStopped => "the host stopped without a clean end, so marks may be lost",
            Self::ImageChanged => "the image was changed or replaced while no daemon served it",
            Self::BlockSizeChanged => "another block size was asked for",
            Self::Interrupted => "an earlier reset was interrupted",
            Self::EpochsExhausted => "the numbers of epochs were running out",
        })
    }
}

/// What opening a disk found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// Why a new generation began, if one did.
    pub reset: Option<ResetReason>,
    /// Names of snapshots that could not be kept, with the reason.
    pub dropped: Vec<(String, String)>,
    /// Names of snapshots that were kept.
    pub kept: Vec<String>,
    /// Names of overlays that should have been kept and could not, with the reason.
    pub overlays_dropped: Vec<(String, String)>,
    /// The last daemon did not close the disk.
    pub unclean: bool,
}

/// What the superblock and the image say together.
struct Verdict {
    reset: Option<ResetReason>,
    keep_snapshots: bool,
}

impl<S: Storage> Disk<S> {
    /// Opens a disk: takes up its history where that can be proved, and begins a new one where not.
    ///
    /// Snapshots that a stop left half made are decided by [`crate::group::settle`] afterwards.
    ///
    /// # Errors
    /// [`Error::ForeignState`] if the directory belongs to another image; those of the files.
    pub async fn open(io: &S, options: DiskOptions<S>) -> Result<(Arc<Self>, OpenReport), Error> {
        let fail = || Error::io("opening the state directory");
        let names = io.list(&options.dir).map_err(fail())?;
        let existed = names.iter().any(|name| name == SUPERBLOCK_FILE);
        let (file, Copies { newest: found, one_damaged }) = open_superblock(io, &options, existed).await?;
        if let Some(found) = &found {
            check_owner(found, &options)?;
        }
        let cells = cells_of::<S>(options.tracking, options.identity.len);
        let mut verdict = judge(found.as_ref(), existed, &options);
        if one_damaged {
            verdict.reset.get_or_insert(ResetReason::Damaged);
            verdict.keep_snapshots = false;
        }
        let old_map = open_map(io, &options.dir, &names)?;
        let len = old_map.as_ref().map(|(_, len)| *len);
        let fits = len == Some(bytes_of(cells));
        if !fits {
            verdict.reset.get_or_insert(ResetReason::Damaged);
        }
        if !found.as_ref().is_some_and(|found| is_as_left::<S>(found, len)) {
            // Its first page said which snapshots broke.
            verdict.keep_snapshots = false;
        }
        let mut report = OpenReport {
            reset: verdict.reset.clone(),
            unclean: found.as_ref().is_some_and(|found| found.state != DiskState::Clean),
            ..OpenReport::default()
        };
        let store = open_store(io, &options.dir, &names)?;
        let store_len = store.len(io)?;
        let mut next = next_superblock(found.as_ref(), &options, verdict.reset.is_some());
        let mut chain = Vec::new();
        if verdict.keep_snapshots {
            let control = match &old_map {
                Some((old, len)) => old_control(io, old, *len)?,
                None => None,
            };
            let remains = Remains { store_len, control };
            chain = load_chain(io, &options.dir, &next.disk, &names, &remains, &mut report).await?;
            if let Some((old, len)) = old_map.as_ref().filter(|_| !fits) {
                take_notes(io, old, *len, &chain, &options.name).await?;
            }
        } else {
            let reason = report.reset.as_ref().map_or_else(String::new, ResetReason::to_string);
            drop_snapshots(io, &options.dir, &next.disk, &names, &reason, &mut report).await?;
        }
        let left = Left {
            dir: &options.dir,
            disk: &next.disk,
            names: &names,
            chain: &chain,
            reset: report.reset.as_ref().map(ToString::to_string),
            boot: options.boot,
        };
        let (overlays, dropped) = Overlays::load(io, &left).await?;
        report.overlays_dropped = dropped;
        if verdict.reset.is_some() {
            // The old generation ends durably before its map is cleared or replaced: a stop between
            // the two must not leave a valid generation with an empty map.
            next.state = DiskState::Resetting;
            write_superblock(io, &file, &next).await?;
        }
        let this_boot = found.as_ref().is_some_and(|found| found.boot == options.boot);
        let flush_failed = this_boot
            && match &old_map {
                Some((old, len)) => old_control(io, old, *len)?.is_some_and(|old| old.flush_failed()),
                None => false,
            };
        let map_file = match old_map {
            Some((old, _)) if fits => old,
            old => replace_map(io, &options.dir, old.is_some(), cells)?,
        };
        let mapped = Arc::new(io.map(&map_file, cells).map_err(Error::io("mapping the change map"))?);
        let tracker = options.tracking.map(|grid| Tracker::new(mapped.clone(), grid, options.identity.len));
        let control = Control::new(mapped.clone());
        control.note_flush_failed(flush_failed);
        if verdict.reset.is_some() {
            if let Some(tracker) = &tracker {
                tracker.clear();
            }
            io.sync_cells(&mapped).map_err(Error::io("flushing the change map"))?;
            next.sequence += 1;
            next.state = DiskState::Serving;
        }
        write_superblock(io, &file, &next).await?;
        overlays.begin(io).await?;
        io.sync_dir(&options.dir).map_err(fail())?;
        note_broken(&control, &chain, &options.name);
        for snapshot in &chain {
            control.set_records(snapshot.sequence, snapshot.loaded_records());
        }
        claim_slots(&store, &chain)?;
        store.tidy(io).await?;
        report.kept.extend(chain.iter().filter(|one| one.is_active()).map(|one| one.name.clone()));
        let disk = Arc::new(Self {
            name: options.name,
            id: next.disk,
            image: options.image,
            dir: options.dir,
            capacity: options.identity.len,
            gate: Gate::new(),
            history: History::new(next.generation, next.epoch),
            tracker,
            control,
            newest: ArcSwapOption::new(chain.last().cloned()),
            last_sequence: AtomicU32::new(chain.last().map_or(0, |last| last.sequence)),
            chain: Chain::new(chain),
            leaving: Mutex::default(),
            store,
            merge_step: options.merge_step.max(1),
            appender: Appender::default(),
            buffers: Buffers::default(),
            overlays,
            superblock: Mutex::new(next),
            superblock_file: file,
            events: options.events,
            poisoned: AtomicBool::new(false),
        });
        disk.collect(io).await?;
        Ok((disk, report))
    }

    /// Closes the disk for good: waits for changes in flight, makes everything durable, and stamps the
    /// image's identity, so that the next opening can tell that nothing happened in between.
    ///
    /// `identity` is asked once everything is flushed. Changes that come later wait for ever.
    pub async fn close(
        &self,
        io: &S,
        identity: impl FnOnce() -> std::io::Result<Identity>,
    ) -> Result<(), Error> {
        self.gate.close().await;
        // A failed flush leaves the disk unclean: what the medium holds is not known. That goes for
        // those of earlier daemons too, until the host starts anew and what it holds can be read.
        self.flush(io).await?;
        if self.control.flush_failed() {
            return Err(Error::Poisoned);
        }
        self.sync_store(io).await;
        let chain = self.chain.now();
        for snapshot in chain.iter() {
            self.sync_snapshot(io, snapshot).await;
        }
        // Which ones are broken, those just now included, must be as durable as the stamp: without it the
        // next start would believe records whose slots are others' by now.
        for snapshot in chain.iter().filter(|one| one.broken().is_some()) {
            snapshot.sync(io).await?;
        }
        self.overlays.close(io, &self.dir).await;
        io.sync_cells(self.control.cells()).map_err(Error::io("flushing the change map"))?;
        io.sync_dir(&self.dir).map_err(Error::io("flushing the state directory"))?;
        let identity = identity().map_err(Error::io("asking for the image's identity"))?;
        self.write_superblock(io, |superblock| {
            superblock.state = DiskState::Clean;
            superblock.identity = identity;
        })
        .await
    }
}

/// Opens or makes the superblock's file and reads the newest valid copy.
async fn open_superblock<S: Storage>(
    io: &S,
    options: &DiskOptions<S>,
    existed: bool,
) -> Result<(S::File, Copies), Error> {
    let fail = || Error::io("opening the superblock");
    if !existed {
        return Ok((io.create(&options.dir, SUPERBLOCK_FILE).map_err(fail())?, Copies::default()));
    }
    let file = io.open(&options.dir, SUPERBLOCK_FILE).map_err(fail())?;
    let len = io.len(&file).map_err(fail())?;
    let mut copies = Copies::default();
    for copy in 0..2 {
        let at = copy * PAGE as u64;
        if at + PAGE as u64 > len {
            break;
        }
        let mut page = [0; PAGE];
        io.read(&file, at, Target::of(&mut page)).await.map_err(fail())?;
        match Superblock::from_page(&page) {
            Some(found) => {
                if copies.newest.as_ref().is_none_or(|newest| newest.sequence < found.sequence) {
                    copies.newest = Some(found);
                }
            }
            None => copies.one_damaged |= page.iter().any(|&byte| byte != 0),
        }
    }
    Ok((file, copies))
}

/// The copies of a superblock that were found.
#[derive(Default)]
struct Copies {
    newest: Option<Superblock>,
    /// One is neither valid nor unused: it may have been the newer one, which knew of later epochs.
    one_damaged: bool,
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
    io.write(file, at, Source::of(&page[..]), Durability::Cached).await.map_err(fail())?;
    io.sync(file).await.map_err(fail())
}

/// Refuses the state of another image that is still around under its own name.
fn check_owner<S: Storage>(found: &Superblock, options: &DiskOptions<S>) -> Result<(), Error> {
    let same_file =
        (found.identity.inode, found.identity.device) == (options.identity.inode, options.identity.device);
    if found.path == options.image_path || same_file {
        return Ok(());
    }
    Err(Error::ForeignState { owner: found.path.clone(), image: options.image_path.clone() })
}

fn judge<S: Storage>(found: Option<&Superblock>, existed: bool, options: &DiskOptions<S>) -> Verdict {
    let Some(found) = found else {
        let reason = if existed { ResetReason::Damaged } else { ResetReason::New };
        return Verdict { reset: Some(reason), keep_snapshots: false };
    };
    let (then, now) = (&found.identity, &options.identity);
    let same_file = then.inode == now.inode && then.len == now.len && found.capacity == now.len;
    let proved = match found.state {
        // Device numbers may change with a boot; within one, a file keeps its own.
        DiskState::Clean => same_file && then.mtime_ns == now.mtime_ns,
        DiskState::Serving | DiskState::Resetting => {
            same_file && then.device == now.device && found.boot == options.boot
        }
    };
    let block_bytes = options.tracking.map_or(0, BlockGrid::bytes);
    let reset = if !proved {
        let host = found.state != DiskState::Clean && found.boot != options.boot;
        Some(if host { ResetReason::HostStopped } else { ResetReason::ImageChanged })
    } else if found.state == DiskState::Resetting {
        Some(ResetReason::Interrupted)
    } else if found.block_bytes != block_bytes {
        Some(ResetReason::BlockSizeChanged)
    } else if found.epoch.get() > Epoch::LAST.get() - (1 << 20) {
        Some(ResetReason::EpochsExhausted)
    } else {
        None
    };
    Verdict { reset, keep_snapshots: proved }
}

/// The superblock to serve under.
fn next_superblock<S: Storage>(
    found: Option<&Superblock>,
    options: &DiskOptions<S>,
    reset: bool,
) -> Superblock {
    let block_bytes = options.tracking.map_or(0, BlockGrid::bytes);
    let (sequence, disk) = match found {
        Some(found) => (found.sequence + 1, found.disk),
        None => (1, uuid::Uuid::new_v4().into_bytes()),
    };
    let (generation, epoch) = match found {
        Some(found) if !reset => (found.generation, found.epoch),
        _ => (Generation::random(), Epoch::FIRST),
    };
    Superblock {
        sequence,
        disk,
        generation,
        boot: options.boot,
        state: DiskState::Serving,
        epoch,
        block_bytes,
        capacity: options.identity.len,
        identity: options.identity,
        path: options.image_path.clone(),
    }
}

/// Cells of the map of a disk, its control page included.
fn cells_of<S: Storage>(tracking: Option<BlockGrid>, capacity: u64) -> usize {
    tracking.map_or(CONTROL_CELLS, |grid| Tracker::<S::Cells>::cells_needed(grid, capacity))
}

/// Whether the map is as long as the superblock's writer left it, or in the midst of being replaced.
fn is_as_left<S: Storage>(found: &Superblock, len: Option<u64>) -> bool {
    let tracking = BlockGrid::new(found.block_bytes).ok();
    found.state == DiskState::Resetting || len == Some(bytes_of(cells_of::<S>(tracking, found.capacity)))
}

/// Opens the map's file, if there is one; its length in bytes.
fn open_map<S: Storage>(io: &S, dir: &S::Dir, names: &[String]) -> Result<Option<(S::File, u64)>, Error> {
    let fail = || Error::io("opening the change map");
    if !names.iter().any(|name| name == MAP_FILE) {
        return Ok(None);
    }
    let file = io.open(dir, MAP_FILE).map_err(fail())?;
    let len = io.len(&file).map_err(fail())?;
    // Someone may have copied it with holes; a store into one on a full file system would end the
    // process.
    io.allocate(&file, len).map_err(fail())?;
    Ok(Some((file, len)))
}

/// The control words of a map as it was left, if it is long enough to have any.
fn old_control<S: Storage>(io: &S, map: &S::File, len: u64) -> Result<Option<Control<S::Cells>>, Error> {
    if len < bytes_of(CONTROL_CELLS) {
        return Ok(None);
    }
    let mapped = io.map(map, CONTROL_CELLS).map_err(Error::io("mapping the change map"))?;
    Ok(Some(Control::new(Arc::new(mapped))))
}

/// Notes in the heads which snapshots broke, as a map says that is about to be replaced.
async fn take_notes<S: Storage>(
    io: &S,
    map: &S::File,
    len: u64,
    chain: &[Arc<Snapshot<S>>],
    disk: &str,
) -> Result<(), Error> {
    let Some(control) = old_control(io, map, len)? else { return Ok(()) };
    note_broken(&control, chain, disk);
    for snapshot in chain.iter().filter(|one| one.broken().is_some()) {
        snapshot.write_head(io).await?;
    }
    Ok(())
}

/// Makes a new map, all zero, in place of one that does not fit.
fn replace_map<S: Storage>(io: &S, dir: &S::Dir, existed: bool, cells: usize) -> Result<S::File, Error> {
    let fail = || Error::io("making the change map");
    if existed {
        io.remove(dir, MAP_FILE).map_err(fail())?;
    }
    let file = io.create(dir, MAP_FILE).map_err(fail())?;
    // Allocated to its end: a store into a hole of a full file system would end the process.
    if let Err(error) = io.allocate(&file, bytes_of(cells)) {
        let _ = io.remove(dir, MAP_FILE);
        return Err(fail()(error));
    }
    Ok(file)
}

fn bytes_of(cells: usize) -> u64 {
    cells as u64 * size_of::<u32>() as u64
}

/// Reads the snapshots of a disk whose image is as they left it, oldest first.
///
/// Only what is damaged is given up, and what depends on it; an error that may pass (too few
/// descriptors, no permission, a failing device) is the caller's, and nothing was changed.
async fn load_chain<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    names: &[String],
    remains: &Remains<S::Cells>,
    report: &mut OpenReport,
) -> Result<Vec<Arc<Snapshot<S>>>, Error> {
    let mut chain: Vec<Arc<Snapshot<S>>> = Vec::new();
    let mut damaged = Vec::new();
    let mut lost: Option<String> = None;
    for sequence in sequences(names) {
        let loaded = Snapshot::load(io, dir, disk, sequence, remains.store_len).await;
        match loaded.and_then(|found| found.map(|one| remains.check_whole(one)).transpose()) {
            // A creation that did not come to its head.
            Ok(None) => Snapshot::<S>::remove_file(io, dir, sequence)?,
            Ok(Some(snapshot)) => chain.push(Arc::new(snapshot)),
            Err(error) if !error.is_damage() => return Err(error),
            Err(error) => damaged.push((sequence, with_sources(&error))),
        }
    }
    let chain = without_unnamed(io, dir, chain)?;
    for at in (0..chain.len()).rev() {
        let newer = chain.get(at + 1);
        if lost.is_none() && !leads_to(&chain[at], newer.map(|one| &**one)) {
            let why = damaged.iter().find(|(sequence, _)| *sequence == chain[at].newer());
            let why = why.map_or("its index is gone", |(_, reason)| reason);
            lost = Some(format!("a newer snapshot is damaged: {why}"));
        }
        if let Some(reason) = &lost {
            log::warn!("snapshot '{}' is broken: {reason}", chain[at].name);
            chain[at].set_broken(Broken { reason: reason.clone(), errno: 0, at_ns: 0 });
            chain[at].write_head(io).await?;
        }
    }
    // Only now: the heads say what was lost with them.
    for (sequence, reason) in damaged {
        log::warn!("snapshot number {sequence} is damaged: {reason}");
        Snapshot::<S>::remove_file(io, dir, sequence)?;
        report.dropped.push((format!("number {sequence}"), reason));
    }
    Ok(chain)
}

/// Removes snapshots that their older neighbour does not name: deleted ones that were merged into it, and
/// prepared ones whose instant had not come.
fn without_unnamed<S: Storage>(
    io: &S,
    dir: &S::Dir,
    chain: Vec<Arc<Snapshot<S>>>,
) -> Result<Vec<Arc<Snapshot<S>>>, Error> {
    let mut kept: Vec<Arc<Snapshot<S>>> = Vec::new();
    for snapshot in chain {
        let is_named = kept.last().is_none_or(|older| older.newer() == snapshot.sequence);
        if snapshot.state() != SnapshotState::Active && !is_named {
            Snapshot::<S>::remove_file(io, dir, snapshot.sequence)?;
        } else {
            kept.push(snapshot);
        }
    }
    Ok(kept)
}

/// Whether what `older` does not have is to be looked for in `newer`, the next one that is there.
fn leads_to<S: Storage>(older: &Snapshot<S>, newer: Option<&Snapshot<S>>) -> bool {
    older.newer() == newer.map_or(0, |newer| newer.sequence)
}

/// What else was left that tells whether snapshots are whole.
struct Remains<C> {
    store_len: u64,
    control: Option<Control<C>>,
}

impl<C: Cells> Remains<C> {
    /// Refuses a snapshot whose index has fewer records than were published.
    fn check_whole<S: Storage>(&self, snapshot: Snapshot<S>) -> Result<Snapshot<S>, Error> {
        let published = self.control.as_ref().map_or(0, |control| control.records(snapshot.sequence));
        // Counted modulo 2^32: there may be some more, which were not published.
        let more = snapshot.loaded_records().wrapping_sub(published).cast_signed();
        if snapshot.broken().is_none() && more < 0 {
            return Err(Error::Corrupt { what: "the end of a snapshot's index", at: snapshot.records() });
        }
        Ok(snapshot)
    }
}

/// Opens or makes the file of the difference store.
fn open_store<S: Storage>(io: &S, dir: &S::Dir, names: &[String]) -> Result<Store<S>, Error> {
    let found = names.iter().any(|name| name == STORE_FILE);
    let file = if found { io.open(dir, STORE_FILE) } else { io.create(dir, STORE_FILE) };
    Ok(Store::new(file.map_err(Error::io("opening the difference store"))?))
}

/// Takes the slots that the records of snapshots name. A broken one has given up its own.
fn claim_slots<S: Storage>(store: &Store<S>, chain: &[Arc<Snapshot<S>>]) -> Result<(), Error> {
    for snapshot in chain {
        if snapshot.broken().is_some() {
            snapshot.emptied.store(true, SeqCst);
            continue;
        }
        let mut fits = true;
        snapshot.for_each(|_, slot| {
            if let Slot::At(slot) = slot {
                fits &= store.claim(slot);
            }
        });
        if !fits {
            return Err(Error::Corrupt { what: "a slot of a snapshot's index", at: 0 });
        }
    }
    Ok(())
}

/// Removes the snapshots of a disk whose image may not be as they left it.
async fn drop_snapshots<S: Storage>(
    io: &S,
    dir: &S::Dir,
    disk: &[u8; 16],
    names: &[String],
    reason: &str,
    report: &mut OpenReport,
) -> Result<(), Error> {
    for sequence in sequences(names) {
        if let Ok(Some(snapshot)) = Snapshot::<S>::load(io, dir, disk, sequence, u64::MAX).await
            && snapshot.state() == SnapshotState::Active
        {
            report.dropped.push((snapshot.name.clone(), reason.to_owned()));
        }
        Snapshot::<S>::remove_file(io, dir, sequence)?;
    }
    Ok(())
}

/// The numbers of snapshots that have files, ascending.
fn sequences(names: &[String]) -> Vec<u32> {
    let mut all: Vec<u32> = names.iter().filter_map(|name| format::sequence_of(name)).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Takes over breaks that were noted without their heads being written.
fn note_broken<S: Storage>(control: &Control<S::Cells>, chain: &[Arc<Snapshot<S>>], disk: &str) {
    let upto = control.broken_up_to();
    for snapshot in chain.iter().filter(|one| one.sequence <= upto) {
        let reason = "it broke before the daemon was restarted".to_owned();
        if snapshot.set_broken(Broken { reason, errno: 0, at_ns: 0 }) {
            log::warn!("{disk}: snapshot '{}' broke before the daemon was restarted", snapshot.name);
        }
    }
}
