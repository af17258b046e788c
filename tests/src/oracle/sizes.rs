//! Resizes: which sizes a disk may tell, and what is past an end.
//!
//! Invariant: a resize that was not answered with success stays in `growing`, with the mark that goes with it, until
//! the disk has told another size or the resize is forgotten: any of them may still come to its end.
//!
//! Absent: what must be so; the head of the module `oracle` tells it under "Sizes".

use std::ops::Range;

use super::{Change, End, Entry, Growing, Oracle, SECTOR, Verdict};

impl Oracle {
    /// A resize to `size` bytes begins.
    pub fn begin_resize(&mut self, disk: usize, size: u64) {
        let capacity = self.disks[disk].capacity;
        let mark = self.issue_mark(disk, self.grown(disk, capacity.min(size), capacity.max(size)));
        self.disks[disk].growing.push(Growing { size, mark });
    }

    /// The sectors that change when a disk grows: the last block of old too, if it is not a whole one.
    fn grown(&self, disk: usize, old: u64, size: u64) -> Range<u64> {
        let whole = self.disks[disk].grid.is_none_or(|grid| old.is_multiple_of(grid.bytes()));
        let first = if whole { old } else { old - 1 };
        first / SECTOR as u64..size / SECTOR as u64
    }

    /// A disk tells its size, at any time while it is served.
    pub fn size_told(&mut self, disk: usize, size: u64) -> Verdict {
        if size == self.disks[disk].capacity {
            return Ok(());
        }
        let growing = std::mem::take(&mut self.disks[disk].growing);
        let Some(growing) = growing.into_iter().rfind(|growing| growing.size == size) else {
            return Err(format!("disk {disk} has {size} bytes"));
        };
        let old = std::mem::replace(&mut self.disks[disk].capacity, size);
        if size < old {
            self.cut_to(disk, size, old);
            return Ok(());
        }
        let Some(cut) = self.disks[disk].marks[growing.mark].cut else {
            self.answer_mark(disk, growing.mark, true);
            return Ok(());
        };
        // After a crash it was done again, at the latest now; but perhaps before a new generation began.
        let sectors = self.grown(disk, old, size);
        let mark = self.issue_mark(disk, sectors);
        let same = self.disks[disk].generation.is_some_and(|(_, began)| began < cut);
        self.answer_mark(disk, mark, same);
        Ok(())
    }

    /// A disk has become smaller, and nobody was told yet: a power cut may bring the old size back, with what was
    /// there; else what is past the end is zeros when it grows again.
    fn cut_to(&mut self, disk: usize, size: u64, old: u64) {
        let sectors: Vec<u64> = self.past(disk, size);
        let now = self.now();
        let end = Some((now, End::Failed));
        self.changes.push(Change {
            value: 0,
            issued: now,
            end,
            durable: false,
            settled: false,
            only_power: false,
        });
        let change = self.changes.len() - 1;
        for sector in sectors {
            self.disks[disk].sectors.entry(sector).or_default().push(Entry { change, seen: None });
        }
        let mark = self.issue_mark(disk, self.grown(disk, size, old));
        self.disks[disk].growing = vec![Growing { size: old, mark }];
    }

    /// It was answered that a disk is smaller: what was past its end is gone for good.
    pub fn shrunk(&mut self, disk: usize, size: u64) {
        for sector in self.past(disk, size) {
            self.disks[disk].sectors.remove(&sector);
        }
        self.forget_resize(disk);
    }

    /// Sectors from `size` on that were ever changed.
    fn past(&self, disk: usize, size: u64) -> Vec<u64> {
        self.disks[disk].sectors.range(size / SECTOR as u64..).map(|(&sector, _)| sector).collect()
    }

    /// The least size that the image of a disk may have now.
    pub fn least_size(&self, disk: usize) -> u64 {
        let model = &self.disks[disk];
        model.growing.iter().map(|growing| growing.size).fold(model.capacity, u64::min)
    }

    /// A resize was answered with an error. It may still be finished by a later opening.
    pub fn not_resized(&mut self, disk: usize) {
        if let Some(growing) = self.disks[disk].growing.last() {
            self.answer_mark(disk, growing.mark, false);
        }
    }

    /// Without faults an opening finishes a resize or forgets it.
    pub fn forget_resize(&mut self, disk: usize) {
        self.disks[disk].growing.clear();
    }

    /// A disk was opened: what it may have marked in vain counts as marked.
    pub(super) fn note_attempt(&mut self, disk: usize) {
        for growing in self.disks[disk].growing.clone() {
            let now = self.disks[disk].capacity;
            let sectors = self.grown(disk, now.min(growing.size), now.max(growing.size));
            let mark = self.issue_mark(disk, sectors);
            self.answer_mark(disk, mark, false);
        }
    }

    /// After a power cut: what is past the end, where nobody can look, may be as old as what was durable.
    pub fn settle_past_end(&mut self, disk: usize) {
        let now = self.now();
        for sector in self.past(disk, self.disks[disk].capacity) {
            for entry in self.durable_window(disk, sector) {
                let change = self.changes.len();
                self.changes.push(Change::perhaps(self.value(&entry), now));
                self.disks[disk].sectors.entry(sector).or_default().push(Entry { change, seen: None });
            }
        }
    }
}
