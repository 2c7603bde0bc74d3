//! The part of xtask that runs inside the emulated host: its first process, and the jobs.
//!
//! As process 1 it only starts itself again and reaps; the second process reads frames from the
//! virtio port and runs one job for each [`Frame::Start`]. Nothing here blocks the port: what a
//! job cannot take yet is bounded by its window.

mod binds;
mod job;
mod port;

use crate::host::protocol::{Frame, NO_JOB, read_frame};
use anyhow::{Context, Result};
use binds::Binds;
use binds::SHARE;
use job::Job;
use port::Port;
use rustix::fs::sync;
use rustix::process::{WaitOptions, getpid, wait};
use rustix::system::{RebootCommand, reboot};
use std::collections::HashMap;
use std::env;
use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The name of the hidden task that is this module.
pub const TASK: &str = "in-host";
/// The kernel argument, and so the variable, that tells the first script where this program is.
pub(crate) const TASK_ENV: &str = "nacre_executor";
pub(crate) use port::NAME as PORT_NAME;
const HEARTBEAT: Duration = Duration::from_secs(5);

/// The jobs that run, by number.
type Jobs = Arc<Mutex<HashMap<u32, Arc<Job>>>>;

/// Runs as the host's first process, or as the one that it starts.
///
/// # Errors
/// The host's port is missing or unreadable.
pub fn run() -> Result<()> {
    if getpid().is_init() { first_process() } else { serve() }
}

fn first_process() -> Result<()> {
    let program = env::current_exe().context("cannot find my own program")?;
    let server = Command::new(program).arg(TASK).spawn().context("cannot start the executor")?;
    let server = i32::try_from(server.id()).context("a process number beyond pid_t")?;
    while let Ok(ended) = wait(WaitOptions::empty()) {
        if ended.is_some_and(|(process, _)| process.as_raw_nonzero().get() == server) {
            break;
        }
    }
    sync();
    reboot(RebootCommand::PowerOff).context("cannot power off")
}

fn serve() -> Result<()> {
    let (port, mut reader) = Port::open()?;
    let port = Arc::new(port);
    port.send(NO_JOB, &Frame::Hello { boot_ms: uptime_ms()? })?;
    let beating = Arc::clone(&port);
    thread::spawn(move || {
        while beating.send(NO_JOB, &Frame::Heartbeat { busy: is_busy() }).is_ok() {
            thread::sleep(HEARTBEAT);
        }
    });
    let jobs = Jobs::default();
    let mut binds = Binds::default();
    loop {
        match read_frame(&mut reader)? {
            (NO_JOB, Frame::Stop) => {
                sync();
                port.send(NO_JOB, &Frame::Stop)?;
            }
            (number, Frame::Start(spec)) => {
                let started = binds
                    .make(&spec.binds)
                    .and_then(|()| job::start(number, &spec, Arc::clone(&port), Arc::clone(&jobs)));
                if let Err(error) = started {
                    port.send(number, &Frame::Refused(format!("{error:#}")))?;
                }
            }
            (number, frame) => {
                let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
                // A frame that crossed the job's end finds no job.
                if let Some(job) = job {
                    job.take(frame);
                }
            }
        }
    }
}

/// Whether there is any process beyond this program's two and the kernel's own: a job's, or one
/// that a job left behind, such as a detached sandbox. The kernel's, and what has ended, have no
/// command line.
fn is_busy() -> bool {
    let own = getpid().as_raw_nonzero().get();
    fs::read_dir("/proc").into_iter().flatten().flatten().any(|entry| {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        number.is_some_and(|number| number > 1 && number != own)
            && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
    })
}

fn uptime_ms() -> Result<u32> {
    let text = fs::read_to_string("/proc/uptime").context("cannot read the uptime")?;
    let (seconds, rest) = text.split_once('.').context("an uptime without a point")?;
    let hundredths = rest.get(..2).context("an uptime without hundredths")?;
    Ok(seconds.parse::<u32>()? * 1000 + hundredths.parse::<u32>()? * 10)
}
