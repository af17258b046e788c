//! Guest memory that its front end takes away while it is mapped: zeros in its place instead of the
//! end of the process.
//!
//! A file that is shrunk, or that has no page left to give, makes a touch of its mapping a `SIGBUS`,
//! which would end every disk of the process. The handler here maps a page of zeros where the touch
//! was and notes the loss; the queue that meets the note breaks, before it takes another request.
//!
//! Invariant: a `SIGBUS` at an address that is not guest memory ends the process as before.
//! Absent: losses that only the kernel meets, in its transfers. It answers them with `EFAULT`.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::sync::{Mutex, Once, PoisonError};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// Mappings that can be watched at a time; more are mapped without a watch.
const WATCHES: usize = 8192;

/// Pages of a mapping that are replaced one by one. After that the rest goes at once, so that losing a
/// whole guest does not use up the mappings that a process may have.
const SINGLY: u32 = 256;

/// A watched mapping; free while `start` is zero.
struct Entry {
    start: AtomicUsize,
    len: AtomicUsize,
    /// Bytes of a page of its file.
    page: AtomicUsize,
    /// Pages that were lost.
    lost: AtomicU32,
}

/// Read by the handler, so it is a plain array: no lock, nothing that moves.
static ENTRIES: [Entry; WATCHES] = [const {
    Entry {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicU32::new(0),
    }
}; WATCHES];

/// Losses of all mappings so far.
static LOSSES: AtomicU32 = AtomicU32::new(0);

/// Held while entries are taken and given back.
static ENTRY: Mutex<()> = Mutex::new(());

/// A mapping that is watched until this is dropped, which must be before it is unmapped.
pub(crate) struct Guard {
    /// `None` if there were too many.
    entry: Option<&'static Entry>,
}

impl Guard {
    /// Watches the mapping of `len` bytes at `start`, whose file has pages of `page` bytes.
    pub(crate) fn new(start: NonNull<u8>, len: usize, page: usize) -> Self {
        install();
        let _held = ENTRY.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = ENTRIES.iter().find(|entry| entry.start.load(Relaxed) == 0);
        if let Some(entry) = entry {
            entry.len.store(len, Relaxed);
            entry.page.store(page, Relaxed);
            entry.lost.store(0, Relaxed);
            // The handler sees the rest once it sees this.
            entry.start.store(start.addr().get(), Release);
        } else {
            log::warn!("more than {WATCHES} mappings of guest memory: not all are watched for losses");
        }
        Self { entry }
    }

    /// Whether part of the mapping was lost.
    pub(crate) fn is_lost(&self) -> bool {
        self.entry.is_some_and(|entry| entry.lost.load(Relaxed) > 0)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(entry) = self.entry {
            let _held = ENTRY.lock().unwrap_or_else(PoisonError::into_inner);
            entry.start.store(0, Release);
        }
    }
}

/// How many losses there were, of any mapping: changes when [`Guard::is_lost`] is worth asking.
pub(crate) fn losses() -> u32 {
    LOSSES.load(Relaxed)
}

/// What the process did on a `SIGBUS` before.
static mut BEFORE: MaybeUninit<libc::sigaction> = MaybeUninit::zeroed();

/// Puts the handler in place, once.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed `sigaction` is a valid one; `BEFORE` is written here once, before the
        // handler that reads it can run.
        // JUSTIFICATION: no crate installs a handler that sees the address and may return.
        let result = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, (&raw mut BEFORE).cast())
        };
        if result != 0 {
            log::warn!("could not watch for lost guest memory: {}", std::io::Error::last_os_error());
        }
    });
}

/// Runs on the thread that touched what is gone. Does nothing but atomics and system calls.
extern "C" fn handle(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` of a `SIGBUS`, which has an address.
    // JUSTIFICATION: the address tells whose fault it is.
    let at = unsafe { (*info).si_addr() }.addr();
    if !replace(at) {
        // SAFETY: `BEFORE` was written when this handler was installed, and is never written again.
        // JUSTIFICATION: the touch is done again when this returns, and then means what it meant.
        unsafe { libc::sigaction(libc::SIGBUS, (&raw const BEFORE).cast(), ptr::null_mut()) };
    }
}

/// Maps zeros at `at`, if that is guest memory.
fn replace(at: usize) -> bool {
    let holds = |entry: &&Entry| {
        let start = entry.start.load(Acquire);
        start != 0 && at >= start && at - start < entry.len.load(Relaxed)
    };
    let Some(entry) = ENTRIES.iter().find(holds) else { return false };
    let (start, len, page) =
        (entry.start.load(Relaxed), entry.len.load(Relaxed), entry.page.load(Relaxed).max(1));
    let from = start + (at - start) / page * page;
    let singly = entry.lost.fetch_add(1, Relaxed) < SINGLY;
    LOSSES.fetch_add(1, Relaxed);
    let len = if singly { page } else { start + len - from };
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range lies in a mapping that its owner keeps while anybody can touch it, and nothing
    // but raw pointers, of which none expects a content, leads there.
    // JUSTIFICATION: see the module.
    unsafe {
        let at = ptr::with_exposed_provenance_mut::<c_void>(from);
        mmap_anonymous(at, len, ProtFlags::READ | ProtFlags::WRITE, flags).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use crate::guest_mem::{Memory, RegionSpec};

    #[test]
    fn memory_that_was_taken_away_reads_as_zeros_and_is_noted() {
        let file: std::fs::File =
            rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(64 << 20).unwrap();
        let spec = RegionSpec { guest: 0, len: 64 << 20, user: 0, offset: 0 };
        let memory = Memory::of([(spec, file.try_clone().unwrap())]).unwrap();
        let at = |at: u64| memory.contiguous(at, 1).unwrap().as_ptr();
        // SAFETY: mapped memory of the test's own.
        // JUSTIFICATION: the touch is what is tested.
        unsafe { at(5000).write_volatile(7) };
        assert!(!memory.is_lost());
        file.set_len(4096).unwrap();
        // SAFETY: as above.
        // JUSTIFICATION: as above.
        unsafe {
            assert_eq!(at(5000).read_volatile(), 0);
            at(5000).write_volatile(9);
            assert_eq!(at(5000).read_volatile(), 9);
            at(0).write_volatile(1);
            for page in 0..(64 << 20) / 4096 {
                at(page * 4096).read_volatile();
            }
        }
        assert!(memory.is_lost());
        let mut kept = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut kept, 0).unwrap();
        assert_eq!(kept, [1]);
    }
}
