//! How much of the host's page cache the difference stores of all disks may take together.
//!
//! A sixteenth of the memory there is for the daemon: a burst of first touches ends there most times, and nothing
//! else of the host is driven out. The kernel begins to write back at a tenth on its own.

use std::path::Path;

/// Of memory, one part in so many.
const PART: u64 = 16;
/// Below this, writing back would be all that the medium does.
const LEAST: u64 = 64 << 20;
/// Above this, what is written back at a clean end takes a while.
const MOST: u64 = 4 << 30;

/// See the module.
pub(crate) fn bytes_for_stores() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "a long, of 32 bits on some machines")]
    let memory = u64::from(info.totalram).saturating_mul(info.mem_unit.into());
    share_of(control_group_limit().map_or(memory, |limit| limit.min(memory)))
}

fn share_of(memory: u64) -> u64 {
    (memory / PART).clamp(LEAST, MOST)
}

/// The limit of our control group, whose page cache ours is; of version 2, and none above it.
fn control_group_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let ours = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // "max" is no number.
    std::fs::read_to_string(Path::new("/sys/fs/cgroup").join(ours).join("memory.max"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_hosts_and_large_ones_have_bounds() {
        assert_eq!(share_of(256 << 20), 64 << 20);
        assert_eq!(share_of(24 << 30), 1536 << 20);
        assert_eq!(share_of(2 << 40), 4 << 30);
    }
}
