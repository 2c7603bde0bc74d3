//! Where the guest finds the host's devices that it was given.

use std::time::Duration;

use nacre_proto::{agent::Function, vmm::DeviceStatus};

use crate::{
    plan::passthrough_id,
    sandbox::{SandboxError, create::VmUp},
    vmm::VmmError,
};

/// How long the VMM may take to tell.
const STATUS_WITHIN: Duration = Duration::from_secs(10);

impl VmUp {
    /// The host's devices as the agent finds them, with what becomes of them; asks the VMM.
    pub(super) async fn functions(&mut self) -> Result<Vec<Function>, SandboxError> {
        if self.base.plan.config.passthrough.is_empty() {
            return Ok(Vec::new());
        }
        let link = self.vmm.link();
        let devices = self.guarded(link.status(STATUS_WITHIN)).await?.devices;
        let given = self.base.plan.config.passthrough.iter().enumerate();
        given
            .map(|(index, function)| {
                let pci_address = address(&devices, &passthrough_id(index))?;
                let addresses = function.ip.clone();
                Ok(Function { pci_address, addresses, ..Function::default() })
            })
            .collect()
    }
}

fn address(devices: &[DeviceStatus], id: &str) -> Result<String, SandboxError> {
    let device = devices.iter().find(|device| device.id == id);
    let missing = || VmmError::Refused(format!("it does not know the device {id}"));
    Ok(device.ok_or_else(missing)?.address.clone())
}
