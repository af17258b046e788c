//! A disk: the verbs of a guest, in the order of their effects.
//!
//! ```text
//! pass the gate                     (a snapshot in creation waits for us, or we for it)
//! freeze the pages of the map       (into the newest snapshot, before their first mark since)
//! mark the blocks                   (before the data: a stop over-reports, never under-reports)
//! wait until the region is hot      (a stop of the host may lose marks: then the whole region counts)
//! preserve the old grains           (read, append, publish, under a claim)
//! submit the change
//! ```
//!
//! Invariant: after each line a stop leaves marks that cover what changed, every held snapshot
//! intact, and the request done or not begun as far as anyone was told.
//! Absent: where requests come from, and reading of snapshots ([`crate::View`]).

use std::sync::atomic::Ordering::{Acquire, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use cbt::{BlockGrid, ByteRange, ChangeId, PAGE_BYTES, PageIndex};

use crate::append::Appender;
use crate::away::Meanwhile;
use crate::behind::Backlog;
use crate::buffers::Buffers;
use crate::chain::{Chain, List};
use crate::checkpoint::Checkpoints;
use crate::claims::Claims;
use crate::error::Error;
use crate::flushes::Flushes;
use crate::format::{Broken, GRAIN, Superblock};
use crate::gate::{Gate, Lane};
use crate::index::Key;
use crate::intent::Intent;
use crate::memory::{AlignedBuf, Source, Target};
use crate::open::ResetReason;
use crate::overflow::{GiveUp, Holds, Stuck};
use crate::overlay::Overlays;
use crate::preserve::{preserve, stretch};
use crate::rewind;
use crate::snapshot::Snapshot;
use crate::status::Began;
use crate::storage::{Durability, Storage, Zeroing};
use crate::store::Store;
use crate::tracker::{Control, History, Tracker};
use crate::watch::Watch;

/// Something that happened to a disk without anyone asking for it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A snapshot lost something that it needs; its readers get errors from now on.
    SnapshotBroken {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
        /// Why, as a stable code for programs: `store-full` or `io-error`.
        code: &'static str,
        /// Why, as a sentence.
        reason: String,
    },
    /// The disk became a snapshot again; what differs is copied back from now on.
    RewindStarted {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
        /// Bytes that are to be copied back.
        bytes: u64,
    },
    /// A new generation began while the disk was served: incremental backups begin anew.
    TrackerReset {
        /// The disk.
        disk: String,
        /// The beginning of the generation.
        change_id: ChangeId,
        /// Why.
        reason: ResetReason,
    },
    /// Everything is copied back.
    RewindCompleted {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
    },
    /// Something cannot be copied back, or read. It is tried again.
    RewindFailed {
        /// The disk.
        disk: String,
        /// The snapshot.
        snapshot: String,
        /// Why, as a sentence.
        reason: String,
    },
    /// Changes up to a checkpoint cannot be told any more: its file is damaged.
    CheckpointDamaged {
        /// The disk.
        disk: String,
        /// The checkpoint.
        checkpoint: String,
        /// Why, as a sentence.
        reason: String,
    },
    /// Guests' writes wait or fail because old content cannot be preserved, as the operator chose.
    Overflow {
        /// The disk.
        disk: String,
        /// They fail; otherwise they wait.
        fails: bool,
        /// How long they wait at most, in seconds.
        hold_seconds: u32,
        /// Why, as a sentence.
        reason: String,
    },
}

/// Takes events from any thread; must not block.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

/// Zeros that are written at once where the file system cannot zero a range.
const ZEROS: usize = 256 << 10;

/// A disk of a guest, shared by all queues that serve it.
///
/// Price of its shape: a change costs two atomic additions on its queue's own cache line and a store
/// per block; the first change of a grain after a snapshot costs a read and a copy besides.
pub struct Disk<S: Storage> {
    pub(crate) name: String,
    pub(crate) id: [u8; 16],
    pub(crate) image: S::File,
    pub(crate) dir: S::Dir,
    /// Only grows: what was within it stays so.
    pub(crate) capacity: AtomicU64,
    pub(crate) gate: Gate,
    pub(crate) history: History,
    /// Where changes are marked, if they are, and preserved into.
    pub(crate) watch: Watch<S>,
    /// Changes are not marked, though there is a tracker; see [`crate::switch`].
    pub(crate) switched_off: AtomicBool,
    /// Where marks may not be on their medium, if changes are tracked.
    pub(crate) intent: Option<Intent<S>>,
    pub(crate) control: Control<S::Cells>,
    /// Deleted ones included, as long as an older one needs them.
    pub(crate) chain: Chain<S>,
    /// The highest number that was given to a snapshot since the disk was opened.
    pub(crate) last_sequence: AtomicU32,
    /// Deleted ones whose slots are still to be given back.
    pub(crate) leaving: Mutex<Vec<Arc<Snapshot<S>>>>,
    /// Held by who decides which slots nobody needs; see [`crate::release`].
    pub(crate) deciding: Mutex<()>,
    pub(crate) store: Store<S>,
    /// Which areas the store has.
    pub(crate) areas: Mutex<crate::areas::List>,
    pub(crate) merge_step: u64,
    pub(crate) appender: Appender<S>,
    pub(crate) buffers: Buffers,
    /// Changes that wait for space in the store.
    pub(crate) holds: Holds,
    /// What the disk is on its way back to.
    pub(crate) rewind: rewind::Current<S>,
    /// Who makes the store durable, and breaks what was lost.
    pub(crate) syncing: Claims,
    /// Who makes the map durable, and notes if it could not.
    pub(crate) syncing_map: Claims,
    /// Of the image.
    pub(crate) flushes: Flushes,
    /// What stands on the snapshots' views.
    pub(crate) overlays: Overlays<S>,
    /// Instants that have a name.
    pub(crate) checkpoints: Checkpoints,
    /// Why the generation began, if it did since the disk was opened.
    pub(crate) began: Mutex<Option<Began>>,
    pub(crate) superblock: Mutex<Superblock>,
    /// Who writes it.
    pub(crate) superblock_writer: Claims,
    pub(crate) superblock_file: S::File,
    pub(crate) events: EventSink,
    /// What was said of the image when the disk was opened.
    pub(crate) meanwhile: Meanwhile,
    pub(crate) poisoned: AtomicBool,
    /// Nothing is changed any more; see [`crate::handover`].
    pub(crate) handed_over: AtomicBool,
    /// See [`Disk::is_tracking_at_risk`].
    pub(crate) tracking_at_risk: AtomicBool,
}

impl<S: Storage> Disk<S> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Acquire)
    }

    /// The file or device that the guest's data is in.
    pub fn image(&self) -> &S::File {
        &self.image
    }

    /// The grid of tracked blocks, if changes are tracked.
    pub fn block_grid(&self) -> Option<BlockGrid> {
        self.marking().map(|tracker| tracker.grid())
    }

    /// The last instant that was taken, or the beginning of the generation: what changed since
    /// then is what is marked in the current epoch.
    pub fn change_id(&self) -> ChangeId {
        // The epoch first: the new one with the old generation would be an instant that never was.
        let epoch = self.history.epoch().previous();
        ChangeId { generation: self.history.generation(), epoch }
    }

    /// A counter for one more queue, or other source of changes.
    pub fn lane(&self) -> Lane {
        self.gate.lane()
    }

    /// Bytes of old content in the difference store, what is still to be given back included.
    pub fn bytes_stored(&self) -> u64 {
        self.store.bytes_taken()
    }

    /// Bytes of slots that are kept because records of appends that failed may name them.
    pub fn bytes_orphaned(&self) -> u64 {
        self.appender.bytes_orphaned()
    }

    /// Reads from the live disk.
    ///
    /// # Errors
    /// [`Error::PastEnd`] if the range passes the disk's end: requests are checked where they enter, and the disk
    /// may have become smaller since. Those of the image.
    pub async fn read(&self, io: &S, at: u64, into: Target<'_>) -> Result<(), Error> {
        let range = self.check(at, into.len() as u64)?;
        if self.rewind.load().is_some() {
            return Box::pin(self.read_rewinding(io, range, into)).await;
        }
        self.read_image(io, at, into).await
    }

    pub(crate) async fn read_image(&self, io: &S, at: u64, into: Target<'_>) -> Result<(), Error> {
        io.read(&self.image, at, into).await.map_err(Error::io("reading the image"))
    }

    /// Writes to the live disk; see the module for the order of effects.
    ///
    /// # Errors
    /// As of [`Disk::read`]; what the operator chose to be told, if old content cannot be preserved.
    pub async fn write(
        &self,
        io: &S,
        lane: Lane,
        at: u64,
        from: Source<'_>,
        durability: Durability,
    ) -> Result<(), Error> {
        let range = self.check(at, from.len() as u64)?;
        let _pass = self.admit(io, lane, range).await?;
        // Within the gate: a rewind begins behind a closed one.
        if self.rewind.load().is_some() {
            Box::pin(self.write_rewinding(io, range, from)).await?;
        } else {
            self.write_image(io, at, from).await?;
        }
        match durability {
            Durability::Cached => Ok(()),
            // Not a durable write: a failed one would take the news of an earlier loss from the next flush.
            Durability::Durable => self.flush(io).await,
        }
    }

    pub(crate) async fn write_image(&self, io: &S, at: u64, from: Source<'_>) -> Result<(), Error> {
        io.write(&self.image, at, from).await.map_err(Error::io("writing the image"))
    }

    /// Makes every change that was answered before this durable.
    ///
    /// # Errors
    /// Once a flush has failed all later ones fail: the kernel may have dropped what it could not
    /// write, and would report the next flush as a success.
    pub async fn flush(&self, io: &S) -> Result<(), Error> {
        if self.rewind.load().is_some() {
            return Box::pin(self.flush_rewinding(io)).await;
        }
        self.flush_image(io).await
    }

    pub(crate) async fn flush_image(&self, io: &S) -> Result<(), Error> {
        self.flushes
            .flush(async || {
                self.check_poisoned()?;
                let Err(source) = io.sync(&self.image).await else { return Ok(()) };
                Box::pin(self.poison(io, &format!("flushing the image failed: {source}"))).await;
                Err(Error::Io { what: "flushing the image", source })
            })
            .await?;
        // There are other reasons.
        self.check_poisoned()
    }

    pub(crate) fn check_poisoned(&self) -> Result<(), Error> {
        if self.poisoned.load(SeqCst) { Err(Error::Poisoned) } else { Ok(()) }
    }

    /// Gives back the space of a range, whose content nobody needs. It reads as zeros where the image
    /// can do that, and as before where it cannot (VIRTIO 1.2 §5.2.6.2 allows either).
    ///
    /// # Errors
    /// As of [`Disk::write`].
    pub async fn discard(&self, io: &S, lane: Lane, range: ByteRange) -> Result<(), Error> {
        self.check(range.start(), range.len())?;
        let _pass = self.admit(io, lane, range).await?;
        if self.rewind.load().is_some() {
            return Box::pin(self.discard_rewinding(io, range)).await;
        }
        match io.zero(&self.image, range, Zeroing::Unmap).await {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            result => result.map_err(Error::io("discarding a range of the image")),
        }
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// As of [`Disk::write`].
    pub async fn write_zeroes(
        &self,
        io: &S,
        lane: Lane,
        range: ByteRange,
        zeroing: Zeroing,
        durability: Durability,
    ) -> Result<(), Error> {
        self.check(range.start(), range.len())?;
        let _pass = self.admit(io, lane, range).await?;
        if self.rewind.load().is_some() {
            Box::pin(self.zero_rewinding(io, range, zeroing)).await?;
        } else {
            self.zero(io, range, zeroing).await?;
        }
        match durability {
            Durability::Cached => Ok(()),
            Durability::Durable => self.flush(io).await,
        }
    }

    /// Zeros by the file system's means, else by writing zeros.
    pub(crate) async fn zero(&self, io: &S, range: ByteRange, zeroing: Zeroing) -> Result<(), Error> {
        let unsupported = |error: &std::io::Error| error.kind() == std::io::ErrorKind::Unsupported;
        let fail = || Error::io("zeroing a range of the image");
        let mut result = io.zero(&self.image, range, zeroing).await;
        if zeroing == Zeroing::Unmap && result.as_ref().is_err_and(unsupported) {
            result = io.zero(&self.image, range, Zeroing::Keep).await;
        }
        if !result.as_ref().is_err_and(unsupported) {
            return result.map_err(fail());
        }
        let zeros = AlignedBuf::zeroed(ZEROS);
        let mut at = range.start();
        while at < range.end() {
            let len = (range.end() - at).min(ZEROS as u64);
            let part = Source::of(&zeros[..usize::try_from(len).unwrap_or(ZEROS)]);
            io.write(&self.image, at, part).await.map_err(fail())?;
            at += len;
        }
        Ok(())
    }

    /// Everything that must have happened before `range` changes. Inside the gate.
    ///
    /// Fails only if the operator chose so: otherwise what cannot be preserved breaks the snapshot.
    pub(crate) async fn before_change(
        &self,
        io: &S,
        lane: Lane,
        range: ByteRange,
        give_up: Option<GiveUp>,
    ) -> Result<(), Box<Stuck>> {
        if range.is_empty() {
            return Ok(());
        }
        // Counted inside the gate before: a beat that was not seen here sees us there.
        self.control.stir();
        let epoch = self.history.epoch();
        let watching = self.watch.look();
        let tracker = watching.tracker.as_ref().filter(|_| !self.is_switched_off());
        let newest = watching.newest.as_ref().filter(|snapshot| snapshot.broken().is_none());
        if let Some(snapshot) = newest {
            let frozen = tracker.is_none_or(|tracker| tracker.is_open(range, epoch));
            let mut grains = kept_grains(snapshot, range);
            let preserved = frozen && grains.all(|grain| snapshot.has(Key::grain(grain)));
            if !preserved {
                // Rare beside the other ways through here, and its state is large: kept out of
                // the future that every request carries.
                let snapshot = Arc::clone(snapshot);
                drop(watching);
                return Box::pin(self.mark_and_preserve(io, lane, snapshot, range, give_up)).await;
            }
        }
        if let Some(tracker) = tracker {
            tracker.mark(range, epoch);
        }
        if !self.is_covered(range) {
            Box::pin(self.cover(io, range)).await;
        }
        Ok(())
    }

    /// Freezes the pages of the map that `range` is about to mark, into `snapshot` if anybody still
    /// preserves into it, then marks. Inside the gate. Fails only if the operator chose so.
    pub(crate) async fn freeze_and_mark(
        &self,
        io: &S,
        lane: Lane,
        snapshot: Option<&Arc<Snapshot<S>>>,
        range: ByteRange,
        give_up: Option<GiveUp>,
    ) -> Result<(), Box<Stuck>> {
        let Some(tracker) = self.marking() else { return Ok(()) };
        if let Some(snapshot) = snapshot
            && let Err(error) = self.freeze(io, lane, &tracker, snapshot, range).await
        {
            self.give_way(io, snapshot, error, give_up).await?;
        }
        // Only now: a mark made earlier would be in the frozen page's place.
        tracker.mark(range, self.history.epoch());
        Ok(())
    }

    async fn mark_and_preserve(
        &self,
        io: &S,
        lane: Lane,
        snapshot: Arc<Snapshot<S>>,
        range: ByteRange,
        give_up: Option<GiveUp>,
    ) -> Result<(), Box<Stuck>> {
        let preserving = snapshot.begin_preserving();
        self.freeze_and_mark(io, lane, preserving.is_some().then_some(&snapshot), range, give_up).await?;
        if !self.is_covered(range) {
            self.cover(io, range).await;
        }
        if preserving.is_none() {
            return Ok(());
        }
        let grains = kept_grains(&snapshot, range);
        if let Some(more) = stretch(&snapshot, self.tracker_grid(), &grains)
            && snapshot.is_roomy()
            && self.store.is_roomy()
        {
            match self.preserve_grains(io, lane, &snapshot, more).await {
                Ok(()) => return Ok(()),
                // It may be what nobody asked for that could not be read, or had no room.
                Err(_) => snapshot.spare(),
            }
        }
        match self.preserve_grains(io, lane, &snapshot, grains).await {
            Ok(()) => Ok(()),
            Err(error) => self.give_way(io, &snapshot, error, give_up).await,
        }
    }

    async fn preserve_grains(
        &self,
        io: &S,
        lane: Lane,
        snapshot: &Arc<Snapshot<S>>,
        grains: std::ops::Range<u64>,
    ) -> Result<(), Error> {
        let keys = Key::grain(grains.start)..Key::grain(grains.end);
        let old =
            async |keys: std::ops::Range<Key>, buffer: &mut [u8]| self.read_grains(io, keys, buffer).await;
        preserve(io, self, lane, snapshot, keys, old).await
    }

    /// Preserves the pages of the map that `range` is about to mark for the first time since the
    /// newest snapshot.
    async fn freeze(
        &self,
        io: &S,
        lane: Lane,
        tracker: &Tracker<S::Cells>,
        snapshot: &Arc<Snapshot<S>>,
        range: ByteRange,
    ) -> Result<(), Error> {
        let epoch = self.history.epoch();
        let old = async |keys: std::ops::Range<Key>, buffer: &mut [u8]| {
            let pages = keys.start.to_map_page()..keys.end.to_map_page();
            for (page, out) in pages.zip(buffer.as_chunks_mut::<PAGE_BYTES>().0) {
                tracker.copy_page(page, out);
            }
            Ok(())
        };
        // A snapshot of another generation is asked for its content, never for its changes.
        let wanted = snapshot.tracked && snapshot.generation == self.history.generation();
        let known = tracker.pages_of(ByteRange::new(0, snapshot.capacity)).end;
        for page in tracker.pages_of(range) {
            if tracker.is_page_open(page, epoch) {
                continue;
            }
            // One that is wholly past the snapshot's end says nothing of it.
            if wanted && page < known {
                preserve(io, self, lane, snapshot, Key::map_page(page)..Key::map_page(page + 1), &old)
                    .await?;
            }
            tracker.open_page(page, epoch);
        }
        Ok(())
    }

    /// Fills `buffer` with the grains of `keys` as the live disk has them; zeros past its end.
    async fn read_grains(&self, io: &S, keys: std::ops::Range<Key>, buffer: &mut [u8]) -> Result<(), Error> {
        let start = keys.start.to_raw() * GRAIN as u64;
        let len = (self.capacity() - start).min(buffer.len() as u64);
        let (part, past) = buffer.split_at_mut(usize::try_from(len).unwrap_or(usize::MAX));
        past.fill(0);
        io.read(&self.image, start, Target::of(part))
            .await
            .map_err(Error::io("reading old content of the image"))
    }

    /// Gives up a snapshot, before the change that it could not be preserved from, and the older ones,
    /// which look through it for what they do not have.
    ///
    /// The note in the mapped control page comes first and cannot fail: if the process ends now, they
    /// are still known to be broken. Then readers are told, then the heads.
    pub(crate) async fn break_snapshot(&self, io: &S, snapshot: &Snapshot<S>, error: &Error) {
        let before = self.control.note_broken(snapshot.sequence);
        let reason = with_sources(error);
        let broken = |reason: String| Broken { reason, errno: error.errno(), at_ns: now_ns() };
        let with = format!("it needs snapshot '{}', which broke: {reason}", snapshot.name);
        // Those that look through it first: who finds it broken changes what they need of the live disk without
        // preserving it, and its slots are soon others'. A reader that has seen either finds its own snapshot broken.
        let mut older = List::clone(&self.chain.now());
        older.retain(|one| one.sequence < snapshot.sequence && one.set_broken(broken(with.clone())));
        let is_first = snapshot.set_broken(broken(reason.clone()));
        if !is_first && older.is_empty() {
            return;
        }
        let code = if error.is_out_of_space() { "store-full" } else { error.code() };
        if is_first {
            self.announce(snapshot, code, &reason);
        }
        older.iter().for_each(|one| self.announce(one, code, &with));
        // Nobody waits for the sake of a broken one.
        self.holds.retry();
        let mut written = if is_first { snapshot.write_head(io).await } else { Ok(()) };
        for one in &older {
            written = written.and(one.write_head(io).await);
        }
        match written {
            // Of two at a time neither knows that all heads are written.
            Ok(()) if before == 0 && is_first => self.control.forget_broken(snapshot.sequence),
            Ok(()) => {}
            Err(error) => {
                log::warn!(
                    "{}: cannot note that in the snapshots' heads: {}",
                    self.name,
                    with_sources(&error)
                );
            }
        }
    }

    fn announce(&self, snapshot: &Snapshot<S>, code: &'static str, reason: &str) {
        log::warn!("{}: snapshot '{}' is broken: {reason}", self.name, snapshot.name);
        if snapshot.is_active() {
            (self.events)(Event::SnapshotBroken {
                disk: self.name.clone(),
                snapshot: snapshot.name.clone(),
                code,
                reason: reason.to_owned(),
            });
        }
    }

    /// Looks whether what was written for snapshots reached its medium, and breaks those for which it
    /// did not: the page cache may have dropped what a full or failing device refused.
    ///
    /// To be called now and then, after [`Disk::ease_stores`]; costs nothing if nothing was written since.
    pub async fn check_stores(&self, io: &S) {
        if self.store.has_grown() {
            self.sync_store(io).await;
        }
        for snapshot in self.chain.now().iter().filter(|one| one.has_grown()) {
            self.sync_snapshot(io, snapshot).await;
        }
    }

    /// Bytes of the host's page cache that the store takes, as far as it was written since the disk was opened.
    pub fn cached_bytes(&self) -> u64 {
        self.store.cached()
    }

    /// Keeps the page cache that the store takes within bounds: some of what was written long ago leaves it, if it is
    /// more than `kept` bytes. Answers what is left. Blocks the thread; what is lost on the way breaks the snapshots.
    pub async fn write_behind(&self, io: &S, kept: u64) -> Backlog {
        let done = self.store.write_behind(io, kept);
        self.or_break(io, done).await.unwrap_or(Backlog::Nothing)
    }

    /// Writes a little of the store back that [`Disk::check_stores`] would have to write at once, beside guests;
    /// whether there was something. Blocks the thread; what is lost on the way breaks the snapshots.
    pub async fn ease_stores(&self, io: &S) -> bool {
        let done = self.store.ease(io);
        self.or_break(io, done).await.unwrap_or(false)
    }

    /// The answer of writing back; what was lost breaks all that may have content in it.
    async fn or_break<T>(&self, io: &S, done: Result<T, Error>) -> Option<T> {
        match done {
            Ok(answer) => Some(answer),
            Err(error) => {
                if let Some(newest) = self.chain.now().last() {
                    self.break_snapshot(io, newest, &error).await;
                }
                None
            }
        }
    }

    /// Makes the store durable, or breaks all that may have content in it.
    pub(crate) async fn sync_store(&self, io: &S) {
        // A failure is told once: who comes second must find broken what the first lost.
        let _one = self.syncing.claim(0..1).await;
        let Err(error) = self.store.sync(io).await else { return };
        // Looked for only now: one that was taken meanwhile may have lost content too.
        let newest = self.chain.now().last().cloned();
        if let Some(newest) = newest {
            self.break_snapshot(io, &newest, &error).await;
        }
    }

    /// Makes a snapshot's index durable, or breaks it.
    pub(crate) async fn sync_snapshot(&self, io: &S, snapshot: &Snapshot<S>) {
        if snapshot.broken().is_none()
            && let Err(error) = snapshot.sync(io).await
        {
            self.break_snapshot(io, snapshot, &error).await;
        }
    }

    /// The snapshots that a user sees, oldest first.
    pub fn snapshots(&self) -> Vec<Arc<Snapshot<S>>> {
        self.chain.now().iter().filter(|snapshot| snapshot.is_active()).cloned().collect()
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, name: &str) -> Result<Arc<Snapshot<S>>, Error> {
        self.snapshots()
            .into_iter()
            .find(|snapshot| snapshot.name == name)
            .ok_or_else(|| Error::NoSuchSnapshot { disk: self.name.clone(), name: name.to_owned() })
    }

    /// Checks that `len` bytes at `at` are on the disk.
    pub(crate) fn check(&self, at: u64, len: u64) -> Result<ByteRange, Error> {
        let size = self.capacity();
        let range = ByteRange::at(at, len).filter(|range| range.end() <= size);
        range.ok_or_else(|| Error::PastEnd { disk: self.name.clone(), offset: at, length: len, size })
    }
}

pub(crate) fn grains_of(range: ByteRange) -> std::ops::Range<u64> {
    const SHIFT: u32 = GRAIN.trailing_zeros();
    (range.start() >> SHIFT)..range.end().div_ceil(GRAIN as u64)
}

/// The grains of `range` that `snapshot` has to keep: none past its end, which a resize may have moved away
/// from the disk's.
fn kept_grains<S: Storage>(snapshot: &Snapshot<S>, range: ByteRange) -> std::ops::Range<u64> {
    const SHIFT: u32 = GRAIN.trailing_zeros();
    let first = range.start() >> SHIFT;
    first..range.end().div_ceil(GRAIN as u64).min(snapshot.grains()).max(first)
}

impl Key {
    /// The page of the map that this key stands for.
    fn to_map_page(self) -> PageIndex {
        self.to_raw() & !Key::map_page(0).to_raw()
    }
}

/// The time of day in nanoseconds since 1970, or 0.
pub(crate) fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.ok().and_then(|now| u64::try_from(now.as_nanos()).ok()).unwrap_or(0)
}

/// An error with its sources, on one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
