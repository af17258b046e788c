//! The transmission phase: many requests at once over one stream.
//!
//! One receiver takes requests off the stream, in order, as long as [`Limits`] leave room; each
//! then runs as its own future, and its reply is written when it is done, whoever is first.
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
    /// Room for what is read, or what is to be written.
    data: Option<Lease<'p>>,
}

/// A complete reply.
enum Reply<'p> {
    Header([u8; SIMPLE_REPLY_BYTES]),
    Bytes(Vec<u8>),
    Data(Lease<'p>),
}

impl Reply<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Reply::Header(bytes) => bytes,
            Reply::Bytes(bytes) => bytes,
            Reply::Data(lease) => lease.framed(),
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
        let Connection { mut incoming, writer, limits } = self;
        let largest = usize::try_from(proto::MAX_BLOCK_BYTES).unwrap_or(usize::MAX);
        let pool = Pool::new(limits.data_bytes.max(largest));
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
            match next_job(incoming, &agreed, &pool, &ending).await {
                Ok(job) => job.map(|job| (job, incoming)),
                Err(error) => {
                    failure.borrow_mut().get_or_insert(error);
                    None
                }
            }
        });
        jobs.for_each_concurrent(limits.requests.max(1), async |job| {
            let reply = run(&session, job).await;
            let mut writer = writer.lock().await;
            if deaf.get() {
                return;
            }
            if let Err(error) = writer.write_all(reply.bytes()).await {
                deaf.set(true);
                writer.abort();
                failure.borrow_mut().get_or_insert(Error::Io(error));
            }
        })
        .await;

        match failure.into_inner() {
            Some(error) => Err(error),
            None => Ok(ending.get()),
        }
    }
}

/// Receives one request, with its payload and room for its data; `None` at the end.
async fn next_job<'p, R: ReadHalf>(
    incoming: &mut Incoming<R>,
    agreed: &Agreed<'_>,
    pool: &'p Pool,
    ending: &Cell<Ending>,
) -> Result<Option<Job<'p>>, Error> {
    let mut bytes = [0; REQUEST_BYTES];
    if !incoming.fill_or_eof(&mut bytes, "a request").await? {
        return Ok(None);
    }
    let header = Header::parse(&bytes)?;
    log::trace!("{header:?}");
    let work = request::check(&header, agreed);
    let data = match work {
        Ok(Command::Disconnect) => {
            ending.set(Ending::Disconnected);
            return Ok(None);
        }
        // Within the maximum, so it fits a usize.
        Ok(Command::Read { len, .. }) => Some(pool.lend(usize::try_from(len).unwrap_or(0)).await),
        Ok(Command::Write { len, .. }) => {
            let mut lease = pool.lend(usize::try_from(len).unwrap_or(0)).await;
            incoming.fill(lease.data_mut(), "the data of a write").await?;
            Some(lease)
        }
        Err(ref error) => {
            log::debug!("request refused: {error} ({header:?})");
            incoming.skip(header.payload_len(), "the data of a write").await?;
            None
        }
        Ok(_) => None,
    };
    Ok(Some(Job { header, work, data }))
}

/// Carries a request out and forms its reply.
async fn run<'p, E: Export>(session: &Session<E>, mut job: Job<'p>) -> Reply<'p> {
    let header = job.header;
    let result = match job.work {
        Ok(command) => perform(session, &header, command, &mut job.data).await,
        Err(refusal) => Err(refusal),
    };
    match result {
        Ok(Some(bytes)) => Reply::Bytes(bytes),
        Ok(None) => match job.data {
            Some(lease) if header.kind == proto::CMD_READ => Reply::Data(lease),
            _ => Reply::Header(reply::simple(header.cookie, None)),
        },
        Err(error) if session.structured => {
            Reply::Bytes(reply::error(header.cookie, &error, header.offset, header.end()))
        }
        Err(error) => Reply::Header(reply::simple(header.cookie, Some(error.errno))),
    }
}

/// Calls the export. A reply that is neither data nor a bare success is answered as bytes.
async fn perform<E: Export>(
    session: &Session<E>,
    header: &Header,
    command: Command,
    data: &mut Option<Lease<'_>>,
) -> Result<Option<Vec<u8>>, ExportError> {
    let export = &session.export;
    match (command, data) {
        (Command::Read { offset, len }, Some(lease)) => {
            export.read(offset, lease.data_mut()).await?;
            if session.structured {
                lease.put_header(&reply::data_header(header.cookie, offset, len));
            } else {
                lease.put_header(&reply::simple(header.cookie, None));
            }
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
