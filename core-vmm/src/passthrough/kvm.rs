//! KVM's own knowledge of passed-through devices: it is told of each group, so that it knows what
//! memory types the IOMMU keeps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use crate::locked;

/// KVM's device of this kind, made when the first group comes.
pub(super) struct KvmVfio {
    vm: Arc<VmFd>,
    /// Locked by the control thread only; it is shared by all devices of a VM.
    device: Mutex<Option<DeviceFd>>,
}

impl KvmVfio {
    pub(super) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, device: Mutex::new(None) }
    }

    /// Tells KVM of a group.
    ///
    /// # Errors
    ///
    /// Fails if KVM refuses.
    pub(super) fn add(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        let mut device = locked(&self.device);
        let device = match &mut *device {
            Some(device) => device,
            empty => {
                let type_ = kvm_device_type_KVM_DEV_TYPE_VFIO;
                let mut wanted = kvm_create_device { type_, fd: 0, flags: 0 };
                empty.insert(self.vm.create_device(&mut wanted)?)
            }
        };
        set(device, KVM_DEV_VFIO_FILE_ADD, group)
    }

    /// Tells KVM that a group is no longer ours.
    ///
    /// # Errors
    ///
    /// Fails if KVM does not know it.
    pub(super) fn remove(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        match &*locked(&self.device) {
            Some(device) => set(device, KVM_DEV_VFIO_FILE_DEL, group),
            None => Ok(()),
        }
    }
}

fn set(device: &DeviceFd, attribute: u32, group: BorrowedFd<'_>) -> io::Result<()> {
    let fd = group.as_raw_fd();
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_DEV_VFIO_FILE,
        attr: attribute.into(),
        addr: (&raw const fd).expose_provenance() as u64,
    };
    Ok(device.set_device_attr(&attribute)?)
}
