//! What must be so of checkpoints.
//!
//! - One that was answered is there until its deletion is commanded, over kills and power cuts, with the change
//!   id of its snapshot; unless its file was damaged. A creation that was cut off came to all disks or to none.
//! - What it answers is judged as its snapshot's answers are, and is the same: those that were given while the
//!   snapshot was held, and before any crash.

use std::collections::BTreeMap;

use cow_engine::cbt::ChangeId;

use super::{Fate, Oracle, Verdict};

/// An instant that got a name, on one or more disks.
#[derive(Clone, Debug)]
pub struct Named {
    /// Its name.
    pub name: String,
    /// The snapshot whose instant it is.
    pub group: usize,
    /// By disk.
    pub fates: BTreeMap<usize, Fate>,
    /// A crash cut its creation off, and nobody has looked since.
    cut: bool,
}

impl Oracle {
    /// A checkpoint's command begins; its index.
    pub fn begin_checkpoint(&mut self, name: &str, group: usize, disks: &[usize]) -> usize {
        let fates = disks.iter().map(|&disk| (disk, Fate::Creating)).collect();
        self.named.push(Named { name: name.to_owned(), group, fates, cut: false });
        self.named.len() - 1
    }

    /// A checkpoint's command was answered.
    pub fn named(&mut self, named: usize, fate: Fate) {
        self.named[named].fates.values_mut().for_each(|held| *held = fate);
    }

    /// Everything in flight was cut off.
    pub(super) fn cut_checkpoints(&mut self) {
        for one in &mut self.named {
            one.cut |= one.fates.values().any(|&fate| fate == Fate::Creating);
            for fate in one.fates.values_mut().filter(|fate| matches!(fate, Fate::Creating | Fate::Deleting))
            {
                *fate = Fate::Unknown;
            }
        }
    }

    /// Checkpoints of a disk of which `fate` is true, as indexes.
    pub fn named_of(&self, disk: usize, fate: impl Fn(Fate) -> bool) -> Vec<usize> {
        let has = |one: &Named| one.fates.get(&disk).is_some_and(|&held| fate(held));
        self.named.iter().enumerate().filter(|(_, one)| has(one)).map(|(at, _)| at).collect()
    }

    /// The change id of a checkpoint.
    pub fn id_of(&self, named: usize, disk: usize) -> Option<ChangeId> {
        self.groups[self.named[named].group].members[&disk].id
    }

    /// A disk was opened and has these checkpoints. `may_be_gone`: its files were damaged.
    pub fn checkpoints_found(
        &mut self,
        disk: usize,
        found: &BTreeMap<String, ChangeId>,
        may_be_gone: bool,
    ) -> Verdict {
        for at in 0..self.named.len() {
            if !self.named[at].fates.contains_key(&disk) {
                continue;
            }
            let id = self.id_of(at, disk);
            let one = &mut self.named[at];
            let Some(fate) = one.fates.get_mut(&disk) else { continue };
            let there = found.get(&one.name);
            match (*fate, there) {
                (Fate::Gone, Some(_)) => {
                    return Err(format!("disk {disk}: checkpoint {} is there again", one.name));
                }
                (Fate::Held, None) if !may_be_gone => {
                    return Err(format!("disk {disk}: checkpoint {} is gone", one.name));
                }
                (_, Some(there)) if Some(*there) != id => {
                    return Err(format!("disk {disk}: checkpoint {} is of {there}, not of {id:?}", one.name));
                }
                _ => *fate = if there.is_some() { Fate::Held } else { Fate::Gone },
            }
        }
        let known =
            |name: &String| self.named.iter().any(|one| one.name == *name && one.fates.contains_key(&disk));
        match found.keys().find(|name| !known(name)) {
            Some(name) => Err(format!("disk {disk}: checkpoint {name} was never made")),
            None => Ok(()),
        }
    }

    /// After all disks were looked at: a creation that was cut off came to all disks or to none.
    pub fn check_named(&mut self, strict: bool) -> Verdict {
        for one in &mut self.named {
            if !std::mem::take(&mut one.cut) || !strict {
                continue;
            }
            let there = one.fates.values().filter(|&&fate| fate == Fate::Held).count();
            if there != 0 && there != one.fates.len() {
                return Err(format!("checkpoint {} is on some of its disks only", one.name));
            }
        }
        Ok(())
    }
}
