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
//! | clean until the host stops; another boot | any | new generation | dropped |
//! | serving, same boot | same file and size | as it is (marks were made in the page cache) | kept |
//! | serving, another boot | same file and size | what was hot counts as changed | dropped |
//! | serving, another boot, without an intent log, or a flush of the image had failed | any | new generation | dropped |
//! | resetting | any | new generation | by the rows above |
//! | handed over | any | new generation | dropped |
//! | any, but the sample, the sign of life or the operator tells of a change, or is damaged | any | new generation | dropped |
//! | no valid superblock | any | new generation | dropped |
//!
//! The verdict on superblock and image is `open/verdict.rs`; what becomes of the snapshots is `open/snapshots.rs`.
//! What the sample and the sign of life tell, [`crate::away`] knows.
//! An image that is longer than the disk is as it was left if a resize had begun to make it so: the disk is
//! opened with its old size, and the resize finished ([`crate::resize`]).
//! A rewind that was under way goes on in every row: its list of grains, its slots and what of them is back
//! are durable by themselves. Where that cannot be, the disk is not opened; [`crate::rewind`] tells when.
//!
//! An opening that begins a generation flushes the image before: what is there is the beginning that it tells. So does
//! one after a kill: the epoch may have been reserved by a creation that did not come to flush the image, or the superblock
//! have a generation whose beginning failed, and yet that instant is told.
//!
//! A map that is missing, or of a length that is not its own, takes the snapshots with it: its first page
//! may have said that some are broken. So does one that could not be written back: [`crate::notes`].

mod snapshots;
mod superblock;
mod verdict;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;
use cbt::{BlockGrid, Cells, Epoch};

use crate::append::Appender;
use crate::areas::{self, AreaSpec, List};
use crate::away::{self, Meanwhile};
use crate::buffers::Buffers;
use crate::chain::Chain;
use crate::checkpoint::Checkpoints;
use crate::claims::Claims;
use crate::disk::{Disk, EventSink, with_sources};
use crate::error::Error;
use crate::flushes::Flushes;
use crate::format::{DiskState, MAP_FILE, PAGE, SUPERBLOCK_FILE, Superblock};
use crate::gate::Gate;
use crate::intent::{self, INTENT_FILE, Intent};
use crate::notes::{self, Notes};
use crate::overflow::Holds;
use crate::overlay::{Left, Overlays};
use crate::rewind::{self, NO_REWIND};
use crate::status::Began;
use crate::storage::Storage;
use crate::store::Budget;
use crate::tracker::{CONTROL_CELLS, Control, History, Identity, Tracker};
use crate::walk;
use crate::watch::Watch;

use snapshots::{Remains, claim_slots, drop_snapshots, load_chain};
pub(crate) use snapshots::{is_short, is_unneeded, leads_to, names_of_snapshots, sequences};
pub(crate) use superblock::{Copies, read_superblock, write_superblock};
use superblock::{capacity_of, next_superblock, open_superblock};
pub use verdict::ResetReason;
use verdict::{Verdict, check_owner, judge};
pub(crate) use verdict::{is_as_left, is_presumable, is_proved};

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
    /// Where old content goes, and how much of it.
    pub store: StorePlan,
    /// Bytes of a region of the intent log, a power of two; by the disk's size if not said.
    pub region_bytes: Option<u64>,
    /// What the host says of the image, and of the time in which nobody served it.
    pub meanwhile: Meanwhile,
}

/// Where the old content of a disk goes, and how much of it.
#[derive(Clone, Debug)]
pub struct StorePlan {
    /// Areas to keep old content in, in this order; in the state directory if there is none.
    pub areas: Vec<AreaSpec>,
    /// Bytes of old content of all snapshots of the disk, if there is a limit.
    pub limit: Option<u64>,
    /// The limit of all disks together.
    pub shared: Arc<Budget>,
}

impl Default for StorePlan {
    fn default() -> Self {
        let shared = Arc::new(Budget::new("the difference stores of all disks"));
        Self { areas: Vec::new(), limit: None, shared }
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
    /// Files of checkpoints that could not be kept, with the reason.
    pub checkpoints_lost: Vec<(String, String)>,
    /// Areas of the difference store that are not there, with the reason; what broke with them is marked so.
    pub areas_lost: Vec<(String, String)>,
    /// The last daemon did not close the disk.
    pub unclean: bool,
    /// The snapshot that the disk is on its way back to, if it is.
    pub rewinding: Option<String>,
    /// Bytes that count as changed because the host stopped without a clean end.
    pub presumed_changed: u64,
}

impl<S: Storage> Disk<S> {
    /// Opens a disk: takes up its history where that can be proved, and begins a new one where not.
    ///
    /// Snapshots that a stop left half made are decided by [`crate::group::settle`] afterwards.
    ///
    /// # Errors
    /// [`Error::ForeignState`] if the directory belongs to another image; [`Error::RewindLost`] if a rewind was
    /// under way that cannot go on; those of the files.
    pub async fn open(io: &S, options: DiskOptions<S>) -> Result<(Arc<Self>, OpenReport), Error> {
        let fail = || Error::io("opening the state directory");
        let names = io.list(&options.dir).map_err(fail())?;
        let existed = names.iter().any(|name| name == SUPERBLOCK_FILE);
        let (file, Copies { newest: found, one_damaged }) = open_superblock(io, &options, existed).await?;
        if let Some(found) = &found {
            check_owner(found, &options)?;
        }
        let capacity = capacity_of(found.as_ref(), options.identity.len);
        let cells = cells_of::<S::Cells>(options.tracking, capacity);
        let old_map = open_map(io, &options.dir, &names)?;
        let notes = Notes::read(io, old_map.as_ref(), found.as_ref(), &options)?;
        let old_intent = match &found {
            Some(found) if found.state != DiskState::Unlogged && !notes.log_in_doubt => {
                open_intent(io, &options.dir, &names, found).await?
            }
            _ => None,
        };
        let mut verdict = judge(found.as_ref(), existed, old_intent.is_some(), &options);
        if notes.lost {
            verdict.reset.get_or_insert(ResetReason::Damaged);
            (verdict.keep_snapshots, verdict.presume) = (false, false);
        }
        if let Some(found) = found.as_ref().filter(|_| verdict.keep_snapshots || verdict.presume) {
            let map = old_map.as_ref().map(|(map, len)| (map, *len));
            let doubt = away::look(io, &options, &names, found, notes.words.as_ref(), map).await?;
            if let Some(doubt) = doubt {
                log::warn!("{}: {} ({})", options.name, doubt.what, doubt.code);
                verdict = Verdict { reset: Some(doubt.reason), keep_snapshots: false, presume: false };
            }
        }
        if one_damaged {
            verdict.reset.get_or_insert(ResetReason::Damaged);
            verdict.keep_snapshots = false;
        }
        let len = old_map.as_ref().map(|(_, len)| *len);
        let begun = found.as_ref().and_then(|found| found.growing_to);
        let most = begun.map_or(cells, |to| cells_of::<S::Cells>(options.tracking, to).max(cells));
        // A map of the same blocks may be longer: the disk was larger. The rest is cut.
        let block_bytes = options.tracking.map_or(0, BlockGrid::bytes);
        let same_blocks = found.as_ref().is_some_and(|found| found.block_bytes == block_bytes);
        let fits = len.is_some_and(|len| {
            len >= bytes_of(cells)
                && (len <= bytes_of(most) || same_blocks && len.is_multiple_of(PAGE as u64))
        });
        if !fits {
            verdict.reset.get_or_insert(ResetReason::Damaged);
        }
        if !found.as_ref().is_some_and(|found| is_as_left::<S::Cells>(found, len)) {
            // Its first page said which snapshots broke.
            verdict.keep_snapshots = false;
        }
        let mut report = OpenReport {
            reset: verdict.reset.clone(),
            unclean: found
                .as_ref()
                .is_some_and(|found| !found.state.is_closed() && found.state != DiskState::HandedOver),
            ..OpenReport::default()
        };
        // What stands on the image as it was is lost with it.
        let lost = report.reset.clone().or(verdict.presume.then_some(ResetReason::HostStopped));
        let lost = lost.as_ref().map(ToString::to_string);
        let this_boot = found.as_ref().is_some_and(|found| found.boot == options.boot);
        let mut next = next_superblock(found.as_ref(), &options, capacity, verdict.reset.as_ref());
        let (id, plan) = (next.disk, &options.store);
        let mut list = List::load(io, &options.dir, &names, &id).await?;
        if !list.entries.is_empty() {
            // A killed process may have written it and not flushed it.
            list.save(io, &options.dir, &id).await?;
        }
        let store =
            areas::open(io, &options.dir, &names, &id, &list, &plan.areas, plan.shared.clone()).await?;
        let wanted =
            areas::wanted(io, plan, &id, &store, &options.identity, existed && found.is_none()).await?;
        report.areas_lost =
            store.lost.iter().map(|lost| (lost.entry.path.clone(), lost.why.clone())).collect();
        let left = rewind::Found {
            superblock: found.as_ref(),
            one_damaged,
            void: notes.rewind_void,
            boot: options.boot,
            identity: options.identity,
        };
        let gate = Gate::new();
        let rewind = rewind::load::<S>(io, &options.dir, &gate, &names, &left, &store).await?;
        report.rewinding = rewind.as_ref().map(|rewind| rewind.snapshot().to_owned());
        next.rewind = rewind.as_ref().map_or(NO_REWIND, |rewind| rewind.id());
        let mut chain = Vec::new();
        if verdict.keep_snapshots {
            let remains = Remains { store: &store, control: notes.words.as_ref() };
            chain = load_chain(io, &options.dir, &next.disk, &names, &remains, &mut report).await?;
        } else {
            let reason = lost.clone().unwrap_or_default();
            drop_snapshots(io, &options.dir, &next.disk, &names, &reason, &mut report).await?;
        }
        let left = Left {
            dir: &options.dir,
            disk: &next.disk,
            names: &names,
            chain: &chain,
            reset: lost,
            boot: options.boot,
        };
        let (overlays, dropped) = Overlays::load(io, &left).await?;
        report.overlays_dropped = dropped;
        let (checkpoints, lost) = Checkpoints::load(io, &options.dir, &names).await?;
        report.checkpoints_lost = lost;
        let forgets_size = begun.is_some() && next.growing_to.is_none();
        if verdict.reset.is_some() || report.unclean && this_boot {
            let settled = settle_image(io, &options.image, notes.words.as_ref()).await;
            if verdict.reset.is_some() || forgets_size {
                settled?;
            }
            // Else it was noted, and a stop of the host ends the history.
        }
        if let Some(reason) = &verdict.reset {
            // The old generation ends durably before its map is cleared or replaced: a stop between
            // the two must not leave a valid generation with an empty map.
            next.state = DiskState::Resetting;
            write_superblock(io, &file, &next).await?;
            if !existed {
                // By name, too: an older superblock may be gone for now only, until a power cut.
                io.sync_dir(&options.dir).map_err(fail())?;
            }
            // Only now: until then it may still go on.
            let ended = found.as_ref().map(|found| found.generation);
            checkpoints.end_generation(io, &options.dir, ended, reason.code()).await;
        }
        let flush_failed = notes.flush_failed();
        // A new one is all zero, and nothing of it is resident.
        let is_new_map = old_map.is_none() || !fits;
        let map_file = match old_map {
            Some((old, len)) if fits => {
                if next.growing_to.is_none() && len != bytes_of(cells) {
                    // The resize is forgotten, and this before its last trace is.
                    io.set_len(&old, bytes_of(cells)).map_err(Error::io("shortening the change map"))?;
                }
                old
            }
            old => replace_map(io, &options.dir, old, cells)?,
        };
        let mapped = Arc::new(io.map(&map_file, cells).map_err(Error::io("mapping the change map"))?);
        let tracker = options.tracking.map(|grid| Tracker::new(mapped.clone(), grid, capacity));
        let control = Control::new(mapped.clone());
        notes::hold(io, &control, &options.name);
        control.note_flush_failed(flush_failed);
        // Of an earlier boot it says nothing.
        control.note_rewind_void(notes.rewind_void == Some(true));
        if verdict.reset.is_some() {
            if let Some(tracker) = tracker.as_ref().filter(|_| !is_new_map) {
                clear_map(io, &map_file, tracker, &control, control.map_in_doubt(&options.boot))?;
            }
            next.sequence += 1;
            next.state = DiskState::Serving;
        }
        let mut intent = old_intent.filter(|_| tracker.is_some() && verdict.reset.is_none());
        if let (true, Some(intent), Some(tracker)) = (verdict.presume, &intent, &tracker) {
            report.presumed_changed = presume_changed(intent, tracker, capacity, next.epoch);
        }
        // Durable before it is served: a map that was cleared, what is presumed, and marks of which no log
        // knows.
        if verdict.reset.is_some() || verdict.presume || intent.is_none() {
            io.sync_cells(&mapped).map_err(|source| {
                control.note_map_in_doubt(&options.boot);
                Error::Io { what: "flushing the change map", source }
            })?;
        }
        if intent.is_none() && tracker.is_some() {
            intent = Some(new_intent(io, &options, &names, &next.disk, capacity).await?);
            control.note_log_in_doubt(&options.boot, false);
        }
        let map_in_doubt = control.map_in_doubt(&options.boot);
        if verdict.reset.is_some() {
            control.forget_map_in_doubt();
        }
        if flush_failed || map_in_doubt {
            // What a flush could not write is not written by a later one: a stop of the host ends the history.
            // So it is with what a flush of the image could not write, if an instant holds it.
            next.state = DiskState::Unlogged;
            if let Some(intent) = &intent {
                intent.give_up();
            }
        }
        // Before the superblock says that the disk is served, and after the old generation ended: until then the
        // next opening must see what this one saw.
        control.stir();
        control.give_sign(&options.boot, options.meanwhile.now_ns, options.identity.mtime_ns);
        write_superblock(io, &file, &next).await?;
        overlays.begin(io).await?;
        if rewind.is_none() {
            // Only now: the superblock names none.
            control.note_rewind_void(false);
            rewind::remove_files(io, &options.dir)?;
        }
        // Only now: of a disk that is served it says nothing.
        away::sample::remove(io, &options.dir)?;
        io.sync_dir(&options.dir).map_err(fail())?;
        notes::take_breaks(&control, &chain, &options.name);
        for snapshot in &chain {
            control.set_records(snapshot.sequence, snapshot.loaded_records());
        }
        // Only now: the snapshots of which it may have spoken are gone, and the generation is another.
        control.forget_words_lost();
        claim_slots(&store, &chain)?;
        if let Some(rewind) = &rewind {
            rewind.for_each_slot(|_, slot| {
                store.claim(slot);
            });
        }
        let unused = chain.is_empty() && rewind.is_none();
        areas::settle(io, &options.dir, &id, &mut list, &store, &plan.areas, unused).await?;
        for candidate in wanted {
            store.push(areas::adopt(io, &options.dir, &id, &mut list, candidate).await?);
        }
        store.tidy(io).await;
        // What is there already may be more: it stays, and nothing is added.
        store.budget.begin_limit(plan.limit);
        report.kept.extend(chain.iter().filter(|one| one.is_active()).map(|one| one.name.clone()));
        let disk = Arc::new(Self {
            name: options.name,
            id: next.disk,
            image: options.image,
            dir: options.dir,
            capacity: AtomicU64::new(capacity),
            gate,
            history: History::new(next.generation, next.epoch),
            watch: Watch::new(tracker, chain.last().cloned()),
            intent,
            control,
            last_sequence: AtomicU32::new(chain.last().map_or(0, |last| last.sequence)),
            chain: Chain::new(chain),
            leaving: Mutex::default(),
            deciding: Mutex::default(),
            store,
            areas: Mutex::new(list),
            merge_step: options.merge_step.max(1),
            appender: Appender::default(),
            buffers: Buffers::default(),
            rewind: ArcSwapOption::new(rewind),
            syncing: Claims::default(),
            syncing_map: Claims::default(),
            flushes: Flushes::default(),
            holds: Holds::default(),
            overlays,
            checkpoints,
            began: Mutex::new(
                report.reset.as_ref().map(|why| Began { code: why.code(), at_ns: next.began_ns }),
            ),
            switched_off: AtomicBool::new(next.switched_off),
            superblock: Mutex::new(next),
            superblock_writer: Claims::default(),
            superblock_file: file,
            events: options.events,
            meanwhile: options.meanwhile,
            poisoned: AtomicBool::new(false),
            handed_over: AtomicBool::new(false),
            tracking_at_risk: AtomicBool::new(false),
        });
        disk.collect(io).await?;
        disk.finish_resize(io).await;
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
        self.sync_map(io, &self.map_cells()).await?;
        if let Some(intent) = &self.intent
            && let Err(error) = intent.clear(io).await
        {
            log::debug!("{}: regions stay hot: {}", self.name, with_sources(&error));
        }
        self.write_sample(io).await?;
        io.sync_dir(&self.dir).map_err(Error::io("flushing the state directory"))?;
        let identity = identity().map_err(Error::io("asking for the image's identity"))?;
        self.write_superblock(io, |superblock| {
            // A flush that a guest asks for does not pass the gate, and may have failed meanwhile. One that fails later
            // writes the superblock after this.
            if superblock.state == DiskState::HandedOver || self.control.flush_failed() {
                // With the identity of that instant.
                return;
            }
            let doubt = self.control.map_in_doubt(&superblock.boot);
            superblock.state = if doubt { DiskState::Doubtful } else { DiskState::Clean };
            superblock.identity = identity;
        })
        .await?;
        if self.control.flush_failed() { Err(Error::Poisoned) } else { Ok(()) }
    }
}

/// Makes what the image holds, and its length, what a power cut leaves, before a superblock rests on it.
///
/// Of a new generation the beginning is told, and no mark in it, nor a hot region, tells of what was changed before:
/// were that in the page cache only, a power cut would take it back without a trace. Were the size of a resize that was
/// cut off forgotten before, a power cut could bring that length back, and nobody could explain it. Of an instant that is
/// told the same is true as of a beginning.
async fn settle_image<S: Storage>(
    io: &S,
    image: &S::File,
    words: Option<&Control<S::Cells>>,
) -> Result<(), Error> {
    let Err(source) = io.sync(image).await else { return Ok(()) };
    // It is told once: the next start must not take this one's answer for a success.
    if let Some(words) = words {
        words.note_flush_failed(true);
    }
    Err(Error::Io { what: "flushing the image", source })
}

/// Opens the intent log that a superblock's writer kept, if it is whole.
async fn open_intent<S: Storage>(
    io: &S,
    dir: &S::Dir,
    names: &[String],
    found: &Superblock,
) -> Result<Option<Intent<S>>, Error> {
    if !names.iter().any(|name| name == INTENT_FILE) {
        return Ok(None);
    }
    let file = io.open(dir, INTENT_FILE).map_err(Error::io("opening the intent log"))?;
    Intent::load(io, file, found.disk, found.capacity).await
}

/// Makes an intent log in place of any other. Its name is durable before the disk is served.
async fn new_intent<S: Storage>(
    io: &S,
    options: &DiskOptions<S>,
    names: &[String],
    disk: &[u8; 16],
    capacity: u64,
) -> Result<Intent<S>, Error> {
    let fail = || Error::io("making the intent log");
    if names.iter().any(|name| name == INTENT_FILE) {
        io.remove(&options.dir, INTENT_FILE).map_err(fail())?;
    }
    let file = io.create(&options.dir, INTENT_FILE).map_err(fail())?;
    let region = options.region_bytes.unwrap_or_else(|| intent::region_bytes(capacity));
    Intent::create(io, file, *disk, capacity, region).await
}

/// Marks everything in regions that were hot; how many bytes.
fn presume_changed<S: Storage>(
    intent: &Intent<S>,
    tracker: &Tracker<S::Cells>,
    capacity: u64,
    epoch: Epoch,
) -> u64 {
    let hot = intent.hot_ranges(capacity);
    for range in &hot {
        tracker.mark(*range, epoch);
    }
    hot.iter().map(|range| range.len()).sum()
}

/// Cells of the map of a disk, its control page included.
pub(crate) fn cells_of<C: Cells>(tracking: Option<BlockGrid>, capacity: u64) -> usize {
    tracking.map_or(CONTROL_CELLS, |grid| Tracker::<C>::cells_needed(grid, capacity))
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

/// Makes a new map, all zero, or one of `old` that does not fit. Of that the first page stays: what it notes is true until
/// the superblock is written, and a stop before that must not forget it.
fn replace_map<S: Storage>(
    io: &S,
    dir: &S::Dir,
    old: Option<(S::File, u64)>,
    cells: usize,
) -> Result<S::File, Error> {
    let fail = || Error::io("making the change map");
    let file = match old {
        Some((old, len)) => {
            let kept = if len < PAGE as u64 { 0 } else { PAGE as u64 };
            io.set_len(&old, kept).map_err(fail())?;
            old
        }
        None => io.create(dir, MAP_FILE).map_err(fail())?,
    };
    // Allocated to its end: a store into a hole of a full file system would end the process.
    io.allocate(&file, bytes_of(cells)).map_err(fail())?;
    Ok(file)
}

/// Clears a map; pages in which nothing was ever marked are not touched.
fn clear_map<S: Storage>(
    io: &S,
    map: &S::File,
    tracker: &Tracker<S::Cells>,
    control: &Control<S::Cells>,
    in_doubt: bool,
) -> Result<(), Error> {
    // What was stored and not written yet may pass for a hole. Then nothing does, if that fails, or once did:
    // what a flush could not write none does later.
    let failed = io.sync_cells(tracker.cells()).is_err();
    if failed {
        // Nobody is told again of a control page that was not written: were it clean, its notes would go with the process.
        control.write_again();
    }
    let all = failed || in_doubt;
    for pages in walk::strides(tracker.page_count()) {
        let touched = if all {
            vec![pages]
        } else {
            walk::touched(io, map, pages).map_err(Error::io("clearing the change map"))?
        };
        touched.into_iter().flatten().for_each(|page| tracker.clear_page(page));
    }
    Ok(())
}

pub(crate) fn bytes_of(cells: usize) -> u64 {
    cells as u64 * size_of::<u32>() as u64
}
