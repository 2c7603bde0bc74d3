//! A supervisor of the device, that keeps what outlives a process, kills processes and starts
//! others.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::thread;
use std::time::Instant;

use backend_daemon::testing::{DEADLINE, Daemon};
use backend_vsock::ledger::STATE_BYTES;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::guest::Guest;
use crate::program::{CID, Device};

const PUT: u8 = 1;
const REMOVE: u8 = 2;
const HELD: u8 = 3;
const END: u8 = 4;

/// What outlives a process of the device.
pub struct Supervisor {
    pub state: File,
    pub kept: BTreeMap<u64, OwnedFd>,
    store: Option<OwnedFd>,
}

impl Supervisor {
    pub fn new() -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = File::from(memfd_create("state", flags).unwrap());
        state.set_len(STATE_BYTES as u64).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&state, seals).unwrap();
        Self { state, kept: BTreeMap::new(), store: None }
    }

    /// With a first process.
    pub fn start() -> (Self, Device) {
        let mut supervisor = Self::new();
        let folder = tempfile::tempdir().unwrap();
        let daemon = supervisor.spawn(&folder);
        (supervisor, Device { daemon, folder })
    }

    /// Kills the process, with everything that it was about to do, and starts another.
    pub fn replace(&mut self, device: &mut Device) {
        self.kill(device);
        device.daemon = self.spawn(&device.folder);
    }

    /// Kills the process, if it is not dead already, and takes in what it left.
    pub fn kill(&mut self, device: &mut Device) {
        if device.daemon.is_running() {
            device.daemon.signal(Signal::KILL);
        }
        device.daemon.wait();
        self.take_in();
    }

    /// Starts a process that is given all there is.
    pub fn spawn(&mut self, folder: &TempDir) -> Daemon {
        self.spawn_to_die(folder, None)
    }

    /// The same; it ends by itself after so many steps.
    pub fn spawn_to_die(&mut self, folder: &TempDir, steps: Option<u64>) -> Daemon {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let held = self.kept.iter().map(|(key, fd)| (*key, fd.try_clone().unwrap()));
        let (held, to_child): (Vec<_>, _) = (held.collect(), ours.try_clone().unwrap());
        // There may be more than the socket holds before the child reads any.
        thread::spawn(move || {
            for (key, fd) in &held {
                send(&to_child, HELD, *key, Some(fd));
            }
            send(&to_child, END, 0, None);
        });
        self.store = Some(ours);
        let state = self.state.try_clone().unwrap();
        let inherited = [state.as_fd(), theirs.as_fd()];
        for fd in inherited {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let [state_fd, store_fd] = inherited.map(|fd| fd.as_raw_fd().to_string());
        let (cid, path) = (CID.to_string(), folder.path().join("v.sock"));
        let options = [
            ("--state-fd", state_fd.as_ref()),
            ("--store-fd", store_fd.as_ref()),
            ("--guest-cid", cid.as_ref()),
            ("--uds-path", path.as_os_str()),
        ];
        let options: Vec<&OsStr> =
            options.into_iter().flat_map(|(name, value)| [OsStr::new(name), value]).collect();
        let own = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-vsock"));
        command.arg("--socket-path").arg(own.path().join("vhost.sock")).args(options);
        if let Some(steps) = steps {
            command.env("NACRE_DIE_AFTER", steps.to_string());
        }
        Daemon::spawn(command, own)
    }

    /// Takes in what the process has sent.
    pub fn take_in(&mut self) {
        let Some(store) = &self.store else { return };
        loop {
            let mut datagram = [0; 10];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut beside = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut datagram)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            match recvmsg(store, &mut parts, &mut beside, flags) {
                Ok(received) if received.bytes == 9 => {}
                _ => return,
            }
            let fd = beside.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            let key = u64::from_le_bytes(datagram[1..9].try_into().unwrap());
            match (datagram[0], fd) {
                (PUT, Some(fd)) => self.kept.insert(key, fd),
                (REMOVE, None) => self.kept.remove(&key),
                other => panic!("{other:?} in the store"),
            };
        }
    }
}

fn send(socket: &OwnedFd, tag: u8, key: u64, fd: Option<&OwnedFd>) {
    let mut datagram = vec![tag];
    datagram.extend(key.to_le_bytes());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().map(AsFd::as_fd).collect();
    if !fds.is_empty() {
        assert!(beside.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    // The child may have died: a test has it die wherever it likes.
    match sendmsg(socket, &[IoSlice::new(&datagram)], &mut beside, SendFlags::NOSIGNAL) {
        Ok(_) | Err(_) => {}
    }
}

/// Connects the guest's frontend to a process that dies some time soon; says whether it lived long
/// enough for that.
pub fn reconnected(device: &mut Device, guest: &mut Guest) -> bool {
    let socket = device.daemon.socket();
    let deadline = Instant::now() + DEADLINE;
    while !socket.exists() {
        if !device.daemon.is_running() {
            return false;
        }
        assert!(Instant::now() < deadline, "no socket");
    }
    // A death in the middle leaves the frontend alone with half a conversation.
    let connected = catch_unwind(AssertUnwindSafe(|| guest.driver.reconnect(&socket)));
    connected.is_ok()
}
