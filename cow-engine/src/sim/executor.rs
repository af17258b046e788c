//! The scheduler: runs tasks and operations in an order drawn from the seed.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use super::storage::{SimDir, SimFile, SimStorage};
use super::world::{Damage, Defect, Rule, World};
use super::{FileKind, Random};

#[derive(Default)]
struct Ready(Mutex<Vec<usize>>);

impl Ready {
    fn lock(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct TaskWaker {
    task: usize,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.ready.lock().push(self.task);
        }
    }
}

struct Task {
    /// Absent for the main future, and after the task's end.
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    waker: Arc<TaskWaker>,
}

impl Task {
    fn new(index: usize, ready: &Arc<Ready>, future: Option<Pin<Box<dyn Future<Output = ()>>>>) -> Self {
        let waker = Arc::new(TaskWaker { task: index, queued: AtomicBool::new(false), ready: ready.clone() });
        waker.wake_by_ref();
        Self { future, waker }
    }
}

/// A simulated host and the process on it.
pub struct Sim {
    world: Rc<RefCell<World>>,
    tasks: Rc<RefCell<Vec<Task>>>,
    ready: Arc<Ready>,
}

impl Sim {
    /// The host of `seed`: no files, no faults.
    pub fn new(seed: u64) -> Self {
        Self { world: Rc::new(RefCell::new(World::new(seed))), tasks: Rc::default(), ready: Arc::default() }
    }

    /// The storage of this host.
    pub fn storage(&self) -> SimStorage {
        SimStorage::new(self.world.clone())
    }

    /// A new image of `len` zero bytes, which are durable.
    pub fn add_image(&self, len: u64) -> SimFile {
        let id = self.world.borrow_mut().add_file(FileKind::Image, len);
        SimFile::new(id, FileKind::Image)
    }

    /// A new empty directory, which is durable.
    pub fn add_dir(&self) -> SimDir {
        let mut world = self.world.borrow_mut();
        world.dirs.push(super::medium::Dir::default());
        SimDir::new(world.dirs.len() - 1)
    }

    /// The host's boot: another one after each power cut.
    pub fn boot(&self) -> [u8; 16] {
        u128::from(self.world.borrow().boot).to_le_bytes()
    }

    /// So many steps' time goes by while nothing runs.
    pub fn pass_time(&self, steps: u64) {
        self.world.borrow_mut().idle += steps;
    }

    /// What an image holds, read while no engine has it open.
    pub fn look(&self, file: SimFile, at: u64, out: &mut [u8]) {
        self.world.borrow_mut().file(file.id()).read(at, out);
    }

    /// Changes an image while no engine has it open; its time of change is set back if `unseen`.
    pub fn change_offline(&self, file: SimFile, at: u64, bytes: &[u8], unseen: bool, durable: bool) {
        let mut world = self.world.borrow_mut();
        world.step();
        // Later than what was in flight when the process ended.
        world.idle += 1;
        let now = world.now();
        let file = world.file(file.id());
        let now = if unseen { file.mtime } else { now };
        file.write(at, bytes, now);
        if durable {
            let captured = file.capture();
            file.finish_sync(&captured);
        }
    }

    /// Damages a state file while no engine has it open, durably. Does nothing if there is no such file.
    pub fn damage(&self, dir: SimDir, name: &str, damage: Damage) {
        let mut world = self.world.borrow_mut();
        world.step();
        let Some(&id) = world.dirs[dir.index()].names.get(name) else { return };
        match damage {
            Damage::Remove => {
                world.dirs[dir.index()].remove(name);
            }
            Damage::Cut(len) => world.file(id).cut(len),
            Damage::Flip(at) => world.file(id).change(at, 1, |bytes| bytes[0] ^= 0x10),
            Damage::Zero(at, len) => world.file(id).change(at, len, |bytes| bytes.fill(0)),
            Damage::Copy { from, to, len } => {
                let mut copy = vec![0; len];
                world.file(id).read(from, &mut copy);
                world.file(id).change(to, len, |bytes| bytes.copy_from_slice(&copy[..bytes.len()]));
            }
        }
    }

    /// A directory as a process that begins now would find it.
    pub fn files(&self, dir: SimDir) -> super::SimFiles {
        super::SimFiles::new(self.world.clone(), dir)
    }

    /// Whether a directory has a name.
    pub fn has(&self, dir: SimDir, name: &str) -> bool {
        self.world.borrow().dirs[dir.index()].names.contains_key(name)
    }

    /// Whether the kernel could not write back a page of a mapping of this file since the boot began; and if so, whether
    /// the next flush of it is told.
    pub fn has_lost(&self, dir: SimDir, name: &str) -> Option<bool> {
        let world = self.world.borrow();
        let file = world.dirs[dir.index()].names.get(name).and_then(|id| world.files.get(id));
        file.filter(|file| file.has_lost).map(|file| file.untold_loss)
    }

    /// The kernel fails to write back a page of a mapping of this file, if it has anything to write.
    pub fn fail_write_back(&self, dir: SimDir, name: &str, page: usize) {
        let mut world = self.world.borrow_mut();
        let id = world.dirs[dir.index()].names.get(name).copied();
        if let Some(file) = id.and_then(|id| world.files.get_mut(&id)) {
            file.lose_page(page);
        }
    }

    /// Bytes of a state file; 0 if there is no such file.
    pub fn len_of(&self, dir: SimDir, name: &str) -> u64 {
        let world = self.world.borrow();
        let file = world.dirs[dir.index()].names.get(name).and_then(|id| world.files.get(id));
        file.map_or(0, |file| file.len)
    }

    /// Whether the `len` bytes of a state file from `at` on are zero; those that it has not count as that.
    pub fn is_zero(&self, dir: SimDir, name: &str, at: u64, len: usize) -> bool {
        let world = self.world.borrow();
        let file = world.dirs[dir.index()].names.get(name).and_then(|id| world.files.get(id));
        let mut bytes = vec![0; len];
        if let Some(file) = file {
            file.read_mapped(at, &mut bytes);
        }
        bytes.iter().all(|&byte| byte == 0)
    }

    /// Sets the faults that may happen from now on.
    pub fn set_faults(&self, rules: Vec<Rule>) {
        self.world.borrow_mut().rules = rules;
    }

    /// Faults that have happened so far.
    pub fn faults(&self) -> u64 {
        self.world.borrow().faults
    }

    /// Whether images can unmap, and zero without unmapping.
    pub fn set_zeroing(&self, unmap: bool, keep: bool) {
        let mut world = self.world.borrow_mut();
        (world.unmap_supported, world.keep_supported) = (unmap, keep);
    }

    /// Makes the medium break a promise from now on.
    pub fn set_defect(&self, defect: Option<Defect>) {
        self.world.borrow_mut().defect = defect;
    }

    /// Steps made so far.
    pub fn steps(&self) -> u64 {
        self.world.borrow().steps
    }

    /// Whether the process has come to the step at which it dies.
    pub fn is_dead(&self) -> bool {
        self.world.borrow().is_dead()
    }

    /// The same, for who is told something by the process on any thread: after its last step it says what did not happen.
    pub fn death(&self) -> Arc<AtomicBool> {
        self.world.borrow().dead.clone()
    }

    /// Starts a task. It ends with the process.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let index = tasks.len();
        tasks.push(Task::new(index, &self.ready, Some(Box::pin(future))));
    }

    /// Drives all tasks and `main` until `main` is ready, for at most `steps` steps.
    ///
    /// `None` if the process died at its last step: [`Sim::kill`] or [`Sim::power_cut`] is next.
    ///
    /// # Panics
    /// If nothing can go on, or only by a timer.
    pub fn run<T>(&mut self, main: impl Future<Output = T>, steps: u64) -> Option<T> {
        let mut main = pin!(main);
        let index = {
            let mut world = self.world.borrow_mut();
            world.deadline = world.steps.saturating_add(steps);
            let mut tasks = self.tasks.borrow_mut();
            let index = tasks.len();
            tasks.push(Task::new(index, &self.ready, None));
            index
        };
        loop {
            if self.is_dead() {
                return None;
            }
            match self.choose() {
                Some(task) if task == index => {
                    let waker = self.waker_of(task);
                    let polled = main.as_mut().poll(&mut Context::from_waker(&waker));
                    if let Poll::Ready(answer) = polled
                        && !self.is_dead()
                    {
                        self.world.borrow_mut().deadline = u64::MAX;
                        return Some(answer);
                    }
                }
                Some(task) => self.poll(task),
                None => {}
            }
            self.world.borrow_mut().step();
        }
    }

    /// Takes a task to run, or lets an operation have a turn.
    fn choose(&self) -> Option<usize> {
        let mut world = self.world.borrow_mut();
        let mut ready = self.ready.lock();
        let work = world.has_work();
        if ready.is_empty() {
            assert!(work, "nothing can go on: a wake-up was lost");
            // Waking takes the same lock.
            drop(ready);
            world.turn();
            return None;
        }
        if work && world.random.below(10) >= world.task_bias {
            drop(ready);
            world.turn();
            return None;
        }
        let at = world.random.index(ready.len());
        Some(ready.swap_remove(at))
    }

    fn waker_of(&self, task: usize) -> Waker {
        let waker = self.tasks.borrow()[task].waker.clone();
        waker.queued.store(false, Ordering::SeqCst);
        Waker::from(waker)
    }

    fn poll(&self, task: usize) {
        let Some(mut future) = self.tasks.borrow_mut()[task].future.take() else { return };
        let waker = self.waker_of(task);
        if future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.tasks.borrow_mut()[task].future = Some(future);
        }
    }

    /// The process ends here, by `kill -9` or because it ended itself: the page cache stays.
    pub fn kill(&mut self) {
        self.end();
    }

    /// The host loses its power here.
    pub fn power_cut(&mut self) {
        self.end();
        self.world.borrow_mut().cut_power();
    }

    fn end(&mut self) {
        {
            let mut world = self.world.borrow_mut();
            if !world.is_dead() {
                world.die();
            }
        }
        // Tasks end with the world borrowed by nobody: what they drop asks it.
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
        self.ready.lock().clear();
        self.world.borrow_mut().end_process();
    }

    /// Random numbers of the host's own sequence.
    pub fn random(&self) -> Random {
        Random::new(self.world.borrow_mut().random.bits())
    }

    /// The names in a directory.
    pub fn names(&self, dir: SimDir) -> io::Result<Vec<String>> {
        Ok(self.world.borrow().dirs[dir.index()].names.keys().cloned().collect())
    }

    /// Bytes of a file that take space; none if there is no such file.
    pub fn allocated(&self, dir: SimDir, name: &str) -> u64 {
        let world = self.world.borrow();
        let file = world.dirs[dir.index()].names.get(name).and_then(|id| world.files.get(id));
        file.map_or(0, super::medium::File::allocated)
    }
}
