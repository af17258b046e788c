//! Memory for the data of requests: recycled, aligned, bounded.
//!
//! What always holds: the buffers lent out and those kept for reuse together never exceed the
//! connection's limit; of them, what exceeds [`OWN_BYTES`] is taken from the [`Budget`] of all connections;
//! a buffer's data starts at a multiple of [`ALIGNMENT`], so that an export may read
//! into it with `O_DIRECT`; there is room for a reply's header right in front of the data, so
//! that both leave in one write without a copy.
//!
//! The price of recycling: a buffer keeps the bytes of an earlier request until overwritten.
//! They are the same client's, and nothing is sent of a piece whose read did not succeed as a whole.

use std::cell::RefCell;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};

use crate::budget::{Budget, OWN_BYTES};

/// Where a buffer's data starts, in multiples of bytes.
const ALIGNMENT: usize = 4096;
/// Room in front of the data: a chunk's header and an offset.
const HEADROOM: usize = crate::proto::CHUNK_HEADER_BYTES + 8;

/// All data buffers of one connection.
pub(crate) struct Pool {
    limit: usize,
    budget: Arc<Budget>,
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

    /// Room that is counted, and in which nothing is put.
    fn without_bytes(capacity: usize) -> Self {
        Buffer { bytes: Vec::new(), data_at: 0, capacity }
    }
}

impl Pool {
    /// A pool that holds at most `limit` bytes and shares `budget`; one buffer of [`OWN_BYTES`] is always possible.
    pub(crate) fn new(limit: usize, budget: Arc<Budget>) -> Self {
        let state = State { free: Vec::new(), total: 0, waiting: None };
        Pool { limit: limit.max(OWN_BYTES), budget, state: RefCell::new(state) }
    }

    /// Lends a buffer for `len` bytes of data, waiting until enough others came back. It is for fewer bytes if none is
    /// lent and there is no memory for all: for [`OWN_BYTES`].
    ///
    /// One caller waits at a time: the connection's receiver.
    pub(crate) async fn lend(&self, len: usize) -> Lease<'_> {
        self.wait_for(|| self.try_lend(len)).await
    }

    /// Counts `len` bytes, at most [`OWN_BYTES`], that somebody else allocates; waits as [`Pool::lend`] does.
    pub(crate) async fn reserve(&self, len: usize) -> Lease<'_> {
        self.wait_for(|| self.try_reserve(len)).await
    }

    async fn wait_for<T>(&self, mut attempt: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match attempt() {
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
            None if self.grow(state, class) => Buffer::new(class),
            // Nothing of this connection will come back that it could wait for.
            None if state.total == 0 && self.grow(state, OWN_BYTES) => Buffer::new(OWN_BYTES),
            None => return None,
        };
        let len = len.min(buffer.capacity);
        Some(Lease { start: buffer.data_at, buffer, len, pool: self })
    }

    fn try_reserve(&self, len: usize) -> Option<Lease<'_>> {
        let state = &mut *self.state.borrow_mut();
        let buffer =
            self.grow(state, len.min(OWN_BYTES)).then(|| Buffer::without_bytes(len.min(OWN_BYTES)))?;
        Some(Lease { start: 0, buffer, len: 0, pool: self })
    }

    /// Makes room for `more` bytes, if need be in place of buffers that are kept.
    fn grow(&self, state: &mut State, more: usize) -> bool {
        loop {
            let total = state.total + more;
            if total <= self.limit && self.budget.take(beyond_own(total) - beyond_own(state.total)) {
                state.total = total;
                return true;
            }
            if state.free.is_empty() {
                return false;
            }
            let kept = state.free.remove(0);
            self.shrink(state, kept.capacity);
        }
    }

    fn shrink(&self, state: &mut State, less: usize) {
        let total = state.total - less;
        self.budget.give(beyond_own(state.total) - beyond_own(total));
        state.total = total;
    }

    /// Takes a buffer back, to keep it if it may be of use and nobody is short of memory.
    fn take_back(&self, buffer: Buffer) {
        let state = &mut *self.state.borrow_mut();
        let is_wanted = state.total > OWN_BYTES && self.budget.is_short();
        if buffer.bytes.is_empty() || is_wanted {
            self.shrink(state, buffer.capacity);
        } else {
            state.free.push(buffer);
        }
        if let Some(waker) = state.waiting.take() {
            waker.wake();
        }
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> usize {
        self.state.borrow().total
    }
}

/// What a connection with so many bytes has taken from the budget.
fn beyond_own(total: usize) -> usize {
    total.saturating_sub(OWN_BYTES)
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.budget.give(beyond_own(self.state.get_mut().total));
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

    /// The data is to be of `len` bytes, fewer if there is no room for so many.
    pub(crate) fn set_len(&mut self, len: usize) {
        self.len = len.min(self.buffer.capacity);
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
        self.pool.take_back(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn pool(limit: usize) -> Pool {
        Pool::new(limit, Arc::new(Budget::new(limit)))
    }

    #[test]
    fn data_is_aligned_and_its_header_touches_it() {
        let pool = pool(MIB);
        let mut lease = pool.try_lend(5000).unwrap();
        lease.data_mut().fill(7);
        assert_eq!(lease.data().as_ptr() as usize % ALIGNMENT, 0);
        lease.put_header(&[1; 16]);
        assert_eq!(lease.framed().len(), 5016);
        assert_eq!(&lease.framed()[14..18], [1, 1, 7, 7]);
    }

    #[test]
    fn a_returned_buffer_is_lent_again_with_its_new_length() {
        let pool = pool(MIB);
        let first = pool.try_lend(8192).unwrap().data().as_ptr() as usize;
        let second = pool.try_lend(4097).unwrap();
        assert_eq!(second.data().as_ptr() as usize, first);
        assert_eq!(second.data().len(), 4097);
        assert_eq!(pool.total(), 8192);
    }

    #[test]
    fn the_limit_holds_and_kept_buffers_make_way() {
        let pool = pool(8 * MIB);
        let a = pool.try_lend(4 * MIB).unwrap();
        let b = pool.try_lend(4 * MIB).unwrap();
        assert!(pool.try_lend(1).is_none() && pool.try_reserve(1).is_none());
        drop((a, b));
        let c = pool.try_lend(8 * MIB).unwrap();
        assert_eq!((c.data().len(), pool.total()), (8 * MIB, 8 * MIB));
        drop(c);
        // A tiny request does not occupy the huge buffer.
        drop(pool.try_lend(1).unwrap());
        assert_eq!(pool.total(), 4096);
    }

    #[test]
    fn what_one_connection_has_taken_another_does_without() {
        let budget = Arc::new(Budget::new(8 * MIB));
        let [greedy, modest] = [(); 2].map(|()| Pool::new(64 * MIB, budget.clone()));
        let held = greedy.try_lend(8 * MIB).unwrap();
        assert_eq!(budget.taken(), 7 * MIB, "but for its own");
        // What it has itself, it has whatever others do.
        let piece = modest.try_lend(32 * MIB).unwrap();
        assert_eq!((piece.data().len(), modest.total()), (OWN_BYTES, OWN_BYTES));
        assert!(modest.try_lend(2 * MIB).is_none(), "it waits for the piece");
        // And what is left it may take.
        let small = modest.try_lend(MIB).unwrap();
        assert_eq!((small.data().len(), budget.taken()), (MIB, 8 * MIB));
        assert!(modest.try_lend(1).is_none() && greedy.try_lend(1).is_none());
        drop((piece, small));
        assert_eq!(modest.total(), OWN_BYTES, "memory is short: no more is kept");
        drop(held);
        assert_eq!((greedy.total(), budget.taken()), (0, 0));
        assert_eq!(modest.try_lend(8 * MIB).unwrap().data().len(), 8 * MIB);
        drop(modest);
        assert_eq!(budget.taken(), 0);
    }

    #[test]
    fn idle_connections_keep_half_of_the_budget_at_most() {
        let budget = Arc::new(Budget::new(16 * MIB));
        let pools = [(); 12].map(|()| Pool::new(64 * MIB, budget.clone()));
        for pool in &pools {
            drop((pool.try_lend(2 * MIB).unwrap(), pool.try_lend(MIB).unwrap()));
            assert!(budget.taken() <= 8 * MIB, "{}", budget.taken());
        }
        assert!(budget.taken() >= 4 * MIB, "what is not short is kept");
        drop(pools);
        assert_eq!(budget.taken(), 0);
    }

    #[test]
    fn what_is_reserved_counts_until_it_comes_back() {
        let pool = pool(4 * MIB);
        let rooms: Vec<_> = std::iter::from_fn(|| pool.try_reserve(5 * MIB)).collect();
        assert_eq!((rooms.len(), pool.total()), (4, 4 * MIB));
        assert!(pool.try_lend(1).is_none());
        drop(rooms);
        assert_eq!(pool.total(), 0);
    }
}
