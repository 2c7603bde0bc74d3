//! A network namespace that somebody else has set up, such as a CNI plugin for a pod: what its
//! interfaces are, and a tap beside each of them.
//!
//! ```text
//!  veth in the namespace --ingress--> redirect --> tap --> nacre-net --> the guest
//!                        <-- redirect <--ingress--
//! ```
//!
//! Every frame goes the one way or the other before the namespace's own network stack sees it, so the
//! guest is the only one that answers there. The interface stays as it is, with its addresses and its
//! counters. What is made here goes with the namespace; without it, the redirections go with
//! [`Namespace::disconnect`] and the tap with its descriptor.

pub mod forward;
mod read;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process, thread,
};

use nacre_proto::agent::{Interface, Neighbor, Route};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{
    error_chain,
    network::{
        NetworkError,
        firewall::{ask, run},
    },
    record::JoinedRecord,
    sys,
};
pub use read::ReadError;

/// How many interfaces of a namespace are taken.
const MOST_INTERFACES: usize = 16;

/// Why a namespace can't be used.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// It can't be opened.
    #[error("can't open the network namespace {}", .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// It can't be entered: it is no network namespace, or the kernel refuses.
    #[error("can't enter the network namespace {}", .0.display())]
    Enter(PathBuf, #[source] io::Error),
    /// What is asked in it fails.
    #[error("can't work in the network namespace {}", .0.display())]
    Inside(PathBuf, #[source] NetworkError),
    /// What it says of itself makes no sense.
    #[error("can't understand the network namespace {}", .0.display())]
    Read(PathBuf, #[source] ReadError),
    /// There is too much in it.
    #[error("{count} interfaces in the network namespace {}: at most {MOST_INTERFACES}", path.display())]
    TooMany {
        /// Which.
        path: PathBuf,
        /// How many.
        count: usize,
    },
}

/// What is in a namespace, as a guest is told of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// All but the loopback, and those without an address.
    pub interfaces: Vec<Interface>,
    /// Those of the main tables, in an order in which they can be added, without those that come with
    /// an address.
    pub routes: Vec<Route>,
    /// Those that don't age.
    pub neighbors: Vec<Neighbor>,
}

/// A namespace; the same one, whatever becomes of its path.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    file: File,
}

impl Namespace {
    /// Opens the one at `path`.
    ///
    /// # Errors
    ///
    /// Fails if there is none, or without permission.
    pub fn open(path: &Path) -> Result<Self, NamespaceError> {
        let file = File::open(path);
        let file = file.map_err(|source| NamespaceError::Open(path.to_owned(), source))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// What is in it.
    ///
    /// # Errors
    ///
    /// Fails without `nsenter` and `ip`, or if they say what can't be understood.
    pub fn look(&self) -> Result<Found, NamespaceError> {
        let ask = |arguments: &[&str]| self.ask(&[&["ip", "-j"], arguments].concat());
        let links = ask(&["address", "show"])?;
        let routes =
            [ask(&["-4", "route", "show"])?, ask(&["-6", "route", "show", "table", "main"])?];
        let neighbors = ask(&["neigh", "show", "nud", "permanent"])?;
        let found = read::found(&links, &routes, &neighbors);
        let found = found.map_err(|source| NamespaceError::Read(self.path.clone(), source))?;
        match found.interfaces.len() {
            0..=MOST_INTERFACES => Ok(found),
            count => Err(NamespaceError::TooMany { path: self.path.clone(), count }),
        }
    }

    /// Makes a tap for `interface`, and leads to each what comes from the other. Frames of the tap
    /// carry a virtio-net header.
    ///
    /// # Errors
    ///
    /// Fails if the kernel refuses, or lacks the ingress discipline, the u32 classifier or mirred;
    /// what was made is gone again with the answer that is not given, and with [`Self::disconnect`].
    pub fn connect(&self, interface: &Interface) -> Result<OwnedFd, NamespaceError> {
        let from = interface.name.as_str();
        let tap_name = tap_name(from);
        let tap = self.inside(|| sys::create_tap(&tap_name))?;
        let mtu = interface.mtu.to_string();
        // Nothing of the host's is to speak there.
        self.run(&["ip", "link", "set", "dev", &tap_name, "addrgenmode", "none"])?;
        self.run(&["ip", "link", "set", "dev", &tap_name, "mtu", &mtu, "up"])?;
        for (from, to) in [(from, tap_name.as_str()), (tap_name.as_str(), from)] {
            self.run(&["tc", "qdisc", "replace", "dev", from, "ingress"])?;
            self.run(&[
                "tc", "filter", "replace", "dev", from, "parent", "ffff:", "protocol", "all",
                "prio", "1", "handle", "800::800", "u32", "match", "u32", "0", "0", "action",
                "mirred", "egress", "redirect", "dev", to,
            ])?;
        }
        Ok(tap)
    }

    /// Gives `interface` back to the namespace's own network stack.
    ///
    /// # Errors
    ///
    /// Fails if nothing is redirected there.
    pub fn disconnect(&self, interface: &str) -> Result<(), NamespaceError> {
        self.run(&["tc", "qdisc", "del", "dev", interface, "ingress"])
    }

    /// What `work` gives, done by a thread of its own in the namespace.
    fn inside<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> Result<T, NamespaceError> {
        let namespace = self.file.as_fd();
        let entered = thread::scope(|scope| {
            let worker = scope.spawn(move || {
                move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
                work()
            });
            worker.join().unwrap_or_else(|_panic| Err(io::Error::other("the work panicked")))
        });
        entered.map_err(|source| NamespaceError::Enter(self.path.clone(), source))
    }

    fn run(&self, words: &[&str]) -> Result<(), NamespaceError> {
        self.feed(words, "")
    }

    fn feed(&self, words: &[&str], input: &str) -> Result<(), NamespaceError> {
        let argument = self.argument();
        run("nsenter", &[&[argument.as_str(), "--"], words].concat(), input).map_err(self.failed())
    }

    fn ask(&self, words: &[&str]) -> Result<String, NamespaceError> {
        let argument = self.argument();
        ask("nsenter", &[&[argument.as_str(), "--"], words].concat()).map_err(self.failed())
    }

    fn failed_inside(&self, source: io::Error) -> NamespaceError {
        NamespaceError::Enter(self.path.clone(), source)
    }

    fn failed(&self) -> impl FnOnce(NetworkError) -> NamespaceError + use<'_> {
        |source| NamespaceError::Inside(self.path.clone(), source)
    }

    /// Not the path, at which there may be something else by now.
    fn argument(&self) -> String {
        format!("--net=/proc/{}/fd/{}", process::id(), self.file.as_raw_fd())
    }
}

/// Gives a recorded interface back. It is no error if its namespace is gone: all went with it.
pub(crate) fn leave(record: &JoinedRecord) {
    let left = Namespace::open(&record.netns)
        .and_then(|namespace| namespace.disconnect(&record.interface));
    if let Err(error) = left {
        log::debug!("{} is not given back: {}", record.interface, error_chain(&error));
    }
}

/// Fifteen bytes at most, as the interface's own name.
fn tap_name(interface: &str) -> String {
    let short: String = interface.chars().take(11).collect();
    format!("{short}.vm")
}

#[cfg(test)]
mod tests;
