//! containerd's protocols for one pod: the task service, in both of its versions, and the sandbox
//! service, in front of a guest.
//!
//! ```text
//!   containerd --ttrpc--> task_api, sandbox_api      decode, answer codes
//!                              |
//!                          Service                   one request, one task of its own
//!                          |      |        \
//!                       Ledger  Guest     Publisher --ttrpc--> containerd
//!                       states  the pod    events in order
//! ```
//!
//! **Invariant:** the ledger is locked to look and to change, never over a call to the guest.
//! **Invariant:** an event is pushed under the lock under which its state changes, so that events have
//! the order of the states: create < start < exit < delete, and an init's exit is its container's last.
//! **Invariant:** a request that was begun is carried through, whether or not its client is still there:
//! a connection that breaks would otherwise leave a process half-started.

mod bundle;
pub mod command;
mod control;
mod create;
mod delete;
mod error;
mod events;
mod exit;
pub mod guest;
mod ledger;
mod metrics;
mod mounts;
mod phase;
mod pod_host;
mod process;
mod publisher;
mod query;
mod sandbox;
mod sandbox_api;
mod sandbox_config;
mod start;
mod stdio;
mod task_api;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    sandbox_async::create_sandbox, shim_async::create_task, ttrpc::asynchronous::Service as Methods,
};
use tokio::sync::watch;

use guest::Host;
use ledger::Ledger;
pub use pod_host::PodHost;
use process::End;
use publisher::Publisher;

/// How long the rest of the events may take when all is over.
const FLUSH: Duration = Duration::from_secs(2);
/// How long a guest may take to go when all is over: containerd gives a shim three seconds.
const STOP: Duration = Duration::from_millis(2500);

/// What a service is made of.
pub struct Setting {
    /// The sandbox's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Where containerd takes events.
    pub events: String,
    /// What starts the guest.
    pub host: Arc<dyn Host>,
}

/// A handle of the service of one sandbox. See the module.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

struct Shared {
    id: String,
    namespace: String,
    host: Arc<dyn Host>,
    // Shared by the requests of all connections. Never held over an await.
    ledger: Mutex<Ledger>,
    publisher: Publisher,
    sandbox_end: watch::Sender<Option<End>>,
    quit: watch::Sender<bool>,
}

impl Service {
    /// A service without a guest, which sends events from now on.
    #[must_use]
    pub fn new(setting: Setting) -> Self {
        let Setting { id, namespace, events, host } = setting;
        let publisher = Publisher::start(&namespace, &events);
        Self(Arc::new(Shared {
            id,
            namespace,
            host,
            ledger: Mutex::new(Ledger::default()),
            publisher,
            sandbox_end: watch::Sender::new(None),
            quit: watch::Sender::new(false),
        }))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a server is to register: the task service by both of its names, and the sandbox service.
    #[must_use]
    pub fn methods(&self) -> HashMap<String, Methods> {
        let task = || create_task(Arc::new(self.clone()));
        let mut methods = task();
        // Version 2 has the same messages, by another name.
        methods.extend(task().into_values().map(|task| ("containerd.task.v2.Task".into(), task)));
        methods.extend(create_sandbox(Arc::new(self.clone())));
        methods
    }

    /// Resolves when containerd wants no more of this shim.
    pub async fn wanted(&self) {
        let mut quit = self.0.quit.subscribe();
        if quit.wait_for(|quit| *quit).await.is_err() {
            log::debug!("the service is gone");
        }
    }

    /// Ends whatever still runs, and waits until containerd knows.
    pub async fn close(&self) {
        let guest = self.give_up("the shim ends");
        if let Some(guest) = guest
            && tokio::time::timeout(STOP, guest.stop()).await.is_err()
        {
            log::warn!("the guest is not gone in time");
        }
        self.0.publisher.flush(FLUSH).await;
    }

    fn quit(&self) {
        self.0.quit.send_replace(true);
    }

    /// Takes the guest from the ledger; what ran in it has ended.
    fn give_up(&self, why: &str) -> Option<Arc<dyn guest::Guest>> {
        let mut ledger = self.ledger();
        ledger.end_all(End::killed(), &self.0.publisher);
        let guest = ledger.take_guest();
        drop(ledger);
        self.note_end(End::killed());
        if guest.is_some() {
            log::info!("the guest is stopped: {why}");
        }
        guest
    }
}
