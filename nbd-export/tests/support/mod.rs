//! What the tests and the example serve: an image in memory, over blocking sockets or a script.
#![allow(dead_code, reason = "each test uses its part")]
#![allow(unreachable_pub, reason = "several crates include this module")]

pub mod pipe;
pub mod wire;

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, RwLock};
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::thread::{self, Thread};

use nbd_export::{
    Budget, Connection, Context, Errno, Export, ExportError, ExportInfo, Exports, Extents, Listing, ReadHalf,
    Refusal, Status, WriteHalf, ZeroMode,
};

/// Runs a future on this thread.
pub fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut TaskContext::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// One half of a blocking Unix socket.
pub struct Blocking(pub UnixStream);

impl ReadHalf for Blocking {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl WriteHalf for Blocking {
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }
    fn abort(&mut self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// A client that says all it has to say at once, at most `step` bytes per read.
pub struct Script {
    pub bytes: Vec<u8>,
    pub at: usize,
    pub step: usize,
}

impl ReadHalf for Script {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = (self.bytes.len() - self.at).min(buf.len()).min(self.step);
        buf[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// What the server said; it breaks after `room` bytes.
#[derive(Clone)]
pub struct Record {
    pub bytes: Rc<RefCell<Vec<u8>>>,
    pub room: usize,
    pub aborted: Rc<RefCell<u32>>,
}

impl Default for Record {
    fn default() -> Self {
        Record { bytes: Rc::default(), room: usize::MAX, aborted: Rc::default() }
    }
}

impl WriteHalf for Record {
    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut all = self.bytes.borrow_mut();
        if all.len() + bytes.len() > self.room {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        all.extend_from_slice(bytes);
        Ok(())
    }
    fn abort(&mut self) {
        *self.aborted.borrow_mut() += 1;
    }
}

/// An image in memory. A block of zeros is a hole; each bitmap is a list of dirty ranges.
pub struct MemoryExport {
    pub info: ExportInfo,
    pub bytes: RwLock<Vec<u8>>,
    pub dirty: Vec<Vec<Range<u64>>>,
    /// Reads of this byte fail, as those of a broken snapshot do.
    pub broken_at: Option<u64>,
}

const HOLE_UNIT: usize = 4096;

impl MemoryExport {
    pub fn new(info: ExportInfo, bytes: Vec<u8>) -> Self {
        assert_eq!(info.size_bytes, bytes.len() as u64);
        MemoryExport { info, bytes: RwLock::new(bytes), dirty: Vec::new(), broken_at: None }
    }

    #[must_use]
    pub fn with_bitmap(mut self, name: &str, dirty: Vec<Range<u64>>) -> Self {
        self.info.bitmaps.push(name.into());
        self.dirty.push(dirty);
        self
    }

    fn check(&self, range: &Range<u64>) -> Result<(), ExportError> {
        assert!(range.start < range.end && range.end <= self.info.size_bytes, "{range:?}");
        match self.broken_at {
            Some(at) if range.contains(&at) => {
                Err(ExportError::new(Errno::Io, "the snapshot is broken: no space left").at(at))
            }
            _ => Ok(()),
        }
    }
}

fn span(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

impl Export for MemoryExport {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        assert_eq!(buf.as_ptr() as usize % 4096, 0, "data buffers are aligned");
        let range = offset..offset + buf.len() as u64;
        self.check(&range)?;
        buf.copy_from_slice(&self.bytes.read().unwrap()[span(&range)]);
        Ok(())
    }

    async fn write(&self, offset: u64, data: &[u8], _fua: bool) -> Result<(), ExportError> {
        assert!(!self.info.read_only);
        let range = offset..offset + data.len() as u64;
        self.check(&range)?;
        self.bytes.write().unwrap()[span(&range)].copy_from_slice(data);
        Ok(())
    }

    async fn write_zeroes(&self, range: Range<u64>, _mode: ZeroMode) -> Result<(), ExportError> {
        assert!(!self.info.read_only);
        self.check(&range)?;
        self.bytes.write().unwrap()[span(&range)].fill(0);
        Ok(())
    }

    async fn trim(&self, range: Range<u64>, _fua: bool) -> Result<(), ExportError> {
        self.write_zeroes(range, ZeroMode::default()).await
    }

    async fn status(
        &self,
        context: Context,
        range: Range<u64>,
        out: &mut Extents,
    ) -> Result<(), ExportError> {
        self.check(&range)?;
        let mut at = range.start;
        match context {
            Context::Allocation => {
                let bytes = self.bytes.read().unwrap();
                while at < range.end {
                    let unit = HOLE_UNIT as u64;
                    let end = (at / unit * unit + unit).min(self.info.size_bytes);
                    let zero = bytes[span(&(at..end))].iter().all(|&b| b == 0);
                    if !out.push(end - at, if zero { Status::HOLE } else { Status::DATA }) {
                        break;
                    }
                    at = end;
                }
            }
            Context::Bitmap(index) => {
                for dirty in &self.dirty[index] {
                    if dirty.end <= at {
                        continue;
                    }
                    out.push(dirty.start.saturating_sub(at), Status::CLEAN);
                    at = at.max(dirty.start);
                    if !out.push(dirty.end - at, Status::DIRTY) {
                        return Ok(());
                    }
                    at = dirty.end;
                }
                out.push(range.end.saturating_sub(at), Status::CLEAN);
            }
        }
        Ok(())
    }
}

/// A fixed list of exports.
#[derive(Clone)]
pub struct MemoryExports(pub Arc<Vec<Arc<MemoryExport>>>);

impl MemoryExports {
    pub fn new(exports: impl IntoIterator<Item = MemoryExport>) -> Self {
        MemoryExports(Arc::new(exports.into_iter().map(Arc::new).collect()))
    }
}

impl Exports for MemoryExports {
    type Export = Arc<MemoryExport>;

    async fn find(&self, name: &str) -> Result<Arc<MemoryExport>, Refusal> {
        self.0.iter().find(|e| e.info.name == name).cloned().ok_or(Refusal::Unknown)
    }

    fn list(&self) -> Vec<Listing> {
        self.0
            .iter()
            .map(|e| Listing { name: e.info.name.clone(), description: e.info.description.clone() })
            .collect()
    }
}

/// Serves `exports` on a Unix socket, a thread per connection, until the process ends.
pub fn serve(path: &Path, exports: MemoryExports) -> io::Result<thread::JoinHandle<()>> {
    serve_within(path, exports, &Arc::new(Budget::new(256 << 20)))
}

/// The same, with that memory for all.
pub fn serve_within(
    path: &Path,
    exports: MemoryExports,
    budget: &Arc<Budget>,
) -> io::Result<thread::JoinHandle<()>> {
    let listener = UnixListener::bind(path)?;
    let budget = budget.clone();
    Ok(thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let (exports, budget) = (exports.clone(), budget.clone());
            thread::spawn(move || {
                let Ok(reader) = stream.try_clone() else { return };
                let connection = Connection::new(Blocking(reader), Blocking(stream)).sharing(budget);
                if let Err(error) = block_on(connection.serve(&exports)) {
                    eprintln!("connection: {error}");
                }
            });
        }
    }))
}

/// Bytes that tell their place: the number of each 8-byte word, scrambled by `seed`; every
/// fourth MiB is zeros.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    for word in 0..len.div_ceil(8) as u64 {
        let hole = (word >> 17) % 4 == 3;
        let value = if hole { 0 } else { (word ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 };
        out.extend(value.to_be_bytes());
    }
    out.truncate(len);
    out
}
