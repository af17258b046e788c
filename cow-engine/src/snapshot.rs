//! One snapshot: its place in the chain, and the store of what was preserved for it.
//!
//! A snapshot's view of a grain is in its own store, or in that of the next newer snapshot that has
//! it, or still on the live disk. Each snapshot knows its newer neighbour, so a look-up walks up the
//! chain without a lock.
//!
//! Invariant: a key is in the index only after its content and its record are in the store's files,
//! where they outlive this process; the change that made it necessary comes after that.
//! Absent: the decision what to preserve ([`crate::preserve`]) and reading ([`crate::view`]).

use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};

use cbt::{ChangeId, Epoch, Generation};
use zerocopy::{FromBytes, IntoBytes};

use crate::claims::Claims;
use crate::error::Error;
use crate::format::{self, GRAIN, PAGE, RECORD, RawRecord, SnapshotHeader, SnapshotState};
use crate::index::{Index, Key, Slot};
use crate::memory::{AlignedBuf, Source, Target};
use crate::storage::{Durability, Storage};

/// A snapshot of one disk. See the module.
pub struct Snapshot<S: Storage> {
    pub(crate) sequence: u32,
    pub(crate) name: String,
    pub(crate) group: [u8; 16],
    pub(crate) generation: Generation,
    /// The last epoch that the snapshot includes.
    pub(crate) epoch: Epoch,
    pub(crate) tracked: bool,
    pub(crate) capacity: u64,
    pub(crate) created_ns: u64,
    /// Runs of keys that someone is preserving.
    pub(crate) claims: Claims,
    disk: [u8; 16],
    index_file: S::File,
    store_file: S::File,
    index: Index,
    next_slot: AtomicU32,
    next_record: AtomicU64,
    /// What `next_record` was when the files were last made durable.
    synced_records: AtomicU64,
    state: AtomicU8,
    broken: OnceLock<String>,
    newer: OnceLock<Arc<Self>>,
    /// Who writes the head.
    head: Claims,
}

/// A key's content, as far as a chain of stores has it.
pub(crate) enum Located<'a, S: Storage> {
    /// In this snapshot's store.
    In(&'a Snapshot<S>, Slot),
    /// In no store: still on the live disk, if nothing is published meanwhile.
    Live,
}

impl<S: Storage> Snapshot<S> {
    /// Makes the files of a snapshot whose instant is yet to come.
    ///
    /// The store comes first and the head last: an index file without a head belongs to a snapshot
    /// that nothing can depend on.
    pub(crate) async fn create(io: &S, dir: &S::Dir, header: SnapshotHeader) -> Result<Self, Error> {
        let fail = Error::io("creating the snapshot's files");
        // What an unlucky removal may have left under this number belongs to nothing.
        Self::remove_files(io, dir, header.sequence)?;
        let files = io.create(dir, &format::store_file(header.sequence)).and_then(|store| {
            io.create(dir, &format::index_file(header.sequence)).map(|index| (index, store))
        });
        let (index_file, store_file) = files.map_err(fail)?;
        let snapshot = Self::from_parts(header, index_file, store_file);
        snapshot.write_head(io).await?;
        Ok(snapshot)
    }

    fn from_parts(header: SnapshotHeader, index_file: S::File, store_file: S::File) -> Self {
        let broken = OnceLock::new();
        if let Some(reason) = header.broken {
            let _ = broken.set(reason);
        }
        Self {
            sequence: header.sequence,
            name: header.name,
            group: header.group,
            generation: header.generation,
            epoch: header.epoch,
            tracked: header.tracked,
            capacity: header.capacity,
            created_ns: header.created_ns,
            claims: Claims::default(),
            disk: header.disk,
            index_file,
            store_file,
            index: Index::default(),
            next_slot: AtomicU32::new(0),
            next_record: AtomicU64::new(0),
            synced_records: AtomicU64::new(0),
            state: AtomicU8::new(state_to_u8(header.state)),
            broken,
            newer: OnceLock::new(),
            head: Claims::default(),
        }
    }

    /// Reads a snapshot back from its files. `None` if it was never made whole.
    pub(crate) async fn load(
        io: &S,
        dir: &S::Dir,
        disk: &[u8; 16],
        sequence: u32,
    ) -> Result<Option<Self>, Error> {
        let fail = || Error::io("reading a snapshot's index");
        let index_file = io.open(dir, &format::index_file(sequence)).map_err(fail())?;
        let len = io.len(&index_file).map_err(fail())?;
        if len < PAGE as u64 {
            return Ok(None);
        }
        let mut page = [0; PAGE];
        io.read(&index_file, 0, Target::of(&mut page)).await.map_err(fail())?;
        let header = SnapshotHeader::from_page(&page)
            .filter(|header| header.disk == *disk && header.sequence == sequence)
            .ok_or(Error::Corrupt { what: "the head of a snapshot's index", at: 0 })?;
        let store_file = io.open(dir, &format::store_file(sequence)).map_err(fail())?;
        let snapshot = Self::from_parts(header, index_file, store_file);
        snapshot.load_records(io, len).await?;
        Ok(Some(snapshot))
    }

    /// Takes in every record. Places between may be empty: their writers were stopped before they
    /// published, so nothing was changed on the strength of them.
    async fn load_records(&self, io: &S, len: u64) -> Result<(), Error> {
        let mut chunk = vec![0; 64 * PAGE];
        let (mut at, mut place, mut next_slot) = (PAGE as u64, 0, 0);
        while at + RECORD as u64 <= len {
            let whole = (len - at) / RECORD as u64 * RECORD as u64;
            let size = usize::try_from(whole.min(chunk.len() as u64)).unwrap_or(chunk.len());
            let part = &mut chunk[..size];
            io.read(&self.index_file, at, Target::of(part))
                .await
                .map_err(Error::io("reading a snapshot's index"))?;
            for bytes in part.chunks_exact(RECORD) {
                let Ok(record) = RawRecord::read_from_bytes(bytes) else {
                    unreachable!("the chunk is a record long")
                };
                match record.check(&self.disk, self.sequence, place) {
                    Some((key, slot)) if self.index.get(key).is_none() => {
                        self.index.insert(key, slot);
                        if let Slot::At(slot) = slot {
                            next_slot = next_slot.max(slot + 1);
                        }
                    }
                    Some(_) => {}
                    None if bytes.iter().all(|&byte| byte == 0) => {}
                    // A record lies within a page, so it was written wholly or not at all.
                    None => {
                        let at = PAGE as u64 + place * RECORD as u64;
                        return Err(Error::Corrupt { what: "a record of a snapshot's index", at });
                    }
                }
                place += 1;
            }
            at += size as u64;
        }
        let held = u64::from(next_slot) * GRAIN as u64;
        if io.len(&self.store_file).map_err(Error::io("opening a snapshot's store"))? < held {
            return Err(Error::Corrupt { what: "the end of a snapshot's store", at: held });
        }
        self.next_record.store((len - PAGE as u64).div_ceil(RECORD as u64), SeqCst);
        self.next_slot.store(next_slot, SeqCst);
        Ok(())
    }

    /// The snapshot's place in history.
    pub fn change_id(&self) -> ChangeId {
        ChangeId { generation: self.generation, epoch: self.epoch }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the disk at its instant.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// When it was taken, in nanoseconds since 1970.
    pub fn created_ns(&self) -> u64 {
        self.created_ns
    }

    /// Snapshots with the same group were taken at the same instant.
    pub fn group(&self) -> [u8; 16] {
        self.group
    }

    /// Bytes of old content in its store.
    pub fn bytes_held(&self) -> u64 {
        u64::from(self.next_slot.load(Relaxed)) * GRAIN as u64
    }

    /// Why it is broken, if it is.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Whether a user sees it.
    pub fn is_active(&self) -> bool {
        self.state() == SnapshotState::Active
    }

    pub(crate) fn state(&self) -> SnapshotState {
        match self.state.load(SeqCst) {
            1 => SnapshotState::Prepared,
            2 => SnapshotState::Active,
            _ => SnapshotState::Deleted,
        }
    }

    pub(crate) fn set_state(&self, state: SnapshotState) {
        self.state.store(state_to_u8(state), SeqCst);
    }

    /// Breaks it; the first reason stays. Answers whether this was the first.
    pub(crate) fn set_broken(&self, reason: &str) -> bool {
        self.broken.set(reason.to_owned()).is_ok()
    }

    pub(crate) fn newer(&self) -> Option<&Arc<Self>> {
        self.newer.get()
    }

    /// Appends `newer` to the chain. The gate is closed.
    pub(crate) fn link(&self, newer: Arc<Self>) {
        let linked = self.newer.set(newer);
        debug_assert!(linked.is_ok(), "a snapshot has one newer neighbour");
    }

    /// Whether `key` is preserved here.
    pub(crate) fn has(&self, key: Key) -> bool {
        self.index.get(key).is_some()
    }

    /// Finds `key` in this snapshot or the next newer one that has it.
    ///
    /// # Errors
    /// [`Error::SnapshotBroken`] if a broken one is passed: what it does not have may be lost.
    pub(crate) fn locate(&self, key: Key) -> Result<Located<'_, S>, Error> {
        let mut here = self;
        loop {
            if let Some(slot) = here.index.get(key) {
                return Ok(Located::In(here, slot));
            }
            if let Some(reason) = here.broken() {
                return Err(Error::SnapshotBroken { name: self.name.clone(), reason: reason.to_owned() });
            }
            match here.newer() {
                Some(newer) => here = newer,
                None => return Ok(Located::Live),
            }
        }
    }

    /// Writes old content into the store, then its records, then publishes the keys.
    ///
    /// `old` holds whole grains, for the keys from `first` on, which the caller has claimed.
    /// A stop before the records leaves slots that nobody knows; before the publication, records
    /// of content that is also still on the live disk. Both are harmless.
    pub(crate) async fn append(&self, io: &S, first: Key, old: &[u8]) -> Result<(), Error> {
        let fail = || Error::io("writing to the difference store");
        let grains = old.chunks_exact(GRAIN);
        let mut slots: Vec<Slot> = Vec::with_capacity(grains.len());
        let used = grains.clone().filter(|grain| !is_zero(grain)).count();
        let mut next = self.take_slots(used)?;
        for grain in grains {
            slots.push(if is_zero(grain) { Slot::Zero } else { Slot::At(next) });
            next += u32::from(!is_zero(grain));
        }
        for run in runs_of(&slots, |slot| matches!(slot, Slot::At(_))) {
            if let Slot::At(slot) = slots[run.start] {
                let bytes = &old[run.start * GRAIN..run.end * GRAIN];
                let at = u64::from(slot) * GRAIN as u64;
                io.write(&self.store_file, at, Source::of(bytes), Durability::Cached).await.map_err(fail())?;
            }
        }
        let place = self.next_record.fetch_add(slots.len() as u64, SeqCst);
        let keys = (first.to_raw()..).map(Key::from_raw);
        let records: Vec<RawRecord> = (place..)
            .zip(keys.clone())
            .zip(&slots)
            .map(|((place, key), &slot)| RawRecord::new(&self.disk, self.sequence, place, key, slot))
            .collect();
        let at = PAGE as u64 + place * RECORD as u64;
        let records = Source::of(records.as_bytes());
        io.write(&self.index_file, at, records, Durability::Cached).await.map_err(fail())?;
        for (key, slot) in keys.zip(slots) {
            self.index.insert(key, slot);
        }
        Ok(())
    }

    fn take_slots(&self, count: usize) -> Result<u32, Error> {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.next_slot
            .try_update(SeqCst, SeqCst, |next| next.checked_add(count).filter(|&end| end < u32::MAX))
            .map_err(|_| Error::Io {
                what: "writing to the difference store",
                source: std::io::Error::from(std::io::ErrorKind::StorageFull),
            })
    }

    /// Fills `out` with bytes of the store from `at` on; slot *n* begins at *n* times a grain.
    pub(crate) async fn read_bytes(&self, io: &S, at: u64, out: &mut [u8]) -> Result<(), Error> {
        io.read(&self.store_file, at, Target::of(out))
            .await
            .map_err(Error::io("reading the difference store"))
    }

    /// Writes the head as the snapshot now is.
    pub(crate) async fn write_head(&self, io: &S) -> Result<(), Error> {
        let _writer = self.head.claim(0..1).await;
        let page = self.header().to_page();
        io.write(&self.index_file, 0, Source::of(&page[..]), Durability::Cached)
            .await
            .map_err(Error::io("writing the head of a snapshot's index"))
    }

    fn header(&self) -> SnapshotHeader {
        SnapshotHeader {
            sequence: self.sequence,
            state: self.state(),
            disk: self.disk,
            group: self.group,
            generation: self.generation,
            epoch: self.epoch,
            tracked: self.tracked,
            capacity: self.capacity,
            created_ns: self.created_ns,
            name: self.name.clone(),
            broken: self.broken.get().cloned(),
        }
    }

    /// Whether something was appended since the last [`Snapshot::sync`].
    pub(crate) fn has_grown(&self) -> bool {
        self.next_record.load(SeqCst) != self.synced_records.load(SeqCst)
    }

    /// Makes everything in its files durable.
    pub(crate) async fn sync(&self, io: &S) -> Result<(), Error> {
        self.synced_records.store(self.next_record.load(SeqCst), SeqCst);
        for file in [&self.store_file, &self.index_file] {
            io.sync(file).await.map_err(Error::io("flushing the difference store"))?;
        }
        Ok(())
    }

    /// Removes a snapshot's files. The head goes first: what is left then belongs to nothing.
    pub(crate) fn remove_files(io: &S, dir: &S::Dir, sequence: u32) -> Result<(), Error> {
        for file in [format::index_file(sequence), format::store_file(sequence)] {
            match io.remove(dir, &file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Io { what: "removing a snapshot's files", source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn state_to_u8(state: SnapshotState) -> u8 {
    match state {
        SnapshotState::Prepared => 1,
        SnapshotState::Active => 2,
        SnapshotState::Deleted => 3,
    }
}

/// Whether all bytes are zero.
fn is_zero(grain: &[u8]) -> bool {
    grain.chunks(64).all(|part| part.iter().fold(0, |any, &byte| any | byte) == 0)
}

/// Maximal runs of items for which `is` holds.
pub(crate) fn runs_of<T>(items: &[T], is: impl Fn(&T) -> bool) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + items[at..].iter().position(&is)?;
        let end = items[start..].iter().position(|item| !is(item)).map_or(items.len(), |n| start + n);
        at = end;
        Some(start..end)
    })
}

/// A buffer for `grains` grains.
pub(crate) fn grain_buffer(grains: u64) -> AlignedBuf {
    AlignedBuf::zeroed(usize::try_from(grains).unwrap_or(usize::MAX).saturating_mul(GRAIN))
}
