//! Which checkpoints a disk has: finding and deleting them, and taking them up after a stop.
//!
//! Invariant: names differ. A checkpoint is told of only while its file is there, whole and durable.
//!
//! | left as | and | at the next start |
//! |---|---|---|
//! | shorter than a head, or a head of zeros | | removed: it was never made whole |
//! | prepared | no active one of its group, on any disk | removed: nobody was told |
//! | prepared | an active one of its group | made active |
//! | active | | kept; of an earlier generation if that is not the disk's |
//! | active, and shorter than its runs | | kept, and lost as the younger end |
//! | a damaged head | | removed, with the reason |

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::head::{Head, State, file_of, numbers};
use super::{Checkpoint, write_head};
use cbt::Generation;

use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::format::PAGE;
use crate::group::Admin;
use crate::memory::Target;
use crate::preserve::join_all;
use crate::storage::Storage;

/// The checkpoints of a disk.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints {
    /// Oldest first, prepared ones included until they are settled.
    list: Mutex<Vec<Arc<Checkpoint>>>,
    last_number: AtomicU32,
}

/// Heads that are made durable at the same time, so that a start with many does not wait for a flush of the medium each.
const TOGETHER: usize = 16;

/// Names of checkpoints, or of their files, with the reason why they could not be kept.
type Lost = Vec<(String, String)>;

impl Checkpoints {
    /// Reads the heads of the checkpoints that were left, and removes what cannot be one.
    ///
    /// An error that may pass is the caller's, and nothing was changed.
    /// They are made durable: a process that was killed may have written heads and not flushed them, and a flush of one
    /// that could not be removed may have failed. Some at a time: each stays what it is, so there is no order between
    /// them, and a medium that is told to flush by many flushes once.
    pub(crate) async fn load<S: Storage>(
        io: &S,
        dir: &S::Dir,
        names: &[String],
    ) -> Result<(Self, Lost), Error> {
        let (mut list, mut unmade, mut lost) = (Vec::new(), Vec::new(), Vec::new());
        let numbers = numbers(names);
        for numbers in numbers.chunks(TOGETHER) {
            let mut loaded: Vec<_> = numbers.iter().map(|_| Ok(None)).collect();
            let each = numbers.iter().zip(&mut loaded).map(|(&number, loaded)| {
                Box::pin(async move {
                    *loaded = load_one(io, dir, number).await;
                    Ok(())
                })
            });
            join_all(each.collect()).await?;
            for (&number, loaded) in numbers.iter().zip(loaded) {
                match loaded {
                    Ok(Some(one)) => list.push(Arc::new(one)),
                    Ok(None) => unmade.push(number),
                    Err(error) if !error.is_damage() => return Err(error),
                    Err(error) => lost.push((number, with_sources(&error))),
                }
            }
        }
        for number in unmade {
            log::warn!("{} has no head: a checkpoint was never made whole; it is removed", file_of(number));
            remove_file(io, dir, number)?;
        }
        for (number, _) in &lost {
            remove_file(io, dir, *number)?;
        }
        list.sort_by_key(order);
        let last_number = AtomicU32::new(numbers.last().copied().unwrap_or(0));
        let lost = lost.into_iter().map(|(number, why)| (file_of(number), why)).collect();
        Ok((Self { list: Mutex::new(list), last_number }, lost))
    }

    /// `generation` has ended, or whatever theirs was: heads say why. Costs only the reason if it fails.
    pub(crate) async fn end_generation<S: Storage>(
        &self,
        io: &S,
        dir: &S::Dir,
        generation: Option<Generation>,
        code: &str,
    ) {
        for one in self.all() {
            let other = generation.is_some_and(|ended| ended != one.change_id.generation);
            if other || !one.head().ended.is_empty() {
                continue;
            }
            let head = Head { ended: code.to_owned(), ..one.head() };
            if let Err(error) = one.write(io, dir, &head).await {
                log::warn!(
                    "checkpoint '{}' does not say why its generation ended: {}",
                    one.name,
                    with_sources(&error)
                );
            }
            one.set_head(head);
        }
    }

    /// The number of the next one; `None` if a file has the last number there is.
    pub(super) fn next_number(&self) -> Option<u32> {
        // None is given twice while the process lives.
        let last = self.last_number.fetch_update(SeqCst, SeqCst, |last| last.checked_add(1)).ok()?;
        last.checked_add(1)
    }

    pub(super) fn add(&self, one: Arc<Checkpoint>) {
        let mut list = self.lock();
        list.push(one);
        list.sort_by_key(order);
    }

    fn all(&self) -> Vec<Arc<Checkpoint>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Checkpoint>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn order(one: &Arc<Checkpoint>) -> (u64, u32) {
    (one.created_ns(), one.number)
}

impl Checkpoint {
    /// Writes the head with another state, durably; and tells it.
    pub(super) async fn set_state<S: Storage>(
        &self,
        io: &S,
        dir: &S::Dir,
        state: State,
    ) -> Result<(), Error> {
        let head = Head { state, ..self.head() };
        self.write(io, dir, &head).await?;
        self.set_head(head);
        Ok(())
    }

    async fn write<S: Storage>(&self, io: &S, dir: &S::Dir, head: &Head) -> Result<(), Error> {
        let file = io.open(dir, &file_of(self.number)).map_err(Error::io("opening a checkpoint"))?;
        write_head(io, &file, head).await
    }

    fn set_head(&self, head: Head) {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner) = head;
    }
}

/// Reads a checkpoint's head; `None` if it was never written.
async fn load_one<S: Storage>(io: &S, dir: &S::Dir, number: u32) -> Result<Option<Checkpoint>, Error> {
    let fail = || Error::io("reading a checkpoint");
    let file = io.open(dir, &file_of(number)).map_err(fail())?;
    let len = io.len(&file).map_err(fail())?;
    if len < PAGE as u64 {
        return Ok(None);
    }
    let mut page = [0; PAGE];
    io.read(&file, 0, Target::of(&mut page)).await.map_err(fail())?;
    if page.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let head = Head::from_page(&page).ok_or(Error::Corrupt { what: "the head of a checkpoint", at: 0 })?;
    // Written again: a flush of it that failed is not made good by another one.
    write_head(io, &file, &head).await?;
    let needed = head.file_len();
    let one = Checkpoint::new(number, head, len);
    if len < needed {
        let reason = Error::Corrupt { what: "the end of a checkpoint's runs", at: len }.to_string();
        log::warn!("changes up to checkpoint '{}' are lost: {reason}", one.name);
        let _ = one.lost.set(reason);
    }
    Ok(Some(one))
}

/// Removes the file of a checkpoint, if there is one.
pub(super) fn remove_file<S: Storage>(io: &S, dir: &S::Dir, number: u32) -> Result<(), Error> {
    match io.remove(dir, &file_of(number)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { what: "removing a checkpoint", source: error })
        }
        _ => Ok(()),
    }
}

/// Decides on checkpoints that a stop left prepared, once all disks are open and before they are served.
///
/// Part of [`crate::group::settle`].
///
/// # Errors
/// Those of the files.
pub(crate) async fn settle<S: Storage>(
    _admin: &mut Admin,
    io: &S,
    disks: &[Arc<Disk<S>>],
) -> Result<(), Error> {
    let all: Vec<_> = disks
        .iter()
        .flat_map(|disk| disk.checkpoints.all().into_iter().map(move |one| (disk, one)))
        .collect();
    let active: Vec<[u8; 16]> = all
        .iter()
        .map(|(_, one)| one.head())
        .filter(|head| head.state == State::Active)
        .map(|head| head.group)
        .collect();
    for (disk, one) in all {
        let head = one.head();
        if head.state == State::Active {
            continue;
        }
        if active.contains(&head.group) {
            one.set_state(io, &disk.dir, State::Active).await?;
        } else {
            remove_file(io, &disk.dir, one.number)?;
            disk.checkpoints.lock().retain(|other| other.number != one.number);
        }
    }
    for disk in disks {
        // Of two that have a name the later one was answered: what was left of the other could not be undone.
        let mut all = disk.checkpoints();
        all.sort_by_key(|one| std::cmp::Reverse(one.number));
        for (at, one) in all.iter().enumerate() {
            if all[..at].iter().any(|later| later.name == one.name) {
                log::warn!("{}: there are two checkpoints '{}'; the earlier one goes", disk.name, one.name);
                remove_file(io, &disk.dir, one.number)?;
                disk.checkpoints.lock().retain(|other| other.number != one.number);
            }
        }
    }
    Ok(())
}

impl<S: Storage> Disk<S> {
    /// The checkpoints, oldest instant first; those of earlier generations too.
    pub fn checkpoints(&self) -> Vec<Arc<Checkpoint>> {
        let mut all = self.checkpoints.all();
        all.retain(|one| one.head().state == State::Active);
        all
    }

    /// The checkpoint of this name.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`].
    pub fn checkpoint(&self, name: &str) -> Result<Arc<Checkpoint>, Error> {
        let found = self.checkpoints().into_iter().find(|one| one.name == name);
        found.ok_or_else(|| Error::NoSuchCheckpoint { disk: self.name.clone(), name: name.to_owned() })
    }

    /// Deletes a checkpoint, durably. Change ids of its instant stay good as the older end.
    ///
    /// # Errors
    /// [`Error::NoSuchCheckpoint`]; those of the files, and then it is still there, or may be after a power cut.
    pub fn delete_checkpoint(&self, _admin: &mut Admin, io: &S, name: &str) -> Result<(), Error> {
        let one = self.checkpoint(name)?;
        // Told first: whoever asks it at this moment must not take that for damage.
        one.deleted.store(true, SeqCst);
        if let Err(error) = remove_file(io, &self.dir, one.number) {
            one.deleted.store(false, SeqCst);
            return Err(error);
        }
        self.checkpoints.lock().retain(|other| !Arc::ptr_eq(other, &one));
        io.sync_dir(&self.dir).map_err(Error::io("flushing the state directory"))
    }
}
