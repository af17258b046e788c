//! How much a disk's difference store can still take, how fast it fills, and when to say so.
//!
//! Measured once a second. Invariant: an event is sent once, and again only after there was clearly more
//! space in between.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use control::commands::{AreaInfo, StoreInfo};
use control::{Event, EventHub};
use cow_engine::host::HostStorage;
use cow_engine::{AreaKind, Budget, Disk};

use crate::serve::Served;

/// How much the newest second counts beside those before.
const WEIGHT: f64 = 0.3;

/// What is known from before.
#[derive(Default)]
struct Past {
    seen: Option<(Instant, u64)>,
    bytes_per_second: f64,
    told: bool,
}

/// One disk's.
pub(crate) struct Meter {
    past: Mutex<Past>,
    /// The limit of all disks.
    shared: Arc<Budget>,
}

/// What fits, and what binds first.
struct Left {
    bytes: u64,
    bound_by: String,
}

impl Meter {
    /// From now on, when `used` bytes are in use.
    pub(crate) fn new(shared: Arc<Budget>, used: u64) -> Self {
        let past = Past { seen: Some((Instant::now(), used)), ..Past::default() };
        Self { past: Mutex::new(past), shared }
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures, and says when space gets low. To be called once a second.
    pub(crate) fn look(&self, served: &Served, hub: &EventHub) {
        let used = served.disk.store_budget().used();
        let now = Instant::now();
        {
            let mut past = self.past();
            if let Some((then, before)) = past.seen.replace((now, used)) {
                let seconds = now.duration_since(then).as_secs_f64().max(0.1);
                #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
                let rate = used.saturating_sub(before) as f64 / seconds;
                past.bytes_per_second += WEIGHT * (rate - past.bytes_per_second);
            }
        }
        if served.disk.snapshots().is_empty() {
            self.past().told = false;
            return;
        }
        let info = self.info(served);
        let (Some(left), Some(bound_by)) = (info.bytes_left, info.bound_by) else { return };
        let threshold = served.spec.low_space;
        let total = left.saturating_add(used);
        let within = |seconds: u64| info.seconds_left.is_some_and(|left| left < seconds);
        let low = within(threshold) || left < total / 20;
        let plenty = !within(threshold.saturating_mul(2)) && left > total / 10;
        let mut past = self.past();
        if low && !past.told {
            past.told = true;
            log::warn!(
                "{}: the difference store will be full soon: {left} bytes are left of {bound_by}",
                served.spec.name
            );
            hub.post(&Event::LowSpace {
                disk: served.spec.name.clone(),
                bytes_left: left,
                bytes_per_second: info.bytes_per_second,
                seconds_left: info.seconds_left,
                bound_by,
            });
        } else if plenty {
            past.told = false;
        }
    }

    /// The difference store, as a verb tells it.
    pub(crate) fn info(&self, served: &Served) -> StoreInfo {
        let disk = &served.disk;
        let left = self.left(disk, &served.state);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people")]
        let rate = self.past().bytes_per_second as u64;
        StoreInfo {
            areas: disk.areas().iter().map(describe).collect(),
            used: disk.store_budget().used(),
            limit: disk.store_budget().limit(),
            writes_held: disk.writes_held(),
            bytes_left: left.as_ref().map(|left| left.bytes),
            bytes_per_second: rate,
            seconds_left: left.as_ref().and_then(|left| left.bytes.checked_div(rate)),
            bound_by: left.map(|left| left.bound_by),
        }
    }

    fn left(&self, disk: &Disk<HostStorage>, state: &Path) -> Option<Left> {
        let mut all = Vec::new();
        let of = |budget: &Budget, name: &str| {
            let bytes = budget.limit()?.saturating_sub(budget.used());
            Some(Left { bytes, bound_by: name.to_owned() })
        };
        all.extend(of(disk.store_budget(), "store-limit"));
        all.extend(of(&self.shared, "daemon-limit"));
        all.extend(left_in_areas(disk, state));
        all.into_iter().min_by_key(|left| left.bytes)
    }
}

/// What fits into all areas; the last one is what binds.
fn left_in_areas(disk: &Disk<HostStorage>, state: &Path) -> Option<Left> {
    let mut left: Option<Left> = None;
    let mut systems = Vec::new();
    for area in disk.areas().into_iter().filter(|area| area.open) {
        let own = area.bytes.map(|bytes| bytes.saturating_sub(area.used));
        let path = if area.number == 0 { state.to_owned() } else { area.path.clone().into() };
        let system = rustix::fs::statvfs(&path).ok().filter(|_| area.kind != AreaKind::Device);
        // Two areas of one file system share what it has.
        let again = system.as_ref().is_some_and(|system| systems.contains(&system.f_fsid));
        systems.extend(system.as_ref().map(|system| system.f_fsid));
        let free = system.filter(|_| !again).map(|system| system.f_bavail.saturating_mul(system.f_frsize));
        let bytes = match (own, free) {
            (Some(own), Some(free)) => own.min(free),
            (own, free) => own.or(free).unwrap_or(0),
        };
        let before = left.map_or(0, |left| left.bytes);
        left = Some(Left { bytes: before.saturating_add(bytes), bound_by: path.display().to_string() });
    }
    left
}

/// An area, as a verb tells it.
pub(crate) fn describe(area: &cow_engine::AreaInfo) -> AreaInfo {
    let kind = match area.kind {
        AreaKind::Directory => "directory",
        AreaKind::File => "file",
        AreaKind::Device => "device",
    };
    AreaInfo { path: area.path.clone(), kind: kind.to_owned(), size: area.bytes, used: area.used }
}
