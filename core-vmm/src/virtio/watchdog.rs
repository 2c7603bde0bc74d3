//! Bounds how long a conversation with a backend may take.
//!
//! A backend may hang, or send one byte an hour. The vhost crate's receive loop takes a socket's
//! time-out for a reason to try again, so a time-out on the socket bounds nothing. What always ends
//! it is a shutdown of the socket, and that takes a second thread: one for the whole VMM. It sleeps
//! unless a conversation is under way.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::locked;

/// Enough for a loop and a log line.
const STACK_BYTES: usize = 128 << 10;

/// A handle on the watchdog's thread, which ends with the process or the last handle.
#[derive(Clone, Debug)]
pub struct Watchdog {
    shared: Arc<Shared>,
    /// Dropped with the last handle; the thread then ends.
    _alive: Arc<Alive>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Locked by whoever begins or ends a conversation, and by the thread.
    watched: Mutex<Watched>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Watched {
    conversations: Vec<Arc<Conversation>>,
    ended: bool,
}

#[derive(Debug)]
struct Conversation {
    socket: UnixStream,
    deadline: Instant,
    expired: AtomicBool,
}

#[derive(Debug)]
struct Alive(Arc<Shared>);

/// A conversation under way; dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    conversation: Arc<Conversation>,
}

/// Until when several conversations may take, all together.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// From now on.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self { at: Instant::now() + limit, limit }
    }

    /// How long it was at the start.
    #[must_use]
    pub fn limit_ms(&self) -> u128 {
        self.limit.as_millis()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        locked(&self.watched)
    }
}

impl Watchdog {
    /// Starts the thread, which begins by doing `prepare`: it is started before the process jails
    /// itself, as backends are talked to before, so it has to go into the jail by itself. From
    /// there on it calls nothing but `futex`, `shutdown` and what memory and the log take.
    ///
    /// # Errors
    ///
    /// Fails if no thread can be started, or `prepare` fails.
    pub fn start(prepare: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let (prepared, outcome) = mpsc::sync_channel(1);
        let body = move || {
            let result = prepare();
            let watching = result.is_ok();
            if prepared.send(result).is_ok() && watching {
                own.watch();
            }
        };
        let _detached = thread::Builder::new()
            .name("watchdog".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(body)?;
        // The other end is gone only if `prepare` panicked.
        outcome.recv().unwrap_or_else(|error| Err(io::Error::other(error)))?;
        Ok(Self { _alive: Arc::new(Alive(Arc::clone(&shared))), shared })
    }

    /// Shuts `socket` down unless the returned [`Watch`] is dropped by `deadline`.
    ///
    /// # Errors
    ///
    /// Fails if the process has no descriptor left.
    pub fn watch(&self, socket: &UnixStream, deadline: Deadline) -> io::Result<Watch> {
        let conversation = Arc::new(Conversation {
            socket: socket.try_clone()?,
            deadline: deadline.at,
            expired: AtomicBool::new(false),
        });
        self.shared.lock().conversations.push(Arc::clone(&conversation));
        self.shared.changed.notify_one();
        Ok(Watch { shared: Arc::clone(&self.shared), conversation })
    }
}

impl Watch {
    /// Whether the time ran out and the socket was shut down.
    #[must_use]
    pub fn expired(&self) -> bool {
        self.conversation.expired.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.shared.lock();
        watched.conversations.retain(|other| !Arc::ptr_eq(other, &self.conversation));
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn watch(&self) {
        let mut watched = self.lock();
        while !watched.ended {
            let now = Instant::now();
            for late in watched.conversations.extract_if(.., |watched| watched.deadline <= now) {
                late.expired.store(true, Ordering::Release);
                if let Err(error) = late.socket.shutdown(Shutdown::Both) {
                    log::debug!("cannot shut a backend's socket down: {error}");
                }
            }
            let next = watched.conversations.iter().map(|watched| watched.deadline).min();
            watched = match next {
                None => self.changed.wait(watched).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let wait = deadline.saturating_duration_since(Instant::now());
                    let result = self.changed.wait_timeout(watched, wait);
                    result.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_silent_peer_is_cut_off_when_the_time_is_over() {
        let watchdog = Watchdog::start(|| Ok(())).unwrap();
        let (mut socket, _silent) = UnixStream::pair().unwrap();
        let watch = watchdog.watch(&socket, Deadline::after(Duration::from_millis(20))).unwrap();
        assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
        assert!(watch.expired());
    }

    #[test]
    fn a_conversation_that_ends_in_time_keeps_its_socket() {
        let watchdog = Watchdog::start(|| Ok(())).unwrap();
        let (mut kept, peer) = UnixStream::pair().unwrap();
        let (mut cut, _silent) = UnixStream::pair().unwrap();
        let long = watchdog.watch(&kept, Deadline::after(Duration::from_secs(60))).unwrap();
        drop(watchdog.watch(&kept, Deadline::after(Duration::from_millis(1))).unwrap());
        let short = watchdog.watch(&cut, Deadline::after(Duration::from_millis(20))).unwrap();
        assert_eq!(cut.read(&mut [0; 1]).unwrap(), 0, "the later, shorter one is seen");
        assert!(short.expired() && !long.expired());
        (&peer).write_all(b"x").unwrap();
        kept.read_exact(&mut [0; 1]).unwrap();
    }

    #[test]
    fn a_thread_that_cannot_prepare_is_an_error() {
        assert!(Watchdog::start(|| Err(io::ErrorKind::PermissionDenied.into())).is_err());
    }

    #[test]
    fn the_thread_ends_with_the_last_handle() {
        let watchdog = Watchdog::start(|| Ok(())).unwrap();
        let shared = Arc::downgrade(&watchdog.shared);
        drop(watchdog.clone());
        assert!(!watchdog.shared.lock().ended);
        drop(watchdog);
        let deadline = Instant::now() + Duration::from_secs(5);
        while shared.strong_count() > 0 {
            assert!(Instant::now() < deadline, "the thread still holds the state");
            thread::yield_now();
        }
    }
}
