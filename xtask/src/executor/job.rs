//! One job: its process, and the threads that carry its streams.
//!
//! Its process leads a session, so that a signal can reach all of it. The job is over when that
//! process is and all that was written before is sent; what a daemon that it left behind writes
//! later is nobody's output.

use super::port::Port;
use super::{Jobs, SHARE};
use crate::host::protocol::{CHUNK_BYTES, Ending, Frame, JobSpec, Stream, TerminalSize};
use crate::host::window::Window;
use crate::sys::leads_session;
use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// How long a job whose client is gone may take to end by itself.
const FAREWELL: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
const END_OF_TRANSMISSION: &[u8] = &[4];
const BASE_ENV: &[(&str, &str)] = &[
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
    // The machine's whole file system, as a job finds it.
    ("NACRE_HOST_SHARE", SHARE),
];

/// A job that runs.
#[derive(Debug)]
pub(super) struct Job {
    leader: Pid,
    terminal: Option<OwnedFd>,
    /// Where input goes; none after its end.
    input: Mutex<Option<Sender<Vec<u8>>>>,
    output: Outlet,
    error: Outlet,
    /// Readable from the moment on which the process has ended.
    ended: OwnedFd,
}

/// What concerns one output stream.
#[derive(Debug)]
struct Outlet {
    window: Window,
    /// Readable from the moment on which nobody wants the stream any more.
    closed: OwnedFd,
}

/// The ends of the job's streams that stay with us.
struct Ends {
    input: File,
    outputs: Vec<(Stream, File)>,
    terminal: Option<OwnedFd>,
}

/// Starts the job and the threads that serve it.
pub(super) fn start(number: u32, spec: &JobSpec, port: Arc<Port>, jobs: Jobs) -> Result<()> {
    let (child, ends) = spawn(spec)?;
    let leader = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no process")?;
    let (sender, receiver) = channel();
    let job = Arc::new(Job {
        leader,
        terminal: ends.terminal,
        input: Mutex::new(Some(sender)),
        output: Outlet::new()?,
        error: Outlet::new()?,
        ended: event()?,
    });
    jobs.lock().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::clone(&job));
    let (input_port, is_terminal) = (Arc::clone(&port), job.terminal.is_some());
    thread::spawn(move || feed(number, &receiver, ends.input, &input_port, is_terminal));
    let outputs: Vec<_> = ends
        .outputs
        .into_iter()
        .map(|(stream, file)| {
            let (job, port) = (Arc::clone(&job), Arc::clone(&port));
            thread::spawn(move || job.carry(number, stream, file, &port))
        })
        .collect();
    thread::spawn(move || see_out(number, &job, child, outputs, (&port, &jobs)));
    Ok(())
}

impl Job {
    /// Acts on a frame that came for this job.
    pub(super) fn take(&self, frame: Frame) {
        match frame {
            Frame::Bytes(Stream::Input, bytes) => {
                let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(input) = &*input {
                    // The thread that feeds the job ends after the input does, not before.
                    drop(input.send(bytes));
                }
            }
            Frame::InputEnd => {
                self.input.lock().unwrap_or_else(PoisonError::into_inner).take();
            }
            Frame::Credit(Stream::Output, bytes) => self.output.window.give(bytes),
            Frame::Credit(Stream::Error, bytes) => self.error.window.give(bytes),
            // Its other end is its input as well: nothing less than its end closes it.
            Frame::OutputClosed(_) if self.terminal.is_some() => self.hang_up(),
            Frame::OutputClosed(Stream::Error) => self.error.close(),
            Frame::OutputClosed(Stream::Output) => self.output.close(),
            Frame::Resize(size) => {
                if let Some(terminal) = &self.terminal {
                    // The terminal may be gone by now; the job's end says so.
                    tcsetwinsize(terminal, winsize(size)).unwrap_or_default();
                }
            }
            Frame::Signal { number, group } => self.signal(Signal::from_named_raw(number), group),
            Frame::Hangup => self.hang_up(),
            Frame::Hello { .. }
            | Frame::Heartbeat { .. }
            | Frame::Stop
            | Frame::Start(_)
            | Frame::Refused(_)
            | Frame::Bytes(..)
            | Frame::Credit(Stream::Input, _)
            | Frame::OutputClosed(Stream::Input)
            | Frame::Exited(_) => {}
        }
    }

    fn signal(&self, signal: Option<Signal>, group: bool) {
        let Some(signal) = signal else { return };
        let send = if group { kill_process_group } else { kill_process };
        // Nobody to get it: the job has just ended.
        send(self.leader, signal).unwrap_or_default();
    }

    /// Nobody listens any more: ends the job, by force if it does not end itself.
    fn hang_up(&self) {
        self.output.close();
        self.error.close();
        self.input.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.signal(Some(Signal::TERM), false);
        let Ok(ended) = self.ended.try_clone() else { return };
        let leader = self.leader;
        thread::spawn(move || {
            if poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&FAREWELL)) == Ok(0) {
                kill_process_group(leader, Signal::KILL).unwrap_or_default();
            }
        });
    }

    /// Carries one output stream until its end, until nobody wants it any more, or until nothing
    /// is left after the job's end. Closes it then: whoever still writes finds a broken pipe.
    fn carry(&self, number: u32, stream: Stream, mut file: File, port: &Port) {
        let outlet = if stream == Stream::Error { &self.error } else { &self.output };
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Some(allowed) = outlet.window.take() {
            if !self.wait_readable(&file, outlet) {
                return;
            }
            // A terminal's end is an error (EIO).
            let Ok(read) = file.read(&mut buffer[..allowed]) else { return };
            let unused = u32::try_from(allowed - read).unwrap_or(0);
            if read == 0 {
                return;
            }
            outlet.window.give(unused);
            let bytes = Frame::Bytes(stream, buffer[..read].to_vec());
            if port.send(number, &bytes).is_err() {
                return;
            }
        }
    }

    /// Waits for something to read; false when the job has ended and left nothing, and when
    /// nobody wants it.
    fn wait_readable(&self, file: &File, outlet: &Outlet) -> bool {
        let mut all = [file.as_fd(), self.ended.as_fd(), outlet.closed.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        loop {
            match poll(&mut all, None) {
                Ok(_) if !all[2].revents().is_empty() => return false,
                Ok(_) if !all[0].revents().is_empty() => return true,
                // What the job wrote just before its end came after the first look at the stream.
                Ok(_) if !all[1].revents().is_empty() => {
                    let mut again = [PollFd::new(file, PollFlags::IN)];
                    return poll(&mut again, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1);
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl Outlet {
    fn new() -> Result<Self> {
        Ok(Self { window: Window::new(), closed: event()? })
    }

    fn close(&self) {
        self.window.close();
        // Fails only for a counter at its end, which is readable as well.
        rustix::io::write(&self.closed, &1u64.to_ne_bytes()).ok();
    }
}

fn event() -> Result<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an event")
}

fn spawn(spec: &JobSpec) -> Result<(Child, Ends)> {
    let (program, arguments) = spec.argv.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&spec.folder).env_clear();
    command.envs(BASE_ENV.iter().copied()).envs(spec.env.iter().cloned());
    let cannot = || format!("cannot run {program} in {}", spec.folder.display());
    if let Some(size) = spec.terminal {
        let (ours, theirs) = open_terminal(size).context("cannot make a terminal")?;
        command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
        leads_session(&mut command, true, Vec::new());
        let child = command.spawn().with_context(cannot)?;
        let terminal = ours.as_fd().try_clone_to_owned()?;
        let outputs = vec![(Stream::Output, ours.try_clone()?)];
        return Ok((child, Ends { input: ours, outputs, terminal: Some(terminal) }));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    leads_session(&mut command, false, Vec::new());
    let mut child = command.spawn().with_context(cannot)?;
    let file = |fd: Option<OwnedFd>| fd.map(File::from).context("a stream is missing");
    let input = file(child.stdin.take().map(Into::into))?;
    let outputs = vec![
        (Stream::Output, file(child.stdout.take().map(Into::into))?),
        (Stream::Error, file(child.stderr.take().map(Into::into))?),
    ];
    Ok((child, Ends { input, outputs, terminal: None }))
}

fn open_terminal(size: TerminalSize) -> Result<(File, File)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?.into_string()?;
    let theirs = File::options().read(true).write(true).open(name)?;
    tcsetwinsize(&ours, winsize(size))?;
    Ok((File::from(ours), theirs))
}

fn winsize(size: TerminalSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Writes input to the job; what the job no longer takes is thrown away, with credit for it.
fn feed(number: u32, bytes: &Receiver<Vec<u8>>, mut to: File, port: &Port, is_terminal: bool) {
    let mut open = true;
    for bytes in bytes {
        open = open && to.write_all(&bytes).is_ok();
        let credit = Frame::Credit(Stream::Input, u32::try_from(bytes.len()).unwrap_or(0));
        if port.send(number, &credit).is_err() {
            return;
        }
    }
    if open && is_terminal {
        drop(to.write_all(END_OF_TRANSMISSION));
    }
}

/// Waits for the job's end, then for its streams', and reports.
fn see_out(
    number: u32,
    job: &Job,
    mut child: Child,
    outputs: Vec<JoinHandle<()>>,
    (port, jobs): (&Port, &Jobs),
) {
    // Not reaped yet: until the job is off the list, its process number stays taken.
    waitid(WaitId::Pid(job.leader), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).ok();
    rustix::io::write(&job.ended, &1u64.to_ne_bytes()).ok();
    for output in outputs {
        drop(output.join());
    }
    jobs.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
    job.input.lock().unwrap_or_else(PoisonError::into_inner).take();
    let ending = child.wait().map_or(Ending::Code(u8::MAX), |status| match status.signal() {
        Some(signal) => Ending::Signal(signal),
        None => Ending::Code(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(u8::MAX)),
    });
    // If the port is gone, so is the host.
    drop(port.send(number, &Frame::Exited(ending)));
}
