//! Old content on its way into the store: what one wake-up of a queue has read goes there together.
//!
//! The first task that has something to append leads: it lets the other tasks of its queue that are
//! ready come forward, then writes the content of all as one run of slots, their records as one run of
//! records, publishes every key, and tells them. Once a batch is [`FULL`] the next task leads another one: what is
//! appended first can be overwritten while the rest is.
//!
//! Invariant: a key is published only after its content and its record are in their files, where they
//! outlive this process; the change that made it necessary comes after that.
//! A stop before the records leaves slots that nobody knows; before the publication, records of content
//! that is also still on the live disk. Both are harmless.
//!
//! What fails before its records were begun is named by nobody: its slots are given back at once. What fails
//! later may be named by records that were half written, and a restart would believe them: rightly, for as
//! long as nobody else has the slots. So those are kept until the index is gone or counts for nothing. If
//! the key is preserved again meanwhile, two records name two slots of the same content; a restart takes the
//! first, and the second slot is free to it and to nobody before it.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::buffers::Buffer;
use crate::disk::Disk;
use crate::error::Error;
use crate::format::GRAIN;
use crate::gate::{LANES, Lane};
use crate::index::{Key, Slot};
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::store::Store;

/// Bytes with which a batch takes no more.
const FULL: usize = 256 << 10;

/// Whole grains of old content of a snapshot, for some of the keys from `first` on. Those are claimed.
pub(crate) struct Item<S: Storage> {
    pub(crate) snapshot: Arc<Snapshot<S>>,
    pub(crate) first: Key,
    /// What was read, from the first key on.
    pub(crate) old: Buffer,
    /// A bit for each grain of `old` that is to be kept, from the lowest on; the others are there already.
    pub(crate) wanted: u64,
}

impl<S: Storage> Item<S> {
    /// Grains that are to be kept.
    fn count(&self) -> usize {
        self.wanted.count_ones() as usize
    }

    /// Keys of the grains that are to be kept, and those grains, in order.
    fn grains(&self) -> impl Iterator<Item = (Key, &[u8])> {
        let all = (self.first.to_raw()..).map(Key::from_raw).zip(self.old.chunks_exact(GRAIN));
        all.enumerate().filter(|(nth, _)| self.wanted >> nth & 1 != 0).map(|(_, grain)| grain)
    }
}

/// Items that are written together.
struct Batch<S: Storage> {
    state: Mutex<State<S>>,
}

struct State<S: Storage> {
    items: Vec<Item<S>>,
    waiting: Vec<Waker>,
    outcome: Option<Result<(), Failure>>,
}

/// What a task is in a batch.
enum Part<S: Storage> {
    Leads(Arc<Batch<S>>),
    Joins(Arc<Batch<S>>),
}

/// An error that several are told.
#[derive(Clone, Copy)]
enum Failure {
    Io { what: &'static str, kind: io::ErrorKind, code: Option<i32> },
    Limit { what: &'static str },
}

/// Slots that were taken for what then failed.
struct Orphans<S: Storage> {
    slots: Vec<u32>,
    /// Those that records may have been written for.
    snapshots: Vec<Arc<Snapshot<S>>>,
}

/// The batch that is open to more items, if there is one.
type Forming<S> = Option<Arc<Batch<S>>>;

/// Batches that are open to more items, by queue.
pub(crate) struct Appender<S: Storage> {
    forming: Box<[Mutex<Forming<S>>]>,
    orphans: Mutex<Vec<Orphans<S>>>,
}

impl<S: Storage> Default for Appender<S> {
    fn default() -> Self {
        Self { forming: (0..LANES).map(|_| Mutex::default()).collect(), orphans: Mutex::default() }
    }
}

impl<S: Storage> Appender<S> {
    /// Appends an item; when this answers, its keys are published.
    pub(crate) async fn append(
        &self,
        io: &S,
        disk: &Disk<S>,
        lane: Lane,
        item: Item<S>,
    ) -> Result<(), Error> {
        let batch = match self.join(lane, item) {
            Part::Leads(batch) => return self.lead(io, disk, lane, &batch).await,
            Part::Joins(batch) => batch,
        };
        poll_fn(|cx| {
            let mut state = batch.lock();
            match state.outcome {
                Some(outcome) => Poll::Ready(outcome.map_err(Failure::again)),
                None => {
                    state.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Joins the batch that is forming, if it has room, or begins one.
    fn join(&self, lane: Lane, item: Item<S>) -> Part<S> {
        let mut forming = self.forming(lane);
        if let Some(batch) = &*forming {
            let mut state = batch.lock();
            if state.items.iter().map(|item| item.old.len()).sum::<usize>() < FULL {
                state.items.push(item);
                return Part::Joins(batch.clone());
            }
        }
        let state = State { items: vec![item], waiting: Vec::new(), outcome: None };
        Part::Leads(forming.insert(Arc::new(Batch { state: Mutex::new(state) })).clone())
    }

    fn forming(&self, lane: Lane) -> MutexGuard<'_, Forming<S>> {
        self.forming[lane.index()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn lead(&self, io: &S, disk: &Disk<S>, lane: Lane, batch: &Arc<Batch<S>>) -> Result<(), Error> {
        // Whoever is ready now has read its old content in the same wake-up.
        let mut turns = 0;
        poll_fn(|cx| {
            turns += 1;
            if turns > 1 {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        // It is not the one that is forming any more if it is full and there is a next one.
        self.forming(lane).take_if(|forming| Arc::ptr_eq(forming, batch));
        let items = std::mem::take(&mut batch.lock().items);
        let result = self.write(io, disk, &items).await;
        let outcome = result.as_ref().map(|&()| ()).map_err(Failure::of);
        let mut state = batch.lock();
        state.outcome = Some(outcome);
        state.waiting.drain(..).for_each(Waker::wake);
        drop(state);
        result
    }
}

impl<S: Storage> Appender<S> {
    /// Content, then records, then publication.
    async fn write(&self, io: &S, disk: &Disk<S>, items: &[Item<S>]) -> Result<(), Error> {
        let grains: Vec<&[u8]> = items.iter().flat_map(Item::grains).map(|(_, grain)| grain).collect();
        let full: Vec<bool> = grains.iter().map(|grain| !is_zero(grain)).collect();
        let content: Vec<&[u8]> =
            grains.into_iter().zip(&full).filter(|(_, full)| **full).map(|(grain, _)| grain).collect();
        let shares = shares(items, &full);
        reserve(&shares)?;
        let runs = match self.fill(io, disk, &content).await {
            Ok(runs) => runs,
            Err(error) => {
                shares.iter().for_each(|(snapshot, slots)| snapshot.let_go(*slots));
                return Err(error);
            }
        };
        let mut numbers = runs.iter().cloned().flatten();
        let slot = |full| match if full { numbers.next() } else { None } {
            Some(slot) => Slot::At(slot),
            None => Slot::Zero,
        };
        let slots: Vec<Slot> = full.iter().copied().map(slot).collect();
        let (rest, result) = record(io, disk, items, &slots).await;
        if result.is_err() {
            // What was published before it is not concerned.
            let done: usize = items[..items.len() - rest.len()].iter().map(Item::count).sum();
            let named = slots[done..].iter();
            let slots =
                named.filter_map(|slot| if let Slot::At(number) = slot { Some(*number) } else { None });
            let snapshots = rest.iter().map(|item| item.snapshot.clone()).collect();
            for (snapshot, slots) in self::shares(rest, &full[done..]) {
                snapshot.let_go(slots);
            }
            self.orphans().push(Orphans { slots: slots.collect(), snapshots });
        }
        result
    }

    /// Writes content to slots, of the next area if one refuses.
    async fn fill(&self, io: &S, disk: &Disk<S>, content: &[&[u8]]) -> Result<Vec<Range<u32>>, Error> {
        loop {
            let runs = disk.store.take(u32::try_from(content.len()).unwrap_or(u32::MAX))?;
            match write_runs(io, &disk.store, &runs, content).await {
                Ok(()) => return Ok(runs),
                Err(error) => {
                    disk.store.discard(runs.into_iter().flatten().collect());
                    if !disk.store.has_another() {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Puts aside for good what was taken for appends that failed.
    ///
    /// Not before the snapshot's index is gone, or it is known to be broken: until then a restart would
    /// believe the records that may have been written.
    pub(crate) fn bury(&self, store: &Store<S>) {
        let mut orphans = self.orphans();
        let void =
            |one: &mut Orphans<S>| one.snapshots.iter().all(|one| one.broken().is_some() || one.is_gone());
        for one in orphans.extract_if(.., void) {
            store.discard(one.slots);
        }
    }

    /// Bytes of what was taken for appends that failed and is still kept.
    pub(crate) fn bytes_orphaned(&self) -> u64 {
        self.orphans().iter().map(|one| one.slots.len() as u64).sum::<u64>() * GRAIN as u64
    }

    fn orphans(&self) -> MutexGuard<'_, Vec<Orphans<S>>> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills runs of slots with `content`, a grain each.
async fn write_runs<S: Storage>(
    io: &S,
    store: &Store<S>,
    runs: &[Range<u32>],
    mut content: &[&[u8]],
) -> Result<(), Error> {
    for run in runs {
        let (here, rest) = content.split_at(run.len());
        let slices: Vec<IoSlice<'_>> = here.iter().map(|grain| IoSlice::new(grain)).collect();
        store.write(io, run.start, &slices).await?;
        content = rest;
    }
    Ok(())
}

impl<S: Storage> Batch<S> {
    fn lock(&self) -> MutexGuard<'_, State<S>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Snapshots, and how many slots each of them needs for its part of `items`.
fn shares<'a, S: Storage>(items: &'a [Item<S>], mut full: &[bool]) -> Vec<(&'a Arc<Snapshot<S>>, u64)> {
    let mut shares: Vec<(&Arc<Snapshot<S>>, u64)> = Vec::with_capacity(1);
    for item in items {
        let (mine, others) = full.split_at(item.count());
        full = others;
        let slots = mine.iter().filter(|full| **full).count() as u64;
        match shares.last_mut() {
            Some((snapshot, sum)) if Arc::ptr_eq(snapshot, &item.snapshot) => *sum += slots,
            _ => shares.push((&item.snapshot, slots)),
        }
    }
    shares
}

/// Lets every snapshot hold its share, or none.
fn reserve<S: Storage>(shares: &[(&Arc<Snapshot<S>>, u64)]) -> Result<(), Error> {
    for (nth, (snapshot, slots)) in shares.iter().enumerate() {
        if let Err(error) = snapshot.take_up(*slots) {
            shares[..nth].iter().for_each(|(snapshot, slots)| snapshot.let_go(*slots));
            return Err(error);
        }
    }
    Ok(())
}

/// Writes the records of `items`, whose grains are in `slots`, and publishes their keys. Answers those that
/// it did not come to, too.
async fn record<'a, S: Storage>(
    io: &S,
    disk: &Disk<S>,
    items: &'a [Item<S>],
    mut slots: &[Slot],
) -> (&'a [Item<S>], Result<(), Error>) {
    let mut rest = items;
    while let Some(first) = rest.first() {
        // Nearly always all are of the newest snapshot.
        let same = rest.iter().take_while(|item| Arc::ptr_eq(&item.snapshot, &first.snapshot)).count();
        let mut entries = Vec::new();
        for item in &rest[..same] {
            let (mine, others) = slots.split_at(item.count());
            entries.extend(item.grains().map(|(key, _)| key).zip(mine.iter().copied()));
            slots = others;
        }
        if let Err(error) = first.snapshot.record(io, &disk.control, &entries).await {
            return (rest, Err(error));
        }
        // Under the claims of the items nothing of them is released.
        first.snapshot.publish(&entries);
        rest = &rest[same..];
    }
    (rest, Ok(()))
}

/// Whether every byte is zero.
fn is_zero(bytes: &[u8]) -> bool {
    // Compared with itself one byte on, which the library does by words.
    bytes.first().is_none_or(|&first| first == 0) && bytes[1..] == bytes[..bytes.len() - 1]
}

impl Failure {
    fn of(error: &Error) -> Self {
        match error {
            Error::Io { what, source } => Self::Io { what, kind: source.kind(), code: source.raw_os_error() },
            Error::LimitReached { what } => Self::Limit { what },
            _ => Self::Io { what: "writing to the difference store", kind: io::ErrorKind::Other, code: None },
        }
    }

    fn again(self) -> Error {
        match self {
            Self::Io { what, kind, code } => {
                let source = code.map_or_else(|| kind.into(), io::Error::from_raw_os_error);
                Error::Io { what, source }
            }
            Self::Limit { what } => Error::LimitReached { what },
        }
    }
}
