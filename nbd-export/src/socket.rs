//! A client's socket on the executor's ring, as the two halves of a connection.
//!
//! Absent: accepting, deadlines and threads; the daemon owns those.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use cow_engine::host::HostStorage;

use crate::stream::{ReadHalf, WriteHalf};

/// A stream socket of either kind.
#[derive(Debug)]
pub enum Socket {
    /// Of a host-local client.
    Unix(std::os::unix::net::UnixStream),
    /// Of a client on a network.
    Tcp(std::net::TcpStream),
}

impl Socket {
    /// Ends the stream in one direction or both; pending transfers on it end too.
    ///
    /// # Errors
    /// Those of `shutdown`, such as that the peer is gone already.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.shutdown(how),
            Self::Tcp(socket) => socket.shutdown(how),
        }
    }

    /// A second handle of the same socket, to end it from another thread.
    ///
    /// # Errors
    /// If the process may have no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(socket) => Self::Unix(socket.try_clone()?),
            Self::Tcp(socket) => Self::Tcp(socket.try_clone()?),
        })
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// One half of a socket whose transfers go through an executor's ring.
pub struct SocketHalf {
    io: HostStorage,
    socket: Rc<Socket>,
}

impl SocketHalf {
    /// The reading and the writing half of `socket`.
    pub fn pair(io: &HostStorage, socket: Socket) -> (Self, Self) {
        let socket = Rc::new(socket);
        let half = || Self { io: io.clone(), socket: socket.clone() };
        (half(), half())
    }
}

impl ReadHalf for SocketHalf {
    async fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.io.recv(self.socket.as_fd(), buf).await
    }
}

impl WriteHalf for SocketHalf {
    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.io.send(self.socket.as_fd(), bytes).await {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn abort(&mut self) {
        // The peer may be gone already, which is what is wanted.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
