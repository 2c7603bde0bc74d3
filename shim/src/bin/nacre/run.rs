//! `nacre run`: one sandbox from its plan to its end, in the foreground or as a daemon.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use log::LevelFilter;
use shim::{
    image::Cancel,
    log_file,
    output_log::OutputLog,
    plan::SandboxPlan,
    sandbox::{self, Claimed, Ended, Planned, Request as Asked, SandboxError, Settings},
    stdio::{Input, Outputs},
    streams::Ends,
    timing::Timeline,
};
use tokio::sync::oneshot;

use crate::{
    args::Run,
    daemon::{self, Report, Side},
    failure::{Failure, of_sandbox},
    permission,
    prepare::Request,
    runtime,
    signals::{self, Requests},
    terminal::{self, Raw},
};

/// Runs it; answers the container's exit code.
pub(crate) fn run(args: Run, log_level: LevelFilter) -> Result<u8, Failure> {
    permission::check(&args)?;
    // Shared with the thread that plans.
    let request = Arc::new(Request::new(args)?);
    if !request.run.detach {
        return runtime()?.block_on(supervise(&request, log_level, None));
    }
    match daemon::detach()? {
        Side::Between => Ok(0),
        Side::Typed(told) => {
            writeln!(io::stdout(), "{}", told?)
                .map_err(|error| Failure::setup("standard output", error))?;
            Ok(0)
        }
        Side::Daemon(report) => {
            let mut report = Some(report);
            let result = runtime().and_then(|runtime| {
                runtime.block_on(supervise(&request, log_level, Some(&mut report)))
            });
            if let (Err(failure), Some(report)) = (&result, report.take()) {
                // The program that was typed prints it.
                report.failed(failure);
                return Ok(failure.code());
            }
            result
        }
    }
}

async fn supervise(
    request: &Arc<Request>,
    log_level: LevelFilter,
    report: Option<&mut Option<Report>>,
) -> Result<u8, Failure> {
    let timeline = Timeline::start();
    let local_terminal = if request.run.process.tty { terminal::of_stdin() } else { None };
    let mut requests = signals::listen(local_terminal.is_some())
        .map_err(|error| Failure::setup("can't listen to signals", error))?;
    let plan = plan(request, log_level, &mut requests).await?;
    let settings = settings(request, log_level)?;
    let claimed = Planned::new(plan, settings.clone(), timeline)
        .claim()
        .map_err(|error| of_sandbox(&error))?;
    let ends = ends(request, &claimed)?;
    let log = match &report {
        None => None,
        Some(_) => Some(
            log_file::create(&claimed.files().supervisor_log())
                .map_err(|error| Failure::setup("the supervisor's log", error))?,
        ),
    };
    let on_start = OnStart { request, report, log, local_terminal };
    let result = run_claimed(claimed, ends, requests, on_start).await;
    let code = match result {
        Ok((ended, host)) => {
            if request.run.timing {
                print_timing(&ended)?;
            }
            if request.run.detach {
                host.keep(ended.code)?;
            }
            ended.code
        }
        Err(error) => {
            let failure = of_sandbox(&error);
            if request.run.detach {
                // Before the start there is no record left to be marked.
                if let Err(error) = settings.registry.mark_exited(&request.name, failure.code()) {
                    log::debug!("{error}");
                }
            }
            return Err(failure);
        }
    };
    Ok(code)
}

/// Plans in a thread of its own, for unpacking an image takes long and a signal calls it off.
async fn plan(
    request: &Arc<Request>,
    log_level: LevelFilter,
    requests: &mut Requests,
) -> Result<SandboxPlan, Failure> {
    let cancel = Cancel::default();
    let verbose = log_level >= LevelFilter::Debug;
    let (sender, mut planned) = oneshot::channel();
    let work = {
        let (cancel, request) = (cancel.clone(), Arc::clone(request));
        move || {
            if sender.send(request.plan(cancel, verbose)).is_err() {
                log::debug!("the plan is no longer wanted");
            }
        }
    };
    let thread = std::thread::Builder::new().name("plan".to_owned()).spawn(work);
    let thread = thread.map_err(|error| Failure::setup("no thread", error))?;
    let mut called_off = None;
    let result = loop {
        tokio::select! {
            result = &mut planned => break result,
            Some(asked) = requests.receiver.recv() => if let Asked::Signal(signal) = asked {
                called_off = Some(signal);
                cancel.cancel();
            },
        }
    };
    if thread.join().is_err() {
        log::error!("the planning thread panicked");
    }
    match (called_off, result) {
        (Some(signal), _) => Err(of_sandbox(&SandboxError::Interrupted(signal))),
        (None, Ok(plan)) => plan,
        (None, Err(error)) => Err(Failure::setup("no plan", error)),
    }
}

fn settings(request: &Request, log_level: LevelFilter) -> Result<Settings, Failure> {
    Ok(Settings {
        programs: request.programs.clone(),
        registry: request.open_registry()?,
        log_level,
        agent_timeout: Duration::from_secs(request.run.agent_timeout),
        keep: request.run.detach,
        measure: request.run.timing,
    })
}

fn ends(request: &Request, claimed: &Claimed) -> Result<Ends, Failure> {
    let process = &request.run.process;
    let failed = |error: io::Error| Failure::setup("standard streams", error);
    let outputs = if request.run.detach {
        let log = OutputLog::create(claimed.files().output()).map_err(failed)?;
        Outputs::to_log(log)
    } else {
        local_outputs()
    };
    Ok(Ends {
        input: if process.interactive { Some(local_input().map_err(failed)?) } else { None },
        outputs: outputs.map_err(failed)?,
        terminal: process.tty,
        size: terminal::size(),
    })
}

/// This program's standard input.
pub(crate) fn local_input() -> io::Result<Input> {
    Input::from_file(terminal::duplicate(io::stdin())?)
}

/// This program's standard output and error.
pub(crate) fn local_outputs() -> io::Result<Outputs> {
    Outputs::to_files(terminal::duplicate(io::stdout())?, terminal::duplicate(io::stderr())?)
}

/// What happens when the container's program runs.
struct OnStart<'a> {
    request: &'a Request,
    report: Option<&'a mut Option<Report>>,
    log: Option<File>,
    local_terminal: Option<OwnedFd>,
}

async fn run_claimed(
    claimed: Claimed,
    ends: Ends,
    requests: Requests,
    mut on_start: OnStart<'_>,
) -> Result<(Ended, sandbox::HostResources), SandboxError> {
    let Requests { receiver, listeners } = requests;
    let (started, mut has_started) = oneshot::channel();
    let life = sandbox::run(claimed, ends, receiver, Some(started));
    tokio::pin!(life);
    // Raw until the end of this function, however it is left.
    let mut raw = None;
    let mut waiting = true;
    let result = loop {
        tokio::select! {
            result = &mut life => break result,
            start = &mut has_started, if waiting => {
                waiting = false;
                if start.is_ok() {
                    raw = on_start.happened();
                }
            }
        }
    };
    drop(raw);
    drop(listeners);
    result
}

impl OnStart<'_> {
    fn happened(&mut self) -> Option<Raw> {
        let report = self.report.as_mut().and_then(|report| report.take());
        if let (Some(report), Some(log)) = (report, &self.log) {
            report.started(self.request.name.as_str(), log);
        }
        let raw = Raw::enter(self.local_terminal.take()?);
        raw.inspect_err(|error| log::warn!("the terminal can't be made raw: {error}")).ok()
    }
}

fn print_timing(ended: &Ended) -> Result<(), Failure> {
    write!(io::stderr(), "{}", ended.timeline.table())
        .map_err(|error| Failure::setup("standard error", error))
}
