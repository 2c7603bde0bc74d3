//! The CMOS clock (MC146818), which tells the host's UTC time in BCD and takes nothing.
//!
//! It exists because a guest that finds none polls for it: an absent one reads as an update that
//! never ends. Here no update is ever in progress, as every read is computed from the host's clock.
//! Alarms and interrupts are not there.

use std::{
    sync::atomic::{AtomicU8, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::bus::BusDevice;

/// The index port; the data port follows.
pub const PORT: u16 = 0x70;
/// Both.
pub const PORTS: u64 = 2;
const INDEX: u64 = 0;
const DATA: u64 = 1;
/// Bit 7 of the index port masks NMIs on real machines.
const INDEX_MASK: u8 = 0x7f;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;
/// The usual divider; no update in progress.
const STATUS_A_VALUE: u8 = 0x26;
/// 24 hours, BCD, no interrupts.
const STATUS_B_VALUE: u8 = 0x02;
/// The battery is good.
const STATUS_D_VALUE: u8 = 0x80;

const SECONDS_PER_DAY: u64 = 86_400;

/// The clock.
#[derive(Debug, Default)]
pub struct Clock {
    index: AtomicU8,
}

/// A moment in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Moment {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Moment {
    /// The moment so many seconds after the start of 1970.
    fn at(unix_seconds: u64) -> Self {
        let days = unix_seconds / SECONDS_PER_DAY;
        let second_of_day = unix_seconds % SECONDS_PER_DAY;
        // Years that begin in March make the leap day the last of its year: 400 of them are an
        // era of 146,097 days, and 1970 begins 719,468 days into the first.
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months from March on have 153 days in five.
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            // The first day of 1970 was a Thursday.
            weekday: (days + 4) % 7 + 1,
            hour: second_of_day / 3_600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
        }
    }

    /// The register `index` at this moment; what is no register reads as zero.
    fn register(&self, index: u8) -> u8 {
        match index {
            0 => bcd(self.second),
            2 => bcd(self.minute),
            4 => bcd(self.hour),
            6 => bcd(self.weekday),
            7 => bcd(self.day),
            8 => bcd(self.month),
            9 => bcd(self.year),
            CENTURY => bcd(self.year / 100),
            STATUS_A => STATUS_A_VALUE,
            STATUS_B => STATUS_B_VALUE,
            STATUS_D => STATUS_D_VALUE,
            _ => 0,
        }
    }
}

/// The last two decimal digits, four bits each.
fn bcd(number: u64) -> u8 {
    u8::try_from(number / 10 % 10 * 16 + number % 10).unwrap_or(0)
}

impl BusDevice for Clock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset != DATA {
            return;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let value = Moment::at(since.as_secs()).register(self.index.load(Ordering::Relaxed));
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == INDEX
            && let Some(index) = data.first()
        {
            self.index.store(index & INDEX_MASK, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_told_right() {
        let moment = |year, month, day, weekday, hour, minute, second| Moment {
            year,
            month,
            day,
            weekday,
            hour,
            minute,
            second,
        };
        assert_eq!(Moment::at(0), moment(1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(Moment::at(951_782_399), moment(2000, 2, 28, 2, 23, 59, 59));
        assert_eq!(Moment::at(951_782_400), moment(2000, 2, 29, 3, 0, 0, 0));
        assert_eq!(Moment::at(1_795_500_000), moment(2026, 11, 24, 3, 6, 0, 0));
        assert_eq!(Moment::at(4_107_542_400), moment(2100, 3, 1, 2, 0, 0, 0));
    }

    #[test]
    fn registers_are_bcd_and_no_update_is_in_progress() {
        let moment = Moment::at(1_795_500_000);
        assert_eq!(moment.register(9), 0x26);
        assert_eq!(moment.register(CENTURY), 0x20);
        assert_eq!(moment.register(8), 0x11);
        assert_eq!(moment.register(7), 0x24);
        assert_eq!(moment.register(STATUS_A) & 0x80, 0);
        assert_eq!(moment.register(STATUS_D), 0x80);
    }

    #[test]
    fn the_data_port_answers_for_the_index_without_its_nmi_bit() {
        let clock = Clock::default();
        clock.write(INDEX, &[0x80 | STATUS_D]);
        let mut data = [0];
        clock.read(DATA, &mut data);
        assert_eq!(data, [STATUS_D_VALUE]);
    }
}
