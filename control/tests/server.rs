//! The server over its socket: what any QMP client meets, and what hostile ones may not do.

mod rehearsal;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::client::ClientError;
use control::commands::*;
use control::{Client, Event, EventHub, Listener, Options, Server};
use rehearsal::Rehearsal;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

struct Stage {
    server: Server,
    service: Arc<Rehearsal>,
    events: EventHub,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn stage_with(options: Options) -> Stage {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let listener = Listener::bind(&path).unwrap();
    let events = EventHub::new();
    let service = Arc::new(Rehearsal::new(events.clone()));
    let server = Server::start(listener, service.clone(), events.clone(), options).unwrap();
    Stage { server, service, events, path, _directory: directory }
}

fn stage() -> Stage {
    stage_with(Options::default())
}

/// A client that writes whatever it likes.
struct Raw {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Stage {
    /// Connected, the greeting read.
    fn raw(&self) -> Raw {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut raw = Raw { stream, lines };
        assert!(raw.line()["QMP"].is_object());
        raw
    }

    fn negotiated(&self) -> Raw {
        let mut raw = self.raw();
        let reply = raw.ask(r#"{"execute":"qmp_capabilities"}"#);
        assert_eq!(reply, json!({"return": {}}));
        raw
    }

    fn client(&self) -> Client {
        Client::connect(&self.path, PATIENCE).unwrap()
    }

    fn wait_for_clients(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.server.clients() != count {
            assert!(Instant::now() < deadline, "{}", self.server.clients());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Raw {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    fn text(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n") && line.is_ascii(), "{line:?}");
        line
    }

    fn line(&mut self) -> Value {
        serde_json::from_str(&self.text()).unwrap()
    }

    fn ask(&mut self, bytes: impl AsRef<[u8]>) -> Value {
        self.send(bytes);
        self.line()
    }

    fn at_end(&mut self) -> bool {
        matches!(self.lines.read(&mut [0]), Ok(0) | Err(_))
    }
}

#[track_caller]
fn assert_error(reply: &Value, class: &str, reason: &str, desc: &str) {
    assert_eq!(reply["error"]["class"], class, "{reply}");
    assert_eq!(reply["error"]["x-reason"], reason, "{reply}");
    assert_eq!(reply["error"]["desc"], desc, "{reply}");
}

#[test]
fn the_greeting_is_qmps_and_names_us() {
    let stage = stage();
    let stream = UnixStream::connect(&stage.path).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    let greeting: Value = serde_json::from_str(&line).unwrap();
    let version = &greeting["QMP"]["version"];
    assert!(version["qemu"]["major"].is_u64());
    assert!(version["qemu"]["minor"].is_u64());
    assert!(version["qemu"]["micro"].is_u64());
    assert!(version["package"].as_str().unwrap().starts_with("Ebbtide"));
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
}

#[test]
fn negotiation_comes_first_and_once() {
    let stage = stage();
    let mut raw = stage.raw();
    let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
    for verb in ["query-version", "quit", "no-such"] {
        let reply = raw.ask(format!(r#"{{"execute":"{verb}","id":5}}"#));
        assert_error(&reply, "CommandNotFound", "negotiation", desc);
        assert_eq!(reply["id"], 5);
    }
    let reply = raw.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    let unavailable = "Capability oob not available";
    assert_error(&reply, "GenericError", "bad-argument", unavailable);
    let reply = raw.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":[1,{}]}"#);
    assert_eq!(reply, json!({"return": {}, "id": [1, {}]}));
    let reply = raw.ask(r#"{"execute":"qmp_capabilities"}"#);
    let desc = "Capabilities negotiation is already complete, command ignored";
    assert_error(&reply, "CommandNotFound", "negotiation", desc);
}

#[test]
fn requests_may_arrive_a_byte_at_a_time() {
    let stage = stage();
    let mut raw = stage.negotiated();
    for byte in br#"{"execute":"query-version","id":"x"}"# {
        raw.send([*byte]);
    }
    let reply = raw.line();
    assert_eq!(reply["id"], "x");
    assert!(reply["return"]["qemu"].is_object());
}

#[test]
fn several_requests_in_one_packet_are_answered_in_order() {
    let stage = stage();
    let mut raw = stage.negotiated();
    let one = |id| format!(r#"{{"execute":"query-status","id":{id}}}"#);
    let packet: String = (0..100).map(one).collect();
    raw.send(packet);
    for id in 0..100 {
        assert_eq!(raw.line()["id"], id);
    }
}

#[test]
fn an_id_comes_back_as_it_was_written() {
    let stage = stage();
    let mut raw = stage.negotiated();
    for id in ["null", "1.50", "123456789012345678901234567890", "\"\\u00e9\"", "{\"a\":[1]}"] {
        for verb in ["query-version", "no-such", "query-disks\\u0000"] {
            raw.send(format!(r#"{{"execute":"{verb}","id":{id}}}"#));
            let text = raw.text();
            assert!(text.ends_with(&format!("\"id\":{id}}}\r\n")), "{text}");
        }
    }
    raw.send("{\"execute\":\"query-version\",\"id\":[\r\n\"é\"\r\n]}");
    assert!(raw.text().ends_with("\"id\":[  \"\\u00e9\"  ]}\r\n"));
}

#[test]
fn what_is_wrong_with_a_request_is_said() {
    let stage = stage();
    let mut raw = stage.negotiated();
    let reply = raw.ask(r#"{"execute":"nosuch","id":1}"#);
    let desc = "The command nosuch has not been found";
    assert_error(&reply, "CommandNotFound", "unknown-command", desc);

    let reply = raw.ask(r#"{"execute":"query-disks","arguments":{"x":1}}"#);
    let desc = "Parameter 'x' is unexpected";
    assert_error(&reply, "GenericError", "unknown-argument", desc);

    let reply = raw.ask(r#"{"execute":"snapshot-create"}"#);
    let desc = "Parameter 'name' is missing";
    assert_error(&reply, "GenericError", "missing-argument", desc);

    let reply = raw.ask(r#"{"execute":"snapshot-create","arguments":{"name":1}}"#);
    let desc = "Invalid parameter type for 'name', expected: a string";
    assert_error(&reply, "GenericError", "bad-argument", desc);

    let reply = raw.ask(r#"{"execute":"snapshot-create","arguments":{"name":"a/b"}}"#);
    assert_eq!(reply["error"]["x-reason"], "bad-argument");

    let reply = raw.ask("[1] ");
    let desc = "QMP input must be a JSON object";
    assert_error(&reply, "GenericError", "bad-request", desc);

    let reply = raw.ask(b"{\"execute\":\"\xc3\x28\"}");
    assert_eq!(reply["error"]["x-reason"], "bad-json");
    assert!(raw.ask(r#"{"execute":"query-version"}"#)["return"].is_object());
}

#[test]
fn the_services_errors_keep_their_class_and_reason() {
    let stage = stage();
    let error = stage.client().call(&SnapshotDelete { name: "none".to_owned(), disks: None });
    let Err(ClientError::Remote(error)) = error else {
        panic!("{error:?}");
    };
    assert_eq!(error.class, control::ErrorClass::DeviceNotFound);
    assert_eq!(error.reason, "snapshot-not-found");
    assert_eq!(error.desc, "There is no snapshot 'none'");
}

#[test]
fn deep_nesting_and_oversize_are_refused_and_the_client_goes_on() {
    let stage = stage();
    let mut raw = stage.negotiated();
    for depth in [65, 100_000] {
        let deep = ["{\"execute\":", &"[".repeat(depth), &"]".repeat(depth), "}"].concat();
        let reply = raw.ask(deep);
        let desc = "JSON nesting depth limit exceeded: at most 64 levels";
        assert_error(&reply, "GenericError", "bad-json", desc);
    }
    let reply = raw.ask(["{\"execute\":\"", &"x".repeat(3 << 20), "\"}"].concat());
    let desc = "JSON token size limit exceeded: a request has at most 1048576 bytes";
    assert_error(&reply, "GenericError", "bad-json", desc);
    assert!(raw.ask(r#"{"execute":"query-version"}"#)["return"].is_object());
}

#[test]
fn a_lost_client_gets_in_step_with_a_control_character() {
    let stage = stage();
    for resync in ["\x1b".as_bytes(), b"\x00", b"\xff"] {
        let mut raw = stage.negotiated();
        raw.send(br#"{"execute":"quit","arguments":{"a":["#);
        let reply = raw.ask(resync);
        assert_eq!(reply["error"]["x-reason"], "bad-json");
        assert!(raw.ask(r#"{"execute":"query-version"}"#)["return"].is_object());
    }
    assert!(!stage.service.wait_for_quit(Duration::ZERO));
}

#[test]
fn a_slow_and_large_request_costs_linear_time() {
    let stage = stage();
    let mut raw = stage.negotiated();
    let began = Instant::now();
    let blanks = vec![b' '; 64];
    raw.send("{");
    for _ in 0..8_000 {
        raw.send(&blanks);
    }
    let reply = raw.ask("\"execute\":\"query-version\"}");
    assert!(reply["return"].is_object());
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn every_verb_listed_is_known() {
    let stage = stage();
    let mut client = stage.client();
    let listed = client.call(&QueryCommands {}).unwrap();
    assert_eq!(listed.len(), VERBS.len());
    for info in listed {
        if let Err(ClientError::Remote(error)) = client.call_value(&info.name, &json!({"?": 0})) {
            assert_ne!(error.reason, "unknown-command", "{}", info.name);
        } else {
            panic!("{} takes any argument", info.name);
        }
    }
}

#[test]
fn calls_are_typed_from_end_to_end() {
    let stage = stage();
    let mut client = stage.client();
    let version = client.call(&QueryVersion {}).unwrap();
    assert_eq!(version, VersionInfo::current());
    let disks = client.call(&QueryDisks {}).unwrap();
    assert_eq!(disks[0].image, "/vm/größe-vda.img");
    for name in ["s1", "s2"] {
        let created =
            client.call(&SnapshotCreate { name: name.to_owned(), disks: None, ..SnapshotCreate::default() });
        assert_eq!(created.unwrap().disks.len(), 2);
    }
    let of_vdb = QuerySnapshots { disk: Some("vdb".to_owned()) };
    assert_eq!(client.call(&of_vdb).unwrap().len(), 2);
    assert!(client.call(&QueryExports {}).unwrap().is_empty());
    let deleted = client.call(&SnapshotDelete { name: "s1".to_owned(), disks: None });
    assert_eq!(deleted.unwrap().disks, ["vda", "vdb"]);
}

#[test]
fn pages_of_changes_join_without_gap_or_overlap() {
    let stage = stage();
    let mut client = stage.client();
    for name in ["s1", "s2"] {
        let name = name.to_owned();
        client.call(&SnapshotCreate { name, disks: None, ..SnapshotCreate::default() }).unwrap();
    }
    let query = |limit: u64| QueryChangedBlocks {
        disk: "vda".to_owned(),
        since: "s1".to_owned(),
        snapshot: Some("s2".to_owned()),
        until: None,
        offset: 0,
        limit: limit.try_into().unwrap(),
    };
    let first = client.call(&query(100)).unwrap();
    assert_eq!(first.ranges.len(), 100);
    assert!(first.next_offset.is_some());
    let all = client.changed_blocks(&query(100)).unwrap();
    assert_eq!(all, client.call(&query(65_536)).unwrap());
    assert_eq!(all.ranges.len(), 8192);
    assert_eq!(all.next_offset, None);
}

#[test]
fn events_and_replies_never_interleave() {
    let stage = stage();
    let mut client = stage.client();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                stage.events.post(&Event::FrontendConnected { disk: "vda".to_owned() });
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        for _ in 0..300 {
            assert_eq!(client.call(&QueryDisks {}).unwrap().len(), 2);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let event = client.next_event(Some(PATIENCE)).unwrap().unwrap();
    assert_eq!(event.event, "FRONTEND_CONNECTED");
}

#[test]
fn events_reach_every_client_that_negotiated() {
    let stage = stage();
    let mut clients: Vec<_> = (0..3).map(|_| stage.client()).collect();
    let mut unnegotiated = stage.raw();
    clients[0]
        .call(&SnapshotCreate {
            name: "s1".to_owned(),
            disks: Some(vec!["vda".to_owned()]),
            ..SnapshotCreate::default()
        })
        .unwrap();
    for client in &mut clients {
        let message = client.next_event(Some(PATIENCE)).unwrap().unwrap();
        let Some(Event::SnapshotCreated { name, disks }) = message.typed() else {
            panic!("{message:?}");
        };
        assert_eq!((name.as_str(), disks.len()), ("s1", 1));
        assert!(message.timestamp.seconds > 1_700_000_000);
    }
    let patience = Some(Duration::from_millis(20));
    assert!(clients[0].next_event(patience).unwrap().is_none());
    // The next line is the reply, not an event.
    let reply = unnegotiated.ask(r#"{"execute":"qmp_capabilities"}"#);
    assert_eq!(reply, json!({"return": {}}));
}

#[test]
fn no_event_is_missed_once_the_negotiation_is_answered() {
    let stage = stage();
    for _ in 0..200 {
        let mut client = stage.client();
        stage.events.post(&Event::FrontendConnected { disk: "vda".to_owned() });
        assert!(client.next_event(Some(PATIENCE)).unwrap().is_some());
    }
}

#[test]
fn a_client_that_never_reads_is_cut_off_and_hurts_nobody() {
    let stage = stage_with(Options { max_events: 100, ..Options::default() });
    let mut deaf = stage.negotiated();
    let mut other = stage.client();
    let began = Instant::now();
    // More than the kernel's socket buffer and the queue hold together.
    let desc = "x".repeat(10_000);
    for _ in 0..1000 {
        stage.events.post(&Event::TrackerReset {
            disk: "vda".to_owned(),
            generation: String::new(),
            reason: "test".to_owned(),
            desc: desc.clone(),
        });
        // The other client reads.
        assert!(other.next_event(Some(PATIENCE)).unwrap().is_some());
    }
    assert!(began.elapsed() < Duration::from_secs(10));
    stage.wait_for_clients(1);
    assert!(other.call(&QueryStatus {}).unwrap().running);
    while !deaf.at_end() {}
}

#[test]
fn a_client_that_asks_without_reading_is_cut_off_in_the_end() {
    let stage = stage_with(Options { write_timeout: Duration::from_millis(200), ..Options::default() });
    let mut deaf = stage.negotiated();
    let request = br#"{"execute":"query-disks"}"#.repeat(100);
    while deaf.stream.write_all(&request).is_ok() {}
    stage.wait_for_clients(0);
}

#[test]
fn a_slow_verb_holds_up_its_own_client_only() {
    let stage = stage();
    let mut slow = stage.negotiated();
    slow.send(r#"{"execute":"snapshot-create","arguments":{"name":"slow"},"id":1}"#);
    let mut quick = stage.client();
    let began = Instant::now();
    quick.call(&QueryStatus {}).unwrap();
    assert!(began.elapsed() < Duration::from_millis(400));
    assert_eq!(slow.line()["event"], "SNAPSHOT_CREATED");
    assert_eq!(slow.line()["id"], 1);
}

#[test]
fn many_clients_are_served_and_one_too_many_is_told() {
    let stage = stage();
    let mut clients: Vec<_> = (0..64).map(|_| stage.client()).collect();
    for client in &mut clients {
        client.call(&QueryVersion {}).unwrap();
    }
    match Client::connect(&stage.path, PATIENCE) {
        Err(ClientError::Remote(error)) => assert_eq!(error.reason, "too-many-clients"),
        other => panic!("{other:?}"),
    }
    clients.pop();
    stage.wait_for_clients(63);
    stage.client().call(&QueryVersion {}).unwrap();
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    let stage = stage();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for turn in 0..200 {
        let mut stream = UnixStream::connect(&stage.path).unwrap();
        if turn % 2 == 0 {
            // Dies in the middle of a request.
            let _ = stream.write_all(br#"{"execute":"qmp_cap"#);
        }
    }
    stage.wait_for_clients(0);
    // Other tests of this process open descriptors too, but not hundreds.
    assert!(descriptors() < before + 150, "{} {before}", descriptors());
}

#[test]
fn a_client_that_sends_no_more_still_gets_its_answers() {
    let stage = stage();
    let mut raw = stage.raw();
    raw.send(r#"{"execute":"qmp_capabilities"}{"execute":"query-disks"}"#);
    raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(raw.line(), json!({"return": {}}));
    assert!(raw.line()["return"].is_array());
    assert!(raw.at_end());
}

#[test]
fn quit_is_answered_before_the_daemon_hears_of_it() {
    let stage = stage();
    let mut client = stage.client();
    let mut bystander = stage.client();
    client.call(&Quit {}).unwrap();
    assert!(stage.service.wait_for_quit(PATIENCE));
    stage.server.stop(PATIENCE);
    assert_eq!(stage.server.clients(), 0);
    assert!(!stage.path.exists());
    assert!(bystander.events().next().is_none());
    match Client::connect(&stage.path, PATIENCE) {
        Err(error @ ClientError::NoDaemon { .. }) => {
            let text = error.to_string();
            assert!(text.contains("ebbtide serve"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn stop_lets_the_verb_in_progress_answer() {
    let stage = stage();
    let mut client = stage.client();
    std::thread::scope(|scope| {
        let call = scope.spawn(|| {
            client.call(&SnapshotCreate { name: "slow".to_owned(), disks: None, ..SnapshotCreate::default() })
        });
        std::thread::sleep(Duration::from_millis(100));
        stage.server.stop(PATIENCE);
        assert_eq!(call.join().unwrap().unwrap().name, "slow");
    });
    assert_eq!(stage.server.clients(), 0);
}

#[test]
fn stop_does_not_wait_for_a_client_that_does_not_read() {
    let stage = stage();
    let mut deaf = stage.negotiated();
    deaf.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let request = br#"{"execute":"query-disks"}"#.repeat(100);
    while deaf.stream.write_all(&request).is_ok() {}
    let began = Instant::now();
    stage.server.stop(Duration::from_millis(300));
    assert!(began.elapsed() < Duration::from_secs(3));
    stage.wait_for_clients(0);
}

#[test]
fn nothing_of_a_server_outlives_it() {
    let Stage { server, service, path, _directory: directory, .. } = stage();
    let mut client = Client::connect(&path, PATIENCE).unwrap();
    drop(server);
    assert!(client.call(&QueryStatus {}).is_err());
    let deadline = Instant::now() + PATIENCE;
    // The server's threads are the others that hold the service.
    while Arc::strong_count(&service) > 1 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!path.exists());
    assert!(directory.path().exists());
}

#[test]
fn clients_may_connect_before_the_server_serves() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.sock");
    let listener = Listener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        let early = scope.spawn(|| Client::connect(&path, PATIENCE).map(drop));
        std::thread::sleep(Duration::from_millis(50));
        let events = EventHub::new();
        let service = Arc::new(Rehearsal::new(events.clone()));
        let _server = Server::start(listener, service, events, Options::default()).unwrap();
        early.join().unwrap().unwrap();
    });
}

#[test]
fn a_daemon_that_hangs_is_a_timeout() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.sock");
    let _listener = Listener::bind(&path).unwrap();
    let timeout = Duration::from_millis(100);
    let error = Client::connect(&path, timeout).unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
}

#[test]
fn a_socket_that_speaks_something_else_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    for hello in ["NBDMAGIC\n", "{}\n", "{\"QMP\":1}\n{\"id\":1}\n", ""] {
        std::thread::scope(|scope| {
            scope.spawn(|| listener.accept().unwrap().0.write_all(hello.as_bytes()));
            let error = Client::connect(&path, PATIENCE).unwrap_err();
            let expected = match hello {
                "" => matches!(error, ClientError::Closed),
                _ => matches!(error, ClientError::Protocol { .. } | ClientError::Closed),
            };
            assert!(expected, "{hello}: {error:?}");
        });
    }
}
