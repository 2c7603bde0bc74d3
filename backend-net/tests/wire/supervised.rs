//! A supervisor's part: it holds the taps and the state, and starts one process after the other.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use backend_daemon::testing::Daemon;
use nacre_proto::store::FromStore;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use rustix::process::Signal;

use crate::host::{TAP_FLAGS, open_tap, start_with};

pub(crate) struct Supervisor {
    taps: Vec<OwnedFd>,
    state: File,
    /// The other end of the store of the process that runs.
    store: Option<OwnedFd>,
}

impl Supervisor {
    /// Makes a tap of so many queues, for the calling thread's network namespace.
    pub(crate) fn new(pairs: u16) -> Self {
        let flags = if pairs > 1 { TAP_FLAGS | libc::IFF_MULTI_QUEUE } else { TAP_FLAGS };
        let taps = (0..pairs).map(|_pair| open_tap(flags)).collect();
        let memfd = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = File::from(memfd_create("state", memfd).unwrap());
        state.set_len(4096).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&state, seals).unwrap();
        Self { taps, state, store: None }
    }

    /// Starts a process, the first or another one's successor.
    pub(crate) fn start(&mut self) -> Daemon {
        self.start_doomed(None)
    }

    /// The same; it may be doomed to die at one of its steps.
    pub(crate) fn start_doomed(&mut self, step: Option<u32>) -> Daemon {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        send(&ours, &FromStore::End.encode(), SendFlags::empty()).unwrap();
        self.store = Some(ours);
        let state = self.state.as_fd().try_clone_to_owned().unwrap();
        let numbers: Vec<_> = self.taps.iter().map(|tap| tap.as_raw_fd().to_string()).collect();
        let (taps, pairs) = (numbers.join(","), numbers.len().to_string());
        let (state_number, store) = (state.as_raw_fd().to_string(), theirs.as_raw_fd().to_string());
        let args = ["--tap-fd", &taps, "--queue-pairs", &pairs];
        let args = [&args[..], &["--state-fd", &state_number, "--store-fd", &store]].concat();
        let inherited: Vec<&OwnedFd> = self.taps.iter().chain([&state, &theirs]).collect();
        start_with(&args, &inherited, step)
    }

    pub(crate) fn restart(&mut self, daemon: &mut Daemon) {
        daemon.signal(Signal::KILL);
        daemon.wait();
        *daemon = self.start();
    }

    pub(crate) fn write_state(&self, bytes: &[u8]) {
        self.state.write_all_at(bytes, 0).unwrap();
    }
}
