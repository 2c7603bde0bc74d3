//! A connection's state as it is written down for a successor.

use super::{Connection, Phase};
use crate::credit::Credit;
use crate::packet::Shut;

const PHASES: [Phase; 7] = [
    Phase::Greeting,
    Phase::Requesting,
    Phase::Requested,
    Phase::Accepting,
    Phase::Open,
    Phase::Resetting,
    Phase::Gone,
];

impl Connection {
    /// The state, but for the credit: the phase in the lowest byte (never 0), then one bit for
    /// each thing that is so.
    #[must_use]
    pub fn to_bits(&self) -> u32 {
        let phase = (1..).zip(PHASES).find(|(_number, phase)| *phase == self.phase);
        let flags = [
            self.guest.receive,
            self.guest.send,
            self.host.receive,
            self.host.send,
            self.told.receive,
            self.told.send,
            self.owes_credit,
            self.asked_credit,
        ];
        let flags = (8..).zip(flags).map(|(bit, is_so)| u32::from(is_so) << bit);
        phase.map_or(0, |(number, _phase)| number) | flags.sum::<u32>()
    }

    /// A connection as it was written down, if that makes sense.
    #[must_use]
    pub fn from_bits(bits: u32, credit: Credit) -> Option<Self> {
        let number = usize::try_from(bits & 0xff).ok()?.checked_sub(1)?;
        let is_so = |bit: u32| bits & 1 << bit != 0;
        let shut = |bit| Shut { receive: is_so(bit), send: is_so(bit + 1) };
        Some(Self {
            phase: *PHASES.get(number)?,
            credit,
            guest: shut(8),
            host: shut(10),
            told: shut(12),
            owes_credit: is_so(14),
            asked_credit: is_so(15),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_down_is_what_is_read(bits in any::<u16>(), credit in any::<[u64; 3]>()) {
            let credit = Credit::from_words(credit);
            let known = (1..=7).contains(&(bits & 0xff));
            let connection = Connection::from_bits(bits.into(), credit);
            prop_assert_eq!(connection.is_some(), known);
            if let Some(connection) = connection {
                prop_assert_eq!(connection.to_bits(), u32::from(bits));
            }
        }
    }
}
