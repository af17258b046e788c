//! The client's side of the wire: what it says, and how it takes apart what the server said.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use nbd_export::{Budget, Connection, Ending, Error, Exports, proto};

use super::{Record, Script, block_on};

/// Everything a client says in one connection.
#[derive(Clone, Default)]
pub struct Client {
    pub bytes: Vec<u8>,
}

pub const FIXED: u32 = proto::FLAG_C_FIXED_NEWSTYLE | proto::FLAG_C_NO_ZEROES;

impl Client {
    /// A client that answered the greeting.
    pub fn new(flags: u32) -> Self {
        Client { bytes: flags.to_be_bytes().to_vec() }
    }

    #[must_use]
    pub fn option(mut self, option: u32, payload: &[u8]) -> Self {
        self.bytes.extend(proto::OPTION_MAGIC.to_be_bytes());
        self.bytes.extend(option.to_be_bytes());
        self.bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        self.bytes.extend_from_slice(payload);
        self
    }

    #[must_use]
    pub fn structured(self) -> Self {
        self.option(proto::OPT_STRUCTURED_REPLY, &[])
    }

    #[must_use]
    pub fn go(self, name: &str) -> Self {
        self.option(proto::OPT_GO, &info(name, &[]))
    }

    #[must_use]
    pub fn set_contexts(self, name: &str, queries: &[&str]) -> Self {
        self.option(proto::OPT_SET_META_CONTEXT, &contexts(name, queries))
    }

    #[must_use]
    pub fn request(mut self, kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Self {
        self.bytes.extend(proto::REQUEST_MAGIC.to_be_bytes());
        self.bytes.extend(flags.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend(cookie.to_be_bytes());
        self.bytes.extend(offset.to_be_bytes());
        self.bytes.extend(len.to_be_bytes());
        self
    }

    #[must_use]
    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend_from_slice(data);
        self
    }

    #[must_use]
    pub fn disconnect(self) -> Self {
        self.request(proto::CMD_DISC, 0, 0, 0, 0)
    }

    /// Says it all, in reads of at most `step` bytes; answers how the connection ended and
    /// what the server said after its greeting.
    pub fn talk<X: Exports>(&self, exports: &X, step: usize) -> (Result<Ending, Error>, Server) {
        self.talk_over(exports, step, |connection| connection)
    }

    /// The same, with memory that is shared with others.
    pub fn talk_within<X: Exports>(
        &self,
        budget: &Arc<Budget>,
        exports: &X,
    ) -> (Result<Ending, Error>, Server) {
        self.talk_over(exports, 1 << 16, |connection| connection.sharing(budget.clone()))
    }

    fn talk_over<X: Exports>(
        &self,
        exports: &X,
        step: usize,
        prepare: impl FnOnce(Connection<Script, Record>) -> Connection<Script, Record>,
    ) -> (Result<Ending, Error>, Server) {
        let record = Record::default();
        let script = Script { bytes: self.bytes.clone(), at: 0, step };
        let connection = prepare(Connection::new(script, record.clone()));
        let result = block_on(connection.serve(exports));
        (result, Server::new(&record.bytes))
    }
}

pub fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
}

/// Payload of INFO and GO.
pub fn info(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut out = string(name);
    out.extend(u16::try_from(requests.len()).unwrap().to_be_bytes());
    requests.iter().for_each(|request| out.extend(request.to_be_bytes()));
    out
}

/// Payload of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = string(name);
    out.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|query| out.extend(string(query)));
    out
}

/// A reply to an option.
#[derive(Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub reply: u32,
    pub payload: Vec<u8>,
}

/// A message of the transmission phase.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    Simple { cookie: u64, error: u32, data: Vec<u8> },
    Chunk { cookie: u64, last: bool, kind: u16, payload: Vec<u8> },
}

/// What the server said, taken apart from the front.
pub struct Server {
    bytes: Vec<u8>,
    at: usize,
}

impl Server {
    pub fn new(bytes: &Rc<RefCell<Vec<u8>>>) -> Self {
        let mut server = Server { bytes: bytes.borrow().clone(), at: 0 };
        assert_eq!(server.u64(), proto::INIT_MAGIC);
        assert_eq!(server.u64(), proto::OPTION_MAGIC);
        assert_eq!(server.u16(), proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
        server
    }

    pub fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let taken = self.bytes[self.at..self.at + len].to_vec();
        self.at += len;
        taken
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    pub fn option_reply(&mut self) -> OptionReply {
        assert_eq!(self.u64(), proto::OPTION_REPLY_MAGIC);
        let (option, reply, len) = (self.u32(), self.u32(), self.u32());
        OptionReply { option, reply, payload: self.take(usize::try_from(len).unwrap()) }
    }

    /// Skips replies to `option` up to its final one, and answers the final one's type and,
    /// for an error, its text.
    pub fn final_reply(&mut self, option: u32) -> (u32, String) {
        loop {
            let reply = self.option_reply();
            assert_eq!(reply.option, option);
            if reply.reply == proto::REP_ACK || reply.reply & (1 << 31) != 0 {
                return (reply.reply, String::from_utf8(reply.payload).unwrap());
            }
        }
    }

    /// The next message; a successful simple reply is followed by `data_len` bytes.
    pub fn message(&mut self, data_len: usize) -> Message {
        match self.u32() {
            proto::SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (self.u32(), self.u64());
                let data = if error == 0 { self.take(data_len) } else { Vec::new() };
                Message::Simple { cookie, error, data }
            }
            proto::STRUCTURED_REPLY_MAGIC => {
                let (flags, kind) = (self.u16(), self.u16());
                let (cookie, len) = (self.u64(), self.u32());
                let payload = self.take(usize::try_from(len).unwrap());
                Message::Chunk { cookie, last: flags & 1 != 0, kind, payload }
            }
            other => panic!("neither reply nor chunk: {other:#x}"),
        }
    }

    /// Skips replies to `options`, all of which succeeded.
    pub fn entered(&mut self, options: &[u32]) {
        for &option in options {
            assert_eq!(self.final_reply(option).0, proto::REP_ACK);
        }
    }

    /// The data of one structured read, put together, and in how many chunks it came.
    pub fn data_of(&mut self, cookie: u64, offset: usize, len: usize) -> (Vec<u8>, usize) {
        let (mut data, mut chunks) = (vec![0; len], 0);
        loop {
            let Message::Chunk { cookie: of, last, kind, payload } = self.message(0) else {
                panic!("no chunk")
            };
            assert_eq!((of, kind), (cookie, proto::REPLY_TYPE_OFFSET_DATA));
            let (at, part) = payload.split_at(8);
            let at = usize::try_from(u64::from_be_bytes(at.try_into().unwrap())).unwrap() - offset;
            data[at..at + part.len()].copy_from_slice(part);
            chunks += 1;
            if last {
                return (data, chunks);
            }
        }
    }

    /// The error value of the next message, 0 for success.
    pub fn error_value(&mut self) -> u32 {
        match self.message(0) {
            Message::Simple { error, .. } => error,
            Message::Chunk { kind, payload, .. } if kind & 0x8000 != 0 => {
                u32::from_be_bytes(payload[..4].try_into().unwrap())
            }
            Message::Chunk { .. } => 0,
        }
    }
}
