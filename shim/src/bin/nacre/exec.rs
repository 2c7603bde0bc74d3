//! `nacre exec`: another program in a container that runs, by a connection of its own to the
//! agent. The sandbox's supervisor has no part in it.

use std::{
    fs::File,
    io::Read,
    time::{Duration, SystemTime},
};

use nacre_proto::{agent::ExecRequest, exit::RunExit};
use shim::{
    agent::{Agent, AgentError, ProcessEnd, ProcessId},
    name::SandboxName,
    paths,
    plan::{
        inputs::HostFacts,
        process::{self, ProcessConfig},
    },
    record::Record,
    registry::Registry,
    sandbox::Request,
    streams::{Ends, Streams},
};

use crate::{
    args::Exec,
    failure::Failure,
    prepare,
    run::{local_input, local_outputs},
    runtime,
    signals::{self, Requests},
    terminal::{self, Raw},
};

/// How long a call to the agent may take.
const CALL: Duration = Duration::from_secs(120);
/// How long a stream of an ended process may neither move nor end.
const DRAINED_WITHIN: Duration = Duration::from_secs(10);
/// After so many signals the process is ended by force, and after one more it is left alone.
const PATIENCE_SIGNALS: u32 = 2;

pub(crate) fn exec(args: &Exec) -> Result<u8, Failure> {
    let registry = Registry::open(paths::state_root())?;
    let (record, files) = registry.find_running(&args.name)?;
    runtime()?.block_on(async {
        let mut config = ProcessConfig {
            arguments: args.command.clone(),
            env: inherited(&record, args.process.user.is_some()),
            ..ProcessConfig::default()
        };
        prepare::apply(&args.process, &mut config);
        // A connection may have to wait for the next process of the vsock device.
        let agent = Agent::connect(&files.vsock(), CALL, CALL).await;
        let agent = agent.map_err(|error| of_agent(&error))?;
        let process = ProcessId { container: args.name.to_string(), exec: exec_id()? };
        let local_terminal = if config.terminal { terminal::of_stdin() } else { None };
        let mut requests = signals::listen(local_terminal.is_some())
            .map_err(|error| Failure::setup("can't listen to signals", error))?;
        let request = ExecRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            oci_process: object(&config, args, &record)?,
            terminal: config.terminal,
            stdin: config.stdin,
            ..ExecRequest::default()
        };
        agent.exec(&request).await.map_err(|error| of_agent(&error))?;
        let streams = start(&agent, &process, &config).await?;
        let raw = local_terminal.map(Raw::enter).transpose();
        let raw = raw.map_err(|error| Failure::setup("the terminal", error))?;
        let end = until_end(&agent, &process, &mut requests).await;
        drop(raw);
        let end = end.map_err(|error| of_agent(&error))?;
        tokio::select! {
            () = streams.finish(DRAINED_WITHIN) => {}
            () = a_signal(&mut requests) => log::warn!("the rest of the output is given up"),
        }
        if let Err(error) = agent.delete(&process).await {
            log::debug!("{error}");
        }
        Ok(end.code)
    })
}

/// The container's environment, without the home folder of a user that the program is not run by.
fn inherited(record: &Record, other_user: bool) -> Vec<String> {
    let keeps = |variable: &&String| !(other_user && variable.starts_with("HOME="));
    record.env.iter().filter(keeps).cloned().collect()
}

fn exec_id() -> Result<String, Failure> {
    let mut random = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .map_err(|error| Failure::setup("no random numbers", error))?;
    Ok(format!("exec-{:016x}", u64::from_ne_bytes(random)))
}

/// The process object, of which only what was asked for is not inherited.
fn object(config: &ProcessConfig, args: &Exec, record: &Record) -> Result<Vec<u8>, Failure> {
    let facts = HostFacts::gather(Some(&record.rootfs))?;
    let hostname: &SandboxName = &record.name;
    let mut object = process::object(config, hostname.as_str(), &facts.passwd, &facts.group)?;
    if let Some(object) = object.as_object_mut() {
        object.remove("noNewPrivileges");
        if args.process.user.is_none() {
            object.remove("user");
        }
        if args.process.workdir.is_none() {
            object.remove("cwd");
        }
    }
    serde_json::to_vec(&object).map_err(|error| Failure::setup("the process object", error))
}

async fn start(
    agent: &Agent,
    process: &ProcessId,
    config: &ProcessConfig,
) -> Result<Streams, Failure> {
    let failed = |error| Failure::setup("standard streams", error);
    let ends = Ends {
        input: if config.stdin { Some(local_input().map_err(failed)?) } else { None },
        outputs: local_outputs().map_err(failed)?,
        terminal: config.terminal,
        size: None,
    };
    let streams = Streams::connect(agent.vsock(), process, ends).await?;
    if let (true, Some((columns, rows))) = (config.terminal, terminal::size()) {
        agent.resize(process, columns, rows).await.map_err(|error| of_agent(&error))?;
    }
    agent.start(process).await.map_err(|error| of_agent(&error))?;
    Ok(streams)
}

async fn until_end(
    agent: &Agent,
    process: &ProcessId,
    requests: &mut Requests,
) -> Result<ProcessEnd, AgentError> {
    let wait = agent.wait(process);
    tokio::pin!(wait);
    let mut endings = 0;
    loop {
        tokio::select! {
            end = &mut wait => return end,
            Some(request) = requests.receiver.recv() => match request {
                Request::Resize { columns, rows } => {
                    agent.resize(process, columns, rows).await?;
                }
                Request::Signal(signal) => {
                    endings += u32::from(matches!(signal, libc::SIGINT | libc::SIGTERM));
                    if endings > PATIENCE_SIGNALS {
                        let code = u8::try_from(128 + signal).unwrap_or(u8::MAX);
                        return Ok(ProcessEnd { code, at: SystemTime::now(), out_of_memory: false });
                    }
                    let force = endings == PATIENCE_SIGNALS;
                    let signal = if force { libc::SIGKILL } else { signal };
                    agent.signal(process, signal, false).await?;
                }
            },
        }
    }
}

async fn a_signal(requests: &mut Requests) {
    while let Some(request) = requests.receiver.recv().await {
        if let Request::Signal(_) = request {
            return;
        }
    }
}

fn of_agent(error: &AgentError) -> Failure {
    let code = match error {
        error if error.is_not_found() => RunExit::NotFound,
        error if error.is_not_executable() => RunExit::CannotExecute,
        AgentError::Lost { .. } | AgentError::Mute | AgentError::Unreachable(_) => {
            RunExit::AgentSilent
        }
        AgentError::Version(_) | AgentError::Refused { .. } => RunExit::Setup,
    };
    Failure::of(error).with_code(code.into())
}
