//! What outlives a device's process: a piece of memory, and descriptors that it left here.
//!
//! The memory is the processes' own business; this program never looks into it. The descriptors
//! come over a socket of each process (`nacre_proto::store`), and a backend that was taken over may
//! send anything: whatever is not as it should be ends that process.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nacre_proto::store::{self, FromStore, ToStore};
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use crate::{
    backends::StoreFault,
    packets::{Packets, Received},
};

/// How many descriptors are kept for one device.
const MOST_HELD: usize = if cfg!(test) { 16 } else { 1 << 16 };

/// Lets this process hold as many descriptors as it may: each that is kept counts.
pub(super) fn make_room() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        log::debug!("few descriptors can be kept: {error}");
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Estate {
    state: File,
    held: BTreeMap<u64, OwnedFd>,
}

/// The connection to one process's end of the store.
#[derive(Debug)]
pub(super) struct Counter {
    socket: Packets,
    is_open: bool,
}

impl Estate {
    /// An empty one. Nobody can change the memory's size, so nobody's mapping of it can be made to
    /// fault.
    pub(super) fn new(name: &str, state_bytes: u64) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = File::from(memfd_create(format!("state of {name}"), flags)?);
        state.set_len(state_bytes)?;
        fcntl_add_seals(&state, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { state, held: BTreeMap::new() })
    }

    /// The memory, for another process.
    pub(super) fn state(&self) -> io::Result<OwnedFd> {
        Ok(self.state.try_clone()?.into())
    }

    /// How many descriptors are kept.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Gives a new process all that is kept. It waits for the process to take it.
    pub(super) async fn hand_over(&self, counter: &Counter) -> io::Result<()> {
        for (key, fd) in &self.held {
            let datagram = FromStore::Held { key: *key }.encode();
            counter.socket.send(&datagram, &[fd.as_fd()]).await?;
        }
        counter.socket.send(&FromStore::End.encode(), &[]).await
    }

    /// Takes in what the process leaves, until it breaks the rules.
    pub(super) async fn keep_taking(&mut self, counter: &mut Counter) -> StoreFault {
        let mut buffer = [0; store::BYTES + 1];
        while counter.is_open {
            match counter.socket.receive(&mut buffer).await {
                Ok(received) => {
                    if let Err(fault) = self.take(counter, &buffer, received) {
                        return fault;
                    }
                }
                Err(error) => counter.broken(&error),
            }
        }
        std::future::pending().await
    }

    /// Takes in all that a process left which is gone.
    pub(super) fn take_rest(&mut self, mut counter: Counter) -> Result<(), StoreFault> {
        let mut buffer = [0; store::BYTES + 1];
        while counter.is_open {
            match counter.socket.receive_now(&mut buffer) {
                Ok(Some(received)) => self.take(&mut counter, &buffer, received)?,
                Ok(None) => return Ok(()),
                Err(error) => counter.broken(&error),
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        counter: &mut Counter,
        buffer: &[u8],
        received: Received,
    ) -> Result<(), StoreFault> {
        if received.len_bytes == 0 {
            counter.is_open = false;
            return Ok(());
        }
        let mut fds = received.fds.into_iter();
        let message = ToStore::decode(&buffer[..received.len_bytes]);
        match (message, fds.next(), fds.next(), received.is_cut) {
            (Ok(ToStore::Put { key }), Some(fd), None, false) => {
                if self.held.len() >= MOST_HELD && !self.held.contains_key(&key) {
                    return Err(StoreFault::TooMany);
                }
                self.held.insert(key, fd);
                Ok(())
            }
            (Ok(ToStore::Remove { key }), None, None, false) => {
                self.held.remove(&key);
                Ok(())
            }
            _ => Err(StoreFault::Malformed),
        }
    }
}

impl Counter {
    /// A connection to a process that is yet to be started, and its end.
    pub(super) fn open() -> io::Result<(Self, OwnedFd)> {
        let (socket, theirs) = Packets::pair()?;
        Ok((Self { socket, is_open: true }, theirs))
    }

    fn broken(&mut self, error: &io::Error) {
        log::debug!("a store breaks: {error}");
        self.is_open = false;
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, io::Write};

    use super::*;

    async fn put(process: &Packets, key: u64, fd: OwnedFd) {
        process.send(&ToStore::Put { key }.encode(), &[fd.as_fd()]).await.unwrap();
    }

    /// A pipe's end, and the other one that tells whose it was.
    fn pipe() -> (io::PipeReader, OwnedFd) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, writer.into())
    }

    #[tokio::test]
    async fn what_a_killed_process_left_is_given_to_its_successor() {
        let mut estate = Estate::new("test", 4096).unwrap();
        let (counter, theirs) = Counter::open().unwrap();
        let process = Packets::new(theirs).unwrap();
        let (_, removed) = pipe();
        let (_, replaced) = pipe();
        let (mut reader, kept) = pipe();
        put(&process, 1, removed).await;
        put(&process, 2, replaced).await;
        process.send(&ToStore::Remove { key: 1 }.encode(), &[]).await.unwrap();
        process.send(&ToStore::Remove { key: 9 }.encode(), &[]).await.unwrap();
        put(&process, 2, kept).await;
        drop(process);
        estate.take_rest(counter).unwrap();
        assert_eq!(estate.held(), 1);

        let (counter, theirs) = Counter::open().unwrap();
        let successor = Packets::new(theirs).unwrap();
        estate.hand_over(&counter).await.unwrap();
        let mut buffer = [0; store::BYTES];
        let mut received = successor.receive(&mut buffer).await.unwrap();
        assert_eq!(FromStore::decode(&buffer).unwrap(), FromStore::Held { key: 2 });
        File::from(received.fds.remove(0)).write_all(b"alive").unwrap();
        drop((estate, received));
        let mut told = String::new();
        reader.read_to_string(&mut told).unwrap();
        assert_eq!(told, "alive");
        successor.receive(&mut buffer).await.unwrap();
        assert_eq!(FromStore::decode(&buffer).unwrap(), FromStore::End);
    }

    #[tokio::test]
    async fn a_backend_that_breaks_the_rules_is_found_out() {
        let end = FromStore::End.encode();
        let put_nothing = ToStore::Put { key: 1 }.encode();
        for datagram in [&b"x"[..], &end, &put_nothing, &[1; store::BYTES + 3]] {
            let mut estate = Estate::new("test", 4096).unwrap();
            let (mut counter, theirs) = Counter::open().unwrap();
            let process = Packets::new(theirs).unwrap();
            process.send(datagram, &[]).await.unwrap();
            assert_eq!(estate.keep_taking(&mut counter).await, StoreFault::Malformed);
        }
        let mut estate = Estate::new("test", 4096).unwrap();
        let (mut counter, theirs) = Counter::open().unwrap();
        let process = Packets::new(theirs).unwrap();
        let remove = ToStore::Remove { key: 1 }.encode();
        process.send(&remove, &[process.as_fd()]).await.unwrap();
        assert_eq!(estate.keep_taking(&mut counter).await, StoreFault::Malformed);
    }

    #[tokio::test]
    async fn no_more_is_kept_than_is_promised() {
        let mut estate = Estate::new("test", 4096).unwrap();
        let (counter, theirs) = Counter::open().unwrap();
        let process = Packets::new(theirs).unwrap();
        let (_reader, fd) = pipe();
        for key in 0..=MOST_HELD {
            put(&process, u64::try_from(key).unwrap(), fd.try_clone().unwrap()).await;
        }
        assert_eq!(estate.take_rest(counter), Err(StoreFault::TooMany));
        assert_eq!(estate.held(), MOST_HELD);
    }

    #[test]
    fn the_memory_keeps_its_size() {
        let estate = Estate::new("test", 8192).unwrap();
        let state = File::from(estate.state().unwrap());
        assert!(state.set_len(4096).is_err() && state.set_len(16384).is_err());
        assert_eq!(state.metadata().unwrap().len(), 8192);
    }
}
