//! Many cells at once: a question about changes looks at millions.
//!
//! Invariant: what is found is what a look at each cell alone would find. Absent: what cells mean.

use std::sync::atomic::AtomicU32;

/// Cells that [`above`] looks at: as many as a word has bits.
pub(crate) const TOGETHER: usize = 64;

/// Copies cells into `out`, eight bytes for two of them: each cell as it is at some time meanwhile.
///
/// # Panics
/// If there is not as much of both.
pub(crate) fn copy(cells: &[AtomicU32], out: &mut [u8]) {
    assert!(size_of_val(cells) == out.len() && out.len().is_multiple_of(8), "a page of cells fills a page");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: both are as long as is said, apart from each other, since one is borrowed mutably, and the direction
    // flag is clear, as the calling convention has it. Others may store into the cells meanwhile: to the language
    // that is what a device or another process could do as well; the processor moves aligned words whole.
    // JUSTIFICATION: loads of atomics are not made vectors, and a question reads millions of them: a third of the time.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") out.len() / 8 => _,
            inout("rsi") cells.as_ptr() => _,
            inout("rdi") out.as_mut_ptr() => _,
            options(nostack, preserves_flags),
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // Two at a time: half the stores.
    for (bytes, [low, high]) in out.as_chunks_mut::<8>().0.iter_mut().zip(cells.as_chunks::<2>().0) {
        use std::sync::atomic::Ordering::Relaxed;
        let (low, high) = (low.load(Relaxed), high.load(Relaxed));
        *bytes = (u64::from(high) << 32 | u64::from(low)).to_le_bytes();
    }
}

/// A bit for each of the cells, the first one's lowest, that is above `since`.
#[cfg(target_arch = "x86_64")]
pub(crate) fn above(cells: &[u8; 4 * TOGETHER], since: u32) -> u64 {
    use std::arch::x86_64::{
        _mm_cmpgt_epi32, _mm_movemask_epi8, _mm_packs_epi16, _mm_packs_epi32, _mm_set_epi64x, _mm_set1_epi32,
        _mm_xor_si128,
    };
    /// The comparison is of signed numbers: what is turned around at the sign is in the order of unsigned ones.
    const SIGN: u32 = 1 << 31;
    let mut bits = 0;
    for (sixteen, nth) in cells.as_chunks::<64>().0.iter().zip(0..) {
        let quarters: [[i64; 2]; 4] = std::array::from_fn(|quarter| {
            let cells = sixteen.as_chunks::<16>().0[quarter].as_chunks::<8>().0;
            [i64::from_le_bytes(cells[0]), i64::from_le_bytes(cells[1])]
        });
        // SAFETY: every x86-64 processor has SSE2, which is all that the functions need; they touch no memory.
        // JUSTIFICATION: a question about changes spent two fifths of its time making bits of comparisons one by one.
        let mask = unsafe {
            let (sign, since) =
                (_mm_set1_epi32(SIGN.cast_signed()), _mm_set1_epi32((since ^ SIGN).cast_signed()));
            let compared = |[low, high]: [i64; 2]| {
                _mm_cmpgt_epi32(_mm_xor_si128(_mm_set_epi64x(high, low), sign), since)
            };
            let [a, b, c, d] = quarters;
            let (low, high) =
                (_mm_packs_epi32(compared(a), compared(b)), _mm_packs_epi32(compared(c), compared(d)));
            _mm_movemask_epi8(_mm_packs_epi16(low, high))
        };
        bits |= u64::from(mask.cast_unsigned()) << (16 * nth);
    }
    bits
}

/// A bit for each of the cells, the first one's lowest, that is above `since`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn above(cells: &[u8; 4 * TOGETHER], since: u32) -> u64 {
    one_by_one(cells, since)
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn one_by_one(cells: &[u8; 4 * TOGETHER], since: u32) -> u64 {
    let bit = |(cell, nth): (&[u8; 4], u32)| u64::from(u32::from_le_bytes(*cell) > since) << nth;
    cells.as_chunks::<4>().0.iter().zip(0..).map(bit).fold(0, |bits, bit| bits | bit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn vectors_find_what_a_look_at_each_cell_finds(
            cells in proptest::collection::vec(prop_oneof![any::<u32>(), 0u32..4, Just(1 << 31)], TOGETHER),
            nth in 0..TOGETHER,
        ) {
            let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_le_bytes()).collect();
            let bytes: &[u8; 4 * TOGETHER] = bytes.as_slice().try_into().expect("as many cells");
            for since in [0, 1, cells[nth].wrapping_sub(1), cells[nth], u32::MAX] {
                prop_assert_eq!(above(bytes, since), one_by_one(bytes, since));
            }
        }
    }
}
