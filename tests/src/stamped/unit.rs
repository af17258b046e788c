//! What a unit holds: nothing but its disk, its place and the number of the write, in every 32 bytes.
//!
//! A unit of two writes, of another place or of another disk is found out, and says where it came from.

/// Bytes of one stamp; a unit is a multiple of it.
const STAMP_BYTES: usize = 32;

/// Fills a unit.
pub fn fill(bytes: &mut [u8], disk: u64, unit: u64, write: u64) {
    for (index, stamp) in bytes.chunks_exact_mut(STAMP_BYTES).enumerate() {
        let check = checksum(disk, unit, write, index);
        for (word, value) in stamp.chunks_exact_mut(8).zip([disk, unit, write, check]) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// The number of the write that filled a unit, `None` if it is all zero.
///
/// # Errors
/// What it holds instead, for people.
pub fn read(bytes: &[u8], disk: u64, unit: u64) -> Result<Option<u64>, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let mut found = None;
    for (index, stamp) in bytes.chunks_exact(STAMP_BYTES).enumerate() {
        let word = |at: usize| u64::from_le_bytes(stamp[at * 8..at * 8 + 8].try_into().expect("eight bytes"));
        let (of_disk, of_unit, write) = (word(0), word(1), word(2));
        let place = index * STAMP_BYTES;
        if word(3) != checksum(of_disk, of_unit, write, index) {
            return Err(format!("holds no stamp from byte {place} on: {stamp:02x?}"));
        }
        if (of_disk, of_unit) != (disk, unit) {
            return Err(format!("holds unit {of_unit} of disk {of_disk}, write {write}"));
        }
        if *found.get_or_insert(write) != write {
            return Err(format!("is torn: write {found:?} up to byte {place}, then write {write}"));
        }
    }
    Ok(found)
}

fn checksum(disk: u64, unit: u64, write: u64, index: usize) -> u64 {
    let mut sum = 0x9e37_79b9_7f4a_7c15_u64;
    for word in [disk, unit, write, index as u64] {
        sum = (sum ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        sum ^= sum >> 29;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamped(write: u64) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        fill(&mut bytes, 1, 7, write);
        bytes
    }

    #[test]
    fn a_unit_tells_its_write() {
        assert_eq!(read(&stamped(5), 1, 7), Ok(Some(5)));
        assert_eq!(read(&[0; 4096], 1, 7), Ok(None));
    }

    #[test]
    fn anything_else_is_an_error_that_says_what_it_is() {
        assert!(read(&stamped(5), 1, 8).expect_err("another place").contains("unit 7 of disk 1, write 5"));
        assert!(read(&stamped(5), 0, 7).expect_err("another disk").contains("unit 7 of disk 1, write 5"));
        let torn = [&stamped(5)[..512], &stamped(6)[512..]].concat();
        assert!(read(&torn, 1, 7).expect_err("torn").contains("up to byte 512, then write 6"));
        let half_zero = [&stamped(5)[..512], &[0; 3584]].concat();
        assert!(read(&half_zero, 1, 7).is_err());
    }
}
