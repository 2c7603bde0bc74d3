//! A device whose process is replaced when it was killed: what the shim does for it, in small.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail};
use nacre_proto::store::{self, FromStore, ToStore};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::artifacts;
use crate::process::{Process, Signal};
use crate::sys;

/// More than any device asks for; what is not touched costs nothing.
const STATE_BYTES: u64 = 512 << 20;

type Held = BTreeMap<u64, OwnedFd>;

/// A device and what outlives its processes.
#[derive(Debug)]
pub struct Supervised {
    program: PathBuf,
    arguments: Vec<String>,
    /// With the flags that name them.
    resources: Vec<(String, OwnedFd)>,
    state: OwnedFd,
    held: Held,
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    process: Process,
    /// Takes in what the process leaves, until it is gone.
    keeper: JoinHandle<Result<Held>>,
}

impl Supervised {
    /// A device that `program` serves. Nothing is started yet.
    ///
    /// # Errors
    ///
    /// Fails if the program is not built or there is no memory for its state.
    pub fn new(program: &str, arguments: &[&str]) -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let state = File::from(memfd_create("state", flags)?);
        state.set_len(STATE_BYTES)?;
        fcntl_add_seals(&state, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self {
            program: artifacts::program(program)?,
            arguments: arguments.iter().map(|argument| (*argument).to_owned()).collect(),
            resources: Vec::new(),
            state: state.into(),
            held: Held::new(),
            current: None,
        })
    }

    /// Hands a descriptor in to each process, by this flag.
    #[must_use]
    pub fn with(mut self, flag: &str, resource: OwnedFd) -> Self {
        self.resources.push((flag.to_owned(), resource));
        self
    }

    /// Starts a process, and waits until it says that it is ready. Gives the VMM's end of its
    /// socket.
    ///
    /// # Errors
    ///
    /// Fails if it ends instead, with what it said.
    pub fn start(&mut self) -> Result<OwnedFd> {
        let (ours, socket) = pair(SocketType::STREAM)?;
        let (counter, store) = pair(SocketType::SEQPACKET)?;
        let (mut ready, ready_in_child) = io::pipe()?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        let mut inherited = Vec::new();
        for (flag, resource) in &self.resources {
            inherited.push((flag.as_str(), resource.try_clone()?));
        }
        inherited.push(("--fd", socket));
        inherited.push(("--state-fd", self.state.try_clone()?));
        inherited.push(("--store-fd", store));
        inherited.push(("--ready-fd", ready_in_child.into()));
        for (flag, fd) in &inherited {
            command.arg(flag).arg(fd.as_raw_fd().to_string());
        }
        sys::hand_in(&mut command, inherited.into_iter().map(|(_flag, fd)| fd).collect());
        let process = Process::start(&self.program, &mut command)?;
        // The child's ends are closed here, so that their end is seen.
        drop(command);
        let held = std::mem::take(&mut self.held);
        let keeper = thread::spawn(move || keep(&counter, held));
        let mut word = String::new();
        ready.read_to_string(&mut word)?;
        if word == "ready\n" {
            self.current = Some(Current { process, keeper });
            return Ok(ours);
        }
        let (status, said) = process.wait()?;
        bail!("{} ended with {status}: {}", self.program.display(), said.trim_end())
    }

    /// Ends the process at once, waits until it is gone, and takes in what it left.
    ///
    /// # Errors
    ///
    /// Fails if none runs, or if it broke the store's protocol.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        let running = self.current.as_ref().context("no process runs")?;
        running.process.signal(Signal::KILL)?;
        self.reap()
    }

    /// Waits until the process has ended by itself, and takes in what it left.
    ///
    /// # Errors
    ///
    /// Fails if none runs, or if it broke the store's protocol.
    pub fn reap(&mut self) -> Result<ExitStatus> {
        let Current { mut process, keeper } = self.current.take().context("no process runs")?;
        let status = process.child().wait()?;
        self.held = keeper.join().map_err(|_panic| anyhow!("the keeper panicked"))??;
        Ok(status)
    }

    /// The process that runs.
    ///
    /// # Errors
    ///
    /// Fails if none does.
    pub fn process(&mut self) -> Result<&mut Process> {
        Ok(&mut self.current.as_mut().context("no process runs")?.process)
    }

    /// Has another program, or the same with other arguments, serve the device from now on.
    ///
    /// # Errors
    ///
    /// Fails if it is not built.
    pub fn becomes(&mut self, program: &str, arguments: &[&str]) -> Result<()> {
        self.program = artifacts::program(program)?;
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Ok(())
    }
}

fn pair(kind: SocketType) -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?)
}

/// Gives a process what is held, and then takes what it leaves, until it is gone.
fn keep(counter: &OwnedFd, mut held: Held) -> Result<Held> {
    for (key, fd) in &held {
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        rights.push(SendAncillaryMessage::ScmRights(&fds));
        let datagram = FromStore::Held { key: *key }.encode();
        if sendmsg(counter, &[IoSlice::new(&datagram)], &mut rights, SendFlags::NOSIGNAL).is_err() {
            // It was killed before it took everything.
            return Ok(held);
        }
    }
    let end = FromStore::End.encode();
    let mut nothing = SendAncillaryBuffer::default();
    if sendmsg(counter, &[IoSlice::new(&end)], &mut nothing, SendFlags::NOSIGNAL).is_err() {
        return Ok(held);
    }
    loop {
        let mut bytes = [0; store::BYTES + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(counter, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC);
        // A connection that is reset is at its end, too.
        let len = received.map_or(0, |received| received.bytes);
        let fd = rights.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        if len == 0 {
            return Ok(held);
        }
        match (ToStore::decode(&bytes[..len])?, fd) {
            (ToStore::Put { key }, Some(fd)) => drop(held.insert(key, fd)),
            (ToStore::Remove { key }, None) => drop(held.remove(&key)),
            (message, fd) => bail!("{message:?} with {fd:?} beside it"),
        }
    }
}
