//! The state of the simulated host: its medium, the operations in flight, faults, and the step count.
//!
//! Invariant: once the process is dead nothing it does has an effect, until the crash has been played
//! out. Absent: tasks. The executor owns them, since running them borrows the world again.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::task::Waker;

use super::FileKind;
use super::medium::{Captured, Dir, File, PAGE, SECTOR};
use super::random::Random;
use crate::format::MAP_FILE;
use crate::rewind::DONE_FILE;

/// Kinds of operation that a fault can be aimed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reading bytes of a file.
    Read,
    /// Writing bytes of a file.
    Write,
    /// Making a file's writes durable.
    Sync,
    /// Zeroing a range.
    Zero,
    /// Extending a file.
    Allocate,
    /// Giving a file another length.
    SetLen,
    /// Making a name.
    Create,
    /// Opening a name.
    Open,
    /// Removing a name.
    Remove,
    /// Making a mapping's cells durable.
    SyncCells,
    /// Making names durable.
    SyncDir,
    /// The kernel's own writing back of a page of a mapping, once in so many steps.
    WriteBack,
}

/// A fault that happens by chance.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// To which operations.
    pub op: OpKind,
    /// On which files.
    pub file: FileKind,
    /// Once in how many.
    pub one_in: u64,
    /// What they answer.
    pub error: io::ErrorKind,
}

/// A medium that does not keep its promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// Now and then a write of a state file is answered and not done.
    ForgetsStateWrites,
    /// Writes of state files are answered before they are done, and done later in any order.
    AnswersStateWritesEarly,
    /// Syncs of images are answered and not done.
    IgnoresImageSyncs,
}

/// What happens to a state file behind the engine's back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The file is gone.
    Remove,
    /// It ends at this byte.
    Cut(u64),
    /// A bit of this byte is another one.
    Flip(u64),
    /// From a byte on so many are zero.
    Zero(u64, usize),
    /// Bytes are where others should be.
    Copy {
        /// Where they belong.
        from: u64,
        /// Where they are too.
        to: u64,
        /// How many.
        len: usize,
    },
}

pub(super) enum Work {
    Read {
        at: u64,
        buffer: Vec<u8>,
    },
    Write {
        at: u64,
        bytes: Vec<u8>,
    },
    Zero {
        at: u64,
        len: usize,
        unmap: bool,
    },
    Sync {
        captured: Captured,
    },
    /// Fires once in so many of its turns.
    Timer {
        one_in: u64,
    },
    Turn,
}

impl Work {
    pub(super) fn kind(&self) -> Option<OpKind> {
        match self {
            Self::Read { .. } => Some(OpKind::Read),
            Self::Write { .. } => Some(OpKind::Write),
            Self::Zero { .. } => Some(OpKind::Zero),
            Self::Sync { .. } => Some(OpKind::Sync),
            Self::Timer { .. } | Self::Turn => None,
        }
    }
}

pub(super) struct Op {
    pub(super) id: u64,
    file: u64,
    work: Work,
    /// What is left to do.
    pieces: Vec<Range<usize>>,
    error: Option<io::ErrorKind>,
    /// Turns that it lets pass before the next piece.
    patience: u64,
    /// Answered already; nobody waits.
    detached: bool,
    pub(super) waker: Option<Waker>,
    pub(super) done: Option<io::Result<Vec<u8>>>,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) files: BTreeMap<u64, File>,
    pub(super) dirs: Vec<Dir>,
    next_file: u64,
    next_op: u64,
    pub(super) ops: Vec<Op>,
    pub(super) steps: u64,
    /// Time that went by between steps, in steps.
    pub(super) idle: u64,
    /// When the boot began.
    pub(super) boot_began: u64,
    pub(super) deadline: u64,
    /// The process has come to its last step; shared with those who are told something from within it.
    pub(super) dead: Arc<AtomicBool>,
    frozen_cells: Vec<(u64, Vec<u32>)>,
    pub(super) boot: u64,
    pub(super) rules: Vec<Rule>,
    pub(super) faults: u64,
    pub(super) unmap_supported: bool,
    pub(super) keep_supported: bool,
    pub(super) defect: Option<Defect>,
    /// One operation in so many is slow; 0 for none.
    slow: u64,
    /// Of ten steps so many prefer a task, if one is ready.
    pub(super) task_bias: u64,
}

/// Once in so many turns the shortest and the longest timers fire; others by their milliseconds.
pub(super) const SHORT_TIMER: u64 = 30;
pub(super) const LONG_TIMER: u64 = 1500;

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let slow = *random.pick(&[0, 2, 4, 10, 30]);
        let task_bias = *random.pick(&[2, 5, 8]);
        Self {
            files: BTreeMap::new(),
            dirs: Vec::new(),
            next_file: 1,
            next_op: 1,
            ops: Vec::new(),
            steps: 0,
            idle: 0,
            boot_began: 0,
            deadline: u64::MAX,
            dead: Arc::default(),
            frozen_cells: Vec::new(),
            boot: 1,
            rules: Vec::new(),
            faults: 0,
            unmap_supported: true,
            keep_supported: true,
            defect: None,
            slow,
            task_bias,
            random,
        }
    }

    pub(super) fn add_file(&mut self, kind: FileKind, len: u64) -> u64 {
        let id = self.next_file;
        self.next_file += 1;
        self.files.insert(id, File::new(kind, len));
        id
    }

    pub(super) fn file(&mut self, id: u64) -> &mut File {
        self.files.get_mut(&id).expect("open files are kept")
    }

    /// The time of day, in steps.
    pub(super) fn now(&self) -> u64 {
        self.steps + self.idle
    }

    /// Counts a step; the process may die of it.
    pub(super) fn step(&mut self) {
        self.steps += 1;
        if !self.is_dead() && self.fault(OpKind::WriteBack, FileKind::State).is_some() {
            self.fail_write_back();
        }
        if self.steps >= self.deadline && !self.is_dead() {
            self.die();
        }
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(SeqCst)
    }

    /// From here on nothing that the process does has an effect.
    pub(super) fn die(&mut self) {
        self.dead.store(true, SeqCst);
        self.frozen_cells =
            self.files.iter().filter_map(|(&id, file)| Some((id, file.cells_now()?))).collect();
    }

    /// A call that does not wait: a step, and an error if the process is dead or a fault comes up.
    pub(super) fn call(&mut self, op: OpKind, file: FileKind) -> io::Result<()> {
        self.step();
        if self.is_dead() {
            return Err(io::Error::other("the process has ended"));
        }
        match self.fault(op, file) {
            Some(kind) => Err(kind.into()),
            None => Ok(()),
        }
    }

    /// The kernel fails to write back a page of a mapping.
    fn fail_write_back(&mut self) {
        let Self { files, dirs, random, .. } = self;
        let named = dirs.iter().flat_map(|dir| &dir.names);
        let mapped: Vec<u64> = named.filter(|(name, _)| is_mapped(name)).map(|(_, &id)| id).collect();
        if !mapped.is_empty()
            && let Some(file) = files.get_mut(random.pick(&mapped))
        {
            file.fail_write_back(random);
        }
    }

    fn fault(&mut self, op: OpKind, file: FileKind) -> Option<io::ErrorKind> {
        for at in 0..self.rules.len() {
            let rule = self.rules[at];
            if rule.op == op && rule.file == file && self.random.one_in(rule.one_in) {
                self.faults += 1;
                return Some(rule.error);
            }
        }
        None
    }

    /// Begins an operation, which `fails` or does so by chance; its id.
    pub(super) fn begin(&mut self, file: u64, mut work: Work, fails: bool) -> u64 {
        let kind = self.files.get(&file).map_or(FileKind::State, |file| file.kind);
        let mut pieces = match &work {
            Work::Read { buffer, .. } => self.pieces(kind, 0, buffer.len()),
            Work::Write { at, bytes, .. } => self.pieces(kind, *at, bytes.len()),
            Work::Zero { len, .. } => self.pieces(kind, 0, *len),
            Work::Sync { .. } | Work::Timer { .. } | Work::Turn => Vec::new(),
        };
        let op = work.kind();
        let mut error = op.and_then(|op| self.fault(op, kind));
        if fails {
            error.get_or_insert(io::ErrorKind::Other);
        }
        if op == Some(OpKind::Sync)
            && let Some(file) = self.files.get_mut(&file)
            && std::mem::take(&mut file.untold_failure)
        {
            error = Some(io::ErrorKind::Other);
        }
        if error.is_some() {
            let keep = self.random.index(pieces.len() + 1);
            pieces.truncate(keep);
        }
        let mut detached = false;
        match (self.defect, &mut work) {
            (Some(Defect::ForgetsStateWrites), Work::Write { .. })
                if kind == FileKind::State && self.random.one_in(20) =>
            {
                pieces.clear();
            }
            (Some(Defect::AnswersStateWritesEarly), Work::Write { .. }) if kind == FileKind::State => {
                detached = true;
            }
            (Some(Defect::IgnoresImageSyncs), Work::Sync { captured }) if kind == FileKind::Image => {
                captured.clear();
            }
            _ => {}
        }
        let slow = !matches!(work, Work::Timer { .. } | Work::Turn) && self.random.one_in(self.slow);
        let patience = if slow { self.random.below(60) } else { 0 };
        let id = self.next_op;
        self.next_op += 1;
        let done = detached.then(|| Ok(Vec::new()));
        self.ops.push(Op { id, file, work, pieces, error, patience, detached, waker: None, done });
        id
    }

    /// Pieces that a transfer of `len` bytes is made of, in the order in which they are done.
    fn pieces(&mut self, kind: FileKind, at: u64, len: usize) -> Vec<Range<usize>> {
        let mut cuts = vec![0, len];
        match kind {
            FileKind::Image => {
                let sectors = len / SECTOR;
                let count = self.random.below(6).min(sectors as u64);
                cuts.extend((0..count).map(|_| self.random.index(sectors + 1) * SECTOR));
            }
            FileKind::State => {
                let first = PAGE - usize::try_from(at % PAGE as u64).unwrap_or(0);
                cuts.extend((first..len).step_by(PAGE).take(8));
            }
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces: Vec<_> = cuts.windows(2).map(|pair| pair[0]..pair[1]).collect();
        self.random.shuffle(&mut pieces);
        pieces
    }

    /// Whether an operation can go on without a timer firing.
    pub(super) fn has_work(&self) -> bool {
        self.ops.iter().any(|op| op.is_going() && !matches!(op.work, Work::Timer { .. }))
    }

    /// One turn of one operation in flight, chosen at random.
    pub(super) fn turn(&mut self) {
        let going = self.ops.iter().filter(|op| op.is_going()).count();
        if going == 0 {
            return;
        }
        let nth = self.random.index(going);
        let Some(at) = self.ops.iter().enumerate().filter(|(_, op)| op.is_going()).map(|(at, _)| at).nth(nth)
        else {
            return;
        };
        if let Work::Timer { one_in } = self.ops[at].work
            && !self.random.one_in(one_in)
        {
            return;
        }
        let op = &mut self.ops[at];
        if op.patience > 0 {
            op.patience -= 1;
        } else if let Some(piece) = op.pieces.pop() {
            self.apply(at, piece);
        } else {
            self.finish(at);
        }
    }

    fn apply(&mut self, at: usize, piece: Range<usize>) {
        let now = self.now() + 1;
        let Self { ops, files, .. } = self;
        let op = &mut ops[at];
        let Some(file) = files.get_mut(&op.file) else { return };
        match &mut op.work {
            Work::Read { at, buffer } => file.read(*at + piece.start as u64, &mut buffer[piece]),
            Work::Write { at, bytes, .. } => file.write(*at + piece.start as u64, &bytes[piece], now),
            Work::Zero { at, unmap, .. } => file.zero(*at + piece.start as u64, piece.len(), *unmap, now),
            Work::Sync { .. } | Work::Timer { .. } | Work::Turn => {}
        }
    }

    fn finish(&mut self, at: usize) {
        let op = &mut self.ops[at];
        let file = self.files.get_mut(&op.file);
        let mut result = match op.error {
            Some(kind) => Err(kind.into()),
            None => Ok(Vec::new()),
        };
        match (&mut op.work, file) {
            (Work::Read { at, buffer }, Some(file)) => {
                if *at + buffer.len() as u64 > file.len {
                    result = Err(io::ErrorKind::UnexpectedEof.into());
                } else if result.is_ok() {
                    result = Ok(std::mem::take(buffer));
                }
            }
            (Work::Sync { captured }, Some(file)) if result.is_ok() => file.finish_sync(captured),
            (Work::Sync { captured }, Some(file)) => file.fail_sync(captured),
            _ => {}
        }
        if op.detached {
            self.ops.swap_remove(at);
            return;
        }
        op.done = Some(result);
        if let Some(waker) = op.waker.take() {
            waker.wake();
        }
    }

    /// Its waiter has its answer. One that was answered early goes on.
    pub(super) fn forget(&mut self, at: usize) {
        if !self.ops[at].detached {
            self.ops.swap_remove(at);
        }
    }

    /// Nobody waits for this operation any more: it is ended on the spot, as a host does.
    pub(super) fn drop_op(&mut self, id: u64) {
        let Some(at) = self.ops.iter().position(|op| op.id == id) else { return };
        if self.is_dead() || self.ops[at].detached {
            return;
        }
        while let Some(piece) = self.ops[at].pieces.pop() {
            self.apply(at, piece);
        }
        self.ops.swap_remove(at);
    }

    /// Ends the process: what was in flight lands or not.
    pub(super) fn end_process(&mut self) {
        if !self.is_dead() {
            self.die();
        }
        for at in 0..self.ops.len() {
            if matches!(self.ops[at].work, Work::Read { .. }) {
                continue;
            }
            let failed = matches!(self.ops[at].done, Some(Err(_)));
            if failed
                && matches!(self.ops[at].work, Work::Sync { .. })
                && let Some(file) = self.files.get_mut(&self.ops[at].file)
            {
                file.untold_failure = true;
            }
            let odds = *self.random.pick(&[0, 1, 2, 2]);
            while let Some(piece) = self.ops[at].pieces.pop() {
                if self.random.below(2) < odds {
                    self.apply(at, piece);
                }
            }
        }
        self.ops.clear();
        for (id, cells) in std::mem::take(&mut self.frozen_cells) {
            if let Some(file) = self.files.get_mut(&id) {
                file.restore_cells(&cells);
            }
        }
        for file in self.files.values_mut() {
            file.held = 0;
            if self.random.one_in(2) {
                file.forget_lost_cells();
            }
        }
        self.dead.store(false, SeqCst);
        self.deadline = u64::MAX;
        let Self { files, dirs, .. } = self;
        files.retain(|&id, file| file.kind == FileKind::Image || dirs.iter().any(|dir| dir.holds(id)));
    }

    pub(super) fn cut_power(&mut self) {
        let Self { files, dirs, random, .. } = self;
        for file in files.values_mut() {
            file.untold_failure = false;
            (file.untold_loss, file.has_lost) = (false, false);
            file.power_cut(random);
        }
        for dir in dirs.iter_mut() {
            dir.power_cut(random);
        }
        self.boot += 1;
        self.idle += 1 + self.random.below(1 << 14);
        self.boot_began = self.now();
    }
}

/// Whether a file of this name is one of cells, of which the kernel writes pages back when it likes.
fn is_mapped(name: &str) -> bool {
    [MAP_FILE, DONE_FILE].contains(&name) || name.ends_with(".overlay-cells")
}

impl Op {
    fn is_going(&self) -> bool {
        self.done.is_none() || self.detached
    }
}
