//! A disk's history leaves this host, or arrives: `tracker-export`, and `ebbtide tracker` on what no daemon
//! uses; and the summary of the change map for pictures.
//!
//! Invariant: whatever is done to a state directory without a daemon is done under its lock and that of its
//! image, so that neither is in use meanwhile.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use control::CommandError;
use control::commands::{ChangeMap, ChangedCell, MapInstant, QueryChangeMap, TrackerExport, TrackerExported};
use control::render::size;
use control::service::{Answer, reason};
use cow_engine::Disk;
use cow_engine::cbt::{ChangeId, Epoch};
use cow_engine::group::{self, Admin};
use cow_engine::handover::{self, Arrival, Left, Moved, Place};
use cow_engine::host::{Executor, HostDir, HostFile, HostStorage, ImageOptions};
use cow_engine::inspect::{HostFiles, Inspection};

use crate::serve::{Served, boot_id, lock, lock_state, state_directory};
use crate::service::{explain, on_ring};

/// Exports the history of a disk that is served.
pub(crate) fn export(served: &Served, admin: &mut Admin, wanted: TrackerExport) -> Answer<TrackerExported> {
    let TrackerExport { disk: name, file } = wanted;
    if served.device.is_connected() {
        let text = format!(
            "A front end is connected to the disk '{name}', and what it writes afterwards would be in no history: stop it first"
        );
        return Err(CommandError::generic(reason::DISK_IN_USE, text));
    }
    let (dir, file_name) = place_of(Path::new(&file)).map_err(|error| {
        CommandError::generic(reason::BAD_ARGUMENT, format!("Argument 'file': {error:#}"))
    })?;
    let disk = &served.disk;
    let moved = on_ring(async |io| {
        let to = Place { dir: &dir, name: &file_name };
        disk.hand_over(admin, &io, to, group::GATE_DEADLINE, || disk.image().identity()).await
    })?;
    log::warn!("{name}: its history was exported to {file}: it is handed over, and refuses every change");
    Ok(describe(&name, &file, moved))
}

fn describe(disk: &str, file: &str, moved: Moved) -> TrackerExported {
    TrackerExported {
        disk: disk.to_owned(),
        file: file.to_owned(),
        file_size: moved.file_bytes,
        change_id: moved.change_id.to_string(),
        size: moved.capacity,
        block_size: moved.grid.bytes(),
        changed_blocks: moved.changed_blocks,
        snapshots: moved.snapshots,
    }
}

/// What an export says to people.
pub(crate) fn exported(done: &TrackerExported) -> String {
    let mut text = format!(
        "{} is handed over: its history is in {} ({}), with change ids up to {}\n",
        done.disk,
        done.file,
        size(done.file_size),
        done.change_id
    );
    if !done.snapshots.is_empty() {
        text += &format!("Snapshots stay behind: {}\n", done.snapshots.join(", "));
    }
    text
}

/// Carries out `ebbtide tracker export`.
pub(crate) fn export_left(state: &Path, file: &Path) -> ExitCode {
    told(|| {
        let _held = hold(state)?;
        let path = Inspection::read(&HostFiles::new(state))?.image_path().map(PathBuf::from);
        let path = path.ok_or_else(|| anyhow!("{} has no superblock that can be read", state.display()))?;
        let image = open_image(&path)?;
        let identity = image.identity().with_context(|| format!("cannot ask about {}", path.display()))?;
        let (dir, name) = place_of(file)?;
        let state_dir = HostDir::new(state.to_owned());
        let left = Left { dir: &state_dir, image: &image, identity, boot: boot_id()? };
        let moved = run(async |io| handover::export(&io, &left, Place { dir: &dir, name: &name }).await)?;
        Ok(exported(&describe(&path.display().to_string(), &file.display().to_string(), moved)))
    })
}

/// Carries out `ebbtide tracker cancel-export`.
pub(crate) fn cancel(state: &Path) -> ExitCode {
    told(|| {
        let _held = hold(state)?;
        let dir = HostDir::new(state.to_owned());
        run(async |io| handover::cancel(&io, &dir).await)?;
        Ok("The export is taken back, its file must not be used: the disk goes on here\n".to_owned())
    })
}

/// Carries out `ebbtide tracker import`.
pub(crate) fn import(file: &Path, image: &Path, state: Option<PathBuf>, replace: bool) -> ExitCode {
    told(|| {
        let path = image.canonicalize().with_context(|| format!("cannot resolve {}", image.display()))?;
        let image = open_image(&path)?;
        let (dir, name) = place_of(file)?;
        // Before a state directory is made.
        let file = cow_engine::Storage::open(&Executor::new(RING)?.storage(), &dir, &name);
        let file = file.with_context(|| format!("cannot open {}", dir.path().join(&name).display()))?;
        let made = !directory_exists(state.as_deref(), &path);
        let state = state_directory(state.as_deref(), &path, &image)?;
        let held = lock_state(&state)?;
        let arrival = Arrival {
            file: &file,
            image: &image,
            image_path: path.display().to_string(),
            identity: image.identity().with_context(|| format!("cannot ask about {}", path.display()))?,
            dir: &HostDir::new(state.clone()),
            boot: boot_id()?,
            replace,
        };
        let moved = match run(async |io| handover::import(&io, &arrival).await) {
            Ok(moved) => moved,
            Err(error) => {
                if made {
                    // As if nothing had been asked. What is not empty stays.
                    let _ = std::fs::remove_file(state.join("lock"));
                    let _ = std::fs::remove_dir(&state);
                }
                return Err(error);
            }
        };
        drop(held);
        Ok(format!(
            "{} goes on with the history of {}, change ids up to {} included. Serve it with block-size={}\n",
            path.display(),
            moved.image_path,
            moved.change_id,
            moved.grid.bytes()
        ))
    })
}

/// Submissions of a command between two system calls.
const RING: u32 = 16;

fn run<T>(verb: impl AsyncFnOnce(HostStorage) -> Result<T, cow_engine::Error>) -> anyhow::Result<T> {
    let executor = Executor::new(RING)?;
    Ok(executor.block_on(verb(executor.storage()))?)
}

fn told(command: impl FnOnce() -> anyhow::Result<String>) -> ExitCode {
    match command() {
        Ok(text) => crate::output::end_with(&text),
        Err(error) => {
            eprintln!("ebbtide: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Locks a state directory that is there.
fn hold(state: &Path) -> anyhow::Result<std::fs::File> {
    // Else a lock would be made where there is none.
    if !state.join("superblock").is_file() {
        bail!("{} is no state directory", state.display());
    }
    lock_state(state)
}

fn directory_exists(said: Option<&Path>, image: &Path) -> bool {
    let mut beside = image.as_os_str().to_owned();
    beside.push(".ebb");
    said.map_or_else(|| Path::new(&beside).exists(), Path::exists)
}

/// Opens an image for reading, while nobody writes it.
fn open_image(path: &Path) -> anyhow::Result<HostFile> {
    let options = ImageOptions { read_only: true, direct: false, logical_block_bytes: 512 };
    let image = HostFile::open_image(path, options)?;
    lock(&image, true)?;
    Ok(image)
}

/// The directory and the name of a file.
fn place_of(file: &Path) -> anyhow::Result<(HostDir, String)> {
    let name = file.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| anyhow!("'{}' names no file", file.display()))?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = parent.canonicalize().with_context(|| format!("cannot resolve {}", parent.display()))?;
    Ok((HostDir::new(parent), name.to_owned()))
}

/// The summary of a disk's change map.
pub(crate) fn change_map(disk: &Disk<HostStorage>, wanted: QueryChangeMap) -> Answer<ChangeMap> {
    let epoch_of = |text: &str| disk.instant(text).and_then(|id| disk.resolve(id, disk.change_id()));
    let since = wanted.since.as_deref().map(epoch_of).transpose().map_err(explain)?;
    let picture = on_ring(async |io| disk.picture(&io, wanted.cells.get(), since).await)?;
    let generation = disk.change_id().generation;
    let id = |epoch: Epoch| ChangeId { generation, epoch }.to_string();
    let held = disk.snapshots();
    let ours = held.iter().map(|one| (one.name(), one.change_id()));
    let ours = ours.filter(|(_, id)| id.generation == generation);
    Ok(ChangeMap {
        disk: wanted.disk,
        size: picture.capacity,
        block_size: picture.grid.bytes(),
        change_id: id(picture.epoch.previous()),
        epoch: picture.epoch.get().into(),
        since: id(picture.since),
        cells: picture.cells,
        cell_size: picture.cell_blocks.saturating_mul(picture.grid.bytes()),
        snapshots: ours
            .map(|(name, id)| MapInstant { name: name.to_owned(), epoch: id.epoch.get().into() })
            .collect(),
        changed: picture
            .changed
            .iter()
            .map(|cell| ChangedCell {
                cell: cell.index,
                newest: cell.newest.get().into(),
                blocks: cell.blocks,
                blocks_since: cell.since,
                recent: cell.recent.to_vec(),
            })
            .collect(),
        exact: picture.exact,
    })
}
