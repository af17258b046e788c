//! Overlays that are open: carrying out their verbs, and serving those that have a socket.
//!
//! Invariant: an overlay that was opened with a socket is served on it until it is closed, also by later
//! daemons if it is kept. The caller lets verbs that change which overlays there are run one at a time.
//! Absent: NBD; [`crate::catalog`] finds overlays by themselves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use control::commands::{OverlayInfo, SnapshotClose, SnapshotOpen};
use control::service::{Answer, reason};
use control::{CommandError, Event, EventHub};
use cow_engine::Overlay;
use cow_engine::host::HostStorage;
use vhost_blk::{Connection, Device};

use crate::catalog::{Catalog, no_disk, overlay_export};
use crate::serve::{Served, bind, device_options};
use crate::service::{explain, on_ring};

type HostOverlay = Overlay<HostStorage>;

/// See the module.
pub(crate) struct Overlays {
    disks: Arc<Vec<Served>>,
    catalog: Arc<Catalog>,
    hub: EventHub,
    /// Those that are served, by the names of their exports.
    doors: Mutex<BTreeMap<String, Door>>,
}

/// An overlay on offer to front ends.
struct Door {
    device: Arc<Device<HostOverlay>>,
    socket: PathBuf,
}

impl Overlays {
    /// The overlays of `disks`, none of them served yet.
    pub(crate) fn new(disks: Arc<Vec<Served>>, catalog: Arc<Catalog>, hub: EventHub) -> Self {
        Self { disks, catalog, hub, doors: Mutex::default() }
    }

    /// Serves the overlays that an earlier daemon served. One whose socket cannot be had is there without.
    pub(crate) fn resume(&self) {
        for served in self.disks.iter() {
            for overlay in served.disk.overlays() {
                let name = overlay_export(&overlay);
                log::info!("{name}: kept, {} bytes of its own", overlay.bytes_used());
                if overlay.note().is_empty() {
                    continue;
                }
                let socket = PathBuf::from(overlay.note());
                let offered =
                    bind(&socket).and_then(|listener| self.offer(served, overlay, listener, socket));
                if let Err(error) = offered {
                    log::warn!("{name}: not served: {error:#}");
                }
            }
        }
    }

    /// Opens a snapshot for writing.
    pub(crate) fn open(&self, wanted: &SnapshotOpen) -> Answer<OverlayInfo> {
        let served = self.served(&wanted.disk)?;
        // All that the engine would refuse comes first: a socket is not made in vain, nor another's removed.
        served.disk.snapshot(&wanted.snapshot).map_err(explain)?;
        let export = format!("{}@{}/{}", wanted.disk, wanted.snapshot, wanted.name);
        if self.catalog.is_added(&export) {
            let text = format!("There is an export '{export}' already");
            return Err(CommandError::generic(reason::EXPORT_EXISTS, text));
        }
        if served.disk.overlay(&wanted.snapshot, &wanted.name).is_ok() {
            let text = format!("Snapshot '{}' has an overlay '{}' already", wanted.snapshot, wanted.name);
            return Err(CommandError::generic(reason::OVERLAY_EXISTS, text));
        }
        let refused = |error: anyhow::Error| {
            CommandError::generic(reason::BAD_ARGUMENT, format!("Parameter 'socket': {error:#}"))
        };
        let listener = wanted.socket.as_deref().map(|path| bind(Path::new(path))).transpose();
        let listener = listener.map_err(refused)?;
        let note = wanted.socket.as_deref().unwrap_or_default();
        let opened = on_ring(async |io| {
            served.disk.open_overlay(&io, &wanted.snapshot, &wanted.name, wanted.keep, note).await
        });
        if opened.is_err() {
            remove(wanted.socket.as_deref().map(Path::new));
        }
        let overlay = opened?;
        if let (Some(listener), Some(path)) = (listener, &wanted.socket) {
            let offered = self.offer(served, overlay.clone(), listener, PathBuf::from(path));
            if let Err(error) = offered {
                remove(Some(Path::new(path)));
                on_ring(async |io| served.disk.close_overlay(&io, &wanted.snapshot, &wanted.name))?;
                return Err(CommandError::generic(reason::IO, format!("Cannot serve '{export}': {error:#}")));
            }
        }
        log::info!("{export}: opened for writing");
        Ok(self.info(&overlay))
    }

    /// Discards an overlay.
    pub(crate) fn close(&self, wanted: &SnapshotClose) -> Answer<()> {
        let served = self.served(&wanted.disk)?;
        let overlay = served.disk.overlay(&wanted.snapshot, &wanted.name).map_err(explain)?;
        let export = overlay_export(&overlay);
        let device = self.doors().get(&export).map(|door| door.device.clone());
        if let Some(device) = device {
            if device.is_connected() && !wanted.force {
                let text =
                    format!("A front end is connected to '{export}': take it away first, or say 'force'");
                return Err(CommandError::generic(reason::OVERLAY_IN_USE, text));
            }
            device.stop();
        }
        on_ring(async |io| served.disk.close_overlay(&io, &wanted.snapshot, &wanted.name))?;
        if let Some(door) = self.doors().remove(&export) {
            remove(Some(&door.socket));
        }
        log::info!("{export}: closed");
        Ok(())
    }

    /// The overlays of a snapshot, in the order of opening.
    pub(crate) fn of(&self, disk: &str, snapshot: &str) -> Vec<OverlayInfo> {
        let Ok(served) = self.served(disk) else { return Vec::new() };
        let mut overlays = served.disk.overlays();
        overlays.retain(|overlay| overlay.view().snapshot().name() == snapshot);
        overlays.iter().map(|overlay| self.info(overlay)).collect()
    }

    /// Ends all sockets, when what was in flight is done. The overlays stay.
    pub(crate) fn stop(&self) {
        let doors = std::mem::take(&mut *self.doors());
        for door in doors.into_values() {
            door.device.stop();
            remove(Some(&door.socket));
        }
    }

    fn offer(
        &self,
        served: &Served,
        overlay: HostOverlay,
        listener: std::os::unix::net::UnixListener,
        socket: PathBuf,
    ) -> anyhow::Result<()> {
        let export = overlay_export(&overlay);
        let mut options = device_options(&served.spec);
        options.serial = overlay.name().chars().take(20).collect();
        options.name.clone_from(&export);
        options.read_only = false;
        let device = Device::new(overlay, options)?;
        let told = (self.hub.clone(), export.clone());
        device.on_connection(move |what| {
            let (hub, disk) = (&told.0, told.1.clone());
            hub.post(&match what {
                Connection::Up => Event::FrontendConnected { disk },
                Connection::Down => Event::FrontendDisconnected { disk },
            });
        });
        device.listen(listener)?;
        self.doors().insert(export, Door { device, socket });
        Ok(())
    }

    fn info(&self, overlay: &HostOverlay) -> OverlayInfo {
        let export = overlay_export(overlay);
        let snapshot = overlay.view().snapshot();
        let (socket, connected) = match self.doors().get(&export) {
            Some(door) => (Some(door.socket.display().to_string()), door.device.is_connected()),
            None => (None, false),
        };
        let nbd = self.catalog.address().is_some();
        OverlayInfo {
            disk: overlay.view().disk().name().to_owned(),
            snapshot: snapshot.name().to_owned(),
            name: overlay.name().to_owned(),
            size: overlay.capacity(),
            used: overlay.bytes_used(),
            keep: overlay.is_kept(),
            uri: nbd.then(|| self.catalog.uri(&export)),
            clients: self.catalog.clients_of(&export),
            export: nbd.then_some(export),
            socket,
            connected,
        }
    }

    fn served(&self, name: &str) -> Answer<&Served> {
        self.disks.iter().find(|served| served.spec.name == name).ok_or_else(|| no_disk(name))
    }

    fn doors(&self) -> MutexGuard<'_, BTreeMap<String, Door>> {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove(socket: Option<&Path>) {
    if let Some(path) = socket {
        // It may be gone already.
        let _ = std::fs::remove_file(path);
    }
}
