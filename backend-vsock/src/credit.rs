//! Flow control of one connection: who may still send how many bytes. Pure arithmetic.
//!
//! Each side tells in every packet the size of its buffer (`buf_alloc`) and how many bytes have
//! left it since the connection began (`fwd_cnt`). What the other side has sent beyond `fwd_cnt`
//! must fit into `buf_alloc`. All counts run modulo 2^32 and wrap (virtio 1.3, section 5.10.6.3).

use std::num::Wrapping;

use crate::ledger::{high, low, word};

/// Our buffer for one connection, in bytes: what a guest may send before the host program reads.
pub const BUFFER_BYTES: u32 = 256 * 1024;
/// So many forwarded bytes that the guest does not know of are worth a packet of their own.
const UPDATE_BYTES: u32 = BUFFER_BYTES / 4;

/// The guest sent more than it had credit for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

/// The credit of one connection, both ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Bytes that we sent.
    sent: Wrapping<u32>,
    /// The guest's buffer, as it last told; it may grow, shrink and be nonsense.
    guest_alloc: u32,
    /// The guest's `fwd_cnt`, as it last told.
    guest_forwarded: Wrapping<u32>,
    /// Bytes that the guest sent.
    received: Wrapping<u32>,
    /// Bytes of these that left our buffer. Never runs ahead of `received`.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest was last told.
    told: Wrapping<u32>,
}

impl Credit {
    /// Takes note of what a packet of the guest says about its buffer.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_alloc = buf_alloc;
        self.guest_forwarded = Wrapping(fwd_cnt);
    }

    /// How many bytes may be sent now. A guest that claims to have forwarded what was never sent
    /// looks as if nearly 2^32 bytes were on their way, and gets nothing.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.guest_alloc.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// Takes note of bytes sent to the guest: never more than [`available`](Self::available).
    pub fn send(&mut self, len_bytes: u32) {
        debug_assert!(len_bytes <= self.available(), "sent beyond the guest's credit");
        self.sent += len_bytes;
    }

    /// Takes note of bytes from the guest, which are now in our buffer.
    ///
    /// # Errors
    ///
    /// Fails if they exceed what the guest was allowed; nothing is noted then.
    pub fn receive(&mut self, len_bytes: u32) -> Result<(), Overrun> {
        if len_bytes > BUFFER_BYTES.saturating_sub(self.held()) {
            return Err(Overrun);
        }
        self.received += len_bytes;
        Ok(())
    }

    /// How many bytes of the guest are in our buffer.
    #[must_use]
    pub fn held(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// Takes note of bytes that left our buffer.
    pub fn forward(&mut self, len_bytes: u32) {
        debug_assert!(len_bytes <= self.held(), "forwarded what never came");
        self.forwarded += len_bytes;
    }

    /// Whether the guest should be told of the room in our buffer though there is no data to send
    /// along: a quarter of the buffer became free since it last heard.
    #[must_use]
    pub fn update_is_due(&self) -> bool {
        (self.forwarded - self.told).0 >= UPDATE_BYTES
    }

    /// The `buf_alloc` and `fwd_cnt` of a packet that is now written for the guest.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (BUFFER_BYTES, self.forwarded.0)
    }

    /// As it is written down for a successor.
    #[must_use]
    pub fn to_words(self) -> [u64; 3] {
        [
            word(self.sent.0, self.guest_alloc),
            word(self.guest_forwarded.0, self.received.0),
            word(self.forwarded.0, self.told.0),
        ]
    }

    /// As it was written down: every number is one that could be.
    #[must_use]
    pub fn from_words(words: [u64; 3]) -> Self {
        let [first, second, third] = words;
        Self {
            sent: Wrapping(high(first)),
            guest_alloc: low(first),
            guest_forwarded: Wrapping(high(second)),
            received: Wrapping(low(second)),
            forwarded: Wrapping(high(third)),
            told: Wrapping(low(third)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn credit_at(count: u32) -> Credit {
        let count = Wrapping(count);
        Credit {
            sent: count,
            guest_alloc: 0,
            guest_forwarded: count,
            received: count,
            forwarded: count,
            told: count,
        }
    }

    #[test]
    fn nothing_may_be_sent_before_the_guest_tells_of_its_buffer() {
        assert_eq!(Credit::default().available(), 0);
    }

    #[test]
    fn credit_holds_when_the_counts_wrap() {
        let mut credit = credit_at(u32::MAX - 10);
        credit.update(100, u32::MAX - 10);
        credit.send(100);
        assert_eq!(credit.available(), 0);
        credit.update(100, 19);
        assert_eq!(credit.available(), 30);
        assert_eq!(credit.receive(BUFFER_BYTES), Ok(()));
        assert_eq!(credit.receive(1), Err(Overrun));
        credit.forward(BUFFER_BYTES);
        assert!(credit.update_is_due());
        assert_eq!(credit.tell(), (BUFFER_BYTES, BUFFER_BYTES - 11));
        assert!(!credit.update_is_due());
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_below_what_is_on_its_way_gets_nothing() {
        let mut credit = Credit::default();
        credit.update(100, 0);
        credit.send(60);
        credit.update(50, 0);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn a_guest_that_forwards_what_was_never_sent_gets_nothing() {
        let mut credit = Credit::default();
        credit.update(4096, 1);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn a_blocked_guest_is_always_told_before_our_buffer_is_empty() {
        let mut credit = credit_at(7);
        credit.receive(BUFFER_BYTES).unwrap();
        credit.forward(UPDATE_BYTES - 1);
        assert!(!credit.update_is_due());
        credit.forward(1);
        assert!(credit.update_is_due());
    }

    proptest! {
        #[test]
        fn what_is_written_down_is_what_is_read(words: [u64; 3]) {
            prop_assert_eq!(Credit::from_words(words).to_words(), words);
        }

        /// A model with counts that never wrap agrees with the wrapped ones at every step.
        #[test]
        fn both_directions_agree_with_a_model_of_unbounded_counts(
            start in any::<u32>(),
            steps in prop::collection::vec((0_u8..5, 0_u32..400_000), 1..200),
        ) {
            let mut credit = credit_at(start);
            let (mut sent, mut read, mut alloc) = (0_u64, 0_u64, 0_u64);
            let (mut received, mut forwarded) = (0_u64, 0_u64);
            for (action, amount) in steps {
                match action {
                    0 => {
                        let len = amount.min(credit.available());
                        credit.send(len);
                        sent += u64::from(len);
                    }
                    1 => {
                        read += u64::from(amount).min(sent - read);
                        alloc = u64::from(amount);
                        let wrapped = u32::try_from((u64::from(start) + read) % (1 << 32)).unwrap();
                        credit.update(amount, wrapped);
                    }
                    2 => {
                        let fits = received - forwarded + u64::from(amount) <= u64::from(BUFFER_BYTES);
                        prop_assert_eq!(credit.receive(amount).is_ok(), fits);
                        received += if fits { u64::from(amount) } else { 0 };
                    }
                    3 => {
                        let len = u64::from(amount).min(received - forwarded);
                        credit.forward(u32::try_from(len).unwrap());
                        forwarded += len;
                    }
                    _ => {
                        let (_alloc, told) = credit.tell();
                        let wrapped = (u64::from(start) + forwarded) % (1 << 32);
                        prop_assert_eq!(u64::from(told), wrapped);
                    }
                }
                prop_assert_eq!(u64::from(credit.available()), alloc.saturating_sub(sent - read));
            }
        }
    }
}
