//! The channel on which a back end speaks without being asked (`VHOST_USER_SET_BACKEND_REQ_FD`): it says
//! that the configuration space has changed, and the front end reads it anew.
//!
//! Absent: waiting. What a front end does not read is dropped: those that wait there say the same already.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketType, recvmsg,
    send, sockopt,
};
use vhost::vhost_user::message::BackendReq;

/// Bytes of a message without a body: request, flags, size.
const HEADER_BYTES: usize = 12;
/// Flags of a message: version 1, no answer wanted.
const FLAGS: u32 = 0x1;
/// Descriptors that a message may carry and we take, to close them.
const MAX_DESCRIPTORS: usize = 8;

/// A front end's end of the channel.
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Takes a descriptor that came with a message, if it can be a channel.
    pub(crate) fn of(socket: OwnedFd) -> Option<Self> {
        let is_stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
        let is_unix = sockopt::socket_domain(&socket).is_ok_and(|domain| domain == AddressFamily::UNIX);
        (is_stream && is_unix).then_some(Self { socket })
    }

    /// Says that the configuration space has changed (`VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`).
    ///
    /// # Errors
    /// Those of the socket; after one the channel may hold half a message and is to be dropped.
    pub(crate) fn config_changed(&self) -> io::Result<()> {
        let mut message = [0; HEADER_BYTES];
        message[..4].copy_from_slice(&u32::from(BackendReq::CONFIG_CHANGE_MSG).to_le_bytes());
        message[4..8].copy_from_slice(&FLAGS.to_le_bytes());
        let sent = send(&self.socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// Receives a message's header with the descriptors that come along.
pub(crate) fn receive_header(
    stream: &UnixStream,
    header: &mut [u8; HEADER_BYTES],
) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut descriptors = Vec::new();
    let mut done = 0;
    while done < header.len() {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut header[done..])];
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) if message.bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(message) => done += message.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(held) = message {
                descriptors.extend(held);
            }
        }
    }
    Ok(descriptors)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_change_is_one_message_without_a_body() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        Channel::of(ours.into()).unwrap().config_changed().unwrap();
        let mut message = [0; HEADER_BYTES];
        theirs.read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_front_end_that_does_not_read_holds_nobody_up() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let channel = Channel::of(ours.into()).unwrap();
        assert!((0..1_000_000).any(|_| channel.config_changed().is_err()));
    }

    #[test]
    fn a_file_is_no_channel() {
        assert!(Channel::of(std::fs::File::open("/dev/null").unwrap().into()).is_none());
        assert!(Channel::of(std::os::unix::net::UnixDatagram::unbound().unwrap().into()).is_none());
    }
}
