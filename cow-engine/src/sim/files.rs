//! A directory of a simulated host, as [`crate::inspect`] looks at it: what a process that begins now would find.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::rc::Rc;

use super::storage::SimDir;
use super::world::World;
use crate::inspect::Files;

/// See the module.
pub struct SimFiles {
    world: Rc<RefCell<World>>,
    dir: SimDir,
}

impl SimFiles {
    pub(super) fn new(world: Rc<RefCell<World>>, dir: SimDir) -> Self {
        Self { world, dir }
    }

    fn with<T>(&self, name: &str, ask: impl FnOnce(&super::medium::File) -> T) -> io::Result<T> {
        let world = self.world.borrow();
        let file = world.dirs[self.dir.index()].names.get(name).and_then(|id| world.files.get(id));
        file.map(ask).ok_or_else(|| ErrorKind::NotFound.into())
    }
}

impl Files for SimFiles {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.world.borrow().dirs[self.dir.index()].names.keys().cloned().collect())
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        self.with(name, |file| file.len)
    }

    fn read(&self, name: &str, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(name, |file| {
            if at + out.len() as u64 > file.len {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            file.read_mapped(at, out);
            Ok(())
        })?
    }

    fn data_from(&self, _name: &str, at: u64) -> io::Result<Option<u64>> {
        Ok(Some(at))
    }
}
