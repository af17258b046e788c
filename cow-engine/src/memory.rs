//! Memory that a transfer reads from or fills: segments of guest memory or of our own buffers.
//!
//! Invariant: a [`Source`] or [`Target`] borrows its memory, so the memory outlives the transfer.
//! No Rust reference to guest memory is ever formed: the guest may change it at any time, so it is
//! only handed to the kernel or copied through raw pointers.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io::IoSlice;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// A run of contiguous memory, laid out as the kernel's `struct iovec`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; what may be done with it is decided where a
// `Source` or `Target` is made of it.
// JUSTIFICATION: a request's segments are kept beside it in tasks that threads own.
unsafe impl Send for Segment {}

impl Segment {
    /// The `len` bytes at `base`. Making one promises nothing; see [`Source::from_segments`].
    pub const fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// First byte.
    pub const fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no byte.
    pub const fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The segment without its first `n` bytes.
    ///
    /// # Panics
    /// If it is shorter than that.
    pub fn skip(&self, n: usize) -> Self {
        assert!(n <= self.len());
        Self::new(self.base().wrapping_add(n), self.len() - n)
    }
}

/// Segments in order, of one request.
#[derive(Clone, Copy)]
struct Segments<'a> {
    one: Segment,
    many: &'a [Segment],
    len: usize,
}

impl<'a> Segments<'a> {
    fn one(segment: Segment) -> Self {
        Self { one: segment, many: &[], len: segment.len() }
    }

    fn many(segments: &'a [Segment]) -> Self {
        match segments {
            [one] => Self::one(*one),
            many => {
                let len = many.iter().map(Segment::len).sum();
                Self { one: Segment::new(NonNull::dangling().as_ptr(), 0), many, len }
            }
        }
    }

    fn as_slice(&self) -> &[Segment] {
        if self.many.is_empty() { std::slice::from_ref(&self.one) } else { self.many }
    }

    /// Calls `copy` with the place of each run of `len` bytes from byte `at` on.
    fn walk(&self, at: usize, len: usize, mut copy: impl FnMut(*mut u8, std::ops::Range<usize>)) {
        assert!(at + len <= self.len, "a copy must stay within its segments");
        let (mut skip, mut done) = (at, 0);
        for segment in self.as_slice() {
            if skip >= segment.len() {
                skip -= segment.len();
                continue;
            }
            let n = (segment.len() - skip).min(len - done);
            if n == 0 {
                break;
            }
            copy(segment.base().wrapping_add(skip), done..done + n);
            done += n;
            skip = 0;
        }
    }
}

/// Memory that a write takes its bytes from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    segments: Segments<'a>,
    _memory: PhantomData<&'a [u8]>,
}

impl<'a> Source<'a> {
    /// The bytes of a slice.
    pub fn of(bytes: &'a [u8]) -> Self {
        let segment = Segment::new(bytes.as_ptr().cast_mut(), bytes.len());
        Self { segments: Segments::one(segment), _memory: PhantomData }
    }

    /// The bytes of `segments`, in order.
    ///
    /// # Safety
    /// For `'a` every segment stays mapped and readable. Others may change its bytes meanwhile.
    pub unsafe fn from_segments(segments: &'a [Segment]) -> Self {
        Self { segments: Segments::many(segments), _memory: PhantomData }
    }

    /// The bytes of several slices, in order.
    pub fn of_slices(slices: &'a [IoSlice<'a>]) -> Self {
        let first = slices.as_ptr().cast::<Segment>();
        // SAFETY: an `IoSlice` has the layout of an `iovec` (promised by std on Unix), which is that of a
        // `Segment`; the borrow keeps the list and what it points to alive for `'a`.
        // JUSTIFICATION: a list of our own buffers goes to the kernel without being copied.
        let segments = unsafe { std::slice::from_raw_parts(first, slices.len()) };
        Self { segments: Segments::many(segments), _memory: PhantomData }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.segments.len
    }

    /// The segments, for the kernel to read.
    pub fn segments(&self) -> &[Segment] {
        self.segments.as_slice()
    }

    /// Copies the bytes from `at` on into `out`.
    ///
    /// # Panics
    /// If that passes the end.
    pub fn copy_to(&self, at: usize, out: &mut [u8]) {
        self.segments.walk(at, out.len(), |from, part| {
            let to = &mut out[part];
            // SAFETY: `walk` yields places within the segments, which are readable for `'a`
            // (promised to `from_segments`, or a borrowed slice); `to` is our own memory.
            // JUSTIFICATION: guest memory may not be read through references.
            unsafe { ptr::copy(from, to.as_mut_ptr(), to.len()) }
        });
    }
}

/// Memory that a read fills.
pub struct Target<'a> {
    segments: Segments<'a>,
    _memory: PhantomData<&'a mut [u8]>,
}

impl<'a> Target<'a> {
    /// The bytes of a slice.
    pub fn of(bytes: &'a mut [u8]) -> Self {
        let segment = Segment::new(bytes.as_mut_ptr(), bytes.len());
        Self { segments: Segments::one(segment), _memory: PhantomData }
    }

    /// The bytes of `segments`, in order.
    ///
    /// # Safety
    /// For `'a` every segment stays mapped and writable, and no Rust reference to it exists.
    pub unsafe fn from_segments(segments: &'a [Segment]) -> Self {
        Self { segments: Segments::many(segments), _memory: PhantomData }
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.segments.len
    }

    /// The segments, for the kernel to fill.
    pub fn segments(&self) -> &[Segment] {
        self.segments.as_slice()
    }

    /// Fills the bytes from `at` on with `bytes`.
    ///
    /// # Panics
    /// If that passes the end.
    pub fn copy_from(&mut self, at: usize, bytes: &[u8]) {
        self.segments.walk(at, bytes.len(), |to, part| {
            let from = &bytes[part];
            // SAFETY: `walk` yields places within the segments, which are writable for `'a`
            // (promised to `from_segments`, or a slice borrowed mutably); `from` is not theirs.
            // JUSTIFICATION: guest memory may not be written through references.
            unsafe { ptr::copy(from.as_ptr(), to, from.len()) }
        });
    }
}

/// Zeroed memory of our own at an address that direct I/O accepts.
pub struct AlignedBuf {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory and has no interior mutability.
// JUSTIFICATION: tasks that hold buffers may be made on one thread and driven on another.
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// Alignment in bytes: a page, which every device's direct I/O accepts.
    pub const ALIGN: usize = 4096;

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        // SAFETY: the size is not zero, and a null answer is handled.
        // JUSTIFICATION: `Vec` cannot promise the alignment of direct I/O.
        let base = unsafe { alloc_zeroed(Self::layout(len)) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(Self::layout(len)) };
        Self { base, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), Self::ALIGN).expect("a buffer's size fits in memory")
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `base` is `len` initialised bytes that `self` owns.
        // JUSTIFICATION: see `zeroed`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        // JUSTIFICATION: see `zeroed`.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout, and freed once.
        // JUSTIFICATION: see `zeroed`.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.len)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_cross_segment_borders() {
        let (mut a, mut b) = ([0u8; 3], [0u8; 5]);
        let segments = [Segment::new(a.as_mut_ptr(), 3), Segment::new(b.as_mut_ptr(), 5)];
        // SAFETY: both arrays outlive the target and are not touched meanwhile.
        let mut target = unsafe { Target::from_segments(&segments) };
        target.copy_from(1, &[1, 2, 3, 4]);
        // SAFETY: as above.
        let source = unsafe { Source::from_segments(&segments) };
        let mut out = [9; 8];
        source.copy_to(0, &mut out);
        assert_eq!(out, [0, 1, 2, 3, 4, 0, 0, 0]);
    }

    #[test]
    fn aligned_buffers_are_zero_and_aligned() {
        let buf = AlignedBuf::zeroed(5000);
        assert_eq!(buf.as_ptr() as usize % AlignedBuf::ALIGN, 0);
        assert!(buf.iter().all(|&b| b == 0));
    }
}
