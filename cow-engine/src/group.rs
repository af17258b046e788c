//! One instant for many disks: snapshots that are taken together, all or none.
//!
//! ```text
//! make the files of every disk       (heads say "prepared"; slow, before the gates close)
//! reserve the next epoch, durably    (no mark is ever made in an epoch that a crash forgets)
//! close the gates, wait              (writes of all disks; reads pass)
//! flip every disk                    (chain and epoch: stores to memory, cannot fail)
//! open the gates
//! flush the images                   (the answer waits for this, the guests do not)
//! heads say "active"
//! look whether one broke meanwhile  (an answer tells of no snapshot that cannot be read; later breaks are events)
//! ```
//!
//! A stop before the first "active" leaves prepared snapshots that nobody was told of: they are dropped
//! at the next start. A stop after it leaves a group of which one member is active, which proves that
//! every disk was flipped: [`settle`] makes the others active too.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use cbt::{ChangeId, Epoch};

use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::{NAME_BYTES, SnapshotHeader, SnapshotState};
use crate::overflow::Terms;
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::tracker::MAX_SNAPSHOTS;

/// The right to change which snapshots there are. One exists per set of disks, so that
/// administrative verbs run one at a time while guests and readers go on.
pub struct Admin {
    _one: (),
}

impl Admin {
    /// The one right; keep it behind a lock that administrative threads share.
    #[allow(clippy::new_without_default, reason = "making one is a decision")]
    pub fn new() -> Self {
        Self { _one: () }
    }
}

/// How long writes may be held while those in flight end, before the creation is given up: the time
/// for which one guest's slow writes can stop those of others.
pub const GATE_DEADLINE: Duration = Duration::from_secs(1);

/// A snapshot that was taken, of one disk of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The disk's name.
    pub disk: String,
    /// The instant.
    pub change_id: ChangeId,
}

/// An instant that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instant {
    /// Its snapshots, in the order of the disks.
    pub taken: Vec<Taken>,
    /// How long the gates were closed: no write waited longer than this.
    pub held: Duration,
}

/// Takes a snapshot of all `disks` at one instant, all or none.
///
/// `created_ns` is the time of day in nanoseconds since 1970. Guests' writes wait for those in flight
/// to end; reads do not wait.
///
/// # Errors
/// [`Error::SnapshotExists`], [`Error::CheckpointExists`], [`Error::BadName`], [`Error::RewindActive`];
/// [`Error::SnapshotBroken`] if it broke before it could be told of; [`Error::GateTimeout`] if writes in flight did not end
/// within `deadline`; those of the files. After an error none of the disks has the snapshot.
pub async fn create<S: Storage>(
    admin: &mut Admin,
    io: &S,
    disks: &[Arc<Disk<S>>],
    name: &str,
    created_ns: u64,
    deadline: Duration,
) -> Result<Instant, Error> {
    create_on(admin, io, disks, name, created_ns, deadline, Terms::default()).await
}

/// The same, on terms of its own.
///
/// # Errors
/// As [`create`].
pub async fn create_on<S: Storage>(
    _admin: &mut Admin,
    io: &S,
    disks: &[Arc<Disk<S>>],
    name: &str,
    created_ns: u64,
    deadline: Duration,
    terms: Terms,
) -> Result<Instant, Error> {
    check_name(name)?;
    for disk in disks {
        disk.check_unwound()?;
        if disk.snapshot(name).is_ok() {
            return Err(Error::SnapshotExists { disk: disk.name.clone(), name: name.to_owned() });
        }
        // A name of a disk is one instant, whatever it is asked as.
        if disk.checkpoint(name).is_ok() {
            return Err(Error::CheckpointExists { disk: disk.name.clone(), name: name.to_owned() });
        }
    }
    let group = uuid::Uuid::new_v4().into_bytes();
    let mut prepared: Vec<Prepared<S>> = Vec::new();
    for disk in disks {
        match prepare(io, disk, name, group, created_ns, terms).await {
            Ok(one) => prepared.push(one),
            Err(error) => {
                abandon(io, &prepared).await;
                return Err(error);
            }
        }
    }
    let held = match flip(io, &prepared, deadline).await {
        Ok(held) => held,
        Err(error) => {
            abandon(io, &prepared).await;
            return Err(error);
        }
    };
    if let Err(error) = confirm(io, &prepared).await {
        for one in &prepared {
            if let Err(error) = one.disk.retire(io, &one.snapshot).await {
                log::warn!("{}: cannot undo snapshot '{name}': {}", one.disk.name, with_sources(&error));
            }
        }
        return Err(error);
    }
    let taken = prepared
        .iter()
        .map(|one| Taken { disk: one.disk.name.clone(), change_id: one.snapshot.change_id() })
        .collect();
    Ok(Instant { taken, held })
}

struct Prepared<S: Storage> {
    disk: Arc<Disk<S>>,
    snapshot: Arc<Snapshot<S>>,
    next: Epoch,
}

/// Makes a snapshot's files and reserves the epoch after it. The guest does not notice.
async fn prepare<S: Storage>(
    io: &S,
    disk: &Arc<Disk<S>>,
    name: &str,
    group: [u8; 16],
    created_ns: u64,
    terms: Terms,
) -> Result<Prepared<S>, Error> {
    let epoch = disk.history.epoch();
    let next = epoch.next().ok_or_else(|| Error::EpochsExhausted { disk: disk.name.clone() })?;
    let sequence = disk.next_sequence()?;
    let header = SnapshotHeader {
        sequence,
        state: SnapshotState::Prepared,
        disk: disk.id,
        group,
        generation: disk.history.generation(),
        epoch,
        tracked: disk.block_grid().is_some(),
        capacity: disk.capacity(),
        created_ns,
        name: name.to_owned(),
        newer: 0,
        broken: None,
        terms,
    };
    let made = async {
        disk.control.set_records(sequence, 0);
        let snapshot = Snapshot::create(io, &disk.dir, header).await?;
        // Before anything is preserved into it: an older one that names it knows when it is lost.
        let chain = disk.chain.now();
        for older in chain.iter().filter(|one| ends(one, &chain)) {
            older.set_newer(io, sequence).await?;
        }
        disk.write_superblock(io, |superblock| superblock.epoch = superblock.epoch.max(next)).await?;
        Ok(Arc::new(snapshot))
    };
    match made.await {
        Ok(snapshot) => Ok(Prepared { disk: disk.clone(), snapshot, next }),
        Err(error) => {
            withdraw(io, disk, sequence).await;
            Err(error)
        }
    }
}

/// Whether the next newer one of `one` is yet to come: it is the newest, or what it named is merged, and the file of that
/// could not be removed. The next start removes it, and must find that this one leads on.
fn ends<S: Storage>(one: &Arc<Snapshot<S>>, chain: &[Arc<Snapshot<S>>]) -> bool {
    one.newer() == 0 || chain.last().is_some_and(|last| Arc::ptr_eq(last, one))
}

/// The instant. Either every disk is flipped, or none and the gates are open again.
async fn flip<S: Storage>(io: &S, prepared: &[Prepared<S>], deadline: Duration) -> Result<Duration, Error> {
    let began = std::time::Instant::now();
    let gates = Gates { prepared };
    let mut closing: Vec<_> = prepared.iter().map(|one| (one, Box::pin(one.disk.gate.close()))).collect();
    let mut timer = Box::pin(io.sleep(deadline));
    let mut expired = false;
    std::future::poll_fn(|cx| {
        closing.retain_mut(|(_, gate)| gate.as_mut().poll(cx).is_pending());
        if closing.is_empty() {
            return std::task::Poll::Ready(());
        }
        expired = timer.as_mut().poll(cx).is_ready();
        if expired { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    if let Some((late, _)) = closing.first() {
        return Err(Error::GateTimeout { disk: late.disk.name.clone(), seconds: deadline.as_secs() });
    }
    for one in prepared {
        one.disk.chain.push(one.snapshot.clone());
        one.disk.watch.set_newest(Some(one.snapshot.clone()));
        one.disk.history.begin(one.next);
    }
    drop(gates);
    Ok(began.elapsed())
}

/// Opens all gates of a group when dropped, whatever happened.
struct Gates<'a, S: Storage> {
    prepared: &'a [Prepared<S>],
}

impl<S: Storage> Drop for Gates<'_, S> {
    fn drop(&mut self) {
        for one in self.prepared {
            one.disk.gate.open();
        }
    }
}

/// Makes the instant hold over a stop: images flushed, then every head active.
async fn confirm<S: Storage>(io: &S, prepared: &[Prepared<S>]) -> Result<(), Error> {
    for one in prepared {
        one.disk.flush(io).await?;
    }
    for one in prepared {
        activate(io, &one.disk, &one.snapshot).await?;
        // Looked for once it is active: what breaks it from then on is told by an event.
        if let Some(reason) = one.snapshot.broken() {
            let name = one.snapshot.name.clone();
            return Err(Error::SnapshotBroken { name, reason: reason.to_owned() });
        }
    }
    Ok(())
}

async fn activate<S: Storage>(io: &S, disk: &Disk<S>, snapshot: &Snapshot<S>) -> Result<(), Error> {
    snapshot.set_state(SnapshotState::Active);
    let written = snapshot.write_head(io).await;
    if let Err(error) = &written {
        log::warn!("{}: cannot confirm snapshot '{}': {error}", disk.name, snapshot.name);
        snapshot.set_state(SnapshotState::Prepared);
    }
    written
}

/// Removes what was prepared for an instant that did not come.
async fn abandon<S: Storage>(io: &S, prepared: &[Prepared<S>]) {
    for one in prepared {
        withdraw(io, &one.disk, one.snapshot.sequence).await;
    }
}

/// Removes the file of a snapshot that is not in the chain, once no older one names it.
async fn withdraw<S: Storage>(io: &S, disk: &Disk<S>, sequence: u32) {
    let mut forgotten = Ok(());
    for older in disk.chain.now().iter().filter(|one| one.newer() == sequence) {
        forgotten = forgotten.and(older.set_newer(io, 0).await);
    }
    // What is left is found prepared at the next start, and deleted then.
    let removed = forgotten.and_then(|()| Snapshot::<S>::remove_file(io, &disk.dir, sequence));
    if let Err(error) = removed {
        log::warn!("{}: {}", disk.name, with_sources(&error));
    }
}

/// Decides on snapshots and checkpoints that a stop left prepared, once all disks are open and before they are served.
///
/// Answers the names of snapshots that were dropped, with their disks.
pub async fn settle<S: Storage>(
    admin: &mut Admin,
    io: &S,
    disks: &[Arc<Disk<S>>],
) -> Result<Vec<(String, String)>, Error> {
    crate::checkpoint::settle(admin, io, disks).await?;
    let all: Vec<_> = disks
        .iter()
        .flat_map(|disk| disk.chain.now().iter().map(|one| (disk.clone(), one.clone())).collect::<Vec<_>>())
        .collect();
    let active: Vec<[u8; 16]> = all
        .iter()
        .filter(|(_, one)| one.state() == SnapshotState::Active)
        .map(|(_, one)| one.group)
        .collect();
    let mut dropped = Vec::new();
    for (disk, snapshot) in all {
        if snapshot.state() != SnapshotState::Prepared {
            continue;
        }
        if active.contains(&snapshot.group) {
            activate(io, &disk, &snapshot).await?;
        } else {
            disk.retire(io, &snapshot).await?;
            dropped.push((disk.name.clone(), snapshot.name.clone()));
        }
    }
    Ok(dropped)
}

pub(crate) fn check_name(name: &str) -> Result<(), Error> {
    let fits = (1..=NAME_BYTES).contains(&name.len());
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+:".contains(&b));
    if fits && plain && name.as_bytes()[0].is_ascii_alphanumeric() {
        Ok(())
    } else {
        Err(Error::BadName { name: name.chars().take(200).collect(), max: NAME_BYTES })
    }
}

impl<S: Storage> Disk<S> {
    /// A number for one more snapshot: later ones in the chain have higher numbers, no two share a word in
    /// the control page, and none is given twice while a writer of the first may still be at work.
    fn next_sequence(&self) -> Result<u32, Error> {
        let list = self.chain.now();
        if list.len() >= MAX_SNAPSHOTS {
            return Err(Error::TooManySnapshots { disk: self.name.clone(), max: MAX_SNAPSHOTS });
        }
        let last = list.last().map_or(0, |last| last.sequence).max(self.control.broken_up_to());
        let last = last.max(self.last_sequence.load(SeqCst));
        let place = |sequence: u32| sequence as usize % MAX_SNAPSHOTS;
        let is_free = |sequence: &u32| list.iter().all(|one| place(one.sequence) != place(*sequence));
        let next = (last..u32::MAX - 1).map(|before| before + 1).find(is_free);
        let next = next.ok_or_else(|| Error::EpochsExhausted { disk: self.name.clone() })?;
        self.last_sequence.store(next, SeqCst);
        Ok(next)
    }

    /// The superblock as it was written last.
    pub(crate) fn superblock_now(&self) -> crate::format::Superblock {
        self.superblock.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes the superblock and writes it durably.
    pub(crate) async fn write_superblock(
        &self,
        io: &S,
        change: impl FnOnce(&mut crate::format::Superblock),
    ) -> Result<(), Error> {
        // An administrative verb, or a queue that cannot write the intent log.
        let _writer = self.superblock_writer.claim(0..1).await;
        let mut next = self.superblock.lock().unwrap_or_else(PoisonError::into_inner).clone();
        change(&mut next);
        next.sequence += 1;
        crate::open::write_superblock(io, &self.superblock_file, &next).await?;
        // Only now: after a failure the next attempt goes over the same copy, which may be torn.
        *self.superblock.lock().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(())
    }
}
