//! A daemon, its guests and its backup program in one hand: what tests of snapshots are made of.
//!
//! Always: snapshots are read over NBD and controlled over QMP by clients that share no code with the
//! daemon. Absent: a load beside the test; see [`crate::stamped`].

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::{Daemon, Disk, Program};
use crate::nbd::{self, Nbd};
use crate::qmp::{self, Qmp};
use crate::vhost_client::{Client, Op, Options};

/// Bytes of one write of [`write_over`].
const WRITE_BYTES: usize = 64 << 10;
/// Writes of [`write_over`] in flight on each queue.
const WRITES: usize = 16;

/// Bytes of a tracked block unless a disk is told otherwise.
pub const BLOCK: u64 = 64 << 10;

/// A small disk of that name.
pub fn disk(name: &'static str) -> Disk {
    Disk { name, bytes: 4 << 20, ..Disk::default() }
}

/// Runs `test` with one queue, and with four.
///
/// # Errors
/// Those of the test, with the number of queues.
pub fn on_one_queue_and_on_four(test: impl Fn(usize) -> Result<()>) -> Result<()> {
    [1, 4].into_iter().try_for_each(|queues| test(queues).with_context(|| format!("{queues} queues")))
}

/// The blocks that byte ranges touch.
pub fn blocks(ranges: &[Range<u64>]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|range| range.start / BLOCK..range.end.div_ceil(BLOCK)).collect()
}

/// See the module.
#[derive(Debug)]
pub struct Scene {
    /// The daemon.
    pub daemon: Daemon,
    /// A control connection.
    pub qmp: Qmp,
    disks: Vec<Disk>,
}

impl Scene {
    /// Starts Ebbtide with new, empty `disks`.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(disks: &[Disk]) -> Result<Self> {
        Self::of(Daemon::start(Program::Ebbtide, disks)?, disks)
    }

    /// The same in `dir`, with the images that are there: see [`Daemon::start_in`].
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_in(dir: TempDir, disks: &[Disk]) -> Result<Self> {
        Self::of(Daemon::start_in(dir, Program::Ebbtide, disks)?, disks)
    }

    fn of(daemon: Daemon, disks: &[Disk]) -> Result<Self> {
        let qmp = Qmp::connect(&daemon.control())?;
        Ok(Self { daemon, qmp, disks: disks.to_vec() })
    }

    /// What disks are served, and how, from the next start on.
    pub fn serve_next(&mut self, disks: &[Disk]) {
        self.disks = disks.to_vec();
    }

    /// Ends the daemon by `signal`, and starts it again on the same files.
    ///
    /// # Errors
    /// If it does not end or does not come up again.
    pub fn restart(&mut self, signal: Signal) -> Result<()> {
        self.daemon.restart(signal, &self.disks)?;
        self.qmp = Qmp::connect(&self.daemon.control())?;
        Ok(())
    }

    /// The same as if the host had been started anew: see [`Daemon::restart_in_another_boot`].
    ///
    /// # Errors
    /// As that.
    pub fn restart_in_another_boot(&mut self) -> Result<()> {
        self.daemon.restart_in_another_boot(&self.disks)?;
        self.qmp = Qmp::connect(&self.daemon.control())?;
        Ok(())
    }

    /// Connects a guest to `disk`.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn guest(&self, disk: &str, queues: usize) -> Result<Client> {
        self.daemon.connect(disk, &Options { queues, ..Options::default() })
    }

    /// Takes a snapshot of `disks`, and answers their change ids.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn freeze(&mut self, name: &str, disks: &[&str]) -> qmp::Result<Vec<String>> {
        loop {
            let answer = self.qmp.call("snapshot-create", json!({ "name": name, "disks": disks }));
            match answer {
                // Writes in flight took too long: the host is busy, and nothing changed.
                Err(error) if error.reason() == "gate-timeout" => {}
                Err(error) => return Err(error),
                Ok(answer) => {
                    let text = |disk: &Value| disk["change-id"].as_str().unwrap_or_default().to_owned();
                    let disks = answer["disks"].as_array().map(|disks| disks.iter().map(text).collect());
                    return disks.ok_or_else(|| qmp::Error::Protocol(answer.to_string()));
                }
            }
        }
    }

    /// Deletes a snapshot on all disks that have it.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn delete(&mut self, name: &str) -> qmp::Result<()> {
        self.qmp.call("snapshot-delete", json!({ "name": name })).map(drop)
    }

    /// What the daemon tells of the snapshots of `disk`, oldest first.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn snapshots(&mut self, disk: &str) -> Result<Vec<Value>> {
        let mut all = self.qmp.call("query-snapshots", json!({ "disk": disk }))?;
        Ok(all.as_array_mut().context("a list")?.drain(..).collect())
    }

    /// Opens the view of `disk` at `snapshot`.
    ///
    /// # Errors
    /// [`nbd::Error::Refused`] if there is none.
    pub fn open(&self, disk: &str, snapshot: &str) -> nbd::Result<Nbd> {
        Nbd::open(&self.daemon.nbd(), &format!("{disk}@{snapshot}"))
    }

    /// What `disk` was at `snapshot`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn view(&self, disk: &str, snapshot: &str) -> Result<Vec<u8>> {
        let data = self.open(disk, snapshot).and_then(|mut view| view.read_all());
        data.with_context(|| format!("{disk}@{snapshot}"))
    }

    /// All ranges of `disk` that changed since a change id or snapshot up to `snapshot`, in bytes.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub fn changed(&mut self, disk: &str, since: &str, snapshot: &str) -> Result<Vec<Range<u64>>> {
        let mut all = Vec::new();
        let mut offset = Some(0);
        while let Some(from) = offset {
            let query = json!({ "disk": disk, "since": since, "snapshot": snapshot, "offset": from });
            let page = self.qmp.call("query-changed-blocks", query)?;
            for range in page["ranges"].as_array().context("ranges")? {
                let number = |name: &str| range[name].as_u64().with_context(|| format!("{name} of {range}"));
                let (first, length) = (number("offset")?, number("length")?);
                all.push(first..first + length);
            }
            offset = page["next-offset"].as_u64();
        }
        Ok(all)
    }

    /// What lies in the image of `disk` on the host, its page cache included.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn image(&self, disk: &str) -> Result<Vec<u8>> {
        let file = std::fs::File::open(self.daemon.image(disk))?;
        let mut data = vec![0; usize::try_from(file.metadata()?.len())?];
        file.read_exact_at(&mut data, 0)?;
        Ok(data)
    }
}

/// Writes `data` over a disk from its first sector on, with all queues of `guest` in use.
///
/// # Errors
/// If a write fails.
pub fn write_over(guest: &mut Client, data: &[u8]) -> Result<()> {
    let queues = guest.queues.len();
    let parts: Vec<_> = data.chunks(WRITE_BYTES).enumerate().collect();
    for batch in parts.chunks(WRITES * queues) {
        let ops = batch.iter().map(|(number, part)| Op {
            queue: number % queues,
            ..Op::write((number * WRITE_BYTES / 512) as u64, part)
        });
        run_together(guest, ops)?;
    }
    Ok(())
}

/// Runs requests that are in flight together; all must end well.
///
/// # Errors
/// If one does not.
pub fn run_together(guest: &mut Client, ops: impl IntoIterator<Item = Op>) -> Result<()> {
    let tickets = ops.into_iter().map(|op| guest.place(&op)).collect::<Result<Vec<_>, _>>()?;
    kick(guest)?;
    for ticket in tickets {
        guest.finish(ticket)?.ok()?;
    }
    Ok(())
}

/// Tells the device of all that was placed.
///
/// # Errors
/// If an eventfd refuses.
pub fn kick(guest: &mut Client) -> Result<()> {
    Ok(guest.queues.iter_mut().try_for_each(|queue| queue.kick_if_wanted())?)
}
