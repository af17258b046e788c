//! The transmission phase: many requests at once over one stream.
//!
//! One receiver takes requests off the stream, in order, as long as [`Limits`] leave room; each
//! then runs as its own future, and its reply is written when it is done, whoever is first. Where there is no memory for
//! all of a read or a write, it is carried out piece by piece: a read by its future, which keeps the stream to itself from
//! the first piece on, a write by the receiver.
//!
//! What always holds: replies do not interleave; no unfinished future of an export is dropped,
//! even when the stream fails, since the kernel may still be filling its buffer; a request that
//! is refused leaves the stream in step.
//!
//! [`Limits`]: crate::Limits

use std::cell::{Cell, RefCell};

use futures_util::StreamExt;
use futures_util::lock::Mutex;
use futures_util::stream;

use crate::buffer::{Lease, Pool};
use crate::connection::Connection;
use crate::error::Error;
use crate::export::{Errno, Export, ExportError};
use crate::handshake::Session;
use crate::proto::{self, REQUEST_BYTES, SIMPLE_REPLY_BYTES};
use crate::reply;
use crate::request::{self, Agreed, Command, Header};
use crate::status::{self, Extents};
use crate::stream::{Incoming, ReadHalf, WriteHalf};

/// How a connection ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The client said goodbye (`NBD_CMD_DISC`), and everything before was answered.
    Disconnected,
    /// The stream ended between two messages.
    Closed,
}

/// A request ready to run, with the memory it needs.
struct Job<'p> {
    header: Header,
    work: Result<Command, ExportError>,
    /// Room for what is read, or what is to be written, or for the reply.
    data: Option<Lease<'p>>,
}

/// A complete reply, or a piece of one.
enum Reply<'j> {
    Header([u8; SIMPLE_REPLY_BYTES]),
    Bytes(Vec<u8>),
    Data(&'j [u8]),
}

impl Reply<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Reply::Header(bytes) => bytes,
            Reply::Bytes(bytes) => bytes,
            Reply::Data(bytes) => bytes,
        }
    }
}

impl<R: ReadHalf, W: WriteHalf> Connection<R, W> {
    /// Serves requests until the client disconnects or the stream ends; whatever was begun is
    /// finished. To end it from outside, shut the stream down: for reading (`SHUT_RD`), and
    /// what was begun is still answered; in both directions, and it is finished unheard.
    ///
    /// # Errors
    /// If the stream fails or the client breaks the protocol.
    pub async fn transmission<E: Export>(self, session: Session<E>) -> Result<Ending, Error> {
        let Connection { mut incoming, writer, limits, budget } = self;
        let largest = usize::try_from(proto::MAX_BLOCK_BYTES).unwrap_or(usize::MAX);
        let pool = Pool::new(limits.data_bytes.max(largest), budget);
        let writer = Mutex::new(writer);
        let agreed = Agreed {
            info: session.export.info(),
            structured: session.structured,
            has_contexts: !session.contexts.is_empty(),
        };
        let ending = Cell::new(Ending::Closed);
        // The first failure ends receiving. A broken protocol does not end sending: what was
        // asked before is still answered. A stream that takes no more bytes does.
        let failure = RefCell::new(None);
        let deaf = Cell::new(false);

        let jobs = stream::unfold(&mut incoming, async |incoming| {
            if deaf.get() {
                return None;
            }
            match next_job(incoming, &session, &agreed, &pool, &ending).await {
                Ok(job) => job.map(|job| (job, incoming)),
                Err(error) => {
                    failure.borrow_mut().get_or_insert(error);
                    None
                }
            }
        });
        jobs.for_each_concurrent(limits.requests.max(1), async |mut job| {
            let mut turn = None;
            loop {
                let rest = rest_of(&job);
                let reply = run(&session, &mut job).await;
                let writer = match &mut turn {
                    Some(writer) => writer,
                    None => turn.insert(writer.lock().await),
                };
                if deaf.get() {
                    return;
                }
                let sent = match reply {
                    Ok(reply) => writer.write_all(reply.bytes()).await.map_err(Error::Io),
                    Err(error) => Err(error),
                };
                if let Err(error) = sent {
                    deaf.set(true);
                    writer.abort();
                    failure.borrow_mut().get_or_insert(error);
                }
                match rest {
                    Some(rest) if job.work.is_ok() && !deaf.get() => job.go_on_with(rest),
                    _ => return,
                }
            }
        })
        .await;

        match failure.into_inner() {
            Some(error) => Err(error),
            None => Ok(ending.get()),
        }
    }
}

impl Job<'_> {
    /// Bytes of the part of a read that there is room for; all of it, for the most part.
    fn piece(&self) -> u32 {
        self.data.as_ref().map_or(0, |lease| u32::try_from(lease.data().len()).unwrap_or(u32::MAX))
    }

    fn go_on_with(&mut self, rest: Command) {
        if let (Command::Read { len, .. }, Some(lease)) = (&rest, &mut self.data) {
            lease.set_len(bytes(*len));
        }
        self.work = Ok(rest);
    }
}

/// What a read has left to do after its next piece.
fn rest_of(job: &Job<'_>) -> Option<Command> {
    let piece = job.piece();
    match job.work {
        Ok(Command::Read { offset, len }) if len > piece => {
            Some(Command::Read { offset: offset + u64::from(piece), len: len - piece })
        }
        _ => None,
    }
}

/// A length that is within the maximum, so that it fits.
fn bytes(len: u32) -> usize {
    usize::try_from(len).unwrap_or(0)
}

/// Receives one request, with its payload and room for its data; `None` at the end.
async fn next_job<'p, R: ReadHalf, E: Export>(
    incoming: &mut Incoming<R>,
    session: &Session<E>,
    agreed: &Agreed<'_>,
    pool: &'p Pool,
    ending: &Cell<Ending>,
) -> Result<Option<Job<'p>>, Error> {
    let mut head = [0; REQUEST_BYTES];
    if !incoming.fill_or_eof(&mut head, "a request").await? {
        return Ok(None);
    }
    let header = Header::parse(&head)?;
    log::trace!("{header:?}");
    let mut work = request::check(&header, agreed);
    let data = match work {
        Ok(Command::Disconnect) => {
            ending.set(Ending::Disconnected);
            return Ok(None);
        }
        Ok(Command::Read { len, .. }) => Some(pool.lend(bytes(len)).await),
        Ok(Command::Write { offset, len, fua }) => {
            let mut lease = pool.lend(bytes(len)).await;
            work = receive(incoming, &session.export, &mut lease, offset, len, fua).await?;
            Some(lease)
        }
        Ok(Command::BlockStatus { only_one, .. }) => {
            Some(pool.reserve(status::reply_bytes(session.contexts.len(), only_one)).await)
        }
        Err(ref error) => {
            log::debug!("request refused: {error} ({header:?})");
            incoming.skip(header.payload_len(), PAYLOAD).await?;
            None
        }
        Ok(_) => None,
    };
    Ok(Some(Job { header, work, data }))
}

/// What is received after a write.
const PAYLOAD: &str = "the data of a write";

/// Receives what is to be written into `lease`. Where it is too short, all but the last piece is written now; answers what
/// is left to do.
async fn receive<R: ReadHalf, E: Export>(
    incoming: &mut Incoming<R>,
    export: &E,
    lease: &mut Lease<'_>,
    mut offset: u64,
    mut len: u32,
    fua: bool,
) -> Result<Result<Command, ExportError>, Error> {
    loop {
        lease.set_len(bytes(len));
        incoming.fill(lease.data_mut(), PAYLOAD).await?;
        let piece = u32::try_from(lease.data().len()).unwrap_or(len);
        if piece == len {
            return Ok(Ok(Command::Write { offset, len, fua }));
        }
        let written = export.write(offset, lease.data(), fua).await;
        (offset, len) = (offset + u64::from(piece), len - piece);
        if let Err(error) = written {
            incoming.skip(len, PAYLOAD).await?;
            return Ok(Err(error));
        }
    }
}

/// Carries a request out, or the next piece of it, and forms its reply.
///
/// # Errors
/// If an earlier piece was sent and this one cannot be told.
async fn run<'j, E: Export>(session: &Session<E>, job: &'j mut Job<'_>) -> Result<Reply<'j>, Error> {
    let header = job.header;
    let result = match &job.work {
        Ok(command) => perform(session, &header, command, &mut job.data).await,
        Err(refusal) => Err(refusal.clone()),
    };
    if result.is_err() || matches!(job.work, Ok(Command::Write { .. })) {
        // The reply may have to wait for the client, and needs it no more.
        job.data = None;
    }
    match result {
        Ok(Some(bytes)) => Ok(Reply::Bytes(bytes)),
        Ok(None) => Ok(match &job.data {
            Some(lease) if header.kind == proto::CMD_READ => Reply::Data(lease.framed()),
            _ => Reply::Header(reply::simple(header.cookie, None)),
        }),
        Err(error) => {
            let is_first = !matches!(job.work, Ok(Command::Read { offset, .. }) if offset != header.offset);
            job.work = Err(error.clone());
            match session.structured {
                _ if !is_first && !is_in_chunks(session, &header) => Err(Error::HalfSent(error)),
                true => Ok(Reply::Bytes(reply::error(header.cookie, &error, header.offset, header.end()))),
                false => Ok(Reply::Header(reply::simple(header.cookie, Some(error.errno)))),
            }
        }
    }
}

/// Whether each piece of a read is a chunk, and not a part of the only one.
fn is_in_chunks<E>(session: &Session<E>, header: &Header) -> bool {
    session.structured && header.flags & proto::CMD_FLAG_DF == 0
}

/// Puts in front of a piece of a read what it is announced by. `len` is what the piece begins with and all that follows.
fn announce<E>(session: &Session<E>, header: &Header, offset: u64, len: u32, lease: &mut Lease<'_>) {
    let cookie = header.cookie;
    let piece = u32::try_from(lease.data().len()).unwrap_or(len);
    if is_in_chunks(session, header) {
        lease.put_header(&reply::data_header(cookie, offset, piece, piece == len));
    } else if offset != header.offset {
        lease.put_header(&[]);
    } else if session.structured {
        lease.put_header(&reply::data_header(cookie, offset, len, true));
    } else {
        lease.put_header(&reply::simple(cookie, None));
    }
}

/// Calls the export. A reply that is neither data nor a bare success is answered as bytes.
async fn perform<E: Export>(
    session: &Session<E>,
    header: &Header,
    command: &Command,
    data: &mut Option<Lease<'_>>,
) -> Result<Option<Vec<u8>>, ExportError> {
    let export = &session.export;
    match (command.clone(), data) {
        (Command::Read { offset, len }, Some(lease)) => {
            export.read(offset, lease.data_mut()).await?;
            announce(session, header, offset, len, lease);
            Ok(None)
        }
        (Command::Write { offset, fua, .. }, Some(lease)) => {
            export.write(offset, lease.data(), fua).await.map(|()| None)
        }
        (Command::Flush, _) => export.flush().await.map(|()| None),
        (Command::Trim { range, fua }, _) => export.trim(range, fua).await.map(|()| None),
        (Command::Cache { range }, _) => export.cache(range).await.map(|()| None),
        (Command::WriteZeroes { range, mode }, _) => export.write_zeroes(range, mode).await.map(|()| None),
        (Command::BlockStatus { offset, len, only_one }, _) => {
            block_status(session, header.cookie, offset, len, only_one).await.map(Some)
        }
        // The receiver ends at a disconnect and gives memory to every read and write.
        (Command::Disconnect | Command::Read { .. } | Command::Write { .. }, _) => {
            unreachable!("a request without what it needs")
        }
    }
}

/// Asks all contexts of one range and makes their answers agree.
async fn block_status<E: Export>(
    session: &Session<E>,
    cookie: u64,
    offset: u64,
    mut len: u32,
    only_one: bool,
) -> Result<Vec<u8>, ExportError> {
    let limit = status::extents_per_context(session.contexts.len(), only_one);
    let mut ids = Vec::with_capacity(session.contexts.len());
    let mut answers = Vec::with_capacity(session.contexts.len());
    for &(id, context) in &session.contexts {
        // What an earlier context left out would be cut off in the end.
        let mut out = Extents::new(len, limit);
        session.export.status(context, offset..offset + u64::from(len), &mut out).await?;
        len = out.covered();
        if len == 0 {
            let message = format!("nothing is known of the status at {offset}");
            return Err(ExportError::new(Errno::Io, message).at(offset));
        }
        ids.push(id);
        answers.push(out);
    }
    status::equalise(&mut answers);
    Ok(reply::block_status(cookie, &ids, &answers))
}
