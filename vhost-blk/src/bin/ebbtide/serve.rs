//! `ebbtide serve`: from what the operator said to disks on offer, and back.
//!
//! Order of a start: images are opened and locked, states taken up, half-made snapshots decided; then
//! doors open, guests' last. Order of an end: control and backup clients first, then the guests' queues
//! are drained, then every disk is closed and stamped clean. An end in any other way loses nothing that
//! was acknowledged; the next start says what it found.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use control::commands::OnOverflow;
use control::{Event, EventHub, Listener, Server, paths};
use cow_engine::group::{self, Admin};
use cow_engine::host::{Access, Backing, Executor, HostDir, HostFile, HostStorage, ImageOptions, LockError};
use cow_engine::{Budget, Disk, DiskOptions, Meanwhile, ResetReason, StorePlan};
use vhost_blk::{Cache, Connection, Device, DiscardMode, LogicalBlock, Options};

use crate::args::Doors;
use crate::catalog::Catalog;
use crate::disk_spec::DiskSpec;
use crate::maintenance::Upkeep;
use crate::nbd::NbdServer;
use crate::overlays::Overlays;
use crate::pulse::Pulse;
use crate::service::ControlService;
use crate::space::Meter;
use crate::stop::Stop;

/// How long to wait for the last I/O of a daemon that was killed, which holds its locks.
const FENCE: Duration = Duration::from_secs(10);

/// How front ends reach the disks.
pub(crate) enum FrontEnd {
    /// On the sockets that the disks name.
    Sockets,
    /// By an open descriptor that listens, for the one disk.
    Listening(UnixListener),
    /// By an open descriptor that is connected: the daemon ends with this front end.
    Connected(UnixStream),
}

impl FrontEnd {
    /// What `socket` is, which the program was started with.
    pub(crate) fn of(socket: OwnedFd) -> Result<Self, String> {
        let listening = rustix::net::sockopt::socket_acceptconn(&socket);
        match listening.map_err(|error| format!("the descriptor that --fd names is no socket: {error}"))? {
            true => Ok(Self::Listening(UnixListener::from(socket))),
            false => Ok(Self::Connected(UnixStream::from(socket))),
        }
    }
}

/// Everything that `serve` is told.
pub(crate) struct Plan {
    pub(crate) disks: Vec<DiskSpec>,
    pub(crate) doors: Doors,
    pub(crate) front_end: FrontEnd,
    /// Bytes of old content of all disks, if there is a limit.
    pub(crate) store_limit: Option<u64>,
}

/// A disk on offer.
pub(crate) struct Served {
    pub(crate) spec: DiskSpec,
    pub(crate) disk: Arc<Disk<HostStorage>>,
    pub(crate) device: Arc<Device<Arc<Disk<HostStorage>>>>,
    pub(crate) image_path: String,
    pub(crate) state: PathBuf,
    /// How full its difference store gets.
    pub(crate) meter: Meter,
    /// Held while the daemon runs.
    _state_lock: std::fs::File,
}

/// Serves until told to stop.
pub(crate) fn run(plan: Plan) -> anyhow::Result<()> {
    crate::args::check_disks(&plan.disks).map_err(|error| anyhow!(error))?;
    raise_descriptor_limit();
    let stop = Stop::default();
    watch_signals(stop.clone())?;
    let hub = EventHub::new();
    let executor = Executor::new(16)?;
    let budget = Arc::new(Budget::new("the difference stores of all disks"));
    let disks = Arc::new(open_disks(&executor, plan.disks, &hub, &budget)?);
    let pulse = Pulse::start(disks.clone())?;
    budget.begin_limit(plan.store_limit);

    let catalog = Arc::new(Catalog::new(
        disks.iter().map(|served| served.disk.clone()).collect(),
        plan.doors.nbd.clone(),
        plan.doors.nbd_tcp,
    ));
    let mut nbd = NbdServer::new(catalog.clone());
    if let Some(path) = &plan.doors.nbd {
        make_directory_of(path, &paths::nbd_socket())?;
        nbd.listen_unix(bind(path)?).context("cannot start the NBD server")?;
    }
    if let Some(address) = plan.doors.nbd_tcp {
        let listener = std::net::TcpListener::bind(address);
        let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
        nbd.listen_tcp(listener).context("cannot start the NBD server")?;
    }
    let mut created = Vec::new();
    for served in disks.iter() {
        let told = (hub.clone(), served.spec.name.clone(), stop.clone());
        let ends_with_front_end = matches!(plan.front_end, FrontEnd::Connected(_));
        served.device.on_connection(move |what| {
            let (hub, disk, stop) = &told;
            log::info!(
                "{disk}: front end {}",
                if what == Connection::Up { "connected" } else { "went away" }
            );
            match what {
                Connection::Up => hub.post(&Event::FrontendConnected { disk: disk.clone() }),
                Connection::Down => {
                    hub.post(&Event::FrontendDisconnected { disk: disk.clone() });
                    if ends_with_front_end {
                        stop.set();
                    }
                }
            }
        });
        if let (FrontEnd::Sockets, Some(path)) = (&plan.front_end, &served.spec.socket) {
            served.device.listen(bind(path)?).context("cannot start a thread")?;
            created.push(path.clone());
        }
    }
    let control = match &plan.doors.control {
        Some(path) => {
            make_directory_of(path, &paths::control_socket())?;
            Some(Listener::bind(path).map_err(anyhow::Error::from)?)
        }
        None => None,
    };
    let upkeep = Upkeep::new();
    let overlays = Arc::new(Overlays::new(disks.clone(), catalog.clone(), hub.clone()));
    overlays.resume();
    let service = ControlService {
        disks: disks.clone(),
        upkeep: upkeep.clone(),
        catalog,
        overlays: overlays.clone(),
        hub: hub.clone(),
        budget,
        stop: stop.clone(),
        started: Instant::now(),
        control_socket: plan.doors.control.as_ref().map_or(String::new(), |path| path.display().to_string()),
    };
    let maintenance_hub = hub.clone();
    let server = match control {
        Some(listener) => {
            let started = Server::start(listener, Arc::new(service), hub, control::Options::default());
            Some(started.context("cannot start the control server")?)
        }
        None => None,
    };
    match plan.front_end {
        FrontEnd::Sockets => Ok(()),
        FrontEnd::Listening(listener) => disks[0].device.listen(listener),
        FrontEnd::Connected(stream) => disks[0].device.attach(stream),
    }
    .context("cannot start a thread")?;
    for served in disks.iter() {
        log::info!("{}: serving {}", served.spec.name, served.image_path);
    }

    let maintenance = upkeep.start(disks.clone(), maintenance_hub)?;

    stop.wait();
    log::info!("stopping");
    if let Some(server) = server {
        server.stop(Duration::from_secs(2));
    }
    nbd.stop();
    drop(maintenance);
    overlays.stop();
    for path in created.iter().chain(&plan.doors.nbd) {
        let _ = std::fs::remove_file(path);
    }
    drop(pulse);
    close(&executor, &disks)
}

/// Drains the queues and closes every disk, the others also if one fails.
fn close(executor: &Executor, disks: &[Served]) -> anyhow::Result<()> {
    let io = executor.storage();
    let mut result = Ok(());
    for served in disks {
        served.device.stop();
        let disk = &served.disk;
        let closed = executor.block_on(disk.close(&io, || disk.image().identity()));
        if let Err(error) = closed {
            log::error!("{}: not closed cleanly: {error}", served.spec.name);
            result =
                Err(anyhow::Error::from(error).context(format!("closing the disk '{}'", served.spec.name)));
        }
    }
    result
}

fn open_disks(
    executor: &Executor,
    specs: Vec<DiskSpec>,
    hub: &EventHub,
    budget: &Arc<Budget>,
) -> anyhow::Result<Vec<Served>> {
    let boot = boot_id()?;
    let mut disks = Vec::new();
    for spec in specs {
        disks.push(open_disk(executor, spec, boot, hub, budget)?);
    }
    let io = executor.storage();
    let all: Vec<_> = disks.iter().map(|served| served.disk.clone()).collect();
    let dropped = executor.block_on(group::settle(&mut Admin::new(), &io, &all))?;
    for (disk, snapshot) in dropped {
        log::info!("{disk}: dropped snapshot '{snapshot}', which was never finished");
    }
    Ok(disks)
}

fn open_disk(
    executor: &Executor,
    spec: DiskSpec,
    boot: [u8; 16],
    hub: &EventHub,
    budget: &Arc<Budget>,
) -> anyhow::Result<Served> {
    let options = ImageOptions {
        read_only: spec.read_only,
        direct: spec.direct,
        logical_block_bytes: spec.logical_block_bytes,
    };
    let image = HostFile::open_image(&spec.path, options)?;
    lock(&image, spec.read_only)?;
    let path = spec.path.canonicalize().with_context(|| format!("cannot resolve {}", spec.path.display()))?;
    let state = state_directory(spec.state.as_deref(), &path, &image)?;
    let state_lock = lock_state(&state)?;
    let image_path = path.display().to_string();
    let events = {
        let hub = hub.clone();
        Arc::new(move |event| {
            if let Some(event) = translate(event) {
                hub.post(&event);
            }
        })
    };
    let meanwhile = image.meanwhile().with_context(|| format!("cannot ask about {image_path}"))?;
    let options = DiskOptions {
        name: spec.name.clone(),
        identity: image.identity().with_context(|| format!("cannot ask about {image_path}"))?,
        image,
        image_path: image_path.clone(),
        dir: HostDir::new(state.clone()),
        tracking: spec.tracking,
        boot,
        events,
        merge_step: cow_engine::MERGE_STEP,
        store: StorePlan { areas: spec.store.clone(), limit: spec.store_limit, shared: budget.clone() },
        region_bytes: None,
        meanwhile: Meanwhile { assume_changed: spec.assume_changed, ..meanwhile },
    };
    let opened = executor.block_on(Disk::open(&executor.storage(), options));
    let (disk, report) =
        opened.with_context(|| format!("cannot use the state directory {}", state.display()))?;
    tell(&spec.name, &report);
    let device = Device::new(disk.clone(), device_options(&spec))
        .with_context(|| format!("cannot offer the disk '{}'", spec.name))?;
    let meter = Meter::new(budget.clone(), disk.store_budget().used());
    Ok(Served { spec, disk, device, image_path, state, meter, _state_lock: state_lock })
}

/// The engine's event in the control plane's words.
fn translate(event: cow_engine::Event) -> Option<Event> {
    use cow_engine::Event as Engine;
    Some(match event {
        Engine::SnapshotBroken { disk, snapshot, code, reason } => {
            Event::SnapshotBroken { name: snapshot, disk, reason: code.to_owned(), desc: reason }
        }
        Engine::CheckpointDamaged { disk, checkpoint, reason } => {
            Event::CheckpointDamaged { name: checkpoint, disk, desc: reason }
        }
        Engine::TrackerReset { disk, change_id, reason } => Event::TrackerReset {
            disk,
            generation: change_id.generation.to_string(),
            reason: reason.code().to_owned(),
            desc: reason.to_string(),
        },
        Engine::RewindStarted { disk, snapshot, bytes } => Event::RewindStarted { disk, snapshot, bytes },
        Engine::RewindCompleted { disk, snapshot } => Event::RewindCompleted { disk, snapshot },
        Engine::RewindFailed { disk, snapshot, reason } => {
            Event::RewindFailed { disk, snapshot, desc: reason }
        }
        Engine::Overflow { disk, fails, hold_seconds, reason } => Event::StoreOverflow {
            disk,
            action: if fails { OnOverflow::FailWrites } else { OnOverflow::HoldWrites },
            hold_deadline: (!fails).then_some(hold_seconds),
            desc: reason,
        },
        _ => return None,
    })
}

/// Says what was found of a disk's past.
fn tell(name: &str, report: &cow_engine::OpenReport) {
    if report.unclean {
        log::info!("{name}: the last daemon did not close this disk");
    }
    if !report.kept.is_empty() {
        log::info!("{name}: kept {} snapshots: {}", report.kept.len(), report.kept.join(", "));
    }
    if report.presumed_changed > 0 {
        let mib = report.presumed_changed >> 20;
        log::warn!("{name}: the host stopped without a clean end: {mib} MiB count as changed");
    }
    for (snapshot, reason) in &report.dropped {
        log::warn!("{name}: snapshot {snapshot} is lost: {reason}");
    }
    for (path, reason) in &report.areas_lost {
        log::warn!(
            "{name}: the store {path} cannot be used, snapshots with old content in it are broken: {reason}"
        );
    }
    for (overlay, reason) in &report.overlays_dropped {
        log::warn!("{name}: overlay {overlay} is lost: {reason}");
    }
    for (file, reason) in &report.checkpoints_lost {
        log::warn!("{name}: a checkpoint ({file}) is lost: {reason}");
    }
    if let Some(snapshot) = &report.rewinding {
        log::info!("{name}: the rewind to snapshot '{snapshot}' goes on");
    }
    // Not an event: no control client is there yet. `query-tracker` tells it.
    if let Some(reason) = report.reset.as_ref().filter(|&reason| *reason != ResetReason::New) {
        log::warn!("{name}: change tracking begins anew, the next backup must be a full one: {reason}");
    }
}

pub(crate) fn device_options(spec: &DiskSpec) -> Options {
    Options {
        name: spec.name.clone(),
        queues: spec.queues,
        read_only: spec.read_only,
        serial: spec.serial.clone().unwrap_or_else(|| spec.name.chars().take(20).collect()),
        logical_block: if spec.logical_block_bytes == 4096 {
            LogicalBlock::B4096
        } else {
            LogicalBlock::B512
        },
        cache: if spec.writeback { Cache::Writeback } else { Cache::Writethrough },
        discard: if spec.discard { DiscardMode::Unmap } else { DiscardMode::Ignore },
        ..Options::default()
    }
}

/// Takes the image's locks; waits for a daemon that was killed, whose last I/O still holds them.
pub(crate) fn lock(image: &HostFile, read_only: bool) -> Result<(), LockError> {
    let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
    let deadline = Instant::now() + FENCE;
    loop {
        match image.lock_image(access) {
            Err(LockError::Held { living: false, .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// The state directory, made if need be: beside the image unless said otherwise.
pub(crate) fn state_directory(
    said: Option<&Path>,
    image_path: &Path,
    image: &HostFile,
) -> anyhow::Result<PathBuf> {
    let path = match (said, image.backing()) {
        (Some(path), _) => path.to_owned(),
        (None, Backing::File) => {
            let mut path = image_path.as_os_str().to_owned();
            path.push(".ebb");
            PathBuf::from(path)
        }
        (None, Backing::BlockDevice) => {
            bail!(
                "{} is a block device: say with state=DIR where its history and snapshots are kept",
                image_path.display()
            )
        }
    };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
    made.with_context(|| format!("cannot make the state directory {}", path.display()))?;
    let path = path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))?;
    let (on, of) = (std::fs::metadata(&path)?, std::fs::metadata(image_path)?);
    if of.file_type().is_block_device() && on.dev() == of.rdev() {
        bail!(
            "the state directory {} lies on the disk that it would keep snapshots of: choose another with state=DIR",
            path.display()
        );
    }
    Ok(path)
}

/// Keeps other daemons out of a state directory for as long as the answer is held.
pub(crate) fn lock_state(state: &Path) -> anyhow::Result<std::fs::File> {
    let path = state.join("lock");
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("the state directory {} is in use by another ebbtide", state.display())
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// This boot of the host.
pub(crate) fn boot_id() -> anyhow::Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).with_context(|| format!("cannot read {PATH}"))?;
    Ok(uuid::Uuid::try_parse(text.trim()).with_context(|| format!("{PATH} holds no UUID"))?.into_bytes())
}

/// Listens on `path`, in place of a socket that nobody listens on any more.
pub(crate) fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    let fail = || format!("cannot listen on {}", path.display());
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            bail!("cannot listen on {}: there is something else that is no socket", path.display());
        }
        let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
        if !UnixStream::connect(path).is_err_and(refused) {
            bail!("cannot listen on {}: another program does", path.display());
        }
        std::fs::remove_file(path).with_context(fail)?;
    }
    UnixListener::bind(path).with_context(fail)
}

/// Makes the directory of a socket if it is the default one.
fn make_directory_of(path: &Path, default: &Path) -> anyhow::Result<()> {
    if path != default {
        return Ok(());
    }
    let directory = paths::runtime_directory();
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
    made.with_context(|| format!("cannot make {}", directory.display()))
}

/// Allows as many descriptors as the system lets us: a snapshot takes one, a queue and a client some.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    if let Err(error) = raised {
        log::warn!("cannot raise the limit of open files: {error}");
    }
}

/// Ends the daemon in order on the signals that ask for it.
fn watch_signals(stop: Stop) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
    // A file that may not become longer (`ulimit -f`) is an error of that write, and no reason to leave a guest alone.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).context("cannot watch for signals")?;
    let signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP]);
    let mut signals = signals.context("cannot watch for signals")?;
    crate::thread("signals", move || {
        for signal in signals.forever() {
            log::info!("received signal {signal}");
            stop.set();
        }
    })
    .context("cannot start a thread")?;
    Ok(())
}
