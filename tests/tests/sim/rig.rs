//! The life of a simulated host: opening, work, crashes, closing, and what must be so after each.
//!
//! What a seed draws is in `draw`, what happens to files while nobody serves them in `damage`, and what a look from
//! outside must agree with in `look`.

#[path = "rig/damage.rs"]
mod damage;
#[path = "rig/draw.rs"]
mod draw;
#[path = "rig/look.rs"]
mod look;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use cow_engine::cbt::BlockGrid;
use cow_engine::sim::{Defect, OpKind, Random, Rule, Sim, SimDir};
use cow_engine::{
    AreaSpec, Disk, DiskOptions, Error, Event, EventSink, OpenReport, ResetReason, StorePlan, group,
};
use ebbtide_tests::oracle::{After, Fate, GRAIN};

use crate::work::{self, Mix, Shared, SimDisk};
use crate::{checkpoints, overlays, readers, rewinds};

/// What a test looks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Profile {
    /// Of ten crashes so many are power cuts.
    pub(crate) power: u64,
    /// Operations fail now and then.
    pub(crate) faults: bool,
    /// Opening and closing are cut off more often than not, and block sizes change.
    pub(crate) restless: bool,
    /// State files are damaged between two lives, in ways that can be noticed.
    pub(crate) damage: bool,
    /// Overlays are used more than the disks below them.
    pub(crate) overlays: bool,
    /// Most readers release what they have read.
    pub(crate) releases: bool,
    /// Disks are rewound more than anything else is done to snapshots.
    pub(crate) rewinds: bool,
    /// Checkpoints are made and asked more than anything else is done to snapshots.
    pub(crate) checkpoints: bool,
    /// Stores have little space, in several areas, and snapshots say what happens then.
    pub(crate) short: bool,
    /// Snapshots end more often than anything else happens to them, and what ends them is cut off.
    pub(crate) deletes: bool,
    /// Disks get other sizes and begin new generations more than anything else, and commands are cut off.
    pub(crate) verbs: bool,
    /// What is wrong with the medium.
    pub(crate) defect: Option<Defect>,
}

impl Profile {
    /// Nothing fails but by crashes, half of them power cuts.
    pub(crate) const STRICT: Self = Self {
        power: 3,
        faults: false,
        restless: false,
        damage: false,
        overlays: false,
        releases: false,
        rewinds: false,
        checkpoints: false,
        short: false,
        deletes: false,
        verbs: false,
        defect: None,
    };
}

/// Steps after the last sign of life in which a disk may have been changed by its daemon, and one more.
const GRACE_STEPS: u64 = 5001;

/// How sure it is that a disk was closed in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clean {
    No,
    Maybe,
    Yes,
}

/// A disk's files, and how they were left.
struct Spec {
    dir: SimDir,
    /// Block sizes that it is opened with; 0 for no tracking.
    blocks: Vec<u64>,
    block: u64,
    clean: Clean,
    power: bool,
    edited: bool,
    /// It was changed after a crash, and no opening has seen that yet.
    unseen: bool,
    /// It was changed while nobody served it, and not durably: until it was opened the power stays on.
    loose: bool,
    /// The last sign of life said that nothing is in flight, and nothing came after it.
    quiet: bool,
    /// A rewind was under way when it was closed.
    rewinding: bool,
    /// The kernel could not write back what a rewind had brought back, and the process ended after that.
    lossy: bool,
    /// The kernel could not write back something of the map, nobody was told or nobody cared, and the process ended after
    /// that.
    map_lost: bool,
    /// A state file was damaged since the last opening that was not cut off.
    damaged: bool,
    /// Openings that were cut off since the last that was not.
    attempts: u64,
    /// One of them was with another block size.
    other_block: bool,
    /// Where areas of its store are, and how many the operator has named so far.
    places: SimDir,
    areas: usize,
}

impl Spec {
    /// Whether an opening may be told that something of the map could not be written, where faults happen.
    fn may_lose_map(&self, faulty: bool) -> bool {
        self.map_lost || faulty || self.attempts > 0
    }
}

struct Rig<'a> {
    sim: Sim,
    shared: Rc<Shared>,
    specs: Vec<Spec>,
    random: Random,
    profile: Profile,
    rules: Vec<Rule>,
    mix: Mix,
    merge_step: u64,
    region_bytes: u64,
    /// What is not damaged in this life: of a disk on its way back either is needed, and no loss of both is
    /// noticed.
    spared: &'static str,
    /// An image was changed, not durably, before the disks were opened.
    after_loose: bool,
    place: &'a dyn Fn(&str),
    round: u64,
}

/// Runs the life that `seed` draws.
///
/// # Panics
/// If anything is not as the oracle allows.
pub(crate) fn run(seed: u64, profile: Profile, place: &dyn Fn(&str)) {
    let mut rig = Rig::new(seed, profile, place);
    let rounds = if profile.deletes { rig.random.within(3..8) } else { rig.random.within(2..6) };
    for round in 0..rounds {
        rig.round = round;
        let Some(disks) = rig.open() else { return };
        rig.judge(&disks);
        let watched = disks.clone();
        rig.work(disks);
        if (profile.faults || profile.short) && watched.iter().any(|disk| disk.is_tracking_at_risk()) {
            // It has said that nothing more is promised: neither log nor superblock could be written.
            return;
        }
    }
    rig.end();
}

impl<'a> Rig<'a> {
    fn at(&self, phase: &str, crash_at: u64) {
        let now = self.sim.steps();
        let crash_at = now.checked_add(crash_at).map_or("never".to_owned(), |step| step.to_string());
        (self.place)(&format!("{crash_at} ({phase} in round {}, from step {now})", self.round));
    }

    /// Once in how many an opening is cut off, and of ten of these how many by a power cut: more where only that shows
    /// an order of what it does.
    fn risk(&self) -> (u64, u64) {
        let gone = self.profile.damage && self.specs.iter().any(|spec| !self.sim.has(spec.dir, "superblock"));
        let closed = self.profile.overlays && self.specs.iter().any(|spec| spec.clean == Clean::Yes);
        match () {
            () if gone && self.round > 0 => (1, 8),
            () if closed => (2, 7),
            () => (if self.profile.restless { 2 } else { 6 }, self.profile.power),
        }
    }

    /// A step at which a phase of some `usual` steps is cut off, once in `odds`, or never.
    fn cut_off(&mut self, usual: u64, odds: u64) -> u64 {
        let usual = if self.random.one_in(2) { usual } else { usual / 3 };
        if self.random.one_in(odds) { self.random.within(1..usual) } else { u64::MAX }
    }

    /// The process or the host ends here.
    fn crash(&mut self) {
        self.crash_with(self.profile.power);
    }

    /// The same, of ten times so often by a power cut.
    fn crash_with(&mut self, power: u64) {
        self.shared.note_failed_syncs();
        self.shared.note_breaks();
        // What was changed between a kill and a stop of the host is not told.
        let unseen = self.specs.iter().any(|spec| spec.unseen || spec.loose);
        if self.random.below(10) < power && !unseen {
            self.sim.power_cut();
            self.shared.oracle.borrow_mut().host_started();
            for spec in &mut self.specs {
                (spec.power, spec.lossy, spec.map_lost) = (true, false, false);
            }
        } else {
            self.kill();
        }
        self.shared.crash();
        self.damage(false);
    }

    /// The process ends here.
    fn kill(&mut self) {
        self.sim.kill();
        self.note_lost();
    }

    /// Notes what the kernel could not write back, and the next process may miss.
    fn note_lost(&mut self) {
        for (at, spec) in self.specs.iter_mut().enumerate() {
            spec.lossy |= self.sim.has_lost(spec.dir, "rewind-done").is_some();
            let kept = self.shared.oracle.borrow().keeps_older_marks(at);
            spec.map_lost |= self.sim.has_lost(spec.dir, "map").is_some_and(|untold| untold || kept);
        }
        let dirs: Vec<SimDir> = self.specs.iter().map(|spec| spec.dir).collect();
        overlays::note_lost(&self.shared, |at| {
            let names = self.sim.names(dirs[at]).expect("a directory");
            let cells = names.iter().filter(|name| name.ends_with(".overlay-cells"));
            let lost: Vec<_> = cells.map(|name| self.sim.has_lost(dirs[at], name)).collect();
            // Which file is whose nobody knows here.
            lost.iter().any(Option::is_some).then(|| lost.iter().all(|one| *one == Some(true)))
        });
    }

    /// Signs of life of all disks, as a thread of its own gives them.
    fn beat(&mut self, disks: &[SimDisk]) {
        for ((at, disk), spec) in disks.iter().enumerate().zip(&mut self.specs) {
            spec.quiet = self.shared.beat(at, disk);
        }
    }

    /// Opens all disks, however often it is cut off; `None` if one is rightly refused.
    fn open(&mut self) -> Option<Vec<SimDisk>> {
        self.shared.closing.set(false);
        loop {
            let blocks: Vec<u64> = self.specs.iter().map(|spec| *self.random.pick(&spec.blocks)).collect();
            let faulty = self.profile.faults && self.random.one_in(4);
            self.sim.set_faults(if faulty { self.rules.clone() } else { Vec::new() });
            let looked = self.look();
            let (odds, power) = self.risk();
            let limit = self.cut_off(90, odds);
            self.at("opening", limit);
            let options = self.options(&blocks);
            // At a step, or in one of its own operations.
            let (io, limit) = match self.random.below(4) {
                _ if limit == u64::MAX => (self.shared.io.clone(), limit),
                0 => (self.shared.io.fated(None, 0..0, self.random.below(80)), u64::MAX),
                1 => (self.shared.io.fated(Some(OpKind::Sync), 0..0, self.random.below(12)), u64::MAX),
                _ => (self.shared.io.clone(), limit),
            };
            let opened = self.sim.run(open_all(io, options), limit);
            self.sim.set_faults(Vec::new());
            match opened {
                Some(Ok(opened)) => {
                    // Also what it lost before it was taken up.
                    self.note_lost();
                    // Nobody can see from outside what a flush will tell.
                    if !faulty && self.specs.iter().all(|spec| !spec.map_lost) {
                        self.agrees(&looked, &opened, &blocks);
                    }
                    return Some(self.opened(opened, &blocks, faulty));
                }
                Some(Err(error)) => {
                    // A failure of the life before may be told to this one.
                    let lost = matches!(error, Error::RewindLost { .. });
                    if lost && self.profile.damage {
                        let refused = looked.iter().flatten().any(|one| one.code == "rewind-lost");
                        assert!(refused, "opening: {error:?}, {looked:?}");
                        return None;
                    }
                    let excused =
                        self.profile.faults && self.specs.iter().any(|spec| spec.may_lose_map(faulty));
                    if lost && excused {
                        return None;
                    }
                    assert!(self.profile.faults && !lost, "opening: {error:?}");
                    self.kill();
                    self.shared.crash();
                }
                None => self.crash_with(power),
            }
            for (spec, block) in self.specs.iter_mut().zip(blocks) {
                spec.attempts += 1;
                spec.other_block |= block != spec.block;
            }
        }
    }

    fn options(&self, blocks: &[u64]) -> Vec<DiskOptions<cow_engine::sim::SimStorage>> {
        let make = |(at, (spec, block)): (usize, (&Spec, &u64))| {
            let image = self.shared.images[at];
            DiskOptions {
                name: format!("d{at}"),
                image,
                image_path: format!("/d{at}.img"),
                identity: self.shared.io.identity(image),
                dir: spec.dir,
                tracking: (*block != 0).then(|| BlockGrid::new(*block).expect("a block size")),
                boot: self.sim.boot(),
                events: self.listener(at),
                merge_step: self.merge_step,
                store: self.plan(spec),
                region_bytes: Some(self.region_bytes),
                meanwhile: self.shared.io.meanwhile(),
            }
        };
        self.specs.iter().zip(blocks).enumerate().map(make).collect()
    }

    /// Hears of what breaks on a disk.
    fn listener(&self, at: usize) -> EventSink {
        let (broke, death) = (self.shared.broke.clone(), self.sim.death());
        Arc::new(move |event| match event {
            Event::SnapshotBroken { snapshot, .. } if !death.load(SeqCst) => {
                broke.lock().expect("one thread").push((at, snapshot));
            }
            _ => {}
        })
    }

    /// Where the old content of a disk goes this time.
    fn plan(&self, spec: &Spec) -> StorePlan {
        if !self.profile.short {
            return StorePlan::default();
        }
        let mut random = Random::new(self.random.clone().bits());
        // Some are named now, some no longer.
        let areas = (0..random.index(spec.areas + 1)).map(|nth| AreaSpec {
            path: spec.places.path(&format!("a{nth}")),
            bytes: random.one_in(2).then_some(1 << 20),
        });
        let areas = areas.collect();
        let limit = (!random.one_in(4)).then(|| GRAIN * random.within(1..80));
        StorePlan { areas, limit, ..StorePlan::default() }
    }

    /// Judges generations and snapshots after an opening that was not cut off.
    fn opened(&mut self, opened: Vec<(SimDisk, OpenReport)>, blocks: &[u64], faulty: bool) -> Vec<SimDisk> {
        self.shared.note_breaks();
        let mut oracle = self.shared.oracle.borrow_mut();
        for (at, (disk, report)) in opened.iter().enumerate() {
            let spec = &mut self.specs[at];
            let lost = spec.edited || spec.power && spec.clean == Clean::No;
            let map_lost = self.profile.faults && spec.may_lose_map(faulty);
            // Of a disk that was found closed in order nothing is lost, however often that was tried before.
            let unsure = report.unclean || report.reset.is_some();
            let unsure = unsure && (spec.clean == Clean::Maybe || spec.attempts > 0);
            let perhaps = lost || spec.damaged || spec.power && unsure;
            let generation = disk.change_id().generation;
            if let Some((before, _)) = oracle.disks[at].generation {
                let must = spec.edited || blocks[at] != spec.block;
                // A superblock that was being written is torn; what came of that may be cut off as well.
                let torn = report.reset == Some(ResetReason::Damaged) || spec.attempts > 0;
                let torn = torn && spec.power || spec.damaged;
                let torn = torn || oracle.disks[at].resetting;
                let may = must || torn || spec.other_block || self.profile.faults && spec.power;
                let may = may || map_lost;
                assert!(!must || before != generation, "disk {at}: the generation goes on: {report:?}");
                assert!(may || before == generation, "disk {at}: the generation was dropped: {report:?}");
            }
            let off = disk.is_switched_off();
            let unsure = matches!(report.reset, Some(ResetReason::New | ResetReason::Damaged));
            let unsure = unsure || oracle.disks[at].resetting || spec.damaged;
            assert!(
                unsure || off == oracle.disks[at].off,
                "disk {at}: an operator's word is lost: {report:?}"
            );
            oracle.disks[at].off = off;
            oracle.opened(at, generation, disk.tracker_grid());
            if let Err(what) = oracle.size_told(at, disk.capacity()) {
                panic!("{what}: {report:?}");
            }
            // Where there is no space for a longer map it stays begun.
            if !self.profile.faults && !self.profile.short {
                oracle.forget_resize(at);
            }
            let presumed = report.presumed_changed;
            assert!(presumed == 0 || spec.power, "disk {at}: changes are presumed after a kill: {report:?}");
            // An opening that was cut off may have done it.
            if spec.power {
                oracle.presumed(at, self.region_bytes);
            }
            for group in oracle.groups_of(at, |fate| matches!(fate, Fate::Held | Fate::Unknown)) {
                let name = oracle.groups[group].name.clone();
                let found = disk.snapshot(&name).ok().map(|snapshot| snapshot.change_id());
                assert!(!(lost && found.is_some()), "disk {at}: snapshot {name} was kept: {report:?}");
                if oracle.member(group, at).fate == Fate::Held {
                    let id = oracle.member(group, at).id;
                    assert!(found.is_none() || found == id, "disk {at}: snapshot {name} has another id");
                    // After a kill nothing is lost but what was told.
                    let broke = disk.snapshot(&name).ok().and_then(|one| one.broken().map(str::to_owned));
                    let excused = faulty || spec.damaged || spec.power || spec.attempts > 0;
                    assert!(
                        broke.is_none() || excused || oracle.is_broken(at, &name),
                        "disk {at}: snapshot {name} broke, and nobody was told: {broke:?}, {report:?}"
                    );
                    let may_be_gone = perhaps || self.profile.faults || self.profile.damage;
                    assert!(found.is_some() || may_be_gone, "disk {at}: snapshot {name} is gone: {report:?}");
                    if found.is_none() {
                        oracle.member(group, at).fate = Fate::Gone;
                    }
                } else if let Err(what) = oracle.found(group, at, found) {
                    panic!("{what}");
                }
            }
            for snapshot in disk.snapshots() {
                let known = oracle.groups_of(at, |fate| fate == Fate::Held);
                let known = known.iter().any(|&group| oracle.groups[group].name == snapshot.name());
                assert!(known, "disk {at}: snapshot {} was not expected", snapshot.name());
                let whole = snapshot.broken().is_none();
                if let Err(what) = oracle.found_whole(at, snapshot.name(), whole) {
                    assert!(spec.damaged, "{what}: {report:?}");
                }
            }
            // A superblock that was lost has no checkpoint to go on with, and they stay all the same.
            let found = checkpoints::of(disk);
            if let Err(what) = oracle.checkpoints_found(at, &found, spec.damaged) {
                panic!("{what}: {report:?}");
            }
            let must = if lost {
                overlays::Kept::Never
            } else if perhaps || self.profile.faults {
                overlays::Kept::Perhaps
            } else {
                overlays::Kept::Always
            };
            // Whatever becomes of one, its head goes first.
            let missing = |(_, why): &&(String, String)| why.contains("opening the overlay's files");
            let found = report.overlays_dropped.iter().find(missing);
            assert!(faulty || spec.damaged || found.is_none(), "disk {at}: a head without files: {report:?}");
            // One that was refused beside a release may be left by a kill, and is no longer possible.
            let refused = |(_, why): &(String, String)| why.contains("has released part");
            if must == overlays::Kept::Always {
                let all = report.overlays_dropped.iter().all(refused);
                assert!(all, "disk {at}: nothing was lost: {report:?}");
            }
            overlays::opened(&self.shared, &mut oracle, at, disk, must);
            oracle.told_at_start(at, disk.change_id());
        }
        let power = self.specs.iter().any(|spec| spec.power);
        let damaged = self.specs.iter().any(|spec| spec.damaged);
        // One that was not answered may be active on the disk that was changed only.
        let unseen = self.specs.iter().any(|spec| spec.unseen);
        if let Err(what) = oracle.check_whole(!power && !damaged && !unseen && !self.profile.faults) {
            panic!("{what}");
        }
        if let Err(what) = oracle.check_named(!damaged && !self.profile.faults) {
            panic!("{what}");
        }
        opened.into_iter().map(|(disk, _)| disk).collect()
    }

    /// Judges all content, and forgets how the disks were left.
    fn judge(&mut self, disks: &[SimDisk]) {
        self.at("judging", u64::MAX);
        let power = self.specs.iter().any(|spec| spec.power);
        let random = Random::new(self.random.bits());
        let of = |spec: &Spec| match () {
            () if power => After::PowerCut,
            () if spec.lossy => After::Loss,
            () => After::Kill,
        };
        let ends = self.specs.iter().map(of).collect();
        let judging = work::judge_all(self.shared.clone(), disks.to_vec(), random, ends);
        assert!(self.sim.run(judging, u64::MAX).is_some());
        if power {
            (0..disks.len()).for_each(|at| self.shared.oracle.borrow_mut().settle_past_end(at));
        }
        if power && self.random.one_in(2) {
            // What a backup would get right now: what the power cut took back is named.
            let own = Random::new(self.random.bits());
            let backup = work::back_up(self.shared.clone(), disks.to_vec(), own);
            assert!(self.sim.run(backup, u64::MAX).is_some());
        }
        self.after_loose = self.specs.iter().any(|spec| spec.loose);
        for (spec, disk) in self.specs.iter_mut().zip(disks) {
            spec.block = disk.tracker_grid().map_or(0, BlockGrid::bytes);
            (spec.clean, spec.power, spec.edited, spec.damaged) = (Clean::No, false, false, false);
            (spec.unseen, spec.quiet, spec.loose, spec.lossy) = (false, false, false, false);
            (spec.attempts, spec.other_block, spec.map_lost) = (0, false, false);
        }
    }

    /// Work until a crash, or to its end and a close.
    fn work(&mut self, disks: Vec<SimDisk>) {
        // Some rounds without, in which what an earlier one left behind shows.
        let faulty = !self.random.one_in(3);
        self.sim.set_faults(if faulty { self.rules.clone() } else { Vec::new() });
        // What fails at a close shows at the next start, after one that was in order.
        let closes = if self.profile.overlays { 2 } else { 4 };
        let close = self.random.one_in(closes);
        let longest = if self.profile.verbs && self.random.one_in(2) { 9 } else { 13 };
        let limit = match close {
            true => u64::MAX,
            false => 1 << self.random.within(5..longest),
        };
        let limit = if close { limit } else { self.random.within(limit / 2..limit) };
        self.at("working", limit);
        self.beat(&disks);
        self.specs.iter_mut().for_each(|spec| spec.quiet = false);
        if self.profile.damage && self.random.one_in(3) {
            self.damage_records();
        }
        let work = self.tasks(&disks);
        let done = self.sim.run(work, limit);
        if done.is_some() {
            if self.random.one_in(4) {
                self.sim.set_faults(Vec::new());
                let idle = work::account_all(self.shared.clone(), disks.clone());
                assert!(self.sim.run(idle, u64::MAX).is_some());
                self.sim.set_faults(if faulty { self.rules.clone() } else { Vec::new() });
            }
            self.beat(&disks);
        }
        if done.is_none() || !close {
            self.sim.set_faults(Vec::new());
            let often = self.after_loose && self.profile.power > 0;
            self.crash_with(if often { 7 } else { self.profile.power });
            return self.change_after_crash();
        }
        self.close(disks);
        self.sim.set_faults(Vec::new());
    }

    /// All tasks of a round, as one future.
    fn tasks(&mut self, disks: &[SimDisk]) -> impl Future<Output = ()> + use<> {
        let left = Rc::new(Cell::new(0u64));
        self.shared.hunted.set(None);
        let shared = self.shared.clone();
        let spawn = |task: std::pin::Pin<Box<dyn Future<Output = ()>>>| {
            left.set(left.get() + 1);
            let left = left.clone();
            self.sim.spawn(async move {
                task.await;
                left.set(left.get() - 1);
            });
        };
        let random = &mut self.random;
        // So little that nothing is flushed, nor marked near what was changed before.
        let idle = match () {
            // What the opening made durable shows if nothing else does.
            () if self.after_loose => random.one_in(2),
            () if self.profile.verbs => random.one_in(3),
            () => self.profile.faults && random.one_in(8),
        };
        // Nor begun anew.
        let left_alone = idle && random.one_in(2);
        for (at, disk) in disks.iter().enumerate() {
            let queues = match self.profile.overlays {
                true => 1,
                false if random.one_in(4) => random.within(4..9),
                false => random.within(1..5),
            };
            for _ in 0..queues {
                let requests = if idle { random.within(0..2) } else { random.within(10..80) };
                let own = Random::new(random.bits());
                let queue = work::queue(
                    shared.clone(),
                    at,
                    disk.clone(),
                    disk.lane(),
                    own,
                    self.mix.clone(),
                    requests,
                );
                spawn(Box::pin(queue));
            }
        }
        let users = if self.profile.overlays { random.within(3..9) } else { random.within(0..4) };
        for _ in 0..users {
            let (own, requests) = (Random::new(random.bits()), random.within(10..60));
            spawn(Box::pin(overlays::user(shared.clone(), disks.to_vec(), own, requests)));
        }
        let (own, commands) = (Random::new(random.bits()), if left_alone { 0 } else { random.within(1..14) });
        spawn(Box::pin(work::administrator(shared.clone(), disks.to_vec(), own, commands)));
        for _ in 0..random.within(0..4) {
            let (own, questions) = (Random::new(random.bits()), random.within(2..20));
            spawn(Box::pin(readers::reader(shared.clone(), disks.to_vec(), own, questions)));
        }
        let (mut last, often) = (self.sim.steps(), random.within(20..1500));
        let (sim, watched) = (self.sim.storage(), disks.to_vec());
        async move {
            while left.get() > 0 {
                if sim.steps() >= last + often {
                    last = sim.steps();
                    for (at, disk) in watched.iter().enumerate() {
                        shared.beat(at, disk);
                    }
                }
                shared.io.turn().await;
            }
        }
    }

    /// Closes the disks, perhaps not to the end; then perhaps something happens to them.
    fn close(&mut self, disks: Vec<SimDisk>) {
        let limit = self.cut_off(60, if self.profile.restless { 2 } else { 6 });
        self.at("closing", limit);
        self.specs.iter_mut().for_each(|spec| spec.quiet = false);
        let states: Rc<RefCell<Vec<Clean>>> = Rc::new(RefCell::new(vec![Clean::No; disks.len()]));
        let (shared, closing) = (self.shared.clone(), states.clone());
        self.shared.closing.set(true);
        for (spec, disk) in self.specs.iter_mut().zip(&disks) {
            spec.rewinding = disk.rewind().is_some();
        }
        // A guest that does not know waits at the gate for ever.
        if self.random.one_in(2) {
            for (at, disk) in disks.iter().enumerate() {
                let own = Random::new(self.random.bits());
                let (disk, lane) = (disk.clone(), disk.lane());
                self.sim.spawn(work::queue(shared.clone(), at, disk, lane, own, self.mix.clone(), 20));
            }
            let own = Random::new(self.random.bits());
            self.sim.spawn(overlays::user(shared.clone(), disks.clone(), own, 20));
        }
        let done = self.sim.run(
            async move {
                for (at, disk) in disks.iter().enumerate() {
                    let begin = shared.oracle.borrow_mut().now();
                    closing.borrow_mut()[at] = Clean::Maybe;
                    let image = shared.images[at];
                    let answer = disk.close(&shared.io, || Ok(shared.io.identity(image))).await;
                    if shared.io.is_dead() {
                        return;
                    }
                    shared.note_failed_syncs();
                    match answer {
                        Ok(()) => {
                            closing.borrow_mut()[at] = Clean::Yes;
                            work::judge(shared.oracle.borrow_mut().closed(at, begin));
                        }
                        Err(error) => assert!(!shared.strict, "closing: {error:?}"),
                    }
                }
            },
            limit,
        );
        for (spec, state) in self.specs.iter_mut().zip(states.borrow().iter()) {
            spec.clean = *state;
        }
        self.sim.set_faults(Vec::new());
        if done.is_none() {
            self.crash();
            return self.change_after_crash();
        }
        match self.random.below(4) {
            0 => self.crash(),
            // What was left undone shows after a power cut.
            2 if self.profile.overlays => self.crash_with(8),
            1 => {
                self.kill();
                self.shared.crash();
                let at = self.random.index(self.specs.len());
                if self.specs[at].clean == Clean::Yes && !self.specs[at].rewinding {
                    let unseen = self.shared.strict && self.profile.defect.is_none() && self.random.one_in(3);
                    self.edit(at, unseen);
                }
            }
            _ => {
                self.kill();
                self.shared.crash();
                self.damage(true);
            }
        }
    }

    /// Deletes all snapshots in any order; nothing of them may be left.
    fn end(mut self) {
        let Some(mut disks) = self.open() else { return };
        self.judge(&disks);
        self.at("ending", u64::MAX);
        // A failure of a life before may be told to this one: no rewind comes to its end then.
        while !self.sim.run(rewinds::complete(self.shared.clone(), disks.clone()), u64::MAX).unwrap_or(false)
        {
            self.beat(&disks);
            self.kill();
            self.shared.crash();
            let Some(opened) = self.open() else { return };
            disks = opened;
            self.judge(&disks);
        }
        let (io, mut random) = (self.shared.io.clone(), Random::new(self.random.bits()));
        let held = disks.clone();
        let ended = self.sim.run(
            async move {
                for disk in held {
                    for overlay in disk.overlays() {
                        let snapshot = overlay.view().snapshot().name().to_owned();
                        disk.close_overlay(&io, &snapshot, overlay.name()).expect("no faults now");
                    }
                    let mut names: Vec<String> =
                        disk.snapshots().iter().map(|snapshot| snapshot.name().to_owned()).collect();
                    random.shuffle(&mut names);
                    for name in names {
                        if random.one_in(2) {
                            work::delete_and_weigh(&io, &disk, &name).await;
                            continue;
                        }
                        disk.delete_snapshot(&io, &name).await.expect("no faults now");
                        if random.one_in(3) {
                            work::maintain_all(&io, &disk).await.expect("no faults now");
                        }
                    }
                    for one in disk.checkpoints() {
                        let mut admin = group::Admin::new();
                        disk.delete_checkpoint(&mut admin, &io, one.name()).expect("no faults now");
                    }
                    work::maintain_all(&io, &disk).await.expect("no faults now");
                    assert_eq!(disk.bytes_stored(), 0, "slots are left");
                }
            },
            u64::MAX,
        );
        assert!(ended.is_some());
        for (at, spec) in self.specs.iter().enumerate() {
            let mut names = self.sim.names(spec.dir).expect("a directory");
            // There is none where nothing was ever tracked.
            names.retain(|name| name != "intent" && (name != "areas" || !self.profile.short));
            assert_eq!(names, ["map", "store", "superblock"], "disk {at}: files are left");
            for name in self.sim.names(spec.places).expect("a directory") {
                let left = self.sim.allocated(spec.places, &name);
                assert!(
                    left <= 4096 || !self.shared.unmap_works,
                    "disk {at}: {left} bytes are left in {name}"
                );
            }
            let stored = self.sim.allocated(spec.dir, "store");
            // A file that was cut within a page keeps the rest of it.
            let may = !self.shared.unmap_works || self.profile.damage;
            assert!(stored == 0 || may, "disk {at}: {stored} bytes are left");
        }
    }
}

async fn open_all(
    io: cow_engine::sim::SimStorage,
    options: Vec<DiskOptions<cow_engine::sim::SimStorage>>,
) -> Result<Vec<(SimDisk, OpenReport)>, Error> {
    let mut opened = Vec::new();
    for options in options {
        opened.push(Disk::open(&io, options).await?);
    }
    let disks: Vec<SimDisk> = opened.iter().map(|(disk, _)| disk.clone()).collect();
    group::settle(&mut group::Admin::new(), &io, &disks).await?;
    Ok(opened)
}
