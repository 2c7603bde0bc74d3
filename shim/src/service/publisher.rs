//! Tells containerd of events, each once and in the order in which they were pushed.
//!
//! One task sends the first event of the queue until containerd has taken it, over a connection that
//! it makes again when it breaks, as when containerd is restarted. Nothing overtakes. Events of a
//! shim that nobody listens to are not kept for ever: the oldest go when the queue is full.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::EventsClient,
    ttrpc::{
        self, Code,
        asynchronous::{Client, transport::Socket},
        context,
    },
};
use tokio::{
    net::UnixStream,
    sync::watch,
    time::{sleep, timeout},
};

use super::events::Event;

/// How many events wait at most.
const DEPTH: usize = 8192;
/// How long containerd may take for one.
const FORWARD: Duration = Duration::from_secs(5);
/// The pause after the first failure, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The end at which events are pushed.
#[derive(Clone, Debug)]
pub(super) struct Publisher {
    namespace: String,
    queue: Arc<Queue>,
}

#[derive(Debug)]
struct Queue {
    // Shared: whoever changes a state pushes, one task sends. Never held while waiting.
    waiting: Mutex<VecDeque<Envelope>>,
    /// How many there are.
    count: watch::Sender<usize>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Publisher {
    /// Begins to send to the socket `address` (a path, or `unix://` and a path).
    pub(super) fn start(namespace: &str, address: &str) -> Self {
        let (count, _) = watch::channel(0);
        let queue = Arc::new(Queue { waiting: Mutex::new(VecDeque::new()), count });
        let path = address.strip_prefix("unix://").unwrap_or(address).to_owned();
        if path.is_empty() {
            log::warn!("containerd gave no address for events: nobody will be told of any");
        } else {
            tokio::spawn(send_all(Arc::clone(&queue), path));
        }
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Puts an event at the end of the queue. Does not wait.
    pub(super) fn push(&self, event: &Event) {
        let envelope = event.envelope(&self.namespace);
        log::debug!("event {} {:?}", envelope.topic, event);
        let mut waiting = self.queue.lock();
        if waiting.len() == DEPTH
            && let Some(lost) = waiting.pop_front()
        {
            log::warn!("event {} is lost: containerd takes none", lost.topic);
        }
        waiting.push_back(envelope);
        self.queue.count.send_replace(waiting.len());
    }

    /// Waits until all events are taken, or for `limit`.
    pub(super) async fn flush(&self, limit: Duration) {
        let mut count = self.queue.count.subscribe();
        let emptied = timeout(limit, count.wait_for(|count| *count == 0)).await;
        if emptied.is_err() {
            log::warn!("{} events were not taken by containerd", self.queue.lock().len());
        }
    }
}

async fn send_all(queue: Arc<Queue>, path: String) {
    let mut count = queue.count.subscribe();
    let mut client = None;
    let mut pause = FIRST_PAUSE;
    loop {
        if count.wait_for(|count| *count > 0).await.is_err() {
            return;
        }
        let Some(first) = queue.lock().front().cloned() else { continue };
        match forward(&mut client, &path, &first).await {
            Ok(()) => {
                pause = FIRST_PAUSE;
                let mut waiting = queue.lock();
                // A full queue may have lost it meanwhile.
                if waiting.front() == Some(&first) {
                    waiting.pop_front();
                }
                queue.count.send_replace(waiting.len());
            }
            Err(error) => {
                log::debug!("event {} is not taken yet: {error}", first.topic);
                client = None;
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    path: &str,
    envelope: &Envelope,
) -> Result<(), ttrpc::Error> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => {
            let connection = UnixStream::connect(path).await;
            let connection = connection.map_err(|error| ttrpc::Error::Socket(error.to_string()))?;
            EventsClient::new(Client::new(Socket::from(connection)))
        }
    };
    let mut request = ForwardRequest::new();
    request.set_envelope(envelope.clone());
    let limit = i64::try_from(FORWARD.as_nanos()).unwrap_or(i64::MAX);
    match connected.forward(context::with_timeout(limit), &request).await {
        Ok(_) => {}
        Err(ttrpc::Error::RpcStatus(status))
            if !matches!(
                status.code(),
                Code::DEADLINE_EXCEEDED | Code::UNAVAILABLE | Code::CANCELLED
            ) =>
        {
            // It would refuse it again.
            log::warn!("containerd refuses event {}: {}", envelope.topic, status.message);
        }
        Err(error) => return Err(error),
    }
    *client = Some(connected);
    Ok(())
}
