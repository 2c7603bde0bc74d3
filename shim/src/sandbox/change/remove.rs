//! A device that a running sandbox is to have no more.
//!
//! First the agent lets go of it, so that nothing in the guest uses it; then the guest's kernel is
//! asked to; then its process ends, and what the host had for it goes. A guest that does not let go
//! gets its device back.

use std::time::Duration;

use nacre_proto::{agent::DeviceRequest, pci::PciAddress, supervisor::Answer, vmm::DeviceState};
use tokio::time::timeout;

use crate::{
    backends::{Condition, DeviceHandle},
    error_chain,
    sandbox::change::{Operator, VMM_WITHIN, Why, purpose, words},
    vmm::{Parting, VmmError},
};

/// How long the guest may take to let go of a device.
const LET_GO_WITHIN: Duration = Duration::from_secs(30);
/// How long the device's process may take to end when the VMM has the device no more.
const ENDED_WITHIN: Duration = Duration::from_secs(30);

impl Operator {
    pub(super) async fn remove(&self, device: &str) -> Answer {
        let request = match self.detaching(device).await {
            Ok(request) => request,
            Err(why) => return Answer::Refused(why),
        };
        self.withdraw(device, &request).await
    }

    /// Has the agent let go of a device, as `request` says, and then the guest's kernel. What does
    /// not go is given back to the container.
    pub(super) async fn withdraw(&self, device: &str, request: &DeviceRequest) -> Answer {
        if let Err(error) = self.agent.detach(request).await {
            let why = error_chain(&error);
            return if error.is_refusal() { Answer::Kept(why) } else { Answer::Refused(why) };
        }
        let answer = self.take_off(device).await;
        if matches!(answer, Answer::Kept(_) | Answer::Refused(_))
            && let Err(error) = self.agent.attach(request).await
        {
            log::warn!("`{device}` stays and the container does not get it back: {error}");
        }
        answer
    }

    /// What the agent is asked for, for a device that can go.
    async fn detaching(&self, device: &str) -> Result<DeviceRequest, Why> {
        let handle = self.roster.find(device);
        let handle = handle.ok_or_else(|| format!("there is no device `{device}`"))?;
        let purpose = purpose(&handle.device)?;
        Ok(self.request(self.address_of(device).await?, purpose))
    }

    /// Where a device is that is not on its way out.
    pub(super) async fn address_of(&self, device: &str) -> Result<PciAddress, Why> {
        let status = self.status().await?;
        let known = status.devices.iter().find(|known| known.id == device);
        let known = known.ok_or_else(|| format!("nacre-vmm has no device `{device}`"))?;
        if known.leaving {
            return Err(format!("the guest was asked to let go of `{device}` before, and may yet"));
        }
        known.address.parse().map_err(|error| format!("nacre-vmm: {error}"))
    }

    /// Waits until a process that the VMM has cut off is known to have ended.
    async fn in_agreement(&self, handle: &DeviceHandle) {
        let mut view = handle.watch();
        let news = self.link.news(handle.id()).borrow().lost.number;
        if news > 0 {
            let is_lost = self.status().await.is_ok_and(|status| {
                let mut devices = status.devices.iter();
                devices.any(|one| one.id == handle.id() && one.state == DeviceState::Lost)
            });
            if is_lost && view.wait_for(|view| view.condition != Condition::Serving).await.is_err()
            {
                log::debug!("`{}` is kept no more", handle.id());
            }
        }
    }

    /// Has the guest's kernel let go of a device that nothing in the guest uses.
    pub(super) async fn take_off(&self, device: &str) -> Answer {
        let handle = self.roster.find(device);
        // For a device without a backend the request says that the process has ended, too.
        if let Some(handle) = &handle
            && timeout(ENDED_WITHIN, self.in_agreement(handle)).await.is_err()
        {
            return Answer::Refused(
                "nacre-vmm has lost its process, which does not end".to_owned(),
            );
        }
        match self.link.remove_device(device, VMM_WITHIN, LET_GO_WITHIN).await {
            Ok(Parting::Gone) => {}
            Ok(Parting::Kept(why)) => {
                return Answer::Kept(format!("the guest does not let go of it: {why}"));
            }
            Ok(Parting::Silent) => {
                let seconds = LET_GO_WITHIN.as_secs();
                return Answer::Leaving(format!(
                    "the guest has not let go of it after {seconds} s; it still may"
                ));
            }
            Err(error @ VmmError::Refused(_)) => return Answer::Refused(words(&error)),
            Err(error) => return Answer::Leaving(words(&error)),
        }
        if let Some(handle) = handle
            && timeout(ENDED_WITHIN, handle.ended()).await.is_err()
        {
            return Answer::Leaving("its process does not end".to_owned());
        }
        self.settled().await;
        Answer::Removed
    }
}
