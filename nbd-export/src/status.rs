//! Block status: what an export says of a range, and how several contexts are made to agree.
//!
//! What always holds of a list of extents: it starts where the request starts, is contiguous,
//! has no empty extent, no two neighbours of the same status, never passes the request's end,
//! never has more extents than it was allowed. All lists of one reply cover the same length:
//! the protocol does not ask for it, but a client that zips two contexts together silently
//! loses changed data where one of them falls short.

use crate::proto;

/// Most extents of all contexts in one reply, 512 KiB on the wire. The protocol's limit is
/// 2^20 per chunk (proto.md, `NBD_REPLY_TYPE_BLOCK_STATUS`).
pub(crate) const MAX_EXTENTS_PER_REPLY: usize = 1 << 16;

/// What a context says of an extent: a word of flags whose meaning is the context's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(u32);

impl Status {
    /// Allocation: data, or nothing better is known. Always safe to say.
    pub const DATA: Status = Status(0);
    /// Allocation: allocated, and reads as zeros.
    pub const ZERO: Status = Status(proto::STATE_ZERO);
    /// Allocation: not allocated, and reads as zeros.
    pub const HOLE: Status = Status(proto::STATE_HOLE | proto::STATE_ZERO);
    /// Bitmap: unchanged.
    pub const CLEAN: Status = Status(0);
    /// Bitmap: changed.
    pub const DIRTY: Status = Status(proto::STATE_DIRTY);

    /// The word on the wire.
    pub fn flags(self) -> u32 {
        self.0
    }
}

/// A run of bytes of one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes; never 0 in a list.
    pub len: u32,
    /// Status of all its bytes.
    pub status: Status,
}

/// The extents of one context, gathered from the start of the requested range.
#[derive(Debug)]
pub struct Extents {
    list: Vec<Extent>,
    limit: usize,
    /// Bytes of the request not yet covered.
    left: u32,
    covered: u32,
    full: bool,
}

impl Extents {
    /// An empty list for a request of `len` bytes that takes at most `limit` extents.
    pub fn new(len: u32, limit: usize) -> Self {
        Extents { list: Vec::new(), limit, left: len, covered: 0, full: false }
    }

    /// Appends `len` bytes of `status`; neighbours of the same status become one.
    ///
    /// Answers whether more is wanted. After `false` the caller should stop; what it pushes
    /// nevertheless is ignored, as is what passes the end of the request.
    pub fn push(&mut self, len: u64, status: Status) -> bool {
        if self.full {
            return false;
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(self.left);
        if len > 0 {
            let at_limit = self.list.len() == self.limit;
            match self.list.last_mut() {
                Some(last) if last.status == status => last.len += len,
                _ if at_limit => {
                    self.full = true;
                    return false;
                }
                _ => self.list.push(Extent { len, status }),
            }
            self.left -= len;
            self.covered += len;
        }
        self.full = self.left == 0;
        !self.full
    }

    /// Bytes covered so far, from the start of the request.
    pub fn covered(&self) -> u32 {
        self.covered
    }

    /// The extents, in order.
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }

    /// Shortens the list to `len` covered bytes.
    pub(crate) fn truncate(&mut self, len: u32) {
        while self.covered > len {
            let Some(last) = self.list.last_mut() else { return };
            let excess = self.covered - len;
            if last.len > excess {
                last.len -= excess;
                self.covered = len;
            } else {
                self.covered -= last.len;
                self.list.pop();
            }
        }
    }
}

/// Memory for the extents of all contexts, and for the reply that is made of them.
pub(crate) fn reply_bytes(contexts: usize, only_one: bool) -> usize {
    2 * size_of::<Extent>() * contexts * extents_per_context(contexts, only_one)
}

/// How many extents each of `contexts` contexts may have in one reply.
pub(crate) fn extents_per_context(contexts: usize, only_one: bool) -> usize {
    if only_one { 1 } else { MAX_EXTENTS_PER_REPLY / contexts.max(1) }
}

/// Cuts all lists to the shortest; answers its length.
pub(crate) fn equalise(lists: &mut [Extents]) -> u32 {
    let len = lists.iter().map(Extents::covered).min().unwrap_or(0);
    for list in lists {
        list.truncate(len);
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_of_one_status_become_one_extent() {
        let mut out = Extents::new(100, 10);
        assert!(out.push(10, Status::DATA));
        assert!(out.push(0, Status::HOLE));
        assert!(out.push(20, Status::DATA));
        assert!(!out.push(1 << 40, Status::HOLE));
        assert_eq!(
            out.as_slice(),
            [Extent { len: 30, status: Status::DATA }, Extent { len: 70, status: Status::HOLE }]
        );
    }

    #[test]
    fn a_single_extent_grows_until_the_status_changes() {
        let mut out = Extents::new(100, 1);
        assert!(out.push(10, Status::CLEAN));
        assert!(out.push(10, Status::CLEAN));
        assert!(!out.push(10, Status::DIRTY));
        assert!(!out.push(10, Status::CLEAN), "after the end nothing is added");
        assert_eq!(out.as_slice(), [Extent { len: 20, status: Status::CLEAN }]);
    }

    proptest! {
        #[test]
        fn equalised_lists_agree_in_length_and_keep_every_byte_status(
            len in 1u32..5000,
            limit in 1usize..20,
            lists in prop::collection::vec(prop::collection::vec((0u64..700, any::<bool>()), 1..40), 1..5),
        ) {
            let mut truth = Vec::new();
            let mut answers = Vec::new();
            for pushes in &lists {
                let mut bytes = Vec::new();
                let mut out = Extents::new(len, limit);
                for &(n, dirty) in pushes {
                    let status = if dirty { Status::DIRTY } else { Status::CLEAN };
                    bytes.extend(std::iter::repeat_n(status, usize::try_from(n).unwrap()));
                    if !out.push(n, status) {
                        break;
                    }
                }
                truth.push(bytes);
                answers.push(out);
            }
            let agreed = equalise(&mut answers);
            prop_assert!(agreed <= len);
            for (answer, bytes) in answers.iter().zip(&truth) {
                let mut at = 0;
                prop_assert!(answer.as_slice().len() <= limit);
                prop_assert!(answer.as_slice().windows(2).all(|w| w[0].status != w[1].status));
                for extent in answer.as_slice() {
                    prop_assert!(extent.len > 0);
                    for _ in 0..extent.len {
                        prop_assert_eq!(bytes[at], extent.status);
                        at += 1;
                    }
                }
                prop_assert_eq!(at, usize::try_from(agreed).unwrap());
                prop_assert_eq!(answer.covered(), agreed);
            }
        }
    }
}
