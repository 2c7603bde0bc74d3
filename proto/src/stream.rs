//! The hello frame that opens each standard stream's own vsock connection.
//!
//! The host sends one frame and then the stream is raw bytes in one direction: to the process for
//! standard input, from it for the other two. The sender's half-close is the end of file. With a
//! terminal there is one `Stdin` and one `Stdout`. A host that nobody takes an output stream from any
//! more sends [`UNWANTED`] on it: the process finds its pipe broken then, as on one machine.
//!
//! Layout, little-endian: magic `NCRS` (4), version u8 = 1, stream u8, container id length u8,
//! exec id length u8, offset u64, container id, exec id. The offset is the first byte of the
//! stream that the sender of the frame still wants, for resuming after a lost connection.

/// The magic and the fixed fields, in bytes.
pub const HEADER_BYTES: usize = 16;
/// The longest frame, in bytes.
pub const MAX_BYTES: usize = HEADER_BYTES + 2 * u8::MAX as usize;
/// What a host sends on an output stream that it wants no more of, its only word there.
pub const UNWANTED: u8 = 0;
/// The only version of the frame.
pub const VERSION: u8 = 1;
const MAGIC: [u8; 4] = *b"NCRS";

/// Which of a process's streams a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host; absent with a terminal.
    Stderr,
}

/// The first bytes of a stream connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Whose stream.
    pub container_id: String,
    /// Which process; empty is the container's init.
    pub exec_id: String,
    /// Which of its streams.
    pub stream: Stream,
    /// Where to begin, in bytes from the stream's start.
    pub offset: u64,
}

/// Why bytes are no hello frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not the magic: something else is speaking.
    #[error("not a stream's hello frame")]
    Magic,
    /// A version this side does not speak.
    #[error("hello frame of version {0}")]
    Version(u8),
    /// A stream number out of range.
    #[error("unknown stream {0}")]
    UnknownStream(u8),
    /// An id is not UTF-8.
    #[error("an id is not UTF-8")]
    NotUtf8,
    /// An id is longer than 255 bytes.
    #[error("an id of {0} bytes")]
    IdTooLong(usize),
    /// The container id is empty.
    #[error("the container id is empty")]
    NoContainer,
    /// The frame's length is not what its header says.
    #[error("a frame of {actual} bytes whose header says {expected}")]
    Length {
        /// By the header.
        expected: usize,
        /// As received.
        actual: usize,
    },
}

/// The length of the whole frame whose first bytes are `header`.
///
/// # Errors
///
/// Fails if this is no frame, or one of another version.
pub fn frame_len(header: &[u8; HEADER_BYTES]) -> Result<usize, HelloError> {
    if header[..4] != MAGIC {
        return Err(HelloError::Magic);
    }
    if header[4] != VERSION {
        return Err(HelloError::Version(header[4]));
    }
    Ok(HEADER_BYTES + usize::from(header[6]) + usize::from(header[7]))
}

impl Hello {
    /// The frame's bytes.
    ///
    /// # Errors
    ///
    /// Fails if an id is longer than 255 bytes or the container id is empty.
    pub fn encode(&self) -> Result<Vec<u8>, HelloError> {
        if self.container_id.is_empty() {
            return Err(HelloError::NoContainer);
        }
        let len =
            |id: &str| u8::try_from(id.len()).map_err(|_error| HelloError::IdTooLong(id.len()));
        let stream = match self.stream {
            Stream::Stdin => 0,
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend([VERSION, stream, len(&self.container_id)?, len(&self.exec_id)?]);
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.container_id.as_bytes());
        bytes.extend(self.exec_id.as_bytes());
        Ok(bytes)
    }

    /// Reads a whole frame, as long as [`frame_len`] says.
    ///
    /// # Errors
    ///
    /// Fails on anything that [`Self::encode`] would not have made.
    pub fn decode(frame: &[u8]) -> Result<Self, HelloError> {
        let actual = frame.len();
        let (header, ids) = frame
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(HelloError::Length { expected: HEADER_BYTES, actual })?;
        let expected = frame_len(header)?;
        if actual != expected {
            return Err(HelloError::Length { expected, actual });
        }
        let stream = match header[5] {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            other => return Err(HelloError::UnknownStream(other)),
        };
        let (container, exec) = ids.split_at(usize::from(header[6]));
        if container.is_empty() {
            return Err(HelloError::NoContainer);
        }
        let text = |id: &[u8]| String::from_utf8(id.to_vec()).map_err(|_error| HelloError::NotUtf8);
        let offset = header[8..].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        Ok(Self { container_id: text(container)?, exec_id: text(exec)?, stream, offset })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;

    #[test]
    fn a_hello_has_the_documented_bytes() {
        let hello = Hello {
            container_id: "web".to_owned(),
            exec_id: "x1".to_owned(),
            stream: Stream::Stderr,
            offset: 0x0102,
        };
        let bytes = b"NCRS\x01\x02\x03\x02\x02\x01\0\0\0\0\0\0webx1";
        assert_eq!(hello.encode().unwrap(), bytes);
        assert_eq!(Hello::decode(bytes).unwrap(), hello);
    }

    #[test]
    fn a_frame_without_a_container_is_refused() {
        assert_eq!(Hello::decode(b"NCRS\x01\0\0\0\0\0\0\0\0\0\0\0"), Err(HelloError::NoContainer));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes: Vec<u8>) {
            if let Ok(hello) = Hello::decode(&bytes) {
                assert_eq!(hello.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn what_is_encoded_is_decoded(container in "[a-z]{1,255}", exec in "[a-z]{0,255}", offset in any::<u64>()) {
            let hello = Hello { container_id: container, exec_id: exec, stream: Stream::Stdin, offset };
            assert_eq!(Hello::decode(&hello.encode().unwrap()).unwrap(), hello);
        }
    }
}
