//! A split virtqueue as the device sees it, resolved to host addresses (VIRTIO 1.2 §2.7).
//!
//! Invariant: the addresses of a [`Ring`] lie in the memory generation that it holds, each part
//! whole in one region and aligned; every index, length and flag the guest wrote is read once,
//! and checked before it is used. What is wrong with one chain is its [`ChainError`]; what makes
//! every later chain doubtful is a [`RingError`], after which a ring is not read again.
//! Absent: what the bytes of a chain mean, packed rings, the dirty log (the used ring's writes in
//! `Ring::push_used` and `Ring::publish` are where its marks will go).

use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::faults;
use crate::guest_mem::{Buffer, Memory, Pinned};

/// Largest queue in descriptors.
pub(crate) const MAX_QUEUE_SIZE: u16 = 1024;

/// Descriptors that one chain may have, those of its indirect table among them. A driver keeps
/// within the queue's size; the bound is for those that do not.
const MAX_CHAIN: usize = MAX_QUEUE_SIZE as usize;

/// Bytes in a descriptor.
const DESC_BYTES: u64 = 16;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Words of the set of heads in flight.
const HEAD_WORDS: usize = MAX_QUEUE_SIZE as usize / 64;

/// What is wrong with one chain. The guest's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ChainError {
    /// More descriptors than the queue or a loop has, or than we take.
    #[error("a chain of too many descriptors")]
    TooLong,
    /// The next descriptor is none of its table.
    #[error("a chain that goes on at descriptor {next}, outside of its table")]
    Next {
        /// The index that was named.
        next: u16,
    },
    /// A descriptor that the device reads after one that it writes.
    #[error("a chain with a readable descriptor after a writable one")]
    Order,
    /// An indirect table where none may be, of a wrong length, or outside of memory.
    #[error("a bad indirect table of {len} bytes")]
    Indirect {
        /// Its length in bytes.
        len: u32,
    },
    /// A descriptor of no byte.
    #[error("an empty descriptor")]
    Empty,
    /// A buffer that is not in the guest's memory.
    #[error("a buffer of {len} bytes at {at:#x}, which is no memory")]
    Address {
        /// Guest-physical address.
        at: u64,
        /// Bytes.
        len: u32,
    },
}

/// What breaks a ring, or keeps it from starting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RingError {
    /// A size that a split ring cannot have, or above ours.
    #[error("a queue of {0} descriptors; it must be a power of two up to {MAX_QUEUE_SIZE}")]
    Size(u32),
    /// A part of the ring is not in the front end's memory, or in two regions, or misaligned.
    #[error("the {part} at {at:#x} is not in the front end's memory")]
    Placement {
        /// Which part.
        part: &'static str,
        /// The front end's address.
        at: u64,
    },
    /// The driver's index is further ahead than the ring is long.
    #[error("the available index jumped from {from} to {to}")]
    Index {
        /// Where the device was.
        from: u16,
        /// What the driver wrote.
        to: u16,
    },
    /// A chain's head is no descriptor of the table.
    #[error("descriptor {0} was made available and is outside of the table")]
    Head(u16),
    /// A chain was made available again before it was used.
    #[error("descriptor {0} was made available twice")]
    Twice(u16),
    /// A file of guest memory was shrunk, or had no page left.
    #[error("the front end has taken memory away that it had shared")]
    MemoryLost,
}

/// Where the front end says a ring is, in its own addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// Descriptor table.
    pub(crate) desc: u64,
    /// Driver area: the available ring.
    pub(crate) avail: u64,
    /// Device area: the used ring.
    pub(crate) used: u64,
}

/// What was negotiated about a ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Descriptors.
    pub(crate) size: u16,
    /// `VIRTIO_F_EVENT_IDX`.
    pub(crate) event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub(crate) indirect: bool,
}

impl Shape {
    /// Whether a ring may have `size` descriptors.
    pub(crate) fn check_size(size: u32) -> Result<u16, RingError> {
        match u16::try_from(size) {
            Ok(size) if size.is_power_of_two() && size <= MAX_QUEUE_SIZE => Ok(size),
            _ => Err(RingError::Size(size)),
        }
    }
}

/// One chain of descriptors: what the device reads, what it writes, and what was wrong.
#[derive(Default)]
pub(crate) struct Chain {
    /// Its first descriptor, by which it is returned.
    pub(crate) head: u16,
    /// What the device may read.
    pub(crate) readable: Buffer,
    /// What the device may write. Its end is right even if `fault` is [`ChainError::Address`], so
    /// that a status can be told; with any other fault it is empty.
    pub(crate) writable: Buffer,
    /// The first thing that was wrong.
    pub(crate) fault: Option<ChainError>,
}

/// The host addresses of a ring's parts.
#[derive(Clone, Copy)]
struct Parts {
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
}

impl Parts {
    fn resolve(memory: &Memory, at: Addresses, shape: Shape) -> Result<Self, RingError> {
        let n = u64::from(shape.size);
        let event = if shape.event_idx { 2 } else { 0 };
        let find = |part, at: u64, len: u64, align: usize| match memory.user(at, len) {
            Some(host) if host.as_ptr().addr().is_multiple_of(align) => Ok(host),
            _ => Err(RingError::Placement { part, at }),
        };
        Ok(Self {
            desc: find("descriptor table", at.desc, DESC_BYTES * n, 16)?,
            avail: find("available ring", at.avail, 4 + 2 * n + event, 2)?,
            used: find("used ring", at.used, 4 + 8 * n + event, 4)?,
        })
    }
}

/// A descriptor, read.
#[derive(Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A started ring of one queue's thread.
pub(crate) struct Ring {
    memory: Pinned,
    addresses: Addresses,
    parts: Parts,
    shape: Shape,
    next_avail: u16,
    /// The driver's index when it was last read.
    seen_avail: u16,
    next_used: u16,
    /// What the driver sees as the used index.
    published: u16,
    /// The used index at the last decision to interrupt; `None` until the first one, which is yes.
    signalled: Option<u16>,
    heads: [u64; HEAD_WORDS],
    in_flight: u16,
    /// The available index of the oldest chain that was not returned.
    oldest: u16,
    /// Chains that were not returned, in the order they were taken: the place is the available index.
    order: Box<[u16]>,
    /// For each head that is done before an older one: the bytes written, or [`NOT_DONE`].
    done: Box<[u32]>,
    kicks_off: bool,
    /// Losses of guest memory, of any front end, that did not concern this ring.
    losses: u32,
}

/// No chain has so many writable bytes (see `request`).
const NOT_DONE: u32 = u32::MAX;

impl Ring {
    /// A ring at `addresses`, whose next chain is that of available index `base`. Where the used
    /// ring stands is read from it.
    pub(crate) fn start(
        memory: Arc<Memory>,
        addresses: Addresses,
        shape: Shape,
        base: u16,
    ) -> Result<Self, RingError> {
        Shape::check_size(shape.size.into())?;
        let parts = Parts::resolve(&memory, addresses, shape)?;
        let mut ring = Self {
            memory: Rc::new(memory),
            addresses,
            parts,
            shape,
            next_avail: base,
            seen_avail: base,
            next_used: 0,
            published: 0,
            signalled: None,
            heads: [0; HEAD_WORDS],
            in_flight: 0,
            oldest: base,
            order: vec![0; usize::from(shape.size)].into(),
            done: vec![NOT_DONE; usize::from(shape.size)].into(),
            kicks_off: false,
            losses: 0,
        };
        ring.next_used = ring.load(ring.parts.used, 2, Ordering::Relaxed);
        ring.published = ring.next_used;
        ring.store_kick_flag(false);
        Ok(ring)
    }

    /// Goes on in another memory generation, or elsewhere in it. Chains in flight keep the
    /// generation they were taken in. After an error the ring is where it was.
    pub(crate) fn place(
        &mut self,
        memory: Arc<Memory>,
        addresses: Option<Addresses>,
    ) -> Result<Pinned, RingError> {
        let addresses = addresses.unwrap_or(self.addresses);
        self.parts = Parts::resolve(&memory, addresses, self.shape)?;
        self.addresses = addresses;
        let old = std::mem::replace(&mut self.memory, Rc::new(memory));
        self.losses = 0;
        // The flags of a place we were not at may be anything.
        self.kicks_off = false;
        self.store_kick_flag(false);
        Ok(old)
    }

    /// The available index that the next chain will have: what the front end asks for at a stop.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Chains taken and not returned.
    pub(crate) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.shape.size
    }

    /// Whether the driver sees indices, not flags, to suppress events by.
    pub(crate) fn event_idx(&self) -> bool {
        self.shape.event_idx
    }

    /// Whether the driver made a chain available that was not taken.
    pub(crate) fn has_available(&self) -> bool {
        self.seen_avail != self.next_avail || self.load_avail_index() != self.next_avail
    }

    /// Takes the next chain into `chain`; `false` if there is none.
    pub(crate) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let losses = faults::losses();
        if losses != self.losses {
            if self.memory.is_lost() {
                return Err(RingError::MemoryLost);
            }
            self.losses = losses;
        }
        if self.seen_avail == self.next_avail {
            let index = self.load_avail_index();
            if index == self.next_avail {
                return Ok(false);
            }
            if index.wrapping_sub(self.next_avail) > self.shape.size {
                return Err(RingError::Index { from: self.next_avail, to: index });
            }
            self.seen_avail = index;
        }
        let slot = usize::from(self.next_avail & (self.shape.size - 1));
        let head = self.load(self.parts.avail, 4 + 2 * slot, Ordering::Relaxed);
        if head >= self.shape.size {
            return Err(RingError::Head(head));
        }
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.heads[word] & bit != 0 {
            return Err(RingError::Twice(head));
        }
        self.heads[word] |= bit;
        self.in_flight += 1;
        self.order[slot] = head;
        self.next_avail = self.next_avail.wrapping_add(1);
        chain.head = head;
        chain.readable.begin(&self.memory);
        chain.writable.begin(&self.memory);
        chain.fault = self.walk(head, chain).err();
        if !matches!(chain.fault, None | Some(ChainError::Address { .. })) {
            chain.writable.clear();
        }
        Ok(true)
    }

    /// Collects a chain's buffers. A bad address does not end the walk: the status byte behind it
    /// tells the driver, which would otherwise take a stale one for an answer.
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut table = (self.parts.desc, self.shape.size);
        let mut indirect = false;
        let mut index = head;
        let mut left = usize::from(self.shape.size).min(MAX_CHAIN);
        let mut writes = false;
        let mut bad_address = Ok(());
        loop {
            if left == 0 {
                return Err(ChainError::TooLong);
            }
            left -= 1;
            let desc = self.read_desc(table.0, index);
            if desc.flags & DESC_F_INDIRECT != 0 {
                let bad = ChainError::Indirect { len: desc.len };
                let entries = u64::from(desc.len) / DESC_BYTES;
                let whole = u64::from(desc.len).is_multiple_of(DESC_BYTES);
                let allowed = self.shape.indirect && !indirect && desc.flags & DESC_F_NEXT == 0;
                let Ok(entries) = u16::try_from(entries) else { return Err(bad) };
                if !allowed || !whole || entries == 0 {
                    return Err(bad);
                }
                let host = self.memory.contiguous(desc.addr, desc.len.into()).ok_or(bad)?;
                table = (host, entries);
                indirect = true;
                index = 0;
                left = usize::from(entries).min(MAX_CHAIN);
                continue;
            }
            if desc.len == 0 {
                return Err(ChainError::Empty);
            }
            let buffer = if desc.flags & DESC_F_WRITE != 0 {
                writes = true;
                &mut chain.writable
            } else if writes {
                return Err(ChainError::Order);
            } else {
                &mut chain.readable
            };
            if !buffer.append(desc.addr, desc.len) {
                if desc.flags & DESC_F_NEXT == 0 {
                    // The status byte itself is nowhere.
                    chain.writable.clear();
                }
                bad_address = bad_address.and(Err(ChainError::Address { at: desc.addr, len: desc.len }));
            }
            if desc.flags & DESC_F_NEXT == 0 {
                return bad_address;
            }
            if desc.next >= table.1 {
                return Err(ChainError::Next { next: desc.next });
            }
            index = desc.next;
        }
    }

    /// Reads a descriptor once.
    fn read_desc(&self, table: NonNull<u8>, index: u16) -> Desc {
        // SAFETY: callers checked `index` against the table's length, and the table lies in
        // `self.memory`, which keeps it mapped.
        // JUSTIFICATION: the guest may change the bytes at any time, so each is loaded exactly once.
        let at = unsafe { table.add(usize::from(index) * 16) }.as_ptr();
        let mut bytes = [0u8; 16];
        if at.addr().is_multiple_of(8) {
            // SAFETY: 16 mapped bytes, aligned for words.
            // JUSTIFICATION: as above.
            let (low, high) = unsafe {
                (ptr::read_volatile(at.cast::<u64>()), ptr::read_volatile(at.add(8).cast::<u64>()))
            };
            let (low, high) = (u64::from_le(low), u64::from_le(high));
            bytes[..8].copy_from_slice(&low.to_le_bytes());
            bytes[8..].copy_from_slice(&high.to_le_bytes());
        } else {
            // An indirect table may lie anywhere.
            for (n, byte) in bytes.iter_mut().enumerate() {
                // SAFETY: 16 mapped bytes.
                // JUSTIFICATION: as above.
                *byte = unsafe { ptr::read_volatile(at.add(n)) };
            }
        }
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Desc {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// Returns a chain: `len` bytes of its writable part were written. The driver sees it after
    /// [`Ring::publish`], in the order in which it made its chains available.
    ///
    /// Why in order: a front end whose back end was killed goes on from the used index. Were a chain
    /// returned before an older one, the newer would be done again, from memory that the guest has
    /// reused since, and the older never. In order, the used index says exactly what was done.
    /// Price: a chain waits for the older ones; see ARCHITECTURE.md, "Decisions".
    pub(crate) fn push_used(&mut self, head: u16, len: u32) {
        let mask = self.shape.size - 1;
        self.done[usize::from(head)] = len.min(NOT_DONE - 1);
        while self.in_flight > 0 {
            let head = self.order[usize::from(self.oldest & mask)];
            let len = std::mem::replace(&mut self.done[usize::from(head)], NOT_DONE);
            if len == NOT_DONE {
                return;
            }
            self.oldest = self.oldest.wrapping_add(1);
            self.emit(head, len);
        }
    }

    /// Writes one used element.
    fn emit(&mut self, head: u16, len: u32) {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        debug_assert!(self.heads[word] & bit != 0, "a chain is returned once");
        self.heads[word] &= !bit;
        self.in_flight -= 1;
        let slot = usize::from(self.next_used & (self.shape.size - 1));
        // SAFETY: `slot` is below the ring's size, and the used ring lies in `self.memory`, aligned
        // for words.
        // JUSTIFICATION: the used ring is the guest's memory.
        unsafe {
            let element = self.parts.used.add(4 + 8 * slot).cast::<u32>().as_ptr();
            ptr::write_volatile(element, u32::from(head).to_le());
            ptr::write_volatile(element.add(1), len.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all chains returned so far; answers whether it wants an interrupt for them.
    pub(crate) fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        self.published = self.next_used;
        self.store(self.parts.used, 2, self.next_used, Ordering::Release);
        // The driver publishes its wish, then looks at our index; we the other way round. Without
        // a full fence on both sides each may miss the other (VIRTIO 1.2 §2.7.7.2).
        fence(Ordering::SeqCst);
        let before = self.signalled.replace(self.next_used);
        if self.shape.event_idx {
            let event = self.load(self.parts.avail, 4 + 2 * usize::from(self.shape.size), Ordering::Relaxed);
            let Some(before) = before else { return true };
            let news = self.next_used.wrapping_sub(before);
            self.next_used.wrapping_sub(event).wrapping_sub(1) < news
        } else {
            let flags = self.load(self.parts.avail, 0, Ordering::Relaxed);
            before.is_none() || flags & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Makes the next [`Ring::publish`] ask for an interrupt whatever the driver says: it may have
    /// missed one, because the ring was just started or its call descriptor replaced.
    pub(crate) fn forget_signal(&mut self) {
        self.signalled = None;
    }

    /// Asks the driver to kick at its next chain. `true` if there is one already, so that the caller
    /// must look again instead of waiting.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.shape.event_idx {
            let at = 4 + 8 * usize::from(self.shape.size);
            self.store(self.parts.used, at, self.next_avail, Ordering::Relaxed);
        } else if self.kicks_off {
            self.store_kick_flag(false);
        }
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Tells the driver that it need not kick. With event indices an index left behind says so.
    pub(crate) fn disable_kicks(&mut self) {
        if !self.shape.event_idx && !self.kicks_off {
            self.store_kick_flag(true);
        }
    }

    fn store_kick_flag(&mut self, off: bool) {
        self.kicks_off = off;
        self.store(self.parts.used, 0, if off { USED_F_NO_NOTIFY } else { 0 }, Ordering::Relaxed);
    }

    fn load_avail_index(&self) -> u16 {
        self.load(self.parts.avail, 2, Ordering::Acquire)
    }

    /// Loads 16 bits at byte `at` of a part.
    fn load(&self, part: NonNull<u8>, at: usize, order: Ordering) -> u16 {
        // SAFETY: callers pass offsets within the part, which lies in `self.memory` and is aligned
        // for 16 bits; atomics allow for the guest's stores.
        // JUSTIFICATION: the ring is shared with the guest.
        u16::from_le(unsafe { AtomicU16::from_ptr(part.add(at).cast().as_ptr()) }.load(order))
    }

    /// Stores 16 bits at byte `at` of a part.
    fn store(&self, part: NonNull<u8>, at: usize, value: u16, order: Ordering) {
        // SAFETY: as for `load`; the mapping is writable.
        // JUSTIFICATION: as for `load`.
        unsafe { AtomicU16::from_ptr(part.add(at).cast().as_ptr()) }.store(value.to_le(), order);
    }
}

#[cfg(test)]
#[path = "ring/tests.rs"]
pub(crate) mod tests;
