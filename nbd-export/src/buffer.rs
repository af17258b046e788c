//! Memory for the data of requests: recycled, aligned, bounded.
//!
//! What always holds: the buffers lent out and those kept for reuse together never exceed the
//! limit; a buffer's data starts at a multiple of [`ALIGNMENT`], so that an export may read
//! into it with `O_DIRECT`; there is room for a reply's header right in front of the data, so
//! that both leave in one write without a copy.
//!
//! The price of recycling: a buffer keeps the bytes of an earlier request until overwritten.
//! They are the same client's, and a reply is sent only when its read succeeded as a whole.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Where a buffer's data starts, in multiples of bytes.
const ALIGNMENT: usize = 4096;
/// Room in front of the data: a chunk's header and an offset.
const HEADROOM: usize = crate::proto::CHUNK_HEADER_BYTES + 8;

/// All data buffers of one connection.
pub(crate) struct Pool {
    limit: usize,
    state: RefCell<State>,
}

struct State {
    free: Vec<Buffer>,
    /// Capacity of all buffers, lent or free.
    total: usize,
    waiting: Option<Waker>,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    data_at: usize,
    capacity: usize,
}

impl Buffer {
    fn new(capacity: usize) -> Self {
        let bytes = vec![0; HEADROOM + ALIGNMENT + capacity];
        let past = (bytes.as_ptr() as usize + HEADROOM) % ALIGNMENT;
        let data_at = HEADROOM + (ALIGNMENT - past) % ALIGNMENT;
        Buffer { bytes, data_at, capacity }
    }
}

impl Pool {
    /// A pool that holds at most `limit` bytes; one buffer of any size is always possible.
    pub(crate) fn new(limit: usize) -> Self {
        Pool { limit, state: RefCell::new(State { free: Vec::new(), total: 0, waiting: None }) }
    }

    /// Lends a buffer for `len` bytes of data, waiting until enough others came back.
    ///
    /// One caller waits at a time: the connection's receiver.
    pub(crate) async fn lend(&self, len: usize) -> Lease<'_> {
        poll_fn(|cx| match self.try_lend(len) {
            Some(lease) => Poll::Ready(lease),
            None => {
                self.state.borrow_mut().waiting = Some(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    fn try_lend(&self, len: usize) -> Option<Lease<'_>> {
        let class = len.next_power_of_two().max(ALIGNMENT);
        let state = &mut *self.state.borrow_mut();
        // The last returned fits best: it is the warmest. A far larger one stays for its like.
        let fits = |b: &Buffer| b.capacity >= class && b.capacity / 4 <= class;
        let buffer = match state.free.iter().rposition(fits) {
            Some(at) => state.free.remove(at),
            None => {
                while state.total + class > self.limit && !state.free.is_empty() {
                    state.total -= state.free.remove(0).capacity;
                }
                if state.total + class > self.limit && state.total > 0 {
                    return None;
                }
                state.total += class;
                Buffer::new(class)
            }
        };
        Some(Lease { start: buffer.data_at, buffer, len, pool: self })
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> usize {
        self.state.borrow().total
    }
}

/// A buffer on loan; it goes back to its pool when dropped.
pub(crate) struct Lease<'p> {
    buffer: Buffer,
    /// First byte of header or data that counts.
    start: usize,
    len: usize,
    pool: &'p Pool,
}

impl Lease<'_> {
    /// The data.
    pub(crate) fn data(&self) -> &[u8] {
        &self.buffer.bytes[self.buffer.data_at..][..self.len]
    }

    /// The data, to be filled.
    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.bytes[self.buffer.data_at..][..self.len]
    }

    /// Puts `header` right in front of the data.
    ///
    /// # Panics
    /// If it is longer than a structured read's header.
    pub(crate) fn put_header(&mut self, header: &[u8]) {
        assert!(header.len() <= HEADROOM);
        self.start = self.buffer.data_at - header.len();
        self.buffer.bytes[self.start..self.buffer.data_at].copy_from_slice(header);
    }

    /// Header, if one was put, and data in one piece.
    pub(crate) fn framed(&self) -> &[u8] {
        &self.buffer.bytes[self.start..self.buffer.data_at + self.len]
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let state = &mut *self.pool.state.borrow_mut();
        state.free.push(std::mem::take(&mut self.buffer));
        if let Some(waker) = state.waiting.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_aligned_and_its_header_touches_it() {
        let pool = Pool::new(1 << 20);
        let mut lease = pool.try_lend(5000).unwrap();
        lease.data_mut().fill(7);
        assert_eq!(lease.data().as_ptr() as usize % ALIGNMENT, 0);
        lease.put_header(&[1; 16]);
        assert_eq!(lease.framed().len(), 5016);
        assert_eq!(&lease.framed()[14..18], [1, 1, 7, 7]);
    }

    #[test]
    fn a_returned_buffer_is_lent_again_with_its_new_length() {
        let pool = Pool::new(1 << 20);
        let first = pool.try_lend(8192).unwrap().data().as_ptr() as usize;
        let second = pool.try_lend(4097).unwrap();
        assert_eq!(second.data().as_ptr() as usize, first);
        assert_eq!(second.data().len(), 4097);
        assert_eq!(pool.total(), 8192);
    }

    #[test]
    fn the_limit_holds_and_kept_buffers_make_way() {
        let pool = Pool::new(64 << 10);
        let a = pool.try_lend(32 << 10).unwrap();
        let b = pool.try_lend(32 << 10).unwrap();
        assert!(pool.try_lend(1).is_none());
        drop((a, b));
        let c = pool.try_lend(64 << 10).unwrap();
        assert_eq!(pool.total(), 64 << 10);
        drop(c);
        // A tiny request does not occupy the huge buffer.
        drop(pool.try_lend(1).unwrap());
        assert_eq!(pool.total(), 4096);
    }
}
