//! The frame that opens a connection to a TCP port inside the guest.
//!
//! The host sends one frame and the agent answers with one byte: [`CONNECTED`], and from then on the
//! connection is raw bytes both ways, each closed for itself; or another one, and nothing follows.
//! The agent tries the guest's 127.0.0.1 first and ::1 after it.
//!
//! Layout, little-endian: magic `NCRF` (4), version u8 = 1, u8 = 0, port u16.

/// The frame's length, in bytes.
pub const FRAME_BYTES: usize = 8;
/// The only version of the frame.
pub const VERSION: u8 = 1;
/// The agent's answer: somebody takes the connection.
pub const CONNECTED: u8 = 0;
/// The agent's answer: nobody listens there.
pub const REFUSED: u8 = 1;
/// The agent's answer: it failed for another reason, such as too many connections.
pub const FAILED: u8 = 2;
const MAGIC: [u8; 4] = *b"NCRF";

/// Where to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The TCP port; not 0.
    pub port: u16,
}

/// Why bytes are no such frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// Not the magic: something else is speaking.
    #[error("not a forwarded connection's frame")]
    Magic,
    /// A version this side does not speak.
    #[error("a forwarded connection's frame of version {0}")]
    Version(u8),
    /// What has to be 0 is not.
    #[error("{0} in a byte that is to be 0")]
    Reserved(u8),
    /// No connection goes to port 0.
    #[error("port 0")]
    NoPort,
}

impl Forward {
    /// The frame's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; FRAME_BYTES] {
        let [m0, m1, m2, m3] = MAGIC;
        let [low, high] = self.port.to_le_bytes();
        [m0, m1, m2, m3, VERSION, 0, low, high]
    }

    /// Reads a frame.
    ///
    /// # Errors
    ///
    /// Fails if it is none, or one of another version.
    pub fn decode(bytes: &[u8; FRAME_BYTES]) -> Result<Self, ForwardError> {
        let [m0, m1, m2, m3, version, reserved, low, high] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(ForwardError::Magic);
        }
        if version != VERSION {
            return Err(ForwardError::Version(version));
        }
        match (reserved, u16::from_le_bytes([low, high])) {
            (0, 0) => Err(ForwardError::NoPort),
            (0, port) => Ok(Self { port }),
            (reserved, _) => Err(ForwardError::Reserved(reserved)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    #[test]
    fn a_frame_has_the_bytes_that_are_written_down() {
        let frame = *b"NCRF\x01\x00\x90\x1f";
        assert_eq!(Forward { port: 8080 }.encode(), frame);
        assert_eq!(Forward::decode(&frame), Ok(Forward { port: 8080 }));
    }

    #[test]
    fn every_other_frame_is_refused() {
        let refused = |bytes: &[u8; 8]| Forward::decode(bytes).unwrap_err();
        assert_eq!(refused(b"NCRS\x01\x00\x90\x1f"), ForwardError::Magic);
        assert_eq!(refused(b"NCRF\x02\x00\x90\x1f"), ForwardError::Version(2));
        assert_eq!(refused(b"NCRF\x01\x07\x90\x1f"), ForwardError::Reserved(7));
        assert_eq!(refused(b"NCRF\x01\x00\x00\x00"), ForwardError::NoPort);
    }

    #[test]
    fn every_port_is_read_back() {
        for port in 1..=u16::MAX {
            assert_eq!(Forward::decode(&Forward { port }.encode()), Ok(Forward { port }));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes: [u8; FRAME_BYTES]) {
            if let Ok(forward) = Forward::decode(&bytes) {
                assert_eq!(forward.encode(), bytes);
            }
        }
    }
}
