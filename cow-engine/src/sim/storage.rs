//! The [`Storage`] seam on the simulated host.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::task::{Context, Poll};
use std::time::Duration;

use cbt::{ByteRange, CELLS_PER_PAGE, Cells};

use super::FileKind;
use super::medium::PAGE;
use super::world::{LONG_TIMER, OpKind, SHORT_TIMER, Work, World};
use crate::areas::{AreaKind, OpenedArea};
use crate::memory::{Source, Target};
use crate::{Extent, Identity, Meanwhile, Storage, Zeroing};

/// Files of a simulated host; see [`crate::sim`].
#[derive(Clone)]
pub struct SimStorage {
    world: Rc<RefCell<World>>,
    fate: Option<Rc<Fate>>,
}

/// See [`SimStorage::fated`].
struct Fate {
    only: Option<OpKind>,
    fails: Range<u64>,
    dies: u64,
    count: Cell<u64>,
}

/// An open file of a simulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimFile {
    id: u64,
    kind: FileKind,
}

impl SimFile {
    pub(super) fn new(id: u64, kind: FileKind) -> Self {
        Self { id, kind }
    }

    pub(super) fn id(self) -> u64 {
        self.id
    }
}

/// A directory of a simulated host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimDir(usize);

impl SimDir {
    pub(super) fn new(index: usize) -> Self {
        Self(index)
    }

    pub(super) fn index(self) -> usize {
        self.0
    }

    /// The path of a file in it, for an area of a store.
    pub fn path(self, name: &str) -> String {
        format!("/{}/{name}", self.0)
    }
}

/// The shared mapping of a file of cells.
#[derive(Clone, Debug)]
pub struct SimCells {
    /// All that the file may ever have: mappings of different lengths are of the same memory.
    memory: Arc<[AtomicU32]>,
    count: usize,
}

impl Cells for SimCells {
    fn cells(&self) -> &[AtomicU32] {
        &self.memory[..self.count]
    }
}

/// A time in steps as one in nanoseconds: a step takes a millisecond.
fn ns_of(steps: u64) -> i64 {
    i64::try_from(steps.saturating_mul(1_000_000)).unwrap_or(i64::MAX)
}

/// Waits for an operation, and takes it along when dropped.
struct Waiting {
    world: Rc<RefCell<World>>,
    id: Option<u64>,
}

impl Future for Waiting {
    type Output = io::Result<Vec<u8>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(id) = self.id else { return Poll::Pending };
        let done = {
            let mut world = self.world.borrow_mut();
            let Some(at) = world.ops.iter().position(|op| op.id == id) else { return Poll::Pending };
            let op = &mut world.ops[at];
            match op.done.take() {
                None => {
                    op.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                Some(done) => {
                    world.forget(at);
                    done
                }
            }
        };
        self.id = None;
        Poll::Ready(done)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.world.borrow_mut().drop_op(id);
        }
    }
}

impl SimStorage {
    pub(super) fn new(world: Rc<RefCell<World>>) -> Self {
        Self { world, fate: None }
    }

    /// The same host for who is not to come to an end: of the operations that are begun through this, counted from 0,
    /// those of `fails` fail, and the process dies during that of number `dies` or soon after it. With `only` those of that
    /// kind are counted.
    pub fn fated(&self, only: Option<OpKind>, fails: Range<u64>, dies: u64) -> Self {
        let fate = Fate { only, fails, dies, count: Cell::new(0) };
        Self { world: self.world.clone(), fate: Some(Rc::new(fate)) }
    }

    /// Counts an operation; whether it is one that fails.
    fn fails(&self, op: OpKind) -> bool {
        let Some(fate) = &self.fate else { return false };
        if fate.only.is_some_and(|only| only != op) {
            return false;
        }
        let number = fate.count.replace(fate.count.get() + 1);
        if number == fate.dies {
            let within = 1 << self.world.borrow_mut().random.below(5);
            self.die_within(within);
        }
        fate.fails.contains(&number)
    }

    fn start(&self, file: u64, work: Work) -> Waiting {
        let fails = work.kind().is_some_and(|op| self.fails(op));
        let mut world = self.world.borrow_mut();
        let id = (!world.is_dead()).then(|| world.begin(file, work, fails));
        Waiting { world: self.world.clone(), id }
    }

    fn call(&self, op: OpKind) -> io::Result<()> {
        self.call_on(op, FileKind::State)
    }

    fn call_on(&self, op: OpKind, file: FileKind) -> io::Result<()> {
        let fails = self.fails(op);
        self.world.borrow_mut().call(op, file)?;
        if fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }

    /// Lets others have a turn.
    pub async fn turn(&self) {
        let _ = self.start(0, Work::Turn).await;
    }

    /// What a host would tell of an image.
    pub fn identity(&self, file: SimFile) -> Identity {
        let mut world = self.world.borrow_mut();
        let held = world.file(file.id);
        Identity { device: 1, inode: file.id, len: held.len, mtime_ns: ns_of(held.mtime) }
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.world.borrow().steps
    }

    /// The time of day, in nanoseconds.
    pub fn now_ns(&self) -> i64 {
        ns_of(self.world.borrow().now())
    }

    /// What a host would tell that begins to serve an image.
    pub fn meanwhile(&self) -> Meanwhile {
        let boot_began_ns = Some(ns_of(self.world.borrow().boot_began));
        Meanwhile { now_ns: self.now_ns(), boot_began_ns, medium: 1, settles: true, assume_changed: false }
    }

    /// Syncs of `file` that have failed so far.
    pub fn failed_syncs(&self, file: SimFile) -> u64 {
        self.world.borrow_mut().file(file.id).failed_syncs
    }

    /// The process dies after so many steps at the latest: what is being done is cut off.
    pub fn die_within(&self, steps: u64) {
        let mut world = self.world.borrow_mut();
        world.deadline = world.deadline.min(world.steps.saturating_add(steps));
    }

    /// Whether the process has come to the step at which it dies: what it learns now, nobody hears.
    pub fn is_dead(&self) -> bool {
        self.world.borrow().is_dead()
    }
}

impl Storage for SimStorage {
    type File = SimFile;
    type Dir = SimDir;
    type Cells = SimCells;

    async fn read(&self, file: &SimFile, at: u64, mut into: Target<'_>) -> io::Result<()> {
        let bytes = self.start(file.id, Work::Read { at, buffer: vec![0; into.len()] }).await?;
        into.copy_from(0, &bytes);
        Ok(())
    }

    async fn write(&self, file: &SimFile, at: u64, from: Source<'_>) -> io::Result<()> {
        let mut bytes = vec![0; from.len()];
        from.copy_to(0, &mut bytes);
        self.start(file.id, Work::Write { at, bytes }).await.map(drop)
    }

    async fn sync(&self, file: &SimFile) -> io::Result<()> {
        let captured = self.world.borrow_mut().file(file.id).capture();
        self.start(file.id, Work::Sync { captured }).await.map(drop)
    }

    fn write_behind(&self, _file: &SimFile, _range: ByteRange) -> io::Result<()> {
        // The medium takes unsynced writes whenever it likes.
        Ok(())
    }

    fn write_out(&self, _file: &SimFile, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn drop_behind(&self, _file: &SimFile, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    async fn zero(&self, file: &SimFile, range: ByteRange, zeroing: Zeroing) -> io::Result<()> {
        let supported = {
            let world = self.world.borrow();
            match zeroing {
                Zeroing::Unmap => world.unmap_supported,
                Zeroing::Keep => world.keep_supported,
            }
        };
        if !supported {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let len = usize::try_from(range.len()).map_err(io::Error::other)?;
        let unmap = zeroing == Zeroing::Unmap;
        self.start(file.id, Work::Zero { at: range.start(), len, unmap }).await.map(drop)
    }

    fn extents(&self, file: &SimFile, range: ByteRange) -> io::Result<Vec<Extent>> {
        let mut world = self.world.borrow_mut();
        let file = world.file(file.id);
        let (mut extents, mut at) = (Vec::<Extent>::new(), range.start());
        while at < range.end() {
            let (hole, start) = (file.is_hole(at), at);
            // As far as it is the same, as of a file system.
            while file.is_hole(at) == hole && at < range.end().max(file.len) {
                at = (at / PAGE as u64 + 1) * PAGE as u64;
            }
            extents.push(Extent { range: ByteRange::new(start, at), hole });
        }
        Ok(extents)
    }

    fn len(&self, file: &SimFile) -> io::Result<u64> {
        Ok(self.world.borrow_mut().file(file.id).len)
    }

    fn set_len(&self, file: &SimFile, len: u64) -> io::Result<()> {
        self.call_on(OpKind::SetLen, file.kind)?;
        let mut world = self.world.borrow_mut();
        let now = world.now();
        world.file(file.id).set_len(len, now);
        Ok(())
    }

    fn allocate(&self, file: &SimFile, len: u64) -> io::Result<()> {
        self.call(OpKind::Allocate)?;
        self.world.borrow_mut().file(file.id).allocate(len);
        Ok(())
    }

    fn map(&self, file: &SimFile, count: usize) -> io::Result<SimCells> {
        let mut world = self.world.borrow_mut();
        let file = world.file(file.id);
        assert!(count as u64 * 4 <= file.len, "a mapping past the end of its file");
        Ok(SimCells { memory: file.map(count), count })
    }

    fn hold_cells(&self, cells: &SimCells, count: usize) -> io::Result<()> {
        let mut world = self.world.borrow_mut();
        if let Some(file) = world.files.values_mut().find(|file| file.is_mapped_as(&cells.memory)) {
            // Whoever maps it, until the process ends: which mapping it was is not kept.
            file.held = file.held.max(count.div_ceil(CELLS_PER_PAGE));
        }
        Ok(())
    }

    fn sync_cells(&self, cells: &SimCells) -> io::Result<()> {
        let called = self.call(OpKind::SyncCells);
        let mut world = self.world.borrow_mut();
        let (dead, forgets) = (world.is_dead(), world.random.one_in(2));
        let World { files, random, .. } = &mut *world;
        let mut files = files.values_mut();
        let Some(file) = files.find(|file| file.is_mapped_as(&cells.memory)).filter(|_| !dead) else {
            return called;
        };
        let told = file.tells_loss();
        if called.is_ok() && (!told || random.one_in(2)) {
            file.sync_cells(cells.count);
        } else {
            file.lose_cells(cells.count);
        }
        if called.is_ok() && !told {
            return Ok(());
        }
        if forgets {
            file.forget_lost_cells();
        }
        called.and(Err(io::ErrorKind::Other.into()))
    }

    fn create(&self, dir: &SimDir, name: &str) -> io::Result<SimFile> {
        self.call(OpKind::Create)?;
        let mut world = self.world.borrow_mut();
        if world.dirs[dir.0].names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = world.add_file(FileKind::State, 0);
        world.dirs[dir.0].add(name, id);
        Ok(SimFile::new(id, FileKind::State))
    }

    fn open(&self, dir: &SimDir, name: &str) -> io::Result<SimFile> {
        self.call(OpKind::Open)?;
        let id = self.world.borrow().dirs[dir.0].names.get(name).copied();
        let id = id.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(SimFile::new(id, FileKind::State))
    }

    fn remove(&self, dir: &SimDir, name: &str) -> io::Result<()> {
        self.call(OpKind::Remove)?;
        let removed = self.world.borrow_mut().dirs[dir.0].remove(name);
        if removed { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    fn list(&self, dir: &SimDir) -> io::Result<Vec<String>> {
        Ok(self.world.borrow().dirs[dir.0].names.keys().cloned().collect())
    }

    /// `/N/name`, of the directory of this number.
    fn open_area(&self, path: &str, _name: &str, make: bool) -> io::Result<OpenedArea<SimFile>> {
        let bad = || io::Error::from(io::ErrorKind::NotFound);
        let (number, name) = path.trim_start_matches('/').split_once('/').ok_or_else(bad)?;
        let dir = SimDir(number.parse().map_err(|_| bad())?);
        let file = match self.open(&dir, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && make => self.create(&dir, name)?,
            opened => opened?,
        };
        if make {
            // Also one that is there: whoever made it may have ended before this.
            self.sync_dir(&dir)?;
        }
        Ok(OpenedArea { file, kind: AreaKind::File, len: self.len(&file)?, identity: (0, file.id) })
    }

    fn sync_dir(&self, dir: &SimDir) -> io::Result<()> {
        self.call(OpKind::SyncDir)?;
        self.world.borrow_mut().dirs[dir.0].sync();
        Ok(())
    }

    async fn sleep(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let _ = self.start(0, Work::Timer { one_in: millis.clamp(SHORT_TIMER, LONG_TIMER) }).await;
    }
}
