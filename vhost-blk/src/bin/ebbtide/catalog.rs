//! Which NBD exports there are: one for every snapshot and every overlay, and those that were added by name.
//!
//! `DISK@SNAPSHOT` exists for as long as its snapshot does, with a bitmap for every older snapshot and
//! checkpoint of the same history, and `DISK@SNAPSHOT/OVERLAY` for as long as the overlay, without bitmaps and to be written
//! (names have no `/`, so none is taken for another). An added export has exactly one bitmap or none, for clients that refuse more
//! (ovirt-imageio). Absent: sockets; [`crate::nbd`] serves what is here.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use control::commands::{ExportInfo, NbdExportAdd};
use control::service::reason;
use control::{CommandError, service::Answer};
use cow_engine::host::HostStorage;
use cow_engine::{Disk, Overlay, Snapshot, View};
use nbd_export::{Base, Exports, Listing, OverlayExport, Refusal, ViewExport};

use crate::offered::Offered;

type HostDisk = Disk<HostStorage>;
type HostSnapshot = Snapshot<HostStorage>;
type HostOverlay = Overlay<HostStorage>;

/// An export that was added.
#[derive(Clone, Debug)]
struct Added {
    disk: String,
    snapshot: String,
    bitmap: Option<Base>,
    release_on_trim: bool,
    description: Option<String>,
}

/// What an export shows.
struct Shown {
    disk: Arc<HostDisk>,
    snapshot: Arc<HostSnapshot>,
    overlay: Option<HostOverlay>,
    bases: Vec<Base>,
    release_on_trim: bool,
    description: String,
}

/// See the module.
pub(crate) struct Catalog {
    disks: Vec<Arc<HostDisk>>,
    added: Mutex<BTreeMap<String, Added>>,
    clients: Mutex<HashMap<String, u32>>,
    socket: Option<PathBuf>,
    tcp: Option<std::net::SocketAddr>,
}

impl Catalog {
    /// The exports of `disks`, reached by `socket` or `tcp`.
    pub(crate) fn new(
        disks: Vec<Arc<HostDisk>>,
        socket: Option<PathBuf>,
        tcp: Option<std::net::SocketAddr>,
    ) -> Self {
        // A client may be in another directory than this process.
        let socket = socket.map(|path| std::path::absolute(&path).unwrap_or(path));
        Self { disks, added: Mutex::default(), clients: Mutex::default(), socket, tcp }
    }

    /// Where clients connect, for people.
    pub(crate) fn address(&self) -> Option<String> {
        let socket = self.socket.as_ref().map(|path| path.display().to_string());
        socket.or_else(|| self.tcp.map(|address| address.to_string()))
    }

    fn disk(&self, name: &str) -> Option<&Arc<HostDisk>> {
        self.disks.iter().find(|disk| disk.name() == name)
    }

    /// Adds an export.
    pub(crate) fn add(&self, wanted: NbdExportAdd) -> Answer<ExportInfo> {
        if self.address().is_none() {
            return Err(CommandError::generic(
                reason::NBD_OFF,
                "The daemon has no NBD server: start it with --nbd",
            ));
        }
        let not_found =
            |error: cow_engine::Error| CommandError::not_found(reason::SNAPSHOT_NOT_FOUND, error.to_string());
        let disk = self.disk(&wanted.disk).ok_or_else(|| no_disk(&wanted.disk))?;
        let snapshot = disk.snapshot(&wanted.snapshot).map_err(not_found)?;
        let bitmap = match &wanted.bitmap {
            Some(name) => {
                disk.instant(name).map_err(crate::service::explain)?;
                let base = bases(disk, &snapshot).into_iter().find(|base| base.name == *name);
                Some(base.ok_or_else(|| {
                    let text = format!("Changes since '{name}' up to '{}' cannot be told", snapshot.name());
                    CommandError::generic(reason::SINCE_NOT_OLDER, text)
                })?)
            }
            None => None,
        };
        let export = Added {
            disk: wanted.disk.clone(),
            snapshot: wanted.snapshot.clone(),
            bitmap,
            release_on_trim: wanted.release_on_trim,
            description: wanted.description.clone(),
        };
        {
            let mut added = self.added();
            if wanted.name.is_empty()
                || added.contains_key(&wanted.name)
                || self.automatic(&wanted.name).is_some()
                || self.overlay(&wanted.name).is_some()
            {
                let text = format!("There is an export '{}' already", wanted.name);
                return Err(CommandError::generic(reason::EXPORT_EXISTS, text));
            }
            added.insert(wanted.name.clone(), export);
        }
        self.infos().into_iter().find(|info| info.name == wanted.name).ok_or_else(|| no_export(&wanted.name))
    }

    /// Deletes an added export. Clients that use it go on until they leave.
    pub(crate) fn delete(&self, name: &str) -> Answer<()> {
        if self.added().remove(name).is_some() {
            return Ok(());
        }
        if self.automatic(name).is_some() {
            let text = format!("The export '{name}' belongs to its snapshot: delete that");
            return Err(CommandError::generic(reason::BAD_ARGUMENT, text));
        }
        if self.overlay(name).is_some() {
            let text = format!("The export '{name}' belongs to its overlay: close that");
            return Err(CommandError::generic(reason::BAD_ARGUMENT, text));
        }
        Err(no_export(name))
    }

    /// Whether an export of this name was added.
    pub(crate) fn is_added(&self, name: &str) -> bool {
        self.added().contains_key(name)
    }

    /// Clients of an export.
    pub(crate) fn clients_of(&self, name: &str) -> u32 {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }

    /// Forgets the added exports of a snapshot that was deleted.
    pub(crate) fn forget(&self, disk: &str, snapshot: &str) {
        self.added().retain(|_, added| added.disk != disk || added.snapshot != snapshot);
    }

    /// All exports.
    pub(crate) fn infos(&self) -> Vec<ExportInfo> {
        let names = self.list().into_iter().map(|listing| listing.name);
        names.filter_map(|name| self.info(&name)).collect()
    }

    /// Names of the exports that show a snapshot.
    pub(crate) fn names_of(&self, disk: &str, snapshot: &str) -> Vec<String> {
        if self.address().is_none() {
            return Vec::new();
        }
        let added = self.added();
        let others = added.iter().filter(|(_, one)| one.disk == disk && one.snapshot == snapshot);
        std::iter::once(automatic_name(disk, snapshot)).chain(others.map(|(name, _)| name.clone())).collect()
    }

    fn info(&self, name: &str) -> Option<ExportInfo> {
        let shown = self.show(name)?;
        Some(ExportInfo {
            name: name.to_owned(),
            disk: shown.disk.name().to_owned(),
            snapshot: Some(shown.snapshot.name().to_owned()),
            bitmaps: shown.bases.into_iter().map(|base| base.name).collect(),
            description: Some(shown.description),
            size: shown.snapshot.capacity(),
            read_only: shown.overlay.is_none(),
            release_on_trim: shown.release_on_trim,
            overlay: shown.overlay.map(|overlay| overlay.name().to_owned()),
            clients: self.clients_of(name),
            uri: self.uri(name),
        })
    }

    /// Where clients reach an export.
    pub(crate) fn uri(&self, export: &str) -> String {
        match (&self.socket, self.tcp) {
            (Some(path), _) => {
                format!("nbd+unix:///{}?socket={}", escape(export), escape(&path.display().to_string()))
            }
            (None, Some(address)) => format!("nbd://{address}/{}", escape(export)),
            (None, None) => String::new(),
        }
    }

    fn show(&self, name: &str) -> Option<Shown> {
        let added = self.added().get(name).cloned();
        if let Some(added) = added {
            let disk = self.disk(&added.disk)?.clone();
            let snapshot = disk.snapshot(&added.snapshot).ok()?;
            let description = added.description.unwrap_or_else(|| describe(&disk, &snapshot));
            let bases = added.bitmap.into_iter().collect();
            let release_on_trim = added.release_on_trim;
            return Some(Shown { disk, snapshot, overlay: None, bases, release_on_trim, description });
        }
        if let Some(overlay) = self.overlay(name) {
            let (disk, snapshot) = (overlay.view().disk().clone(), overlay.view().snapshot().clone());
            let description = describe_overlay(&overlay);
            let (overlay, bases) = (Some(overlay), Vec::new());
            return Some(Shown { disk, snapshot, overlay, bases, release_on_trim: false, description });
        }
        let (disk, snapshot) = self.automatic(name)?;
        let (bases, description) = (bases(&disk, &snapshot), describe(&disk, &snapshot));
        Some(Shown { disk, snapshot, overlay: None, bases, release_on_trim: false, description })
    }

    fn automatic(&self, name: &str) -> Option<(Arc<HostDisk>, Arc<HostSnapshot>)> {
        let (disk, snapshot) = name.split_once('@')?;
        let disk = self.disk(disk)?;
        Some((disk.clone(), disk.snapshot(snapshot).ok()?))
    }

    fn overlay(&self, name: &str) -> Option<HostOverlay> {
        let (disk, rest) = name.split_once('@')?;
        let (snapshot, overlay) = rest.split_once('/')?;
        self.disk(disk)?.overlay(snapshot, overlay).ok()
    }

    fn added(&self) -> MutexGuard<'_, BTreeMap<String, Added>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a client of `export` until the answer is dropped.
    pub(crate) fn client(self: &Arc<Self>, export: &str) -> Client {
        *self.clients.lock().unwrap_or_else(PoisonError::into_inner).entry(export.to_owned()).or_default() +=
            1;
        Client { catalog: self.clone(), export: export.to_owned() }
    }
}

/// A client that is counted.
pub(crate) struct Client {
    catalog: Arc<Catalog>,
    export: String,
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut clients = self.catalog.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = clients.get_mut(&self.export) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.export);
            }
        }
    }
}

/// The catalog for one connection, whose exports use the connection's executor.
pub(crate) struct Offer {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) io: HostStorage,
}

impl Exports for Offer {
    type Export = Offered;

    async fn find(&self, name: &str) -> Result<Self::Export, Refusal> {
        let shown = self.catalog.show(name).ok_or(Refusal::Unknown)?;
        let io = self.io.clone();
        if let Some(overlay) = shown.overlay {
            return Ok(Offered::Overlay(OverlayExport::new(io, overlay, name, &shown.description)));
        }
        let view = View::new(shown.disk, shown.snapshot);
        let export = ViewExport::new(io, view, name, &shown.description, shown.bases);
        Ok(Offered::View(if shown.release_on_trim { export.releasing() } else { export }))
    }

    fn list(&self) -> Vec<Listing> {
        self.catalog.list()
    }

    fn default_name(&self) -> Option<String> {
        self.catalog.lone_snapshot()
    }
}

impl Catalog {
    fn list(&self) -> Vec<Listing> {
        let automatic = self.disks.iter().flat_map(|disk| {
            disk.snapshots().into_iter().map(|snapshot| Listing {
                name: automatic_name(disk.name(), snapshot.name()),
                description: describe(disk, &snapshot),
            })
        });
        let overlays = self.disks.iter().flat_map(|disk| disk.overlays());
        let overlays = overlays.map(|overlay| Listing {
            name: overlay_export(&overlay),
            description: describe_overlay(&overlay),
        });
        let mut all: Vec<_> = automatic.chain(overlays).collect();
        let names: Vec<String> = self.added().keys().cloned().collect();
        all.extend(names.into_iter().filter_map(|name| {
            let description = self.show(&name)?.description;
            Some(Listing { name, description })
        }));
        all
    }

    /// The export of the only snapshot, which is also the one without a name.
    fn lone_snapshot(&self) -> Option<String> {
        let mut all = self.disks.iter().flat_map(|disk| {
            disk.snapshots().into_iter().map(|snapshot| automatic_name(disk.name(), snapshot.name()))
        });
        let first = all.next()?;
        all.next().is_none().then_some(first)
    }
}

/// The older snapshots and checkpoints that `snapshot` can be compared with.
fn bases(disk: &HostDisk, snapshot: &HostSnapshot) -> Vec<Base> {
    if disk.block_grid().is_none() {
        return Vec::new();
    }
    let until = snapshot.change_id();
    let snapshots = disk.snapshots().into_iter().map(|one| (one.name().to_owned(), one.change_id()));
    let checkpoints = disk.checkpoints().into_iter().map(|one| (one.name().to_owned(), one.change_id()));
    let mut bases: Vec<Base> = Vec::new();
    for (name, id) in snapshots.chain(checkpoints).filter(|(_, id)| *id != until) {
        // A checkpoint may have the name of its snapshot: that is one instant.
        if let Ok(epoch) = disk.resolve(id, until)
            && !bases.iter().any(|base| base.name == name)
        {
            bases.push(Base { name, epoch });
        }
    }
    bases
}

fn automatic_name(disk: &str, snapshot: &str) -> String {
    format!("{disk}@{snapshot}")
}

/// The name of an overlay's export.
pub(crate) fn overlay_export(overlay: &HostOverlay) -> String {
    let view = overlay.view();
    format!("{}@{}/{}", view.disk().name(), view.snapshot().name(), overlay.name())
}

fn describe_overlay(overlay: &HostOverlay) -> String {
    format!("{}, to be written", describe(overlay.view().disk(), overlay.view().snapshot()))
}

fn describe(disk: &HostDisk, snapshot: &HostSnapshot) -> String {
    let time = control::commands::Timestamp::from(crate::service::time_of(snapshot));
    match snapshot.broken() {
        Some(reason) => format!("snapshot {} of {} is broken: {reason}", snapshot.name(), disk.name()),
        None => format!("{} as it was at {time}", disk.name()),
    }
}

pub(crate) fn no_disk(name: &str) -> CommandError {
    CommandError::not_found(reason::DISK_NOT_FOUND, format!("There is no disk '{name}'"))
}

fn no_export(name: &str) -> CommandError {
    CommandError::not_found(reason::EXPORT_NOT_FOUND, format!("There is no export '{name}'"))
}

/// Percent-encodes what an NBD URI would take for something else (NBD uri.md).
fn escape(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/@+:".contains(&b);
    text.bytes().fold(String::new(), |mut out, b| {
        if plain(b) {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
        out
    })
}
