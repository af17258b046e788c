//! Memory for old content on its way into the store: a bounded amount for each disk, used again and
//! again.
//!
//! Invariant: whoever holds a buffer waits for transfers only, never for a claim or for another buffer,
//! so that those who wait for one get it. Price: what was used most stays with the process.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use crate::format::GRAIN;
use crate::memory::AlignedBuf;

/// Bytes that a disk's buffers have together at most.
const BUDGET: usize = 16 << 20;

/// Bytes of idle buffers that are kept.
const KEPT: usize = 4 << 20;

/// The buffers of one disk.
#[derive(Clone, Default)]
pub(crate) struct Buffers {
    pool: Arc<Mutex<Pool>>,
}

#[derive(Default)]
struct Pool {
    /// Bytes of buffers in use.
    used: usize,
    /// Bytes of those that are kept.
    kept: usize,
    /// Idle ones, by size.
    idle: BTreeMap<usize, Vec<AlignedBuf>>,
    waiting: Vec<Waker>,
}

/// Memory of whole grains; what is in it is left from before. Goes back when dropped.
pub(crate) struct Buffer {
    memory: Option<AlignedBuf>,
    len: usize,
    pool: Arc<Mutex<Pool>>,
}

impl Buffers {
    /// Waits for a buffer of `count` grains.
    pub(crate) async fn grains(&self, count: u64) -> Buffer {
        let len = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(GRAIN);
        let size = len.next_power_of_two();
        let idle = poll_fn(|cx| {
            let mut pool = lock(&self.pool);
            // One is always given, however large.
            if pool.used > 0 && pool.used + size > BUDGET {
                pool.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            pool.used += size;
            let idle = pool.idle.get_mut(&size).and_then(Vec::pop);
            pool.kept -= idle.as_ref().map_or(0, |idle| idle.len());
            Poll::Ready(idle)
        })
        .await;
        let memory = Some(idle.unwrap_or_else(|| AlignedBuf::zeroed(size)));
        Buffer { memory, len, pool: self.pool.clone() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let mut pool = lock(&self.pool);
        let size = memory.len();
        pool.used -= size;
        if pool.kept + size <= KEPT {
            pool.kept += size;
            pool.idle.entry(size).or_default().push(memory);
        }
        pool.waiting.drain(..).for_each(Waker::wake);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory[..self.len])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory[..self.len])
    }
}

fn lock(pool: &Mutex<Pool>) -> MutexGuard<'_, Pool> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn no_more_is_given_than_there_is_and_it_is_used_again() {
        let buffers = Buffers::default();
        let all = (BUDGET / (1 << 20)) as u64;
        let mut held = Vec::new();
        for _ in 0..all {
            let Poll::Ready(buffer) = poll(pin!(buffers.grains(256))) else { panic!("within the budget") };
            held.push(buffer);
        }
        let mut late = pin!(buffers.grains(3));
        assert!(poll(late.as_mut()).is_pending());
        let place = held[0].as_ptr();
        held.remove(0);
        let Poll::Ready(small) = poll(late) else { panic!("there is room") };
        assert_eq!(small.len(), 3 * GRAIN);
        drop((small, held.pop()));
        let Poll::Ready(again) = poll(pin!(buffers.grains(255))) else { panic!("there is room") };
        assert!(again.as_ptr() != place || again.len() == 255 * GRAIN);
        drop(held);
        let pool = lock(&buffers.pool);
        assert!(pool.kept <= KEPT && pool.used == again.memory.as_ref().map_or(0, |memory| memory.len()));
    }

    #[test]
    fn one_that_is_larger_than_all_is_given_alone() {
        let buffers = Buffers::default();
        let Poll::Ready(large) = poll(pin!(buffers.grains(2 * (BUDGET / GRAIN) as u64))) else {
            panic!("alone")
        };
        assert!(poll(pin!(buffers.grains(1))).is_pending());
        drop(large);
        assert!(poll(pin!(buffers.grains(1))).is_ready());
    }
}
