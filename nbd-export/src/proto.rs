//! The numbers of the NBD wire, each once, in the order of NBD `doc/proto.md`.
//!
//! Everything on the wire is big-endian. Absent: any logic, and numbers of features that this
//! server does not know (oldstyle, TLS, extended headers) except where it names them to refuse.

/// First eight bytes of a server, `NBDMAGIC` (proto.md, "Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`: second half of the greeting, and first field of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First field of every reply to an option (proto.md, "Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First field of a request (proto.md, "Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First field of a simple reply (proto.md, "Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First field of a chunk (proto.md, "Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Bytes of an option's header: magic, option, length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of an option reply's header: magic, option, type, length.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply without data.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a chunk's header.
pub const CHUNK_HEADER_BYTES: usize = 20;

/// Longest string of the protocol (proto.md, "Values": strings SHOULD be at most 4096 bytes).
pub const MAX_STRING_BYTES: usize = 4096;
/// Zeros after the reply to [`OPT_EXPORT_NAME`] unless `NO_ZEROES` was agreed.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;

/// Handshake flag: fixed newstyle (proto.md, "Handshake flags").
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: no padding after `EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag that answers [`FLAG_FIXED_NEWSTYLE`] (proto.md, "Client flags").
pub const FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag that answers [`FLAG_NO_ZEROES`].
pub const FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Transmission flag, always set (proto.md, "Transmission flags").
pub const FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: the export refuses writes.
pub const FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: [`CMD_FLUSH`] is understood.
pub const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: [`CMD_FLAG_FUA`] is understood.
pub const FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: [`CMD_TRIM`] is understood.
pub const FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: [`CMD_WRITE_ZEROES`] is understood.
pub const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: [`CMD_FLAG_DF`] is understood (structured replies only).
pub const FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: several connections see one state.
pub const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: [`CMD_CACHE`] is understood.
pub const FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: [`CMD_FLAG_FAST_ZERO`] is understood.
pub const FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

/// Option: choose an export, no error reply possible (proto.md, "Option types").
pub const OPT_EXPORT_NAME: u32 = 1;
/// Option: end the session.
pub const OPT_ABORT: u32 = 2;
/// Option: list the exports.
pub const OPT_LIST: u32 = 3;
/// Option: upgrade to TLS; refused here.
pub const OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const OPT_INFO: u32 = 6;
/// Option: describe an export and begin transmission.
pub const OPT_GO: u32 = 7;
/// Option: agree on structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: list meta contexts.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: select meta contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Option: agree on 64-bit headers; refused here.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done (proto.md, "Option reply types").
pub const REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const REP_SERVER: u32 = 2;
/// Option reply: one piece of information on an export.
pub const REP_INFO: u32 = 3;
/// Option reply: one meta context.
pub const REP_META_CONTEXT: u32 = 4;
/// Option error: the option is not known.
pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
/// Option error: refused by policy.
pub const REP_ERR_POLICY: u32 = 0x8000_0002;
/// Option error: malformed, or at the wrong time.
pub const REP_ERR_INVALID: u32 = 0x8000_0003;
/// Option error: no such export.
pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
/// Option error: the server is going away.
pub const REP_ERR_SHUTDOWN: u32 = 0x8000_0007;
/// Option error: longer than the server is willing to take.
pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

/// Information: size and transmission flags (proto.md, `NBD_REP_INFO`).
pub const INFO_EXPORT: u16 = 0;
/// Information: canonical name.
pub const INFO_NAME: u16 = 1;
/// Information: description.
pub const INFO_DESCRIPTION: u16 = 2;
/// Information: minimum, preferred and maximum block size.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Command flag: durable before the reply (proto.md, "Command flags").
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: zeros must be allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: one content chunk only.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: one extent only.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: fail unless faster than writing.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

/// Command: read (proto.md, "Request types").
pub const CMD_READ: u16 = 0;
/// Command: write.
pub const CMD_WRITE: u16 = 1;
/// Command: disconnect.
pub const CMD_DISC: u16 = 2;
/// Command: flush.
pub const CMD_FLUSH: u16 = 3;
/// Command: discard.
pub const CMD_TRIM: u16 = 4;
/// Command: read ahead.
pub const CMD_CACHE: u16 = 5;
/// Command: write zeros.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Command: status of blocks in the selected meta contexts.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Chunk flag: the last of its reply (proto.md, "Structured reply flags").
pub const REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: nothing but the end (proto.md, "Structured reply types").
pub const REPLY_TYPE_NONE: u16 = 0;
/// Chunk: data at an offset.
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: extents of one meta context.
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: an error.
pub const REPLY_TYPE_ERROR: u16 = 0x8001;
/// Chunk: an error at an offset.
pub const REPLY_TYPE_ERROR_OFFSET: u16 = 0x8002;

/// `base:allocation`: not allocated (proto.md, "`base:allocation` metadata context").
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;
/// `qemu:dirty-bitmap:`: changed (QEMU `docs/interop/nbd.txt`).
pub const STATE_DIRTY: u32 = 1 << 0;

/// The one meta context of the `base:` namespace.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
/// Namespace of the protocol's own meta contexts.
pub const NAMESPACE_BASE: &str = "base:";
/// Namespace of QEMU's meta contexts (QEMU `docs/interop/nbd.txt`).
pub const NAMESPACE_QEMU: &str = "qemu:";
/// What a bitmap's name follows in its meta context (QEMU `docs/interop/nbd.txt`).
pub const CONTEXT_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";

/// Error value (proto.md, "Error values").
pub const EPERM: u32 = 1;
/// Error value.
pub const EIO: u32 = 5;
/// Error value.
pub const ENOMEM: u32 = 12;
/// Error value.
pub const EINVAL: u32 = 22;
/// Error value.
pub const ENOSPC: u32 = 28;
/// Error value.
pub const EOVERFLOW: u32 = 75;
/// Error value.
pub const ENOTSUP: u32 = 95;
/// Error value.
pub const ESHUTDOWN: u32 = 108;

/// Smallest unit of a request. One byte: clients such as Python's `nbd` read 512 bytes
/// whatever is advertised (proto.md, "Block size constraints").
pub const MIN_BLOCK_BYTES: u32 = 1;
/// Largest read, write or cache request; what clients assume when nothing is said
/// (proto.md, "Block size constraints").
pub const MAX_BLOCK_BYTES: u32 = 32 << 20;
