//! The one owner of a pod's sandbox: a task that keeps it going until it dies or is stopped.
//!
//! ```text
//!   held --(a process that it can't do without ends)--> dead: everything is taken down at once
//!        --(asked to stop)--> the guest writes back and powers off --> everything is taken down
//!        --(nobody has a handle any more)--> everything is taken down at once
//! ```

use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};

use crate::{agent::Agent, error_chain, sandbox::Held};

/// How long a guest that is to stop may take without getting on.
const PATIENCE: Duration = Duration::from_secs(10);

/// The end of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Death {
    /// Why, in a sentence.
    pub reason: String,
    /// Whether it was asked for.
    pub was_stopped: bool,
    /// When it was known.
    pub at: SystemTime,
}

impl Death {
    fn now(reason: String, was_stopped: bool) -> Self {
        Self { reason, was_stopped, at: SystemTime::now() }
    }
}

/// A request to stop; answered when nothing is left.
pub(super) type Stop = oneshot::Sender<()>;

/// See the module.
pub(super) async fn own(
    mut held: Held,
    agent: Agent,
    mut stops: mpsc::Receiver<Stop>,
    death: watch::Sender<Option<Death>>,
) {
    let asked = tokio::select! {
        biased;
        error = held.death() => {
            let reason = error_chain(&error);
            log::error!("the pod died: {reason}");
            if let Some(details) = error.details() {
                log::info!("{details}");
            }
            drop(held);
            death.send_replace(Some(Death::now(reason, false)));
            return;
        }
        asked = stops.recv() => asked,
    };
    match asked {
        None => drop(held),
        Some(answer) => {
            held.stop(&agent, PATIENCE).await;
            death.send_replace(Some(Death::now("it was stopped".to_owned(), true)));
            if answer.send(()).is_err() {
                log::debug!("nobody waits for the pod's end");
            }
        }
    }
}
