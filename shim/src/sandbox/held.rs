//! A sandbox without a container of its own, as long as somebody holds it: what a pod's containers
//! come into and go from.

use std::{sync::Arc, time::Duration};

use crate::{
    agent::Agent,
    backends::Roster,
    sandbox::{
        SandboxError,
        change::Operator,
        create::{AgentUp, VmUp},
        shutdown,
    },
};

/// How long a backend may take to end when nobody uses it any more.
const OFF_WITHIN: Duration = Duration::from_secs(10);

/// See the module. Dropping it takes everything down.
pub(crate) struct Held {
    vm: VmUp,
}

/// What is asked of a sandbox beside its owner.
#[derive(Clone)]
pub(crate) struct Ways {
    pub(crate) agent: Agent,
    pub(crate) operator: Arc<Operator>,
    pub(crate) roster: Roster,
    pub(crate) vmm_pid: u32,
}

impl AgentUp {
    /// Holds the sandbox as it is, and gives what it can be asked by.
    ///
    /// # Errors
    ///
    /// Fails if that can't be written down.
    pub(crate) fn hold(self) -> Result<(Held, Ways), SandboxError> {
        let Self { agent, mut vm } = self;
        let operator = vm.runs(&agent, "")?;
        let ways = Ways {
            operator,
            roster: vm.devices.roster().clone(),
            vmm_pid: vm.vmm.child().record().pid.unsigned_abs(),
            agent,
        };
        Ok((Held { vm }, ways))
    }
}

impl Held {
    /// Keeps the sandbox going, and resolves when a process that it can't do without has ended.
    pub(crate) async fn death(&mut self) -> SandboxError {
        self.vm.death().await
    }

    /// Lets the guest write everything back, for at most `patience` without progress, and takes
    /// everything down.
    pub(crate) async fn stop(mut self, agent: &Agent, patience: Duration) {
        shutdown::of_pod(&mut self.vm, agent, patience).await;
        let VmUp { control, vmm, mut devices, errands, host, base: _ } = self.vm;
        drop((control, errands));
        drop(vmm);
        devices.stop(OFF_WITHIN).await;
        drop((devices, host));
    }
}
