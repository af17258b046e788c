//! Fixed newstyle negotiation: from the greeting to an export in hand.
//!
//! What always holds: each option is answered before the next is read, and with exactly one
//! final reply; memory is bounded whatever lengths a client names; meta contexts belong to the
//! export they were selected for and are forgotten with the next selection, even a failed one.
//!
//! Absent: the deadline. It belongs to the caller, who shuts the stream down when it passes.

use crate::connection::Connection;
use crate::error::Error;
use crate::export::{Context, Export, ExportInfo, Exports, Refusal};
use crate::meta;
use crate::options::{
    InfoRequest, MAX_OPTION_BYTES, MetaRequest, OptionError, clip, parse_export_name, put_error, put_reply,
};
use crate::proto::{self, OPTION_HEADER_BYTES};
use crate::stream::{ReadHalf, WriteHalf};

/// What a handshake agreed on: an export and how to speak of it.
#[derive(Debug)]
pub struct Session<E> {
    pub(crate) export: E,
    pub(crate) structured: bool,
    /// Selected contexts with the ID that the client knows each by.
    pub(crate) contexts: Vec<(u32, Context)>,
}

impl<E: Export> Session<E> {
    /// The export that the client chose.
    pub fn export(&self) -> &E {
        &self.export
    }
}

/// State between options.
#[derive(Default)]
struct Negotiation {
    /// The client speaks fixed newstyle; otherwise it may only name an export.
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    selection: Option<Selection>,
}

/// What `NBD_OPT_SET_META_CONTEXT` selected: by name, since the export is looked up anew when
/// the client enters it. A context's ID is its place in the list.
struct Selection {
    export: String,
    contexts: Vec<String>,
}

/// What an option led to.
enum Step<E> {
    /// Replies to send; negotiation goes on.
    Reply,
    /// Replies to send; then transmission begins.
    Enter(Session<E>),
    /// Replies to send; then the connection ends.
    End,
}

impl<R: ReadHalf, W: WriteHalf> Connection<R, W> {
    /// Negotiates until the client has an export, or `None` if it left without one.
    ///
    /// Takes as long as the client likes. Where it took too long, shut the stream down: the
    /// future then ends by itself.
    ///
    /// # Errors
    /// If the stream fails or the client breaks the protocol; the connection is to be closed.
    pub async fn handshake<X: Exports>(&mut self, exports: &X) -> Result<Option<Session<X::Export>>, Error> {
        let mut state = self.greet().await?;
        let mut payload = Vec::new();
        let mut out = Vec::new();
        loop {
            let mut header = [0; OPTION_HEADER_BYTES];
            if !self.incoming.fill_or_eof(&mut header, "an option").await? {
                return Ok(None);
            }
            let (option, len) = parse_option_header(&header)?;
            if !state.fixed && option != proto::OPT_EXPORT_NAME {
                return Err(Error::Protocol("an option without fixed newstyle agreed on"));
            }
            out.clear();
            let step = if let Some(error) = refuse_unread(option, len) {
                self.incoming.skip(len, "an option").await?;
                put_error(&mut out, option, &error);
                Step::Reply
            } else {
                payload.clear();
                payload.resize(usize::try_from(len).unwrap_or(0), 0);
                self.incoming.fill(&mut payload, "an option").await?;
                log::debug!("option {option} with {len} bytes");
                answer(&mut state, exports, option, &payload, &mut out).await?
            };
            match step {
                Step::Reply => self.writer.write_all(&out).await?,
                Step::Enter(session) => {
                    self.writer.write_all(&out).await?;
                    return Ok(Some(session));
                }
                Step::End => {
                    // proto.md, NBD_OPT_ABORT: the client need not wait for this reply.
                    let _ = self.writer.write_all(&out).await;
                    return Ok(None);
                }
            }
        }
    }

    async fn greet(&mut self) -> Result<Negotiation, Error> {
        let offered = proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES;
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(proto::INIT_MAGIC.to_be_bytes());
        greeting.extend(proto::OPTION_MAGIC.to_be_bytes());
        greeting.extend(offered.to_be_bytes());
        self.writer.write_all(&greeting).await?;

        let mut flags = [0; 4];
        self.incoming.fill(&mut flags, "its flags").await?;
        let flags = u32::from_be_bytes(flags);
        if flags & !(proto::FLAG_C_FIXED_NEWSTYLE | proto::FLAG_C_NO_ZEROES) != 0 {
            return Err(Error::Protocol("client flags that were not offered"));
        }
        Ok(Negotiation {
            fixed: flags & proto::FLAG_C_FIXED_NEWSTYLE != 0,
            no_zeroes: flags & proto::FLAG_C_NO_ZEROES != 0,
            ..Negotiation::default()
        })
    }
}

fn parse_option_header(header: &[u8; OPTION_HEADER_BYTES]) -> Result<(u32, u32), Error> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, o0, o1, o2, o3, l0, l1, l2, l3] = *header;
    if u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]) != proto::OPTION_MAGIC {
        return Err(Error::Protocol("an option without its magic number"));
    }
    Ok((u32::from_be_bytes([o0, o1, o2, o3]), u32::from_be_bytes([l0, l1, l2, l3])))
}

/// Options whose payload need not be looked at.
fn refuse_unread(option: u32, len: u32) -> Option<OptionError> {
    match option {
        proto::OPT_EXPORT_NAME
        | proto::OPT_ABORT
        | proto::OPT_LIST
        | proto::OPT_INFO
        | proto::OPT_GO
        | proto::OPT_STRUCTURED_REPLY
        | proto::OPT_LIST_META_CONTEXT
        | proto::OPT_SET_META_CONTEXT => (len > MAX_OPTION_BYTES).then(|| {
            let message = format!("an option of {len} bytes is longer than {MAX_OPTION_BYTES}");
            OptionError::new(proto::REP_ERR_TOO_BIG, message)
        }),
        proto::OPT_STARTTLS => Some(OptionError::new(
            proto::REP_ERR_UNSUP,
            "this server does not speak TLS; use its Unix socket, or a tunnel",
        )),
        proto::OPT_EXTENDED_HEADERS => {
            Some(OptionError::new(proto::REP_ERR_UNSUP, "extended headers are not supported"))
        }
        _ => Some(OptionError::new(proto::REP_ERR_UNSUP, format!("option {option} is not known"))),
    }
}

/// Answers one option into `out`. Refusals that have a reply are replies, not errors.
async fn answer<X: Exports>(
    state: &mut Negotiation,
    exports: &X,
    option: u32,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Step<X::Export>, Error> {
    if option == proto::OPT_EXPORT_NAME {
        return enter_by_name(state, exports, payload, out)
            .await
            .map_err(|error| Error::Refused(error.message));
    }
    let result = match option {
        proto::OPT_ABORT => {
            put_reply(out, option, proto::REP_ACK, &[]);
            Ok(Step::End)
        }
        proto::OPT_LIST => list(exports, payload, out),
        proto::OPT_STRUCTURED_REPLY => structured_reply(state, payload, out),
        proto::OPT_LIST_META_CONTEXT => list_contexts(state, exports, payload, out).await,
        proto::OPT_SET_META_CONTEXT => select_contexts(state, exports, payload, out).await,
        proto::OPT_INFO | proto::OPT_GO => info(state, exports, option, payload, out).await,
        _ => Err(OptionError::new(proto::REP_ERR_UNSUP, "not known")),
    };
    Ok(result.unwrap_or_else(|error| {
        log::debug!("option {option} refused: {}", error.message);
        // What was said before an error is void, so it is not said.
        out.clear();
        put_error(out, option, &error);
        Step::Reply
    }))
}

/// `NBD_OPT_EXPORT_NAME`: no error reply exists, the caller closes the connection.
async fn enter_by_name<X: Exports>(
    state: &mut Negotiation,
    exports: &X,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Step<X::Export>, OptionError> {
    let export = find(exports, &parse_export_name(payload)?).await?;
    let info = export.info();
    out.extend(info.size_bytes.to_be_bytes());
    out.extend(info.transmission_flags(state.structured).to_be_bytes());
    if !state.no_zeroes {
        out.extend([0; proto::EXPORT_NAME_PADDING_BYTES]);
    }
    enter(state, export)
}

/// `NBD_OPT_LIST`.
fn list<X: Exports>(exports: &X, payload: &[u8], out: &mut Vec<u8>) -> Result<Step<X::Export>, OptionError> {
    if !payload.is_empty() {
        return Err(OptionError::invalid("a request for the list of exports takes no data"));
    }
    for listing in exports.list() {
        let name = clip(&listing.name).as_bytes();
        let len = u32::try_from(name.len()).unwrap_or(0).to_be_bytes();
        let description = clip(&listing.description).as_bytes();
        put_reply(out, proto::OPT_LIST, proto::REP_SERVER, &[&len, name, description]);
    }
    put_reply(out, proto::OPT_LIST, proto::REP_ACK, &[]);
    Ok(Step::Reply)
}

/// `NBD_OPT_STRUCTURED_REPLY`.
fn structured_reply<E>(
    state: &mut Negotiation,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Step<E>, OptionError> {
    if !payload.is_empty() {
        return Err(OptionError::invalid("a request for structured replies takes no data"));
    }
    state.structured = true;
    put_reply(out, proto::OPT_STRUCTURED_REPLY, proto::REP_ACK, &[]);
    Ok(Step::Reply)
}

/// `NBD_OPT_LIST_META_CONTEXT`.
async fn list_contexts<X: Exports>(
    state: &Negotiation,
    exports: &X,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Step<X::Export>, OptionError> {
    let option = proto::OPT_LIST_META_CONTEXT;
    require_structured(state)?;
    let request = MetaRequest::parse(payload)?;
    let export = find(exports, &request.name).await?;
    for context in meta::list(&request.queries, export.info()) {
        let name = meta::name_of(context, export.info());
        put_reply(out, option, proto::REP_META_CONTEXT, &[&[0; 4], clip(&name).as_bytes()]);
    }
    put_reply(out, option, proto::REP_ACK, &[]);
    Ok(Step::Reply)
}

/// `NBD_OPT_SET_META_CONTEXT`.
async fn select_contexts<X: Exports>(
    state: &mut Negotiation,
    exports: &X,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Step<X::Export>, OptionError> {
    let option = proto::OPT_SET_META_CONTEXT;
    state.selection = None;
    require_structured(state)?;
    let request = MetaRequest::parse(payload)?;
    let export = find(exports, &request.name).await?;
    let info = export.info();
    let selected = meta::select(&request.queries, info);
    if selected.len() > meta::MAX_SELECTED {
        let message = format!("at most {} meta contexts can be selected", meta::MAX_SELECTED);
        return Err(OptionError::new(proto::REP_ERR_TOO_BIG, message));
    }
    let mut contexts = Vec::with_capacity(selected.len());
    for (id, context) in (0u32..).zip(selected) {
        let name = meta::name_of(context, info).into_owned();
        let id = id.to_be_bytes();
        put_reply(out, option, proto::REP_META_CONTEXT, &[&id, clip(&name).as_bytes()]);
        contexts.push(name);
    }
    put_reply(out, option, proto::REP_ACK, &[]);
    state.selection = Some(Selection { export: info.name.clone(), contexts });
    Ok(Step::Reply)
}

fn require_structured(state: &Negotiation) -> Result<(), OptionError> {
    if state.structured {
        Ok(())
    } else {
        Err(OptionError::invalid("meta contexts need structured replies to be agreed on first"))
    }
}

/// `NBD_OPT_INFO` and `NBD_OPT_GO`.
async fn info<X: Exports>(
    state: &mut Negotiation,
    exports: &X,
    option: u32,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Step<X::Export>, OptionError> {
    let request = InfoRequest::parse(payload)?;
    let export = find(exports, &request.name).await?;
    put_infos(out, option, &request, export.info(), state.structured);
    let step = if option == proto::OPT_GO { enter(state, export)? } else { Step::Reply };
    put_reply(out, option, proto::REP_ACK, &[]);
    Ok(step)
}

fn put_infos(out: &mut Vec<u8>, option: u32, request: &InfoRequest, info: &ExportInfo, structured: bool) {
    let mut put = |kind: u16, parts: [&[u8]; 3]| {
        let [a, b, c] = parts;
        put_reply(out, option, proto::REP_INFO, &[&kind.to_be_bytes(), a, b, c]);
    };
    let size = info.size_bytes.to_be_bytes();
    let flags = info.transmission_flags(structured).to_be_bytes();
    put(proto::INFO_EXPORT, [&size, &flags, &[]]);
    if request.wants_name {
        put(proto::INFO_NAME, [clip(&info.name).as_bytes(), &[], &[]]);
    }
    if request.wants_description && !info.description.is_empty() {
        put(proto::INFO_DESCRIPTION, [clip(&info.description).as_bytes(), &[], &[]]);
    }
    // Told unasked too, as QEMU does: the maximum is worth knowing.
    put(
        proto::INFO_BLOCK_SIZE,
        [
            &proto::MIN_BLOCK_BYTES.to_be_bytes(),
            &info.preferred_on_wire().to_be_bytes(),
            &proto::MAX_BLOCK_BYTES.to_be_bytes(),
        ],
    );
}

/// Binds what was agreed to the export that is entered.
fn enter<E: Export>(state: &mut Negotiation, export: E) -> Result<Step<E>, OptionError> {
    let info = export.info();
    let mut contexts = Vec::new();
    if let Some(selection) = state.selection.take().filter(|s| s.export == info.name) {
        for (id, name) in (0u32..).zip(&selection.contexts) {
            let context = meta::exact(name, info).ok_or_else(|| {
                let message = format!("{name} is gone since it was selected; select again");
                OptionError::new(proto::REP_ERR_UNKNOWN, message)
            })?;
            contexts.push((id, context));
        }
    }
    log::debug!("export {:?} entered with {} meta contexts", info.name, contexts.len());
    Ok(Step::Enter(Session { export, structured: state.structured, contexts }))
}

/// Looks an export up; the empty name means the default one.
async fn find<X: Exports>(exports: &X, name: &str) -> Result<X::Export, OptionError> {
    let wanted = match name {
        "" => exports.default_name().ok_or_else(|| no_default(exports))?,
        _ => name.to_owned(),
    };
    exports.find(&wanted).await.map_err(|refusal| match refusal {
        Refusal::Unknown => OptionError::new(
            proto::REP_ERR_UNKNOWN,
            format!("there is no export {wanted:?}; {}", offer(exports)),
        ),
        Refusal::Policy(why) => OptionError::new(proto::REP_ERR_POLICY, why),
        Refusal::Shutdown => OptionError::new(proto::REP_ERR_SHUTDOWN, "the server is shutting down"),
    })
}

fn no_default<X: Exports>(exports: &X) -> OptionError {
    let message = format!("there is no default export; {}", offer(exports));
    OptionError::new(proto::REP_ERR_UNKNOWN, message)
}

/// What a client could ask for instead.
fn offer<X: Exports>(exports: &X) -> String {
    const SHOWN: usize = 16;
    let listings = exports.list();
    if listings.is_empty() {
        return "nothing is exported: take a snapshot or add an export first".into();
    }
    let names: Vec<_> = listings.iter().take(SHOWN).map(|l| format!("{:?}", l.name)).collect();
    let more = match listings.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    format!("ask for one of {}{more}", names.join(", "))
}
