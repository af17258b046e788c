//! Many requests at once: order, bounds, and what happens when the stream breaks under them.

mod support;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

use futures_util::future::join;
use nbd_export::{
    Connection, Context, Ending, Error, Export, ExportError, ExportInfo, Exports, Extents, Limits, Listing,
    ReadHalf, Refusal, WriteHalf, proto,
};
use support::pipe::Pipe;
use support::wire::{Client, FIXED, Message, Server};
use support::{Record, Script, block_on};

/// An export whose reads wait until as many of them as `together` are pending, and then end in
/// reverse order.
struct Gathering {
    info: ExportInfo,
    together: usize,
    pending: RefCell<Vec<(u64, Waker)>>,
    released: Cell<bool>,
    most_pending: Cell<usize>,
    begun: Cell<usize>,
    finished: Cell<usize>,
}

impl Gathering {
    fn new(together: usize) -> Rc<Self> {
        Rc::new(Gathering {
            info: ExportInfo::read_only("x", 1 << 40),
            together,
            pending: RefCell::default(),
            released: Cell::new(false),
            most_pending: Cell::new(0),
            begun: Cell::new(0),
            finished: Cell::new(0),
        })
    }
}

impl Export for Gathering {
    fn info(&self) -> &ExportInfo {
        &self.info
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.begun.set(self.begun.get() + 1);
        let mut entered = false;
        poll_fn(|cx| {
            let mut pending = self.pending.borrow_mut();
            if !entered {
                entered = true;
                pending.push((offset, cx.waker().clone()));
                self.most_pending.set(self.most_pending.get().max(pending.len()));
                if pending.len() == self.together {
                    self.released.set(true);
                }
            }
            // Last come, first served.
            if self.released.get() && pending.last().is_some_and(|last| last.0 == offset) {
                pending.pop();
                match pending.last() {
                    Some((_, next)) => next.wake_by_ref(),
                    None => self.released.set(false),
                }
                return Poll::Ready(());
            }
            if self.released.get() {
                pending.last().inspect(|(_, next)| next.wake_by_ref());
            }
            Poll::Pending
        })
        .await;
        buf.fill(1);
        self.finished.set(self.finished.get() + 1);
        Ok(())
    }

    async fn status(&self, _: Context, _: Range<u64>, _: &mut Extents) -> Result<(), ExportError> {
        Ok(())
    }
}

struct Only(Rc<Gathering>);

impl Exports for Only {
    type Export = Rc<Gathering>;
    async fn find(&self, _: &str) -> Result<Rc<Gathering>, Refusal> {
        Ok(Rc::clone(&self.0))
    }
    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: "x".into(), description: String::new() }]
    }
}

fn reads(count: u64, len: u32) -> Client {
    let mut client = Client::new(FIXED).structured().go("");
    for cookie in 0..count {
        client = client.request(proto::CMD_READ, 0, cookie, cookie * u64::from(len), len);
    }
    client.disconnect()
}

fn talk(export: &Rc<Gathering>, client: &Client, limits: Limits, record: &Record) -> Result<Ending, Error> {
    let script = Script { bytes: client.bytes.clone(), at: 0, step: 1 << 16 };
    let connection = Connection::with_limits(script, record.clone(), limits);
    block_on(connection.serve(&Only(Rc::clone(export))))
}

fn cookies(record: &Record) -> Vec<u64> {
    let mut server = Server::new(&record.bytes);
    server.final_reply(proto::OPT_STRUCTURED_REPLY);
    server.final_reply(proto::OPT_GO);
    let mut cookies = Vec::new();
    while !server.is_at_end() {
        match server.message(0) {
            Message::Chunk { cookie, .. } | Message::Simple { cookie, .. } => cookies.push(cookie),
        }
    }
    cookies
}

#[test]
fn a_later_request_overtakes_and_a_disconnect_waits_for_all() {
    let export = Gathering::new(4);
    let record = Record::default();
    let ending = talk(&export, &reads(4, 4096), Limits::default(), &record);
    assert_eq!(ending.unwrap(), Ending::Disconnected);
    assert_eq!(cookies(&record), [3, 2, 1, 0]);
}

#[test]
fn no_more_requests_are_begun_than_the_limit() {
    let export = Gathering::new(5);
    let record = Record::default();
    let limits = Limits { requests: 5, ..Limits::default() };
    talk(&export, &reads(20, 4096), limits, &record).unwrap();
    assert_eq!(export.most_pending.get(), 5);
    assert_eq!(export.finished.get(), 20);
}

#[test]
fn large_reads_are_held_back_by_the_bytes_they_need() {
    let export = Gathering::new(2);
    let record = Record::default();
    // Two of 32 MiB fit in 64 MiB, though 16 requests are allowed.
    talk(&export, &reads(6, 32 << 20), Limits::default(), &record).unwrap();
    assert_eq!(export.most_pending.get(), 2);
    assert_eq!(cookies(&record).len(), 6);
}

#[test]
fn when_the_client_is_gone_what_was_begun_is_finished_and_nothing_begins() {
    let export = Gathering::new(4);
    // Room for the handshake and one reply.
    let record = Record { room: 5000, ..Record::default() };
    let limits = Limits { requests: 4, ..Limits::default() };
    let result = talk(&export, &reads(40, 4096), limits, &record);
    assert!(matches!(result, Err(Error::Io(_))), "{result:?}");
    assert_eq!(*record.aborted.borrow(), 1, "the pending read is ended, once");
    assert_eq!(export.begun.get(), export.finished.get());
    assert!(export.begun.get() < 12, "{} begun", export.begun.get());
}

#[test]
fn an_export_that_tells_nothing_of_its_status_is_an_error_and_not_a_loop() {
    let export = Gathering::new(1);
    let record = Record::default();
    let client = Client::new(FIXED).structured().set_contexts("x", &["base:allocation"]).go("x").request(
        proto::CMD_BLOCK_STATUS,
        0,
        1,
        4096,
        4096,
    );
    talk(&export, &client, Limits::default(), &record).unwrap();
    let mut server = Server::new(&record.bytes);
    server.final_reply(proto::OPT_STRUCTURED_REPLY);
    server.final_reply(proto::OPT_SET_META_CONTEXT);
    server.final_reply(proto::OPT_GO);
    assert_eq!(server.error_value(), proto::EIO);
}

#[test]
fn a_client_that_waits_and_one_that_does_not_are_both_served_over_a_narrow_pipe() {
    const COUNT: u64 = 50;
    const LEN: u32 = 3000;
    for window in [1, 8, 50] {
        let export = Gathering::new(1);
        let (up, down) = (Pipe::new(100), Pipe::new(700));
        let server = async {
            let connection = Connection::new(up.clone(), down.clone());
            let ending = connection.serve(&Only(Rc::clone(&export))).await;
            down.close();
            ending
        };
        let sent = Cell::new(0);
        let received = Cell::new(0u64);
        let waiting = RefCell::new(None::<Waker>);
        let talk = async {
            let mut up = up.clone();
            up.write_all(&Client::new(FIXED).structured().go("").bytes).await.unwrap();
            for cookie in 0..COUNT {
                poll_fn(|cx| {
                    if sent.get() - received.get() < window {
                        return Poll::Ready(());
                    }
                    *waiting.borrow_mut() = Some(cx.waker().clone());
                    Poll::Pending
                })
                .await;
                let whole = Client::default().request(proto::CMD_READ, 0, cookie, cookie, LEN);
                up.write_all(&whole.bytes).await.unwrap();
                sent.set(sent.get() + 1);
            }
            up.write_all(&Client::default().disconnect().bytes).await.unwrap();
        };
        let listen = async {
            let mut down = down.clone();
            // Greeting, ACK, two INFOs, ACK; then replies of equal length.
            let mut at = 0u64;
            let handshake = 18 + 20 + (20 + 12) + (20 + 14) + 20;
            let reply = 28 + u64::from(LEN);
            let mut buf = [0; 64];
            loop {
                match down.read(&mut buf).await.unwrap() {
                    0 => break,
                    n => at += n as u64,
                }
                received.set(at.saturating_sub(handshake) / reply);
                waiting.take().into_iter().for_each(Waker::wake);
            }
            assert_eq!(at, handshake + COUNT * reply);
        };
        let (ending, _) = block_on(join(server, join(talk, listen)));
        assert_eq!(ending.unwrap(), Ending::Disconnected, "window {window}");
    }
}
