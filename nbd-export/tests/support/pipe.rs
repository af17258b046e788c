//! A pipe in memory of little capacity, so that both ends have to wait for each other.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};

use nbd_export::{ReadHalf, WriteHalf};

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Either end of a pipe.
#[derive(Clone)]
pub struct Pipe {
    state: Rc<RefCell<State>>,
    capacity: usize,
}

impl Pipe {
    pub fn new(capacity: usize) -> Self {
        Pipe { state: Rc::default(), capacity }
    }

    pub fn close(&self) {
        let state = &mut *self.state.borrow_mut();
        state.closed = true;
        [state.reader.take(), state.writer.take()].into_iter().flatten().for_each(Waker::wake);
    }
}

impl ReadHalf for Pipe {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        poll_fn(|cx| {
            let state = &mut *self.state.borrow_mut();
            if state.bytes.is_empty() && !state.closed {
                state.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let n = buf.len().min(state.bytes.len());
            buf.iter_mut().zip(state.bytes.drain(..n)).for_each(|(to, from)| *to = from);
            state.writer.take().into_iter().for_each(Waker::wake);
            Poll::Ready(Ok(n))
        })
        .await
    }
}

impl WriteHalf for Pipe {
    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        poll_fn(|cx| {
            let state = &mut *self.state.borrow_mut();
            if state.closed {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let n = bytes.len().min(self.capacity - state.bytes.len());
            state.bytes.extend(&bytes[..n]);
            bytes = &bytes[n..];
            state.reader.take().into_iter().for_each(Waker::wake);
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            state.writer = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    fn abort(&mut self) {
        self.close();
    }
}
