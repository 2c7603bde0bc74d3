//! The agent in the guest, as the host sees it: typed calls with limits, and answers that are not
//! believed before they are checked, for whoever broke the guest speaks with its voice.

mod containers;
mod stats;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use nacre_proto::{
    AGENT_MAJOR, AGENT_MINOR, AGENT_PORT,
    agent::{
        ConfigureSandboxRequest, DeviceRequest, HelloRequest, ProcessRequest, ShutdownRequest,
        UnwrittenRequest, UseResourcesRequest,
    },
    agent_ttrpc::AgentClient,
};
use tokio::time::timeout;
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
    context::{self, Context},
};

pub use stats::{BlockUse, Counts, Pressure, PressureLine, Stats};

use crate::{
    hybrid_vsock::{self, ConnectError},
    log_file::printable,
};

/// How much longer an answer may take than the work that it is about.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the agent may take to give a container a device, or to take it away.
const DEVICE: Duration = Duration::from_secs(60);
/// How many names of one device are taken from the agent.
const MOST_NAMES: usize = 64;

/// Why the agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It can't be reached.
    #[error("the agent can't be reached")]
    Unreachable(#[from] ConnectError),
    /// It took the connection and then said nothing.
    #[error("the agent takes connections and says nothing")]
    Mute,
    /// It speaks another protocol.
    #[error("the agent speaks version {0} of the protocol, this program {AGENT_MAJOR}")]
    Version(u32),
    /// It refused.
    #[error("the agent refuses to {call}: {message}")]
    Refused {
        /// What was asked.
        call: &'static str,
        /// The kind of error.
        code: Code,
        /// In its words, made printable.
        message: String,
    },
    /// The connection broke, or the answer took too long.
    #[error("the agent did not {call}: {message}")]
    Lost {
        /// What was asked.
        call: &'static str,
        /// What happened to the connection.
        message: String,
    },
}

/// Names a process: a container's init, or one that was added to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// Empty for the init.
    pub exec: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessEnd {
    /// Its exit code, or 128 and the signal's number.
    pub code: u8,
    /// When, by the guest's clock, and never later than it was heard of.
    pub at: SystemTime,
    /// The guest's out-of-memory killer struck in its container.
    pub out_of_memory: bool,
}

/// What a guest uses, by the agent's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Processors that are online.
    pub online_cpus: u32,
    /// Memory that the kernel manages, in bytes.
    pub memory_bytes: u64,
}

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    vsock: PathBuf,
    limit: Duration,
    began: Option<Instant>,
}

impl Agent {
    /// Connects once, which may take as long as `attempt`, and agrees on the protocol. Calls may take
    /// `limit` each.
    ///
    /// # Errors
    ///
    /// Fails if the agent does not answer, or speaks another protocol.
    pub async fn connect(
        vsock: &Path,
        attempt: Duration,
        limit: Duration,
    ) -> Result<Self, AgentError> {
        let stream = timeout(attempt, hybrid_vsock::connect(vsock, AGENT_PORT))
            .await
            .map_err(|_elapsed| AgentError::Mute)??;
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        let mut agent = Self { client, vsock: vsock.to_owned(), limit, began: None };
        let hello =
            HelloRequest { major: AGENT_MAJOR, minor: AGENT_MINOR, ..HelloRequest::default() };
        let answer = agent
            .client
            .hello(within(limit), &hello)
            .await
            .map_err(|error| failed("say hello", &error))?;
        if answer.major != AGENT_MAJOR {
            return Err(AgentError::Version(answer.major));
        }
        // The answer was made a little before now: the moment is too late by its way, no more.
        let age = answer.now_ns.checked_sub(answer.began_ns).map(Duration::from_nanos);
        agent.began = age.and_then(|age| Instant::now().checked_sub(age));
        log::debug!(
            "agent {}.{} on Linux {}, {} CPUs, {} bytes",
            answer.major,
            answer.minor,
            printable(&answer.kernel_release),
            answer.online_cpus,
            answer.memory_bytes
        );
        Ok(agent)
    }

    /// The socket to the guest's vsock ports.
    #[must_use]
    pub fn vsock(&self) -> &Path {
        &self.vsock
    }

    /// When the agent, the guest's process 1, began to run, by its own word.
    #[must_use]
    pub fn began(&self) -> Option<Instant> {
        self.began
    }

    fn context(&self) -> Context {
        within(self.limit)
    }

    /// Once, before any container.
    ///
    /// # Errors
    ///
    /// As each call: if the agent refuses or is lost.
    pub async fn configure(&self, request: &ConfigureSandboxRequest) -> Result<(), AgentError> {
        let answer = self.client.configure_sandbox(self.context(), request).await;
        answer.map(drop).map_err(|error| failed("configure the sandbox", &error))
    }

    /// Has the guest use so many processors and so much memory (0: what there is), and answers what
    /// it uses once it does or `within` is over.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn use_resources(
        &self,
        cpus: u32,
        memory_bytes: u64,
        within: Duration,
    ) -> Result<Used, AgentError> {
        let request = UseResourcesRequest {
            cpus,
            memory_bytes,
            within_ms: u32::try_from(within.as_millis()).unwrap_or(u32::MAX),
            ..UseResourcesRequest::default()
        };
        let context = self::within(within.saturating_add(ANSWER));
        let answer = self.client.use_resources(context, &request).await;
        let answer = answer.map_err(|error| failed("use what was added", &error))?;
        Ok(Used { online_cpus: answer.online_cpus, memory_bytes: answer.memory_bytes })
    }

    /// Gives the container a device; answers what the container knows it by.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn attach(&self, request: &DeviceRequest) -> Result<Vec<String>, AgentError> {
        let answer = self.client.attach_device(within(DEVICE), request).await;
        let answer = answer.map_err(|error| failed("give the container the device", &error))?;
        Ok(answer.names.iter().take(MOST_NAMES).map(|name| printable(name)).collect())
    }

    /// Takes a device from the container.
    ///
    /// # Errors
    ///
    /// As each call; [`AgentError::Refused`] if it is in use.
    pub async fn detach(&self, request: &DeviceRequest) -> Result<(), AgentError> {
        let answer = self.client.detach_device(within(DEVICE), request).await;
        answer.map(drop).map_err(|error| failed("take the device from the container", &error))
    }

    /// How many bytes the guest has not written to its disks and shares yet, if it tells within
    /// `limit`.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn unwritten(&self, limit: Duration) -> Result<u64, AgentError> {
        let answer = self.client.unwritten(within(limit), &UnwrittenRequest::default()).await;
        let answer = answer.map_err(|error| failed("tell what is unwritten", &error))?;
        Ok(answer.bytes)
    }

    /// Lets the guest write back its file systems and power off, in at most `limit`.
    ///
    /// # Errors
    ///
    /// As each call.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), AgentError> {
        let answer = self.client.shutdown(within(limit), &ShutdownRequest::default()).await;
        answer.map(drop).map_err(|error| failed("shut the guest down", &error))
    }
}

fn request(process: &ProcessId) -> ProcessRequest {
    ProcessRequest {
        container_id: process.container.clone(),
        exec_id: process.exec.clone(),
        ..ProcessRequest::default()
    }
}

fn within(limit: Duration) -> Context {
    context::with_timeout(i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX))
}

fn failed(call: &'static str, error: &ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => match status.code() {
            // Made by the client itself when the time is over.
            Code::DEADLINE_EXCEEDED => {
                AgentError::Lost { call, message: "it took too long".to_owned() }
            }
            code => AgentError::Refused { call, code, message: printable(&status.message) },
        },
        other => AgentError::Lost { call, message: printable(&other.to_string()) },
    }
}

impl AgentError {
    /// Whether a program could not be started because it is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code, message, .. }
            if *code == Code::NOT_FOUND || says(message, &["no such file", "not found"]))
    }

    /// Whether the agent answered, and would not.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether a program could not be started although it is there.
    #[must_use]
    pub fn is_not_executable(&self) -> bool {
        let words = ["permission denied", "exec format", "is a directory", "not executable"];
        matches!(self, Self::Refused { code, message, .. }
            if *code == Code::PERMISSION_DENIED || says(message, &words))
    }
}

fn says(message: &str, words: &[&str]) -> bool {
    let message = message.to_ascii_lowercase();
    words.iter().any(|word| message.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code, message: &str) -> AgentError {
        failed("start the program", &ttrpc::Error::RpcStatus(ttrpc::get_status(code, message)))
    }

    #[test]
    fn a_missing_program_is_told_from_one_that_cannot_run() {
        let missing = refused(Code::NOT_FOUND, "x");
        assert!(missing.is_not_found() && !missing.is_not_executable());
        let denied = refused(Code::UNKNOWN, "execve: Permission denied");
        assert!(!denied.is_not_found() && denied.is_not_executable());
        let other = refused(Code::INTERNAL, "x");
        assert!(!other.is_not_found() && !other.is_not_executable());
    }

    #[test]
    fn what_the_agent_says_can_do_a_terminal_no_harm() {
        let error = refused(Code::INTERNAL, &format!("\x1b[2J{}", "x".repeat(10_000)));
        let text = error.to_string();
        assert!(text.len() < 500 && !text.contains('\x1b'), "{text}");
    }
}
