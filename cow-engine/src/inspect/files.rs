//! The files of a state directory, for reading only.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The files of a state directory.
pub trait Files {
    /// Their names.
    ///
    /// # Errors
    /// Those of the directory.
    fn names(&self) -> io::Result<Vec<String>>;

    /// Bytes of a file.
    ///
    /// # Errors
    /// `NotFound`, and those of the file; also for what is no regular file.
    fn len(&self, name: &str) -> io::Result<u64>;

    /// Fills `out` from byte `at` of a file.
    ///
    /// # Errors
    /// Those of the file; `UnexpectedEof` past its end.
    fn read(&self, name: &str, at: u64, out: &mut [u8]) -> io::Result<()>;

    /// Where the next data of a file is from byte `at` on; `None` if there is none. What lies between
    /// reads as zeros.
    ///
    /// # Errors
    /// Those of the file.
    fn data_from(&self, name: &str, at: u64) -> io::Result<Option<u64>>;
}

/// A state directory of this host. Nothing in it is opened for writing.
#[derive(Debug)]
pub struct HostFiles {
    path: PathBuf,
}

impl HostFiles {
    /// The directory at `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn open(&self, name: &str) -> io::Result<File> {
        // Neither a link out of the directory nor a pipe that nobody writes to.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(self.path.join(name))?;
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file"))
        }
    }
}

impl Files for HostFiles {
    fn names(&self) -> io::Result<Vec<String>> {
        let entries: io::Result<Vec<_>> = std::fs::read_dir(&self.path)?.collect();
        let mut names: Vec<String> =
            entries?.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        Ok(names)
    }

    fn len(&self, name: &str) -> io::Result<u64> {
        Ok(self.open(name)?.metadata()?.len())
    }

    fn read(&self, name: &str, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.open(name)?.read_exact_at(out, at)
    }

    fn data_from(&self, name: &str, at: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(self.open(name)?, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A file system that does not tell holes: all is data.
            Err(rustix::io::Errno::INVAL) => Ok(Some(at)),
            Err(error) => Err(error.into()),
        }
    }
}
