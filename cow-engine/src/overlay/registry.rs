//! Which overlays a disk has: opening, finding and closing them, and taking them up after a stop.
//!
//! Invariant: an overlay's snapshot is held for as long as the overlay is there.
//!
//! | left as | and | at the next start |
//! |---|---|---|
//! | not to be kept | | removed |
//! | to be kept | its snapshot was kept; the same boot of the host, or closed in order | taken up |
//! | to be kept | its snapshot was dropped | removed, with the reason |
//! | to be kept | another boot, and not closed in order | removed, with the reason |
//! | damaged | | removed, with the reason |

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Overlay;
use super::head::{self, Head, NOTE_BYTES};
use super::layer::{Layer, remove_files, remove_head};
use crate::disk::{Disk, with_sources};
use crate::error::Error;
use crate::group::check_name;
use crate::snapshot::Snapshot;
use crate::storage::Storage;
use crate::view::View;

/// The overlays of a disk.
pub(crate) struct Overlays<S: Storage> {
    layers: Mutex<Vec<Arc<Layer<S>>>>,
    /// A rewind is being begun: nobody begins to release.
    rewinding: AtomicBool,
    /// The host's boot, which heads are written with.
    boot: [u8; 16],
}

/// What a disk's state directory says of it while it is opened.
pub(crate) struct Left<'a, S: Storage> {
    pub(crate) dir: &'a S::Dir,
    pub(crate) disk: &'a [u8; 16],
    pub(crate) names: &'a [String],
    /// The snapshots that were kept.
    pub(crate) chain: &'a [Arc<Snapshot<S>>],
    /// Why snapshots were dropped, if they were.
    pub(crate) reset: Option<String>,
    pub(crate) boot: [u8; 16],
}

/// Names of overlays, with the reason why they could not be kept.
type Dropped = Vec<(String, String)>;

impl<S: Storage> Overlays<S> {
    /// Decides what becomes of the overlays that were left, and removes those that cannot be kept.
    ///
    /// An error that may pass is the caller's, and nothing was changed.
    pub(crate) async fn load(io: &S, left: &Left<'_, S>) -> Result<(Self, Dropped), Error> {
        let mut found = Vec::new();
        for number in numbers(left.names) {
            match judge(io, left, number).await {
                Err(error) if !error.is_damage() => return Err(error),
                judged => found.push((number, judged)),
            }
        }
        let (mut layers, mut dropped) = (Vec::new(), Vec::new());
        for (number, judged) in found {
            match judged {
                Ok(Judged::Kept(layer)) => {
                    layers.push(Arc::new(*layer));
                    continue;
                }
                Ok(Judged::Unneeded) => {}
                Ok(Judged::Lost(name, reason)) => dropped.push((name, reason)),
                Err(error) => dropped.push((format!("number {number}"), with_sources(&error))),
            }
            remove_files(io, left.dir, number)?;
        }
        let rewinding = AtomicBool::new(false);
        Ok((Self { layers: Mutex::new(layers), rewinding, boot: left.boot }, dropped))
    }

    /// Heads say that the overlays are in use. The superblock said so of the disk before: were it the
    /// other way round, a stop of the host in between would cost overlays that nobody has changed.
    pub(crate) async fn begin(&self, io: &S) -> Result<(), Error> {
        let layers = self.all();
        for layer in layers {
            layer.write_head(io, false).await?;
            layer.sync_head(io).await?;
        }
        Ok(())
    }

    /// Ends the overlays with their disk: those to be kept are made durable, the others removed. What
    /// fails costs the overlay at the next start, not the disk.
    pub(crate) async fn close(&self, io: &S, dir: &S::Dir) {
        let layers = self.all();
        for layer in layers {
            let ended = if layer.head.keep {
                layer.finish(io).await
            } else {
                layer.set_discarded(true);
                remove_files(io, dir, layer.head.number)
            };
            if let Err(error) = ended {
                log::warn!("overlay '{}' was not closed in order: {}", layer.head.name, with_sources(&error));
            }
        }
    }

    /// Refuses to let go of a snapshot that has overlays.
    pub(crate) fn check_unused(&self, snapshot: &Snapshot<S>) -> Result<(), Error> {
        let names: Vec<_> = self.of(snapshot).iter().map(|layer| layer.head.name.clone()).collect();
        if names.is_empty() {
            return Ok(());
        }
        Err(Error::SnapshotInUse { name: snapshot.name().to_owned(), overlays: names.join(", ") })
    }

    /// Lets readers release parts of a snapshot, on which no overlay is opened from then on; `false` while the
    /// disk is rewound.
    ///
    /// # Errors
    /// [`Error::SnapshotInUse`] while it has overlays.
    pub(crate) fn begin_release(
        &self,
        snapshot: &Snapshot<S>,
        is_rewinding: impl FnOnce() -> bool,
    ) -> Result<bool, Error> {
        let layers = self.lock();
        if self.rewinding.load(SeqCst) || is_rewinding() {
            return Ok(false);
        }
        if layers.iter().any(|layer| layer.head.snapshot == snapshot.sequence) {
            drop(layers);
            return self.check_unused(snapshot).map(|()| false);
        }
        // Told while nobody can add one.
        snapshot.released.begin();
        Ok(true)
    }

    /// Lets nobody begin to release for as long as the answer is held.
    ///
    /// # Errors
    /// [`Error::SnapshotReleased`] if a reader has begun to release parts of `snapshot`.
    pub(crate) fn hold_whole(&self, snapshot: &Snapshot<S>) -> Result<Whole<'_, S>, Error> {
        let _layers = self.lock();
        check_whole(snapshot)?;
        self.rewinding.store(true, SeqCst);
        Ok(Whole { overlays: self })
    }

    /// Adds an overlay, unless its snapshot has released something meanwhile.
    fn add(&self, snapshot: &Snapshot<S>, layer: &Arc<Layer<S>>) -> Result<(), Error> {
        let mut layers = self.lock();
        check_whole(snapshot)?;
        layers.push(layer.clone());
        Ok(())
    }

    fn of(&self, snapshot: &Snapshot<S>) -> Vec<Arc<Layer<S>>> {
        let mut layers = self.all();
        layers.retain(|layer| layer.head.snapshot == snapshot.sequence);
        layers
    }

    fn all(&self) -> Vec<Arc<Layer<S>>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Layer<S>>>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Storage> Disk<S> {
    /// Opens a snapshot for writing: a new overlay on its view. One at a time with other administrative
    /// verbs of the disk.
    ///
    /// With `keep` it outlives the daemon, else it goes when the disk is closed or opened anew. `note` is
    /// given back by [`Overlay::note`] until it is closed.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], [`Error::SnapshotBroken`], [`Error::BadName`], [`Error::OverlayExists`];
    /// [`Error::SnapshotReleased`] if a reader has released part of the snapshot;
    /// those of the files. After an error there is no overlay.
    ///
    /// # Panics
    /// If `note` is longer than 1024 bytes.
    ///
    /// Analogue: blksnap's images are writable by themselves, once for each snapshot.
    pub async fn open_overlay(
        self: &Arc<Self>,
        io: &S,
        snapshot: &str,
        name: &str,
        keep: bool,
        note: &str,
    ) -> Result<Overlay<S>, Error> {
        assert!(note.len() <= NOTE_BYTES, "a note fits its field");
        check_name(name)?;
        let snapshot = self.snapshot(snapshot)?;
        if let Some(reason) = snapshot.broken() {
            return Err(Error::SnapshotBroken { name: snapshot.name.clone(), reason: reason.to_owned() });
        }
        check_whole(&snapshot)?;
        if self.overlays.of(&snapshot).iter().any(|layer| layer.head.name == name) {
            return Err(Error::OverlayExists { snapshot: snapshot.name.clone(), name: name.to_owned() });
        }
        let number = self.overlays.lock().iter().map(|layer| layer.head.number).max().unwrap_or(0) + 1;
        let head = Head {
            number,
            clean: false,
            snapshot: snapshot.sequence,
            disk: self.id,
            group: snapshot.group,
            boot: self.overlays.boot,
            capacity: snapshot.capacity,
            keep,
            name: name.to_owned(),
            note: note.to_owned(),
        };
        let layer = Arc::new(Layer::create(io, &self.dir, head).await?);
        if let Err(error) = self.overlays.add(&snapshot, &layer) {
            remove_files(io, &self.dir, layer.head.number)?;
            return Err(error);
        }
        Ok(Overlay::new(View::new(self.clone(), snapshot), layer))
    }

    /// Discards an overlay. Whoever still uses it gets [`Error::OverlayClosed`]. One at a time with other
    /// administrative verbs of the disk.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], [`Error::NoSuchOverlay`]; those of the files, and then it is still there.
    pub fn close_overlay(self: &Arc<Self>, io: &S, snapshot: &str, name: &str) -> Result<(), Error> {
        let overlay = self.overlay(snapshot, name)?;
        let layer = overlay.layer();
        // Told first: nothing is answered from an overlay that the next start may not know.
        layer.set_discarded(true);
        if let Err(error) = remove_head(io, &self.dir, layer.head.number) {
            layer.set_discarded(false);
            return Err(error);
        }
        self.overlays.lock().retain(|other| !Arc::ptr_eq(other, layer));
        if let Err(error) = remove_files(io, &self.dir, layer.head.number) {
            log::warn!(
                "{}: what is left of overlay '{name}' goes later: {}",
                self.name,
                with_sources(&error)
            );
        }
        Ok(())
    }

    /// Whether [`Disk::delete_snapshot`] would let go of a snapshot.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`]; [`Error::SnapshotInUse`] while it has overlays.
    pub fn check_deletable(&self, snapshot: &str) -> Result<(), Error> {
        self.overlays.check_unused(&*self.snapshot(snapshot)?)
    }

    /// The overlay `name` of a snapshot.
    ///
    /// # Errors
    /// [`Error::NoSuchSnapshot`], [`Error::NoSuchOverlay`].
    pub fn overlay(self: &Arc<Self>, snapshot: &str, name: &str) -> Result<Overlay<S>, Error> {
        let snapshot = self.snapshot(snapshot)?;
        let layers = self.overlays.of(&snapshot);
        let layer = layers
            .into_iter()
            .find(|layer| layer.head.name == name)
            .ok_or_else(|| Error::NoSuchOverlay { snapshot: snapshot.name.clone(), name: name.to_owned() })?;
        Ok(Overlay::new(View::new(self.clone(), snapshot), layer))
    }

    /// All overlays of the disk's snapshots, those of the oldest snapshot first.
    pub fn overlays(self: &Arc<Self>) -> Vec<Overlay<S>> {
        let of = |snapshot: Arc<Snapshot<S>>| {
            let layers = self.overlays.of(&snapshot);
            layers.into_iter().map(move |layer| (snapshot.clone(), layer))
        };
        let all = self.snapshots().into_iter().flat_map(of);
        all.map(|(snapshot, layer)| Overlay::new(View::new(self.clone(), snapshot), layer)).collect()
    }
}

/// Nobody begins to release; ends when dropped.
pub(crate) struct Whole<'a, S: Storage> {
    overlays: &'a Overlays<S>,
}

impl<S: Storage> Drop for Whole<'_, S> {
    fn drop(&mut self) {
        let _layers = self.overlays.lock();
        self.overlays.rewinding.store(false, SeqCst);
    }
}

/// Refuses a snapshot that can only be read in part.
fn check_whole<S: Storage>(snapshot: &Snapshot<S>) -> Result<(), Error> {
    match snapshot.has_released() {
        true => Err(Error::SnapshotReleased { name: snapshot.name.clone() }),
        false => Ok(()),
    }
}

/// What becomes of an overlay that was left.
enum Judged<S: Storage> {
    Kept(Box<Layer<S>>),
    /// Never made whole, or not to be kept.
    Unneeded,
    /// Its name, and why.
    Lost(String, String),
}

async fn judge<S: Storage>(io: &S, left: &Left<'_, S>, number: u32) -> Result<Judged<S>, Error> {
    let Some((head, file)) = Layer::<S>::load_head(io, left.dir, number).await? else {
        return Ok(Judged::Unneeded);
    };
    if !head.keep {
        return Ok(Judged::Unneeded);
    }
    let lost = |reason: &str| Ok(Judged::Lost(head.name.clone(), reason.to_owned()));
    let same = |snapshot: &&Arc<Snapshot<S>>| {
        snapshot.sequence == head.snapshot && snapshot.group == head.group && snapshot.is_active()
    };
    if head.disk != *left.disk {
        return lost("it belongs to another disk");
    }
    let Some(snapshot) = left.chain.iter().find(same) else {
        return lost(left.reset.as_deref().unwrap_or("its snapshot is gone"));
    };
    if snapshot.has_released() {
        // It was being opened when a reader began to release: nobody was told of it.
        return lost("a reader has released part of its snapshot");
    }
    if head.boot != left.boot && !head.clean {
        return lost("the host stopped before it was on its medium");
    }
    if head.capacity != snapshot.capacity {
        return Err(Error::Corrupt { what: "the size in the head of an overlay", at: 72 });
    }
    let name = head.name.clone();
    let head = Head { boot: left.boot, clean: false, ..head };
    match Layer::load(io, left.dir, head, file) {
        Err(error) if error.is_damage() => Ok(Judged::Lost(name, with_sources(&error))),
        layer => Ok(Judged::Kept(Box::new(layer?))),
    }
}

/// The numbers of overlays that have files, ascending.
pub(crate) fn numbers(names: &[String]) -> Vec<u32> {
    let mut all: Vec<u32> = names.iter().filter_map(|name| head::number_of(name)).collect();
    all.sort_unstable();
    all.dedup();
    all
}
