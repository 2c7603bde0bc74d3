//! The connection to the VMM's control socket: any number of requests at once, each answered by
//! its id, and what the VMM tells unasked.
//!
//! Everything that comes is numbered, because a device may be lost again while the answer about
//! its new backend is on the way: which came first decides what is true now.

use std::{
    collections::HashMap,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nacre_proto::{
    pci::PciAddress,
    vmm::{self, Command, NewDevice, Outcome, Reply, Request, Status, Told},
};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    log_file,
    packets::Packets,
    vmm::{
        VmmError,
        news::{DeviceNews, News, ResourceNews},
    },
};

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The number of its datagram.
    pub(crate) number: u64,
    /// What came of the request.
    pub(crate) outcome: Outcome,
}

/// What the guest makes of being asked to let go of something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// It is gone.
    Gone,
    /// The guest does not let go, and why.
    Kept(String),
    /// The guest has not said anything in time.
    Silent,
}

/// A way to ask the VMM, to be copied freely.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: Packets,
    next_id: AtomicU64,
    /// The number of the last datagram that came.
    heard: AtomicU64,
    /// Whoever asks waits here for whoever listens; `None` once the VMM has hung up.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    news: News,
}

/// What listens to the VMM: to be polled as long as there is one.
#[derive(Debug)]
pub(crate) struct Listener {
    shared: Arc<Shared>,
    has_complained: bool,
}

/// A connection and its listener, for a VMM with these devices; the VMM's end.
pub(crate) fn pair(devices: &[&str]) -> io::Result<(Link, Listener, OwnedFd)> {
    let (socket, theirs) = Packets::pair()?;
    let shared = Arc::new(Shared {
        socket,
        next_id: AtomicU64::new(1),
        heard: AtomicU64::new(0),
        waiting: Mutex::new(Some(HashMap::new())),
        news: News::of(devices),
    });
    let listener = Listener { shared: Arc::clone(&shared), has_complained: false };
    Ok((Link { shared }, listener, theirs))
}

impl Link {
    /// What the VMM tells of `device`; the channel closes when the VMM hangs up or has the device
    /// no more. It is closed from the beginning if there is no such device.
    pub(crate) fn news(&self, device: &str) -> watch::Receiver<DeviceNews> {
        self.shared.news.of_device(device)
    }

    /// What the VMM tells of processors.
    pub(crate) fn cpus(&self) -> watch::Receiver<ResourceNews> {
        self.shared.news.cpus.subscribe()
    }

    /// What the VMM tells of memory.
    pub(crate) fn memory(&self) -> watch::Receiver<ResourceNews> {
        self.shared.news.memory.subscribe()
    }

    /// The number of the last datagram that came.
    pub(crate) fn heard(&self) -> u64 {
        self.shared.heard.load(Ordering::Relaxed)
    }

    /// Asks, with the descriptors beside the request that `command` needs.
    ///
    /// # Errors
    ///
    /// Fails if the VMM hangs up or does not answer within `limit`.
    pub(crate) async fn ask(
        &self,
        command: Command,
        beside: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<Answer, VmmError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let request = vmm::encode(&Request { id, command })?;
        let answer = self.shared.expect(id)?;
        let _no_longer = Expected { shared: &self.shared, id };
        let asked = async {
            self.shared.socket.send(&request, beside).await.map_err(VmmError::Control)?;
            answer.await.map_err(|_dropped| hung_up())
        };
        let elapsed = |_elapsed| VmmError::Control(io::ErrorKind::TimedOut.into());
        timeout(limit, asked).await.map_err(elapsed)?
    }

    /// Asks for something that is done or begun, or refused.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`], and if it is refused.
    pub(crate) async fn have_done(
        &self,
        command: Command,
        limit: Duration,
    ) -> Result<(), VmmError> {
        match self.ask(command, &[], limit).await?.outcome {
            Outcome::Done => Ok(()),
            other => Err(not_expected(other)),
        }
    }

    /// How the VM is, if the VMM tells within `limit`.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub(crate) async fn status(&self, limit: Duration) -> Result<Status, VmmError> {
        match self.ask(Command::Status, &[], limit).await?.outcome {
            Outcome::Status(status) => Ok(status),
            other => Err(not_expected(other)),
        }
    }

    /// Adds a device, whose news can be had from then on; answers where the guest finds it.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`], and if it is refused or what comes is no address.
    pub(crate) async fn add_device(
        &self,
        device: NewDevice,
        beside: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<PciAddress, VmmError> {
        let id = device.id.clone();
        // Before it is there: it may be lost in the next moment.
        self.shared.news.add(&id);
        let answer = self.ask(Command::AddDevice { device }, beside, limit).await;
        let address = match answer.map(|answer| answer.outcome) {
            Ok(Outcome::Added { address }) => {
                address.parse().map_err(|error| VmmError::Refused(format!("{error}")))
            }
            Ok(other) => Err(not_expected(other)),
            Err(error) => Err(error),
        };
        if address.is_err() {
            self.shared.news.forget(&id);
        }
        address
    }

    /// Has the guest let go of a device; answers what became of that within `guest_limit`.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`], and if it is refused.
    pub(crate) async fn remove_device(
        &self,
        device: &str,
        limit: Duration,
        guest_limit: Duration,
    ) -> Result<Parting, VmmError> {
        let (mut news, before) = (self.news(device), self.heard());
        self.have_done(Command::RemoveDevice { device: device.to_owned() }, limit).await?;
        let parted = news.wait_for(|news| news.is_removed || news.kept.number > before);
        match timeout(guest_limit, parted).await {
            Err(_elapsed) => Ok(Parting::Silent),
            Ok(Err(_closed)) => Err(hung_up()),
            Ok(Ok(news)) if news.is_removed => Ok(Parting::Gone),
            Ok(Ok(news)) => Ok(Parting::Kept(news.kept.reason.clone())),
        }
    }
}

/// An outcome that was not asked for: most likely a refusal.
fn not_expected(outcome: Outcome) -> VmmError {
    VmmError::Refused(match outcome {
        Outcome::Refused(why) => log_file::printable(&why),
        _ => "not what was asked for".to_owned(),
    })
}

/// Takes back what is expected when nobody waits for it any more.
struct Expected<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.shared.take(self.id);
    }
}

fn hung_up() -> VmmError {
    VmmError::Control(io::ErrorKind::UnexpectedEof.into())
}

impl Shared {
    fn expect(&self, id: u64) -> Result<oneshot::Receiver<Answer>, VmmError> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut().ok_or_else(hung_up)?.insert(id, sender);
        Ok(receiver)
    }

    fn take(&self, id: u64) -> Option<oneshot::Sender<Answer>> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut()?.remove(&id)
    }
}

impl Listener {
    /// Listens until the VMM hangs up. Dropping it counts as that, too.
    pub(crate) async fn listen(mut self) {
        let mut buffer = vec![0; vmm::MAX_BYTES];
        let error = loop {
            match self.shared.socket.receive(&mut buffer).await {
                Ok(received) if received.len_bytes == 0 => return,
                Ok(received) => self.take(&buffer[..received.len_bytes]),
                Err(error) => break error,
            }
        };
        log::debug!("nacre-vmm is no longer heard: {error}");
    }

    fn take(&mut self, datagram: &[u8]) {
        let number = self.shared.heard.fetch_add(1, Ordering::Relaxed) + 1;
        match vmm::decode(datagram) {
            Ok(Told::Reply(Reply { id, outcome })) => {
                // Nobody waits any more, or nobody ever asked: either way it changes nothing.
                if let Some(waiting) = self.shared.take(id)
                    && let Err(answer) = waiting.send(Answer { number, outcome })
                {
                    log::debug!("nobody waits for {answer:?}");
                }
            }
            Ok(Told::Event(event)) => self.shared.news.take(number, event),
            // Once: a VMM that was taken over could say it for ever.
            Err(error) if !self.has_complained => {
                self.has_complained = true;
                log::warn!("nacre-vmm says what can't be understood: {error}");
            }
            Err(_more) => {}
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Whoever waits learns that no answer will come.
        *self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.news.end();
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod tests;
