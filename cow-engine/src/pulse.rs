//! The signs of life that a daemon gives while it serves a disk; [`crate::away`] says what for.
//!
//! Absent: who calls, and when. About once a second, whatever else the process does.

use std::io;

use crate::disk::Disk;
use crate::storage::Storage;
use crate::tracker::Identity;

impl<S: Storage> Disk<S> {
    /// Gives a sign of life. No two at a time.
    ///
    /// `now_ns` is the time of day in nanoseconds since 1970; `identity` asks the image. Answers whether nothing
    /// was in flight: then any later change of the image is known to be somebody else's, until the next change
    /// of a guest.
    ///
    /// # Errors
    /// Those of `identity`; no sign was given then.
    pub fn beat(&self, now_ns: i64, identity: impl FnOnce() -> io::Result<Identity>) -> io::Result<bool> {
        self.control.arm();
        let still = self.meanwhile.settles && self.gate.is_empty();
        let identity = identity().inspect_err(|_| {
            self.control.settle(None);
        })?;
        let tag = self.control.give_sign(&self.boot(), now_ns, identity.mtime_ns);
        Ok(self.control.settle(still.then_some(tag)))
    }
}
