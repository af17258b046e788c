//! Files and directories of a host, and what was asked of the kernel about them once.
//!
//! Invariant: alignment, engine and size are read when a file is opened; nothing asks again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::areas::{AreaKind, OpenedArea};
use crate::away::Meanwhile;
use crate::memory::Segment;

/// How transfers of a file are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Engine {
    /// Through the ring: the device works while the thread goes on.
    Uring,
    /// By a plain system call on the spot. For memory-backed and page-cached files, which io_uring
    /// would hand to worker threads (tmpfs writes, buffered ext4 writes): the copy is cheaper than
    /// the hand-over.
    Inline,
}

/// What direct I/O asks of a transfer, in bytes (`statx` DIOALIGN); 1 where nothing is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) memory: usize,
    pub(super) offset: u64,
}

/// What kind of thing an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
}

/// An open file or block device of the host.
#[derive(Debug)]
pub struct HostFile {
    pub(super) file: File,
    pub(super) engine: Engine,
    pub(super) alignment: Alignment,
    path: PathBuf,
    backing: Backing,
    len: u64,
    direct: bool,
}

/// How to open a disk's image.
#[derive(Clone, Copy, Debug)]
pub struct ImageOptions {
    /// Open for reading only.
    pub read_only: bool,
    /// Bypass the page cache where the kernel and the file system can.
    pub direct: bool,
    /// Smallest unit of the guest's transfers in bytes: 512 or 4096.
    pub logical_block_bytes: u32,
}

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenImageError {
    /// The image is not there.
    #[error("there is no image at '{}': create it first, for example with 'truncate -s 10G FILE'", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It is something that cannot be a disk.
    #[error("'{}' is neither a regular file nor a block device", path.display())]
    NotAnImage {
        /// What was opened.
        path: PathBuf,
    },
    /// Its size does not make whole blocks.
    #[error("'{}' is {len} bytes long, which is no multiple of the block size {block}: extend it, for example with 'truncate -s %{block} FILE'", path.display())]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Logical block size in bytes.
        block: u32,
    },
    /// It has no bytes at all.
    #[error("'{}' is empty: give it a size, for example with 'truncate -s 10G FILE'", path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot open the image '{}'", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl HostFile {
    /// Opens a disk's image and learns how to transfer to it.
    pub fn open_image(path: &Path, options: ImageOptions) -> Result<Self, OpenImageError> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenImageError::Missing { path: path.into() },
            _ => OpenImageError::Io { path: path.into(), source },
        };
        let metadata = std::fs::metadata(path).map_err(fail)?;
        let backing = if metadata.file_type().is_block_device() {
            Backing::BlockDevice
        } else if metadata.is_file() {
            Backing::File
        } else {
            return Err(OpenImageError::NotAnImage { path: path.into() });
        };
        let open = |flags: i32| {
            OpenOptions::new().read(true).write(!options.read_only).custom_flags(flags).open(path)
        };
        let mut file = open(0).map_err(fail)?;
        let mut alignment = Alignment { memory: 1, offset: 1 };
        let mut engine = Engine::Inline;
        let mut direct = false;
        if !is_in_memory(&file).map_err(fail)? {
            engine = Engine::Uring;
            if options.direct {
                match direct_alignment(&file).map_err(fail)? {
                    Some(asked) if asked.offset <= u64::from(options.logical_block_bytes) => {
                        match open(libc::O_DIRECT) {
                            Ok(opened) => (file, alignment, direct) = (opened, asked, true),
                            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => log::warn!(
                                "{}: no direct I/O on this file system; using the page cache",
                                path.display()
                            ),
                            Err(error) => return Err(fail(error)),
                        }
                    }
                    Some(asked) => log::warn!(
                        "{}: direct I/O needs blocks of {} bytes; using the page cache, or serve the disk with logical-block-size={}",
                        path.display(),
                        asked.offset,
                        asked.offset
                    ),
                    None => log::warn!("{}: no direct I/O here; using the page cache", path.display()),
                }
            }
        }
        let len = length_of(&file, backing).map_err(fail)?;
        if len == 0 {
            return Err(OpenImageError::Empty { path: path.into() });
        }
        if len % u64::from(options.logical_block_bytes) != 0 {
            return Err(OpenImageError::OddSize {
                path: path.into(),
                len,
                block: options.logical_block_bytes,
            });
        }
        Ok(Self { file, engine, alignment, path: path.into(), backing, len, direct })
    }

    /// A file of a state directory: through the page cache, so that what was written outlives the
    /// process without waiting for a device.
    fn state(file: File, path: PathBuf) -> Self {
        Self {
            file,
            engine: Engine::Inline,
            alignment: Alignment { memory: 1, offset: 1 },
            path,
            backing: Backing::File,
            len: 0,
            direct: false,
        }
    }

    /// Length in bytes when it was opened.
    pub fn len_at_open(&self) -> u64 {
        self.len
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What kind of thing it is.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Whether transfers bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// What tells this file from others and whether it changed: see [`crate::Identity`].
    ///
    /// The node of a block device says nothing of its content. In place of a modification time stands
    /// what the kernel counted as written and discarded since the device appeared, and in place of an
    /// inode the boot, so that a device is never taken for unchanged across boots.
    pub fn identity(&self) -> io::Result<crate::tracker::Identity> {
        let metadata = self.file.metadata()?;
        let len = length_of(&self.file, self.backing)?;
        if self.backing == Backing::BlockDevice {
            let (device, mtime_ns) = (metadata.rdev(), sectors_changed(metadata.rdev())?);
            return Ok(crate::tracker::Identity { device, inode: boot_number()?, len, mtime_ns });
        }
        let mtime = metadata.mtime().wrapping_mul(1_000_000_000).wrapping_add(metadata.mtime_nsec());
        Ok(crate::tracker::Identity { device: metadata.dev(), inode: metadata.ino(), len, mtime_ns: mtime })
    }

    /// What the host says of this image, to tell whether it was changed meanwhile: see [`crate::Meanwhile`].
    pub fn meanwhile(&self) -> io::Result<Meanwhile> {
        let now_ns = now_ns();
        let boot_began_ns = std::fs::read_to_string("/proc/uptime").ok().and_then(|text| {
            let seconds: f64 = text.split_whitespace().next()?.parse().ok()?;
            Some(now_ns - i64::try_from(Duration::try_from_secs_f64(seconds).ok()?.as_nanos()).ok()?)
        });
        let medium = match self.backing {
            Backing::File => file_system_of(&self.file)?,
            Backing::BlockDevice => names_of_device(self.file.metadata()?.rdev()),
        };
        let local = self.backing == Backing::File && is_local(&self.file)?;
        Ok(Meanwhile { now_ns, boot_began_ns, medium, settles: self.direct || local, assume_changed: false })
    }

    /// Whether direct I/O takes this transfer as it is.
    pub(super) fn takes(&self, at: u64, segments: &[Segment]) -> bool {
        let Alignment { memory, offset } = self.alignment;
        if memory <= 1 && offset <= 1 {
            return true;
        }
        at.is_multiple_of(offset)
            && segments.iter().all(|segment| {
                (segment.base() as usize).is_multiple_of(memory)
                    && (segment.len() as u64).is_multiple_of(offset.max(1))
            })
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A directory of the host.
#[derive(Debug)]
pub struct HostDir {
    path: PathBuf,
}

impl HostDir {
    /// The directory at `path`, which exists.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn create(&self, name: &str) -> io::Result<HostFile> {
        let path = self.path.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(HostFile::state(file, path))
    }

    pub(super) fn open(&self, name: &str) -> io::Result<HostFile> {
        let path = self.path.join(name);
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(HostFile::state(file, path))
    }

    pub(super) fn list(&self) -> io::Result<Vec<String>> {
        // Names that are no UTF-8 are not ours.
        let names = std::fs::read_dir(&self.path)?.map(|entry| entry.map(|e| e.file_name().into_string()));
        names.filter_map(|name| name.map(Result::ok).transpose()).collect()
    }
}

/// Opens an area of a difference store; see [`crate::Storage::open_area`].
pub(super) fn open_area(path: &Path, name: &str, make: bool) -> io::Result<OpenedArea<HostFile>> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute"));
    }
    let found = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && make => None,
        found => Some(found?.file_type()),
    };
    let kind = match found {
        Some(found) if found.is_dir() => AreaKind::Directory,
        Some(found) if found.is_block_device() => AreaKind::Device,
        Some(found) if !found.is_file() => {
            let text = "it is neither a directory nor a regular file nor a block device";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        _ => AreaKind::File,
    };
    let real = if kind == AreaKind::Directory { path.join(name) } else { path.to_owned() };
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // Exclusive, a device that is mounted or part of something else is busy.
    options.custom_flags(if kind == AreaKind::Device { libc::O_EXCL } else { 0 });
    let may_make = make && kind != AreaKind::Device;
    let file = options.create(may_make).truncate(false).open(&real)?;
    if may_make {
        file.sync_all()?;
        if let Some(parent) = real.parent() {
            File::open(parent)?.sync_all()?;
        }
    }
    let metadata = file.metadata()?;
    let backing = if kind == AreaKind::Device { Backing::BlockDevice } else { Backing::File };
    let len = length_of(&file, backing)?;
    let identity = match backing {
        Backing::BlockDevice => (metadata.rdev(), 0),
        Backing::File => (metadata.dev(), metadata.ino()),
    };
    let file = HostFile { backing, ..HostFile::state(file, real) };
    Ok(OpenedArea { file, kind, len, identity })
}

/// Length in bytes of a file or block device.
pub(super) fn length_of(file: &File, backing: Backing) -> io::Result<u64> {
    match backing {
        Backing::File => Ok(file.metadata()?.len()),
        Backing::BlockDevice => {
            let mut bytes = 0u64;
            // SAFETY: BLKGETSIZE64 stores one u64 at the address given, which is `bytes`.
            // JUSTIFICATION: there is no other way to ask a device's size.
            let answer = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
            if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
        }
    }
}

/// Sectors written and discarded since the device appeared (Documentation/block/stat.rst).
fn sectors_changed(device: u64) -> io::Result<i64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"))?;
    let field = |n: usize| text.split_whitespace().nth(n).and_then(|word| word.parse::<i64>().ok());
    let written = field(6).ok_or_else(|| io::Error::other("the device's statistics are not understood"))?;
    Ok(written.wrapping_add(field(13).unwrap_or(0)))
}

/// A number that differs from boot to boot.
fn boot_number() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    u64::from_str_radix(&digits, 16).map_err(io::Error::other)
}

/// The time of day in nanoseconds since 1970.
pub fn now_ns() -> i64 {
    i64::try_from(crate::disk::now_ns()).unwrap_or(i64::MAX)
}

/// The id of the file system that a file is on (`f_fsid`), or 0.
fn file_system_of(file: &File) -> io::Result<u64> {
    // SAFETY: all-zero bytes are a valid `statfs`.
    // JUSTIFICATION: rustix and std do not carry `f_fsid`.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `statfs` at the address given.
    // JUSTIFICATION: as above.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: an `fsid_t` is two plain integers, and as large as a `u64` (statfs(2)).
    // JUSTIFICATION: its fields are private.
    Ok(unsafe { std::mem::transmute::<libc::fsid_t, u64>(stat.f_fsid) })
}

/// A number that differs where what a device says of itself does.
fn names_of_device(device: u64) -> u64 {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let files = [
        "device/wwid",
        "wwid",
        "device/serial",
        "serial",
        "dm/uuid",
        "md/uuid",
        "loop/backing_file",
        "start",
    ];
    let mut sum = [0; 2];
    for (nth, file) in files.iter().enumerate() {
        if let Ok(text) = std::fs::read(format!("/sys/dev/block/{major}:{minor}/{file}")) {
            sum[nth % 2] = crc32c::crc32c_append(sum[nth % 2], &text);
        }
    }
    u64::from(sum[0]) | u64::from(sum[1]) << 32
}

/// Whether nobody but this kernel tells a file's time of change: not so where another host, or another process,
/// keeps the file.
fn is_local(file: &File) -> io::Result<bool> {
    /// NFS, CIFS, SMB2, FUSE, Ceph and 9P (linux/magic.h and fs/smb).
    const OF_OTHERS: [u64; 6] = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546, 0x00c3_6400, 0x0102_1997];
    let kind = rustix::fs::fstatfs(file)?.f_type;
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    let kind = kind as u64;
    Ok(!OF_OTHERS.contains(&(kind & 0xffff_ffff)))
}

/// `_IOR(0x12, 114, size_t)` of linux/fs.h.
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// Whether the file lives in memory (tmpfs, ramfs), where direct I/O only costs.
fn is_in_memory(file: &File) -> io::Result<bool> {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let kind = rustix::fs::fstatfs(file)?.f_type;
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    let kind = kind as i64;
    Ok(!file.metadata()?.file_type().is_block_device() && (kind == TMPFS || kind == RAMFS))
}

/// What direct I/O asks of this file, or `None` if it has none.
fn direct_alignment(file: &File) -> io::Result<Option<Alignment>> {
    // SAFETY: all-zero bytes are a valid `statx`.
    // JUSTIFICATION: rustix does not carry the DIOALIGN fields.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: the path is a C string, the flag makes the call act on the descriptor itself, and the
    // kernel writes one `statx` at the address given.
    // JUSTIFICATION: as above.
    let answer =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut stat) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    if stat.stx_mask & mask == 0 {
        // The file system does not say: what every device takes.
        return Ok(Some(Alignment { memory: 4096, offset: 4096 }));
    }
    if stat.stx_dio_offset_align == 0 {
        return Ok(None);
    }
    let memory = usize::try_from(stat.stx_dio_mem_align).map_err(io::Error::other)?;
    Ok(Some(Alignment { memory: memory.max(1), offset: stat.stx_dio_offset_align.into() }))
}
