//! A daemon whose disks are under stamped load, and views of it that are judged.
//!
//! ```no_run
//! # use ebbtide_tests::stamped::rig::{Rig, Setup};
//! # fn main() -> anyhow::Result<()> {
//! let mut rig = Rig::start(Setup::default())?;
//! rig.begin_load()?;
//! let first = rig.freeze("s1")?;
//! rig.wait_for(100)?;
//! let second = rig.freeze("s2")?;
//! rig.expect_progress(&first, &second)?;
//! rig.expect_same(&first)?;
//! rig.end_load()?;
//! # Ok(()) }
//! ```
//!
//! Always: a view that [`Rig::freeze`] returns was read in full and found right.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::journal::{Clock, Seen, Window, judge, judge_progress};
use super::load::{Load, Plan, Shared};
use crate::daemon::Disk;
use crate::qmp::Qmp;
use crate::scene::Scene;

/// Names of the disks, as many as there can be.
const NAMES: [&str; 2] = ["vda", "vdb"];

/// What is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Disks, one or two.
    pub disks: usize,
    /// Queues of each.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// Bytes of a unit.
    pub unit_bytes: usize,
    /// Units of each disk.
    pub units: usize,
    /// More of the daemon's options for each disk.
    pub more: &'static str,
    /// What chooses requests and places.
    pub seed: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Self { disks: 1, queues: 1, depth: 32, unit_bytes: 4096, units: 2048, more: "", seed: 1 }
    }
}

impl Setup {
    fn daemon_disks(&self) -> Vec<Disk> {
        let bytes = (self.units * self.unit_bytes) as u64;
        let disk = |name| Disk { name, bytes, queues: self.queues, more: self.more, read_only: false };
        NAMES[..self.disks].iter().map(|name| disk(*name)).collect()
    }
}

/// A snapshot, and what was read of it.
#[derive(Debug)]
pub struct Frozen {
    /// The snapshot's name.
    pub name: String,
    /// Its change id on each disk.
    pub change_ids: Vec<String>,
    /// What it shows of each disk.
    pub views: Vec<Vec<u8>>,
    seen: Vec<Seen>,
}

/// See the module.
#[derive(Debug)]
pub struct Rig {
    setup: Setup,
    // Before the daemon, so that it ends first.
    loads: Vec<Load>,
    /// The daemon and its clients.
    pub scene: Scene,
    clock: Arc<Clock>,
    journals: Vec<Shared>,
    /// Loads begun so far; each has numbers of its own.
    begun: u64,
}

impl Rig {
    /// Starts a daemon with zero disks, without load.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(setup: Setup) -> Result<Self> {
        let scene = Scene::start(&setup.daemon_disks())?;
        let journals = (0..setup.disks).map(|_| Shared::new(setup.units)).collect();
        Ok(Self { setup, loads: Vec::new(), scene, clock: Arc::default(), journals, begun: 0 })
    }

    /// The names of the disks.
    pub fn names(&self) -> &'static [&'static str] {
        &NAMES[..self.setup.disks]
    }

    /// Begins the load on every disk.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn begin_load(&mut self) -> Result<()> {
        for (number, journal) in self.journals.iter().enumerate() {
            self.begun += 1;
            let plan = Plan {
                socket: self.scene.daemon.socket(NAMES[number]),
                disk: number as u64,
                unit_bytes: self.setup.unit_bytes,
                units: self.setup.units,
                queues: self.setup.queues,
                depth: self.setup.depth,
                seed: self.setup.seed.wrapping_mul(1000).wrapping_add(self.begun),
            };
            self.loads.push(Load::begin(plan, Arc::clone(&self.clock), journal.clone())?);
        }
        Ok(())
    }

    /// Waits until each disk acknowledged `more` requests from now on.
    ///
    /// # Errors
    /// What went wrong with the load.
    pub fn wait_for(&mut self, more: u64) -> Result<()> {
        self.loads.iter_mut().try_for_each(|load| load.wait_for(more))
    }

    /// Lets the requests in flight end, and the load with them.
    ///
    /// # Errors
    /// What went wrong with the load.
    pub fn end_load(&mut self) -> Result<()> {
        self.loads.drain(..).try_for_each(Load::end)
    }

    /// Kills the daemon under load, and starts it again. The load is over then.
    ///
    /// # Errors
    /// What went wrong with the load before; if the daemon does not come up again.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.scene.daemon.server().signal(Signal::KILL)?;
        self.loads.drain(..).try_for_each(Load::abandon)?;
        self.scene.restart(Signal::KILL)
    }

    /// Takes a snapshot of all disks, reads it in full, and judges what it shows.
    ///
    /// # Errors
    /// If a unit is wrong.
    pub fn freeze(&mut self, name: &str) -> Result<Frozen> {
        let before = self.clock.tick();
        let change_ids = self.scene.freeze(name, self.names())?;
        self.look(name, before..=self.clock.tick(), change_ids)
    }

    /// Kills the daemon under load while it takes a snapshot, `after` it was asked to, and starts it
    /// again. The load is over then. `None` if the snapshot is on no disk.
    ///
    /// # Errors
    /// If it is on some of the disks, or a unit is wrong.
    pub fn kill_at_a_take(&mut self, name: &str, after: Duration) -> Result<Option<Frozen>> {
        let mut other = Qmp::connect(&self.scene.daemon.control())?;
        let request = json!({ "name": name });
        let before = self.clock.tick();
        // Whether it gets an answer is up to the daemon.
        let asker = std::thread::spawn(move || drop(other.call("snapshot-create", request)));
        std::thread::sleep(after);
        self.kill_and_restart()?;
        let instants = before..=self.clock.tick();
        asker.join().map_err(|_| anyhow!("the asker panicked"))?;
        let mut change_ids = Vec::new();
        for disk in self.names() {
            let mut all = self.scene.snapshots(disk)?;
            all.retain(|snapshot| snapshot["name"] == name);
            change_ids.extend(all.iter().filter_map(|one| one["change-id"].as_str().map(str::to_owned)));
        }
        if change_ids.is_empty() {
            return Ok(None);
        }
        ensure!(change_ids.len() == self.setup.disks, "'{name}' is on {} disks", change_ids.len());
        self.look(name, instants, change_ids).map(Some)
    }

    /// Reads a snapshot whose instant lies within `instants`, and judges what it shows.
    fn look(&self, name: &str, instants: RangeInclusive<u64>, change_ids: Vec<String>) -> Result<Frozen> {
        let windows = self.windows(&instants);
        for journal in &self.journals {
            journal.lock().forget(*instants.start());
        }
        let views = self.read(name)?;
        let seen = self.judge(instants, &windows, &views).with_context(|| format!("view of '{name}'"))?;
        Ok(Frozen { name: name.to_owned(), change_ids, views, seen })
    }

    /// Judges a copy of the images themselves, made while guests write: it shows no instant.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge_live_images(&self) -> Result<()> {
        let before = self.clock.tick();
        let copies = self.names().iter().map(|disk| self.scene.image(disk)).collect::<Result<Vec<_>>>()?;
        let instants = before..=self.clock.tick();
        let windows = self.windows(&instants);
        self.judge(instants, &windows, &copies).map(drop)
    }

    fn windows(&self, instants: &RangeInclusive<u64>) -> Vec<Window> {
        self.journals.iter().map(|journal| journal.lock().window(instants.clone())).collect()
    }

    fn judge(
        &self,
        instants: RangeInclusive<u64>,
        windows: &[Window],
        views: &[Vec<u8>],
    ) -> Result<Vec<Seen>> {
        let views: Vec<_> =
            (0..).zip(windows).zip(views).map(|((n, window), view)| (n, window, &view[..])).collect();
        judge(instants, self.setup.unit_bytes, &views).map_err(|text| anyhow!(text))
    }

    fn read(&self, name: &str) -> Result<Vec<Vec<u8>>> {
        self.names().iter().map(|disk| self.scene.view(disk, name)).collect()
    }

    /// Reads a snapshot again and compares it with what it showed at first.
    ///
    /// # Errors
    /// If a byte differs.
    pub fn expect_same(&self, frozen: &Frozen) -> Result<()> {
        for (disk, (now, then)) in self.read(&frozen.name)?.iter().zip(&frozen.views).enumerate() {
            let units = now.chunks(self.setup.unit_bytes).zip(then.chunks(self.setup.unit_bytes));
            let differs = units.enumerate().find(|(_, (now, then))| now != then);
            let name = &frozen.name;
            ensure!(differs.is_none(), "disk {disk}, '{name}' reads differently again: {differs:02x?}");
        }
        Ok(())
    }

    /// Checks that `later` is not behind `earlier`, and that what is newer is reported as changed.
    ///
    /// # Errors
    /// The unit that went back or is not reported.
    pub fn expect_progress(&mut self, earlier: &Frozen, later: &Frozen) -> Result<()> {
        for (disk, disk_name) in self.names().iter().enumerate() {
            let ranges = self.scene.changed(disk_name, &earlier.change_ids[disk], &later.name)?;
            let bytes = self.setup.unit_bytes as u64;
            let mut reported = vec![false; self.setup.units];
            for range in ranges {
                // Only units that are reported wholly.
                let (from, to) = (range.start.div_ceil(bytes), range.end / bytes);
                reported[usize::try_from(from)?..usize::try_from(to)?].fill(true);
            }
            judge_progress(&earlier.seen[disk], &later.seen[disk], |unit| reported[unit])
                .map_err(|text| anyhow!("disk {disk}, '{}' to '{}': {text}", earlier.name, later.name))?;
        }
        Ok(())
    }

    /// Checks that the images hold what `frozen` shows: nothing was written since.
    ///
    /// # Errors
    /// If one does not.
    pub fn expect_on_host(&self, frozen: &Frozen) -> Result<()> {
        for (disk, view) in NAMES.iter().zip(&frozen.views) {
            ensure!(
                self.scene.image(disk)? == *view,
                "the image of {disk} is not what '{}' shows",
                frozen.name
            );
        }
        Ok(())
    }
}
