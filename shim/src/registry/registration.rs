//! A name that was claimed, and what its owner may do with it.

use std::{fs::File, mem};

use crate::{
    network::{self, address, namespace},
    paths::SandboxFiles,
    record::{NetworkRecord, Phase, Record},
    registry::{Registry, RegistryError, tree},
};

/// A claimed name and its record. Dropping it removes the folder, unless it was told to stay.
#[derive(Debug)]
pub struct Registration {
    registry: Registry,
    files: SandboxFiles,
    record: Record,
    stays: bool,
}

impl Registration {
    pub(super) fn new(registry: Registry, files: SandboxFiles, record: Record) -> Self {
        Self { registry, files, record, stays: false }
    }

    /// The sandbox's files.
    #[must_use]
    pub fn files(&self) -> &SandboxFiles {
        &self.files
    }

    /// What is recorded.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Changes the record, on disk too.
    ///
    /// # Errors
    ///
    /// Fails as writing a file does.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), RegistryError> {
        change(&mut self.record);
        self.write()
    }

    pub(super) fn write(&self) -> Result<(), RegistryError> {
        Ok(self.record.write(self.files.folder())?)
    }

    /// Reserves addresses and the name of a tap that no other sandbox has; for `device` if the
    /// sandbox runs already.
    ///
    /// # Errors
    ///
    /// Fails if none is free.
    pub fn reserve_network(
        &mut self,
        device: Option<&str>,
    ) -> Result<address::Pair, RegistryError> {
        let _lock = self.registry.lock()?;
        let records = self.registry.list()?;
        let taken: Vec<u32> =
            records.iter().flat_map(Record::networks).map(|network| network.index).collect();
        let pair = address::free_pair(&taken, &address::host_routes())?;
        self.update(|record| match device {
            None => record.network = Some(pair.record()),
            Some(device) => {
                record.added_networks.insert(device.to_owned(), pair.record());
            }
        })?;
        Ok(pair)
    }

    /// Keeps every other sandbox of this registry from looking and acting, as long as the answer
    /// lives.
    ///
    /// # Errors
    ///
    /// Fails if another one does not let go of the lock.
    pub fn lock(&self) -> Result<File, RegistryError> {
        self.registry.lock()
    }

    /// Whether forwarding of `uplink` was switched on for another network than that of `tap`.
    ///
    /// # Errors
    ///
    /// Fails if the registry can't be read.
    pub fn others_switched_on(&self, uplink: &str, tap: &str) -> Result<bool, RegistryError> {
        let switched = |network: &NetworkRecord| {
            network.tap != tap && network.forwarding.as_deref() == Some(uplink)
        };
        Ok(self.registry.list()?.iter().flat_map(Record::networks).any(switched))
    }

    /// Takes down what the host has for all networks of the sandbox.
    pub fn release_networks(&mut self) {
        let added: Vec<String> = self.record.added_networks.keys().cloned().collect();
        for device in added {
            self.release_network(&device);
        }
        self.release_first_network();
    }

    /// Takes down what the host has for the network that the sandbox began with.
    pub fn release_first_network(&mut self) {
        if let Some(network) = self.record.network.take() {
            self.release(&network);
        }
    }

    /// Takes down what the host has for the network of a device that the sandbox was given while it
    /// ran. It is no error if it has none.
    pub fn release_network(&mut self, device: &str) {
        if let Some(network) = self.record.added_networks.remove(device) {
            self.release(&network);
        }
    }

    /// Lets the interfaces of a pod's namespace go.
    pub fn leave_namespace(&mut self) {
        for joined in mem::take(&mut self.record.joined) {
            namespace::leave(&joined);
        }
    }

    fn release(&mut self, network: &NetworkRecord) {
        let users = self.registry.lock().and_then(|lock| {
            let users = self.registry.forwarding_users(&[network.tap.as_str()]);
            users.map(|users| (lock, users))
        });
        // Held until the record says so: the next to end must not count this one any more.
        let _lock = match users {
            Ok((lock, users)) => {
                network::remove(network, users);
                Some(lock)
            }
            Err(error) => {
                log::warn!("forwarding stays as it is: {error}");
                network::remove(network, usize::MAX);
                None
            }
        };
        if let Err(error) = self.write() {
            log::warn!("{error}");
        }
    }

    /// Records that the sandbox has ended in order and leaves its folder to `nacre rm`.
    ///
    /// # Errors
    ///
    /// Fails as writing a file does.
    pub fn keep(self, code: u8) -> Result<(), RegistryError> {
        let mut registration = self;
        registration.stay();
        registration.update(|record| {
            record.phase = Phase::Exited { code };
            record.children.clear();
        })
    }

    /// From now on the folder stays when this value is dropped.
    pub fn stay(&mut self) {
        self.stays = true;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if !self.stays {
            match tree::remove(self.files.folder()) {
                Ok(()) => log::debug!("removed {}", self.files.folder().display()),
                Err(error) => {
                    log::warn!("can't remove {}: {error}", self.files.folder().display());
                }
            }
        }
    }
}
