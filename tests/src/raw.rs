//! The few things that cannot be said in safe Rust: another process's CPU clock, a child that dies
//! with its parent, the memory and the completions of `blkio`.
//!
//! Absent: policy. Everything here is a leaf with a safe face.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use blkio::{Blkio, Completion, MemoryRegion};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::random::Random;

/// CPU time that process `pid` has used so far, in nanoseconds: all its threads, the kernel's
/// io_uring workers on its behalf and the threads that have ended included.
///
/// # Errors
/// If there is no such process.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is a valid place for the answer during the call.
    let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer during the call.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
}

/// CPU time of all children that have ended and been waited for so far, in nanoseconds: their
/// threads, their own children and io_uring workers included.
pub fn ended_children_cpu_ns() -> u64 {
    // SAFETY: all zeroes is a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a valid place for the answer; with these arguments the call cannot fail.
    unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) };
    [usage.ru_utime, usage.ru_stime]
        .into_iter()
        .map(|time| time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_usec.unsigned_abs() * 1000)
        .sum()
}

/// Makes the kernel kill the future child of `command` when the thread that starts it ends, so
/// that an aborted test run leaves nothing behind.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: the closure runs between fork and exec and makes one system call: no allocation, no
    // lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        })
    }
}

/// Waits at most `limit` until there is something to read from `fd`.
///
/// # Errors
/// If the kernel refuses to wait.
pub fn readable(fd: &impl AsRawFd, limit: Duration) -> io::Result<bool> {
    // SAFETY: the descriptor is open as long as `fd` is borrowed, so during this function.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::from_borrowed_fd(borrowed, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Buffers of equal size in memory that a `blkio` device knows.
///
/// Keep it no longer than the [`Blkio`] that it came from or one of its queues: those free the
/// memory.
#[derive(Debug)]
pub struct Buffers {
    base: usize,
    size: usize,
    count: usize,
    /// Each buffer cut into what one segment may hold.
    segments: Vec<blkio::iovec>,
    per_buffer: usize,
}

// SAFETY: the pointers in `segments` are numbers to this type; only the device follows them.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Allocates `count` buffers of `size` bytes each, makes them known to the device, and fills
    /// them with bytes that do not compress and depend on `seed`.
    ///
    /// # Errors
    /// If the device refuses the memory.
    pub fn new(blkio: &mut Blkio, size: usize, count: usize, seed: u64) -> blkio::Result<Self> {
        let page = rustix::param::page_size();
        let region: MemoryRegion = blkio.alloc_mem_region((size * count).next_multiple_of(page))?;
        blkio.map_mem_region(&region)?;
        let mut random = Random::new(seed);
        for offset in (0..region.len).step_by(8) {
            let place = (region.addr + offset) as *mut u64;
            // SAFETY: `region` is mapped, page-aligned and a multiple of eight bytes long, and no
            // request uses it yet.
            unsafe { place.write_volatile(random.next()) };
        }
        let most = match blkio.get_i32("max-segment-len")? {
            most @ 1.. => usize::try_from(most).unwrap_or(size),
            _ => size,
        };
        let mut segments = Vec::new();
        for buffer in 0..count {
            for at in (0..size).step_by(most) {
                segments.push(blkio::iovec {
                    iov_base: (region.addr + buffer * size + at) as *mut libc::c_void,
                    iov_len: most.min(size - at),
                });
            }
        }
        Ok(Self { base: region.addr, size, count, segments, per_buffer: size.div_ceil(most) })
    }

    fn get(&self, index: usize) -> *mut u8 {
        assert!(index < self.count);
        (self.base + index * self.size) as *mut u8
    }

    /// The segments of buffer `index`, for `readv` and `writev`: where their list begins, and how
    /// many they are. They live as long as these buffers.
    pub fn segments(&self, index: usize) -> (*const blkio::iovec, u32) {
        let from = index * self.per_buffer;
        let list = &self.segments[from..from + self.per_buffer];
        (list.as_ptr(), u32::try_from(list.len()).expect("a buffer has few segments"))
    }

    /// Changes the first eight bytes of buffer `index`, so that no two writes are the same.
    pub fn stamp(&self, index: usize, stamp: u64) {
        // SAFETY: inside the mapped region, aligned (the region begins on a page and buffers are
        // multiples of 512 bytes). A device that still reads it sees either value.
        unsafe { self.get(index).cast::<u64>().write_volatile(stamp) };
    }
}

/// Room for completions that `Blkioq::do_io` fills.
#[derive(Debug)]
pub struct Completions(Vec<MaybeUninit<Completion>>);

impl Completions {
    /// Room for `count` completions per call.
    pub fn new(count: usize) -> Self {
        let empty = || Completion {
            user_data: usize::MAX,
            error_msg: std::ptr::null(),
            ret: -libc::EIO,
            reserved_: [0; 12],
        };
        Self((0..count).map(|_| MaybeUninit::new(empty())).collect())
    }

    /// The room, to be filled.
    pub fn room(&mut self) -> &mut [MaybeUninit<Completion>] {
        &mut self.0
    }

    /// Slot `index` as `(user_data, ret)`: as last filled, or `usize::MAX` and an error if never.
    pub fn get(&self, index: usize) -> (usize, i32) {
        // SAFETY: `new` initialised every slot; who fills one writes a whole completion.
        let completion = unsafe { self.0[index].assume_init_ref() };
        (completion.user_data, completion.ret)
    }
}
