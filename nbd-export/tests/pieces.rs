//! What fails when a request is carried out piece by piece, for want of memory.

mod support;

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use nbd_export::{
    Budget, Context, Ending, Errno, Error, Export, ExportError, ExportInfo, Exports, Extents, Listing,
    Refusal, proto,
};
use support::wire::{Client, FIXED, Message};

const MIB: usize = 1 << 20;

/// An export that has an end.
struct Broken(ExportInfo);

impl Export for Broken {
    fn info(&self) -> &ExportInfo {
        &self.0
    }

    async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        let end = offset + buf.len() as u64;
        if end > 5 << 20 {
            return Err(ExportError::new(Errno::Io, "it ends here").at(5 << 20));
        }
        buf.fill(1);
        Ok(())
    }

    async fn write(&self, offset: u64, data: &[u8], _: bool) -> Result<(), ExportError> {
        self.read(offset, &mut vec![0; data.len()]).await
    }

    async fn status(&self, _: Context, _: Range<u64>, _: &mut Extents) -> Result<(), ExportError> {
        Ok(())
    }
}

impl Exports for Broken {
    type Export = Rc<Broken>;
    async fn find(&self, _: &str) -> Result<Rc<Broken>, Refusal> {
        Ok(Rc::new(Broken(self.0.clone())))
    }
    fn list(&self) -> Vec<Listing> {
        Vec::new()
    }
}

#[test]
fn what_fails_in_a_later_piece_is_an_error_or_the_end() {
    let exports = Broken(ExportInfo::writable("x", 1 << 30));
    let budget = Arc::new(Budget::new(0));
    // In chunks it can be said.
    let data = vec![1; 16 * MIB];
    let client = Client::new(FIXED)
        .structured()
        .go("x")
        .request(proto::CMD_READ, 0, 1, 0, 16 << 20)
        .request(proto::CMD_WRITE, 0, 2, 0, 16 << 20)
        .data(&data)
        .request(proto::CMD_READ, 0, 3, 0, 4 << 20)
        .disconnect();
    let (ending, mut server) = client.talk_within(&budget, &exports);
    assert_eq!(ending.unwrap(), Ending::Disconnected);
    server.entered(&[proto::OPT_STRUCTURED_REPLY, proto::OPT_GO]);
    for _ in 0..5 {
        let Message::Chunk { cookie: 1, last: false, .. } = server.message(0) else { panic!("no data") };
    }
    let Message::Chunk { cookie: 1, last: true, kind, payload } = server.message(0) else { panic!("no end") };
    assert_eq!(
        (kind, &payload[payload.len() - 8..]),
        (proto::REPLY_TYPE_ERROR_OFFSET, &(5u64 << 20).to_be_bytes()[..])
    );
    assert_eq!(server.error_value(), proto::EIO, "of the write");
    assert!(server.data_of(3, 0, 4 * MIB).0 == data[..4 * MIB], "the stream is in step");
    // In a reply that has begun as a success it cannot.
    let plain = Client::new(FIXED).go("x");
    let whole = Client::new(FIXED).structured().go("x");
    for (client, flag) in [(plain, 0), (whole, proto::CMD_FLAG_DF)] {
        let client = client.request(proto::CMD_READ, flag, 1, 0, 16 << 20).disconnect();
        let (ending, _) = client.talk_within(&budget, &exports);
        assert!(matches!(ending, Err(Error::HalfSent(_))), "{ending:?}");
    }
    // What fails at once is said.
    let client = Client::new(FIXED).go("x").request(proto::CMD_READ, 0, 1, 8 << 20, 16 << 20).disconnect();
    let (ending, mut server) = client.talk_within(&budget, &exports);
    assert_eq!(ending.unwrap(), Ending::Disconnected);
    server.entered(&[proto::OPT_GO]);
    assert_eq!(server.error_value(), proto::EIO);
}
