//! A latency histogram of fixed size: 64 steps per power of two, so about 1.6 % wide at worst.
//!
//! Always: recording neither allocates nor fails. Absent: merging over processes.

// Bucket numbers are small by construction; ranks are below 2^53.
#![allow(clippy::cast_possible_truncation)]

/// Steps per power of two.
const STEPS: u64 = 64;
const STEP_BITS: u32 = STEPS.trailing_zeros();
/// Values below `STEPS` have a bucket each; above, `STEPS` buckets for each further power of two.
const BUCKETS: usize = (STEPS * (64 - STEP_BITS as u64 + 1)) as usize;

/// Counts of durations in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket_of(ns)] += 1;
        self.total += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
        self.max_ns = 0;
    }

    /// Durations counted.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The longest duration, exactly, in nanoseconds.
    pub fn max_ns(&self) -> u64 {
        self.max_ns
    }

    /// The duration that a share `fraction` (0 to 1) of all durations do not exceed, in
    /// nanoseconds, rounded up to its bucket's end; 0 if nothing was counted.
    pub fn percentile_ns(&self, fraction: f64) -> u64 {
        let rank = ((self.total as f64 * fraction).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return last_of(bucket).min(self.max_ns);
            }
        }
        0
    }
}

fn bucket_of(ns: u64) -> usize {
    let bits = 64 - ns.leading_zeros();
    if bits <= STEP_BITS {
        return ns as usize;
    }
    let shift = bits - STEP_BITS - 1;
    (u64::from(shift) * STEPS + (ns >> shift)) as usize
}

fn last_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * STEPS {
        return bucket;
    }
    let shift = bucket / STEPS - 1;
    (((bucket - shift * STEPS) + 1) << shift).wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_and_buckets_are_narrow() {
        for shift in 0..63 {
            for delta in [0, 1, 3, 7] {
                let ns = (1_u64 << shift) + delta;
                let bucket = bucket_of(ns);
                assert!(last_of(bucket) >= ns, "{ns}");
                assert!(bucket == 0 || last_of(bucket - 1) < ns, "{ns}");
                assert!((last_of(bucket) - ns) as f64 <= ns as f64 / 60.0, "{ns}");
            }
        }
        assert!(bucket_of(u64::MAX) < BUCKETS);
    }

    #[test]
    fn percentiles_of_a_known_series() {
        let mut histogram = Histogram::default();
        for ns in 1..=10_000 {
            histogram.record(ns);
        }
        let near = |got: u64, want: u64| got.abs_diff(want) * 50 <= want;
        assert!(near(histogram.percentile_ns(0.5), 5_000));
        assert!(near(histogram.percentile_ns(0.99), 9_900));
        assert_eq!(histogram.percentile_ns(1.0), 10_000);
        assert_eq!(histogram.max_ns(), 10_000);
        assert_eq!(Histogram::default().percentile_ns(0.5), 0);
    }
}
