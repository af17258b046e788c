//! Instants on the wire: QMP's timestamps, and their form for people.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An instant of the host's clock, as QMP's events carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: u32,
}

impl Timestamp {
    /// Now.
    pub fn now() -> Self {
        std::time::SystemTime::now().into()
    }
}

impl From<std::time::SystemTime> for Timestamp {
    /// An instant before 1970 becomes 1970.
    fn from(time: std::time::SystemTime) -> Self {
        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            microseconds: since.subsec_micros(),
        }
    }
}

/// UTC, to the second: `2026-11-22 15:51:12Z`.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let days = self.seconds.div_euclid(86_400);
        let second = self.seconds.rem_euclid(86_400);
        // Days to civil date, in eras of 400 years that begin on a 1 March: Howard Hinnant,
        // "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = (shifted_month + 2) % 12 + 1;
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let (hour, minute) = (second / 3_600, second / 60 % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}Z", second % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_read_as_utc() {
        let shown = |seconds| Timestamp { seconds, microseconds: 0 }.to_string();
        assert_eq!(shown(0), "1970-01-01 00:00:00Z");
        assert_eq!(shown(951_782_399), "2000-02-28 23:59:59Z");
        assert_eq!(shown(951_782_400), "2000-02-29 00:00:00Z");
        assert_eq!(shown(1_795_362_672), "2026-11-22 15:51:12Z");
        assert_eq!(shown(4_107_542_400), "2100-03-01 00:00:00Z");
        assert_eq!(shown(-1), "1969-12-31 23:59:59Z");
    }
}
