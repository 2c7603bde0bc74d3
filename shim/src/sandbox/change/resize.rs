//! More or fewer processors, more or less memory.
//!
//! What is added comes before what goes, and memory before processors, which need some; what goes,
//! goes in the opposite order. Each step is over when the guest uses what it was given, or has let
//! go of what it was to. The first step that is not comes to the client, with what there is then.

use std::time::Duration;

use nacre_proto::{
    supervisor::{Answer, Resources},
    vmm::{Command, MEMORY_STEP_BYTES, Status},
};
use tokio::{sync::watch, time::timeout};

use crate::{
    error_chain,
    sandbox::change::{Errand, Operator, VMM_WITHIN, Why, words},
    size::ByteSize,
    vmm::{ResourceNews, VmmError},
};

/// How long the guest may take to use what it was given.
const USED_WITHIN: Duration = Duration::from_secs(60);
/// How long the guest may take to let go.
const LET_GO_WITHIN: Duration = Duration::from_secs(60);
/// Of what is added, this part may go to the guest's own account of it: 64 bytes a page, where it
/// is not taken from the memory that there is.
const ACCOUNT_PART: u64 = 32;

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// To so many processors, which are as many as before or more.
    MoreCpus(u32),
    FewerCpus(u32),
    /// To so many bytes from so many.
    MoreMemory {
        from: u64,
        to: u64,
    },
    LessMemory(u64),
}

/// Why a step did not come to its end.
enum Stopped {
    /// Nothing was begun.
    Refused(Why),
    /// It was begun.
    HalfWay(Why),
}

impl Operator {
    pub(super) async fn resize(&self, cpus: Option<u32>, memory_bytes: Option<u64>) -> Answer {
        let before = match self.status().await {
            Ok(status) => resources(&status),
            Err(why) => return Answer::Refused(why),
        };
        let steps = match steps(before, cpus, memory_bytes) {
            Ok(steps) => steps,
            Err(why) => return Answer::Refused(why),
        };
        let mut why = None;
        let mut has_begun = false;
        for step in steps {
            match self.take(step).await {
                Ok(()) => has_begun = true,
                Err(Stopped::Refused(reason)) if !has_begun => return Answer::Refused(reason),
                Err(Stopped::Refused(reason) | Stopped::HalfWay(reason)) => {
                    why = Some(reason);
                    break;
                }
            }
        }
        let now = match self.status().await {
            Ok(status) => resources(&status),
            Err(reason) => return Answer::PartlyResized { now: before, why: reason },
        };
        if let Err(reason) = self.errand(Errand::Record(now)).await {
            return Answer::PartlyResized { now, why: reason };
        }
        match why {
            None => Answer::Resized(now),
            Some(why) => Answer::PartlyResized { now, why },
        }
    }

    async fn take(&self, step: Step) -> Result<(), Stopped> {
        match step {
            Step::MoreCpus(cpus) => {
                let declined = declined(self.link.cpus(), self.link.heard());
                self.begin(Command::SetCpus { cpus }).await?;
                let used = async {
                    let used = self.agent.use_resources(cpus, 0, USED_WITHIN).await;
                    let online = used.map_err(|error| error_chain(&error))?.online_cpus;
                    if online >= cpus {
                        return Ok(());
                    }
                    Err(format!("the guest uses {online} of {cpus} CPUs"))
                };
                until_used(used, declined).await
            }
            Step::MoreMemory { from, to } => {
                let asked = self.agent.use_resources(0, 0, USED_WITHIN).await;
                let refused = |error| Stopped::Refused(error_chain(&error));
                let had = asked.map_err(refused)?.memory_bytes;
                let declined = declined(self.link.memory(), self.link.heard());
                self.begin(Command::SetMemory { bytes: to }).await?;
                let more = to.saturating_sub(from);
                let least = had.saturating_add(more - more / ACCOUNT_PART);
                let used = async {
                    let used = self.agent.use_resources(0, least, USED_WITHIN).await;
                    let has = used.map_err(|error| error_chain(&error))?.memory_bytes;
                    if has >= least {
                        return Ok(());
                    }
                    let used = ByteSize(has.saturating_sub(had));
                    Err(format!("the guest uses {used} of {} more memory", ByteSize(more)))
                };
                until_used(used, declined).await
            }
            Step::FewerCpus(cpus) => {
                let (news, before) = (self.link.cpus(), self.link.heard());
                self.begin(Command::SetCpus { cpus }).await?;
                let_go(news, before, cpus.into(), "CPUs").await
            }
            Step::LessMemory(bytes) => {
                let (news, before) = (self.link.memory(), self.link.heard());
                self.begin(Command::SetMemory { bytes }).await?;
                let_go(news, before, bytes, "memory").await
            }
        }
    }

    async fn begin(&self, command: Command) -> Result<(), Stopped> {
        self.link.have_done(command, VMM_WITHIN).await.map_err(|error| match error {
            VmmError::Refused(_) => Stopped::Refused(words(&error)),
            // It may have been begun or not.
            error => Stopped::HalfWay(words(&error)),
        })
    }
}

/// Waits for what the agent says, or what the guest's kernel says before that.
async fn until_used(
    used: impl Future<Output = Result<(), Why>>,
    declined: impl Future<Output = Why>,
) -> Result<(), Stopped> {
    tokio::select! {
        used = used => used.map_err(Stopped::HalfWay),
        why = declined => Err(Stopped::HalfWay(why)),
    }
}

/// Waits until the guest's kernel does not take what was added.
async fn declined(mut news: watch::Receiver<ResourceNews>, before: u64) -> Why {
    let told = news.wait_for(|news| news.declined.number > before).await;
    let told = told.map(|news| news.declined.reason.clone());
    match told {
        Ok(reason) => format!("the guest does not take it: {reason}"),
        Err(_closed) => std::future::pending().await,
    }
}

/// Waits until the guest has no more than `least` of it.
async fn let_go(
    mut news: watch::Receiver<ResourceNews>,
    before: u64,
    least: u64,
    what: &str,
) -> Result<(), Stopped> {
    let is_gone = |news: &ResourceNews| news.number > before && news.now <= least;
    let told = news.wait_for(|news| is_gone(news) || news.declined.number > before);
    match timeout(LET_GO_WITHIN, told).await {
        Ok(Ok(news)) if is_gone(&news) => Ok(()),
        Ok(Ok(news)) => {
            let reason = &news.declined.reason;
            Err(Stopped::HalfWay(format!("the guest does not give up {what}: {reason}")))
        }
        Ok(Err(_closed)) => Err(Stopped::HalfWay("nacre-vmm is gone".to_owned())),
        Err(_elapsed) => {
            let seconds = LET_GO_WITHIN.as_secs();
            let why =
                format!("the guest has not given up all {what} after {seconds} s; it still may");
            Err(Stopped::HalfWay(why))
        }
    }
}

pub(super) fn resources(status: &Status) -> Resources {
    Resources {
        cpus: status.cpus,
        max_cpus: status.max_cpus,
        memory_bytes: status.memory_bytes,
        max_memory_bytes: status.max_memory_bytes,
    }
}

/// What is to be done, in its order; nothing that is certain to be refused is begun.
fn steps(now: Resources, cpus: Option<u32>, memory_bytes: Option<u64>) -> Result<Vec<Step>, Why> {
    let mut steps = Vec::new();
    if let Some(to) = memory_bytes {
        let (from, max) = (now.memory_bytes, now.max_memory_bytes);
        if to > max {
            let (to, max) = (ByteSize(to), ByteSize(max));
            return Err(format!("memory of {to} is more than the {max} that it can have"));
        }
        if !to.abs_diff(from).is_multiple_of(MEMORY_STEP_BYTES) {
            let (step, from, to) = (ByteSize(MEMORY_STEP_BYTES), ByteSize(from), ByteSize(to));
            return Err(format!("memory comes and goes by {step}: not from {from} to {to}"));
        }
        steps.push(if to < from { Step::LessMemory(to) } else { Step::MoreMemory { from, to } });
    }
    if let Some(to) = cpus {
        if to == 0 {
            return Err("a sandbox needs at least one CPU".to_owned());
        }
        if to > now.max_cpus {
            return Err(format!("{to} CPUs are more than the {} that it can have", now.max_cpus));
        }
        steps.push(if to < now.cpus { Step::FewerCpus(to) } else { Step::MoreCpus(to) });
    }
    steps.sort_by_key(|step| match step {
        Step::MoreMemory { .. } => 0,
        Step::MoreCpus(_) => 1,
        Step::FewerCpus(_) => 2,
        Step::LessMemory(_) => 3,
    });
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const NOW: Resources =
        Resources { cpus: 2, max_cpus: 4, memory_bytes: GIB, max_memory_bytes: 4 * GIB };

    #[test]
    fn what_comes_comes_before_what_goes_and_processors_need_memory() {
        let more = Step::MoreMemory { from: GIB, to: 2 * GIB };
        let (half, twice) = (GIB / 2, 2 * GIB);
        for (cpus, memory, expected) in [
            (Some(4), Some(twice), vec![more, Step::MoreCpus(4)]),
            (Some(1), Some(twice), vec![more, Step::FewerCpus(1)]),
            (Some(4), Some(half), vec![Step::MoreCpus(4), Step::LessMemory(half)]),
            (Some(1), Some(half), vec![Step::FewerCpus(1), Step::LessMemory(half)]),
            (None, None, vec![]),
            // What was to go and has not gone yet is to stay.
            (Some(2), None, vec![Step::MoreCpus(2)]),
        ] {
            assert_eq!(steps(NOW, cpus, memory).unwrap(), expected);
        }
    }

    #[test]
    fn what_can_not_be_is_not_begun() {
        for (cpus, memory, why) in [
            (Some(0), None, "a sandbox needs at least one CPU"),
            (Some(5), Some(2 * GIB), "5 CPUs are more than the 4 that it can have"),
            (Some(4), Some(5 * GIB), "memory of 5G is more than the 4G that it can have"),
            (None, Some(GIB + 1), "memory comes and goes by 128M: not from 1G to 1073741825"),
        ] {
            assert_eq!(steps(NOW, cpus, memory).unwrap_err(), why);
        }
    }
}
