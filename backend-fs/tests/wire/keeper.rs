//! The supervisor's part: it keeps a device's state and descriptors while processes come and go.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use backend_daemon::testing::Daemon;
use backend_fs::layout::STATE_BYTES;
use nacre_proto::store::{self, FromStore, ToStore};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg, socketpair,
};
use rustix::process::Signal;

type Held = Arc<Mutex<BTreeMap<u64, OwnedFd>>>;

/// `nacre-fs` on a share, again and again.
pub(crate) struct Keeper {
    share: PathBuf,
    more: Vec<String>,
    state: File,
    held: Held,
    daemon: Option<Daemon>,
    store: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Keeper {
    /// Starts the first process.
    pub(crate) fn start(share: &Path, more: &[&str]) -> Self {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = File::from(memfd_create("state", flags).unwrap());
        state.set_len(STATE_BYTES as u64).unwrap();
        fcntl_add_seals(&state, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
        let more = more.iter().map(|&word| word.to_owned()).collect();
        let (share, held) = (share.to_owned(), Held::default());
        let mut keeper = Self { share, more, state, held, daemon: None, store: None };
        keeper.succeed();
        keeper
    }

    /// The process that runs.
    pub(crate) fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().unwrap()
    }

    /// The file that is the state.
    pub(crate) fn state(&self) -> &File {
        &self.state
    }

    /// Which files are in the store.
    pub(crate) fn held(&self) -> Vec<u64> {
        self.held.lock().unwrap().keys().copied().collect()
    }

    /// Kills the process; all that it had sent is taken in when this returns.
    pub(crate) fn kill(&mut self) {
        self.daemon().signal(Signal::KILL);
        self.wait();
    }

    /// Waits for the process's end.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let code = self.daemon().wait().code();
        let (is_over, thread) = self.store.take().unwrap();
        is_over.store(true, Ordering::SeqCst);
        thread.join().unwrap();
        code
    }

    /// Starts a successor.
    pub(crate) fn succeed(&mut self) {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let state = self.state.try_clone().unwrap();
        for inherited in [state.as_fd(), theirs.as_fd()] {
            fcntl_setfd(inherited, FdFlags::empty()).unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-fs"));
        command.arg("--socket-path").arg(folder.path().join("vhost.sock"));
        command.args(["--tag", "share", "--shared-dir"]).arg(&self.share);
        command.args(["--num-request-queues", "3"]);
        command.args(["--state-fd", &state.as_raw_fd().to_string()]);
        command.args(["--store-fd", &theirs.as_raw_fd().to_string()]);
        command.args(self.more.iter().map(AsRef::<OsStr>::as_ref));
        self.daemon = Some(Daemon::spawn(command, folder));
        let (held, is_over) = (Arc::clone(&self.held), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&is_over);
        self.store = Some((is_over, thread::spawn(move || keep(&ours, &held, &over))));
    }

    /// Kills the process and starts the next one.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.succeed();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some((is_over, thread)) = self.store.take() {
            is_over.store(true, Ordering::SeqCst);
            // It failed the test already if it panicked.
            match thread.join() {
                Ok(()) | Err(_) => {}
            }
        }
    }
}

fn keep(socket: &OwnedFd, held: &Held, is_over: &AtomicBool) {
    match hand_over(socket, held) {
        Ok(()) => {}
        // It died before it took them all.
        Err(Errno::PIPE | Errno::CONNRESET) => return,
        Err(error) => panic!("{error}"),
    }
    loop {
        let last = is_over.load(Ordering::SeqCst);
        while let Some(message) = take(socket) {
            let mut held = held.lock().unwrap();
            match message {
                (ToStore::Put { key }, Some(fd)) => drop(held.insert(key, fd)),
                (ToStore::Remove { key }, None) => drop(held.remove(&key)),
                other => panic!("{other:?}"),
            }
        }
        if last {
            return;
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)).unwrap();
    }
}

fn hand_over(socket: &OwnedFd, held: &Held) -> Result<(), Errno> {
    for (key, fd) in held.lock().unwrap().iter() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        assert!(beside.push(SendAncillaryMessage::ScmRights(&fds)));
        let datagram = FromStore::Held { key: *key }.encode();
        sendmsg(socket, &[IoSlice::new(&datagram)], &mut beside, SendFlags::NOSIGNAL)?;
    }
    send(socket, &FromStore::End.encode(), SendFlags::NOSIGNAL).map(drop)
}

fn take(socket: &OwnedFd) -> Option<(ToStore, Option<OwnedFd>)> {
    let mut datagram = [0; store::BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut datagram)];
    let received = match recvmsg(socket, &mut parts, &mut beside, RecvFlags::DONTWAIT) {
        Ok(received) => received.bytes,
        Err(Errno::AGAIN | Errno::CONNRESET) => return None,
        Err(error) => panic!("{error}"),
    };
    if received == 0 {
        return None;
    }
    let fd = beside.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Some((ToStore::decode(&datagram).unwrap(), fd))
}
