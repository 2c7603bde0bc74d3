//! What the host has for a sandbox beside its processes.

use std::{collections::BTreeMap, path::Path};

use nacre_proto::agent::Interface;
use vfio::{HostAddress, Opened};

use crate::{
    cgroup::{self, Cgroup},
    error_chain,
    fault::{self, Step},
    network::{
        self, Network, NetworkError, Nic,
        address::Pair,
        namespace::{Found, Namespace},
    },
    passthrough::{self, Function, Host, PassthroughError, binding},
    plan::{self, NetworkConfig, SandboxPlan},
    record::JoinedRecord,
    registry::{Registration, RegistryError},
    sandbox::SandboxError,
};

/// The id of the nic that a sandbox begins with.
const FIRST_NIC: &str = "net";

/// Registration, network and cgroup. Dropping it takes them down.
#[derive(Debug)]
pub struct HostResources {
    pub(super) cgroup: Option<Cgroup>,
    /// The addresses of the sandbox's own network.
    pub(super) pair: Option<Pair>,
    /// What the guest's first nics are served with, by their ids.
    pub(super) nics: BTreeMap<String, Nic>,
    // Only `keep` takes it.
    pub(super) registration: Option<Registration>,
}

impl HostResources {
    /// Makes what `plan` needs of the host.
    pub(super) fn create(
        plan: &SandboxPlan,
        registration: Registration,
    ) -> Result<Self, SandboxError> {
        let (cgroup, pair, nics) = (None, None, BTreeMap::new());
        let mut resources = Self { cgroup, pair, nics, registration: Some(registration) };
        fault::point(Step::Claim)?;
        match &plan.config.network {
            NetworkConfig::None => {}
            NetworkConfig::Own => {
                let Network { pair, nic } = resources.make_first_network()?;
                resources.pair = Some(pair);
                resources.nics.insert(FIRST_NIC.to_owned(), nic);
            }
            NetworkConfig::Namespace { path, found } => resources.join(path, found)?,
        }
        fault::point(Step::Network)?;
        resources.limit(plan)?;
        fault::point(Step::Cgroup)?;
        resources.take_devices(plan)?;
        Ok(resources)
    }

    fn make_first_network(&mut self) -> Result<Network, NetworkError> {
        let registration = self.registration.as_mut().ok_or(NetworkError::Unregistered)?;
        network::create(registration, None)
    }

    /// Has the interfaces of a pod's namespace lead to the guest.
    fn join(&mut self, path: &Path, found: &Found) -> Result<(), SandboxError> {
        let namespace = Namespace::open(path)?;
        let registration = self.registration.as_mut().ok_or(NetworkError::Unregistered)?;
        let record = |interface: &Interface| JoinedRecord {
            netns: path.to_owned(),
            interface: interface.name.clone(),
        };
        let records = found.interfaces.iter().map(record).collect();
        registration.update(|written| written.joined = records)?;
        for (index, interface) in found.interfaces.iter().enumerate() {
            let nic = Nic::with_mac(namespace.connect(interface)?, &interface.mac)?;
            self.nics.insert(plan::nic_id(index), nic);
        }
        Ok(())
    }

    /// Makes a network for a device that the sandbox is given while it runs.
    pub(super) fn make_network(&mut self, device: &str) -> Result<Network, NetworkError> {
        let registration = self.registration.as_mut().ok_or(NetworkError::Unregistered)?;
        network::create(registration, Some(device))
    }

    /// Takes down the network of a device that is gone, if it had one.
    pub(super) fn end_network(&mut self, device: &str) {
        let Some(registration) = &mut self.registration else { return };
        if device == FIRST_NIC {
            (self.pair, self.nics) = (None, BTreeMap::new());
            registration.release_first_network();
        }
        registration.release_network(device);
    }

    fn limit(&mut self, plan: &SandboxPlan) -> Result<(), SandboxError> {
        let limits = plan.config.host_limits;
        if limits.is_empty() {
            return Ok(());
        }
        if !cgroup::is_available() {
            log::warn!(
                "limits on the host are refused: this machine has no cgroup v2 at /sys/fs/cgroup \
                 (limits in the guest hold)"
            );
            return Ok(());
        }
        let Some(registration) = &mut self.registration else { return Ok(()) };
        let path = cgroup::path_of(&plan.config.name, &registration.record().supervisor);
        registration.update(|record| record.cgroup = Some(path.clone()))?;
        self.cgroup = Some(Cgroup::create(path, limits)?);
        Ok(())
    }

    /// Takes the host's devices that the guest is to have from their drivers, where that is asked.
    fn take_devices(&mut self, plan: &SandboxPlan) -> Result<(), SandboxError> {
        let functions = &plan.config.passthrough;
        passthrough::check(&Host::default(), functions)?;
        for function in functions.iter().filter(|function| function.bind) {
            self.take_device(function.address)?;
        }
        Ok(())
    }

    /// Takes one device from its driver. It is written down first, and given back with the rest or
    /// by [`Self::give_back_device`].
    pub(super) fn take_device(&mut self, address: HostAddress) -> Result<(), SandboxError> {
        let host = Host::default();
        let Some(registration) = &mut self.registration else { return Ok(()) };
        let Some(found) = binding::plan(&host, address)? else { return Ok(()) };
        registration.update(|record| record.bindings.push(found))?;
        binding::bind(&host, address)?;
        Ok(())
    }

    /// Has a device of the host's for a sandbox that runs.
    pub(super) fn open_device(&mut self, function: &Function) -> Result<Opened, SandboxError> {
        if function.bind {
            self.take_device(function.address)?;
        }
        Ok(passthrough::open(&Host::default(), function.address)?)
    }

    /// Opens the devices for the VMM, in the plan's order.
    pub(super) fn open_devices(&self, plan: &SandboxPlan) -> Result<Vec<Opened>, PassthroughError> {
        let host = Host::default();
        let functions = plan.config.passthrough.iter();
        functions.map(|function| passthrough::open(&host, function.address)).collect()
    }

    /// Gives one device, which nobody has open any more, back to the driver that it had.
    pub(super) fn give_back_device(&mut self, address: HostAddress) {
        let Some(registration) = &mut self.registration else { return };
        let address = address.to_string();
        let is_it = |binding: &&passthrough::Binding| binding.address == address;
        let Some(found) = registration.record().bindings.iter().find(is_it).cloned() else {
            return;
        };
        if let Err(error) = binding::give_back(&Host::default(), &found) {
            log::warn!("device {address} is not given back: {}", error_chain(&error));
            return;
        }
        if let Err(error) =
            registration.update(|record| record.bindings.retain(|one| *one != found))
        {
            log::warn!("{error}");
        }
    }

    /// Takes down all but the sandbox's folder, which keeps its record and logs.
    ///
    /// # Errors
    ///
    /// Fails if the record can't be written.
    pub fn keep(mut self, code: u8) -> Result<(), RegistryError> {
        self.take_down();
        self.registration.take().map_or(Ok(()), |registration| registration.keep(code))
    }

    fn give_back_devices(&mut self) {
        let Some(registration) = &self.registration else { return };
        let bindings = registration.record().bindings.iter();
        let addresses: Vec<_> =
            bindings.rev().filter_map(|binding| binding.address.parse().ok()).collect();
        for address in addresses {
            self.give_back_device(address);
        }
    }

    fn take_down(&mut self) {
        drop(self.cgroup.take());
        self.nics.clear();
        self.give_back_devices();
        if let Some(registration) = &mut self.registration {
            registration.release_networks();
            registration.leave_namespace();
        }
    }
}

impl Drop for HostResources {
    fn drop(&mut self) {
        self.take_down();
    }
}
