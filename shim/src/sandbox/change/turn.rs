//! Changes that a pod's owner makes for its containers. It waits for its turn; who asks from outside
//! is told to come again.

use std::path::Path;

use nacre_proto::supervisor::{Answer, NewDevice, Resources};

use crate::sandbox::change::{Operator, Why, add::planned, resize::resources};

impl Operator {
    /// Other amounts of processors and memory.
    pub(crate) async fn resize_in_turn(&self, cpus: u32, memory_bytes: u64) -> Result<(), Why> {
        let _turn = self.functions.lock().await;
        match self.resize(Some(cpus), Some(memory_bytes)).await {
            Answer::Resized(_now) => Ok(()),
            Answer::PartlyResized { why, .. } | Answer::Refused(why) => Err(why),
            _ => Err("there is no telling what the guest has now".to_owned()),
        }
    }

    /// What the guest has and can have.
    pub(crate) async fn resources(&self) -> Result<Resources, Why> {
        Ok(resources(&self.status().await?))
    }

    /// A disk that no container has yet; gives its serial, by which the agent finds it.
    pub(crate) async fn bring_disk_in_turn(
        &self,
        path: &Path,
        read_only: bool,
    ) -> Result<String, Why> {
        let _turn = self.functions.lock().await;
        let path = path.display().to_string();
        let taken = |id: &str| self.roster.find(id).is_some();
        let device = planned(NewDevice::Disk { path, read_only }, taken)?;
        self.bring(&device).await?;
        Ok(device.id().to_owned())
    }

    /// A device that no container has any more leaves the guest.
    pub(crate) async fn take_off_in_turn(&self, device: &str) -> Result<(), Why> {
        let _turn = self.functions.lock().await;
        match self.take_off(device).await {
            Answer::Removed => Ok(()),
            Answer::Kept(why) | Answer::Leaving(why) | Answer::Refused(why) => Err(why),
            _ => Err("there is no telling whether it goes".to_owned()),
        }
    }
}
