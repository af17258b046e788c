//! A driver on a memory file, and what a ring makes of good and bad ones.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::*;
use crate::guest_mem::RegionSpec;
use crate::guest_mem::tests::memfd;

/// What the front end adds to guest-physical addresses.
const USER: u64 = 0x7f00_0000_0000;
pub(crate) const DESC: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x6000;
pub(crate) const USED: u64 = 0x8000;
pub(crate) const INDIRECT: u64 = 0xc000;
pub(crate) const DATA: u64 = 0x10000;
pub(crate) const MEMORY: u64 = 0x10_0000;

/// A driver that writes its rings through the file that the device maps.
pub(crate) struct Driver {
    pub(crate) file: File,
    pub(crate) size: u16,
    pub(crate) avail: u16,
    /// Where a ring of it starts.
    pub(crate) base: u16,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

pub(crate) fn readable(at: u64, len: u32) -> Part {
    Part { at, len, flags: 0 }
}

pub(crate) fn writable(at: u64, len: u32) -> Part {
    Part { at, len, flags: DESC_F_WRITE }
}

impl Driver {
    pub(crate) fn new(size: u16) -> Self {
        Self { file: memfd(MEMORY), size, avail: 0, base: 0 }
    }

    pub(crate) fn memory(&self) -> Arc<Memory> {
        let spec = RegionSpec { guest: 0, len: MEMORY, user: USER, offset: 0 };
        Arc::new(Memory::of([(spec, self.file.try_clone().unwrap())]).unwrap())
    }

    pub(crate) fn ring(&self, event_idx: bool) -> Ring {
        let shape = Shape { size: self.size, event_idx, indirect: true };
        Ring::start(self.memory(), addresses(), shape, self.base).unwrap()
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    pub(crate) fn put16(&self, at: u64, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub(crate) fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    pub(crate) fn desc(&self, table: u64, index: u16, part: Part, next: u16) {
        let at = table + 16 * u64::from(index);
        self.put(at, &part.at.to_le_bytes());
        self.put(at + 8, &part.len.to_le_bytes());
        self.put16(at + 12, part.flags);
        self.put16(at + 14, next);
    }

    /// Writes a chain from descriptor `head` on, wrapping in its table.
    pub(crate) fn chain(&self, table: u64, size: u16, head: u16, parts: &[Part]) {
        for (n, part) in parts.iter().enumerate() {
            let n = u16::try_from(n).unwrap();
            let mut part = *part;
            if usize::from(n) + 1 < parts.len() {
                part.flags |= DESC_F_NEXT;
            }
            self.desc(table, (head + n) % size, part, (head + n + 1) % size);
        }
    }

    pub(crate) fn offer(&mut self, head: u16) {
        self.put16(AVAIL + 4 + 2 * u64::from(self.avail % self.size), head);
        self.avail = self.avail.wrapping_add(1);
        self.put16(AVAIL + 2, self.avail);
    }

    pub(crate) fn offer_parts(&mut self, head: u16, parts: &[Part]) {
        self.chain(DESC, self.size, head, parts);
        self.offer(head);
    }

    fn used(&self, slot: u16) -> (u32, u32) {
        let at = USED + 4 + 8 * u64::from(slot % self.size);
        (u32::from_le_bytes(self.get(at)), u32::from_le_bytes(self.get(at + 4)))
    }

    fn want_interrupt_after(&self, index: u16) {
        self.put16(AVAIL + 4 + 2 * u64::from(self.size), index);
    }

    fn kick_index(&self) -> u16 {
        self.get16(USED + 4 + 8 * u64::from(self.size))
    }
}

pub(crate) fn addresses() -> Addresses {
    Addresses { desc: USER + DESC, avail: USER + AVAIL, used: USER + USED }
}

fn pop_one(driver: &Driver, parts: &[Part]) -> Chain {
    let mut driver = Driver { file: driver.file.try_clone().unwrap(), ..*driver };
    driver.offer_parts(0, parts);
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    assert_eq!(ring.pop(&mut chain), Ok(true));
    chain
}

#[test]
fn indices_wrap_many_times_around_a_small_ring() {
    let mut driver = Driver::new(4);
    driver.avail = u16::MAX - 5;
    driver.base = driver.avail;
    driver.put16(AVAIL + 2, driver.avail);
    driver.put16(USED + 2, 0xfff0);
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    let mut used = 0xfff0u16;
    for round in 0..40u16 {
        let head = round % 4;
        driver.offer_parts(head, &[readable(DATA, 16)]);
        assert_eq!(ring.pop(&mut chain), Ok(true));
        assert_eq!((chain.head, chain.fault), (head, None));
        assert_eq!(ring.pop(&mut chain), Ok(false));
        ring.push_used(head, 7);
        ring.publish();
        assert_eq!(driver.used(used), (head.into(), 7));
        used = used.wrapping_add(1);
        assert_eq!(driver.get16(USED + 2), used);
    }
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(ring.next_avail(), driver.avail);
}

#[test]
fn used_elements_are_shown_together_and_in_the_order_of_the_available_ring() {
    let mut driver = Driver::new(8);
    for head in 0..3 {
        driver.offer_parts(head, &[readable(DATA, 16)]);
    }
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    while ring.pop(&mut chain).unwrap() {}
    for head in [2, 0, 1] {
        ring.push_used(head, u32::from(head));
        assert_eq!(driver.get16(USED + 2), 0);
    }
    assert!(ring.publish());
    assert_eq!(driver.get16(USED + 2), 3);
    assert_eq!([driver.used(0), driver.used(1), driver.used(2)], [(0, 0), (1, 1), (2, 2)]);
    assert!(!ring.publish());
}

#[test]
fn a_chain_is_not_shown_before_an_older_one() {
    let mut driver = Driver::new(8);
    for head in [5, 3] {
        driver.offer_parts(head, &[readable(DATA, 16)]);
    }
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    while ring.pop(&mut chain).unwrap() {}
    ring.push_used(3, 30);
    ring.publish();
    // A back end that is killed now leaves a used index that names neither as done.
    assert_eq!((driver.get16(USED + 2), ring.in_flight()), (0, 2));
    ring.push_used(5, 50);
    ring.publish();
    assert_eq!((driver.get16(USED + 2), ring.in_flight()), (2, 0));
    assert_eq!([driver.used(0), driver.used(1)], [(5, 50), (3, 30)]);
}

#[test]
fn event_indices_suppress_interrupts_and_the_first_is_forced() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    let mut complete = |driver: &mut Driver, ring: &mut Ring| {
        driver.offer_parts(0, &[readable(DATA, 16)]);
        assert_eq!(ring.pop(&mut chain), Ok(true));
        ring.push_used(0, 0);
        ring.publish()
    };
    driver.want_interrupt_after(100);
    assert!(complete(&mut driver, &mut ring), "the first");
    assert!(!complete(&mut driver, &mut ring));
    driver.want_interrupt_after(2);
    assert!(complete(&mut driver, &mut ring));
    assert!(!complete(&mut driver, &mut ring));
    driver.want_interrupt_after(100);
    ring.forget_signal();
    assert!(complete(&mut driver, &mut ring), "after a new call descriptor");
}

#[test]
fn flags_suppress_interrupts_and_kicks_without_event_indices() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(false);
    let mut chain = Chain::default();
    let mut complete = |driver: &mut Driver, ring: &mut Ring| {
        driver.offer_parts(0, &[readable(DATA, 16)]);
        assert_eq!(ring.pop(&mut chain), Ok(true));
        ring.push_used(0, 0);
        ring.publish()
    };
    driver.put16(AVAIL, AVAIL_F_NO_INTERRUPT);
    assert!(complete(&mut driver, &mut ring), "the first");
    assert!(!complete(&mut driver, &mut ring));
    driver.put16(AVAIL, 0);
    assert!(complete(&mut driver, &mut ring));
    ring.disable_kicks();
    assert_eq!(driver.get16(USED), USED_F_NO_NOTIFY);
    assert!(!ring.enable_kicks());
    assert_eq!(driver.get16(USED), 0);
}

#[test]
fn kicks_are_asked_for_and_a_chain_in_between_is_not_missed() {
    let mut driver = Driver::new(8);
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    driver.offer_parts(0, &[readable(DATA, 16)]);
    assert!(ring.enable_kicks());
    assert_eq!(ring.pop(&mut chain), Ok(true));
    assert!(!ring.enable_kicks());
    assert_eq!(driver.kick_index(), 1);
}

#[test]
fn a_direct_chain_and_an_indirect_one_are_alike() {
    let driver = Driver::new(8);
    let parts = [readable(DATA, 16), writable(DATA + 0x1000, 512), writable(DATA + 0x3000, 1)];
    let direct = pop_one(&driver, &parts);
    assert_eq!((direct.readable.len(), direct.writable.len(), direct.fault), (16, 513, None));
    driver.chain(INDIRECT, 8, 0, &parts);
    let table = Part { at: INDIRECT, len: 48, flags: DESC_F_INDIRECT };
    let indirect = pop_one(&driver, &[table]);
    assert_eq!((indirect.readable.len(), indirect.writable.len(), indirect.fault), (16, 513, None));
    let mixed = pop_one(&driver, &[readable(DATA, 8), table]);
    assert_eq!((mixed.readable.len(), mixed.writable.len(), mixed.fault), (24, 513, None));
}

#[test]
fn an_indirect_table_may_be_misaligned() {
    let driver = Driver::new(8);
    driver.chain(INDIRECT + 3, 8, 0, &[readable(DATA, 16), writable(DATA, 1)]);
    let chain = pop_one(&driver, &[Part { at: INDIRECT + 3, len: 32, flags: DESC_F_INDIRECT }]);
    assert_eq!((chain.readable.len(), chain.writable.len(), chain.fault), (16, 1, None));
}

#[test]
fn a_loop_ends_at_the_ring_s_size() {
    let mut driver = Driver::new(8);
    for index in 0..8 {
        driver.desc(DESC, index, Part { at: DATA, len: 16, flags: DESC_F_NEXT }, (index + 1) % 8);
    }
    driver.offer(0);
    let mut ring = driver.ring(true);
    let mut chain = Chain::default();
    assert_eq!(ring.pop(&mut chain), Ok(true));
    assert_eq!(chain.fault, Some(ChainError::TooLong));
}

#[test]
fn what_is_wrong_with_a_chain_is_named() {
    let driver = Driver::new(8);
    let good = [readable(DATA, 16), writable(DATA, 1)];
    let nested = Part { at: INDIRECT, len: 16, flags: DESC_F_INDIRECT };
    driver.desc(INDIRECT, 0, nested, 0);
    let table = |len, at, flags| Part { at, len, flags: flags | DESC_F_INDIRECT };
    let indirect = |len| ChainError::Indirect { len };
    let cases: [(Vec<Part>, ChainError); 8] = [
        (vec![good[1], good[0]], ChainError::Order),
        (vec![readable(DATA, 0), good[1]], ChainError::Empty),
        (vec![table(17, INDIRECT, 0)], indirect(17)),
        (vec![table(0, INDIRECT, 0)], indirect(0)),
        (vec![table(16, MEMORY - 8, 0)], indirect(16)),
        (vec![table(16, INDIRECT, 0), good[1]], indirect(16)),
        (vec![nested], indirect(16)),
        (vec![readable(MEMORY - 8, 16), good[1]], ChainError::Address { at: MEMORY - 8, len: 16 }),
    ];
    for (parts, error) in cases {
        let chain = pop_one(&driver, &parts);
        assert_eq!(chain.fault, Some(error), "{parts:?}");
        let told = matches!(error, ChainError::Address { .. });
        assert_eq!(chain.writable.len(), u64::from(told));
    }
}

#[test]
fn a_descriptor_beyond_its_table_is_refused() {
    let mut driver = Driver::new(8);
    driver.desc(DESC, 0, Part { at: DATA, len: 16, flags: DESC_F_NEXT }, 8);
    driver.offer(0);
    let mut chain = Chain::default();
    assert_eq!(driver.ring(true).pop(&mut chain), Ok(true));
    assert_eq!(chain.fault, Some(ChainError::Next { next: 8 }));
}

#[test]
fn indirect_tables_need_the_feature() {
    let mut driver = Driver::new(8);
    driver.chain(INDIRECT, 8, 0, &[readable(DATA, 16)]);
    driver.offer_parts(0, &[Part { at: INDIRECT, len: 16, flags: DESC_F_INDIRECT }]);
    let shape = Shape { size: 8, event_idx: true, indirect: false };
    let mut ring = Ring::start(driver.memory(), addresses(), shape, 0).unwrap();
    let mut chain = Chain::default();
    assert_eq!(ring.pop(&mut chain), Ok(true));
    assert_eq!(chain.fault, Some(ChainError::Indirect { len: 16 }));
}

#[test]
fn a_bad_status_address_leaves_no_status() {
    let driver = Driver::new(8);
    let chain = pop_one(&driver, &[readable(DATA, 16), writable(DATA, 512), writable(MEMORY, 1)]);
    assert_eq!(chain.fault, Some(ChainError::Address { at: MEMORY, len: 1 }));
    assert_eq!(chain.writable.len(), 0);
}

#[test]
fn a_jumping_index_a_bad_head_and_a_head_in_flight_break_the_ring() {
    let driver = Driver::new(8);
    driver.put16(AVAIL + 2, 9);
    let mut chain = Chain::default();
    assert_eq!(driver.ring(true).pop(&mut chain), Err(RingError::Index { from: 0, to: 9 }));

    let mut driver = Driver::new(8);
    driver.offer(8);
    assert_eq!(driver.ring(true).pop(&mut chain), Err(RingError::Head(8)));

    let mut driver = Driver::new(8);
    driver.offer_parts(3, &[readable(DATA, 16)]);
    driver.offer(3);
    let mut ring = driver.ring(true);
    assert_eq!(ring.pop(&mut chain), Ok(true));
    assert_eq!(ring.pop(&mut chain), Err(RingError::Twice(3)));
}

#[test]
fn sizes_and_places_are_checked() {
    for size in [0, 3, 100, 2048, 65536, 1 << 20] {
        assert_eq!(Shape::check_size(size), Err(RingError::Size(size)));
    }
    let driver = Driver::new(8);
    let shape = Shape { size: 8, event_idx: true, indirect: true };
    let start = |addresses| Ring::start(driver.memory(), addresses, shape, 0).map(|_| ());
    let good = addresses();
    let end = USER + MEMORY;
    for bad in [
        Addresses { desc: end - 16, ..good },
        Addresses { avail: end - 20, ..good },
        Addresses { used: end - 68, ..good },
        Addresses { used: good.used + 2, ..good },
        Addresses { desc: u64::MAX - 15, ..good },
        Addresses { desc: DESC, ..good },
    ] {
        assert!(matches!(start(bad), Err(RingError::Placement { .. })), "{bad:x?}");
    }
    assert_eq!(start(good), Ok(()));
}

#[test]
fn a_new_generation_is_used_at_once_and_the_old_one_kept_for_what_is_in_flight() {
    let mut driver = Driver::new(8);
    driver.offer_parts(0, &[readable(DATA, 16), writable(DATA, 1)]);
    let old = driver.memory();
    let watched = Arc::downgrade(&old);
    let shape = Shape { size: 8, event_idx: true, indirect: true };
    let mut ring = Ring::start(old, addresses(), shape, 0).unwrap();
    let mut chain = Chain::default();
    assert_eq!(ring.pop(&mut chain), Ok(true));
    let released = Rc::downgrade(&ring.place(driver.memory(), None).unwrap());
    assert!(watched.upgrade().is_some() && released.upgrade().is_some());
    assert!(chain.writable.split_last() && chain.writable.set_last(9));
    ring.push_used(0, 1);
    chain.readable.clear();
    chain.writable.clear();
    assert!(watched.upgrade().is_none() && released.upgrade().is_none());
    assert!(ring.publish());
    assert_eq!((driver.get::<1>(DATA), driver.get16(USED + 2)), ([9], 1));
    assert!(ring.place(Arc::default(), None).is_err());
    driver.offer_parts(1, &[readable(DATA, 16)]);
    assert_eq!(ring.pop(&mut chain), Ok(true));
}
