//! Serves images in memory on a Unix socket, so that NBD clients can be tried on the library:
//!
//! ```sh
//! cargo run --release -p nbd-export --example serve_memory -- /tmp/nbd.sock 1024 &
//! nbdinfo --list 'nbd+unix:///?socket=/tmp/nbd.sock'
//! nbdinfo --map=qemu:dirty-bitmap:monday 'nbd+unix:///vda@tuesday?socket=/tmp/nbd.sock'
//! ```

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::Path;

use nbd_export::ExportInfo;
use support::{MemoryExport, MemoryExports, pattern, serve};

fn main() -> std::io::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(socket), size) = (args.next(), args.next()) else {
        eprintln!("usage: serve_memory SOCKET [MEBIBYTES]");
        std::process::exit(2);
    };
    let mebibytes = size.and_then(|size| size.parse().ok()).unwrap_or(64usize);
    let bytes = pattern(mebibytes << 20, 1);
    let mut info = ExportInfo::read_only("vda@tuesday", bytes.len() as u64);
    info.description = "vda as of Tuesday".into();
    let snapshot =
        MemoryExport::new(info, bytes.clone()).with_bitmap("monday", vec![65536..131_072, 1 << 20..3 << 20]);
    let live = MemoryExport::new(ExportInfo::writable("vda", bytes.len() as u64), bytes);
    let _ = std::fs::remove_file(&socket);
    let server = serve(Path::new(&socket), MemoryExports::new([snapshot, live]))?;
    println!("serving vda@tuesday and vda on {socket}");
    let _ = server.join();
    Ok(())
}
