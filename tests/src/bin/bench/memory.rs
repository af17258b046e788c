//! Memory of Ebbtide with a 100 GiB sparse disk under load at depth 128.

use std::fs::File;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::contender::{Bench, Contender};
use crate::launch::Setup;
use crate::machine::Medium;

const DISK_BYTES: u64 = 100 << 30;

/// The most resident bytes seen under load, by kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Memory {
    /// The process's own.
    pub(crate) anonymous: u64,
    /// Mapped files: the program itself and the change map.
    pub(crate) file: u64,
    /// Shared memory: the guest's, which is not the server's.
    pub(crate) shared: u64,
}

/// Starts Ebbtide on a sparse file of the disk's directory and looks while it is under load.
pub(crate) fn measure(bench: &Bench) -> Result<Memory> {
    eprintln!("memory: 100 GiB sparse, depth 128");
    let image = bench.dir(Medium::Disk).join("sparse.raw");
    File::create(&image)?.set_len(DISK_BYTES)?;
    let server = bench.start(Setup::plain(Contender::Ebbtide, &image, Medium::Disk))?;
    let mut memory = Memory { anonymous: 0, file: 0, shared: 0 };
    std::thread::scope(|scope| -> Result<()> {
        let load = scope.spawn(|| {
            bench.load(server.pid(), |load| {
                load.args(["--mix", "read=1,write=1", "--depth", "128", "--seconds", "2"]);
            })
        });
        while !load.is_finished() {
            memory.anonymous = memory.anonymous.max(server.memory_bytes("RssAnon")?);
            memory.file = memory.file.max(server.memory_bytes("RssFile")?);
            memory.shared = memory.shared.max(server.memory_bytes("RssShmem")?);
            std::thread::sleep(Duration::from_millis(50));
        }
        load.join().expect("the load does not panic").map(|_| ())
    })?;
    server.stop()?;
    std::fs::remove_file(&image)?;
    Ok(memory)
}
