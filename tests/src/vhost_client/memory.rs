//! Guest memory: regions on memfds, an allocator in guest addresses, access that may cross regions.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{Error, Result, USER_SHIFT};

/// Guest memory, shared with the back end.
#[derive(Debug)]
pub struct Memory {
    map: GuestMemoryMmap,
    regions: Vec<(u64, usize, File)>,
    /// Free extents of each region: begin to bytes.
    free: Mutex<Vec<BTreeMap<u64, u64>>>,
}

impl Memory {
    pub(super) fn new(regions: &[(u64, usize)]) -> Result<Self> {
        let mut ranges = Vec::new();
        let mut owned = Vec::new();
        let mut free = Vec::new();
        for &(gpa, bytes) in regions {
            let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC)?;
            let file = File::from(fd);
            file.set_len(bytes as u64)?;
            let backing = FileOffset::new(file.try_clone()?, 0);
            ranges.push((GuestAddress(gpa), bytes, Some(backing)));
            owned.push((gpa, bytes, file));
            free.push(BTreeMap::from([(gpa, bytes as u64)]));
        }
        let map = GuestMemoryMmap::from_ranges_with_files(&ranges).map_err(std::io::Error::other)?;
        Ok(Self { map, regions: owned, free: Mutex::new(free) })
    }

    /// Reserves `bytes` in region `region` at a multiple of `align` (a power of two).
    ///
    /// # Errors
    /// If the region has no such room.
    pub fn alloc(&self, region: usize, bytes: u64, align: u64) -> Result<u64> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let extents = &mut free[region];
        for (&begin, &length) in extents.iter() {
            let at = begin.next_multiple_of(align);
            let end = at + bytes;
            if end <= begin + length {
                extents.remove(&begin);
                if at > begin {
                    extents.insert(begin, at - begin);
                }
                if end < begin + length {
                    extents.insert(end, begin + length - end);
                }
                return Ok(at);
            }
        }
        Err(Error::Exhausted("guest memory"))
    }

    /// Gives `bytes` at `gpa` back.
    pub fn release(&self, gpa: u64, bytes: u64) {
        let region = self
            .regions
            .iter()
            .position(|&(begin, length, _)| (begin..begin + length as u64).contains(&gpa))
            .expect("released memory came from alloc");
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let extents = &mut free[region];
        let (mut begin, mut length) = (gpa, bytes);
        if let Some(after) = extents.remove(&(begin + length)) {
            length += after;
        }
        if let Some((&before, &before_length)) = extents.range(..begin).next_back()
            && before + before_length == begin
        {
            extents.remove(&before);
            begin = before;
            length += before_length;
        }
        extents.insert(begin, length);
    }

    /// Stores bytes at a guest address; the range may cross touching regions.
    ///
    /// # Panics
    /// If the range is not guest memory: a mistake of the test.
    pub fn store(&self, gpa: u64, bytes: &[u8]) {
        self.map.write_slice(bytes, GuestAddress(gpa)).expect("the test's own memory");
    }

    /// Loads bytes from a guest address; the range may cross touching regions.
    ///
    /// # Panics
    /// If the range is not guest memory: a mistake of the test.
    pub fn load(&self, gpa: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.map.read_slice(&mut data, GuestAddress(gpa)).expect("the test's own memory");
        data
    }

    /// Cuts the file of region `index` to `bytes`: what is gone must not be touched any more, here either.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn shrink(&self, index: usize, bytes: u64) -> Result<()> {
        Ok(self.regions[index].2.set_len(bytes)?)
    }

    /// Begin and bytes of region `index`.
    pub fn region(&self, index: usize) -> (u64, u64) {
        let (gpa, bytes, _) = self.regions[index];
        (gpa, bytes as u64)
    }

    pub(super) fn load_u16(&self, gpa: u64, order: Ordering) -> u16 {
        u16::from_le(self.map.load(GuestAddress(gpa), order).expect("the ring lies in memory"))
    }

    pub(super) fn store_u16(&self, gpa: u64, value: u16, order: Ordering) {
        self.map.store(value.to_le(), GuestAddress(gpa), order).expect("the ring lies in memory");
    }

    pub(super) fn info(&self, index: usize) -> VhostUserMemoryRegionInfo {
        let (gpa, bytes, file) = &self.regions[index];
        VhostUserMemoryRegionInfo {
            guest_phys_addr: *gpa,
            memory_size: *bytes as u64,
            userspace_addr: gpa + USER_SHIFT,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_given_back_can_be_taken_again_in_one_piece() {
        let memory = Memory::new(&[(0x1000, 0x4000)]).expect("memory");
        let all: Vec<_> = (0..4).map(|_| memory.alloc(0, 0x1000, 512).expect("room")).collect();
        assert!(memory.alloc(0, 1, 1).is_err());
        for &at in [&all[1], &all[3], &all[0], &all[2]] {
            memory.release(at, 0x1000);
        }
        assert_eq!(memory.alloc(0, 0x4000, 0x1000).expect("all of it"), 0x1000);
    }
}
