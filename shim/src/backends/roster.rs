//! The devices that are kept, for whoever looks at them or asks something of one.

use std::sync::{Arc, Mutex, PoisonError};

use crate::backends::DeviceHandle;

/// A list of devices, to be copied freely: all copies are one list.
#[derive(Clone, Debug, Default)]
pub struct Roster {
    // The sandbox's task puts devices in and takes them out while clients look. Locked for list
    // operations only, which don't panic half-way.
    handles: Arc<Mutex<Vec<DeviceHandle>>>,
}

impl Roster {
    /// All devices, in the order in which they came.
    #[must_use]
    pub fn all(&self) -> Vec<DeviceHandle> {
        self.with(|handles| handles.clone())
    }

    /// The device of this id.
    #[must_use]
    pub fn find(&self, id: &str) -> Option<DeviceHandle> {
        self.with(|handles| handles.iter().find(|handle| handle.id() == id).cloned())
    }

    /// Puts one at the end.
    pub(crate) fn add(&self, handle: DeviceHandle) {
        self.with(|handles| handles.push(handle));
    }

    /// Takes one out.
    pub(crate) fn remove(&self, id: &str) {
        self.with(|handles| handles.retain(|handle| handle.id() != id));
    }

    fn with<T>(&self, act: impl FnOnce(&mut Vec<DeviceHandle>) -> T) -> T {
        act(&mut self.handles.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
