//! Ends: of processes, of the guest, and of what hangs on them.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{cgroups_v2::metrics::Metrics, events::task::TaskOOM};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    Service,
    events::Event,
    guest::{Guest, GuestEnd, GuestErrorKind},
    ledger::Sandbox,
    phase::Phase,
    process::End,
};
use crate::{agent::ProcessId, streams::Streams};

/// How long the output of an ended process may take before its end is told all the same.
const DRAINED_BEFORE_EXIT: Duration = Duration::from_secs(2);
/// How long a stream of an ended process may neither move nor end.
const STREAM_PATIENCE: Duration = Duration::from_secs(10);
/// How long the processes of a container whose init has ended may take to end.
const EXECS_END_WITHIN: Duration = Duration::from_secs(5);
/// How long a guest may take for its figures at the end of a container.
const STATS_WITHIN: Duration = Duration::from_secs(2);
/// Until a guest that did not answer is asked again.
const AGAIN: Duration = Duration::from_millis(200);
/// What is told of a process whose end the guest does not know.
const UNKNOWN_END: u8 = 255;

impl Service {
    /// Waits for an init's end, in a task of its own.
    pub(super) fn watch_init(&self, guest: Arc<dyn Guest>, process: ProcessId, streams: Streams) {
        let service = self.clone();
        tokio::spawn(async move {
            let Some(end) = service.end_of(guest.as_ref(), &process).await else {
                service.drain(&process, streams);
                return;
            };
            service.init_ended(guest.as_ref(), &process, streams, end).await;
        });
    }

    /// Waits for the end of an added process, in a task of its own.
    pub(super) fn watch_exec(&self, guest: Arc<dyn Guest>, process: ProcessId, streams: Streams) {
        let service = self.clone();
        tokio::spawn(async move {
            let end = service.end_of(guest.as_ref(), &process).await;
            drained_within(service.drain(&process, streams), DRAINED_BEFORE_EXIT).await;
            if let Some(end) = end {
                let end = End { code: end.code.into(), at: end.at };
                service.ledger().end(&process, end, &service.0.publisher);
            }
        });
    }

    /// The end of a process; `None` if it was told already, because the guest is lost.
    async fn end_of(&self, guest: &dyn Guest, process: &ProcessId) -> Option<GuestEnd> {
        let mut told = self.ledger().process(process).ok()?.end.subscribe();
        loop {
            let waited = tokio::select! {
                waited = guest.wait(process) => waited,
                _ = told.wait_for(Option::is_some) => return None,
            };
            if told.borrow().is_some() {
                return None;
            }
            match waited {
                Ok(end) => return Some(end),
                Err(error) if error.kind == GuestErrorKind::Unavailable => {
                    log::debug!("{error}");
                    sleep(AGAIN).await;
                }
                Err(error) => {
                    log::warn!("the guest does not know how a process ended: {error}");
                    let at = std::time::SystemTime::now();
                    return Some(GuestEnd { code: UNKNOWN_END, out_of_memory: false, at });
                }
            }
        }
    }

    /// Lets the rest of the output be written; the answer becomes true when it is.
    fn drain(&self, process: &ProcessId, streams: Streams) -> watch::Receiver<bool> {
        let drained = match self.ledger().process(process) {
            Ok(process) => process.drained.clone(),
            Err(_gone) => watch::Sender::new(false),
        };
        let receiver = drained.subscribe();
        tokio::spawn(async move {
            streams.finish(STREAM_PATIENCE).await;
            drained.send_replace(true);
        });
        receiver
    }

    async fn init_ended(
        &self,
        guest: &dyn Guest,
        process: &ProcessId,
        streams: Streams,
        end: GuestEnd,
    ) {
        self.not_starting(process).await;
        self.end_execs(guest, process).await;
        drained_within(self.drain(process, streams), DRAINED_BEFORE_EXIT).await;
        let stats = timeout(STATS_WITHIN, guest.stats(&process.container)).await;
        let stats = match stats {
            Ok(Ok(stats)) => Some(stats),
            Ok(Err(error)) => {
                log::debug!("no last figures: {error}");
                None
            }
            Err(_elapsed) => None,
        };
        if self.tell_init_end(process, end, stats) {
            self.end_others(guest, &process.container).await;
        }
    }

    /// Tells that an init has ended, and answers whether the pod's others are to.
    fn tell_init_end(&self, process: &ProcessId, end: GuestEnd, stats: Option<Metrics>) -> bool {
        let mut ledger = self.ledger();
        let Ok(container) = ledger.container(&process.container) else { return false };
        container.stats = stats.or(container.stats.take());
        let is_sandbox = container.is_sandbox;
        if end.out_of_memory {
            ledger.out_of_memory(&process.container, &self.0.publisher);
        }
        let end = End { code: end.code.into(), at: end.at };
        ledger.end(process, end, &self.0.publisher);
        is_sandbox
    }

    /// Waits while the process's start is being answered, as its start is told first.
    async fn not_starting(&self, process: &ProcessId) {
        let Ok(mut phase) = self.ledger().process(process).map(|found| found.phase.subscribe())
        else {
            return;
        };
        if phase.wait_for(|phase| *phase != Phase::Starting).await.is_err() {
            log::debug!("container `{}` is gone", process.container);
        }
    }

    /// Ends what else runs in a container whose init has ended.
    async fn end_execs(&self, guest: &dyn Guest, init: &ProcessId) {
        let mut ends = self.ledger().ending(&init.container);
        if ends.iter().any(|(_, phase, _)| *phase != Phase::Created)
            && let Err(error) = guest.signal(init, libc::SIGKILL, true).await
        {
            log::debug!("what is left of `{}` is not killed: {error}", init.container);
        }
        let ended = async {
            for (_, _, end) in ends.iter_mut().filter(|(_, phase, _)| *phase != Phase::Created) {
                if end.wait_for(Option::is_some).await.is_err() {
                    log::debug!("an added process is gone");
                }
            }
        };
        if timeout(EXECS_END_WITHIN, ended).await.is_err() {
            log::warn!("a process of `{}` does not end with its init", init.container);
        }
        let mut ledger = self.ledger();
        for (exec, ..) in ends {
            let process = ProcessId { container: init.container.clone(), exec };
            ledger.end(&process, End::killed(), &self.0.publisher);
        }
    }

    /// Ends a pod's containers after its sandbox's own.
    async fn end_others(&self, guest: &dyn Guest, sandbox: &str) {
        let others = self.ledger().live_inits();
        let others = others.into_iter().map(|(id, _)| id).filter(|id| id != sandbox);
        for container in others {
            let process = ProcessId { container, exec: String::new() };
            if let Err(error) = guest.signal(&process, libc::SIGKILL, true).await {
                log::warn!("`{}` does not end with its sandbox: {error}", process.container);
            }
        }
    }

    /// Watches the guest as a whole, in tasks of their own.
    pub(super) fn watch_guest(&self, guest: &Arc<dyn Guest>) {
        let (service, watched) = (self.clone(), Arc::clone(guest));
        let memory = tokio::spawn(async move {
            loop {
                let container = watched.out_of_memory().await;
                let mut ledger = service.ledger();
                ledger.out_of_memory(&container, &service.0.publisher);
            }
        });
        let (service, watched) = (self.clone(), Arc::clone(guest));
        tokio::spawn(async move {
            let reason = watched.died().await;
            memory.abort();
            service.lost(&watched, &reason);
        });
    }

    fn lost(&self, guest: &Arc<dyn Guest>, reason: &str) {
        let mut ledger = self.ledger();
        match &ledger.sandbox {
            Sandbox::Up(up) if Arc::ptr_eq(up, guest) => {}
            // It was stopped.
            _ => return,
        }
        log::error!("the sandbox is lost: {reason}");
        ledger.sandbox = Sandbox::Lost { guest: Arc::clone(guest), reason: reason.to_owned() };
        ledger.end_all(End::killed(), &self.0.publisher);
        drop(ledger);
        self.0.sandbox_end.send_replace(Some(End::killed()));
    }
}

impl super::ledger::Ledger {
    /// Lets a container take no more processes, and answers those that have not ended.
    fn ending(&mut self, id: &str) -> Vec<(String, Phase, watch::Receiver<Option<End>>)> {
        let Ok(container) = self.container(id) else { return Vec::new() };
        container.is_ending = true;
        let live = container.execs.iter().filter(|(_, process)| process.ended().is_none());
        live.map(|(exec, process)| (exec.clone(), process.phase(), process.end.subscribe()))
            .collect()
    }

    /// Tells that a container was out of memory, once.
    fn out_of_memory(&mut self, id: &str, publisher: &super::Publisher) {
        let Ok(container) = self.container(id) else { return };
        if container.out_of_memory || container.init.ended().is_some() {
            return;
        }
        container.out_of_memory = true;
        let mut event = TaskOOM::new();
        event.set_container_id(id.to_owned());
        publisher.push(&Event::OutOfMemory(event));
    }
}

/// Waits until the output is written, or for `limit`.
pub(super) async fn drained_within(mut drained: watch::Receiver<bool>, limit: Duration) {
    if timeout(limit, drained.wait_for(|drained| *drained)).await.is_err() {
        log::debug!("the rest of the output is written later");
    }
}
