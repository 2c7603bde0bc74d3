//! Keeps one device served: watches its process, and puts another one in its place.
//!
//! ```text
//!            died, cut off by the VMM, broke its store's rules
//!   Serving ---------------------------------------------------> Lost --- too many failures -> given up
//!    |   ^                                                        |  ^
//!    |   |            the VMM has taken the new process           |  | ended, refused: a pause,
//!    |   +-------------------------------- Starting <-------------+  | longer each time
//!    |                                      |  ^ `-------------------+
//!    +-- asked: quiesced, ended in order ---|--+
//!                                           `-- asked, and the new program does not serve: the old one
//! ```
//!
//! Where a disk's image is gone, a stand-in that fails all requests serves instead of giving up.
//!
//! A new process is never started before the old one is gone, with all that it left taken in: two
//! of them would act on one resource. When the VMM hangs up, or has the device no more, it is over, in
//! every state.

mod succession;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use nacre_proto::exit::BackendExit;
use rustix::process::Signal;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    backends::{
        BackendError, ReplaceError, StoreFault,
        estate::Estate,
        handle::{Desk, Order},
        patience::{Cause, Patience},
        process::{Blueprint, Process, how_ended},
    },
    child::End,
    error_chain,
    vmm::{DeviceNews, Link},
};
use succession::SOON;

/// How long a process that was asked to end may take, before it is made to.
const GRACE: Duration = Duration::from_secs(10);
/// How long a process that the VMM has cut off may take to end by itself.
const CUT_OFF_GRACE: Duration = Duration::from_millis(200);
/// How long the VMM may take to see what is seen here.
const SEEN_WITHIN: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(super) struct Keeper {
    blueprint: Blueprint,
    estate: Estate,
    /// What the next process is started from.
    program: PathBuf,
    link: Link,
    news: watch::Receiver<DeviceNews>,
    desk: Desk,
    patience: Patience,
    /// Losses up to this number are over and done with.
    settled: u64,
    /// Whether the VMM is known to wait for a process.
    is_awaited: bool,
    serves_since: Instant,
}

/// What ended [`Keeper::serve`].
enum Change {
    /// The process is gone.
    Died(Death),
    /// Somebody wants another one.
    Ordered(Order, Process),
    /// The VMM is gone.
    Over(Process),
}

/// The end of a process that was not asked to.
struct Death {
    error: BackendError,
    noticed: Instant,
    served: Duration,
}

/// Why an attempt came to nothing.
enum Failed {
    /// The process was not good for it.
    Backend(BackendError),
    /// The VMM is gone.
    Over,
}

impl From<BackendError> for Failed {
    fn from(error: BackendError) -> Self {
        Self::Backend(error)
    }
}

/// What happens to a process that serves.
enum Seen {
    Ended(BackendError),
    Lost(Option<String>),
    Misused(StoreFault),
    Ordered(Order),
}

/// What ends a pause.
enum Woken {
    ByTime,
    ByOrder(Order),
    Over,
}

impl Keeper {
    /// A keeper of a device whose first process is known to the VMM.
    pub(super) fn new(blueprint: Blueprint, estate: Estate, link: Link, desk: Desk) -> Self {
        let news = link.news(blueprint.device.id());
        Self {
            program: blueprint.program(),
            blueprint,
            estate,
            link,
            news,
            desk,
            patience: Patience::default(),
            settled: 0,
            is_awaited: false,
            serves_since: Instant::now(),
        }
    }

    /// Keeps the device served until the VMM is gone, or has it no more.
    ///
    /// # Errors
    ///
    /// Fails if the device can't be served any more.
    pub(super) async fn keep(self, process: Process) -> Result<(), BackendError> {
        let news = self.news.clone();
        let kept = self.keep_until_over(process).await;
        match kept {
            // Nobody needs it any more, so nothing is lost with its process.
            Err(error) if news.borrow().is_removed => {
                log::debug!("removed, and before that: {error}");
                Ok(())
            }
            kept => kept,
        }
    }

    async fn keep_until_over(mut self, process: Process) -> Result<(), BackendError> {
        let mut serving = process;
        loop {
            let next = match self.serve(serving).await {
                Change::Died(death) => self.revive(death).await?,
                Change::Ordered(order, process) => self.replace(order, process).await?,
                Change::Over(process) => {
                    process.end(Signal::TERM, GRACE, &mut self.estate).await;
                    None
                }
            };
            match next {
                Some(process) => serving = process,
                None => return Ok(()),
            }
        }
    }

    async fn serve(&mut self, mut process: Process) -> Change {
        let seen = tokio::select! {
            biased;
            error = how_ended(&process.child) => Seen::Ended(error),
            reason = lost(&mut self.news, self.settled) => Seen::Lost(reason),
            fault = self.estate.keep_taking(&mut process.counter) => Seen::Misused(fault),
            Some(order) = self.desk.orders.recv() => Seen::Ordered(order),
        };
        let noticed = Instant::now();
        let name = self.blueprint.name.clone();
        let error = match seen {
            Seen::Ordered(order) => return Change::Ordered(order, process),
            Seen::Lost(None) => return Change::Over(process),
            Seen::Ended(error) => {
                process.gone(&mut self.estate).await;
                error
            }
            Seen::Misused(fault) => {
                process.end(Signal::KILL, Duration::ZERO, &mut self.estate).await;
                BackendError::Store { name, fault }
            }
            Seen::Lost(Some(reason)) => {
                // Most likely it is dying, and its own end says more than that it hung up.
                let ended = timeout(CUT_OFF_GRACE, how_ended(&process.child)).await;
                process.end(Signal::KILL, Duration::ZERO, &mut self.estate).await;
                ended
                    .ok()
                    .filter(|error| !is_farewell(error))
                    .unwrap_or(BackendError::CutOff { name, reason })
            }
        };
        self.desk.lost();
        Change::Died(Death { error, noticed, served: noticed.duration_since(self.serves_since) })
    }

    /// Starts processes until one serves.
    async fn revive(&mut self, death: Death) -> Result<Option<Process>, BackendError> {
        let Death { error, noticed, mut served } = death;
        if is_farewell(&error) && self.vmm_has_gone().await {
            return Ok(None);
        }
        let story = error.to_string();
        let mut last = error;
        let limit = self.blueprint.device.successor_within();
        let enough = loop {
            let pause = match self.patience.on_end(Instant::now(), served, cause(&last)) {
                Ok(pause) => pause,
                Err(enough) => break enough,
            };
            let attempt = match self.pause(pause).await {
                Woken::Over => Err(Failed::Over),
                Woken::ByTime => self.attempt(&self.program.clone(), limit).await,
                Woken::ByOrder(order) => self.obey(order, noticed).await,
            };
            match attempt {
                Ok(process) => {
                    let ms = noticed.elapsed().as_millis();
                    log::warn!("{story}; it was replaced and serves again after {ms} ms");
                    return Ok(Some(process));
                }
                Err(Failed::Over) if is_farewell(&last) => return Ok(None),
                // The VMM may have gone because of it.
                Err(Failed::Over) => return Err(last),
                Err(Failed::Backend(error)) => {
                    log::warn!(
                        "no successor of {} yet: {}",
                        self.blueprint.name,
                        error_chain(&error)
                    );
                    last = error;
                    served = Duration::ZERO;
                }
            }
        };
        if self.blueprint.device.has_stand_in() && is_about_resource(&last) {
            match self.attempt_stand_in().await {
                Ok(process) => {
                    log::error!("{}; from now on its requests fail", error_chain(&last));
                    return Ok(Some(process));
                }
                Err(Failed::Over) => return Err(last),
                Err(Failed::Backend(error)) => log::warn!("no stand-in: {}", error_chain(&error)),
            }
        }
        let name = self.blueprint.name.clone();
        Err(BackendError::GivenUp { name, enough, source: Box::new(last) })
    }

    /// Whether a process that ended in order did so because the VMM is gone.
    async fn vmm_has_gone(&mut self) -> bool {
        let told = timeout(SEEN_WITHIN, lost(&mut self.news, self.settled)).await;
        matches!(told, Ok(None))
    }

    async fn pause(&mut self, pause: Duration) -> Woken {
        tokio::select! {
            biased;
            Some(order) = self.desk.orders.recv() => Woken::ByOrder(order),
            () = gone(&mut self.news) => Woken::Over,
            () = sleep(pause) => Woken::ByTime,
        }
    }

    /// An order while the device waits for a process: what is asked for is tried at once.
    async fn obey(&mut self, order: Order, noticed: Instant) -> Result<Process, Failed> {
        let program = order.program.clone().unwrap_or_else(|| self.program.clone());
        let attempt = self.attempt(&program, SOON).await;
        order.answer(match &attempt {
            Ok(_) => Ok(noticed.elapsed()),
            Err(Failed::Over) => Err(ReplaceError::Ending),
            Err(Failed::Backend(error)) => Err(ReplaceError::NotBack(error_chain(error))),
        });
        attempt
    }

    /// Replaces a process that serves.
    async fn replace(
        &mut self,
        order: Order,
        mut process: Process,
    ) -> Result<Option<Process>, BackendError> {
        let begun = Instant::now();
        if let Err(why) = self.quiesce(&mut process).await {
            order.answer(Err(ReplaceError::Kept(why)));
            return Ok(Some(process));
        }
        process.end(Signal::TERM, GRACE, &mut self.estate).await;
        self.desk.lost();
        let (name, old) = (self.blueprint.name.clone(), self.program.clone());
        let program = order.program.clone().unwrap_or_else(|| old.clone());
        let error = match self.attempt(&program, SOON).await {
            Ok(process) => {
                log::info!("{name} is {} now", program.display());
                order.answer(Ok(begun.elapsed()));
                return Ok(Some(process));
            }
            Err(Failed::Over) => return Ok(None),
            Err(Failed::Backend(error)) => error,
        };
        let why = error_chain(&error);
        if program == old {
            order.answer(Err(ReplaceError::NotBack(why)));
        } else {
            log::warn!("{} does not serve as {name} ({why}): back to the old", program.display());
            match self.attempt(&old, SOON).await {
                Ok(process) => {
                    order.answer(Err(ReplaceError::FellBack(why)));
                    return Ok(Some(process));
                }
                Err(Failed::Over) => return Ok(None),
                Err(Failed::Backend(_)) => order.answer(Err(ReplaceError::NotBack(why))),
            }
        }
        self.revive(Death { error, noticed: begun, served: Duration::ZERO }).await
    }
}

/// Waits until the VMM tells a loss after number `settled`, and answers its reason; `None` if it
/// hangs up or has the device no more.
async fn lost(news: &mut watch::Receiver<DeviceNews>, settled: u64) -> Option<String> {
    let news = news.wait_for(|news| news.lost.number > settled).await.ok()?;
    Some(news.lost.reason.clone())
}

/// Waits until the VMM hangs up or has the device no more.
async fn gone(news: &mut watch::Receiver<DeviceNews>) {
    while news.changed().await.is_ok() {}
}

fn cause(error: &BackendError) -> Cause {
    if error.end() == Some(End::Signal(libc::SIGKILL)) { Cause::Killed } else { Cause::Own }
}

/// What the device stands for can't be had any more.
fn is_about_resource(error: &BackendError) -> bool {
    error.end() == Some(End::Code(BackendExit::Resource.into()))
}

/// A backend whose connection is over ends in order.
fn is_farewell(error: &BackendError) -> bool {
    error.end() == Some(End::Code(0))
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
