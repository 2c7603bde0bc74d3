//! A device that a running sandbox is to have no more.
//!
//! First the agent lets go of it, so that nothing in the guest uses it; then the guest's kernel is
//! asked to; then its process ends, and what the host had for it goes. A guest that does not let go
//! gets its device back.

use std::time::Duration;

use nacre_proto::{agent::DeviceRequest, pci::PciAddress, supervisor::Answer};
use tokio::time::timeout;

use crate::{
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
        if let Err(error) = self.agent.detach(&request).await {
            let why = error_chain(&error);
            return if error.is_refusal() { Answer::Kept(why) } else { Answer::Refused(why) };
        }
        let answer = self.take_off(device).await;
        if matches!(answer, Answer::Kept(_) | Answer::Refused(_))
            && let Err(error) = self.agent.attach(&request).await
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
        let status = self.status().await?;
        let known = status.devices.iter().find(|known| known.id == device);
        let known = known.ok_or_else(|| format!("nacre-vmm has no device `{device}`"))?;
        if known.leaving {
            return Err(format!("the guest was asked to let go of `{device}` before, and may yet"));
        }
        let address: PciAddress =
            known.address.parse().map_err(|error| format!("nacre-vmm: {error}"))?;
        Ok(self.request(address, purpose))
    }

    /// Has the guest's kernel let go of a device that nothing in the guest uses.
    pub(super) async fn take_off(&self, device: &str) -> Answer {
        let handle = self.roster.find(device);
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
