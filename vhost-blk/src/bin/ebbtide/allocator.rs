//! What the allocator keeps of memory that was given back.
//!
//! By itself glibc keeps ever larger pieces, up to 64 MiB in each of its arenas, of which there are eight for each
//! processor: much more than the clients whose data it was may have together.
//! Absent: an allocator of our own.

/// Pieces from this size on go back to the host at once, in bytes. Those who need many keep them themselves.
const RETURNED_BYTES: i32 = 1 << 20;
/// What an arena keeps at its end, in bytes.
const KEPT_BYTES: i32 = 2 << 20;

/// Bounds what is kept; before there is another thread.
pub(crate) fn bound() {
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, RETURNED_BYTES), (libc::M_TRIM_THRESHOLD, KEPT_BYTES)]
    {
        // SAFETY: the call takes numbers only, and nobody else allocates meanwhile.
        // JUSTIFICATION: there is no safe face of it.
        unsafe { libc::mallopt(parameter, value) };
    }
}
