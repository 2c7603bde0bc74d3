//! Resets that belong to no connection and wait for room in the RX ring, the oldest first.

use super::{Ledger, LedgerError, RESETS, RESETS_MAX, Word, high, low, word};
use crate::packet::{Cid, Header, Op};

/// Of one reset, in bytes; three words of it are in use.
pub(super) const STRIDE: usize = 32;

impl Ledger {
    /// How many resets wait.
    #[must_use]
    pub fn resets(&self) -> usize {
        let waiting = self.get(Word::ResetsOwed).wrapping_sub(self.get(Word::ResetsSent));
        usize::try_from(waiting).unwrap_or(usize::MAX)
    }

    /// Stages a reset, unless there are as many as may wait.
    pub fn owe_reset(&mut self, reset: &Header) {
        if self.resets() < RESETS_MAX {
            let owed = self.get(Word::ResetsOwed);
            let ports = word(reset.src_port, reset.dst_port);
            for (at, value) in (0..).zip([reset.src_cid.0, ports, reset.kind.into()]) {
                self.stage(reset_at(owed) + 8 * at, value);
            }
            self.set(Word::ResetsOwed, owed.wrapping_add(1));
        }
    }

    /// The oldest reset. What is staged is not seen.
    #[must_use]
    pub fn oldest_reset(&self) -> Option<Header> {
        if self.resets() == 0 {
            return None;
        }
        let at = reset_at(self.get(Word::ResetsSent));
        let ports = self.load(at + 8);
        Some(Header {
            src_cid: Cid(self.load(at)),
            dst_cid: Cid(self.get(Word::Cid)),
            src_port: high(ports),
            dst_port: low(ports),
            len_bytes: 0,
            kind: u16::try_from(self.load(at + 16) & 0xffff).unwrap_or(0),
            op: Op::Reset.number(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        })
    }

    /// Stages that the oldest reset was sent.
    pub fn reset_sent(&mut self) {
        let sent = self.get(Word::ResetsSent);
        self.set(Word::ResetsSent, sent.wrapping_add(1));
    }

    /// Stages that there are none.
    pub fn forget_resets(&mut self) {
        let owed = self.get(Word::ResetsOwed);
        self.set(Word::ResetsSent, owed);
    }

    pub(super) fn check_resets(&self) -> Result<(), LedgerError> {
        if self.resets() > RESETS_MAX {
            return Err(LedgerError::Nonsense("too many resets wait"));
        }
        Ok(())
    }
}

fn reset_at(number: u64) -> usize {
    RESETS + STRIDE * (usize::try_from(number % RESETS_MAX as u64).unwrap_or(0))
}
