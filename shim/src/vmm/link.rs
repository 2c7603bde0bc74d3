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

use nacre_proto::vmm::{self, Command, Event, Outcome, Reply, Request, Status, Told};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{log_file, packets::Packets, vmm::VmmError};

/// That a device was lost, the last time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loss {
    /// The number of the datagram that told it; 0: it never was.
    pub(crate) number: u64,
    /// What the VMM says about it, fit for a log.
    pub(crate) reason: String,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The number of its datagram.
    pub(crate) number: u64,
    /// What came of the request.
    pub(crate) outcome: Outcome,
}

/// A way to ask the VMM, to be copied freely.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    losses: HashMap<String, watch::Receiver<Loss>>,
}

#[derive(Debug)]
struct Shared {
    socket: Packets,
    next_id: AtomicU64,
    /// Whoever asks waits here for whoever listens; `None` once the VMM has hung up.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

/// What listens to the VMM: to be polled as long as there is one.
#[derive(Debug)]
pub(crate) struct Listener {
    shared: Arc<Shared>,
    losses: HashMap<String, watch::Sender<Loss>>,
    number: u64,
    has_complained: bool,
}

/// A connection and its listener, for a VMM with these devices; the VMM's end.
pub(crate) fn pair(devices: &[&str]) -> io::Result<(Link, Listener, OwnedFd)> {
    let (socket, theirs) = Packets::pair()?;
    let shared = Arc::new(Shared {
        socket,
        next_id: AtomicU64::new(1),
        waiting: Mutex::new(Some(HashMap::new())),
    });
    let channels = devices.iter().map(|id| ((*id).to_owned(), watch::channel(Loss::default())));
    let (senders, receivers) =
        channels.map(|(id, (sender, receiver))| ((id.clone(), sender), (id, receiver))).unzip();
    let listener =
        Listener { shared: Arc::clone(&shared), losses: senders, number: 0, has_complained: false };
    Ok((Link { shared, losses: receivers }, listener, theirs))
}

impl Link {
    /// When `device` was lost; the channel closes when the VMM hangs up. It is closed from the
    /// beginning if there is no such device.
    pub(crate) fn losses(&self, device: &str) -> watch::Receiver<Loss> {
        let known = self.losses.get(device).cloned();
        known.unwrap_or_else(|| watch::channel(Loss::default()).1)
    }

    /// Asks, with a descriptor beside the request if `command` needs one.
    ///
    /// # Errors
    ///
    /// Fails if the VMM hangs up or does not answer within `limit`.
    pub(crate) async fn ask(
        &self,
        command: Command,
        beside: Option<BorrowedFd<'_>>,
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

    /// How the VM is, if the VMM tells within `limit`.
    ///
    /// # Errors
    ///
    /// Fails if it does not.
    pub(crate) async fn status(&self, limit: Duration) -> Result<Status, VmmError> {
        match self.ask(Command::Status, None, limit).await?.outcome {
            Outcome::Status(status) => Ok(status),
            Outcome::Refused(why) => Err(VmmError::Refused(log_file::printable(&why))),
            Outcome::Done | Outcome::Added { .. } => Err(VmmError::Refused("no status".to_owned())),
        }
    }
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
        self.number += 1;
        let number = self.number;
        match vmm::decode(datagram) {
            Ok(Told::Reply(Reply { id, outcome })) => {
                // Nobody waits any more, or nobody ever asked: either way it changes nothing.
                if let Some(waiting) = self.shared.take(id)
                    && let Err(answer) = waiting.send(Answer { number, outcome })
                {
                    log::debug!("nobody waits for {answer:?}");
                }
            }
            Ok(Told::Event(Event::DeviceLost { device, reason })) => {
                if let Some(losses) = self.losses.get(&device) {
                    let reason = log_file::printable(&reason);
                    log::debug!("nacre-vmm lost `{device}`: {reason}");
                    losses.send_replace(Loss { number, reason });
                }
            }
            Ok(Told::Event(other)) => log::debug!("nacre-vmm tells: {other:?}"),
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    async fn heard(vmm: &Packets) -> Request {
        let mut buffer = vec![0; vmm::MAX_BYTES];
        let received = vmm.receive(&mut buffer).await.unwrap();
        vmm::decode(&buffer[..received.len_bytes]).unwrap()
    }

    async fn tell(vmm: &Packets, told: &Told) {
        vmm.send(&vmm::encode(told).unwrap(), None).await.unwrap();
    }

    #[tokio::test]
    async fn answers_reach_who_asked_in_any_order_and_events_who_cares() {
        let (link, listener, theirs) = pair(&["root"]).unwrap();
        let listener = tokio::spawn(listener.listen());
        let vmm = Packets::new(theirs).unwrap();
        let mut losses = link.losses("root");
        assert!(link.losses("other").changed().await.is_err());
        let answering = async {
            let mut requests = [heard(&vmm).await, heard(&vmm).await];
            requests.sort_by_key(|request| request.command == Command::Stop);
            let [first, second] = requests.map(|request| request.id);
            vmm.send(b"nonsense", None).await.unwrap();
            let (device, reason) = ("root".to_owned(), "hung\nup".to_owned());
            tell(&vmm, &Told::Event(Event::DeviceLost { device, reason })).await;
            let outcome = Outcome::Refused("no".to_owned());
            tell(&vmm, &Told::Reply(Reply { id: second, outcome })).await;
            tell(&vmm, &Told::Reply(Reply { id: 999, outcome: Outcome::Done })).await;
            tell(&vmm, &Told::Reply(Reply { id: first, outcome: Outcome::Done })).await;
        };
        let (first, second, ()) = tokio::join!(
            link.ask(Command::PowerButton, None, LIMIT),
            link.ask(Command::Stop, None, LIMIT),
            answering,
        );
        assert_eq!(first.unwrap().outcome, Outcome::Done);
        let second = second.unwrap();
        assert_eq!(second.outcome, Outcome::Refused("no".to_owned()));
        let loss = losses.borrow_and_update().clone();
        assert_eq!((loss.number, loss.reason.as_str()), (2, "hung up"));
        assert_eq!(second.number, 3);
        drop(vmm);
        listener.await.unwrap();
        assert!(losses.changed().await.is_err());
        assert!(link.ask(Command::Stop, None, LIMIT).await.is_err());
    }

    #[tokio::test]
    async fn a_mute_vmm_holds_nobody_up_for_longer_than_asked() {
        let (link, listener, _theirs) = pair(&[]).unwrap();
        let _listening = tokio::spawn(listener.listen());
        let mute = link.ask(Command::Status, None, Duration::from_millis(20)).await;
        assert!(
            matches!(mute, Err(VmmError::Control(error)) if error.kind() == io::ErrorKind::TimedOut)
        );
    }
}
