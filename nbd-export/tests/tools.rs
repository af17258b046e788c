//! Clients that people use, on a Unix socket. A tool that is not installed is skipped, aloud.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nbd_export::{Budget, ExportInfo};
use support::{MemoryExport, MemoryExports, pattern, serve_within};

const SIZE: usize = 16 << 20;

struct Served {
    dir: tempfile::TempDir,
    bytes: Vec<u8>,
}

impl Served {
    fn new() -> Self {
        Self::within(256 << 20)
    }

    /// With so much memory for the data of all clients, besides what each has itself.
    fn within(budget: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bytes = pattern(SIZE, 9);
        let info = ExportInfo::read_only("vda@tuesday", SIZE as u64);
        let snapshot = MemoryExport::new(info, bytes.clone())
            .with_bitmap("monday", vec![65536..131_072, 3 << 20..5 << 20]);
        let live = MemoryExport::new(ExportInfo::writable("vda", SIZE as u64), vec![0; SIZE]);
        let info = ExportInfo::read_only("broken", SIZE as u64);
        let mut broken = MemoryExport::new(info, bytes.clone());
        broken.broken_at = Some(1 << 20);
        let exports = MemoryExports::new([snapshot, live, broken]);
        serve_within(&dir.path().join("s"), exports, &Arc::new(Budget::new(budget))).unwrap();
        Served { dir, bytes }
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("s").display())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Runs a tool and answers its output, or `None` after telling that it is not installed.
fn run(tool: &str, args: &[&str]) -> Option<String> {
    if !Path::new("/usr/bin").join(tool).exists() {
        eprintln!("SKIPPED: /usr/bin/{tool} is not installed (libnbd-bin, qemu-utils, python3-libnbd)");
        return None;
    }
    let output = Command::new(Path::new("/usr/bin").join(tool)).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {args:?}: {text}{errors}");
    Some(text)
}

#[test]
fn nbdinfo_describes_lists_and_maps() {
    let served = Served::new();
    let Some(text) = run("nbdinfo", &[&served.uri("vda@tuesday")]) else { return };
    for line in ["export-size: 16777216 (16M)", "is_read_only: true", "can_multi_conn: true"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let text = run("nbdinfo", &["--list", &served.uri("")]).unwrap();
    assert!(text.contains("export=\"vda@tuesday\"") && text.contains("export=\"vda\""), "{text}");
    assert!(text.contains("qemu:dirty-bitmap:monday"), "{text}");

    let map = |context: &str| {
        let text = run("nbdinfo", &[&format!("--map={context}"), &served.uri("vda@tuesday")]);
        let words = |line: &str| {
            line.split_whitespace().take(3).map(|w| w.parse::<u64>().unwrap()).collect::<Vec<_>>()
        };
        text.unwrap().lines().map(words).collect::<Vec<_>>()
    };
    let mib = 1 << 20;
    assert_eq!(
        map("qemu:dirty-bitmap:monday"),
        [
            [0, 65536, 0],
            [65536, 65536, 1],
            [131_072, 3 * mib - 131_072, 0],
            [3 * mib, 2 * mib, 1],
            [5 * mib, 11 * mib, 0]
        ]
    );
    assert_eq!(map("base:allocation")[..2], [[0, 3 * mib, 0], [3 * mib, mib, 3]]);
}

#[test]
fn nbdcopy_and_qemu_img_read_the_same_bytes() {
    let served = Served::new();
    let copy = served.path("copy");
    if run("nbdcopy", &[&served.uri("vda@tuesday"), copy.to_str().unwrap()]).is_some() {
        assert!(std::fs::read(&copy).unwrap() == served.bytes);
    }
    let raw = served.path("raw");
    let uri = served.uri("vda@tuesday");
    let convert = ["convert", "-f", "raw", "-O", "raw", &uri, raw.to_str().unwrap()];
    if run("qemu-img", &convert).is_some() {
        assert!(std::fs::read(&raw).unwrap() == served.bytes);
    }
}

#[test]
fn long_requests_are_understood_piece_by_piece() {
    let served = Served::within(0);
    let (from, to) = (served.uri("vda@tuesday"), served.uri("vda"));
    let long = "--request-size=16777216";
    if run("nbdcopy", &[long, "--allocated", &from, &to]).is_none() {
        return;
    }
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &to]);
    let copy = served.path("copy");
    run("nbdcopy", &[long, "--requests=4", &to, copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == served.bytes);
    let script = r#"
import sys, errno
try:
    import nbd
except ImportError:
    print("no module"); sys.exit(0)
h = nbd.NBD()
h.connect_uri(sys.argv[1])
seen = []
def chunk(data, offset, status, error):
    seen.append((offset, len(data), status))
data = h.pread_structured(16 << 20, 0, chunk)
assert seen == [(k << 20, 1 << 20, nbd.READ_DATA) for k in range(16)], seen
seen.clear()
assert h.pread_structured(16 << 20, 0, chunk, nbd.CMD_FLAG_DF) == data
assert seen == [(0, 16 << 20, nbd.READ_DATA)], seen
h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(sys.argv[1])
assert len(h.pread(16 << 20, 0)) == 16 << 20
h = nbd.NBD()
h.connect_uri(sys.argv[2])
try:
    h.pread(16 << 20, 0)
    raise AssertionError("no error")
except nbd.Error as e:
    assert e.errnum == errno.EIO, e
assert len(h.pread(512, 0)) == 512
print("done")
"#;
    if let Some(text) = run("python3", &["-c", script, &from, &served.uri("broken")]) {
        assert!(["done", "no module"].contains(&text.trim()), "{text}");
    }
}

#[test]
fn what_nbdcopy_writes_qemu_img_finds_equal() {
    let served = Served::new();
    if run("nbdcopy", &[&served.uri("vda@tuesday"), &served.uri("vda")]).is_none() {
        return;
    }
    let (a, b) = (served.uri("vda@tuesday"), served.uri("vda"));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &a, &b]);
}

#[test]
fn python_sees_equal_coverage_small_reads_and_errors() {
    let served = Served::new();
    let script = r#"
import sys, errno
try:
    import nbd
except ImportError:
    print("no module"); sys.exit(0)
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.connect_uri(sys.argv[1])
for flags in (0, nbd.CMD_FLAG_REQ_ONE):
    for offset in (0, 512, 3 << 20, (16 << 20) - 512):
        seen = {}
        def extents(context, start, entries, error):
            assert start == offset
            seen[context] = entries
        h.block_status(h.get_size() - offset, offset, extents, flags)
        assert len(seen) == 2, seen
        assert len({sum(e[::2]) for e in seen.values()}) == 1, seen
        if flags:
            assert all(len(e) == 2 for e in seen.values()), seen
assert len(h.pread(512, 512)) == 512
assert len(h.pread(16 << 20, 0)) == 16 << 20
h.set_strict_mode(0)
for want, f in ((errno.EPERM, lambda: h.pwrite(b"x" * 512, 0)), (errno.EINVAL, lambda: h.pread(512, 16 << 20))):
    try:
        f()
        raise AssertionError("no error")
    except nbd.Error as e:
        assert e.errnum == want, e
assert len(h.pread(512, 0)) == 512
h.shutdown()
h = nbd.NBD()
h.set_request_structured_replies(False)
h.connect_uri(sys.argv[1])
assert len(h.pread(1 << 20, 1)) == 1 << 20
h.shutdown()
print("done")
"#;
    let Some(text) = run("python3", &["-c", script, &served.uri("vda@tuesday")]) else { return };
    if text.trim() == "no module" {
        eprintln!("SKIPPED: /usr/bin/python3 has no module nbd (python3-libnbd)");
    } else {
        assert_eq!(text.trim(), "done");
    }
}

#[test]
fn clients_take_the_error_of_a_broken_snapshot_and_go_on() {
    let served = Served::new();
    let script = r#"
import sys, errno
try:
    import nbd
except ImportError:
    print("no module"); sys.exit(0)
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
for f in (lambda: h.pread(4096, 1 << 20), lambda: h.block_status(2 << 20, 0, lambda *_: 0)):
    try:
        f()
        raise AssertionError("no error")
    except nbd.Error as e:
        assert e.errnum == errno.EIO, e
assert len(h.pread(4096, 0)) == 4096
print("done")
"#;
    if let Some(text) = run("python3", &["-c", script, &served.uri("broken")]) {
        assert!(["done", "no module"].contains(&text.trim()), "{text}");
    }
    let args = ["-r", "-f", "raw", "-c", "read 1M 64k", "-c", "read 0 64k"];
    if !Path::new("/usr/bin/qemu-io").exists() {
        eprintln!("SKIPPED: /usr/bin/qemu-io is not installed (qemu-utils)");
        return;
    }
    let output = Command::new("/usr/bin/qemu-io").args(args).arg(served.uri("broken")).output().unwrap();
    let text = [output.stdout, output.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).concat();
    assert!(text.contains("read failed: Input/output error"), "{text}");
    assert!(text.contains("read 65536/65536 bytes at offset 0"), "{text}");
}
