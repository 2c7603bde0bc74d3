//! From a guest that boots to an agent that answers and a guest that is configured.

use std::{
    fs::File,
    io::Read,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nacre_proto::agent::{ConfigureSandboxRequest, Interface, Route};
use tokio::{sync::watch, time::sleep};

use crate::{
    agent::{Agent, AgentError},
    fault::{self, Step},
    network::{
        address::{PREFIX_BITS, Pair},
        namespace::Found,
    },
    plan::NetworkConfig,
    sandbox::{
        SandboxError,
        create::{AgentUp, VmUp},
    },
};

/// How long one attempt to reach the agent of a guest that boots may take.
const ATTEMPT: Duration = Duration::from_secs(10);
/// The pause between two attempts to reach the agent.
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);
/// How many times the agent's time-out the guest may take although it makes progress.
const BOOT_FACTOR: u32 = 10;

impl VmUp {
    /// Waits for the guest's agent and configures the guest.
    ///
    /// # Errors
    ///
    /// Fails if a process ends, or the guest boots for too long without a sign of progress.
    pub async fn connect_agent(mut self) -> Result<AgentUp, SandboxError> {
        let agent = self.reach_agent().await?;
        self.base.timeline.agent_ready(agent.began());
        fault::point(Step::Agent)?;
        let request = self.configuration()?;
        self.guarded(agent.configure(&request)).await?;
        self.base.timeline.mark("guest configured");
        fault::point(Step::Configure)?;
        Ok(AgentUp { agent, vm: self })
    }

    async fn reach_agent(&mut self) -> Result<Agent, SandboxError> {
        let limit = self.base.settings.agent_timeout;
        let vsock = self.base.files.vsock();
        let attempts = attempts(&vsock, self.vmm.console(), limit);
        // One wait for a death beside all attempts: a death takes a moment to be explained, and an
        // attempt that fails because of it comes sooner.
        let attempted = tokio::select! {
            attempted = attempts => attempted,
            death = self.death() => return Err(death),
        };
        attempted.map_err(|error| match error {
            NoAgent::Other(error) => error.into(),
            NoAgent::Silent(waited) => {
                SandboxError::AgentSilent { waited, console: self.console_tail() }
            }
        })
    }

    fn configuration(&self) -> Result<ConfigureSandboxRequest, SandboxError> {
        let plan = &self.base.plan;
        let mut seed = vec![0; 64];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut seed))
            .map_err(SandboxError::Random)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (interfaces, routes, neighbors) = match (&plan.config.network, self.host.pair) {
            (NetworkConfig::Namespace { found, .. }, _) => {
                let Found { interfaces, routes, neighbors } = found.clone();
                (interfaces, routes, neighbors)
            }
            (_, Some(pair)) => {
                let (interface, route) = interface(pair, "eth0");
                (vec![interface], vec![route], Vec::new())
            }
            (_, None) => Default::default(),
        };
        Ok(ConfigureSandboxRequest {
            hostname: plan.hostname.clone(),
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            random_seed: seed,
            interfaces,
            routes,
            nameservers: plan.nameservers.iter().map(ToString::to_string).collect(),
            storages: plan.storages.clone(),
            neighbors,
            sysctls: plan.config.sysctls.clone().into_iter().collect(),
            ..ConfigureSandboxRequest::default()
        })
    }
}

/// Why no attempt led to an agent.
enum NoAgent {
    /// Nothing happened for so long.
    Silent(Duration),
    /// It is there and can't be spoken with.
    Other(AgentError),
}

/// Tries to reach the agent until it answers, or the guest's console, whose length `console` is,
/// has not grown for `limit`.
async fn attempts(
    vsock: &Path,
    mut console: watch::Receiver<u64>,
    limit: Duration,
) -> Result<Agent, NoAgent> {
    let begun = Instant::now();
    let mut last_progress = begun;
    loop {
        let silent = match Agent::connect(vsock, ATTEMPT.min(limit), limit).await {
            Ok(agent) => return Ok(agent),
            Err(error @ AgentError::Version(_)) => return Err(NoAgent::Other(error)),
            Err(error) => {
                log::trace!("no agent yet: {error}");
                // The connection was taken and then nothing came: that is not booting.
                matches!(error, AgentError::Lost { .. })
            }
        };
        if console.has_changed().unwrap_or(false) {
            console.mark_unchanged();
            last_progress = Instant::now();
        }
        let waited = last_progress.elapsed();
        if (silent && begun.elapsed() >= limit)
            || waited >= limit
            || begun.elapsed() >= limit * BOOT_FACTOR
        {
            return Err(NoAgent::Silent(waited));
        }
        sleep(BETWEEN_ATTEMPTS).await;
    }
}

/// A nic as the agent is to set it up, and the way out through it.
pub(super) fn interface(pair: Pair, name: &str) -> (Interface, Route) {
    let interface = Interface {
        mac: pair.mac(),
        name: name.to_owned(),
        mtu: 1500,
        addresses: vec![format!("{}/{PREFIX_BITS}", pair.guest())],
        ..Interface::default()
    };
    let route =
        Route { gateway: pair.host().to_string(), interface: name.to_owned(), ..Route::default() };
    (interface, route)
}
