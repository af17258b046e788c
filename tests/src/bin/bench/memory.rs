//! Memory of Ebbtide with a 100 GiB sparse disk under load at depth 128.

use std::fs::File;

use anyhow::Result;
use serde::Serialize;

use crate::contender::{Bench, Contender};
use crate::machine::Medium;

const DISK_BYTES: u64 = 100 << 30;

/// Resident bytes, by kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Memory {
    /// The process's own.
    pub(crate) anonymous: u64,
    /// Mapped files: the program itself and the change map.
    pub(crate) file: u64,
    /// Shared memory: the guest's, which is not the server's.
    pub(crate) shared: u64,
}

/// Starts Ebbtide on a sparse file of the disk's directory and looks after some load.
pub(crate) fn measure(bench: &Bench) -> Result<Memory> {
    eprintln!("memory: 100 GiB sparse, depth 128");
    let image = bench.dir(Medium::Disk).join("sparse.raw");
    File::create(&image)?.set_len(DISK_BYTES)?;
    let server = bench.start(Contender::Ebbtide, &image, Medium::Disk)?;
    bench.load(&server, |load| {
        load.args(["--mix", "read=1,write=1", "--depth", "128", "--seconds", "2"]);
    })?;
    let memory = Memory {
        anonymous: server.memory_bytes("RssAnon")?,
        file: server.memory_bytes("RssFile")?,
        shared: server.memory_bytes("RssShmem")?,
    };
    server.stop()?;
    std::fs::remove_file(&image)?;
    Ok(memory)
}
