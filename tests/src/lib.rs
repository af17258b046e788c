//! What the suites and the benchmarks share: servers as child processes, two clients, a baseline.
//!
//! - [`load`]: a load generator on the third-party `blkio` crate; its program is `load`.
//! - [`vhost_client`]: our own vhost-user front end, which can also say what no driver would say.
//! - [`baseline`]: a plain back end on the framework `vhost-user-backend`, to compare with.
//! - [`daemon`]: a daemon with disks in a temporary directory.
//! - [`host`]: small file systems and block devices.
//! - [`nbd`], [`qmp`]: clients that share no code with the daemon.
//! - [`oracle`], [`overlay_oracle`]: what a disk and a writable view may answer; the judges of the simulation
//!   suite.
//! - [`scene`]: a daemon, guests and a backup program, for tests of snapshots.
//! - [`server`]: starts the programs under test, bounds their lives, reads what they use.
//! - [`stamped`]: a load whose data tells what a view may contain, and the judge of views.
//!
//! Always: no process outlives the one that started it, and nothing waits without a deadline.
//! Unsafe code lives in [`raw`] and, for its io_uring, in [`baseline`].

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod baseline;
pub mod daemon;
pub mod histogram;
pub mod host;
pub mod load;
pub mod nbd;
pub mod oracle;
pub mod overlay_oracle;
pub mod qmp;
pub mod random;
#[allow(unsafe_code)]
pub mod raw;
pub mod scene;
pub mod server;
pub mod stamped;
pub mod vhost_client;
pub mod virtio;
