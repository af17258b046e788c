//! Which old content a snapshot holds, and in which slot of its store: a map from key to slot.
//!
//! Invariant: an entry is published once and never changes or moves while the index lives, so
//! readers take no lock at all; a reader that does not find a key that is being inserted is a
//! reader that came before.
//! Absent: removal. An index goes as a whole, with its snapshot.

use std::hash::BuildHasher;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
use std::sync::{Mutex, OnceLock, PoisonError};

/// What a snapshot can hold: a grain of the disk, or a page of its change map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(u64);

impl Key {
    const MAP_PAGE: u64 = 1 << 63;
    /// No grain has such an index; FORMAT.md gives it a meaning in records.
    pub(crate) const GRAINS: u64 = 1 << 62;

    /// The grain with this index.
    pub(crate) fn grain(index: u64) -> Self {
        debug_assert!(index < Self::GRAINS);
        Self(index)
    }

    /// The index of the grain that it is, if it is one.
    pub(crate) fn as_grain(self) -> Option<u64> {
        (self.0 < Self::GRAINS).then_some(self.0)
    }

    /// The page of the change map with this index.
    pub(crate) fn map_page(index: cbt::PageIndex) -> Self {
        debug_assert!(index < Self::MAP_PAGE);
        Self(index | Self::MAP_PAGE)
    }

    /// The first byte of the grain; `None` for a page of the map.
    pub(crate) fn grain_start(self) -> Option<u64> {
        self.as_grain().map(|grain| grain.saturating_mul(crate::format::GRAIN as u64))
    }

    /// As records on disk hold it.
    pub(crate) fn to_raw(self) -> u64 {
        self.0
    }

    /// From a record on disk.
    pub(crate) fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
}

/// Where a key's old content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// It was all zeros, which costs no space.
    Zero,
    /// The store's slot of this number.
    At(u32),
}

impl Slot {
    const ZERO: u32 = u32::MAX;

    pub(crate) fn to_raw(self) -> u32 {
        match self {
            Self::Zero => Self::ZERO,
            Self::At(slot) => slot,
        }
    }

    pub(crate) fn from_raw(raw: u32) -> Self {
        if raw == Self::ZERO { Self::Zero } else { Self::At(raw) }
    }
}

const SHARDS: usize = 64;
/// Entries of a shard's first table; each next one has twice as many.
const FIRST: usize = 16;
/// More tables than memory could hold.
const TABLES: usize = 32;
/// Keys that follow each other and lie together: their entries share a line of the cache.
const GROUP: u64 = 4;
/// Bits of a table's filter for each of its entries.
const FILTER: usize = 4;

struct Entry {
    /// The key plus one; zero while the entry is free.
    key: AtomicU64,
    slot: AtomicU32,
}

/// Entries by the hashes of their groups, and which hashes there may be: most keys that are looked for are in
/// none of the tables, and a bit says so sooner than a probe.
struct Table {
    entries: Box<[Entry]>,
    filter: Box<[AtomicU64]>,
}

impl Table {
    fn new(size: usize) -> Self {
        let entry = || Entry { key: AtomicU64::new(0), slot: AtomicU32::new(0) };
        Self {
            entries: (0..size).map(|_| entry()).collect(),
            filter: (0..size * FILTER / 64).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The word and the bit of the filter for a hash.
    fn bit(&self, hash: usize) -> (&AtomicU64, u64) {
        // Other bits of the hash than those that choose the entry.
        let at = hash.rotate_right(29) & (self.filter.len() * 64 - 1);
        (&self.filter[at / 64], 1 << (at % 64))
    }

    /// Entries from the one on where `key` is, if it is in this table.
    fn probe(&self, key: Key, hash: usize) -> impl Iterator<Item = &Entry> {
        #[allow(clippy::cast_possible_truncation, reason = "less than a group")]
        let first = hash.wrapping_mul(GROUP as usize) + (key.0 % GROUP) as usize;
        let mask = self.entries.len() - 1;
        (0..self.entries.len()).map(move |step| &self.entries[(first + step) & mask])
    }

    fn find(&self, key: Key, hash: usize) -> Option<Slot> {
        let (word, bit) = self.bit(hash);
        // Set before the key is, by the same thread: who may rely on the key sees the bit.
        if word.load(Relaxed) & bit == 0 {
            return None;
        }
        for entry in self.probe(key, hash) {
            match entry.key.load(Acquire) {
                0 => return None,
                held if held == key.0 + 1 => return Some(Slot::from_raw(entry.slot.load(Relaxed))),
                _ => {}
            }
        }
        None
    }
}

/// Part of the index: tables of doubling size, filled one after the other and never moved.
struct Shard {
    tables: [OnceLock<Table>; TABLES],
    /// Tables that exist.
    count: AtomicUsize,
    /// Entries in the last table. Held while inserting.
    filled: Mutex<Filled>,
}

impl Shard {
    fn empty() -> Self {
        Self {
            tables: [const { OnceLock::new() }; TABLES],
            count: AtomicUsize::new(0),
            filled: Mutex::default(),
        }
    }
}

#[derive(Default)]
struct Filled {
    tables: usize,
    in_last: usize,
}

/// What part of an index was seen: so many of so many, neither is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) seen: u64,
    pub(crate) of: u64,
}

/// From key to slot, for one snapshot.
///
/// Costs 16.5 bytes an entry, at most some 38 resident with the free room of the tables (filled to
/// 7/8); nothing for what was not touched.
pub(crate) struct Index {
    shards: Box<[Shard]>,
    /// Some content was all zeros.
    zeros: AtomicBool,
    hasher: std::hash::RandomState,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::empty()).collect(),
            zeros: AtomicBool::new(false),
            hasher: std::hash::RandomState::new(),
        }
    }
}

impl Index {
    /// Where `key` is, or `None` if its content was not preserved (yet).
    pub(crate) fn get(&self, key: Key) -> Option<Slot> {
        let (shard, hash) = self.place(key);
        // The last table holds half of all entries: begin there.
        let tables = &shard.tables[..shard.count.load(Acquire)];
        tables.iter().rev().filter_map(OnceLock::get).find_map(|table| table.find(key, hash))
    }

    /// Publishes `key`. What it stands for is in its slot already.
    ///
    /// The caller holds the key's claim, so that nobody else inserts it.
    pub(crate) fn insert(&self, key: Key, slot: Slot) {
        if slot == Slot::Zero {
            self.zeros.store(true, Relaxed);
        }
        let (shard, hash) = self.place(key);
        debug_assert!(self.get(key).is_none(), "a key is published once, under its claim");
        let mut filled = shard.filled.lock().unwrap_or_else(PoisonError::into_inner);
        let full = match filled.tables {
            0 => true,
            n => filled.in_last * 8 >= (FIRST << (n - 1)) * 7,
        };
        if full {
            let set = shard.tables[filled.tables].set(Table::new(FIRST << filled.tables));
            debug_assert!(set.is_ok(), "tables are added under the lock");
            *filled = Filled { tables: filled.tables + 1, in_last: 0 };
            shard.count.store(filled.tables, Release);
        }
        let Some(table) = shard.tables[filled.tables - 1].get() else {
            unreachable!("the last table was added above or before")
        };
        let (word, bit) = table.bit(hash);
        word.fetch_or(bit, Relaxed);
        for entry in table.probe(key, hash) {
            if entry.key.load(Relaxed) == 0 {
                entry.slot.store(slot.to_raw(), Relaxed);
                // A reader that sees the key sees the slot, and what was written into it.
                entry.key.store(key.0 + 1, Release);
                filled.in_last += 1;
                return;
            }
        }
        unreachable!("a table that is not full has a free entry");
    }

    /// Whether content of some key was all zeros.
    pub(crate) fn has_zeros(&self) -> bool {
        self.zeros.load(Relaxed)
    }

    /// Calls `each` with everything that was published before this was called, and perhaps more.
    pub(crate) fn for_each(&self, each: impl FnMut(Key, Slot)) {
        self.for_each_in(SHARDS, each);
    }

    /// Calls `each` with some `most` of `all` keys, picked by chance; what part of all that is.
    pub(crate) fn for_some(&self, most: u64, all: u64, each: impl FnMut(Key, Slot)) -> Part {
        let (mut seen, of) = (SHARDS as u64, SHARDS as u64);
        if all > most {
            seen = u64::try_from(u128::from(of) * u128::from(most) / u128::from(all)).unwrap_or(of).max(1);
        }
        self.for_each_in(usize::try_from(seen).unwrap_or(SHARDS), each);
        Part { seen, of }
    }

    /// Keys are in shards by their hashes, so some shards are a fair part of all.
    fn for_each_in(&self, shards: usize, mut each: impl FnMut(Key, Slot)) {
        for shard in &self.shards[..shards] {
            let tables = &shard.tables[..shard.count.load(Acquire)];
            for entry in tables.iter().filter_map(OnceLock::get).flat_map(|table| &table.entries) {
                if let Some(key) = entry.key.load(Acquire).checked_sub(1) {
                    each(Key(key), Slot::from_raw(entry.slot.load(Relaxed)));
                }
            }
        }
    }

    fn place(&self, key: Key) -> (&Shard, usize) {
        let hash = self.hasher.hash_one(key.0 / GROUP);
        #[allow(clippy::cast_possible_truncation, reason = "any bits of a hash will do")]
        let hash = hash as usize;
        (&self.shards[hash % SHARDS], hash / SHARDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_inserted_is_found_and_nothing_else() {
        let index = Index::default();
        let keys = (0..5000u64).map(|n| if n % 3 == 0 { Key::map_page(n) } else { Key::grain(n * 7919) });
        for (n, key) in keys.clone().enumerate() {
            let slot = if n % 5 == 0 { Slot::Zero } else { Slot::At(u32::try_from(n).unwrap()) };
            index.insert(key, slot);
        }
        for (n, key) in keys.enumerate() {
            let slot = if n % 5 == 0 { Slot::Zero } else { Slot::At(u32::try_from(n).unwrap()) };
            assert_eq!(index.get(key), Some(slot));
        }
        assert_eq!(index.get(Key::grain(1)), None);
        assert_eq!(index.get(Key::map_page(1)), None);
    }

    #[test]
    fn readers_find_what_another_thread_published() {
        let index = Index::default();
        let published = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..20_000 {
                    index.insert(Key::grain(n), Slot::At(u32::try_from(n).unwrap()));
                    published.store(n + 1, Release);
                }
            });
            loop {
                let upto = published.load(Acquire);
                if let Some(last) = upto.checked_sub(1) {
                    assert_eq!(index.get(Key::grain(last)), Some(Slot::At(u32::try_from(last).unwrap())));
                }
                if upto == 20_000 {
                    break;
                }
            }
        });
    }
}
