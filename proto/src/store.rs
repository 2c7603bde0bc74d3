//! A backend's store: descriptors that its supervisor keeps for it, so that they outlive the process.
//!
//! One `SOCK_SEQPACKET` socket for each process. The supervisor first sends every descriptor that it
//! holds for the device as a [`FromStore::Held`], then [`FromStore::End`]; then the backend sends
//! [`ToStore`] datagrams, which are not answered. What a killed process had sent is taken in before its successor is started. A
//! datagram is [`BYTES`] long: a byte that says which, and the key, little-endian. A descriptor is
//! beside it (`SCM_RIGHTS`) exactly where that is said.

/// The length of every datagram, in bytes.
pub const BYTES: usize = 9;

const PUT: u8 = 1;
const REMOVE: u8 = 2;
const HELD: u8 = 3;
const END: u8 = 4;

/// From a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToStore {
    /// Keep the descriptor beside this under `key`, in place of one that is there.
    Put {
        /// The backend's own choice.
        key: u64,
    },
    /// Close what is kept under `key`, if anything is.
    Remove {
        /// As it was put.
        key: u64,
    },
}

/// To a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromStore {
    /// The descriptor beside this was put under `key`.
    Held {
        /// As it was put.
        key: u64,
    },
    /// There are no more.
    End,
}

/// Bytes that are no message of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a message of the store's protocol")]
pub struct Malformed;

impl ToStore {
    /// Its datagram.
    #[must_use]
    pub fn encode(self) -> [u8; BYTES] {
        match self {
            Self::Put { key } => datagram(PUT, key),
            Self::Remove { key } => datagram(REMOVE, key),
        }
    }

    /// The message in a datagram.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        match split(datagram)? {
            (PUT, key) => Ok(Self::Put { key }),
            (REMOVE, key) => Ok(Self::Remove { key }),
            _ => Err(Malformed),
        }
    }
}

impl FromStore {
    /// Its datagram.
    #[must_use]
    pub fn encode(self) -> [u8; BYTES] {
        match self {
            Self::Held { key } => datagram(HELD, key),
            Self::End => datagram(END, 0),
        }
    }

    /// The message in a datagram.
    ///
    /// # Errors
    ///
    /// Fails if it is none.
    pub fn decode(datagram: &[u8]) -> Result<Self, Malformed> {
        match split(datagram)? {
            (HELD, key) => Ok(Self::Held { key }),
            (END, 0) => Ok(Self::End),
            _ => Err(Malformed),
        }
    }
}

fn datagram(tag: u8, key: u64) -> [u8; BYTES] {
    let mut bytes = [tag; BYTES];
    bytes[1..].copy_from_slice(&key.to_le_bytes());
    bytes
}

fn split(datagram: &[u8]) -> Result<(u8, u64), Malformed> {
    let bytes: &[u8; BYTES] = datagram.try_into().map_err(|_length| Malformed)?;
    let [tag, key @ ..] = *bytes;
    Ok((tag, u64::from_le_bytes(key)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    #[test]
    fn messages_have_the_documented_bytes() {
        let key = 0x0102;
        assert_eq!(ToStore::Put { key }.encode(), [1, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ToStore::Remove { key }.encode(), [2, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(FromStore::Held { key }.encode(), [3, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(FromStore::End.encode(), [4, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ToStore::decode(&FromStore::End.encode()), Err(Malformed));
        assert_eq!(FromStore::decode(&ToStore::Put { key }.encode()), Err(Malformed));
    }

    proptest! {
        #[test]
        fn any_datagram_is_decoded_to_what_encodes_it_or_refused(bytes: Vec<u8>) {
            if let Ok(message) = ToStore::decode(&bytes) {
                assert_eq!(message.encode()[..], bytes);
            }
            if let Ok(message) = FromStore::decode(&bytes) {
                assert_eq!(message.encode()[..], bytes);
            }
        }
    }
}
