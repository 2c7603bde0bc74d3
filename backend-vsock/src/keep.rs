//! What the supervisor keeps for a successor: the listening socket, the pipe, and each
//! connection's socket, under keys that name a slot and a generation.
//!
//! A socket is put there before the ledger knows of its connection, and taken away after the
//! ledger has forgotten it. So whatever is there and not in the ledger is either newer than the
//! newest connection, and was never used, or it is a leftover.

use std::io;
use std::os::fd::BorrowedFd;

use backend_daemon::process::Store;

use crate::death;

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Where host programs connect.
    Listener,
    /// The conduit's end to read from.
    PipeRead,
    /// The conduit's end to write to.
    PipeWrite,
    /// A connection's socket.
    Connection {
        /// Where the connection is in the table.
        slot: usize,
        /// Which of the connections that were there.
        generation: u64,
        /// Who asked for it.
        from: Origin,
    },
}

/// Who asks for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A host program.
    Program,
    /// The guest.
    Guest,
}

const KIND: u32 = 56;
const SLOT_BITS: u32 = 16;
/// No process lives long enough to make as many connections.
pub(crate) const GENERATION_MAX: u64 = (1 << (KIND - SLOT_BITS)) - 1;

impl Key {
    /// As the store knows it.
    #[must_use]
    pub fn encode(self) -> u64 {
        match self {
            Self::Listener => 0,
            Self::PipeRead => 1,
            Self::PipeWrite => 2,
            Self::Connection { slot, generation, from } => {
                let kind = match from {
                    Origin::Program => 1,
                    Origin::Guest => 2,
                };
                kind << KIND | (generation & GENERATION_MAX) << SLOT_BITS | (slot as u64 & 0xffff)
            }
        }
    }

    /// What a key of the store stands for.
    #[must_use]
    pub fn decode(key: u64) -> Option<Self> {
        let from = match (key >> KIND, key) {
            (0, 0) => return Some(Self::Listener),
            (0, 1) => return Some(Self::PipeRead),
            (0, 2) => return Some(Self::PipeWrite),
            (1, _) => Origin::Program,
            (2, _) => Origin::Guest,
            _ => return None,
        };
        let slot = usize::try_from(key & 0xffff).ok()?;
        Some(Self::Connection { slot, generation: key >> SLOT_BITS & GENERATION_MAX, from })
    }
}

/// The supervisor's store, if there is a supervisor.
#[derive(Debug)]
pub struct Keep {
    store: Option<Store>,
    /// What the supervisor was too slow to be told. Nothing is put meanwhile: a key that is to be
    /// removed may be the next one's, and there are never more of these than connections.
    owed: Vec<u64>,
}

impl Keep {
    /// What is put into `store` outlives the process.
    #[must_use]
    pub fn new(store: Option<Store>) -> Self {
        Self { store, owed: Vec::new() }
    }

    /// Whether anything outlives the process.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.store.is_some()
    }

    /// Leaves a descriptor.
    ///
    /// # Errors
    ///
    /// Fails if the supervisor is gone or too slow; nothing was left then.
    pub fn put(&mut self, key: Key, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.settle_up();
        if !self.owed.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let put = self.store.as_ref().map_or(Ok(()), |store| store.put(key.encode(), fd));
        death::reach();
        put
    }

    /// Takes one away. A successor does it if the supervisor does not hear it from this process.
    pub fn remove(&mut self, key: u64) {
        if self.store.is_some() {
            self.owed.push(key);
            self.settle_up();
        }
    }

    fn settle_up(&mut self) {
        let Some(store) = &self.store else { return };
        while let Some(key) = self.owed.last() {
            if let Err(error) = store.remove(*key) {
                log::debug!("the supervisor does not take in what it shall close: {error}");
                return;
            }
            self.owed.pop();
            death::reach();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
    };

    use super::*;

    proptest! {
        #[test]
        fn a_key_names_what_it_was_made_of(slot in 0_usize..1024, generation in 0..GENERATION_MAX, guest: bool) {
            let from = if guest { Origin::Guest } else { Origin::Program };
            let key = Key::Connection { slot, generation, from };
            prop_assert_eq!(Key::decode(key.encode()), Some(key));
        }

        #[test]
        fn a_key_of_nobody_s_is_none(key: u64) {
            if let Some(known) = Key::decode(key) {
                prop_assert_eq!(known.encode(), key);
            }
        }
    }

    #[test]
    fn what_is_no_connection_has_a_key_too() {
        for key in [Key::Listener, Key::PipeRead, Key::PipeWrite] {
            assert_eq!(Key::decode(key.encode()), Some(key));
        }
        assert_eq!(Key::decode(3), None);
    }

    #[test]
    fn nothing_is_put_before_a_slow_supervisor_has_heard_what_to_close() {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let end = [4, 0, 0, 0, 0, 0, 0, 0, 0];
        send(&ours, &end, SendFlags::empty()).unwrap();
        let (store, _held) = Store::open(theirs).unwrap();
        let mut keep = Keep::new(Some(store));
        let key = Key::Connection { slot: 3, generation: 5, from: Origin::Guest };
        while keep.put(Key::Listener, ours.as_fd()).is_ok() {}
        keep.remove(key.encode());
        let receive = || {
            let mut datagram = [0; 9];
            recv(&ours, &mut datagram, RecvFlags::DONTWAIT).ok().map(|_| datagram)
        };
        // Room for the removal and no more would be the wrong time for the same key again.
        assert_eq!(keep.put(key, ours.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        while receive().is_some() {}
        keep.put(key, ours.as_fd()).unwrap();
        assert_eq!(receive().map(|datagram| datagram[0]), Some(2));
        assert_eq!(receive().map(|datagram| datagram[0]), Some(1));
        assert_eq!(receive(), None);
    }
}
