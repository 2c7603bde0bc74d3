//! A share, its state and its store, on which processes live and die within a test.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use backend_daemon::process::{State, Store};
use nacre_proto::store::{FromStore, ToStore};
use rustix::io::{ReadWriteFlags, pwritev2};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recvmsg, send, socketpair,
};
use tempfile::TempDir;
use virtiofsd::filesystem::{FileSystem, FsOptions, OpenOptions, ZeroCopyReader};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::passthrough::{Config, PassthroughFs};

use crate::keep::Keep;
use crate::lasting::{Lasting, Manner, nobody};
use crate::layout;
use crate::ledger::{Ledger, fault};
use crate::record::Key;
use crate::table::{Session, Table};

pub(super) type Fs = Lasting<PassthroughFs>;

/// Nodes and handles that the guest must be able to use in the end.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    pub(super) nodes: Vec<u64>,
    pub(super) handles: Vec<(u64, u64)>,
}

/// Mode, links, contents and the one attribute of each file.
type Tree = BTreeMap<String, (u32, u64, Vec<u8>, Vec<u8>)>;

/// All that there is to compare.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Conclusion {
    error: Option<i32>,
    tree: Tree,
    held: usize,
    /// Inode numbers differ from run to run.
    pub(super) census: (Vec<(Option<CString>, u64, u32)>, usize),
}

/// Bytes to write.
pub(super) struct Data(pub(super) &'static [u8]);

impl ZeroCopyReader for Data {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        at: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let appends = flags.is_some_and(|flags| flags.contains(WritevFlags::RWF_APPEND));
        let flags = if appends { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
        Ok(pwritev2(file, &[IoSlice::new(&self.0[..count])], at, flags)?)
    }
}

pub(super) fn name(text: &str) -> CString {
    CString::new(text).unwrap()
}

/// A share with a process.
pub(super) struct Bench {
    share: TempDir,
    state: State,
    held: BTreeMap<u64, OwnedFd>,
    fs: Option<(Fs, OwnedFd)>,
    unique: u64,
}

type Answer = Option<io::Result<Outcome>>;

impl Bench {
    pub(super) fn new() -> Self {
        // Where extended attributes work.
        let share = tempfile::tempdir().unwrap();
        let state = fault::state(layout::node(2000) * 8);
        let mut bench = Self { share, state, held: BTreeMap::new(), fs: None, unique: 10 };
        bench.live();
        let fs = bench.fs();
        fs.init(FsOptions::empty()).unwrap();
        fs.mounted(&Session::new(vec![7; 16]));
        bench
    }

    fn fs(&self) -> &Fs {
        &self.fs.as_ref().unwrap().0
    }

    fn live(&mut self) {
        let table = Table::load(Ledger::open(self.state.clone()).unwrap()).unwrap();
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        send(&ours, &FromStore::End.encode(), SendFlags::empty()).unwrap();
        let (store, _) = Store::open(theirs).unwrap();
        let proc_self_fd = || File::open("/proc/self/fd").unwrap();
        let keep = Keep::new(self.share.path(), proc_self_fd(), Some(store)).unwrap();
        let config = Config {
            root_dir: self.share.path().to_str().unwrap().to_owned(),
            proc_sfd_rawfd: Some(proc_self_fd()),
            xattr: true,
            ..Config::default()
        };
        let open_options = OpenOptions::empty();
        let manner = Manner { attr_timeout: Duration::ZERO, open_options, read_only: false };
        let inner = PassthroughFs::new(config).unwrap();
        self.fs = Some((Lasting::new(inner, table, keep, manner), ours));
    }

    /// Serves requests that nobody dies of.
    pub(super) fn prepare(&mut self, act: impl FnOnce(&Fs) -> Outcome) -> Outcome {
        let key = Key { unique: self.unique, head: 0 };
        self.unique += 2;
        self.fs().begin(0, key, false);
        let outcome = act(self.fs());
        self.fs().finish(Some(16));
        outcome
    }

    /// Serves a request.
    pub(super) fn serve(
        &mut self,
        queue: usize,
        is_repeated: bool,
        act: impl FnOnce(&Fs) -> io::Result<Outcome>,
    ) -> io::Result<Outcome> {
        let key = Key { unique: 8, head: 3 };
        assert_eq!(self.fs().begin(queue, key, is_repeated), None);
        let outcome = act(self.fs());
        self.fs().finish(Some(32));
        outcome
    }

    /// Serves a request until so many stores are made. Gives whether the process died of it, and
    /// what it had answered.
    pub(super) fn serve_until(
        &mut self,
        stores: u32,
        is_repeated: bool,
        act: impl FnOnce(&Fs) -> io::Result<Outcome>,
    ) -> (bool, Answer) {
        let mut answer = None;
        let fs = self.fs();
        let is_dead = fault::dies_at(stores, || {
            let key = Key { unique: 8, head: 3 };
            if fs.begin(1, key, is_repeated).is_none() {
                answer = Some(act(fs));
                fs.finish(Some(32));
            }
        });
        (is_dead, answer)
    }

    /// The process is gone; another one takes up what it left.
    pub(super) fn succeed(&mut self) {
        self.bury();
        self.live();
        self.take_up();
    }

    fn take_up(&self) {
        let fs = self.fs();
        fs.init(FsOptions::empty()).unwrap();
        let held = self.held.iter().map(|(node, fd)| (*node, fd.try_clone().unwrap()));
        fs.recover(held.collect());
    }

    /// The same, but that one dies as well.
    pub(super) fn succeed_until(
        &mut self,
        stores: u32,
        answer: Answer,
        act: impl FnOnce(&Fs) -> io::Result<Outcome>,
    ) -> (bool, Answer) {
        self.bury();
        let mut answer = answer;
        let is_dead = fault::dies_at(stores, || {
            self.live();
            self.take_up();
            let fs = self.fs();
            if fs.begin(1, Key { unique: 8, head: 3 }, true).is_none() {
                answer = Some(act(fs));
                fs.finish(Some(32));
            }
        });
        (is_dead, answer)
    }

    /// Takes in what the process sent to the store, and lets it go.
    fn bury(&mut self) {
        let Some((fs, socket)) = self.fs.take() else { return };
        crate::ticket::take();
        drop(fs);
        while let Some((message, fd)) = receive(&socket) {
            match message {
                ToStore::Put { key } => drop(self.held.insert(key, fd.unwrap())),
                ToStore::Remove { key } => drop(self.held.remove(&key)),
            }
        }
    }

    /// Serves the request again, if it has to be.
    pub(super) fn serve_again(
        &mut self,
        answer: Answer,
        act: impl FnOnce(&Fs) -> io::Result<Outcome>,
    ) -> io::Result<Outcome> {
        let fs = self.fs();
        if let Some(written_bytes) = fs.begin(1, Key { unique: 8, head: 3 }, true) {
            assert_eq!(written_bytes, 32);
            return answer.expect("an answer that is recorded was given");
        }
        let outcome = act(fs);
        fs.finish(Some(32));
        outcome
    }

    /// What there is in the end. Everything that the guest holds has to work.
    pub(super) fn conclude(mut self, outcome: io::Result<Outcome>) -> Conclusion {
        let (error, outcome) = match outcome {
            Ok(outcome) => (None, outcome),
            Err(error) => (error.raw_os_error(), Outcome::default()),
        };
        // Once in the process that answered, and once in the one behind it.
        for _ in 0..2 {
            for node in &outcome.nodes {
                self.fs().getattr(nobody(), *node, None).unwrap();
            }
            for (node, handle) in &outcome.handles {
                self.fs().flush(nobody(), *node, *handle, 0).unwrap();
            }
            self.succeed();
        }
        let (census, handles) = self.fs().0.table().census();
        let census = census.into_iter().map(|(_inode, name, count, opens)| (name, count, opens));
        let mut census: Vec<_> = census.collect();
        census.sort();
        self.bury();
        let mut tree = BTreeMap::new();
        walk(self.share.path(), "", &mut tree);
        Conclusion { error, tree, held: self.held.len(), census: (census, handles) }
    }
}

fn walk(folder: &Path, prefix: &str, tree: &mut Tree) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}/{}", path.file_name().unwrap().to_str().unwrap());
        let metadata = fs::symlink_metadata(&path).unwrap();
        let data = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        let mut attribute = vec![0; 64];
        let len = rustix::fs::lgetxattr(&path, "user.test", &mut attribute[..]).unwrap_or(0);
        attribute.truncate(len);
        tree.insert(name.clone(), (metadata.mode(), metadata.nlink(), data, attribute));
        if metadata.is_dir() {
            walk(&path, &name, tree);
        }
    }
}

fn receive(socket: &OwnedFd) -> Option<(ToStore, Option<OwnedFd>)> {
    let mut datagram = [0; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut datagram)];
    let received = recvmsg(socket, &mut parts, &mut beside, RecvFlags::DONTWAIT).ok()?;
    let fd = beside.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Some((ToStore::decode(datagram.get(..received.bytes)?).ok()?, fd))
}
