//! The look from outside before an opening, and that the opening agrees with it.
//!
//! Invariant: a look changes nothing, and is taken before every opening: what it says does not depend on what comes after.
//!
//! Absent: what the oracle allows; the rig asks it of what was opened.

use cow_engine::inspect::{Around, Fact, Finding, Grade, Inspection, Value};
use cow_engine::{Meanwhile, OpenReport, ResetReason};

use super::{Rig, Spec};
use crate::work::SimDisk;

impl Rig<'_> {
    /// What a look from outside finds wrong, by disk.
    pub(super) fn look(&self) -> Vec<Vec<Finding>> {
        let of = |(at, spec): (usize, &Spec)| {
            let mut inspection = Inspection::read(&self.sim.files(spec.dir)).expect("no faults now");
            let held = self.shared.images[at];
            if !spec.damaged {
                let len = self.shared.io.identity(held).len;
                let sizes = known_sizes(&inspection);
                assert!(sizes.is_empty() || sizes.contains(&len), "disk {at} has {len} bytes, not {sizes:?}");
            }
            inspection.compare_image(|from, out| {
                self.sim.look(held, from, out);
                Ok(())
            });
            let Meanwhile { boot_began_ns, medium, .. } = self.shared.io.meanwhile();
            let image = Some(self.shared.io.identity(held));
            let boot = Some(self.sim.boot());
            inspection.findings(&Around { image, boot, boot_began_ns, medium: Some(medium) })
        };
        self.specs.iter().enumerate().map(of).collect()
    }

    /// Opening gives up what the look before it said, and nothing else.
    pub(super) fn agrees(&self, looked: &[Vec<Finding>], opened: &[(SimDisk, OpenReport)], blocks: &[u64]) {
        for (at, (disk, report)) in opened.iter().enumerate() {
            let (spec, found) = (&self.specs[at], &looked[at]);
            let wrong: Vec<&Finding> = found.iter().filter(|one| one.grade == Grade::Wrong).collect();
            let anew = wrong.iter().any(|one| one.opening.starts_with("a new generation"));
            assert!(wrong.iter().all(|one| one.code != "rewind-lost"), "disk {at} was opened: {found:?}");
            let first = |one: &Finding| one.code == "first-start" || one.opening == "it becomes one";
            let begun = !found.iter().any(first);
            let given_up = matches!(
                report.reset,
                Some(ResetReason::Damaged | ResetReason::HostStopped | ResetReason::ImageChanged)
            );
            let what = || format!("disk {at}: {found:?}, {report:?}");
            if blocks[at] == spec.block && !spec.other_block && begun {
                assert!(anew || !given_up, "{}", what());
                assert!(!anew || report.reset.is_some(), "{}", what());
            }
            assert!(report.dropped.is_empty() || !wrong.is_empty(), "disk {at}: {found:?}, {report:?}");
            for snapshot in disk.snapshots().iter().filter(|snapshot| snapshot.broken().is_some()) {
                let name = format!("'{}'", snapshot.name());
                assert!(
                    wrong.iter().any(|one| one.lost.contains(&name)),
                    "disk {at}: {name} broke: {found:?}"
                );
            }
            let disturbed = self.profile.faults || self.profile.damage || self.profile.short;
            let quiet = !spec.power && !spec.edited && !disturbed;
            assert!(wrong.is_empty() || !quiet || !begun, "disk {at}: {wrong:?}");
        }
    }
}

/// The lengths of its image that the newest superblock knows; none if there is no superblock.
fn known_sizes(inspection: &Inspection) -> Vec<u64> {
    let number = |fact: &Fact, name: &str| {
        let mut named = fact.fields.iter().filter(|(field, _)| *field == name);
        named.find_map(|(_, value)| if let Value::Number(number) = value { Some(*number) } else { None })
    };
    let facts = inspection.facts();
    let newest = facts
        .iter()
        .filter(|fact| fact.structure == "superblock")
        .max_by_key(|fact| number(fact, "sequence"));
    let sizes = |fact| ["capacity", "growing_to"].into_iter().filter_map(move |name| number(fact, name));
    newest.into_iter().flat_map(sizes).collect()
}
