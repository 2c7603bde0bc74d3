//! The process's threads: the workers, the protocol's, and the main one that waits for all.
//!
//! ```text
//!            .- worker 0 ... n: serve queues        (never end, but by a fault)
//!   main ----+
//!    waits   `- protocol: one frontend at a time  (ends with a connected socket)
//!    for SIGTERM, SIGINT, SIGHUP and for the end of any of them
//! ```
//!
//! A thread that ends, by an error or by a panic, ends the process: a device whose queue nobody
//! serves any more must not look alive.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

use nacre_proto::exit::BackendExit;
use rustix::event::{PollFd, PollFlags, poll};

use super::jail::{Cell, Jail, JailError};
use super::signals::{Asked, Signals};
use super::socket::Socket;
use crate::device::{Device, DeviceError, QueueIndex, Worker};
use crate::doorbell::Doorbell;
use crate::logging::chain;
use crate::protocol::{self, SharedSession};
use crate::session::Session;
use crate::worker::{Handle, Thread};

/// Why the threads can't be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum ThreadsError {
    #[error("the device's groups are no partition of its {count} queues")]
    Groups { count: u16 },
    #[error("cannot make a worker")]
    Worker(#[from] DeviceError),
    #[error("cannot start a thread")]
    Start(#[from] io::Error),
    #[error("cannot close the jail of a thread")]
    Jail(#[from] JailError),
    #[error("a thread ended before it served")]
    Early,
}

/// What a thread tells the main one.
enum News {
    /// It is in its jail.
    Jailed,
    /// It could not get that far.
    Failed(ThreadsError),
    /// It ended; its fault has been logged.
    Ended(BackendExit),
}

/// A thread's end of the line to the main one.
#[derive(Clone)]
struct Line {
    news: Sender<News>,
    bell: Arc<Doorbell>,
}

impl Line {
    fn tell(&self, news: News) {
        // If the main thread is gone, so is the process.
        if self.news.send(news).is_ok()
            && let Err(error) = self.bell.ring()
        {
            log::error!("cannot wake the main thread: {error}");
        }
    }
}

/// The running threads, as the main one sees them.
pub(super) struct Threads {
    news: Receiver<News>,
    bell: Arc<Doorbell>,
    line: Line,
    jail: Arc<Jail>,
    started: usize,
    /// Rung to have the device look again at what it stands for.
    refresh: Arc<Doorbell>,
    /// Holds the protocol thread back, until it is sent something.
    gate: Option<Sender<()>>,
}

/// The workers of a device, each with the thread that it will run on.
type Workers<W> = (Vec<Thread<W>>, Vec<Handle>);

impl Threads {
    pub(super) fn new(jail: Jail) -> Result<Self, ThreadsError> {
        let (sender, news) = mpsc::channel();
        let bell = Arc::new(Doorbell::make()?);
        let line = Line { news: sender, bell: Arc::clone(&bell) };
        let refresh = Arc::new(Doorbell::make()?);
        Ok(Self { news, bell, line, jail: Arc::new(jail), started: 0, refresh, gate: None })
    }

    /// Makes a device's workers; still outside the jail.
    pub(super) fn workers<D: Device>(device: &mut D) -> Result<Workers<D::Worker>, ThreadsError> {
        let groups = device.groups();
        check_groups(&groups, device.queue_count())?;
        let mut workers: Workers<D::Worker> = (Vec::new(), Vec::new());
        for (number, group) in groups.into_iter().enumerate() {
            let (thread, handle) = Thread::new(device.worker(number)?, group)?;
            workers.0.push(thread);
            workers.1.push(handle);
        }
        Ok(workers)
    }

    /// Starts all threads and waits until each is in its jail, the calling one too. No frontend
    /// is served yet: nothing that comes from outside is looked at before the jail is closed.
    pub(super) fn start<D: Device>(
        &mut self,
        device: D,
        workers: Workers<D::Worker>,
        socket: Socket,
    ) -> Result<(), ThreadsError> {
        let (threads, handles) = workers;
        for (number, thread) in threads.into_iter().enumerate() {
            self.start_worker(number, thread)?;
        }
        let groups = device.groups();
        let session = Arc::new(Mutex::new(Session::new(device, handles, &groups)));
        let (gate, opened) = mpsc::channel();
        self.gate = Some(gate);
        let refresh = Arc::clone(&self.refresh);
        self.spawn("protocol".to_owned(), Cell::Protocol, move |jailed| {
            jailed()?;
            opened.recv().map_err(|_error| ThreadsError::Early)?;
            Ok(accept(socket, &session, &refresh))
        })?;
        for _thread in 0..self.started {
            match self.news.recv() {
                Ok(News::Jailed) => {}
                Ok(News::Failed(error)) => return Err(error),
                Ok(News::Ended(_)) | Err(_) => return Err(ThreadsError::Early),
            }
        }
        Ok(self.jail.close_thread(Cell::Main)?)
    }

    fn start_worker<W: Worker>(
        &mut self,
        number: usize,
        mut thread: Thread<W>,
    ) -> Result<(), ThreadsError> {
        self.spawn(format!("worker-{number}"), Cell::Worker, move |jailed| {
            thread.prepare()?;
            jailed()?;
            if let Err(error) = thread.run() {
                log::error!("worker {number} ends: {}", chain(&error));
            }
            Ok(BackendExit::WorkerDied)
        })
    }

    /// Starts a thread. `run` gets a function that closes the jail and says so.
    fn spawn(
        &mut self,
        name: String,
        cell: Cell,
        run: impl FnOnce(&dyn Fn() -> Result<(), JailError>) -> Result<BackendExit, ThreadsError>
        + Send
        + 'static,
    ) -> Result<(), ThreadsError> {
        let (line, jail) = (self.line.clone(), Arc::clone(&self.jail));
        thread::Builder::new().name(name).spawn(move || {
            let jailed = || {
                jail.close_thread(cell)?;
                line.tell(News::Jailed);
                Ok(())
            };
            let news = match catch_unwind(AssertUnwindSafe(|| run(&jailed))) {
                Ok(Ok(exit)) => News::Ended(exit),
                Ok(Err(error)) => News::Failed(error),
                Err(_panic) => News::Ended(match cell {
                    Cell::Worker => BackendExit::WorkerDied,
                    Cell::Main | Cell::Protocol => BackendExit::Failed,
                }),
            };
            line.tell(news);
        })?;
        self.started += 1;
        Ok(())
    }

    /// Lets frontends in.
    pub(super) fn serve(&mut self) -> Result<(), ThreadsError> {
        let gate = self.gate.take().ok_or(ThreadsError::Early)?;
        gate.send(()).map_err(|_error| ThreadsError::Early)
    }

    fn ask_to_refresh(&self) {
        if let Err(error) = self.refresh.ring() {
            log::warn!("cannot wake the protocol thread: {error}");
        }
    }

    /// Waits for a signal to end, or for the end of a thread.
    pub(super) fn wait(&self, signals: &Signals) -> BackendExit {
        loop {
            self.bell.hear();
            match signals.next() {
                Some(Asked::End) => return BackendExit::Done,
                Some(Asked::Refresh) => self.ask_to_refresh(),
                None => {}
            }
            match self.news.try_recv() {
                Ok(News::Ended(exit)) => return exit,
                Ok(News::Failed(error)) => {
                    log::error!("{}", chain(&error));
                    return BackendExit::Failed;
                }
                Ok(News::Jailed) => continue,
                Err(_) => {}
            }
            let (bell, signal) = (self.bell.as_fd(), signals.as_fd());
            let mut fds = [PollFd::new(&bell, PollFlags::IN), PollFd::new(&signal, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("cannot wait for the threads: {error}");
                    return BackendExit::Failed;
                }
            }
        }
    }
}

/// Serves frontends for as long as there can be any.
fn accept<D: Device>(
    socket: Socket,
    session: &SharedSession<D>,
    refresh: &Doorbell,
) -> BackendExit {
    let served = match socket {
        Socket::Connected(stream) => protocol::serve(stream, session, refresh),
        Socket::Listening(listener) => loop {
            match listener.accept() {
                Ok((stream, _address)) => {
                    if let Err(gone) = protocol::serve(stream, session, refresh) {
                        break Err(gone);
                    }
                }
                Err(error) if passing(&error) => {}
                Err(error) => {
                    log::error!("cannot accept a frontend: {error}");
                    return BackendExit::Failed;
                }
            }
        },
    };
    match served {
        Ok(()) => BackendExit::Done,
        Err(gone) => {
            log::error!("{}", chain(&gone));
            BackendExit::WorkerDied
        }
    }
}

/// Whether the next attempt to accept may succeed.
fn passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}

fn check_groups(groups: &[Vec<QueueIndex>], count: u16) -> Result<(), ThreadsError> {
    let mut queues: Vec<u16> = groups.iter().flatten().map(|QueueIndex(queue)| *queue).collect();
    queues.sort_unstable();
    if queues.into_iter().eq(0..count) && groups.iter().all(|group| !group.is_empty()) {
        return Ok(());
    }
    Err(ThreadsError::Groups { count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_to_cover_every_queue_exactly_once() {
        let group = |queues: &[u16]| queues.iter().map(|queue| QueueIndex(*queue)).collect();
        assert!(check_groups(&[group(&[0, 2]), group(&[1])], 3).is_ok());
        for bad in [vec![group(&[0])], vec![group(&[0, 1]), group(&[1])], vec![group(&[0, 2])]] {
            assert!(check_groups(&bad, 2).is_err(), "{bad:?}");
        }
        assert!(check_groups(&[group(&[0, 1]), group(&[])], 2).is_err());
    }
}
