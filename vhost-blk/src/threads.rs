//! Threads of a device: named, and deaf to signals that are meant for the process.
//!
//! Invariant: a thread started here never runs a handler of an asynchronous signal. A system call
//! of the control thread that is interrupted in the middle of a message would lose the stream.
//! Absent: faults of the thread itself (`SIGSEGV`, `SIGBUS`, `SIGSYS` and their like) stay deliverable.

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// Starts a thread. `name` is cut to 15 bytes by the kernel.
///
/// # Errors
/// If the process may have no more threads.
pub(crate) fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    Builder::new().name(name).spawn(move || {
        block_signals();
        body();
    })
}

/// Blocks every asynchronous signal for the calling thread.
fn block_signals() {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises the set before anything reads it; the signal numbers are the
    // system's own, and a null pointer asks for no old set.
    // JUSTIFICATION: rustix has no signal masks, and an interrupted control thread loses its stream.
    let error = unsafe {
        libc::sigfillset(set.as_mut_ptr());
        for fault in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
            libc::SIGABRT,
            libc::SIGSYS,
        ] {
            libc::sigdelset(set.as_mut_ptr(), fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    if error != 0 {
        log::warn!("could not block signals: {}", io::Error::from_raw_os_error(error));
    }
}
