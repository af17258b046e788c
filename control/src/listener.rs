//! The socket's file: how it comes to be, whose it is, and how it goes.
//!
//! What always holds: the file has mode 0600 from the moment it exists, whatever the umask;
//! the socket of a daemon that lives is never taken over; that of a dead one is, and two
//! daemons that start at once do not both win.
//!
//! The mode: on Linux, `bind` gives the file the mode of the socket's own inode (net/unix,
//! unix_bind_bsd), so `fchmod` on the unbound socket leaves no moment at which others may
//! connect. A `bind` followed by a `chmod` would.
//!
//! The takeover: under an exclusive `flock` on the directory, connect to what is there; only if
//! the kernel says that nobody listens is it removed. Price: whoever may open the directory can
//! hold that lock, so after two seconds the start fails instead of waiting.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 64;

/// How long to wait for another daemon that is just starting.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Why a control socket could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Another process listens there.
    #[error(
        "another daemon listens on {}: stop it, or give this one another socket with --control",
        path.display()
    )]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// Something that is no socket has the name.
    #[error("{} exists and is no socket: remove it, or choose another path with --control", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel has no room for a path this long.
    #[error("{} is too long for a socket: at most 107 bytes; choose another path with --control", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Another process holds the lock on the socket's directory.
    #[error("{} is locked by another process: is a daemon starting there?", directory.display())]
    Locked {
        /// The directory.
        directory: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A control socket that clients can connect to already; they are served once a
/// [`Server`](crate::Server) runs on it. So a daemon listens first and recovers then.
///
/// Dropping it removes the file.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file made here: never remove another one. The bound socket
    /// keeps the inode alive, so no other file gets its number meanwhile.
    identity: (u64, u64),
}

impl Listener {
    /// Makes the socket at `path`, and its directory with mode 0700 if only that is missing.
    ///
    /// # Errors
    /// See [`BindError`]; each says what to do.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |what| move |source: io::Error| BindError::Io { what, path: path.to_owned(), source };
        let errno = |what| move |error: Errno| failed(what)(error.into());
        let address = SocketAddrUnix::new(path).map_err(|error| match error {
            Errno::NAMETOOLONG => BindError::PathTooLong { path: path.to_owned() },
            other => errno("use the path")(other),
        })?;

        let _lock = lock_directory(path)?;
        remove_if_dead(path, &address)?;

        let socket = bind_private(&address).map_err(errno("listen on"))?;
        let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
        if metadata.permissions().mode() & 0o777 != 0o600 {
            // An umask that takes from the owner: the file is too narrow, never too wide.
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))
                .map_err(failed("set the mode of"))?;
        }
        let listener = Self {
            socket: UnixListener::from(socket),
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        rustix::net::listen(&listener.socket, BACKLOG).map_err(errno("listen on"))?;
        Ok(listener)
    }

    /// The socket's path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Removes the file, if it is still the one made here.
    ///
    /// Done while still listening: a daemon that starts meanwhile sees either our live socket
    /// or none, and never has its own removed.
    pub(crate) fn remove(&self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A socket bound to `address`, its file for the owner alone and never for anyone else.
fn bind_private(address: &SocketAddrUnix) -> rustix::io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, address)?;
    Ok(socket)
}

/// Locks the directory that `path` is in until the result is dropped.
fn lock_directory(path: &Path) -> Result<File, BindError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |what, source| BindError::Io { what, path: directory.to_owned(), source };
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed("make the directory", error));
        }
        _ => {}
    }
    let file = File::open(directory).map_err(|error| failed("open the directory", error))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(BindError::Locked { directory: directory.to_owned() });
            }
            Err(error) => return Err(failed("lock the directory", error.into())),
        }
    }
}

/// Makes room for a socket at `path`: nothing is there, or a socket that nobody listens on.
fn remove_if_dead(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let failed = |what| move |source: io::Error| BindError::Io { what, path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|error| failed("make a socket to look at")(error.into()))?;
    match rustix::net::connect(&probe, address) {
        // WOULDBLOCK: it listens, and its backlog is full.
        Ok(()) | Err(Errno::WOULDBLOCK) => Err(BindError::InUse { path: path.to_owned() }),
        Err(Errno::CONNREFUSED) => {
            log::info!("replacing {}, left by a daemon that is gone", path.display());
            fs::remove_file(path).map_err(failed("remove the old socket"))
        }
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("connect to the socket found at")(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_socket_is_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sub/c.sock");
        let listener = Listener::bind(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(listener.path()), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_file_is_never_wider_than_that() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.sock");
        let _socket = bind_private(&SocketAddrUnix::new(&path).unwrap()).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o177, 0);
    }

    #[test]
    fn the_socket_of_a_dead_daemon_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _listener = Listener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_socket_of_a_live_daemon_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.sock");
        let _live = Listener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for path in [&path, &link] {
            let error = Listener::bind(path).unwrap_err();
            assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_path_too_long_is_an_error_that_says_so() {
        let path = Path::new("/tmp").join("x".repeat(200));
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::PathTooLong { .. }), "{error}");
    }

    #[test]
    fn the_file_goes_with_its_listener_unless_it_is_anothers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.sock");
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists());

        let ours = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn of_daemons_that_start_at_once_one_wins() {
        let directory = tempfile::tempdir().unwrap();
        let path = &directory.path().join("c.sock");
        drop(UnixListener::bind(path).unwrap());
        let won: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| Listener::bind(path))).collect();
            starts.into_iter().map(|s| s.join().unwrap()).collect()
        });
        assert_eq!(won.iter().filter(|result| result.is_ok()).count(), 1);
    }
}
