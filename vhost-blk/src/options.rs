//! What an operator chooses about a disk, and the features that follow from it.
//!
//! Absent: what a front end makes of them; that is a session's.

use crate::request::ID_BYTES;

/// Queues that a device offers at most.
pub const MAX_QUEUES: u16 = 64;

/// Feature bits of VIRTIO 1.2 §5.2.3, §2.7 and §6, and of vhost-user.
pub(crate) mod feature {
    use virtio_bindings::virtio_blk as blk;
    use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
    use virtio_bindings::virtio_ring as ring;

    pub(crate) const SIZE_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SIZE_MAX;
    pub(crate) const SEG_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SEG_MAX;
    pub(crate) const RO: u64 = 1 << blk::VIRTIO_BLK_F_RO;
    pub(crate) const BLK_SIZE: u64 = 1 << blk::VIRTIO_BLK_F_BLK_SIZE;
    pub(crate) const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
    pub(crate) const TOPOLOGY: u64 = 1 << blk::VIRTIO_BLK_F_TOPOLOGY;
    pub(crate) const CONFIG_WCE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
    pub(crate) const MQ: u64 = 1 << blk::VIRTIO_BLK_F_MQ;
    pub(crate) const DISCARD: u64 = 1 << blk::VIRTIO_BLK_F_DISCARD;
    pub(crate) const WRITE_ZEROES: u64 = 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
    pub(crate) const INDIRECT_DESC: u64 = 1 << ring::VIRTIO_RING_F_INDIRECT_DESC;
    pub(crate) const EVENT_IDX: u64 = 1 << ring::VIRTIO_RING_F_EVENT_IDX;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`.
    pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
}

/// Bytes in a logical block: the unit of a guest's requests. Sectors stay 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogicalBlock {
    /// 512 bytes.
    #[default]
    B512,
    /// 4096 bytes.
    B4096,
}

impl LogicalBlock {
    /// Bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

/// Whether a write is answered from the cache. A guest may choose otherwise (`CONFIG_WCE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Cache {
    /// It is durable after a flush.
    #[default]
    Writeback,
    /// It is durable when answered.
    Writethrough,
}

/// What becomes of discarded space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiscardMode {
    /// It is given back.
    #[default]
    Unmap,
    /// Discards are not offered, and zeros keep their space.
    Ignore,
}

/// What is refused about options.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// No queue, or more than [`MAX_QUEUES`].
    #[error("a disk has from 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// A serial that does not fit.
    #[error("the serial `{0}` is longer than {ID_BYTES} bytes")]
    Serial(String),
    /// A disk that is no whole number of blocks.
    #[error("a disk of {capacity} bytes is no whole number of logical blocks of {block} bytes")]
    Capacity {
        /// Its size in bytes.
        capacity: u64,
        /// Bytes in a logical block.
        block: u32,
    },
}

/// What an operator chooses about a disk.
#[derive(Clone, Debug)]
pub struct Options {
    /// The disk's name in logs and names of threads.
    pub name: String,
    /// Queues to offer. Each started one costs a thread.
    pub queues: u16,
    /// Nothing may change it.
    pub read_only: bool,
    /// What `GET_ID` answers, up to 20 bytes.
    pub serial: String,
    /// Unit of a guest's requests.
    pub logical_block: LogicalBlock,
    /// Bytes that the host's storage writes without reading first; a power of two.
    pub physical_block: u32,
    /// Whether a write is answered from the cache.
    pub cache: Cache,
    /// What becomes of discarded space.
    pub discard: DiscardMode,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "disk".into(),
            queues: MAX_QUEUES,
            read_only: false,
            serial: String::new(),
            logical_block: LogicalBlock::default(),
            physical_block: 4096,
            cache: Cache::default(),
            discard: DiscardMode::default(),
        }
    }
}

impl Options {
    pub(crate) fn check(&self, capacity: u64) -> Result<(), OptionsError> {
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(OptionsError::Queues(self.queues));
        }
        if self.serial.len() > ID_BYTES {
            return Err(OptionsError::Serial(self.serial.clone()));
        }
        let block = self.logical_block.bytes();
        if !capacity.is_multiple_of(block.into()) {
            return Err(OptionsError::Capacity { capacity, block });
        }
        Ok(())
    }

    /// The serial as `GET_ID` answers it, padded with zeros.
    pub(crate) fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(self.serial.bytes()) {
            *to = from;
        }
        id
    }

    /// The virtio features to offer.
    pub(crate) fn features(&self) -> u64 {
        let mut features = feature::SIZE_MAX
            | feature::SEG_MAX
            | feature::BLK_SIZE
            | feature::FLUSH
            | feature::TOPOLOGY
            | feature::CONFIG_WCE
            | feature::MQ
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::PROTOCOL_FEATURES
            | feature::VERSION_1;
        if self.read_only {
            features |= feature::RO;
        } else {
            features |= feature::WRITE_ZEROES;
            if self.discard == DiscardMode::Unmap {
                features |= feature::DISCARD;
            }
        }
        features
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_follow_from_options() {
        let has = |options: &Options, bit| options.features() & bit != 0;
        let plain = Options::default();
        assert!(has(&plain, feature::DISCARD) && has(&plain, feature::WRITE_ZEROES));
        assert!(!has(&plain, feature::RO));
        let keep = Options { discard: DiscardMode::Ignore, ..Options::default() };
        assert!(!has(&keep, feature::DISCARD) && has(&keep, feature::WRITE_ZEROES));
        let fixed = Options { read_only: true, ..Options::default() };
        assert!(has(&fixed, feature::RO) && !has(&fixed, feature::WRITE_ZEROES));
    }

    #[test]
    fn options_are_checked() {
        let check = |options: Options| options.check(4096 + 512);
        assert_eq!(check(Options::default()), Ok(()));
        let queues = |queues| check(Options { queues, ..Options::default() });
        assert_eq!((queues(0), queues(65)), (Err(OptionsError::Queues(0)), Err(OptionsError::Queues(65))));
        let long = "123456789012345678901";
        let serial = Options { serial: long.into(), ..Options::default() };
        assert_eq!(check(serial), Err(OptionsError::Serial(long.into())));
        let coarse = Options { logical_block: LogicalBlock::B4096, ..Options::default() };
        assert_eq!(check(coarse), Err(OptionsError::Capacity { capacity: 4608, block: 4096 }));
    }
}
