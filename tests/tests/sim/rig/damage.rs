//! What is done to images and state files while nobody serves them.
//!
//! Invariant: state files are damaged in ways that can be noticed only; what is done to a disk is noted in its `Spec`.
//!
//! Absent: judging whether it was noticed.

use cow_engine::sim::Damage;
use ebbtide_tests::oracle::{SECTOR, stamp};

use super::{Clean, GRACE_STEPS, Rig};

impl Rig<'_> {
    /// Changes an image after a crash, perhaps; so that it can be told.
    pub(super) fn change_after_crash(&mut self) {
        let at = self.random.index(self.specs.len());
        if !self.random.one_in(4) || self.shared.reverts.get() > 0 {
            return;
        }
        let at_once = self.specs[at].quiet && !self.specs[at].power && self.random.one_in(2);
        let time = if at_once { 0 } else { GRACE_STEPS };
        self.sim.pass_time(time + self.random.below(1 << 12));
        self.edit(at, false);
        self.specs[at].unseen = true;
    }

    /// Damages a state file or two, perhaps. Of a `closed` disk the map is covered by a checksum.
    pub(super) fn damage(&mut self, closed: bool) {
        while self.profile.damage && self.random.one_in(2) {
            let at = self.random.index(self.specs.len());
            let dir = self.specs[at].dir;
            let names = self.sim.names(dir).expect("a directory");
            if names.is_empty() {
                return;
            }
            if self.spared == "rewind" && !closed && self.random.one_in(8) {
                // It is gone until a power cut, perhaps.
                self.sim.damage(dir, "superblock", Damage::Remove);
                self.specs[at].damaged = true;
                continue;
            }
            let name = self.random.pick(&names).clone();
            if name.starts_with(self.spared) {
                continue;
            }
            let len = self.sim.len_of(dir, &name);
            let random = &mut self.random;
            let place = random.below(len.max(1));
            let is_summed = closed && name == "map" && self.specs[at].clean == Clean::Yes;
            let damage = match random.below(8) {
                // Without it nothing tells of damage of the map.
                0 if closed && name == "sample" => continue,
                0 => Damage::Remove,
                // A few records are what is missed the least; after a kill others that nobody counted may stand in.
                1 if closed && name.ends_with(".index") => {
                    Damage::Cut(len.saturating_sub(16 * random.within(1..5)))
                }
                1 | 2 => Damage::Cut(place),
                // Of what is in a slot, in the map or in an overlay there is no checksum.
                _ if !is_checked(&name) && !is_summed => continue,
                3 | 4 => Damage::Flip(place),
                5 => Damage::Zero(place / 4096 * 4096, 4096),
                6 => Damage::Zero(place / 16 * 16, 16),
                _ => Damage::Copy { from: place / 16 * 16, to: random.below(len.max(1)) / 16 * 16, len: 16 },
            };
            // One record of zeros is none, and a kill may have left another that nobody counted.
            let is_zeros = match damage {
                Damage::Zero(_, 16) => true,
                Damage::Copy { from, len, .. } => self.sim.is_zero(dir, &name, from, len),
                _ => false,
            };
            if is_zeros && !closed && name.ends_with(".index") {
                continue;
            }
            self.sim.damage(dir, &name, damage);
            self.specs[at].damaged = true;
        }
    }

    /// Damages a record of a snapshot that is held: it is in memory, and needed again once the snapshot is merged.
    pub(super) fn damage_records(&mut self) {
        let at = self.random.index(self.specs.len());
        let dir = self.specs[at].dir;
        let mut names = self.sim.names(dir).expect("a directory");
        names.retain(|name| name.ends_with(".index") && self.sim.len_of(dir, name) > 4096);
        if names.is_empty() {
            return;
        }
        let name = self.random.pick(&names);
        let place = self.random.within(4096..self.sim.len_of(dir, name));
        self.sim.damage(dir, name, Damage::Flip(place));
        self.specs[at].damaged = true;
    }

    /// Changes an image behind the engine's back. If its time of change is set back, where a sample was taken.
    pub(super) fn edit(&mut self, at: usize, unseen: bool) {
        let mut oracle = self.shared.oracle.borrow_mut();
        let sectors = oracle.least_size(at) / SECTOR as u64;
        let first = if unseen { 0 } else { self.random.below(sectors) };
        let end = (first + self.random.within(1..20)).min(sectors);
        let loose = !unseen && !self.specs[at].power && self.random.one_in(2);
        let number = oracle.changed_offline(at, first..end, !loose);
        let mut bytes = vec![0; SECTOR * usize::try_from(end - first).unwrap_or(1)];
        stamp(at, first, number as u64, &mut bytes);
        self.sim.change_offline(self.shared.images[at], first * SECTOR as u64, &bytes, unseen, !loose);
        self.specs[at].edited = true;
        self.specs[at].loose |= loose;
    }
}

/// Whether a state file is covered by checksums. What is in a slot, in the map or in an overlay is not, nor what
/// of a rewind is back.
fn is_checked(name: &str) -> bool {
    ["superblock", "rewind", "sample"].contains(&name)
        || [".index", ".overlay", ".checkpoint"].iter().any(|kind| name.ends_with(kind))
}
