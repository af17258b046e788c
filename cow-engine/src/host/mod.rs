//! The engine's storage on a Linux host: files through io_uring, one ring per thread.

mod executor;
mod file;
mod lock;
mod ring;
mod storage;

pub use executor::{Executor, Watch};
pub use file::{Backing, HostDir, HostFile, ImageOptions, OpenImageError, now_ns};
pub use lock::{Access, LockError};
pub use storage::HostStorage;
