//! The end of a guest in order: what the container wrote reaches disks and volumes.
//!
//! The guest may take long for that, as long as it gets on: the agent tells how much is left. A
//! guest that gets on no longer, a signal, or ten times the patience that there is without progress
//! end it; what was not written is lost then, and that is told.

use std::time::{Duration, Instant};

use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::{
    agent::{Agent, AgentError, ProcessId},
    child::End,
    plan::{Contents, SandboxPlan},
    sandbox::{Request, SandboxError, create::VmUp, run::a_signal},
};

/// How often the guest is asked how much is left, and how long it may take to tell.
const ASK_EVERY: Duration = Duration::from_secs(1);
const TELL_WITHIN: Duration = Duration::from_secs(5);
/// How many times the patience without progress the guest may take although it gets on.
const FACTOR: u32 = 10;
/// How long the guest may then take to power off.
const OFF_WITHIN: Duration = Duration::from_secs(10);

/// Lets the guest end in order; if it does not, it is ended anyway. Answers whether everything that
/// can outlive the guest was written.
pub(super) async fn in_order(
    vm: &mut VmUp,
    agent: &Agent,
    process: &ProcessId,
    requests: &mut mpsc::Receiver<Request>,
) -> bool {
    let patience = vm.base.settings.agent_timeout;
    let asked = async {
        if let Err(error) = agent.delete(process).await {
            log::debug!("{error}");
        }
        written_back(agent, patience).await
    };
    // What the guest still writes needs its devices, so their deaths are looked after.
    let reason = tokio::select! {
        biased;
        ended = asked => ended.err().map(|error| error.to_string()),
        death = vm.death() => Some(death.to_string()),
        signal = a_signal(requests) => Some(format!("signal {signal} did not wait for it")),
    };
    let Some(reason) = reason else {
        power_off(vm).await;
        return true;
    };
    if !outlives_guest(&vm.base.plan) {
        log::warn!("the guest is ended without its consent: {reason}");
        return true;
    }
    log::error!(
        "the guest did not write everything back, so what the container wrote to disks and volumes \
         may be lost: {reason}"
    );
    false
}

/// The same for a guest whose containers have ended.
pub(super) async fn of_pod(vm: &mut VmUp, agent: &Agent, patience: Duration) {
    let reason = tokio::select! {
        biased;
        ended = written_back(agent, patience) => ended.err().map(|error| error.to_string()),
        death = vm.death() => Some(death.to_string()),
    };
    match reason {
        None => power_off(vm).await,
        Some(reason) => log::warn!(
            "the guest did not write everything back, so what its containers wrote may be lost: \
             {reason}"
        ),
    }
}

/// Whether the container could write what is there after the guest.
fn outlives_guest(plan: &SandboxPlan) -> bool {
    let Contents::Container(container) = &plan.config.contents else { return true };
    container.writable_rootfs
        || container.disks.iter().any(|disk| !disk.read_only)
        || container.volumes.iter().any(|volume| !volume.read_only)
}

/// Why a guest did not write back what it had.
#[derive(Debug, thiserror::Error)]
enum Unwritten {
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("it did not get on for {} s, with {left_bytes} bytes left", waited.as_secs())]
    Stuck { waited: Duration, left_bytes: u64 },
    #[error("it was not done after {} s", .0.as_secs())]
    Endless(Duration),
}

async fn written_back(agent: &Agent, patience: Duration) -> Result<(), Unwritten> {
    let longest = patience * FACTOR;
    let shutdown = agent.shutdown(longest);
    tokio::pin!(shutdown);
    let begun = Instant::now();
    let (mut least, mut got_on) = (u64::MAX, begun);
    let mut look = std::pin::pin!(sleep(ASK_EVERY));
    loop {
        let left = tokio::select! {
            ended = &mut shutdown => return Ok(ended?),
            left = async {
                look.as_mut().await;
                agent.unwritten(TELL_WITHIN).await
            } => left,
        };
        look.set(sleep(ASK_EVERY));
        match left {
            Ok(left) if left < least => (least, got_on) = (left, Instant::now()),
            Ok(left) => log::debug!("the guest has {left} bytes to write"),
            Err(error) => log::debug!("{error}"),
        }
        let waited = got_on.elapsed();
        if waited >= patience {
            return Err(Unwritten::Stuck { waited, left_bytes: least });
        }
        if begun.elapsed() >= longest {
            return Err(Unwritten::Endless(longest));
        }
    }
}

async fn power_off(vm: &mut VmUp) {
    match timeout(OFF_WITHIN, vm.death()).await {
        Ok(SandboxError::VmmEnded { end: End::Code(0), .. }) => log::debug!("the guest is off"),
        Ok(death) => log::warn!("the guest did not end in order: {death}"),
        Err(_elapsed) => log::debug!("the guest does not power off: it is ended"),
    }
}
