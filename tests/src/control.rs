//! The VMM's control socket, as its supervisor has it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::vmm::{
    self, Command, Event, NewDevice, NewDeviceKind, Outcome, Request, Resource, Status, Told,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::process::PATIENCE;

/// The supervisor's end.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    next: u64,
    events: Vec<Event>,
}

impl Control {
    /// A new one, and the VMM's end of it.
    ///
    /// # Errors
    ///
    /// Fails if the kernel has no socket left.
    pub fn new() -> Result<(Self, OwnedFd)> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (socket, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
        Ok((Self { socket, next: 1, events: Vec::new() }, theirs))
    }

    /// Has a new backend, at the other end of `socket`, take the place of the device's last one.
    ///
    /// # Errors
    ///
    /// Fails with the VMM's reason if it refuses.
    pub fn reconnect(&mut self, device: &str, socket: &OwnedFd) -> Result<()> {
        let command = Command::Reconnect { device: device.to_owned() };
        match self.ask(command, Some(socket))? {
            Outcome::Done => Ok(()),
            Outcome::Refused(reason) => bail!("{reason}"),
            other => bail!("not what was asked for: {other:?}"),
        }
    }

    /// How the VM is.
    ///
    /// # Errors
    ///
    /// Fails if it does not say.
    pub fn status(&mut self) -> Result<Status> {
        match self.ask(Command::Status, None)? {
            Outcome::Status(status) => Ok(status),
            other => bail!("no status: {other:?}"),
        }
    }

    /// Sends a command and waits for what comes of it; events that come before are kept.
    ///
    /// # Errors
    ///
    /// Fails if the VMM hangs up, or does not answer.
    pub fn ask(&mut self, command: Command, beside: Option<&OwnedFd>) -> Result<Outcome> {
        let beside: Vec<_> = beside.iter().map(|fd| fd.as_fd()).collect();
        self.ask_with(command, &beside)
    }

    /// Sends a command with any number of descriptors, as [`Control::ask`] does with one.
    ///
    /// # Errors
    ///
    /// Fails if the VMM hangs up, or does not answer.
    pub fn ask_with(&mut self, command: Command, beside: &[BorrowedFd<'_>]) -> Result<Outcome> {
        let id = self.next;
        self.next += 1;
        let datagram = vmm::encode(&Request { id, command })?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !beside.is_empty() {
            rights.push(SendAncillaryMessage::ScmRights(beside));
        }
        sendmsg(&self.socket, &[IoSlice::new(&datagram)], &mut rights, SendFlags::NOSIGNAL)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.hear(deadline)?.context("no answer of the VMM")? {
                Told::Event(event) => self.events.push(event),
                Told::Reply(reply) => {
                    ensure!(reply.id == id, "an answer to {} instead of {id}", reply.id);
                    return Ok(reply.outcome);
                }
            }
        }
    }

    /// Why the VMM says that it lost the device's backend, once it does.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn lost(&mut self, device: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let of = |event: &Event| matches!(event, Event::DeviceLost { device: lost, .. } if lost == device);
            if let Some(at) = self.events.iter().position(of)
                && let Event::DeviceLost { reason, .. } = self.events.remove(at)
            {
                return Ok(reason);
            }
            match self.hear(deadline)?.with_context(|| format!("{device} is not lost"))? {
                Told::Event(event) => self.events.push(event),
                Told::Reply(reply) => bail!("an answer to nothing: {reply:?}"),
            }
        }
    }

    /// What `find` makes of the first event that it knows, once there is one.
    ///
    /// # Errors
    ///
    /// Fails if there is none in time.
    pub fn event<T>(&mut self, find: impl Fn(&Event) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.events.iter().enumerate();
            if let Some((at, found)) =
                found.filter_map(|(at, event)| Some((at, find(event)?))).next()
            {
                self.events.remove(at);
                return Ok(found);
            }
            let heard = self.hear(deadline)?;
            match heard.with_context(|| format!("not told; only {:?}", self.events))? {
                Told::Event(event) => self.events.push(event),
                Told::Reply(reply) => bail!("an answer to nothing: {reply:?}"),
            }
        }
    }

    /// Asks for so much RAM.
    ///
    /// # Errors
    ///
    /// Fails with the VMM's reason if it refuses.
    pub fn set_memory(&mut self, bytes: u64) -> Result<()> {
        match self.ask(Command::SetMemory { bytes }, None)? {
            Outcome::Done => Ok(()),
            Outcome::Refused(reason) => bail!("{reason}"),
            other => bail!("not what was asked for: {other:?}"),
        }
    }

    /// How much RAM there is, once the guest has ejected some.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn memory_changed(&mut self) -> Result<u64> {
        self.event(|event| match event {
            Event::MemoryChanged { bytes } => Some(*bytes),
            _ => None,
        })
    }

    /// Why the guest can't use RAM or won't give it up, once it says so.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn memory_declined(&mut self) -> Result<String> {
        self.event(|event| match event {
            Event::Declined { what: Resource::Memory, reason } => Some(reason.clone()),
            _ => None,
        })
    }

    /// Asks for so many vCPUs.
    ///
    /// # Errors
    ///
    /// Fails with the VMM's reason if it refuses.
    pub fn set_cpus(&mut self, cpus: u32) -> Result<()> {
        match self.ask(Command::SetCpus { cpus }, None)? {
            Outcome::Done => Ok(()),
            Outcome::Refused(reason) => bail!("{reason}"),
            other => bail!("not what was asked for: {other:?}"),
        }
    }

    /// Waits until the guest has ejected vCPUs and there are so many.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn cpus_become(&mut self, wanted: u32) -> Result<()> {
        self.event(|event| {
            matches!(event, Event::CpusChanged { cpus } if *cpus == wanted).then_some(())
        })
    }

    /// Why the guest can't use vCPUs or won't give them up, once it says so.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn cpus_declined(&mut self) -> Result<String> {
        self.event(|event| match event {
            Event::Declined { what: Resource::Cpus, reason } => Some(reason.clone()),
            _ => None,
        })
    }

    /// Adds a virtio device whose backend is at the other end of `socket`; gives its address.
    ///
    /// # Errors
    ///
    /// Fails with the VMM's reason if it refuses.
    pub fn add(&mut self, id: &str, device_type: u16, socket: &OwnedFd) -> Result<String> {
        let kind =
            NewDeviceKind::Virtio { device_type, queues: None, queue_size: None, config: None };
        let device = NewDevice { id: id.to_owned(), kind };
        match self.ask(Command::AddDevice { device }, Some(socket))? {
            Outcome::Added { address } => Ok(address),
            Outcome::Refused(reason) => bail!("{reason}"),
            other => bail!("not what was asked for: {other:?}"),
        }
    }

    /// Has the guest asked for a device.
    ///
    /// # Errors
    ///
    /// Fails with the VMM's reason if it refuses.
    pub fn remove(&mut self, id: &str) -> Result<()> {
        match self.ask(Command::RemoveDevice { device: id.to_owned() }, None)? {
            Outcome::Done => Ok(()),
            Outcome::Refused(reason) => bail!("{reason}"),
            other => bail!("not what was asked for: {other:?}"),
        }
    }

    /// Waits until the device is gone.
    ///
    /// # Errors
    ///
    /// Fails if it does not go.
    pub fn removed(&mut self, id: &str) -> Result<()> {
        self.event(|event| match event {
            Event::DeviceRemoved { device } if device == id => Some(()),
            _ => None,
        })
    }

    /// Why the guest keeps the device, once it says so.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub fn kept(&mut self, id: &str) -> Result<String> {
        self.event(|event| match event {
            Event::DeviceKept { device, reason } if device == id => Some(reason.clone()),
            _ => None,
        })
    }

    /// The next thing that the VMM tells, or none by the deadline.
    fn hear(&self, deadline: Instant) -> Result<Option<Told>> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let timeout = Timespec::try_from(left)?;
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout))? == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; vmm::MAX_BYTES];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let mut nothing = RecvAncillaryBuffer::default();
        let received = recvmsg(&self.socket, &mut parts, &mut nothing, RecvFlags::empty())?;
        ensure!(received.bytes > 0, "the VMM hung up");
        Ok(Some(vmm::decode(&bytes[..received.bytes])?))
    }
}
