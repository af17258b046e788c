//! x
/// What tells one image from another, and whether it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device that holds the image (`st_dev`).
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Length in bytes.
    pub len: u64,
    /// Time of the last change of content, in nanoseconds since 1970.
    pub mtime_ns: i64,
}
