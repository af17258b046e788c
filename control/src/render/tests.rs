use super::*;
use crate::commands::{ChangedRange, IoCounters, SnapshotPoint, Timestamp, TrackerInfo};

fn disk(name: &str, connected: bool) -> DiskInfo {
    DiskInfo {
        name: name.to_owned(),
        image: format!("/vm/{name}.img"),
        state_directory: format!("/vm/{name}.img.ebb"),
        size: 10 << 30,
        block_size: 512,
        queues: 4,
        read_only: false,
        writeback: true,
        serial: None,
        socket: None,
        connected,
        tracker: TrackerInfo {
            on: connected,
            generation: "g".to_owned(),
            epoch: 4,
            change_id: "g/3".to_owned(),
            block_size: 65_536,
            began: None,
            reason: "new-disk".to_owned(),
        },
        io: IoCounters { read_bytes: 1_572_864, ..IoCounters::default() },
        snapshots: 2,
        held: 5000,
        rewind: None,
        handed_over: false,
        store: Default::default(),
    }
}

const TIME: Timestamp = Timestamp { seconds: 1_795_362_672, microseconds: 0 };

#[test]
fn disks_stand_in_columns() {
    let expected = "\
DISK       SIZE  MODE  FRONT END  TRACKING       SNAPSHOTS     HELD     READ  WRITTEN  ERRORS  CHANGE ID  IMAGE
vda      10 GiB  rw    connected  64 KiB                 2  4.8 KiB  1.5 MiB      0 B       0  g/3        /vm/vda.img
archive  10 GiB  rw    -          off: new-disk          2  4.8 KiB  1.5 MiB      0 B       0  -          /vm/archive.img
";
    assert_eq!(disks(&[disk("vda", true), disk("archive", false)]), expected);
    assert_eq!(disks(&[]), "no disks\n");
}

#[test]
fn a_rewind_says_how_far_it_is() {
    let rewind = RewindInfo { snapshot: "s1".to_owned(), bytes: 8 << 20, bytes_left: 5 << 20, trouble: None };
    let mut vda = DiskInfo { rewind: Some(rewind.clone()), ..disk("vda", false) };
    let expected = "vda becomes s1 again: 5 MiB of 8 MiB are to be copied back\n";
    assert!(disks(&[vda.clone()]).ends_with(expected));
    assert_eq!(rewound("vda", &rewind), expected);
    vda.rewind = Some(RewindInfo { trouble: Some("no room".to_owned()), ..rewind });
    assert!(disks(&[vda]).ends_with("are to be copied back, which fails: no room\n"));
    let none = RewindInfo { snapshot: "s1".to_owned(), bytes: 0, bytes_left: 0, trouble: None };
    assert_eq!(rewound("vda", &none), "vda is as in s1: nothing was to be copied back\n");
}

#[test]
fn a_broken_snapshot_says_why() {
    let mut snapshot = SnapshotInfo {
        name: "s1".to_owned(),
        disk: "vda".to_owned(),
        change_id: "g/1".to_owned(),
        created: TIME,
        size: 1 << 30,
        state: SnapshotState::Broken,
        reason: Some("store-full".to_owned()),
        broken_time: None,
        errno: Some(28),
        on_overflow: Default::default(),
        hold_deadline: None,
        limit: None,
        held: 5000,
        bytes_freed_by_delete: 4096,
        released: 8192,
        exports: vec!["a".to_owned(), "b".to_owned()],
        overlays: Vec::new(),
    };
    let expected = "\
SNAPSHOT  DISK  CREATED                SIZE     HELD  FREES  STATE               CHANGE ID  EXPORTS
s1        vda   2026-11-22 15:51:12Z  1 GiB  4.8 KiB  4 KiB  broken: store-full  g/1        a,b
";
    assert_eq!(snapshots(&[snapshot.clone()]), expected);
    snapshot.overlays.push(overlay());
    let expected = "
OVERLAY  SNAPSHOT  DISK    USED  KEEP  CLIENTS  FRONT END  EXPORT         SOCKET
repair   s1        vda   12 KiB  yes         1  connected  vda@s1/repair  /run/r
";
    assert!(snapshots(&[snapshot]).ends_with(expected));
}

#[test]
fn a_tracker_says_what_a_stop_of_the_host_does() {
    let one = TrackerDetails {
        disk: "vda".to_owned(),
        on: true,
        change_id: "g/1".to_owned(),
        epoch: 2,
        block_size: 65_536,
        size: 1 << 30,
        map_bytes: 69_632,
        hot_regions: 3,
        presumed_bytes: 3 << 20,
        began: Some(TIME),
        reason: "operator".to_owned(),
        checkpoints: 1,
        ..Default::default()
    };
    let expected = "\
DISK   SIZE  TRACKING  CHANGE ID  EPOCH  BEGAN                 WHY          MAP  HOT REGIONS  PRESUMED  CHECKPOINTS  IF THE HOST STOPS
vda   1 GiB  64 KiB    g/1            2  2026-11-22 15:51:12Z  operator  68 KiB            3     3 MiB            1  the history goes on
";
    assert_eq!(trackers(std::slice::from_ref(&one)), expected);
    let ends = TrackerDetails { ends_with_host: true, ..one };
    assert!(trackers(std::slice::from_ref(&ends)).ends_with("the history ends\n"));
    let risk = TrackerDetails { at_risk: true, ..ends };
    assert!(trackers(std::slice::from_ref(&risk)).ends_with("make a full backup now\n"));
    let off = TrackerDetails { on: false, ..risk };
    assert!(trackers(&[off]).ends_with("  -\n"));
}

fn overlay() -> OverlayInfo {
    OverlayInfo {
        disk: "vda".to_owned(),
        snapshot: "s1".to_owned(),
        name: "repair".to_owned(),
        size: 1 << 30,
        used: 12_288,
        keep: true,
        export: Some("vda@s1/repair".to_owned()),
        uri: Some("nbd+unix:///vda@s1/repair?socket=/run/n".to_owned()),
        clients: 1,
        socket: Some("/run/r".to_owned()),
        connected: true,
    }
}

#[test]
fn an_opened_snapshot_says_where_it_is_reached() {
    let mut overlay = overlay();
    assert_eq!(overlay_opened(&overlay), "nbd+unix:///vda@s1/repair?socket=/run/n\n/run/r\n");
    (overlay.uri, overlay.socket) = (None, None);
    assert!(overlay_opened(&overlay).contains("no NBD server"));
}

#[test]
fn changes_are_summed_up() {
    let mut page = ChangedBlocks {
        disk: "vda".to_owned(),
        snapshot: "s2".to_owned(),
        since: "g/1".to_owned(),
        until: "g/2".to_owned(),
        size: 1 << 30,
        block_size: 65_536,
        ranges: vec![
            ChangedRange { offset: 0, length: 65_536 },
            ChangedRange { offset: 1_048_576, length: 131_072 },
        ],
        next_offset: Some(2_097_152),
    };
    let expected = "\x20OFFSET  LENGTH
      0   65536
1048576  131072
192 KiB of 1 GiB changed on vda from g/1 to s2 (g/2), in 2 ranges, blocks of 64 KiB; more from offset 2097152
";
    assert_eq!(changes(&page), expected);
    page.ranges.clear();
    page.next_offset = None;
    let expected = "0 B of 1 GiB changed on vda from g/1 to s2 (g/2), in 0 ranges, blocks of 64 KiB\n";
    assert_eq!(changes(&page), expected);
}

#[test]
fn exports_show_where_to_reach_them() {
    let export = ExportInfo {
        name: String::new(),
        disk: "vda".to_owned(),
        snapshot: Some("s1".to_owned()),
        overlay: None,
        bitmaps: Vec::new(),
        description: None,
        size: 1 << 20,
        read_only: true,
        release_on_trim: false,
        clients: 1,
        uri: "nbd+unix:///?socket=/run/n".to_owned(),
    };
    let expected = "\
EXPORT     DISK  SNAPSHOT   SIZE  MODE  CLIENTS  BITMAPS  URI
(default)  vda   s1        1 MiB  ro          1  -        nbd+unix:///?socket=/run/n
";
    assert_eq!(exports(std::slice::from_ref(&export)), expected);
    assert!(exports(&[ExportInfo { release_on_trim: true, ..export }]).contains("ro, trim releases"));
}

#[test]
fn a_new_snapshot_names_its_change_ids() {
    let created = SnapshotCreated {
        name: "s1".to_owned(),
        created: TIME,
        held_writes_us: 1_250,
        disks: vec![SnapshotPoint { disk: "vda".to_owned(), change_id: "g/7".to_owned(), size: 512 }],
    };
    let expected = "\
snapshot s1 at 2026-11-22 15:51:12Z; writes waited 1.2 ms
DISK   SIZE  CHANGE ID
vda   512 B  g/7
";
    assert_eq!(snapshot_created(&created), expected);
}

#[test]
fn status_is_a_fact_a_line() {
    let answer = StatusInfo {
        running: true,
        status: RunState::Running,
        pid: 7,
        uptime: 90_061,
        disks: 1,
        snapshots: 2,
        control_socket: "/run/c".to_owned(),
        nbd: None,
    };
    let expected = "\
Status     running
Process    7
Up         1 d 1 h
Disks      1
Snapshots  2
Control    /run/c
NBD        off
";
    assert_eq!(status(&answer), expected);
}

#[test]
fn sizes_have_units() {
    for (bytes, text) in [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (104_960, "102 KiB"),
        (10 << 30, "10 GiB"),
        ((1 << 30) - 1, "1023 MiB"),
        (u64::MAX, "15.9 EiB"),
    ] {
        assert_eq!(size(bytes), text);
    }
}

#[test]
fn nothing_reaches_the_terminal_as_a_command() {
    let mut hostile = disk("vda", true);
    hostile.image = "\x1b[2J\r\n\u{9b}\u{202e}é".to_owned();
    let text = disks(&[hostile]);
    assert!(text.ends_with("\\u{1b}[2J\\r\\n\\u{9b}\\u{202e}é\n"), "{text}");
    assert_eq!(text.lines().count(), 2);
}
