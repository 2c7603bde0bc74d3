//! A pod as kubelet makes one: containerd's side of the container runtime interface (CRI).

#[expect(
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated from the interface's messages"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
pub use generated::cri::*;
use protobuf::{Message, MessageField};

use super::{BUSYBOX, Containerd, Runtime, grpc};
use crate::nacre::SANDBOX_PATIENCE;
use crate::process::until;

const SERVICE: &str = "/runtime.v1.RuntimeService/";
const EXITED: i32 = 2;
/// How long a container gets to end of itself, in seconds.
const FAREWELL_S: i64 = 10;

/// Where kubelet would have its questions answered.
#[derive(Clone, Debug)]
pub struct Cri {
    socket: PathBuf,
}

impl Cri {
    /// That of a containerd.
    #[must_use]
    pub fn of(daemon: &Containerd) -> Self {
        Self { socket: daemon.socket() }
    }

    /// One call, by the method's name.
    ///
    /// # Errors
    ///
    /// Fails with the status that is not OK, or without an answer.
    pub fn call<A: Message>(&self, method: &str, question: &impl Message) -> Result<A> {
        grpc::call(&self.socket, &format!("{SERVICE}{method}"), question, SANDBOX_PATIENCE)
    }

    /// The same, for an answer that says nothing.
    fn tell(&self, method: &str, question: &impl Message) -> Result<()> {
        self.call::<Empty>(method, question).map(drop)
    }
}

/// A pod's sandbox that runs.
#[derive(Debug)]
pub struct Pod {
    cri: Cri,
    id: String,
    config: PodSandboxConfig,
}

impl Pod {
    /// Runs one; its containers' logs go to `logs`.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn run(cri: &Cri, name: &str, runtime: Runtime, logs: &Path) -> Result<Self> {
        let mut config = PodSandboxConfig {
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            ..PodSandboxConfig::default()
        };
        config.metadata = MessageField::some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "default".to_owned(),
            ..PodSandboxMetadata::default()
        });
        config.dns_config = MessageField::some(DNSConfig {
            servers: vec!["10.88.77.53".to_owned()],
            searches: vec!["pods.test".to_owned()],
            ..DNSConfig::default()
        });
        config.linux = MessageField::some(LinuxPodSandboxConfig::default());
        let question = RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: runtime.name().to_owned(),
            ..RunPodSandboxRequest::default()
        };
        let made: Id = cri.call("RunPodSandbox", &question)?;
        Ok(Self { cri: cri.clone(), id: made.id, config })
    }

    /// Its address in the network.
    ///
    /// # Errors
    ///
    /// Fails if containerd does.
    pub fn address(&self) -> Result<String> {
        let answer: PodSandboxStatusResponse = self.cri.call("PodSandboxStatus", &id(&self.id))?;
        Ok(answer.status.network.ip.clone())
    }

    /// Creates and starts a container of busybox, with a limit of memory in bytes.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn start(&self, name: &str, command: &[&str], limit: Option<i64>) -> Result<Container> {
        let mut config = ContainerConfig {
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            ..ContainerConfig::default()
        };
        config.metadata = MessageField::some(ContainerMetadata {
            name: name.to_owned(),
            ..ContainerMetadata::default()
        });
        config.image =
            MessageField::some(ImageSpec { image: BUSYBOX.to_owned(), ..ImageSpec::default() });
        let resources = LinuxContainerResources {
            memory_limit_in_bytes: limit.unwrap_or_default(),
            ..LinuxContainerResources::default()
        };
        config.linux = MessageField::some(LinuxContainerConfig {
            resources: MessageField::some(resources),
            ..LinuxContainerConfig::default()
        });
        let question = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..CreateContainerRequest::default()
        };
        let made: Id = self.cri.call("CreateContainer", &question)?;
        self.cri.tell("StartContainer", &made)?;
        let log = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        Ok(Container { cri: self.cri.clone(), id: made.id, log })
    }

    /// Stops and removes the pod with all its containers.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn remove(self) -> Result<()> {
        self.cri.tell("StopPodSandbox", &id(&self.id))?;
        self.cri.tell("RemovePodSandbox", &id(&self.id))?;
        Ok(())
    }
}

/// A container of a pod.
#[derive(Debug)]
pub struct Container {
    cri: Cri,
    id: String,
    log: PathBuf,
}

impl Container {
    /// Runs a command in it; gives its exit code and what it printed.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn exec(&self, command: &[&str], timeout_s: i64) -> Result<(i32, String)> {
        let question = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: timeout_s,
            ..ExecSyncRequest::default()
        };
        let answer: ExecSyncResponse = self.cri.call("ExecSync", &question)?;
        Ok((answer.exit_code, String::from_utf8(answer.stdout)?))
    }

    /// What it wrote, without the time and the stream that stand before each line.
    ///
    /// # Errors
    ///
    /// Fails if there is no log.
    pub fn log(&self) -> Result<String> {
        let text = fs::read_to_string(&self.log).context("no log")?;
        let lines = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        Ok(lines.map(|line| format!("{line}\n")).collect())
    }

    /// Waits for its end; gives its exit code and why it ended.
    ///
    /// # Errors
    ///
    /// Fails if it does not end in time.
    pub fn wait(&self) -> Result<(i32, String)> {
        let mut ended = None;
        until("a container's end", || {
            let answer: ContainerStatusResponse =
                self.cri.call("ContainerStatus", &id(&self.id))?;
            let status = answer.status;
            ended = (status.state == EXITED).then(|| (status.exit_code, status.reason.clone()));
            Ok(ended.is_some())
        })?;
        ended.context("a container that ended")
    }

    /// The memory that it uses, in bytes.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn memory_bytes(&self) -> Result<u64> {
        let answer: ContainerStatsResponse = self.cri.call("ContainerStats", &id(&self.id))?;
        match answer.stats.memory.working_set_bytes.as_ref() {
            Some(bytes) => Ok(bytes.value),
            None => bail!("no memory in {answer}"),
        }
    }

    /// Gives it another limit of memory.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn limit_memory(&self, bytes: i64) -> Result<()> {
        let limits = LinuxContainerResources {
            memory_limit_in_bytes: bytes,
            ..LinuxContainerResources::default()
        };
        let question = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: MessageField::some(limits),
            ..UpdateContainerResourcesRequest::default()
        };
        self.cri.tell("UpdateContainerResources", &question)?;
        Ok(())
    }

    /// Stops and removes it.
    ///
    /// # Errors
    ///
    /// Fails if containerd or the runtime does.
    pub fn remove(self) -> Result<()> {
        let question = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: FAREWELL_S,
            ..StopContainerRequest::default()
        };
        self.cri.tell("StopContainer", &question)?;
        self.cri.tell("RemoveContainer", &id(&self.id))?;
        Ok(())
    }
}

fn id(id: &str) -> Id {
    Id { id: id.to_owned(), ..Id::default() }
}
