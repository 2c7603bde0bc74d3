//! A sandbox whose container runs, until its end. One task owns it; everything else sends it
//! requests.

use std::{future, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use nacre_proto::exit::RunExit;

use crate::{
    agent::{Agent, ProcessEnd, ProcessId},
    sandbox::{
        Ended, Request, SandboxError,
        create::VmUp,
        host::HostResources,
        shutdown,
        signals::{Patience, Reaction},
    },
    streams::Streams,
};

/// How long the end of a killed container may take to be reported.
const KILLED_WITHIN: Duration = Duration::from_secs(10);
/// How long a stream of an ended process may neither move nor end.
const DRAINED_WITHIN: Duration = Duration::from_secs(10);
/// How long the VMM may take to tell its figures.
const STATUS_WITHIN: Duration = Duration::from_secs(5);
/// How long a backend may take to end when nobody uses it any more.
const OFF_WITHIN: Duration = Duration::from_secs(10);
const KILLED: u8 = 128 + 9;

/// See the module.
pub struct Running {
    container: Container,
    streams: Streams,
    vm: VmUp,
}

/// The container, as far as it can be told something.
struct Container {
    process: ProcessId,
    agent: Agent,
}

/// How the container's end was come to.
enum Outcome {
    /// The agent reported it.
    Process(ProcessEnd),
    /// It was not waited for any longer.
    GivenUp,
}

impl Container {
    fn resize(&self, columns: u16, rows: u16) {
        let (agent, process) = (self.agent.clone(), self.process.clone());
        tokio::spawn(async move {
            if let Err(error) = agent.resize(&process, columns, rows).await {
                log::debug!("{error}");
            }
        });
    }

    fn signal(&self, signal: i32, all: bool) {
        let (agent, process) = (self.agent.clone(), self.process.clone());
        tokio::spawn(async move {
            if let Err(error) = agent.signal(&process, signal, all).await {
                log::warn!("signal {signal} was not passed on: {error}");
            }
        });
    }
}

impl Running {
    pub(super) fn new(process: ProcessId, agent: Agent, streams: Streams, vm: VmUp) -> Self {
        Self { container: Container { process, agent }, streams, vm }
    }

    /// Tells the container's terminal its size.
    pub(super) fn resize(&self, columns: u16, rows: u16) {
        self.container.resize(columns, rows);
    }

    /// Serves requests until the container ends, then takes everything down but what the answer
    /// carries.
    ///
    /// # Errors
    ///
    /// Fails if a process of the sandbox ends before the container does.
    pub async fn supervise(
        mut self,
        mut requests: mpsc::Receiver<Request>,
    ) -> Result<(Ended, HostResources), SandboxError> {
        if self.vm.base.settings.measure {
            self.measure("until the container started").await;
        }
        let outcome = self.until_end(&mut requests).await?;
        if self.vm.base.settings.measure {
            self.measure("until the container ended").await;
        }
        let Self { container, streams, mut vm } = self;
        vm.base.timeline.mark("container ended");
        let code = match outcome {
            Outcome::GivenUp => KILLED,
            Outcome::Process(end) => {
                drain(&mut vm, streams, &mut requests).await;
                let Container { process, agent } = &container;
                let is_written = shutdown::in_order(&mut vm, agent, process, &mut requests).await;
                if end.out_of_memory && end.code == KILLED {
                    log::error!("the container was out of memory: the guest's kernel killed it");
                    RunExit::OutOfMemory.into()
                } else if !is_written && end.code == 0 {
                    RunExit::NotWritten.into()
                } else {
                    end.code
                }
            }
        };
        let VmUp { control, vmm, mut devices, errands, host, mut base } = vm;
        drop((control, errands));
        drop(vmm);
        devices.stop(OFF_WITHIN).await;
        drop(devices);
        base.timeline.mark("guest gone");
        Ok((Ended { code, timeline: base.timeline }, host))
    }

    async fn until_end(
        &mut self,
        requests: &mut mpsc::Receiver<Request>,
    ) -> Result<Outcome, SandboxError> {
        let Self { container, streams, vm } = self;
        let wait = vm.guarded(container.agent.wait(&container.process));
        tokio::pin!(wait);
        let mut patience = Patience::Calm;
        let mut given_up_at = None;
        let mut is_read = true;
        loop {
            let reaction = tokio::select! {
                end = &mut wait => return end.map(Outcome::Process),
                Some(request) = requests.recv() => match request {
                    Request::Resize { columns, rows } => {
                        container.resize(columns, rows);
                        continue;
                    }
                    Request::Signal(signal) => {
                        let reaction;
                        (patience, reaction) = patience.on_signal(signal, Instant::now().into());
                        reaction
                    }
                },
                () = streams.unread(), if is_read => {
                    log::info!("nobody reads the container's output: it has to end");
                    is_read = false;
                    patience = patience.on_unread(Instant::now().into());
                    continue;
                }
                () = at(patience.deadline().map(Instant::from)) => {
                    let reaction;
                    (patience, reaction) = patience.on_deadline();
                    reaction
                }
                () = at(given_up_at) => return Ok(Outcome::GivenUp),
            };
            match reaction {
                Reaction::Forward(signal) => container.signal(signal, false),
                Reaction::Kill => {
                    log::info!("ends the container by force");
                    container.signal(libc::SIGKILL, true);
                    given_up_at = Some(Instant::now() + KILLED_WITHIN);
                }
                Reaction::TearDown => return Ok(Outcome::GivenUp),
            }
        }
    }

    async fn measure(&mut self, until: &str) {
        let link = self.vm.vmm.link();
        match self.vm.guarded(link.status(STATUS_WITHIN)).await {
            Ok(status) => self.vm.base.timeline.take(&status, until),
            Err(error) => log::warn!("no figures from the VMM: {error}"),
        }
    }
}

/// Resolves at `deadline`, or never.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => future::pending().await,
    }
}

/// Resolves with the next signal, or never.
pub(super) async fn a_signal(requests: &mut mpsc::Receiver<Request>) -> i32 {
    while let Some(request) = requests.recv().await {
        if let Request::Signal(signal) = request {
            return signal;
        }
    }
    future::pending().await
}

/// Waits for the rest of the output. The end of the program is known, so neither a death nor a
/// signal changes the exit code any more.
async fn drain(vm: &mut VmUp, streams: Streams, requests: &mut mpsc::Receiver<Request>) {
    let drained = async {
        streams.finish(DRAINED_WITHIN).await;
        Ok::<(), SandboxError>(())
    };
    tokio::select! {
        drained = vm.guarded(drained) => if let Err(error) = drained {
            log::warn!("the program ended, and then: {error}");
        },
        signal = a_signal(requests) => log::warn!("signal {signal}: the rest of the output is given up"),
    }
}
