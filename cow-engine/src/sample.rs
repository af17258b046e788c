//! Some places of an image, read to tell whether it still holds what it held.
//!
//! Invariant: which places there are follows from a seed, the image's size and their number alone, so two
//! hosts look at the same ones. Each part of the image has one, the first and the last grain always do.
//! Absent: proof. A change is seen only if it touches a place; who needs more has to read the whole image.

use crate::error::Error;
use crate::format::GRAIN;
use crate::memory::Target;
use crate::storage::Storage;

/// Bytes of an image that are looked at together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// The first.
    pub(crate) at: u64,
    /// How many.
    pub(crate) len: u32,
}

/// Numbers that look random, the same for the same seed (SplitMix64).
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: &[u8; 16]) -> Self {
        let (low, high) = seed.split_at(8);
        let half = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        // Mixed, or halves that are alike would make one seed of many.
        let mixed = Self(half(low)).next();
        Self(mixed ^ half(high))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// At most `count` grains of an image of `capacity` bytes: one of each of as many equal parts, in order.
pub(crate) fn spread(seed: &[u8; 16], capacity: u64, count: u64) -> Vec<Place> {
    let grains = capacity.div_ceil(GRAIN as u64);
    let count = count.min(grains);
    let mut numbers = Numbers::new(seed);
    // The product fits: a disk has at most 2^56 bytes.
    let border = |nth: u64| u64::try_from(u128::from(nth) * u128::from(grains) / u128::from(count.max(1)));
    (0..count)
        .filter_map(|nth| {
            let (first, end) = (border(nth).ok()?, border(nth + 1).ok()?);
            let drawn = first + numbers.next() % (end - first).max(1);
            Some(grain(
                if nth == 0 {
                    0
                } else if nth + 1 == count {
                    grains - 1
                } else {
                    drawn
                },
                capacity,
            ))
        })
        .collect()
}

fn grain(number: u64, capacity: u64) -> Place {
    let at = number * GRAIN as u64;
    let len = (capacity - at).min(GRAIN as u64);
    Place { at, len: u32::try_from(len).unwrap_or(0) }
}

/// The CRC-32C of what an image holds at `place`, which lies within it.
pub(crate) async fn checksum<S: Storage>(io: &S, image: &S::File, place: Place) -> Result<u32, Error> {
    let mut bytes = vec![0; place.len as usize];
    let read = io.read(image, place.at, Target::of(&mut bytes)).await;
    read.map_err(Error::io("reading a sample of the image"))?;
    Ok(crc32c::crc32c(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_has_a_place_and_both_ends_do() {
        for (capacity, count) in [(512, 8), (4096, 8), (5 * 4096 + 512, 3), (1 << 30, 64), (1 << 56, 1024)] {
            let places = spread(&[7; 16], capacity, count);
            let grains = capacity.div_ceil(4096);
            assert_eq!(places.len() as u64, count.min(grains));
            assert!(places.is_sorted_by(|a, b| a.at < b.at), "{capacity}");
            assert_eq!(places[0].at, 0);
            let last = places[places.len() - 1];
            assert_eq!(last.at + u64::from(last.len), capacity);
            assert_eq!(places, spread(&[7; 16], capacity, count));
        }
        assert_ne!(spread(&[7; 16], 1 << 30, 64), spread(&[8; 16], 1 << 30, 64));
        assert_eq!(spread(&[7; 16], 0, 64), []);
    }
}
