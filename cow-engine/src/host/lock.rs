//! Locks on an image that QEMU's tools understand.
//!
//! QEMU marks what it does with an image by shared open-file-description locks on single bytes
//! (block/file-posix.c): byte `100 + permission` for each permission used, `200 + permission` for
//! each that others may not have. We hold the same, so that `qemu-img` and a second daemon refuse
//! an image in use, and we refuse one that they use.
//!
//! The lock is also the fence against our own past: it lives until the last I/O of a dead process
//! has ended, so whoever gets it writes after everything that process wrote.

use std::io;
use std::os::fd::AsRawFd;

use super::file::HostFile;

const USED: i64 = 100;
const UNSHARED: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a disk does with its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads, and lets nobody write or resize.
    ReadOnly,
    /// Reads and writes, and lets nobody else write or resize.
    ReadWrite,
}

/// Why an image could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else has it.
    #[error("the image '{path}' is in use by {holder}: stop that first")]
    Held {
        /// The image.
        path: String,
        /// Who, as far as one can know.
        holder: String,
        /// Whether the holder is a living process; if not, one that ended may still have I/O in flight.
        living: bool,
    },
    /// The system refused.
    #[error("cannot lock the image '{path}'")]
    Io {
        /// The image.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl HostFile {
    /// Takes the locks for `access`; they last until the file is closed and its I/O has ended.
    ///
    /// # Errors
    /// [`LockError::Held`] if someone's locks conflict: one may try again, since a process that was
    /// killed keeps its locks until its last I/O has ended.
    pub fn lock_image(&self, access: Access) -> Result<(), LockError> {
        let path = self.path().display().to_string();
        let fail = |source| LockError::Io { path: path.clone(), source };
        let (held, tested): (&[i64], &[i64]) = match access {
            Access::ReadOnly => (
                &[USED + READ, UNSHARED + WRITE, UNSHARED + RESIZE],
                &[UNSHARED + READ, USED + WRITE, USED + RESIZE],
            ),
            Access::ReadWrite => (
                &[USED + READ, USED + WRITE, UNSHARED + WRITE, UNSHARED + RESIZE],
                &[UNSHARED + READ, UNSHARED + WRITE, USED + WRITE, USED + RESIZE],
            ),
        };
        for &byte in held {
            if let Err(error) = self.ofd(libc::F_OFD_SETLK, byte, libc::F_RDLCK) {
                let busy = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES));
                self.unlock(held);
                return Err(if busy { self.held_by(byte) } else { fail(error) });
            }
        }
        for &byte in tested {
            // Asked for as a write lock, so that others' shared locks answer; never taken.
            let answer = self.ofd(libc::F_OFD_GETLK, byte, libc::F_WRLCK).map_err(fail)?;
            if i32::from(answer.l_type) != libc::F_UNLCK {
                self.unlock(held);
                return Err(self.held_by(byte));
            }
        }
        Ok(())
    }

    fn unlock(&self, bytes: &[i64]) {
        for &byte in bytes {
            let _ = self.ofd(libc::F_OFD_SETLK, byte, libc::F_UNLCK);
        }
    }

    fn ofd(&self, command: i32, byte: i64, kind: i32) -> io::Result<libc::flock> {
        let kind = libc::c_short::try_from(kind).map_err(io::Error::other)?;
        let mut lock = libc::flock {
            l_type: kind,
            l_whence: 0, // SEEK_SET
            l_start: byte,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the command reads and writes one `flock`, which `lock` is.
        // JUSTIFICATION: no crate in use offers open-file-description locks.
        let answer = unsafe { libc::fcntl(self.file.as_raw_fd(), command, &raw mut lock) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(lock) }
    }

    fn held_by(&self, byte: i64) -> LockError {
        let path = self.path().display().to_string();
        let holders = self.holders();
        let living = holders.is_some();
        let holder = holders.unwrap_or_else(|| format!("another process (lock on byte {byte})"));
        LockError::Held { path, holder, living }
    }

    /// Processes that have this image open, from /proc: open-file-description locks name nobody.
    fn holders(&self) -> Option<String> {
        use std::os::unix::fs::MetadataExt;
        let own = self.file.metadata().ok()?;
        let own = (own.dev(), own.ino());
        let mut found = Vec::new();
        for process in std::fs::read_dir("/proc").ok()?.flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            if pid == std::process::id() {
                continue;
            }
            let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
            let holds = descriptors
                .flatten()
                .any(|fd| std::fs::metadata(fd.path()).is_ok_and(|open| (open.dev(), open.ino()) == own));
            if holds {
                let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                found.push(format!("process {pid} ({})", name.trim()));
            }
        }
        (!found.is_empty()).then(|| found.join(", "))
    }
}
