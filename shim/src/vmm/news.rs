//! What the VMM has told unasked, as far as it matters now: of each device, of processors, of
//! memory. Whoever waits for something looks at the numbers, which only grow.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use nacre_proto::vmm::{Event, Resource};
use tokio::sync::watch;

use crate::log_file;

/// Something that the VMM said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Word {
    /// The number of the datagram that said it; 0: none did.
    pub(crate) number: u64,
    /// What the VMM says about it, fit for a log.
    pub(crate) reason: String,
}

/// What was told of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceNews {
    /// That its backend was lost, the last time.
    pub(crate) lost: Word,
    /// That the guest does not let go of it, the last time.
    pub(crate) kept: Word,
    /// Whether the VMM has it no more.
    pub(crate) is_removed: bool,
}

/// What was told of processors or memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ResourceNews {
    /// The number of the datagram that told how much there is; 0: none did.
    pub(crate) number: u64,
    /// How much there is, in bytes or processors.
    pub(crate) now: u64,
    /// That the guest does not use what was added, or keeps what was to go, the last time.
    pub(crate) declined: Word,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Whoever asks adds and takes away, whoever listens tells. Locked for map operations only;
    /// `None` once the VMM is not heard any more.
    devices: Mutex<Option<HashMap<String, watch::Sender<DeviceNews>>>>,
    pub(super) cpus: watch::Sender<ResourceNews>,
    pub(super) memory: watch::Sender<ResourceNews>,
}

impl News {
    /// Of these devices, nothing yet.
    pub(super) fn of(devices: &[&str]) -> Self {
        let entry = |id: &&str| ((*id).to_owned(), watch::Sender::default());
        Self {
            devices: Mutex::new(Some(devices.iter().map(entry).collect())),
            cpus: watch::Sender::default(),
            memory: watch::Sender::default(),
        }
    }

    /// From now on, of this device, too.
    pub(super) fn add(&self, device: &str) {
        self.with_devices(|devices| {
            devices.insert(device.to_owned(), watch::Sender::default());
        });
    }

    /// Of this device no more; who still waits for news of it learns that there will be none.
    pub(super) fn forget(&self, device: &str) {
        self.with_devices(|devices| drop(devices.remove(device)));
    }

    /// Of no device any more.
    pub(super) fn end(&self) {
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// News of a device; the channel is closed if there is no such device.
    pub(super) fn of_device(&self, device: &str) -> watch::Receiver<DeviceNews> {
        let known = self.with_devices(|devices| devices.get(device).map(watch::Sender::subscribe));
        known.flatten().unwrap_or_else(|| watch::Sender::default().subscribe())
    }

    fn with_devices<T>(
        &self,
        act: impl FnOnce(&mut HashMap<String, watch::Sender<DeviceNews>>) -> T,
    ) -> Option<T> {
        // Map operations don't panic half-way, so a poisoned lock has a sound map in it.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
    }

    /// Takes in datagram `number`.
    pub(super) fn take(&self, number: u64, event: Event) {
        let word = |reason: &str| Word { number, reason: log_file::printable(reason) };
        match event {
            Event::DeviceLost { device, reason } => {
                self.tell(&device, |news| news.lost = word(&reason));
            }
            Event::DeviceKept { device, reason } => {
                self.tell(&device, |news| news.kept = word(&reason));
            }
            Event::DeviceRemoved { device } => {
                self.tell(&device, |news| news.is_removed = true);
                self.forget(&device);
            }
            Event::CpusChanged { cpus } => now(&self.cpus, number, cpus.into()),
            Event::MemoryChanged { bytes } => now(&self.memory, number, bytes),
            Event::Declined { what, reason } => {
                let news = match what {
                    Resource::Cpus => &self.cpus,
                    Resource::Memory => &self.memory,
                };
                news.send_modify(|news| news.declined = word(&reason));
            }
        }
    }

    fn tell(&self, device: &str, change: impl FnOnce(&mut DeviceNews)) {
        self.with_devices(|devices| {
            if let Some(news) = devices.get(device) {
                news.send_modify(change);
                log::debug!("nacre-vmm tells of `{device}`: {:?}", *news.borrow());
            }
        });
    }
}

fn now(news: &watch::Sender<ResourceNews>, number: u64, now: u64) {
    news.send_modify(|news| (news.number, news.now) = (number, now));
}
