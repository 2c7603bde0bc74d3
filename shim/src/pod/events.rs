//! What the guest tells unasked: that a container is out of memory.

use std::{sync::Weak, time::Duration};

use tokio::time::sleep;

use crate::pod::Shared;

/// The pause after an answer that was none, so that a guest can't keep this program busy.
const PAUSE: Duration = Duration::from_secs(1);
/// The least time between two events that are looked at.
const BETWEEN: Duration = Duration::from_millis(20);

/// Passes on what the guest tells, as long as there is the pod.
pub(super) async fn listen(pod: Weak<Shared>) {
    let mut after = 0;
    loop {
        // No handle is held while the guest has nothing to tell.
        let asked = pod.upgrade().map(|pod| (pod.ways.agent.clone(), pod.death.clone()));
        let Some((agent, death)) = asked else { return };
        let told = tokio::select! {
            told = agent.next_event(after) => told,
            () = super::ended(death) => return,
        };
        match told {
            Ok((number, container)) => {
                after = number;
                if let (Some(container), Some(pod)) = (container, pod.upgrade()) {
                    pod.is_out_of_memory(container);
                }
                sleep(BETWEEN).await;
            }
            Err(error) if error.is_refusal() => {
                return log::warn!("the guest tells of no events: {error}");
            }
            Err(error) => {
                log::debug!("{error}");
                sleep(PAUSE).await;
            }
        }
    }
}
