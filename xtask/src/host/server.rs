//! The process that owns an emulated host, and passes frames between its port and its clients.
//!
//! A client is one connection and one job. The host lives until its only client is gone (private),
//! or until it is told to stop or was idle for long (kept): without a client, and without a process
//! that a job left behind, such as a detached sandbox's.
//!
//! ```text
//! client -- Start, input ... --> job number put in --> port --> executor in the host
//! client <-- output, Exited ---- by job number <------ port <--
//! ```

use super::machine::{Machine, Parts};
use super::progress::Progress;
use super::protocol::{Frame, NO_JOB, read_frame, write_frame};
use crate::report::say;
use crate::tool::tail;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A host that shows no sign of life for so long is ended. A busy machine runs one at a tenth of
/// its speed.
const SILENCE_MAX: Duration = Duration::from_secs(120);
const FAREWELL: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Whom the host serves.
#[derive(Debug)]
pub enum Clients {
    /// This one; the host ends with it.
    One(UnixStream),
    /// Whoever connects here.
    Many {
        /// Where.
        listener: UnixListener,
        /// How long the host may be idle.
        idle_max: Duration,
    },
}

enum Event {
    HostUp,
    HostBusy,
    HostStopped,
    PortEnded(String),
    ClientCame,
    ClientGone,
    StopAsked,
}

/// What the threads share: the way into the host, and the ways back to the clients.
struct Router {
    port: Mutex<UnixStream>,
    clients: Mutex<HashMap<u32, Sender<Frame>>>,
    events: Sender<Event>,
}

/// Boots a host and serves its clients until it is no longer wanted.
///
/// # Errors
/// The host does not come up, or stops by itself; the error quotes its console.
pub fn serve(parts: &Parts, clients: Clients, log: &Path) -> Result<()> {
    let progress = Arc::new(Progress::new());
    let mut machine = Machine::start(parts, log, &progress)?;
    let (events, happened) = channel();
    let router = Arc::new(Router {
        port: Mutex::new(machine.port.try_clone().context("cannot share the port")?),
        clients: Mutex::default(),
        events,
    });
    let from_host = machine.port.try_clone().context("cannot share the port")?;
    let (listening, watching) = (Arc::clone(&router), Arc::clone(&progress));
    thread::spawn(move || listening.listen_to_host(from_host, &watching));
    let served = watch(&mut machine, &router, clients, (&happened, &progress));
    if let Err(error) = served {
        let console = fs::read(log).unwrap_or_default();
        let console = tail(&String::from_utf8_lossy(&console));
        bail!("{error:#}\nthe end of its log {}:\n{console}", log.display());
    }
    // The log matters only after a failure.
    drop(fs::remove_file(log));
    Ok(())
}

fn watch(
    machine: &mut Machine,
    router: &Arc<Router>,
    clients: Clients,
    (happened, progress): (&Receiver<Event>, &Progress),
) -> Result<()> {
    let started = Instant::now();
    let idle_max = match &clients {
        Clients::One(_) => None,
        Clients::Many { idle_max, .. } => Some(*idle_max),
    };
    let mut waiting = Some(clients);
    let mut count = 0_usize;
    let mut idle_since = Instant::now();
    loop {
        match happened.recv_timeout(LOOK_EVERY) {
            Ok(Event::HostUp) => {
                let boot_ms = u32::try_from(started.elapsed().as_millis()).unwrap_or(u32::MAX);
                if let Some(clients) = waiting.take() {
                    router.admit(clients, boot_ms);
                }
                idle_since = Instant::now();
            }
            Ok(Event::HostBusy) => idle_since = Instant::now(),
            Ok(Event::ClientCame) => count += 1,
            Ok(Event::ClientGone) if idle_max.is_none() => return stop(router, happened),
            Ok(Event::ClientGone) => (count, idle_since) = (count - 1, Instant::now()),
            Ok(Event::StopAsked) => return stop(router, happened),
            Ok(Event::HostStopped) => {}
            Ok(Event::PortEnded(reason)) => {
                bail!(machine.ended().unwrap_or(reason));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        if let Some(end) = machine.ended() {
            bail!("the emulated host stopped by itself: {end}");
        }
        if progress.silence() > SILENCE_MAX {
            bail!("the emulated host made no progress for {} s", SILENCE_MAX.as_secs());
        }
        // One that still boots is not idle, however long that takes.
        let is_idle = waiting.is_none() && count == 0;
        if is_idle && idle_max.is_some_and(|idle_max| idle_since.elapsed() > idle_max) {
            return stop(router, happened);
        }
    }
}

/// Lets the host write back what it holds of this machine's files.
fn stop(router: &Router, happened: &Receiver<Event>) -> Result<()> {
    router.to_host(NO_JOB, &Frame::Stop)?;
    let deadline = Instant::now() + FAREWELL;
    loop {
        match happened.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Event::HostStopped) => return Ok(()),
            Ok(_) => {}
            Err(_) => {
                say("the emulated host did not stop in time and was ended");
                return Ok(());
            }
        }
    }
}

impl Router {
    fn to_host(&self, job: u32, frame: &Frame) -> Result<()> {
        write_frame(&mut *self.port.lock().unwrap_or_else(PoisonError::into_inner), job, frame)
    }

    fn tell(&self, event: Event) {
        // Nobody to hear it: the host is being stopped.
        drop(self.events.send(event));
    }

    fn listen_to_host(&self, mut port: UnixStream, progress: &Progress) {
        loop {
            let (job, frame) = match read_frame(&mut port) {
                Ok(read) => read,
                Err(error) => return self.tell(Event::PortEnded(format!("{error:#}"))),
            };
            progress.made();
            match frame {
                Frame::Hello { .. } => self.tell(Event::HostUp),
                Frame::Stop => self.tell(Event::HostStopped),
                Frame::Heartbeat { busy: true } => self.tell(Event::HostBusy),
                frame => {
                    let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(client) = clients.get(&job) {
                        // Its connection has just ended; the job will hear of it.
                        drop(client.send(frame));
                    }
                }
            }
        }
    }

    /// Serves the clients from now on, in threads of their own.
    fn admit(self: &Arc<Self>, clients: Clients, boot_ms: u32) {
        let router = Arc::clone(self);
        match clients {
            Clients::One(client) => {
                thread::spawn(move || router.serve_client(NO_JOB + 1, &client, boot_ms));
            }
            Clients::Many { listener, .. } => {
                thread::spawn(move || router.accept(&listener, boot_ms));
            }
        }
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener, boot_ms: u32) {
        for (job, client) in (NO_JOB + 1..).zip(listener.incoming()) {
            let Ok(client) = client else { return };
            let router = Arc::clone(self);
            thread::spawn(move || router.serve_client(job, &client, boot_ms));
        }
    }

    fn serve_client(&self, job: u32, client: &UnixStream, boot_ms: u32) {
        self.tell(Event::ClientCame);
        let (to_client, frames) = channel();
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).insert(job, to_client.clone());
        // A send fails only when the writer below is gone, and then the reader ends as well.
        drop(to_client.send(Frame::Hello { boot_ms }));
        drop(to_client);
        thread::scope(|scope| {
            scope.spawn(move || write_to_client(client, &frames));
            self.read_from_client(job, client);
            self.clients.lock().unwrap_or_else(PoisonError::into_inner).remove(&job);
        });
        self.tell(Event::ClientGone);
    }

    fn read_from_client(&self, job: u32, mut client: &UnixStream) {
        while let Ok((_, frame)) = read_frame(&mut client) {
            if frame == Frame::Stop {
                // Its connection ends when this process does, and so tells it.
                self.tell(Event::StopAsked);
                continue;
            }
            if self.to_host(job, &frame).is_err() {
                return;
            }
        }
        // For a job that has ended the host ignores it.
        drop(self.to_host(job, &Frame::Hangup));
    }
}

fn write_to_client(mut client: &UnixStream, frames: &Receiver<Frame>) {
    for frame in frames {
        if write_frame(&mut client, NO_JOB, &frame).is_err() {
            return;
        }
    }
}
