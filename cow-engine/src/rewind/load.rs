//! Taking up a rewind that was under way when the disk was left.
//!
//! Invariant: while a rewind may be in force, the image alone is neither the disk before it nor after. So what
//! cannot be told, or read, refuses the opening; nothing is guessed.
//!
//! | superblock | the rewind's file | then |
//! |---|---|---|
//! | names it | its head, under way or prepared; whole | it goes on |
//! | names it | its head, finished | the image is the disk |
//! | names it, and the control page is lost, which may have said that it is none | its head, not finished | refused |
//! | names it | missing, damaged, or of another | refused |
//! | names none | any | the image is the disk |
//! | a copy or all damaged | under way, and not named by the good copy | refused |
//!
//! Which grains are back is believed of the synced copy, and of the mapping too within one boot of the host.

use super::done::{self, Done};
use super::head::{self, Head, State};
use super::{Loaded, NO_REWIND, Rewind};
use crate::error::Error;
use crate::format::Superblock;
use crate::gate::Gate;
use crate::storage::Storage;
use crate::store::Store;
use crate::tracker::Identity;

/// What else was left that tells whether a rewind is in force.
pub(crate) struct Found<'a> {
    /// The good copy.
    pub(crate) superblock: Option<&'a Superblock>,
    pub(crate) one_damaged: bool,
    /// Whether the control page says that the rewind which the superblock names failed; `None` if what it said is lost.
    pub(crate) void: Option<bool>,
    pub(crate) boot: [u8; 16],
    /// Of the image, now.
    pub(crate) identity: Identity,
}

/// Reads the rewind that is in force, if one is. Before the superblock is written anew.
///
/// # Errors
/// [`Error::RewindLost`] if the disk cannot be told; those of the files.
pub(crate) async fn load<S: Storage>(
    io: &S,
    dir: &S::Dir,
    gate: &Gate,
    names: &[String],
    found: &Found<'_>,
    store: &Store<S>,
) -> Result<Loaded<S>, Error> {
    let head = match names.iter().any(|name| name == head::HEAD_FILE) {
        true => read_head(io, dir).await?,
        false => Ok(None),
    };
    if !in_force(found, head.as_ref().map(|head| head.as_ref().map(|(head, _)| head)))? {
        return Ok(None);
    }
    let Ok(Some((head, file))) = head else { return Ok(None) };
    let name = head.name.clone();
    if !found.is_same_file() {
        log::warn!("a rewind to snapshot '{name}' goes on: the image is taken to be the one that was left");
    }
    match take_up(io, dir, gate, names, found, (head, file), store).await {
        Err(error) if error.is_damage() => Err(lost(&name, &error.to_string())),
        rewind => rewind.map(Some),
    }
}

/// Whether the rewind is in force that `head` is of; the error tells how its file is damaged.
///
/// # Errors
/// [`Error::RewindLost`] if the disk cannot be told.
pub(crate) fn in_force(found: &Found<'_>, head: Result<Option<&Head>, &Error>) -> Result<bool, Error> {
    let named = found.superblock.map_or(NO_REWIND, |superblock| superblock.rewind);
    let Some(superblock) = found.superblock.filter(|_| named != NO_REWIND && found.void != Some(true)) else {
        let is_sure = found.superblock.is_some() && !found.one_damaged;
        return match head {
            Ok(Some(head)) if !is_sure && head.state == State::UnderWay => {
                Err(lost(&head.name, "the superblock is damaged, which said whether it was complete"))
            }
            Err(error) if !is_sure => Err(lost("", &error.to_string())),
            _ => Ok(false),
        };
    };
    let head = match head {
        Ok(Some(head)) => head,
        Ok(None) => return Err(lost("", "its file is missing")),
        Err(error) => return Err(lost("", &error.to_string())),
    };
    if head.id != named || head.disk != superblock.disk {
        return Err(lost(&head.name, "its file is of another rewind"));
    }
    if head.state == State::Finished {
        return Ok(false);
    }
    if found.void.is_none() {
        return Err(lost(
            &head.name,
            "what the change map said of it is lost: it may have failed, and be none",
        ));
    }
    check_image(superblock, found, head)?;
    Ok(true)
}

impl Found<'_> {
    /// Whether the image is the file that the superblock tells of, as far as its numbers say.
    fn is_same_file(&self) -> bool {
        self.superblock.is_some_and(|superblock| {
            let (then, now) = (&superblock.identity, &self.identity);
            then.inode == now.inode && (then.device == now.device || superblock.boot != self.boot)
        })
    }
}

type Opened<S> = (Head, <S as Storage>::File);

/// The head, or how it is damaged; other errors are the caller's.
async fn read_head<S: Storage>(io: &S, dir: &S::Dir) -> Result<Result<Option<Opened<S>>, Error>, Error> {
    let file = io.open(dir, head::HEAD_FILE).map_err(Error::io("opening a rewind"))?;
    match Head::read(io, &file).await {
        Err(error) if error.is_damage() => Ok(Err(error)),
        head => Ok(Ok(head?.map(|head| (head, file)))),
    }
}

/// Refuses an image that is not the one that was left.
fn check_image(superblock: &Superblock, found: &Found<'_>, head: &Head) -> Result<(), Error> {
    let (then, now) = (&superblock.identity, &found.identity);
    let (same_boot, same_file) = (superblock.boot == found.boot, found.is_same_file());
    let touched = superblock.state.is_closed() && then.mtime_ns != now.mtime_ns;
    // Over a boot the number of a block device is another; a file keeps its own.
    let changed = if same_boot { !same_file || touched } else { same_file && touched };
    // A resize may have begun that a stop or a failure has cut off.
    let same_len = now.len == head.capacity || superblock.growing_to == Some(now.len);
    if changed || !same_len || head.capacity != superblock.capacity {
        return Err(lost(&head.name, "the image was changed or replaced while no daemon served it"));
    }
    Ok(())
}

async fn take_up<S: Storage>(
    io: &S,
    dir: &S::Dir,
    gate: &Gate,
    names: &[String],
    found: &Found<'_>,
    (head, file): Opened<S>,
    store: &Store<S>,
) -> Result<std::sync::Arc<Rewind<S>>, Error> {
    let plan = head::read_runs(io, &file, &head, store).await?;
    let fail = || Error::io("opening the files of a rewind");
    let (count, bytes) = (done::cells_needed(plan.grains()), done::bytes_needed(plan.grains()));
    let synced = io.open(dir, head::SYNCED_FILE).map_err(fail())?;
    if io.len(&synced).map_err(fail())? != bytes {
        return Err(Error::Corrupt { what: "the end of what a rewind has brought back", at: bytes });
    }
    let same_boot = found.superblock.is_some_and(|superblock| superblock.boot == found.boot);
    let cells_file = if same_boot {
        io.open(dir, head::DONE_FILE).map_err(fail())?
    } else {
        if names.iter().any(|name| name == head::DONE_FILE) {
            io.remove(dir, head::DONE_FILE).map_err(fail())?;
        }
        io.create(dir, head::DONE_FILE).map_err(fail())?
    };
    if same_boot && io.len(&cells_file).map_err(fail())? != bytes {
        return Err(Error::Corrupt { what: "the end of what a rewind has brought back", at: bytes });
    }
    // Also if it is there: someone may have copied it with holes.
    io.allocate(&cells_file, bytes).map_err(fail())?;
    let cells = io.map(&cells_file, count).map_err(fail())?;
    let head = Head { state: State::UnderWay, ..head };
    head.write(io, &file).await?;
    let done = Done::load(io, cells, synced, plan.grains(), !same_boot).await?;
    let rewind = Rewind::of_parts(head, file, plan, done, gate.lane());
    Ok(std::sync::Arc::new(rewind))
}

fn lost(snapshot: &str, reason: &str) -> Error {
    Error::RewindLost { snapshot: snapshot.to_owned(), reason: reason.to_owned() }
}

/// Removes the files of a rewind that is not in force, the head first.
pub(crate) fn remove_files<S: Storage>(io: &S, dir: &S::Dir) -> Result<(), Error> {
    for file in [head::HEAD_FILE, head::DONE_FILE, head::SYNCED_FILE] {
        match io.remove(dir, file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            result => result.map_err(Error::io("removing a rewind's files"))?,
        }
    }
    Ok(())
}
