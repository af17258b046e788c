//! What an overlay may answer: the judge of writable views, beside [`crate::oracle`], whose time it uses.
//!
//! Sectors that are written to an overlay carry stamps of a disk that there is not, so that one of them on
//! the origin, in a view or in another overlay is nobody's.
//!
//! What must be so, per sector of an overlay:
//! - A read between times b and e answers the last change that held by b, or one after it issued before e;
//!   where none held by b, also what the snapshot's view answers, which the other judge knows.
//! - The same after a kill, and after a power cut if the disk was closed in order before, for overlays that
//!   are to be kept. What is read after a crash is how it is from then on.
//! - Other overlays are gone once the disk is opened anew.
//!
//! - What the kernel could not write back is lost by a kill, as far as no flush had covered it, and then a flush fails.
//!
//! Absent: flushes otherwise. A stop of the host either comes after a close in order, or costs the overlay.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::oracle::{Fate, Oracle, SECTOR, Stamp, Verdict, read_stamp};

/// The first stamp's disk of an overlay.
const FIRST_SALT: usize = 1000;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    /// What the snapshot has.
    Base,
    Stamp(Stamp),
}

#[derive(Clone, Debug)]
struct Change {
    value: Value,
    issued: u64,
    /// When it held; one that failed or was cut off may be there or not.
    held: Option<u64>,
}

/// An overlay.
#[derive(Debug)]
pub struct OverlayModel {
    /// The disk that its snapshot is of.
    pub disk: usize,
    /// Its snapshot, as the other judge counts.
    pub group: usize,
    /// Its name.
    pub name: String,
    /// Whether it outlives the process.
    pub keep: bool,
    /// What became of it.
    pub fate: Fate,
    /// What had held by then was flushed.
    flushed: u64,
    /// A flush has failed: no later one covers what was before it.
    refused: bool,
    /// What no flush had covered may be lost.
    lossy: bool,
    /// The next flush is told of it.
    untold: bool,
    changes: Vec<Change>,
    sectors: BTreeMap<u64, Vec<usize>>,
    in_flight: Vec<(usize, Range<u64>)>,
    /// Sectors of changes that a crash cut off, where something may be left that nobody must see.
    pub cut_off: Vec<Range<u64>>,
}

impl OverlayModel {
    fn window(&self, sector: u64, begin: u64, end: u64) -> Vec<Value> {
        let history = self.sectors.get(&sector).map_or(&[][..], Vec::as_slice);
        let held = |&change: &usize| self.changes[change].held.is_some_and(|held| held <= begin);
        let floor = history.iter().rposition(held);
        let later = history[floor.unwrap_or(0)..].iter().map(|&change| &self.changes[change]);
        let later = later.filter(|change| change.issued < end).map(|change| change.value);
        floor.is_none().then_some(Value::Base).into_iter().chain(later).collect()
    }
}

/// The judge.
#[derive(Debug, Default)]
pub struct OverlayOracle {
    /// All overlays that were ever commanded.
    pub overlays: Vec<OverlayModel>,
}

impl OverlayOracle {
    /// An overlay's command begins; its index.
    pub fn begin(&mut self, disk: usize, group: usize, name: &str, keep: bool) -> usize {
        self.overlays.push(OverlayModel {
            disk,
            group,
            name: name.to_owned(),
            keep,
            fate: Fate::Creating,
            flushed: 0,
            refused: false,
            lossy: false,
            untold: false,
            changes: Vec::new(),
            sectors: BTreeMap::new(),
            in_flight: Vec::new(),
            cut_off: Vec::new(),
        });
        self.overlays.len() - 1
    }

    /// Overlays of which `fate` is true, as indexes.
    pub fn with(&self, fate: impl Fn(&OverlayModel) -> bool) -> Vec<usize> {
        self.overlays.iter().enumerate().filter(|(_, overlay)| fate(overlay)).map(|(at, _)| at).collect()
    }

    /// Everything in flight was cut off.
    pub fn crash(&mut self) {
        for overlay in &mut self.overlays {
            overlay.cut_off = overlay.in_flight.drain(..).map(|(_, sectors)| sectors).collect();
            if matches!(overlay.fate, Fate::Creating | Fate::Deleting) {
                overlay.fate = Fate::Unknown;
            }
        }
    }

    /// Whether no change in flight has a sector of `sectors`.
    pub fn is_free(&self, overlay: usize, sectors: &Range<u64>) -> bool {
        let overlaps = |held: &Range<u64>| held.start < sectors.end && sectors.start < held.end;
        !self.overlays[overlay].in_flight.iter().any(|(_, held)| overlaps(held))
    }

    /// A change begins at time `now`; its number, and the disk and stamp of its sectors unless it zeros
    /// them.
    pub fn issue(&mut self, overlay: usize, sectors: Range<u64>, zeros: bool, now: u64) -> (usize, usize) {
        let held = &mut self.overlays[overlay];
        let number = held.changes.len() + 1;
        let value = Value::Stamp(if zeros { 0 } else { number as u64 });
        held.changes.push(Change { value, issued: now, held: None });
        for sector in sectors.clone() {
            held.sectors.entry(sector).or_default().push(number - 1);
        }
        held.in_flight.push((number - 1, sectors));
        (number, FIRST_SALT + overlay)
    }

    /// A change was answered at time `now`.
    pub fn answer(&mut self, overlay: usize, number: usize, ok: bool, now: u64) {
        let overlay = &mut self.overlays[overlay];
        overlay.changes[number - 1].held = ok.then_some(now);
        overlay.in_flight.retain(|(held, _)| *held != number - 1);
    }

    /// A flush that was issued at `issued` was answered.
    pub fn flushed(&mut self, overlay: usize, issued: u64, ok: bool) -> Verdict {
        let held = &mut self.overlays[overlay];
        if ok && std::mem::take(&mut held.untold) {
            return Err(format!("overlay {}: a flush succeeded over what was lost", held.name));
        }
        held.untold &= ok;
        held.refused |= !ok;
        if !held.refused {
            held.flushed = issued;
        }
        Ok(())
    }

    /// The kernel had lost something of an overlay when the process was killed; perhaps it has to tell that.
    pub fn lost(&mut self, overlay: usize, untold: bool) {
        let held = &mut self.overlays[overlay];
        (held.lossy, held.untold) = (true, untold);
    }

    /// Everything was judged that a kill has left.
    pub fn settled(&mut self, overlay: usize) {
        self.overlays[overlay].lossy = false;
    }

    /// Grains that were ever touched.
    pub fn touched(&self, overlay: usize) -> BTreeSet<u64> {
        self.overlays[overlay].sectors.keys().map(|sector| sector / 8).collect()
    }

    /// Judges a read that was issued at `begin` and has just been answered. With `settle` nothing is in
    /// flight, and what was found is how it is from now on.
    pub fn read(
        &mut self,
        oracle: &mut Oracle,
        overlay: usize,
        begin: u64,
        at: u64,
        bytes: &[u8],
        settle: bool,
    ) -> Verdict {
        let end = oracle.now();
        for (sector, bytes) in (at / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            let held = &self.overlays[overlay];
            let begin = if settle && held.lossy { held.flushed } else { begin };
            let window = held.window(sector, begin, end);
            let own = read_stamp(FIRST_SALT + overlay, sector, bytes).map(Value::Stamp);
            let found = match own {
                Ok(value) if window.contains(&value) => value,
                _ if window.contains(&Value::Base) => {
                    let base = oracle.view_read(held.group, held.disk, sector * SECTOR as u64, bytes);
                    base.map_err(|what| format!("overlay {}: {what}", held.name))?;
                    Value::Base
                }
                own => {
                    return Err(format!(
                        "overlay {} sector {sector}: {own:?} is there, allowed are {window:?}",
                        held.name
                    ));
                }
            };
            if settle && window.len() > 1 {
                let held = &mut self.overlays[overlay];
                held.changes.push(Change { value: found, issued: end, held: Some(end) });
                let number = held.changes.len() - 1;
                held.sectors.entry(sector).or_default().push(number);
            }
        }
        Ok(())
    }
}
