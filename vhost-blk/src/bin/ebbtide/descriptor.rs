//! Descriptors that the program was started with.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// Takes over the descriptor that a front end left open for this program; `None` if there is none.
pub(crate) fn take(number: i32) -> Option<OwnedFd> {
    if number < 0 {
        return None;
    }
    // SAFETY: a number that is not -1; whether it is open is what is being asked, and the borrow ends
    // with the question.
    // JUSTIFICATION: QEMU's convention hands descriptors over by number.
    let open = rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) }).is_ok();
    // SAFETY: it is open, and by the convention it is this program's: it is taken once, at the start,
    // before this program has opened anything of its own under that number.
    // JUSTIFICATION: as above.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}
