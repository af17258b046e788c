//! What was written when, and which instants a view of it may be of.
//!
//! A write is in force from some moment between its issue and its acknowledgement. So if a unit of a view
//! shows a write, the view's instant is not before that write's issue, and not after the acknowledgement
//! of the next one. A view is right if one instant satisfies all its units, of all disks that
//! were frozen together. That includes the causal order: had a view a write that was issued after another's
//! acknowledgement, without the other, its two bounds would cross.
//!
//! Always: an issue is noted before the device can know of the request, an acknowledgement after the
//! driver saw it; so bounds are never tighter than the truth.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering};

use super::unit;

/// Counts what happens, on all disks.
#[derive(Debug, Default)]
pub struct Clock(AtomicU64);

impl Clock {
    /// A moment after all that were given out before.
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// Not acknowledged yet, or never.
const NEVER: u64 = u64::MAX;

/// What a request leaves in its units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Stamps with its number.
    Stamps,
    /// Zeros.
    Zeros,
}

/// One write of a unit.
#[derive(Clone, Copy, Debug)]
struct Entry {
    write: u64,
    kind: Kind,
    issued: u64,
    acked: u64,
    /// Whether nobody will ever know if it was done, or how much of it.
    lost: bool,
}

/// The writes of one unit, in their order; the oldest are forgotten when no view can show them any more.
#[derive(Debug)]
struct History {
    /// How many were forgotten.
    forgotten: u64,
    entries: VecDeque<Entry>,
}

impl History {
    /// When entry `index` was certainly over: at the first acknowledgement of a later one.
    fn until(&self, index: usize) -> u64 {
        self.entries.range(index + 1..).map(|entry| entry.acked).min().unwrap_or(NEVER)
    }
}

/// The journal of one disk.
#[derive(Debug)]
pub struct Journal {
    units: Vec<History>,
    writes: u64,
    acknowledged: u64,
}

impl Journal {
    /// Of a disk of `units` units that are all zero.
    pub fn new(units: usize) -> Self {
        let zeros = Entry { write: 0, kind: Kind::Zeros, issued: 0, acked: 0, lost: false };
        let history = || History { forgotten: 0, entries: VecDeque::from([zeros]) };
        Self { units: (0..units).map(|_| history()).collect(), writes: 0, acknowledged: 0 }
    }

    /// Notes that a request on `units` is about to be issued, and numbers it.
    pub fn issue(&mut self, units: Range<usize>, kind: Kind, now: u64) -> u64 {
        self.writes += 1;
        let entry = Entry { write: self.writes, kind, issued: now, acked: NEVER, lost: false };
        self.units[units].iter_mut().for_each(|history| history.entries.push_back(entry));
        self.writes
    }

    /// Notes that request `write` on `units` was acknowledged.
    ///
    /// # Panics
    /// If it is not the last of its units.
    pub fn acknowledge(&mut self, units: Range<usize>, write: u64, now: u64) {
        self.acknowledged += 1;
        self.last_of(units, write).for_each(|entry| entry.acked = now);
    }

    /// Notes that request `write` on `units` will never be answered: its daemon is gone.
    ///
    /// # Panics
    /// If it is not the last of its units.
    pub fn lose(&mut self, units: Range<usize>, write: u64) {
        self.last_of(units, write).for_each(|entry| entry.lost = true);
    }

    fn last_of(&mut self, units: Range<usize>, write: u64) -> impl Iterator<Item = &mut Entry> {
        self.units[units].iter_mut().map(move |history| {
            let last = history.entries.back_mut().filter(|entry| entry.write == write);
            last.expect("one request at a time on a unit")
        })
    }

    /// Requests acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Whether `unit` may hold `found` now, while nothing is in flight on it.
    pub fn may_hold(&self, unit: usize, found: Option<u64>) -> bool {
        let history = &self.units[unit];
        let lasting = (0..history.entries.len()).filter(|&index| history.until(index) == NEVER);
        lasting.map(|index| shown(&history.entries[index])).any(|shown| shown == found)
    }

    /// What a view may show whose instant lies within `instants`.
    pub fn window(&self, instants: RangeInclusive<u64>) -> Window {
        let (from, to) = instants.into_inner();
        let units = self.units.iter().map(|history| {
            let all = history.entries.iter().enumerate().map(|(index, entry)| Candidate {
                place: history.forgotten + index as u64,
                write: entry.write,
                shown: shown(entry),
                from: entry.issued,
                until: history.until(index),
                in_flight: entry.acked >= from && !entry.lost,
            });
            all.filter(|candidate| candidate.from <= to && candidate.until >= from).collect()
        });
        Window { units: units.collect() }
    }

    /// Forgets writes that no view can show whose instant is yet to come at `now`.
    pub fn forget(&mut self, now: u64) {
        for history in &mut self.units {
            while history.until(0) < now {
                history.entries.pop_front();
                history.forgotten += 1;
            }
        }
    }
}

/// What a unit holds after `entry`.
fn shown(entry: &Entry) -> Option<u64> {
    (entry.kind == Kind::Stamps).then_some(entry.write)
}

/// A write that a view may show in a unit.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Its place in the order of the unit's writes.
    place: u64,
    write: u64,
    shown: Option<u64>,
    from: u64,
    until: u64,
    /// Whether it was not acknowledged when the window began, and not lost.
    in_flight: bool,
}

/// What a view of one disk may show.
#[derive(Clone, Debug)]
pub struct Window {
    units: Vec<Vec<Candidate>>,
}

/// Which writes of its unit each unit of a view may show: more than one only where zeros were written twice.
pub type Seen = Vec<RangeInclusive<u64>>;

/// Judges views of disks that were frozen together between the two ends of `instants`.
///
/// `views` has each disk's number, what it may show, and what it shows.
///
/// # Errors
/// What is wrong with them, for people.
pub fn judge(
    instants: RangeInclusive<u64>,
    unit_bytes: usize,
    views: &[(u64, &Window, &[u8])],
) -> Result<Vec<Seen>, String> {
    let mut instants = vec![instants];
    let mut all = Vec::new();
    for &(disk, window, data) in views {
        let mut seen = Seen::new();
        if data.len() != window.units.len() * unit_bytes {
            return Err(format!("disk {disk} has {} bytes", data.len()));
        }
        for (number, bytes) in data.chunks_exact(unit_bytes).enumerate() {
            let candidates = &window.units[number];
            let wrong = |what: &str| format!("disk {disk}, unit {number} {what}; possible: {candidates:?}");
            let shown = unit::read(bytes, disk, number as u64).map_err(|text| wrong(&text))?;
            let fits: Vec<_> = candidates.iter().filter(|candidate| candidate.shown == shown).collect();
            let (Some(first), Some(last)) = (fits.first(), fits.last()) else {
                return Err(wrong(&format!("shows write {shown:?}")));
            };
            let left = common(&instants, &fits);
            if left.is_empty() {
                let text = format!("shows write {shown:?}, which leaves none of the instants {instants:?}");
                return Err(wrong(&text));
            }
            instants = left;
            seen.push(first.place..=last.place);
        }
        check_requests(disk, window, &seen)?;
        all.push(seen);
    }
    Ok(all)
}

/// The instants of `instants` that one of `fits` allows.
fn common(instants: &[RangeInclusive<u64>], fits: &[&Candidate]) -> Vec<RangeInclusive<u64>> {
    let mut left: Vec<RangeInclusive<u64>> = Vec::new();
    for instant in instants {
        for fit in fits {
            let both = fit.from.max(*instant.start())..=fit.until.min(*instant.end());
            match left.last_mut() {
                _ if both.is_empty() => {}
                Some(last) if last.end() >= both.start() => *last = *last.start()..=*both.end(),
                _ => left.push(both),
            }
        }
    }
    left
}

/// Requests that were in flight at the instant are in a view wholly or not at all.
fn check_requests(disk: u64, window: &Window, seen: &Seen) -> Result<(), String> {
    let mut requests: BTreeMap<u64, (Option<usize>, Option<usize>)> = BTreeMap::new();
    for (number, (candidates, seen)) in window.units.iter().zip(seen).enumerate() {
        for candidate in candidates.iter().filter(|candidate| candidate.in_flight) {
            let (inside, outside) = requests.entry(candidate.write).or_default();
            if *seen.start() >= candidate.place {
                *inside = Some(number);
            } else if *seen.end() < candidate.place {
                *outside = Some(number);
            }
            if let (Some(inside), Some(outside)) = (inside, outside) {
                let write = candidate.write;
                return Err(format!(
                    "disk {disk}: write {write} is in unit {inside} and not in unit {outside}"
                ));
            }
        }
    }
    Ok(())
}

/// Judges what a later view shows, and what was reported as changed between the two.
///
/// `reported` are the units that were reported.
///
/// # Errors
/// What is wrong, for people.
pub fn judge_progress(earlier: &Seen, later: &Seen, reported: impl Fn(usize) -> bool) -> Result<(), String> {
    for (unit, (before, after)) in earlier.iter().zip(later).enumerate() {
        if after.end() < before.start() {
            return Err(format!("unit {unit} went back from its write {before:?} to {after:?}"));
        }
        if after.start() > before.end() && !reported(unit) {
            return Err(format!("unit {unit} is not reported: its writes {before:?}, now {after:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: usize = 64;

    /// A view that shows these writes, one per unit.
    fn view(disk: u64, writes: &[u64]) -> Vec<u8> {
        let mut data = vec![0; writes.len() * UNIT];
        for (number, (bytes, &write)) in data.chunks_exact_mut(UNIT).zip(writes).enumerate() {
            if write > 0 {
                unit::fill(bytes, disk, number as u64, write);
            }
        }
        data
    }

    /// Write 1 on units 0 and 1 from 10 to 20; write 2 on unit 2 from 30 to 40.
    fn two_writes() -> Journal {
        let mut journal = Journal::new(3);
        let first = journal.issue(0..2, Kind::Stamps, 10);
        journal.acknowledge(0..2, first, 20);
        let second = journal.issue(2..3, Kind::Stamps, 30);
        journal.acknowledge(2..3, second, 40);
        journal
    }

    fn judge_one(journal: &Journal, instants: RangeInclusive<u64>, writes: &[u64]) -> Result<Seen, String> {
        let window = journal.window(instants.clone());
        judge(instants, UNIT, &[(0, &window, &view(0, writes))]).map(|mut all| all.remove(0))
    }

    #[test]
    fn views_of_any_instant_within_the_bounds_are_right() {
        let journal = two_writes();
        for good in [[0, 0, 0], [1, 1, 0], [1, 1, 2]] {
            assert!(judge_one(&journal, 5..=50, &good).is_ok(), "{good:?}");
        }
        assert!(judge_one(&journal, 25..=28, &[1, 1, 0]).is_ok());
    }

    #[test]
    fn a_write_that_was_acknowledged_before_must_be_there() {
        assert!(judge_one(&two_writes(), 25..=50, &[0, 0, 0]).is_err());
    }

    #[test]
    fn a_write_that_was_issued_afterwards_must_not_be_there() {
        assert!(judge_one(&two_writes(), 5..=25, &[1, 1, 2]).is_err());
    }

    #[test]
    fn an_effect_without_its_cause_is_found() {
        let error = judge_one(&two_writes(), 5..=50, &[0, 0, 2]).expect_err("2 came after 1 had ended");
        assert!(error.contains("leaves none of the instants"), "{error}");
    }

    #[test]
    fn an_effect_without_its_cause_is_found_on_another_disk() {
        let (mut one, mut two) = (Journal::new(1), Journal::new(1));
        let cause = one.issue(0..1, Kind::Stamps, 10);
        one.acknowledge(0..1, cause, 20);
        let effect = two.issue(0..1, Kind::Stamps, 30);
        two.acknowledge(0..1, effect, 40);
        let windows = (one.window(5..=50), two.window(5..=50));
        let judged = |first: u64, second: u64| {
            let views = (view(0, &[first]), view(1, &[second]));
            judge(5..=50, UNIT, &[(0, &windows.0, &views.0), (1, &windows.1, &views.1)])
        };
        assert!(judged(0, 0).is_ok() && judged(1, 0).is_ok() && judged(1, 1).is_ok());
        assert!(judged(0, 1).is_err());
    }

    #[test]
    fn half_a_request_is_found() {
        let error = judge_one(&two_writes(), 12..=18, &[1, 0, 0]).expect_err("half of write 1");
        assert!(error.contains("is in unit 0 and not in unit 1"), "{error}");
    }

    #[test]
    fn zeros_written_twice_may_be_either() {
        let mut journal = Journal::new(1);
        for at in [10, 30] {
            let zeros = journal.issue(0..1, Kind::Zeros, at);
            journal.acknowledge(0..1, zeros, at + 5);
        }
        assert_eq!(judge_one(&journal, 5..=50, &[0]), Ok(vec![0..=2]));
        assert_eq!(judge_one(&journal, 20..=50, &[0]), Ok(vec![1..=2]));
    }

    #[test]
    fn a_write_that_was_lost_may_be_there_or_not_and_in_part() {
        let mut journal = Journal::new(3);
        let first = journal.issue(0..3, Kind::Stamps, 10);
        assert!(judge_one(&journal, 50..=60, &[1, 0, 1]).is_err(), "still in flight");
        journal.lose(0..3, first);
        assert!(judge_one(&journal, 50..=60, &[1, 0, 1]).is_ok());
        assert!(journal.may_hold(0, None) && journal.may_hold(0, Some(1)) && !journal.may_hold(0, Some(2)));
        let second = journal.issue(0..3, Kind::Stamps, 70);
        journal.acknowledge(0..3, second, 80);
        assert!(judge_one(&journal, 90..=95, &[2, 2, 2]).is_ok());
        assert!(judge_one(&journal, 90..=95, &[1, 2, 2]).is_err());
    }

    #[test]
    fn what_is_forgotten_is_what_no_later_view_can_show() {
        let mut journal = two_writes();
        journal.forget(25);
        assert_eq!(judge_one(&journal, 25..=50, &[1, 1, 0]), Ok(vec![1..=1, 1..=1, 0..=0]));
        journal.forget(45);
        assert_eq!(judge_one(&journal, 45..=50, &[1, 1, 2]), Ok(vec![1..=1; 3]));
    }

    #[test]
    fn a_unit_that_is_newer_must_be_reported_and_none_may_go_back() {
        let (old, new) = (vec![0..=1, 3..=3], vec![1..=1, 4..=4]);
        assert!(judge_progress(&old, &new, |unit| unit == 1).is_ok());
        assert!(judge_progress(&old, &new, |unit| unit == 0).is_err());
        assert!(judge_progress(&new, &old, |_| true).is_err());
    }
}
