//! The [`Storage`] seam on a host: transfers through the ring or on the spot, whole or an error.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::time::Duration;

use cbt::{ByteRange, SharedCells};
use io_uring::{opcode, squeue, types};
use rustix::fs::{Advice, FallocateFlags};

use super::executor::Inner;
use super::file::{Backing, Engine, HostDir, HostFile, length_of};
use super::ring::{Op, Ring};
use crate::areas::OpenedArea;
use crate::memory::{AlignedBuf, Segment, Source, Target};
use crate::storage::{Extent, Storage, Zeroing};

/// Segments that one system call takes (`IOV_MAX`).
const MAX_SEGMENTS: usize = 1024;

/// Bytes that are copied at a time where direct I/O does not take a request's own memory.
const BOUNCE: u64 = 256 << 10;

/// Files of a host, for the tasks of one executor.
#[derive(Clone)]
pub struct HostStorage {
    inner: Rc<Inner>,
}

/// Which way a transfer goes.
#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
}

impl HostStorage {
    pub(super) fn new(inner: Rc<Inner>) -> Self {
        Self { inner }
    }

    fn ring(&self) -> &Ring {
        &self.inner.ring
    }

    /// One operation of the ring, of so many bytes for a device.
    ///
    /// # Safety
    /// What `entry` points to must outlive the returned future's last poll or drop.
    async unsafe fn op(&self, entry: squeue::Entry, bytes: usize) -> io::Result<u32> {
        // SAFETY: the caller's promise.
        // JUSTIFICATION: the one place where memory is lent to the kernel.
        unsafe { Op::new(self.ring(), entry, bytes) }.await
    }

    /// Transfers `segments`, which the caller's borrow keeps alive, in one operation if it can.
    async fn transfer(&self, way: Way, file: &HostFile, at: u64, segments: &[Segment]) -> io::Result<()> {
        let total: usize = segments.iter().map(Segment::len).sum();
        if total == 0 {
            return Ok(());
        }
        let count = segments.len().min(MAX_SEGMENTS);
        let done = self.transfer_some(way, file, at, &segments[..count]).await?;
        if done == total { Ok(()) } else { self.transfer_rest(way, file, at, segments, done).await }
    }

    /// Goes on after a short transfer, until all is done. Rare, so it may allocate.
    async fn transfer_rest(
        &self,
        way: Way,
        file: &HostFile,
        at: u64,
        segments: &[Segment],
        mut done: usize,
    ) -> io::Result<()> {
        loop {
            let mut skip = done;
            let mut rest = Vec::new();
            for segment in segments {
                if skip >= segment.len() {
                    skip -= segment.len();
                } else {
                    rest.push(segment.skip(skip));
                    skip = 0;
                }
            }
            rest.truncate(MAX_SEGMENTS);
            if rest.is_empty() {
                return Ok(());
            }
            done += self.transfer_some(way, file, at + done as u64, &rest).await?;
        }
    }

    /// One transfer; answers how many bytes it moved, at least one.
    async fn transfer_some(
        &self,
        way: Way,
        file: &HostFile,
        at: u64,
        segments: &[Segment],
    ) -> io::Result<usize> {
        loop {
            let result = match file.engine {
                Engine::Inline => transfer_inline(way, file, at, segments),
                Engine::Uring => {
                    let fd = types::Fd(file.file.as_raw_fd());
                    let bytes = segments.iter().map(Segment::len).sum();
                    // SAFETY: `segments`, what they point to and `file` are borrowed by this future,
                    // which awaits the operation; dropping it ends the operation first.
                    // JUSTIFICATION: no copy between guest memory and the image.
                    unsafe { self.op(entry(way, fd, at, segments), bytes) }.await
                }
            };
            match result {
                Ok(0) => {
                    let kind = match way {
                        Way::Read => io::ErrorKind::UnexpectedEof,
                        Way::Write => io::ErrorKind::WriteZero,
                    };
                    return Err(kind.into());
                }
                Ok(moved) => return Ok(moved as usize),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives at least one byte from a socket, or 0 at its end.
    pub async fn recv(&self, socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
        let len = u32::try_from(into.len()).unwrap_or(u32::MAX);
        let entry = opcode::Recv::new(types::Fd(socket.as_raw_fd()), into.as_mut_ptr(), len).build();
        // SAFETY: `into` and `socket` are borrowed by this future, which awaits the operation.
        // JUSTIFICATION: sockets share the ring, so that one wait serves all.
        unsafe { self.op(entry, 0) }.await.map(|n| n as usize)
    }

    /// Sends at least one of `bytes` to a socket.
    pub async fn send(&self, socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let entry = opcode::Send::new(types::Fd(socket.as_raw_fd()), bytes.as_ptr(), len)
            .flags(libc::MSG_NOSIGNAL)
            .build();
        // SAFETY: `bytes` and `socket` are borrowed by this future, which awaits the operation.
        // JUSTIFICATION: as for `recv`.
        unsafe { self.op(entry, 0) }.await.map(|n| n as usize)
    }

    async fn fallocate(&self, file: &HostFile, range: ByteRange, mode: FallocateFlags) -> io::Result<()> {
        if file.engine == Engine::Inline {
            return Ok(rustix::fs::fallocate(&file.file, mode, range.start(), range.len())?);
        }
        let entry = opcode::Fallocate::new(types::Fd(file.file.as_raw_fd()), range.len())
            .offset(range.start())
            .mode(mode.bits().cast_signed())
            .build();
        // SAFETY: the entry points to no memory, and `file` is borrowed by this future.
        // JUSTIFICATION: a discard may take long; the ring's workers wait for it instead of a queue.
        unsafe { self.op(entry, 0) }.await.map(drop)
    }
}

impl Storage for HostStorage {
    type File = HostFile;
    type Dir = HostDir;
    type Cells = SharedCells;

    async fn read(&self, file: &HostFile, at: u64, mut into: Target<'_>) -> io::Result<()> {
        if file.takes(at, into.segments()) {
            return self.transfer(Way::Read, file, at, into.segments()).await;
        }
        // Direct I/O does not take the guest's buffer, or only part of a block is wanted: read whole
        // blocks into a buffer of our own, in parts that bound what one request can make us hold.
        let unit = file.alignment.offset;
        let end = at + into.len() as u64;
        let mut from = at;
        while from < end {
            let start = from / unit * unit;
            let to = end.min(start + BOUNCE);
            let mut bounce = AlignedBuf::zeroed(to_usize(to.next_multiple_of(unit) - start)?);
            let segment = [Segment::new(bounce.as_mut_ptr(), bounce.len())];
            self.transfer(Way::Read, file, start, &segment).await?;
            into.copy_from(to_usize(from - at)?, &bounce[to_usize(from - start)?..to_usize(to - start)?]);
            from = to;
        }
        Ok(())
    }

    async fn write(&self, file: &HostFile, at: u64, from: Source<'_>) -> io::Result<()> {
        if file.takes(at, from.segments()) {
            return self.transfer(Way::Write, file, at, from.segments()).await;
        }
        if !at.is_multiple_of(file.alignment.offset)
            || !(from.len() as u64).is_multiple_of(file.alignment.offset)
        {
            // Part of a block would need a read first, which races with its neighbours' writes.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a direct write of part of a block"));
        }
        let mut done = 0;
        while done < from.len() {
            let len = (from.len() - done).min(to_usize(BOUNCE)?);
            let mut bounce = AlignedBuf::zeroed(len);
            from.copy_to(done, &mut bounce);
            let segment = [Segment::new(bounce.as_mut_ptr(), len)];
            self.transfer(Way::Write, file, at + done as u64, &segment).await?;
            done += len;
        }
        Ok(())
    }

    async fn sync(&self, file: &HostFile) -> io::Result<()> {
        let fd = types::Fd(file.file.as_raw_fd());
        let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: the entry points to no memory, and `file` is borrowed by this future.
        // JUSTIFICATION: a queue goes on while the device flushes.
        unsafe { self.op(entry, 0) }.await.map(drop)
    }

    fn write_behind(&self, file: &HostFile, range: ByteRange) -> io::Result<()> {
        sync_range(file, range, libc::SYNC_FILE_RANGE_WRITE)
    }

    fn write_out(&self, file: &HostFile, range: ByteRange) -> io::Result<()> {
        let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        sync_range(file, range, wait | libc::SYNC_FILE_RANGE_WRITE)
    }

    fn drop_behind(&self, file: &HostFile, range: ByteRange) -> io::Result<()> {
        self.write_out(file, range)?;
        let len = NonZeroU64::new(range.len());
        Ok(rustix::fs::fadvise(&file.file, range.start(), len, Advice::DontNeed)?)
    }

    async fn zero(&self, file: &HostFile, range: ByteRange, zeroing: Zeroing) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mode = match zeroing {
            Zeroing::Unmap => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Zeroing::Keep => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        self.fallocate(file, range, mode).await
    }

    fn extents(&self, file: &HostFile, range: ByteRange) -> io::Result<Vec<Extent>> {
        let (mut extents, mut at) = (Vec::new(), range.start());
        let end_of = |found: rustix::io::Result<u64>, without: u64| match found {
            Ok(end) => Ok(end),
            Err(rustix::io::Errno::NXIO) => Ok(range.end()),
            // A device or file system that knows no holes has data everywhere.
            Err(rustix::io::Errno::INVAL) => Ok(without),
            Err(error) => Err(io::Error::from(error)),
        };
        while at < range.end() {
            let data = end_of(rustix::fs::seek(&file.file, rustix::fs::SeekFrom::Data(at)), at)?;
            if data > at {
                extents.push(Extent { range: ByteRange::new(at, data), hole: true });
            }
            if data >= range.end() {
                break;
            }
            let hole = end_of(rustix::fs::seek(&file.file, rustix::fs::SeekFrom::Hole(data)), range.end())?;
            // A writer may have moved the border between the two questions; always advance.
            at = hole.max(data + 1);
            extents.push(Extent { range: ByteRange::new(data, at), hole: false });
        }
        Ok(extents)
    }

    fn len(&self, file: &HostFile) -> io::Result<u64> {
        length_of(&file.file, file.backing())
    }

    fn set_len(&self, file: &HostFile, len: u64) -> io::Result<()> {
        match file.backing() {
            Backing::File => file.file.set_len(len),
            Backing::BlockDevice => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn allocate(&self, file: &HostFile, len: u64) -> io::Result<()> {
        if len > 0 {
            rustix::fs::fallocate(&file.file, FallocateFlags::empty(), 0, len)?;
        }
        Ok(())
    }

    fn map(&self, file: &HostFile, count: usize) -> io::Result<SharedCells> {
        SharedCells::map(&file.file, count)
    }

    fn hold_cells(&self, cells: &SharedCells, count: usize) -> io::Result<()> {
        cells.hold(count)
    }

    fn sync_cells(&self, cells: &SharedCells) -> io::Result<()> {
        cells.sync()
    }

    fn create(&self, dir: &HostDir, name: &str) -> io::Result<HostFile> {
        dir.create(name)
    }

    fn open(&self, dir: &HostDir, name: &str) -> io::Result<HostFile> {
        dir.open(name)
    }

    fn remove(&self, dir: &HostDir, name: &str) -> io::Result<()> {
        std::fs::remove_file(dir.path().join(name))
    }

    fn list(&self, dir: &HostDir) -> io::Result<Vec<String>> {
        dir.list()
    }

    fn open_area(&self, path: &str, name: &str, make: bool) -> io::Result<OpenedArea<HostFile>> {
        super::file::open_area(std::path::Path::new(path), name, make)
    }

    fn sync_dir(&self, dir: &HostDir) -> io::Result<()> {
        std::fs::File::open(dir.path())?.sync_all()
    }

    async fn sleep(&self, time: Duration) {
        let time = types::Timespec::from(time);
        let entry = opcode::Timeout::new(&raw const time).build();
        // SAFETY: `time` lives in this future, which awaits the operation; dropping it cancels the
        // time-out and waits for that.
        // JUSTIFICATION: deadlines share the ring with everything else.
        // The answer is always an error: it timed out, or was cancelled.
        let _ = unsafe { self.op(entry, 0) }.await;
    }
}

/// `sync_file_range(2)`, where the kernel has it for this kind of file.
fn sync_range(file: &HostFile, range: ByteRange, flags: libc::c_uint) -> io::Result<()> {
    let at = i64::try_from(range.start()).map_err(io::Error::other)?;
    let len = i64::try_from(range.len()).map_err(io::Error::other)?;
    // SAFETY: the call takes a descriptor, which `file` keeps open, and numbers.
    // JUSTIFICATION: neither std nor rustix has it.
    let answer = unsafe { libc::sync_file_range(file.file.as_raw_fd(), at, len, flags) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn to_usize(n: u64) -> io::Result<usize> {
    usize::try_from(n).map_err(io::Error::other)
}

/// The ring's entry for one transfer.
fn entry(way: Way, fd: types::Fd, at: u64, segments: &[Segment]) -> squeue::Entry {
    if let [one] = segments
        && let Ok(len) = u32::try_from(one.len())
    {
        return match way {
            Way::Read => opcode::Read::new(fd, one.base(), len).offset(at).build(),
            Way::Write => opcode::Write::new(fd, one.base(), len).offset(at).build(),
        };
    }
    let vectors = segments.as_ptr().cast::<libc::iovec>();
    let count = u32::try_from(segments.len()).unwrap_or(u32::MAX);
    match way {
        Way::Read => opcode::Readv::new(fd, vectors, count).offset(at).build(),
        Way::Write => opcode::Writev::new(fd, vectors, count).offset(at).build(),
    }
}

/// One transfer by a plain system call.
fn transfer_inline(way: Way, file: &HostFile, at: u64, segments: &[Segment]) -> io::Result<u32> {
    let fd = file.file.as_fd().as_raw_fd();
    let vectors = segments.as_ptr().cast::<libc::iovec>();
    let count = i32::try_from(segments.len()).map_err(io::Error::other)?;
    let at = i64::try_from(at).map_err(io::Error::other)?;
    // SAFETY: `segments` has the layout of `iovec`s, `count` of them, and the caller's borrow keeps
    // what they point to alive; the kernel answers EFAULT for memory that is not mapped.
    // JUSTIFICATION: guest memory is handed to the kernel without forming references to it.
    let moved = unsafe {
        match way {
            Way::Read => libc::preadv(fd, vectors, count, at),
            Way::Write => libc::pwritev(fd, vectors, count, at),
        }
    };
    if moved < 0 {
        return Err(io::Error::last_os_error());
    }
    // One call moves less than 2 GiB (`MAX_RW_COUNT`).
    u32::try_from(moved).map_err(io::Error::other)
}
