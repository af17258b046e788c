//! Valid requests, and valid ones with one thing spoilt.

use proptest::prelude::*;

use super::*;
use crate::ring::tests::{DATA, Driver, MEMORY, Part, readable, writable};

const CAPACITY: u64 = 1 << 20;

const RULES: Rules = Rules {
    capacity: CAPACITY,
    block_bytes: 512,
    read_only: false,
    discard: true,
    write_zeroes: true,
    unmap: true,
};

const STATUS_AT: u64 = DATA + 0x9_0000;

/// A request in the guest's memory.
struct Sample {
    driver: Driver,
    kind: u32,
    sector: u64,
    data: Vec<Part>,
    status: Option<Part>,
    header_len: u32,
}

impl Sample {
    fn new(kind: u32, sector: u64, data: Vec<Part>) -> Self {
        let status = Some(writable(STATUS_AT, 1));
        Self { driver: Driver::new(16), kind, sector, data, status, header_len: 16 }
    }

    fn ranges(kind: u32, ranges: &[(u64, u32, u32)]) -> Self {
        let len = u32::try_from(ranges.len() * 16).unwrap();
        let sample = Self::new(kind, 0, vec![readable(DATA + 0x100, len)]);
        for (n, (sector, sectors, flags)) in ranges.iter().enumerate() {
            let at = DATA + 0x100 + 16 * n as u64;
            sample.driver.put(at, &sector.to_le_bytes());
            sample.driver.put(at + 8, &sectors.to_le_bytes());
            sample.driver.put(at + 12, &flags.to_le_bytes());
        }
        sample
    }

    fn chain(&mut self) -> Chain {
        self.driver.put(DATA, &self.kind.to_le_bytes());
        self.driver.put(DATA + 8, &self.sector.to_le_bytes());
        self.driver.put(STATUS_AT, &[0xaa]);
        let mut parts = Vec::new();
        if self.header_len > 0 {
            parts.push(readable(DATA, self.header_len));
        }
        parts.extend(&self.data);
        parts.extend(self.status);
        let mut ring = self.driver.ring(true);
        self.driver.offer_parts(0, &parts);
        let mut chain = Chain::default();
        assert_eq!(ring.pop(&mut chain), Ok(true));
        chain
    }

    fn parse_with(&mut self, rules: &Rules) -> (Result<Request, RequestError>, Vec<ZeroRange>) {
        let mut chain = self.chain();
        let mut ranges = Vec::new();
        let answer = parse(&mut chain, rules, &mut ranges);
        // Whatever came out, a status can be told if the chain has a place for one.
        let told = chain.writable.set_last(0x55);
        let place = self.status.is_some() && !matches!(answer, Err(RequestError::NoStatus));
        if place && !matches!(answer, Err(RequestError::Chain(_))) {
            assert!(told);
            assert_eq!(self.driver.get::<1>(STATUS_AT), [0x55]);
        }
        (answer, ranges)
    }

    fn parse(&mut self) -> Result<Request, RequestError> {
        self.parse_with(&RULES).0
    }
}

fn past_end(first: u64, len: u64) -> Result<Request, RequestError> {
    Err(RequestError::PastEnd { first: Sector::new(first), len })
}

fn unaligned(first: u64, len: u64) -> Result<Request, RequestError> {
    Err(RequestError::Unaligned { first: Sector::new(first), len })
}

#[test]
fn reads_and_writes_are_placed_in_bytes() {
    let data = DATA + 0x1000;
    assert_eq!(Sample::new(T_IN, 3, vec![writable(data, 512)]).parse(), Ok(Request::Read { at: 1536 }));
    let two = vec![readable(data, 512), readable(data + 8192, 1536)];
    assert_eq!(Sample::new(T_OUT, 8, two).parse(), Ok(Request::Write { at: 4096 }));
    assert_eq!(Sample::new(T_FLUSH, 0, vec![]).parse(), Ok(Request::Flush));
    assert_eq!(Sample::new(T_GET_ID, 0, vec![writable(data, 20)]).parse(), Ok(Request::GetId));
}

#[test]
fn header_data_and_status_may_share_descriptors() {
    let mut sample = Sample::new(T_IN, 1, vec![writable(DATA + 0x1000, 513)]);
    sample.status = None;
    assert_eq!(sample.parse(), Ok(Request::Read { at: 512 }));
    let mut sample = Sample::new(T_OUT, 1, vec![]);
    sample.header_len = 16 + 512;
    assert_eq!(sample.parse(), Ok(Request::Write { at: 512 }));
    let mut sample = Sample::new(T_OUT, 1, vec![readable(DATA + 5, 11 + 512)]);
    sample.header_len = 5;
    assert_eq!(sample.parse(), Ok(Request::Write { at: 512 }));
}

#[test]
fn sectors_that_overflow_or_pass_the_end_are_refused() {
    let data = || vec![writable(DATA + 0x1000, 1024)];
    let last = CAPACITY / 512;
    assert!(Sample::new(T_IN, last - 2, data()).parse().is_ok());
    for sector in [last - 1, last, 1 << 54, 1 << 55, u64::MAX / 512, u64::MAX] {
        assert_eq!(Sample::new(T_IN, sector, data()).parse(), past_end(sector, 1024));
    }
}

#[test]
fn parts_of_blocks_are_refused() {
    assert_eq!(Sample::new(T_IN, 0, vec![writable(DATA, 511)]).parse(), unaligned(0, 511));
    let rules = Rules { block_bytes: 4096, ..RULES };
    let read =
        |sector, len| Sample::new(T_IN, sector, vec![writable(DATA + 0x1000, len)]).parse_with(&rules).0;
    assert_eq!(read(8, 4096), Ok(Request::Read { at: 4096 }));
    assert_eq!(read(1, 4096), unaligned(1, 4096));
    assert_eq!(read(8, 512), unaligned(8, 512));
}

#[test]
fn transfers_without_data_are_refused() {
    for kind in [T_IN, T_OUT, T_GET_ID, T_DISCARD, T_WRITE_ZEROES] {
        assert_eq!(Sample::new(kind, 0, vec![]).parse(), Err(RequestError::DataLength(0)));
    }
}

#[test]
fn a_read_only_disk_is_not_changed() {
    let rules = Rules { read_only: true, ..RULES };
    let mut write = Sample::new(T_OUT, 0, vec![readable(DATA + 0x1000, 512)]);
    let mut discard = Sample::ranges(T_DISCARD, &[(0, 8, 0)]);
    let mut zeroes = Sample::ranges(T_WRITE_ZEROES, &[(0, 8, 0)]);
    for sample in [&mut write, &mut discard, &mut zeroes] {
        let error = sample.parse_with(&rules).0.unwrap_err();
        assert_eq!((error, error.status()), (RequestError::ReadOnly, STATUS_IOERR));
    }
    let mut read = Sample::new(T_IN, 0, vec![writable(DATA + 0x1000, 512)]);
    assert!(read.parse_with(&rules).0.is_ok());
    assert_eq!(Sample::new(T_FLUSH, 0, vec![]).parse_with(&rules).0, Ok(Request::Flush));
}

#[test]
fn types_that_are_unknown_or_were_not_negotiated_are_unsupported() {
    let rules = Rules { discard: false, write_zeroes: false, ..RULES };
    for kind in [2, 3, 5, 9, 14, T_DISCARD, T_WRITE_ZEROES, u32::MAX] {
        let mut sample = Sample::ranges(kind, &[(0, 8, 0)]);
        let error = sample.parse_with(&rules).0.unwrap_err();
        assert_eq!((error, error.status()), (RequestError::Unsupported(kind), STATUS_UNSUPP));
    }
}

#[test]
fn several_ranges_are_read_with_their_flags() {
    let mut sample = Sample::ranges(T_WRITE_ZEROES, &[(0, 8, 1), (16, 0, 0), (32, 1, 0)]);
    let (answer, ranges) = sample.parse_with(&RULES);
    assert_eq!(answer, Ok(Request::WriteZeroes));
    let range = |start, end, zeroing| ZeroRange { range: ByteRange::new(start, end), zeroing };
    assert_eq!(
        ranges,
        [
            range(0, 4096, Zeroing::Unmap),
            range(8192, 8192, Zeroing::Keep),
            range(16384, 16896, Zeroing::Keep)
        ]
    );
    let rules = Rules { unmap: false, ..RULES };
    assert_eq!(sample.parse_with(&rules).1[0].zeroing, Zeroing::Keep);
}

#[test]
fn ranges_have_limits_and_flags() {
    let one = |kind, range| Sample::ranges(kind, &[range]).parse();
    let last = CAPACITY / 512;
    assert_eq!(one(T_DISCARD, (last - 8, 8, 0)), Ok(Request::Discard));
    assert_eq!(one(T_DISCARD, (0, 8, 1)), Err(RequestError::Flags(1)));
    assert_eq!(one(T_DISCARD, (0, 8, 2)), Err(RequestError::Flags(2)));
    assert_eq!(one(T_WRITE_ZEROES, (0, 8, 3)), Err(RequestError::Flags(3)));
    assert_eq!(RequestError::Flags(1).status(), STATUS_UNSUPP);
    let long = MAX_RANGE_SECTORS + 1;
    assert_eq!(one(T_DISCARD, (0, long, 0)), Err(RequestError::RangeTooLong(long)));
    assert_eq!(one(T_DISCARD, (last, 8, 0)), past_end(last, 4096));
    assert_eq!(one(T_WRITE_ZEROES, (u64::MAX, 8, 0)), past_end(u64::MAX, 4096));
    let many = vec![(0, 8, 0); 17];
    assert_eq!(Sample::ranges(T_DISCARD, &many[..16]).parse(), Ok(Request::Discard));
    assert_eq!(Sample::ranges(T_DISCARD, &many).parse(), Err(RequestError::DataLength(17 * 16)));
    let mut ragged = Sample::ranges(T_DISCARD, &[(0, 8, 0)]);
    ragged.data[0].len = 15;
    assert_eq!(ragged.parse(), Err(RequestError::DataLength(15)));
}

/// One thing to spoil in a valid read or write.
#[derive(Clone, Copy, Debug)]
enum Spoil {
    Nothing,
    Header(u32),
    NoStatus,
    StatusAddress,
    DataAddress,
    Sector(u64),
    Length,
    Kind,
    ReadOnly,
    Order,
}

fn spoil() -> impl Strategy<Value = Spoil> {
    prop_oneof![
        Just(Spoil::Nothing),
        (1u32..16).prop_map(Spoil::Header),
        Just(Spoil::NoStatus),
        Just(Spoil::StatusAddress),
        Just(Spoil::DataAddress),
        (CAPACITY / 512..=u64::MAX).prop_map(Spoil::Sector),
        Just(Spoil::Length),
        Just(Spoil::Kind),
        Just(Spoil::ReadOnly),
        Just(Spoil::Order),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_valid_transfer_with_one_thing_spoilt_is_refused_for_that(
        write in any::<bool>(),
        sector in 0..CAPACITY / 512 - 64,
        blocks in proptest::collection::vec(1u32..4, 1..5),
        spoil in spoil(),
    ) {
        let part = if write { readable } else { writable };
        let data: Vec<_> = blocks
            .iter()
            .enumerate()
            .map(|(n, blocks)| part(DATA + 0x1000 * (n as u64 + 1), blocks * 512))
            .collect();
        let len: u64 = data.iter().map(|part| u64::from(part.len)).sum();
        let mut sample = Sample::new(if write { T_OUT } else { T_IN }, sector, data);
        let mut rules = RULES;
        let address = |at, len| Err(RequestError::Chain(ChainError::Address { at, len }));
        let request = match write {
            true => Ok(Request::Write { at: sector * 512 }),
            false => Ok(Request::Read { at: sector * 512 }),
        };
        let expected = match spoil {
            Spoil::Nothing => request,
            // The bytes that lack are taken from the data of a write, which leaves its length wrong.
            Spoil::Header(have) => {
                sample.header_len = have;
                if write {
                    // The type is read from what follows; zeros make it a read of what is not there.
                    prop_assume!(have >= 8);
                    let error = sample.parse().unwrap_err();
                    prop_assert_eq!(error.status(), STATUS_IOERR);
                    return Ok(());
                }
                Err(RequestError::ShortHeader(have.into()))
            }
            Spoil::NoStatus if write => {
                sample.status = None;
                Err(RequestError::NoStatus)
            }
            // The last byte of the data is taken for the status.
            Spoil::NoStatus => {
                sample.status = None;
                unaligned(sector, len - 1)
            }
            Spoil::StatusAddress => {
                sample.status = Some(writable(MEMORY, 1));
                address(MEMORY, 1)
            }
            Spoil::DataAddress => {
                let len = sample.data[0].len;
                sample.data[0].at = MEMORY - 256;
                address(MEMORY - 256, len)
            }
            Spoil::Sector(first) => {
                sample.sector = first;
                past_end(first, len)
            }
            Spoil::Length => {
                sample.data[0].len -= 1;
                unaligned(sector, len - 1)
            }
            Spoil::Kind => {
                sample.kind = 3;
                Err(RequestError::Unsupported(3))
            }
            Spoil::ReadOnly => {
                rules.read_only = true;
                if write { Err(RequestError::ReadOnly) } else { request }
            }
            Spoil::Order => {
                sample.data.insert(0, writable(DATA + 0x8000, 512));
                sample.data.push(readable(DATA + 0x8000, 512));
                Err(RequestError::Chain(ChainError::Order))
            }
        };
        prop_assert_eq!(sample.parse_with(&rules).0, expected);
    }
}
