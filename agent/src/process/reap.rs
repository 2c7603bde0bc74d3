//! The one place that waits for children: PID 1 is the parent of everything that is orphaned.
//!
//! All children are reaped as they end. The end of one that somebody awaits is delivered; the end
//! of any other is dropped, unless a launch is under way, whose new process may end before its
//! number is known: then it is kept until the launch is over.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, WaitOptions, WaitStatus, pidfd_open, wait},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use crate::process::state::{Exit, Live};

/// Why a process can't be followed.
#[derive(Debug, thiserror::Error)]
#[error("can't get hold of process {pid}")]
pub(crate) struct FollowError {
    pid: i32,
    #[source]
    source: Errno,
}

#[derive(Debug, Default)]
struct Table {
    /// Processes whose end somebody waits for.
    awaited: HashMap<Pid, oneshot::Sender<Exit>>,
    /// Ends of processes that nobody has asked for yet; empty while `launches` is 0.
    unclaimed: HashMap<Pid, Exit>,
    /// How many launches are under way.
    launches: usize,
}

impl Table {
    fn ended(&mut self, pid: Pid, exit: Exit) {
        if let Some(waiter) = self.awaited.remove(&pid) {
            if waiter.send(exit).is_err() {
                log::debug!("nobody waits for {} any more", pid.as_raw_nonzero());
            }
        } else if self.launches > 0 {
            self.unclaimed.insert(pid, exit);
        }
    }
}

/// Reaps all children of this process.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    /// Shared by the reaping task and those who launch; held for a map operation only.
    table: Mutex<Table>,
}

/// A launch under way: ends are kept from its beginning.
#[derive(Debug)]
pub(crate) struct Launching<'a> {
    reaper: &'a Reaper,
}

impl Reaper {
    /// Announces that a process will be made whose number is not known yet.
    pub(crate) fn launching(&self) -> Launching<'_> {
        self.table().launches += 1;
        Launching { reaper: self }
    }

    /// Starts to reap, in a task of its own that lives as long as the runtime.
    ///
    /// # Errors
    ///
    /// Fails if SIGCHLD can't be listened to.
    pub(crate) fn start(self: &Arc<Self>) -> io::Result<()> {
        let children = signal(SignalKind::child())?;
        tokio::spawn(Arc::clone(self).run(children));
        Ok(())
    }

    async fn run(self: Arc<Self>, mut children: Signal) {
        // Those that ended before the signal was listened to.
        self.reap();
        while children.recv().await.is_some() {
            self.reap();
        }
    }

    /// Reaps all that have ended: one signal may stand for many.
    fn reap(&self) {
        loop {
            // Held across the (never blocking) call, so that a number in the table is a process.
            let mut table = self.table();
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => table.ended(pid, exit(status)),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    log::error!("can't wait for children: {error}");
                    return;
                }
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Map operations don't panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Launching<'_> {
    /// Takes the new process over: a hold on it unless it has ended, and the promise of its end.
    ///
    /// # Errors
    ///
    /// Fails if there is no such child.
    pub(crate) fn follow(
        &self,
        pid: Pid,
    ) -> Result<(Option<Live>, oneshot::Receiver<Exit>), FollowError> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.reaper.table();
        if let Some(exit) = table.unclaimed.remove(&pid) {
            table.awaited.insert(pid, sender);
            table.ended(pid, exit);
            return Ok((None, receiver));
        }
        let pidfd = pidfd_open(pid, PidfdFlags::empty())
            .map_err(|source| FollowError { pid: pid.as_raw_nonzero().get(), source })?;
        table.awaited.insert(pid, sender);
        Ok((Some(Live { pid, pidfd: Arc::new(pidfd) }), receiver))
    }
}

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.launches -= 1;
        if table.launches == 0 {
            table.unclaimed.clear();
        }
    }
}

/// Nanoseconds since the Unix epoch, now.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn exit(status: WaitStatus) -> Exit {
    let number =
        |value: Option<i32>| value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0);
    let signal = number(status.terminating_signal());
    let code = if signal == 0 { number(status.exit_status()) } else { 128 + signal };
    Exit { code, signal, at_ns: now_ns(), oom_killed: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { code: 1, signal: 0, at_ns: 0, oom_killed: false };

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    #[test]
    fn an_unknown_orphan_is_forgotten_when_nothing_is_launched() {
        let reaper = Reaper::default();
        reaper.table().ended(pid(7), EXIT);
        assert!(reaper.table().unclaimed.is_empty());
    }

    #[test]
    fn an_end_during_a_launch_is_kept_until_the_last_launch_is_over() {
        let reaper = Reaper::default();
        let first = reaper.launching();
        let second = reaper.launching();
        reaper.table().ended(pid(7), EXIT);
        drop(first);
        assert_eq!(reaper.table().unclaimed.get(&pid(7)), Some(&EXIT));
        drop(second);
        assert!(reaper.table().unclaimed.is_empty());
    }

    #[test]
    fn an_awaited_end_is_delivered() {
        let reaper = Reaper::default();
        let own = rustix::process::getpid();
        let launching = reaper.launching();
        let (live, mut end) = launching.follow(own).unwrap();
        assert_eq!(live.unwrap().pid, own);
        reaper.table().ended(own, EXIT);
        assert_eq!(end.try_recv().unwrap(), EXIT);
    }

    #[test]
    fn a_process_that_ended_before_it_was_known_is_not_lost() {
        let reaper = Reaper::default();
        let launching = reaper.launching();
        reaper.table().ended(pid(7), EXIT);
        let (live, mut end) = launching.follow(pid(7)).unwrap();
        assert!(live.is_none());
        assert_eq!(end.try_recv().unwrap(), EXIT);
    }
}
