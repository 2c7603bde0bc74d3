//! What can be said of a FUSE request before virtiofsd sees it, and the answer if it can't serve it.
//!
//! Only the first bytes of the header are read here (`struct fuse_in_header` and `struct
//! fuse_out_header` of Linux's `uapi/linux/fuse.h`); all else is virtiofsd's.

use backend_daemon::ring::Chain;

use crate::table::Session;

/// Length, opcode and unique number: what is read of the header, in bytes.
const READ_BYTES: usize = 16;
/// The header of every answer, in bytes.
const ANSWER_BYTES: u32 = 16;

const FORGET: u32 = 2;
/// The first request of a mount.
pub(crate) const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;

/// `struct fuse_in_header`, in bytes.
const HEADER_BYTES: u64 = 40;
/// `struct fuse_init_in` in its largest form, in bytes.
const INIT_BYTES: u64 = 64;

/// The header of a request, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    opcode: u32,
    unique: u64,
}

impl Request {
    /// Reads the header, if there is one.
    pub(crate) fn read(chain: &Chain) -> Option<Self> {
        let mut bytes = [0; READ_BYTES];
        chain.read_at(0, &mut bytes).ok()?;
        Some(Self::parse(bytes))
    }

    fn parse(bytes: [u8; READ_BYTES]) -> Self {
        let [_, _, _, _, a, b, c, d, unique @ ..] = bytes;
        Self { opcode: u32::from_le_bytes([a, b, c, d]), unique: u64::from_le_bytes(unique) }
    }

    /// Whether it begins a mount; whatever an earlier one held is then over.
    pub(crate) fn begins_mount(self) -> bool {
        self.opcode == INIT
    }

    /// The number that the guest gave it.
    pub(crate) fn unique(self) -> u64 {
        self.unique
    }

    /// Whether it looks names up that it may not have the room to tell of.
    pub(crate) fn is_readdirplus(self) -> bool {
        self.opcode == READDIRPLUS
    }

    /// What the guest wants of a mount, if this is what begins one.
    pub(crate) fn session(self, chain: &Chain) -> Option<Session> {
        let len = chain.readable_len().checked_sub(HEADER_BYTES)?.min(INIT_BYTES);
        let mut arguments = vec![0; usize::try_from(len).ok()?];
        chain.read_at(HEADER_BYTES, &mut arguments).ok()?;
        self.begins_mount().then(|| Session::new(arguments))
    }

    /// Whether `room_bytes` bytes are room enough for an answer: some requests have none.
    pub(crate) fn has_room(self, room_bytes: u64) -> bool {
        room_bytes >= u64::from(ANSWER_BYTES)
            || matches!(self.opcode, FORGET | BATCH_FORGET | INTERRUPT)
    }

    /// Answers with an error number; gives the answer's length, in bytes.
    pub(crate) fn refuse(self, chain: &Chain, error: i32) -> u32 {
        let written = chain.write_at(0, &self.refusal(error));
        // Without room for an answer the guest does not wait for one.
        if written.is_ok() { ANSWER_BYTES } else { 0 }
    }

    fn refusal(self, error: i32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&ANSWER_BYTES.to_le_bytes());
        bytes[4..8].copy_from_slice(&(-error).to_le_bytes());
        bytes[8..].copy_from_slice(&self.unique.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32) -> Request {
        let mut bytes = [0; READ_BYTES];
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[8..].copy_from_slice(&7_u64.to_le_bytes());
        Request::parse(bytes)
    }

    #[test]
    fn only_what_has_no_answer_may_leave_no_room_for_one() {
        assert!(request(FORGET).has_room(0));
        assert!(request(BATCH_FORGET).has_room(0));
        for opcode in [1, 15, INIT, 28, 44, u32::MAX] {
            assert!(!request(opcode).has_room(15), "{opcode}");
            assert!(request(opcode).has_room(16), "{opcode}");
        }
    }

    #[test]
    fn a_refusal_names_the_request_and_a_negative_error_number() {
        let bytes = request(1).refusal(libc::EIO);
        assert_eq!(bytes[..4], [16, 0, 0, 0]);
        assert_eq!(bytes[4..8], (-5_i32).to_le_bytes());
        assert_eq!(bytes[8..], 7_u64.to_le_bytes());
    }

    #[test]
    fn init_begins_a_mount() {
        assert!(request(INIT).begins_mount());
        assert!(!request(1).begins_mount());
    }
}
