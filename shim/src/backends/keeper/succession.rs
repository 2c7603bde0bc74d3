//! From one process of a device to the next: the old one is let go of, the new one is given what was
//! kept and brought to the VMM.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use nacre_proto::vmm::{Command, Outcome};
use rustix::process::Signal;
use tokio::time::timeout;

use crate::{
    backends::{
        BackendError,
        keeper::{CUT_OFF_GRACE, Failed, Keeper, SEEN_WITHIN, gone, is_farewell, lost},
        kind::Role,
        process::{Process, how_ended, ready},
    },
    error_chain, log_file,
    vmm::VmmError,
};

/// How long a successor may take until it is ready, if its predecessor was let go of in order.
pub(super) const SOON: Duration = Duration::from_secs(20);
/// How long the VMM may take to tell a successor all that it has to know.
const TAKEN_WITHIN: Duration = Duration::from_secs(60);
/// How long a device may take to end what is in flight.
const QUIET_WITHIN: Duration = Duration::from_secs(60);

impl Keeper {
    /// Has the VMM let go of the process, or finds that it has lost it. Fails with the VMM's words
    /// if the process is to stay.
    pub(super) async fn quiesce(&mut self, process: &mut Process) -> Result<(), String> {
        let device = self.blueprint.device.id().to_owned();
        let answer = tokio::select! {
            biased;
            answer = self.link.ask(Command::Quiesce { device }, &[], QUIET_WITHIN) => answer,
            _fault = self.estate.keep_taking(&mut process.counter) => return Ok(()),
        };
        match answer.map(|answer| answer.outcome) {
            Ok(Outcome::Done) => self.is_awaited = true,
            Ok(Outcome::Refused(why)) => {
                let is_lost = self.news.borrow().lost.number > self.settled
                    || process.child.ended_within(Duration::ZERO).await.is_some();
                if !is_lost {
                    return Err(log_file::printable(&why));
                }
            }
            Ok(Outcome::Status(_) | Outcome::Added { .. }) => {
                return Err("not what was asked for".to_owned());
            }
            Err(error) => {
                log::warn!("{} is not let go of: {}", self.blueprint.name, error_chain(&error));
            }
        }
        Ok(())
    }

    /// Starts `program`, which has to be ready within `limit`, and has the VMM take it.
    pub(super) async fn attempt(
        &mut self,
        program: &Path,
        limit: Duration,
    ) -> Result<Process, Failed> {
        let process = self.start(program, Role::Successor, limit).await?;
        self.program = program.to_owned();
        self.desk.serves(program);
        Ok(process)
    }

    /// Starts what fails the device's requests, and has the VMM take it.
    pub(super) async fn attempt_stand_in(&mut self) -> Result<Process, Failed> {
        let process = self.start(&self.program.clone(), Role::StandIn, SOON).await?;
        self.desk.fails();
        Ok(process)
    }

    async fn start(
        &mut self,
        program: &Path,
        role: Role,
        limit: Duration,
    ) -> Result<Process, Failed> {
        let (mut process, socket) = self.blueprint.start(program, &self.estate, role)?;
        self.desk.started(process.child.record());
        let mut news = self.news.clone();
        let brought_up = tokio::select! {
            biased;
            brought_up = self.bring_up(&mut process, socket, limit) => brought_up,
            () = gone(&mut news) => Err(Failed::Over),
        };
        match brought_up {
            Ok(number) => {
                (self.settled, self.is_awaited) = (number, false);
                self.serves_since = Instant::now();
                Ok(process)
            }
            Err(failed) => {
                process.end(Signal::KILL, Duration::ZERO, &mut self.estate).await;
                self.desk.lost();
                Err(failed)
            }
        }
    }

    /// Hands a new process all that is kept for it, then hands it to the VMM. Answers the number of
    /// the VMM's answer.
    async fn bring_up(
        &mut self,
        process: &mut Process,
        socket: OwnedFd,
        limit: Duration,
    ) -> Result<u64, Failed> {
        let Process { child, counter, ready: pipe } = process;
        let handed = timeout(limit, self.estate.hand_over(counter)).await;
        match handed.map_err(|_elapsed| BackendError::NotReady(self.blueprint.name.clone()))? {
            Ok(()) => {}
            Err(error) => match timeout(SEEN_WITHIN, how_ended(child)).await {
                Ok(ended) => return Err(ended.into()),
                Err(_elapsed) => return Err(self.blueprint.prepare()(error).into()),
            },
        }
        let (link, news) = (&self.link, &mut self.news);
        let (settled, is_awaited) = (self.settled, &mut self.is_awaited);
        let device = self.blueprint.device.id().to_owned();
        let work = async {
            ready(child, pipe, limit).await?;
            if !*is_awaited {
                // If it does not tell, it says what is wrong when it is asked.
                *is_awaited = timeout(SEEN_WITHIN, lost(news, settled)).await.is_ok();
            }
            let request = Command::Reconnect { device };
            Ok::<_, BackendError>(link.ask(request, &[socket.as_fd()], TAKEN_WITHIN).await)
        };
        let answer = tokio::select! {
            biased;
            answer = work => answer?,
            fault = self.estate.keep_taking(counter) => {
                return Err(BackendError::Store { name: self.blueprint.name.clone(), fault }.into());
            }
        };
        drop(socket);
        let source = match answer {
            Err(error) if error.is_hang_up() => return Err(Failed::Over),
            Err(error) => error,
            Ok(answer) => match answer.outcome {
                Outcome::Done => return Ok(answer.number),
                Outcome::Refused(why) => VmmError::Refused(log_file::printable(&why)),
                Outcome::Status(_) | Outcome::Added { .. } => {
                    VmmError::Refused("not what was asked for".to_owned())
                }
            },
        };
        // If it died, that is what the VMM has seen.
        let ended = timeout(CUT_OFF_GRACE, how_ended(child)).await.ok();
        let name = self.blueprint.name.clone();
        let own = ended.filter(|error| !is_farewell(error));
        Err(own.unwrap_or(BackendError::NotTaken { name, source }).into())
    }
}
