//! What a seed draws before the first life: host, disks, way of working, and which faults there may be.
//!
//! Invariant: everything comes from the one random sequence, in this order: a draw more, or at another place, is another
//! life for every seed.
//!
//! Absent: what is drawn between two lives; the rig does that as it goes.

use std::cell::{Cell, RefCell};
use std::io::ErrorKind;
use std::rc::Rc;
use std::sync::Arc;

use cow_engine::sim::{FileKind, OpKind, Random, Rule, Sim};
use cow_engine::{OnOverflow, Terms};
use ebbtide_tests::oracle::{Oracle, SECTOR};
use ebbtide_tests::overlay_oracle::OverlayOracle;

use super::{Clean, Profile, Rig, Spec};
use crate::work::{Mix, Shared};

impl<'a> Rig<'a> {
    pub(super) fn new(seed: u64, profile: Profile, place: &'a dyn Fn(&str)) -> Self {
        let mut random = Random::new(seed ^ 0x5eed);
        let sim = Sim::new(seed);
        sim.set_defect(profile.defect);
        let unmap_works = !random.one_in(4);
        sim.set_zeroing(unmap_works, !random.one_in(3));
        let mut oracle = Oracle::default();
        let (mut specs, mut images, mut spots) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..random.within(1..3) {
            let small = profile.restless && !random.one_in(3) || random.one_in(3);
            let sectors = match small {
                true => random.within(16..1200),
                false => random.within(8200..12000),
            };
            let sectors = if random.one_in(3) { sectors } else { sectors / 8 * 8 };
            let capacity = sectors * SECTOR as u64;
            let first = *random.pick(&[4096, 4096, 4096, 8192, 65536]);
            let mut blocks = vec![first];
            if (profile.restless || profile.verbs) && !random.one_in(4) || random.one_in(5) {
                blocks.push(*random.pick(&[0, 4096, 16384, 65536]));
            }
            oracle.add_disk(capacity);
            images.push(sim.add_image(capacity));
            // The end, a border of a page of the map, and anywhere.
            let border = (first * 1024 / SECTOR as u64).min(sectors - 1);
            let mut near = vec![0, sectors - 1, border, border];
            near.extend((0..random.within(1..4)).map(|_| random.below(sectors)));
            spots.push(near);
            specs.push(Spec {
                dir: sim.add_dir(),
                block: first,
                blocks,
                clean: Clean::No,
                power: false,
                edited: false,
                unseen: false,
                loose: false,
                quiet: false,
                rewinding: false,
                lossy: false,
                map_lost: false,
                damaged: false,
                attempts: 0,
                other_block: false,
                places: sim.add_dir(),
                areas: random.index(3),
            });
        }
        let mut weight = |of: &[u64]| *random.pick(of);
        let mix = Mix {
            read: weight(&[0, 2, 6]),
            write: weight(&[6, 10]),
            discard: weight(&[0, 1, 3]),
            zeroes: weight(&[0, 1, 3]),
            flush: weight(&[0, 1, 3]),
            fua: weight(&[0, 3, 10]),
            long: weight(&[0, 30, 100]),
            mark: weight(&[0, 5, 20]),
        };
        let rules = if profile.faults { rules(&mut random, profile) } else { Vec::new() };
        let (rules, terms) = if profile.short { short_of_space(&mut random) } else { (rules, Vec::new()) };
        let faults = profile.faults || !rules.is_empty();
        let profile = Profile { faults, ..profile };
        let shared = Rc::new(Shared {
            io: sim.storage(),
            oracle: RefCell::new(oracle),
            overlays: RefCell::new(OverlayOracle::default()),
            closing: Cell::new(false),
            failed_syncs: images.iter().map(|_| Cell::new(0)).collect(),
            images,
            spots,
            spread: *random.pick(&[8, 40, 40]),
            strict: !profile.faults && !profile.damage,
            rewinds: profile.rewinds,
            damaged: profile.damage,
            checkpoints: if profile.checkpoints { 2 } else { *random.pick(&[0, 4, 12]) },
            reverts: Cell::new(0),
            let_go: RefCell::default(),
            exact: profile.short && terms.iter().all(|one: &Terms| one.on_overflow == OnOverflow::FailWrites),
            terms,
            next_area: Cell::new(0),
            places: specs.iter().map(|spec| spec.places).collect(),
            unmap_works,
            // What of a resize that was cut off is lost with a superblock the oracle does not follow.
            resets: match () {
                () if profile.damage => 0,
                () if profile.verbs => *random.pick(&[0, 2]),
                () => *random.pick(&[0, 3, 10]),
            },
            resizes: match () {
                () if profile.damage => 0,
                () if profile.verbs => *random.pick(&[0, 2, 2]),
                () => *random.pick(&[0, 4, 12]),
            },
            cuts: if profile.verbs || profile.deletes { 3 } else { *random.pick(&[0, 8, 30]) },
            deletes: profile.deletes,
            slips: if profile.faults { 5 } else { 0 },
            doomed: RefCell::default(),
            next_name: Cell::new(0),
            broke: Arc::default(),
            hunted: Cell::new(None),
            releases: if profile.releases { 8 } else { *random.pick(&[0, 0, 0, 3]) },
        });
        let merge_step = *random.pick(&[1, 3, 10, 100]);
        // Small ones stay cold where nothing is changed, so that what is missing shows.
        let region_bytes = *random.pick(&[4096, 16 << 10, 64 << 10, 1 << 20]);
        let region_bytes = if profile.verbs { 4096 } else { region_bytes };
        let spared = if profile.damage { *random.pick(&["superblock", "rewind"]) } else { "" };
        let round = 0;
        Self {
            sim,
            shared,
            specs,
            random,
            profile,
            rules,
            mix,
            merge_step,
            region_bytes,
            spared,
            after_loose: false,
            place,
            round,
        }
    }
}

/// Index and store have no space now and then, or never but by limits; and on which terms snapshots are held.
fn short_of_space(random: &mut Random) -> (Vec<Rule>, Vec<Terms>) {
    let rule =
        |one_in| Rule { op: OpKind::Write, file: FileKind::State, one_in, error: ErrorKind::StorageFull };
    let rules = if random.one_in(2) { vec![rule(*random.pick(&[6, 12, 40]))] } else { Vec::new() };
    use OnOverflow::{BreakSnapshot, FailWrites, HoldWrites};
    let choices: [&[OnOverflow]; 5] = [
        &[FailWrites][..],
        &[FailWrites],
        &[HoldWrites],
        &[BreakSnapshot],
        &[BreakSnapshot, HoldWrites, FailWrites],
    ];
    let policies = *random.pick(&choices);
    let terms = policies.iter().map(|&on_overflow| Terms { on_overflow, ..Terms::default() });
    (rules, terms.collect())
}

/// Some kinds of fault, each now and then.
fn rules(random: &mut Random, profile: Profile) -> Vec<Rule> {
    use {FileKind::Image, FileKind::State};
    // What is closed in order but for an overlay.
    let of_overlays =
        [(OpKind::Sync, State, ErrorKind::Other, 6), (OpKind::SyncCells, State, ErrorKind::Other, 3)];
    let of_verbs = [
        (OpKind::SetLen, Image, ErrorKind::Other, 2),
        (OpKind::Allocate, State, ErrorKind::StorageFull, 2),
        (OpKind::Sync, State, ErrorKind::Other, 4),
        (OpKind::Write, State, ErrorKind::Other, 8),
    ];
    let of_deletes = [
        (OpKind::Remove, State, ErrorKind::Other, 2),
        (OpKind::Create, State, ErrorKind::StorageFull, 3),
        (OpKind::Write, State, ErrorKind::Other, 30),
        (OpKind::Read, Image, ErrorKind::Other, 100),
    ];
    let own: &[_] = match () {
        () if profile.overlays => &of_overlays,
        () if profile.verbs => &of_verbs,
        () if profile.deletes => &of_deletes,
        () => &[],
    };
    // What breaks snapshots is where most can go wrong.
    let kinds = [
        (OpKind::Write, State, ErrorKind::StorageFull, 12),
        (OpKind::Write, State, ErrorKind::StorageFull, 40),
        (OpKind::Write, State, ErrorKind::StorageFull, 100),
        (OpKind::Write, State, ErrorKind::Other, 200),
        (OpKind::Read, Image, ErrorKind::Other, 50),
        (OpKind::Read, State, ErrorKind::Other, 100),
        (OpKind::Read, Image, ErrorKind::Other, 200),
        (OpKind::Write, Image, ErrorKind::Other, 50),
        (OpKind::Zero, Image, ErrorKind::Other, 20),
        (OpKind::Sync, Image, ErrorKind::Other, 5),
        (OpKind::Sync, Image, ErrorKind::Other, 20),
        (OpKind::Sync, State, ErrorKind::Other, 20),
        (OpKind::Create, State, ErrorKind::StorageFull, 6),
        (OpKind::Remove, State, ErrorKind::Other, 4),
        (OpKind::Open, State, ErrorKind::Other, 30),
        (OpKind::SyncCells, State, ErrorKind::Other, 6),
        (OpKind::SyncDir, State, ErrorKind::Other, 6),
        (OpKind::Allocate, State, ErrorKind::StorageFull, 3),
        (OpKind::SetLen, Image, ErrorKind::Other, 2),
        (OpKind::SetLen, State, ErrorKind::Other, 2),
    ];
    let lost = Rule {
        op: OpKind::WriteBack,
        file: State,
        one_in: *random.pick(&[20, 100, 400]),
        error: ErrorKind::Other,
    };
    let lost = random.one_in(3).then_some(lost);
    (0..random.within(1..5))
        .map(|_| {
            let more = !own.is_empty() && random.one_in(2);
            let &(op, file, error, one_in) = random.pick(if more { own } else { &kinds });
            Rule { op, file, one_in, error }
        })
        .chain(lost)
        .collect()
}
