//! The driver's side of a split ring (VIRTIO 1.2 §2.7), with every field in the test's hand.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Error, Memory, PATIENCE, Result};
use crate::raw::readable;
use crate::virtio::descriptor;

/// A device that has moved its index interrupts within this time, or has forgotten to.
const INTERRUPT_LAG: Duration = Duration::from_secs(20);

/// One descriptor as it stands in the table, any values at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub addr: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// [`descriptor`] flags.
    pub flags: u16,
    /// The next descriptor, if the flags say that there is one.
    pub next: u16,
}

impl Descriptor {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, ..Self::default() }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: descriptor::WRITE, next: 0 }
    }

    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that is given back.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// A split ring of which we are the driver.
#[derive(Debug)]
pub struct Queue {
    /// Its number.
    pub index: usize,
    pub(super) size: u16,
    memory: Arc<Memory>,
    pub(super) table: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
    next_avail: u16,
    /// `next_avail` when the device was last told.
    told: u16,
    pub(super) next_used: u16,
    free: Vec<u16>,
    /// Chains with the device, and the descriptors that come back with them.
    flying: HashMap<u16, Vec<u16>>,
    /// Used elements that were collected while waiting for another.
    collected: HashMap<u16, Used>,
    pub(super) event_idx: bool,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
}

impl Queue {
    pub(super) fn new(index: usize, size: u16, memory: &Arc<Memory>, base: u16) -> Result<Self> {
        let entries = u64::from(size);
        let table = memory.alloc(0, 16 * entries, 4096)?;
        let avail = memory.alloc(0, 6 + 2 * entries, 2)?;
        let used = memory.alloc(0, 6 + 8 * entries, 4)?;
        memory.store_u16(avail + 2, base, Ordering::Relaxed);
        memory.store_u16(used + 2, base, Ordering::Relaxed);
        Ok(Self {
            index,
            size,
            memory: Arc::clone(memory),
            table,
            avail,
            used,
            next_avail: base,
            told: base,
            next_used: base,
            free: (0..size).rev().collect(),
            flying: HashMap::new(),
            collected: HashMap::new(),
            event_idx: false,
            kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            call: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Puts `chain` into the table and on the ring, tells the device, and returns the head.
    ///
    /// # Errors
    /// If there are not so many free descriptors.
    pub fn submit(&mut self, chain: &[Descriptor]) -> Result<u16> {
        let head = self.place(chain)?;
        self.kick_if_wanted()?;
        Ok(head)
    }

    /// Like [`Queue::submit`], without telling the device.
    ///
    /// # Errors
    /// If there are not so many free descriptors.
    pub fn place(&mut self, chain: &[Descriptor]) -> Result<u16> {
        let indices = self.take_descriptors(chain.len())?;
        for (position, element) in chain.iter().enumerate() {
            let mut element = *element;
            if let Some(&next) = indices.get(position + 1) {
                element.flags |= descriptor::NEXT;
                element.next = next;
            }
            self.set_descriptor(indices[position], element);
        }
        let head = indices[0];
        self.expect(head, indices);
        self.publish(head);
        Ok(head)
    }

    /// Puts `chain` into an indirect table of its own at `table` and one descriptor on the ring.
    ///
    /// # Errors
    /// If there is no free descriptor.
    pub fn place_indirect(&mut self, table: u64, chain: &[Descriptor]) -> Result<u16> {
        for (position, element) in chain.iter().enumerate() {
            let mut element = *element;
            if position + 1 < chain.len() {
                element.flags |= descriptor::NEXT;
                element.next = u16::try_from(position + 1).map_err(std::io::Error::other)?;
            }
            self.memory.store(table + 16 * position as u64, &element.bytes());
        }
        let len = u32::try_from(16 * chain.len()).map_err(std::io::Error::other)?;
        self.place(&[Descriptor { addr: table, len, flags: descriptor::INDIRECT, next: 0 }])
    }

    /// Reserves `count` descriptors.
    ///
    /// # Errors
    /// If there are not so many free ones.
    pub fn take_descriptors(&mut self, count: usize) -> Result<Vec<u16>> {
        if self.free.len() < count || count == 0 {
            return Err(Error::Exhausted("descriptors"));
        }
        let rest = self.free.len() - count;
        let mut taken = self.free.split_off(rest);
        taken.reverse();
        Ok(taken)
    }

    /// Writes one descriptor of the table.
    pub fn set_descriptor(&self, index: u16, element: Descriptor) {
        self.memory.store(self.table + 16 * u64::from(index), &element.bytes());
    }

    /// Remembers that the device may give `head` back, and with it `descriptors`.
    pub fn expect(&mut self, head: u16, descriptors: Vec<u16>) {
        let before = self.flying.insert(head, descriptors);
        assert!(before.is_none(), "head {head} is with the device already");
    }

    /// Puts `head`, whatever it is, on the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        self.memory.store_u16(slot, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory.store_u16(self.avail + 2, self.next_avail, Ordering::Release);
    }

    /// Overwrites the available ring's index with any value.
    pub fn corrupt_avail_index(&mut self, value: u16) {
        self.memory.store_u16(self.avail + 2, value, Ordering::Release);
    }

    /// Tells the device of new buffers if it wants to know.
    ///
    /// # Errors
    /// If the eventfd refuses.
    pub fn kick_if_wanted(&mut self) -> Result<()> {
        // The index must be visible before we look whether the device sleeps (VIRTIO 1.2 §2.7.13).
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.next_avail);
        self.told = new;
        let wanted = if self.event_idx {
            let event_at = self.used + 4 + 8 * u64::from(self.size);
            let event = self.memory.load_u16(event_at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.memory.load_u16(self.used, Ordering::Relaxed) & 1 == 0
        };
        if wanted { self.kick() } else { Ok(()) }
    }

    /// Tells the device unconditionally.
    ///
    /// # Errors
    /// If the eventfd refuses.
    pub fn kick(&self) -> Result<()> {
        Ok(self.kick.write(1)?)
    }

    /// Chains that the device holds.
    pub fn flying(&self) -> usize {
        self.flying.len()
    }

    /// The used ring's index as the device last wrote it.
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.used + 2, Ordering::Acquire)
    }

    /// Takes the next used element, if there is one.
    ///
    /// # Errors
    /// If it is none that the device holds, or its index runs ahead.
    pub fn poll_used(&mut self) -> Result<Option<Used>> {
        let index = self.used_index();
        if index == self.next_used {
            return Ok(None);
        }
        let ahead = index.wrapping_sub(self.next_used);
        if usize::from(ahead) > self.flying.len() {
            return Err(Error::Device(format!(
                "{ahead} elements are used, {} were with the device",
                self.flying.len()
            )));
        }
        let slot = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let bytes = self.memory.load(slot, 8);
        let id = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        let len = u32::from_le_bytes(bytes[4..].try_into().expect("four bytes"));
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(id).ok().filter(|head| self.flying.contains_key(head));
        let Some(head) = head else {
            return Err(Error::Device(format!("head {id} is used, which it did not hold")));
        };
        self.free.extend(self.flying.remove(&head).unwrap_or_default());
        Ok(Some(Used { head, len }))
    }

    /// Waits for the next used element as a driver does: by the interrupt.
    ///
    /// # Errors
    /// If none comes within [`PATIENCE`], or one comes without its interrupt.
    pub fn wait(&mut self) -> Result<Used> {
        self.wait_within(PATIENCE)?.ok_or(Error::Late("completion"))
    }

    /// Like [`Queue::wait`] with a limit, after which there is `None`.
    ///
    /// # Errors
    /// If an element came without its interrupt or breaks a rule of the ring.
    pub fn wait_within(&mut self, limit: Duration) -> Result<Option<Used>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(used) = self.poll_used()? {
                return Ok(Some(used));
            }
            if self.event_idx {
                let event_at = self.avail + 4 + 2 * u64::from(self.size);
                self.memory.store_u16(event_at, self.next_used, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if let Some(used) = self.poll_used()? {
                    return Ok(Some(used));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if readable(&self.call, left)? {
                // Its count does not matter.
                let _ = self.call.read();
            } else if self.used_index() != self.next_used {
                // The index comes first; the interrupt may be on its way.
                if !readable(&self.call, INTERRUPT_LAG)? {
                    return Err(Error::Device("a completion came without an interrupt".into()));
                }
            } else if Instant::now() >= deadline {
                return Ok(None);
            }
        }
    }

    /// Waits until `head` is used, keeping others for their own turn.
    pub(super) fn wait_for(&mut self, head: u16) -> Result<Used> {
        if !self.collect(head, PATIENCE)? {
            return Err(Error::Late("completion"));
        }
        Ok(self.collected.remove(&head).expect("just collected"))
    }

    /// Waits at most `limit` until `head` is used, and keeps it and others for their own turn.
    pub(super) fn collect(&mut self, head: u16, limit: Duration) -> Result<bool> {
        let deadline = Instant::now() + limit;
        while !self.collected.contains_key(&head) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.wait_within(left)? {
                Some(used) => self.collected.insert(used.head, used),
                None => return Ok(false),
            };
        }
        Ok(true)
    }
}
