//! Guest memory: what the front end shares, mapped, and the one way from guest addresses to ours.
//!
//! Invariant: a region is unmapped only when the last [`Memory`] that holds it is gone, and each
//! request in flight holds the `Memory` that its addresses were resolved in. Segments leave this
//! module only inside a [`Buffer`], which holds that memory too.
//! Absent: no Rust reference to guest memory is ever formed, and nothing here knows what a
//! descriptor is. What happens when a front end shrinks a file after it was mapped is in
//! [`crate::faults`]; here the files' lengths are checked when they are mapped.

use std::fs::File;
use std::ptr::{self, NonNull};
use std::rc::Rc;
use std::sync::Arc;

use cow_engine::memory::{Segment, Source, Target};
use rustix::fs::{FileType, fstat, fstatfs};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::faults::Guard;

/// Regions that a front end may share at once (`VHOST_USER_GET_MAX_MEM_SLOTS`).
pub(crate) const MAX_REGIONS: usize = 509;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Bytes in a page of a file that is not on hugetlbfs.
const PAGE_BYTES: u64 = 4096;

/// Why memory was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum MemoryError {
    /// Too many regions.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// Addresses or lengths that wrap, or a region without a byte.
    #[error("a memory region of {len} bytes at {guest:#x} cannot be")]
    Range {
        /// Guest-physical address.
        guest: u64,
        /// Bytes.
        len: u64,
    },
    /// Two regions claim the same guest-physical address.
    #[error("the memory region at {guest:#x} overlaps another")]
    Overlap {
        /// Guest-physical address.
        guest: u64,
    },
    /// The descriptor is none of a file, whose length could be checked.
    #[error("the memory region at {guest:#x} is not in a regular file")]
    NotAFile {
        /// Guest-physical address.
        guest: u64,
    },
    /// Touching the end of the region would be a `SIGBUS`.
    #[error("the memory region at {guest:#x} ends at byte {end} of a file of {file_len} bytes")]
    FileTooShort {
        /// Guest-physical address.
        guest: u64,
        /// Where the region ends in its file.
        end: u64,
        /// The file's length in bytes.
        file_len: u64,
    },
    /// No such region.
    #[error("no memory region of {len} bytes at {guest:#x}")]
    Unknown {
        /// Guest-physical address.
        guest: u64,
        /// Bytes.
        len: u64,
    },
    /// The kernel refused.
    #[error("could not map guest memory")]
    Map(#[source] rustix::io::Errno),
}

/// A region as the front end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// Guest-physical address.
    pub(crate) guest: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// The front end's own address of it, in which it speaks of rings.
    pub(crate) user: u64,
    /// Where it starts in its file.
    pub(crate) offset: u64,
}

/// One mapped region.
struct Region {
    spec: RegionSpec,
    /// Where the region's first byte is in our address space.
    host: NonNull<u8>,
    /// The mapping, which starts at or before `host`.
    mapping: NonNull<u8>,
    mapping_len: usize,
    /// Ends before the mapping.
    guard: Option<Guard>,
}

// SAFETY: a region is an address range that is mapped until it is dropped; its bytes are touched
// only through raw pointers, volatile or atomic, or by the kernel.
// JUSTIFICATION: the control thread maps what the queues' threads use.
unsafe impl Send for Region {}
// SAFETY: as above; a shared region gives out addresses only.
// JUSTIFICATION: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(spec: RegionSpec, file: &File) -> Result<Self, MemoryError> {
        let RegionSpec { guest, len, user, offset } = spec;
        let range = MemoryError::Range { guest, len };
        let (Some(end), Some(_), Some(_)) =
            (offset.checked_add(len), guest.checked_add(len), user.checked_add(len))
        else {
            return Err(range);
        };
        if len == 0 {
            return Err(range);
        }
        let stat = fstat(file).map_err(MemoryError::Map)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(MemoryError::NotAFile { guest });
        }
        let file_len = stat.st_size.cast_unsigned();
        if end > file_len {
            return Err(MemoryError::FileTooShort { guest, end, file_len });
        }
        let page = match fstatfs(file) {
            Ok(fs) if fs.f_type == HUGETLBFS_MAGIC => u64::try_from(fs.f_bsize).unwrap_or(PAGE_BYTES),
            _ => PAGE_BYTES,
        };
        // The kernel maps whole pages, and unmaps huge ones only if the length says so.
        let start = offset / page * page;
        let Some(whole) = end.checked_next_multiple_of(page).map(|end| end - start) else {
            return Err(range);
        };
        let (Ok(mapping_len), Ok(skip)) = (usize::try_from(whole), usize::try_from(offset - start)) else {
            return Err(range);
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        // JUSTIFICATION: guest memory is shared by descriptors; there is no other way to it.
        let mapping = unsafe {
            mmap(ptr::null_mut(), mapping_len, ProtFlags::READ | ProtFlags::WRITE, flags, file, start)
        }
        .map_err(MemoryError::Map)?;
        let Some(mapping) = NonNull::new(mapping.cast::<u8>()) else {
            return Err(MemoryError::Map(rustix::io::Errno::NOMEM));
        };
        // SAFETY: `skip` is less than the mapping's length.
        // JUSTIFICATION: as above.
        let host = unsafe { mapping.add(skip) };
        let page = usize::try_from(page).unwrap_or(mapping_len);
        let guard = Some(Guard::new(mapping, mapping_len, page));
        Ok(Self { spec, host, mapping, mapping_len, guard })
    }

    /// The `len` bytes from `skip` on, which the caller has found to be in the region.
    fn segment(&self, skip: u64, len: u64) -> Option<Segment> {
        let (skip, len) = (usize::try_from(skip).ok()?, usize::try_from(len).ok()?);
        Some(Segment::new(self.host.as_ptr().wrapping_add(skip), len))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: mapped in `map` with this length, and unmapped once; whoever uses its addresses
        // holds the region.
        // JUSTIFICATION: see `map`.
        if let Err(error) = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapping_len) } {
            log::error!("could not unmap guest memory: {error}");
        }
    }
}

/// One generation of a guest's memory. It never changes: another table is another generation, which
/// shares the mappings of the regions that stay.
#[derive(Default)]
pub(crate) struct Memory {
    /// By guest-physical address.
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// A whole new table (`VHOST_USER_SET_MEM_TABLE`).
    pub(crate) fn of(table: impl IntoIterator<Item = (RegionSpec, File)>) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (spec, file) in table {
            memory.insert(spec, &file)?;
        }
        Ok(memory)
    }

    /// This memory and one region more (`VHOST_USER_ADD_MEM_REG`).
    pub(crate) fn with(&self, spec: RegionSpec, file: &File) -> Result<Self, MemoryError> {
        let mut memory = Self { regions: self.regions.clone() };
        memory.insert(spec, file)?;
        Ok(memory)
    }

    /// This memory without a region (`VHOST_USER_REM_MEM_REG`), which is named by its addresses and
    /// length.
    pub(crate) fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let same = |region: &Arc<Region>| {
            let have = region.spec;
            (have.guest, have.len, have.user) == (spec.guest, spec.len, spec.user)
        };
        let Some(found) = self.regions.iter().position(same) else {
            return Err(MemoryError::Unknown { guest: spec.guest, len: spec.len });
        };
        let mut regions = self.regions.clone();
        regions.remove(found);
        Ok(Self { regions })
    }

    /// Whether the front end has taken part of it away.
    pub(crate) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.guard.as_ref().is_some_and(Guard::is_lost))
    }

    /// Whether there is no region yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    fn insert(&mut self, spec: RegionSpec, file: &File) -> Result<(), MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let end = spec
            .guest
            .checked_add(spec.len)
            .ok_or(MemoryError::Range { guest: spec.guest, len: spec.len })?;
        let at = self.regions.partition_point(|region| region.spec.guest < spec.guest);
        let after_next = self.regions.get(at).is_some_and(|next| next.spec.guest < end);
        let in_last = at > 0 && {
            let last = self.regions[at - 1].spec;
            last.guest + last.len > spec.guest
        };
        if after_next || in_last {
            return Err(MemoryError::Overlap { guest: spec.guest });
        }
        self.regions.insert(at, Arc::new(Region::map(spec, file)?));
        Ok(())
    }

    /// The region that has guest-physical address `at`.
    fn find(&self, at: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|region| region.spec.guest <= at);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (at - region.spec.guest < region.spec.len).then_some(region)
    }

    /// Our addresses of guest-physical `at..at + len`, in one or more pieces across adjacent regions.
    /// `None`, perhaps after some pieces, if part of it is no memory.
    fn pieces(&self, mut at: u64, mut len: u64, mut take: impl FnMut(Segment)) -> Option<()> {
        at.checked_add(len)?;
        while len > 0 {
            let region = self.find(at)?;
            let skip = at - region.spec.guest;
            let part = len.min(region.spec.len - skip);
            take(region.segment(skip, part)?);
            (at, len) = (at + part, len - part);
        }
        Some(())
    }

    /// Our address of guest-physical `at..at + len`, if it is memory of one region.
    pub(crate) fn contiguous(&self, at: u64, len: u64) -> Option<NonNull<u8>> {
        let region = self.find(at)?;
        let skip = at - region.spec.guest;
        if len > region.spec.len - skip {
            return None;
        }
        NonNull::new(region.segment(skip, len)?.base())
    }

    /// Our address of what the front end calls `at..at + len`, if it is memory of one region.
    pub(crate) fn user(&self, at: u64, len: u64) -> Option<NonNull<u8>> {
        let inside = |region: &&Arc<Region>| {
            let spec = region.spec;
            at >= spec.user && at - spec.user < spec.len && len <= spec.len - (at - spec.user)
        };
        let region = self.regions.iter().find(inside)?;
        NonNull::new(region.segment(at - region.spec.user, len)?.base())
    }
}

/// A generation as one queue's thread holds it: counted without atomics, once per request.
pub(crate) type Pinned = Rc<Arc<Memory>>;

/// The part of a chain that goes one way: guest memory, in order, and the memory it is in.
///
/// Its lists are kept from request to request.
#[derive(Default)]
pub(crate) struct Buffer {
    memory: Option<Pinned>,
    segments: Vec<Segment>,
    /// Segments before this one were taken.
    first: usize,
    len: u64,
    /// A last byte that was split off.
    last: Option<NonNull<u8>>,
}

impl Buffer {
    /// Empties the buffer and ties it to a generation.
    pub(crate) fn begin(&mut self, memory: &Pinned) {
        self.clear();
        self.memory = Some(memory.clone());
    }

    /// Empties the buffer and lets its generation go.
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.first = 0;
        self.len = 0;
        self.last = None;
        self.memory = None;
    }

    /// Appends guest-physical `at..at + len`; `false`, and nothing appended, if that is no memory.
    pub(crate) fn append(&mut self, at: u64, len: u32) -> bool {
        let Some(memory) = &self.memory else { return false };
        let before = self.segments.len();
        if memory.pieces(at, len.into(), |segment| self.segments.push(segment)).is_none() {
            self.segments.truncate(before);
            return false;
        }
        self.len += u64::from(len);
        true
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    fn segments(&self) -> &[Segment] {
        &self.segments[self.first..]
    }

    /// Takes the first bytes off, each read once; `false` and nothing taken if there are fewer.
    pub(crate) fn take_front(&mut self, out: &mut [u8]) -> bool {
        if self.len < out.len() as u64 {
            return false;
        }
        let mut done = 0;
        while done < out.len() {
            let segment = self.segments[self.first];
            let part = segment.len().min(out.len() - done);
            let to = &mut out[done..done + part];
            // SAFETY: the segment was resolved in `self.memory`, which keeps it mapped, and has
            // `part` bytes; `to` is ours and does not overlap it.
            // JUSTIFICATION: guest memory may not be read through references.
            unsafe { ptr::copy_nonoverlapping(segment.base(), to.as_mut_ptr(), part) };
            done += part;
            if part == segment.len() {
                self.first += 1;
            } else {
                self.segments[self.first] = segment.skip(part);
            }
        }
        self.len -= out.len() as u64;
        true
    }

    /// Splits the last byte off, for [`Buffer::set_last`]; `false` if there is none.
    pub(crate) fn split_last(&mut self) -> bool {
        if self.segments().is_empty() {
            return false;
        }
        let Some(segment) = self.segments.pop() else { return false };
        let rest = segment.len() - 1;
        self.last = NonNull::new(segment.base().wrapping_add(rest));
        if rest > 0 {
            self.segments.push(Segment::new(segment.base(), rest));
        }
        self.len -= 1;
        self.last.is_some()
    }

    /// Stores the byte that was split off; `false` if none was.
    pub(crate) fn set_last(&mut self, byte: u8) -> bool {
        let Some(last) = self.last.take() else { return false };
        // SAFETY: `last` is in a segment of `self.memory`, which keeps it mapped and writable.
        // JUSTIFICATION: the status byte is the guest's memory.
        unsafe { ptr::write_volatile(last.as_ptr(), byte) };
        true
    }

    /// The bytes, for a write to take.
    pub(crate) fn source(&self) -> Source<'_> {
        // SAFETY: the segments were resolved in `self.memory`, which `self` holds for as long as the
        // source borrows it. The guest may change the bytes, which a source allows for.
        // JUSTIFICATION: no copy between guest memory and the image.
        unsafe { Source::from_segments(self.segments()) }
    }

    /// The bytes, for a read to fill.
    pub(crate) fn target(&mut self) -> Target<'_> {
        // SAFETY: as for `source`; the mapping is writable, and no reference to it is ever formed.
        // JUSTIFICATION: as for `source`.
        unsafe { Target::from_segments(self.segments()) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    pub(crate) fn memfd(len: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn spec(guest: u64, len: u64) -> RegionSpec {
        RegionSpec { guest, len, user: guest + 0x7000_0000, offset: 0 }
    }

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        let error = Memory::of([(spec(0, 8192), memfd(4096))]).err().unwrap();
        assert!(matches!(error, MemoryError::FileTooShort { end: 8192, file_len: 4096, .. }));
    }

    #[test]
    fn wrapping_and_empty_regions_are_refused() {
        for (guest, len) in [(u64::MAX - 10, 4096), (0, 0)] {
            assert!(Memory::of([(spec(guest.min(1 << 60), len), memfd(4096))]).is_err() || len != 0);
            let wraps = RegionSpec { guest, len, user: 0, offset: 0 };
            assert!(Memory::of([(wraps, memfd(4096))]).is_err());
        }
        let offset = RegionSpec { guest: 0, len: 4096, user: 0, offset: u64::MAX - 5 };
        assert!(Memory::of([(offset, memfd(4096))]).is_err());
    }

    #[test]
    fn devices_and_sockets_are_no_memory() {
        let null = File::options().read(true).write(true).open("/dev/zero").unwrap();
        assert!(matches!(Memory::of([(spec(0, 4096), null)]), Err(MemoryError::NotAFile { .. })));
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let memory = Memory::of([(spec(0x1000, 0x2000), memfd(0x2000))]).unwrap();
        for (guest, len) in [(0x1000, 0x1000), (0x2000, 0x1000), (0, 0x1001), (0, 0x8000)] {
            assert!(matches!(
                memory.with(spec(guest, len), &memfd(0x8000)),
                Err(MemoryError::Overlap { .. })
            ));
        }
        assert!(memory.with(spec(0, 0x1000), &memfd(0x1000)).is_ok());
        assert!(memory.with(spec(0x3000, 0x1000), &memfd(0x1000)).is_ok());
    }

    #[test]
    fn a_span_crosses_adjacent_regions_and_no_hole() {
        let (a, b) = (memfd(0x2000), memfd(0x1000));
        a.write_all_at(b"end", 0xffd).unwrap();
        b.write_all_at(b"start", 0).unwrap();
        let memory = Memory::of([
            (spec(0x1000, 0x1000), b),
            (RegionSpec { guest: 0, len: 0x1000, user: 0x9000_0000, offset: 0 }, a),
        ])
        .unwrap();
        let memory = Rc::new(Arc::new(memory));
        let mut buffer = Buffer::default();
        buffer.begin(&memory);
        assert!(buffer.append(0xffd, 8));
        assert!(!buffer.append(0x1ff0, 0x11));
        assert!(!buffer.append(u64::MAX, 2));
        let mut out = [0; 8];
        assert!(buffer.take_front(&mut out[..4]));
        assert!(buffer.take_front(&mut out[4..]));
        assert_eq!(&out, b"endstart");
        assert!(!buffer.take_front(&mut out[..1]));
        assert!(memory.contiguous(0xffd, 3).is_some());
        assert!(memory.contiguous(0xffd, 4).is_none());
    }

    #[test]
    fn the_last_byte_is_split_off_and_stored() {
        let file = memfd(0x1000);
        let memory = Rc::new(Arc::new(Memory::of([(spec(0, 0x1000), file.try_clone().unwrap())]).unwrap()));
        let mut buffer = Buffer::default();
        buffer.begin(&memory);
        assert!(buffer.append(16, 2));
        assert!(buffer.split_last());
        assert_eq!(buffer.len(), 1);
        assert!(buffer.set_last(7));
        assert!(!buffer.set_last(8));
        let mut out = [0; 3];
        file.read_exact_at(&mut out, 16).unwrap();
        assert_eq!(out, [0, 7, 0]);
        assert!(buffer.split_last());
        assert!(!buffer.split_last());
    }

    #[test]
    fn a_region_stays_mapped_while_another_generation_or_request_holds_it() {
        let file = memfd(0x2000);
        let first = Memory::of([(spec(0, 0x1000), file.try_clone().unwrap())]).unwrap();
        let second = first.with(spec(0x1000, 0x1000), &file).unwrap();
        assert_eq!(first.contiguous(0, 1), second.contiguous(0, 1));
        let third = second.without(spec(0, 0x1000)).unwrap();
        assert!(third.contiguous(0, 1).is_none());
        assert!(third.without(spec(0, 0x1000)).is_err());
        let region = Arc::downgrade(&second.regions[0]);
        drop(second);
        assert!(region.upgrade().is_some());
        drop(first);
        assert!(region.upgrade().is_none());
    }

    #[test]
    fn an_offset_inside_a_page_is_honoured() {
        let file = memfd(0x3000);
        file.write_all_at(b"x", 0x1010).unwrap();
        let spec = RegionSpec { guest: 0x5000, len: 0x1000, user: 0, offset: 0x1010 };
        let memory = Rc::new(Arc::new(Memory::of([(spec, file)]).unwrap()));
        let mut buffer = Buffer::default();
        buffer.begin(&memory);
        assert!(buffer.append(0x5000, 1));
        let mut out = [0];
        assert!(buffer.take_front(&mut out));
        assert_eq!(&out, b"x");
        assert!(memory.user(0, 0x1000).is_some());
        assert!(memory.user(0, 0x1001).is_none());
    }

    #[test]
    fn the_number_of_regions_is_bounded() {
        let file = memfd(0x1000);
        let table = (0..=MAX_REGIONS as u64).map(|n| (spec(n * 0x1000, 0x1000), file.try_clone().unwrap()));
        assert!(matches!(Memory::of(table), Err(MemoryError::TooMany)));
    }
}
