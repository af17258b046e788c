//! One snapshot: its head, and its index of what was preserved for it, in memory and on disk.
//!
//! Invariant: a key is in the index only after its content and its record are in their files, where
//! they outlive this process.
//! Absent: the chain it is part of ([`crate::chain`]), the content ([`crate::store`]), the decision what
//! to preserve ([`crate::preserve`]) and reading ([`crate::view`]).

use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, fence};
use std::sync::{Mutex, OnceLock};

use cbt::{ByteRange, Cells, ChangeId, Epoch, Generation};
use zerocopy::IntoBytes;

use crate::claims::Claims;
use crate::error::Error;
use crate::format::{self, Broken, Entry, GRAIN, PAGE, RECORD, RawRecord, SnapshotHeader, SnapshotState};
use crate::index::{Index, Key, Part, Slot};
use crate::known::Known;
use crate::memory::{Source, Target};
use crate::overflow::Terms;
use crate::released::Released;
use crate::storage::Storage;
use crate::store::Store;
use crate::tracker::Control;

/// Records that are read together: 64 KiB.
const RECORDS_AT_ONCE: u64 = 4096;

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
    /// Runs of keys that someone is preserving, or releasing.
    pub(crate) claims: Claims,
    /// Everything that was marked by the instant is on the medium of the change map.
    pub(crate) marks_durable: AtomicBool,
    /// Part of the image where a reader found data, no holes; empty at first.
    pub(crate) seen_data: Mutex<ByteRange>,
    /// Grains that readers have released.
    pub(crate) released: Released,
    disk: [u8; 16],
    index_file: S::File,
    index: Index,
    known: Known,
    published: AtomicU64,
    /// Slots that its keys are in, or will be when an append under way has ended.
    slots: AtomicU64,
    /// See [`Terms`]; its limit is the one below.
    terms: Terms,
    /// Bytes that it may hold, 0 for any number.
    limit: AtomicU64,
    /// Why some of its slots cannot be read, if that was found when it was loaded.
    pub(crate) lost: OnceLock<String>,
    /// Records that were found when it was loaded.
    loaded: AtomicU32,
    next_record: AtomicU64,
    /// What `next_record` was when the files were last made durable.
    synced_records: AtomicU64,
    state: AtomicU8,
    broken: OnceLock<Broken>,
    /// The number of the next newer one; 0 for none.
    newer: AtomicU32,
    /// Its slots were given back, because it is broken.
    pub(crate) emptied: AtomicBool,
    /// Records from the first on that were merged into the older neighbour.
    pub(crate) merged: AtomicU64,
    /// Records from the first on that are written for certain.
    pub(crate) settled: AtomicU64,
    /// Those who preserve into it at this moment.
    preserving: AtomicU32,
    /// Nobody needs what is preserved into it any more.
    ended: AtomicBool,
    /// See [`Snapshot::spare`].
    sparing: AtomicBool,
    /// Who writes the head.
    head: Claims,
}

impl<S: Storage> Snapshot<S> {
    /// Makes the index of a snapshot whose instant is yet to come. A file without a head belongs to a
    /// snapshot that nothing can depend on.
    pub(crate) async fn create(io: &S, dir: &S::Dir, header: SnapshotHeader) -> Result<Self, Error> {
        // What an unlucky removal may have left under this number belongs to nothing.
        Self::remove_file(io, dir, header.sequence)?;
        let index_file = io
            .create(dir, &format::index_file(header.sequence))
            .map_err(Error::io("creating the snapshot's index"))?;
        let snapshot = Self::from_parts(header, index_file);
        snapshot.write_head(io).await?;
        Ok(snapshot)
    }

    fn from_parts(header: SnapshotHeader, index_file: S::File) -> Self {
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
            marks_durable: AtomicBool::new(false),
            seen_data: Mutex::new(ByteRange::new(0, 0)),
            released: Released::new(header.capacity.div_ceil(GRAIN as u64)),
            disk: header.disk,
            newer: AtomicU32::new(header.newer),
            index_file,
            index: Index::default(),
            known: Known::default(),
            published: AtomicU64::new(0),
            slots: AtomicU64::new(0),
            limit: AtomicU64::new(header.terms.limit),
            terms: header.terms,
            lost: OnceLock::new(),
            loaded: AtomicU32::new(0),
            next_record: AtomicU64::new(0),
            synced_records: AtomicU64::new(0),
            state: AtomicU8::new(state_to_u8(header.state)),
            broken,
            emptied: AtomicBool::new(false),
            merged: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            preserving: AtomicU32::new(0),
            ended: AtomicBool::new(false),
            sparing: AtomicBool::new(false),
            head: Claims::default(),
        }
    }

    /// Reads a snapshot back from its file. `None` if it was never made whole.
    ///
    /// With `store` it is checked that what its records name can be there.
    pub(crate) async fn load(
        io: &S,
        dir: &S::Dir,
        disk: &[u8; 16],
        sequence: u32,
        store: Option<&Store<S>>,
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
        let snapshot = Self::from_parts(header, index_file);
        let count = (len - PAGE as u64).div_ceil(RECORD as u64);
        snapshot.next_record.store(count, SeqCst);
        if snapshot.broken().is_none() {
            snapshot.load_records(io, len, store).await?;
        }
        Ok(Some(snapshot))
    }

    /// Takes in every record. Places between may be empty: their writers were stopped before they
    /// published, so nothing was changed on the strength of them.
    async fn load_records(&self, io: &S, len: u64, store: Option<&Store<S>>) -> Result<(), Error> {
        let whole = (len - PAGE as u64) / RECORD as u64;
        let mut place = 0;
        while place < whole {
            let count = (whole - place).min(RECORDS_AT_ONCE);
            for entry in self.read_records(io, place, count).await?.into_iter().flatten() {
                self.loaded.fetch_add(1, Relaxed);
                match entry {
                    Entry::Kept(key, slot) if self.index.get(key).is_none() => self.index.insert(key, slot),
                    Entry::Kept(..) => {}
                    Entry::Released(grains) if grains.end <= self.released.grains() => {
                        self.released.set(grains);
                    }
                    Entry::Released(_) => {
                        let at = PAGE as u64 + place * RECORD as u64;
                        return Err(Error::Corrupt { what: "a released range near a record", at });
                    }
                }
            }
            place += count;
        }
        // Only now: a record of released grains may come after those of their slots, or before.
        let mut checked = Ok(());
        self.for_each(|_, slot| {
            if let Slot::At(slot) = slot {
                match store.map_or(Ok(()), |store| store.check(slot)) {
                    Err(error @ Error::AreaLost { .. }) => {
                        let _ = self.lost.set(error.to_string());
                    }
                    Err(error) => checked = Err(error),
                    Ok(()) => {}
                }
                self.slots.fetch_add(1, Relaxed);
            }
        });
        checked?;
        Ok(())
    }

    /// Reads `count` records from `place` on; `None` for places that were not written.
    pub(crate) async fn read_records(
        &self,
        io: &S,
        place: u64,
        count: u64,
    ) -> Result<Vec<Option<Entry>>, Error> {
        let size = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(RECORD);
        let mut chunk = vec![0; size];
        let at = PAGE as u64 + place * RECORD as u64;
        io.read(&self.index_file, at, Target::of(&mut chunk))
            .await
            .map_err(Error::io("reading a snapshot's index"))?;
        (place..)
            .zip(chunk.as_chunks::<RECORD>().0)
            .map(|(place, bytes)| {
                let at = PAGE as u64 + place * RECORD as u64;
                let damaged = |_| Error::Corrupt { what: "a record of a snapshot's index", at };
                RawRecord::read(bytes, &self.disk, self.sequence, place).map_err(damaged)
            })
            .collect()
    }

    /// Lets the caller preserve into it until the answer is dropped; `None` if nobody needs that any more.
    pub(crate) fn begin_preserving(&self) -> Option<Preserving<'_, S>> {
        self.preserving.fetch_add(1, SeqCst);
        let held = Preserving { snapshot: self };
        // Counted first, looked second; who empties it tells first and counts second. Whichever comes
        // later in the one order of SeqCst sees the other.
        fence(SeqCst);
        let over = self.ended.load(SeqCst) || self.broken().is_some();
        (!over).then_some(held)
    }

    /// From now on nobody begins to preserve into it.
    pub(crate) fn end_preserving(&self) {
        self.ended.store(true, SeqCst);
    }

    /// Whether someone still preserves into it, after it broke or after [`Snapshot::end_preserving`].
    pub(crate) fn is_preserving(&self) -> bool {
        fence(SeqCst);
        self.preserving.load(SeqCst) > 0
    }

    /// Records that were found when it was loaded, modulo 2^32.
    pub(crate) fn loaded_records(&self) -> u32 {
        self.loaded.load(Relaxed)
    }

    /// Records that were written or are being written.
    pub(crate) fn records(&self) -> u64 {
        self.next_record.load(SeqCst)
    }

    /// Places for records that its file has, from the first on.
    pub(crate) fn places(&self, io: &S) -> Result<u64, Error> {
        let len = io.len(&self.index_file).map_err(Error::io("reading a snapshot's index"))?;
        Ok(len.saturating_sub(PAGE as u64) / RECORD as u64)
    }

    /// Calls `each` with every key and where it is.
    pub(crate) fn for_each(&self, mut each: impl FnMut(Key, Slot)) {
        self.index.for_each(|key, slot| {
            if !self.is_released(key) {
                each(key, slot);
            }
        });
    }

    /// Calls `each` with some `most` of its keys and where they are; what part of all that is.
    pub(crate) fn for_some(&self, most: u64, mut each: impl FnMut(Key, Slot)) -> Part {
        self.index.for_some(most, self.records(), |key, slot| {
            if !self.is_released(key) {
                each(key, slot);
            }
        })
    }

    /// Where `key` is, if this snapshot has it itself and it was not released.
    pub(crate) fn get(&self, key: Key) -> Option<Slot> {
        self.index.get(key).filter(|_| !self.is_released(key))
    }

    /// Whether readers have released `key`.
    pub(crate) fn is_released(&self, key: Key) -> bool {
        key.as_grain().is_some_and(|grain| self.released.has(grain))
    }

    /// Where `key` was, which has just been released: that slot is the snapshot's no more.
    pub(crate) fn take_released(&self, key: Key) -> Option<Slot> {
        let slot = self.index.get(key)?;
        self.slots.fetch_sub(u32::from(matches!(slot, Slot::At(_))).into(), Relaxed);
        Some(slot)
    }

    /// Whether readers have released part of it, or have begun to: that part can never be read again.
    pub fn has_released(&self) -> bool {
        self.released.is_begun()
    }

    /// Bytes that readers have released.
    pub fn bytes_released(&self) -> u64 {
        (self.released.count() * GRAIN as u64).min(self.capacity)
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
        let gone = self.emptied.load(SeqCst);
        if gone { 0 } else { self.slots.load(Relaxed) * GRAIN as u64 }
    }

    /// On which terms it is held.
    pub fn terms(&self) -> Terms {
        Terms { limit: self.limit.load(SeqCst), ..self.terms }
    }

    /// Sets how many bytes it may hold; 0 for any number. The head is to be written then.
    pub(crate) fn set_limit(&self, limit: u64) -> Result<u64, Error> {
        let used = self.bytes_held();
        if limit != 0 && limit < used {
            return Err(Error::LimitInUse { what: "the snapshot", limit, used });
        }
        Ok(self.limit.swap(limit, SeqCst))
    }

    /// Counts slots that it is about to hold, if its limit allows.
    pub(crate) fn take_up(&self, slots: u64) -> Result<(), Error> {
        let before = self.slots.fetch_add(slots, SeqCst);
        let limit = self.limit.load(SeqCst);
        if limit != 0 && slots > 0 && (before + slots) * GRAIN as u64 > limit {
            self.let_go(slots);
            return Err(Error::LimitReached { what: "the snapshot" });
        }
        Ok(())
    }

    /// Whether less than half of what it may hold is in use, and nothing that it could spare has failed.
    pub(crate) fn is_roomy(&self) -> bool {
        let limit = self.limit.load(Relaxed);
        !self.sparing.load(Relaxed) && (limit == 0 || self.bytes_held() < limit / 2)
    }

    /// From now on only what has to be is preserved into it.
    pub(crate) fn spare(&self) {
        self.sparing.store(true, Relaxed);
    }

    /// Counts slots that pass to it from a newer one, whatever its limit is.
    pub(crate) fn adopt(&self, slots: u64) {
        self.slots.fetch_add(slots, SeqCst);
    }

    /// Counts slots that it will not hold after all.
    pub(crate) fn let_go(&self, slots: u64) {
        self.slots.fetch_sub(slots, SeqCst);
    }

    /// Whether its index is removed.
    pub(crate) fn is_gone(&self) -> bool {
        self.ended.load(SeqCst)
    }

    /// Why it is broken, if it is.
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(|broken| broken.reason.as_str())
    }

    /// When it broke, in nanoseconds since 1970, and the system's error number; either may be 0, unknown.
    pub fn broken_when(&self) -> Option<(u64, u32)> {
        self.broken.get().map(|broken| (broken.at_ns, broken.errno))
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
    pub(crate) fn set_broken(&self, broken: Broken) -> bool {
        self.broken.set(broken).is_ok()
    }

    /// The number of the next newer one, as the head says; 0 for none.
    pub(crate) fn newer(&self) -> u32 {
        self.newer.load(SeqCst)
    }

    /// Names another one as the next newer, in the head too. After an error the head may name either, and says the
    /// new one once it is written again.
    pub(crate) async fn set_newer(&self, io: &S, newer: u32) -> Result<(), Error> {
        self.newer.store(newer, SeqCst);
        self.write_head(io).await
    }

    /// Whether `key` is preserved here, or need not be since it was released.
    pub(crate) fn has(&self, key: Key) -> bool {
        let grain = key.as_grain();
        if grain.is_some_and(|grain| self.known.has(grain)) {
            return true;
        }
        let has = self.index.get(key).is_some() || self.is_released(key);
        if let Some(grain) = grain.filter(|_| has) {
            self.known.note(grain);
        }
        has
    }

    /// How many of `grains` it is known to have, without a look at the index. They are within 32 from a multiple of 32 on.
    pub(crate) fn known_in(&self, grains: Range<u64>) -> u32 {
        self.known.count(grains)
    }

    /// Grains that the disk had at its instant.
    pub(crate) fn grains(&self) -> u64 {
        self.capacity.div_ceil(GRAIN as u64)
    }

    /// Whether something that was preserved was all zeros.
    pub(crate) fn has_zeros(&self) -> bool {
        self.index.has_zeros()
    }

    /// Whether the disk had `key` at its instant, or a part of it.
    pub(crate) fn reaches(&self, key: Key) -> bool {
        key.grain_start().is_none_or(|start| start < self.capacity)
    }

    /// Writes the records of keys whose content is in its slots. They are to be published after that.
    pub(crate) async fn record<C: Cells>(
        &self,
        io: &S,
        control: &Control<C>,
        entries: &[(Key, Slot)],
    ) -> Result<(), Error> {
        let place = self.next_record.fetch_add(entries.len() as u64, SeqCst);
        let records = (place..)
            .zip(entries)
            .map(|(place, &(key, slot))| RawRecord::new(&self.disk, self.sequence, place, key, slot))
            .collect();
        self.write_records(io, control, place, records).await
    }

    /// Writes the records of grains that are being released, a record a run.
    pub(crate) async fn record_released<C: Cells>(
        &self,
        io: &S,
        control: &Control<C>,
        runs: &[Range<u64>],
    ) -> Result<(), Error> {
        let place = self.next_record.fetch_add(runs.len() as u64, SeqCst);
        let records = (place..)
            .zip(runs)
            .map(|(place, grains)| RawRecord::released(&self.disk, self.sequence, place, grains))
            .collect();
        self.write_records(io, control, place, records).await
    }

    /// Writes records from `place` on, which was taken for them. They are counted in the map's control page
    /// before anybody believes them: an index that was cut short has fewer.
    async fn write_records<C: Cells>(
        &self,
        io: &S,
        control: &Control<C>,
        place: u64,
        records: Vec<RawRecord>,
    ) -> Result<(), Error> {
        let at = PAGE as u64 + place * RECORD as u64;
        io.write(&self.index_file, at, Source::of(records.as_bytes()))
            .await
            .map_err(Error::io("writing to a snapshot's index"))?;
        control.note_records(self.sequence, u32::try_from(records.len()).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Publishes keys whose content and records are written, but for those that were released meanwhile.
    /// Answers how many slots they are in.
    pub(crate) fn publish(&self, entries: &[(Key, Slot)]) -> u64 {
        let mut slots = 0;
        for &(key, slot) in entries.iter().filter(|(key, _)| !self.is_released(*key)) {
            self.index.insert(key, slot);
            key.as_grain().inspect(|&grain| self.known.note(grain));
            slots += u64::from(matches!(slot, Slot::At(_)));
        }
        // After the keys, before what made them necessary: see `published`.
        self.published.fetch_add(1, SeqCst);
        slots
    }

    /// How often keys were published. Who finds it as it was before knows that nothing was published meanwhile that
    /// anybody has changed the live disk on the strength of.
    pub(crate) fn published(&self) -> u64 {
        self.published.load(SeqCst)
    }

    /// Writes the head as the snapshot now is.
    pub(crate) async fn write_head(&self, io: &S) -> Result<(), Error> {
        let _writer = self.head.claim(0..1).await;
        let page = self.header().to_page();
        io.write(&self.index_file, 0, Source::of(&page[..]))
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
            newer: self.newer(),
            broken: self.broken.get().cloned(),
            terms: self.terms(),
        }
    }

    /// Whether something was appended since the last [`Snapshot::sync`].
    pub(crate) fn has_grown(&self) -> bool {
        self.next_record.load(SeqCst) != self.synced_records.load(SeqCst)
    }

    /// Makes everything in its index durable.
    pub(crate) async fn sync(&self, io: &S) -> Result<(), Error> {
        self.synced_records.store(self.next_record.load(SeqCst), SeqCst);
        io.sync(&self.index_file).await.map_err(Error::io("flushing a snapshot's index"))
    }

    /// Removes a snapshot's index: what its keys were in belongs to nobody then.
    pub(crate) fn remove_file(io: &S, dir: &S::Dir, sequence: u32) -> Result<(), Error> {
        match io.remove(dir, &format::index_file(sequence)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::Io { what: "removing a snapshot's index", source: error })
            }
            _ => Ok(()),
        }
    }
}

/// The right to preserve into a snapshot.
pub(crate) struct Preserving<'a, S: Storage> {
    snapshot: &'a Snapshot<S>,
}

impl<S: Storage> Drop for Preserving<'_, S> {
    fn drop(&mut self) {
        self.snapshot.preserving.fetch_sub(1, SeqCst);
    }
}

fn state_to_u8(state: SnapshotState) -> u8 {
    match state {
        SnapshotState::Prepared => 1,
        SnapshotState::Active => 2,
        SnapshotState::Deleted => 3,
    }
}
