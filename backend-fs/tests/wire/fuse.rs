//! A FUSE client on a virtqueue: as much of the kernel's side as the tests need.
//!
//! Structures are those of Linux's `uapi/linux/fuse.h`, protocol 7.38.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use backend_daemon::testing::{Buffer, Daemon, Driver, Options, Request};

pub(crate) const ROOT: u64 = 1;
/// The request queue; 0 is the one for urgent requests.
pub(crate) const REQUESTS: u16 = 1;

/// `opcode` of `struct fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Releasedir = 29,
    Create = 35,
    Fallocate = 43,
    Readdirplus = 44,
    Lseek = 46,
}

/// A request's header and arguments, before it is sent.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) node: u64,
    pub(crate) user: u32,
    pub(crate) arguments: Vec<u8>,
    pub(crate) data: Vec<u8>,
    /// How much room there is for the answer, without its header.
    pub(crate) room_bytes: u32,
}

impl Call {
    pub(crate) fn new(op: Op, node: u64) -> Self {
        Self { op, node, user: 0, arguments: Vec::new(), data: Vec::new(), room_bytes: 4096 }
    }

    pub(crate) fn word(mut self, word: u32) -> Self {
        self.arguments.extend(word.to_le_bytes());
        self
    }

    pub(crate) fn long(mut self, long: u64) -> Self {
        self.arguments.extend(long.to_le_bytes());
        self
    }

    pub(crate) fn name(mut self, name: &str) -> Self {
        self.arguments.extend(name.as_bytes());
        self.arguments.push(0);
        self
    }

    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    pub(crate) fn room(mut self, room_bytes: u32) -> Self {
        self.room_bytes = room_bytes;
        self
    }

    pub(crate) fn user(mut self, user: u32) -> Self {
        self.user = user;
        self
    }

    /// `struct fuse_in_header`.
    pub(crate) fn header(&self, unique: u64) -> Vec<u8> {
        let len = 40 + self.arguments.len() + self.data.len();
        let mut header = u32::try_from(len).unwrap().to_le_bytes().to_vec();
        header.extend((self.op as u32).to_le_bytes());
        header.extend(unique.to_le_bytes());
        header.extend(self.node.to_le_bytes());
        header.extend(self.user.to_le_bytes());
        header.extend(self.user.to_le_bytes());
        header.extend([0; 8]);
        header
    }
}

/// The error number of an answer, positive.
pub(crate) type Errno = i32;

/// `struct fuse_entry_out`, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) node: u64,
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) mode: u32,
}

impl Entry {
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let attributes = &bytes[40..];
        Self {
            node: long(bytes, 0),
            inode: long(attributes, 0),
            size: long(attributes, 8),
            mode: word(attributes, 60),
        }
    }

    pub(crate) fn is_symlink(self) -> bool {
        self.mode & 0o170_000 == 0o120_000
    }
}

pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A guest that has the share mounted.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    unique: u64,
}

/// A request without an answer yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    queue: u16,
    request: Request,
    unique: u64,
    op: Op,
}

/// Starts `nacre-fs` on `share`.
pub(crate) fn serve(share: &Path, more: &[&str]) -> Daemon {
    let mut args: Vec<&OsStr> = vec!["--tag".as_ref(), "share".as_ref(), "--shared-dir".as_ref()];
    args.push(share.as_os_str());
    args.extend(more.iter().map(AsRef::<OsStr>::as_ref));
    Daemon::start(env!("CARGO_BIN_EXE_nacre-fs"), &args)
}

impl Guest {
    /// Connects to the daemon and mounts the share.
    pub(crate) fn mount(daemon: &Daemon, queues: u16) -> Self {
        Self::mount_with(daemon, &Options { queues, ..Options::default() })
    }

    pub(crate) fn mount_with(daemon: &Daemon, options: &Options) -> Self {
        let driver = Driver::connect(&daemon.socket(), options);
        let mut guest = Self { driver, unique: 0 };
        guest.init();
        guest
    }

    pub(crate) fn init(&mut self) {
        // DO_READDIRPLUS, READDIRPLUS_AUTO, SUBMOUNTS
        let init =
            Call::new(Op::Init, 0).word(7).word(38).word(1 << 17).word(1 << 13 | 1 << 14 | 1 << 27);
        let answer = self.call(&init.data(&[0; 48])).unwrap();
        assert_eq!(word(&answer, 0), 7);
    }

    /// Sends a request on the first request queue and waits for its answer.
    pub(crate) fn call(&mut self, call: &Call) -> Result<Vec<u8>, Errno> {
        self.call_on(REQUESTS, call)
    }

    pub(crate) fn call_on(&mut self, queue: u16, call: &Call) -> Result<Vec<u8>, Errno> {
        let sent = self.send(queue, call);
        self.answer(sent)
    }

    /// Sends a request without waiting.
    pub(crate) fn send(&mut self, queue: u16, call: &Call) -> Sent {
        self.unique += 2;
        let header = call.header(self.unique);
        let mut buffers = vec![Buffer::Out(&header)];
        buffers.extend([&call.arguments, &call.data].map(|part| Buffer::Out(part)));
        buffers.retain(|buffer| !matches!(buffer, Buffer::Out([])));
        if !matches!(call.op, Op::Forget) {
            buffers.extend([Buffer::In(16), Buffer::In(call.room_bytes)]);
        }
        let request = self.driver.submit(queue, &buffers);
        Sent { queue, request, unique: self.unique, op: call.op }
    }

    /// Waits until a request that has no answer is taken.
    pub(crate) fn taken(&mut self, sent: Sent) {
        assert_eq!(self.driver.wait(sent.queue, sent.request).written_bytes, 0);
    }

    /// Waits for the answer to a request.
    pub(crate) fn answer(&mut self, sent: Sent) -> Result<Vec<u8>, Errno> {
        let Sent { queue, request, unique, op } = sent;
        let answer = self.driver.wait(queue, request);
        assert!(answer.written_bytes >= 16, "{op:?} has no answer");
        assert_eq!(word(&answer.bytes, 0), answer.written_bytes);
        assert_eq!(long(&answer.bytes, 8), unique);
        match i32::from_le_bytes(answer.bytes[4..8].try_into().unwrap()) {
            0 => Ok(answer.bytes[16..answer.written_bytes as usize].to_vec()),
            error => Err(-error),
        }
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, Errno> {
        let answer = self.call(&Call::new(Op::Lookup, parent).name(name))?;
        Ok(Entry::parse(&answer))
    }

    /// The node and the handle of a new file.
    pub(crate) fn create(
        &mut self,
        parent: u64,
        name: &str,
        user: u32,
    ) -> Result<(u64, u64), Errno> {
        let flags = 0o2; // O_RDWR
        let create = Call::new(Op::Create, parent).word(flags).word(0o100_644).word(0).word(0);
        let answer = self.call(&create.name(name).user(user))?;
        Ok((Entry::parse(&answer).node, long(&answer, 128)))
    }

    pub(crate) fn open(&mut self, node: u64, flags: u32) -> Result<u64, Errno> {
        let answer = self.call(&Call::new(Op::Open, node).word(flags).word(0))?;
        Ok(long(&answer, 0))
    }

    pub(crate) fn write(
        &mut self,
        node: u64,
        handle: u64,
        at: u64,
        data: &[u8],
    ) -> Result<u32, Errno> {
        self.write_flagged(node, handle, (at, 0), data)
    }

    pub(crate) fn write_flagged(
        &mut self,
        node: u64,
        handle: u64,
        (at, write_flags): (u64, u32),
        data: &[u8],
    ) -> Result<u32, Errno> {
        let len = u32::try_from(data.len()).unwrap();
        let write = Call::new(Op::Write, node).long(handle).long(at).word(len).word(write_flags);
        let answer = self.call(&write.long(0).long(0).data(data))?;
        Ok(word(&answer, 0))
    }

    pub(crate) fn read(
        &mut self,
        node: u64,
        handle: u64,
        at: u64,
        len: u32,
    ) -> Result<Vec<u8>, Errno> {
        let read = Call::new(Op::Read, node).long(handle).long(at).word(len).word(0);
        self.call(&read.long(0).long(0).room(len))
    }

    pub(crate) fn attributes(&mut self, node: u64) -> Result<Entry, Errno> {
        let answer = self.call(&Call::new(Op::Getattr, node).long(0).long(0))?;
        // `struct fuse_attr_out` has the attributes behind 16 bytes, an entry behind 40.
        let mut entry = vec![0; 24];
        entry.extend(answer);
        Ok(Entry { node, ..Entry::parse(&entry) })
    }

    pub(crate) fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Result<(), Errno> {
        let rename = Call::new(Op::Rename, from.0).long(to.0).name(from.1).name(to.1);
        self.call(&rename).map(drop)
    }

    pub(crate) fn unlink(&mut self, parent: u64, name: &str) -> Result<(), Errno> {
        self.call(&Call::new(Op::Unlink, parent).name(name)).map(drop)
    }

    /// The names in a folder, sorted, each with its size.
    pub(crate) fn list(&mut self, node: u64) -> Vec<(String, u64)> {
        let opened = self.call(&Call::new(Op::Opendir, node).word(0).word(0)).unwrap();
        let handle = long(&opened, 0);
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let read = Call::new(Op::Readdirplus, node).long(handle).long(offset).word(4096);
            let answer = self.call(&read.word(0).long(0).long(0).room(4096)).unwrap();
            if answer.is_empty() {
                break;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let entry = Entry::parse(rest);
                let name_len = word(rest, 144) as usize;
                offset = long(rest, 136);
                let name = String::from_utf8(rest[152..152 + name_len].to_vec()).unwrap();
                names.push((name, entry.size));
                rest = &rest[(152 + name_len).next_multiple_of(8)..];
            }
        }
        names.retain(|(name, _)| name != "." && name != "..");
        names.sort();
        names
    }
}

/// Whether the sandbox can be entered here; says on standard error if not.
pub(crate) fn can_sandbox() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let may = u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << CAP_SYS_ADMIN != 0;
    if !may {
        eprintln!("SKIPPED: the sandbox of nacre-fs needs CAP_SYS_ADMIN");
    }
    may
}
