//! The emulated host's devices for passthrough: an IOMMU that remaps DMA and interrupts, and behind
//! a root port each, so in a group each, what a machine might give to a guest.
//!
//! The firmware numbers buses in the order of the root ports, so their addresses are fixed. Nothing
//! in the host uses these devices unless a command there does.

use crate::cache::{Cache, key};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The variable that tells tests which devices they may give to guests: words `KIND=ADDRESS`.
pub(crate) const VARIABLE: &str = "NACRE_VFIO_DEVICES";
/// The variable that tells tests the file with what is on the disks at first.
pub(crate) const DISK_VARIABLE: &str = "NACRE_VFIO_DISK";

/// What the kernel is told: every device's DMA is translated, the host's own devices' too.
pub(super) const KERNEL_ARGUMENTS: &str = "intel_iommu=on iommu=nopt";

/// Size of the disks behind the NVMe controllers.
const DISK_BYTES: u64 = 64 << 20;
/// Each block begins with its own number, so that a block in the wrong place shows.
const BLOCK_BYTES: u64 = 512;
/// A BAR in gigabytes.
const LARGE_BAR: &str = "1G";

/// A device behind a root port of its own, as QEMU's arguments; `BUS` is where it is plugged.
struct Plugged {
    /// What a test calls it; its function 0 is meant.
    name: &'static str,
    /// Flags and their values.
    arguments: &'static [(&'static str, &'static str)],
}

const DEVICES: &[Plugged] = &[
    // A virtual function has queues and interrupts only by what the physical one leaves it.
    Plugged {
        name: "nvme-sriov",
        arguments: &[
            ("-drive", "if=none,id=sriov-disk,format=raw,snapshot=on,file=DISK"),
            ("-device", "nvme-subsys,id=sriov-subsystem"),
            (
                "-device",
                "nvme,id=sriov,subsys=sriov-subsystem,serial=nacre-sriov,bus=BUS,sriov_max_vfs=1,\
                 sriov_vq_flexible=4,sriov_vi_flexible=2,max_ioqpairs=6,msix_qsize=7",
            ),
            ("-device", "nvme-ns,drive=sriov-disk,bus=sriov,nsid=1,shared=true"),
        ],
    },
    Plugged {
        name: "nvme",
        arguments: &[
            ("-drive", "if=none,id=nvme-disk,format=raw,snapshot=on,file=DISK"),
            ("-device", "nvme,serial=nacre,drive=nvme-disk,bus=BUS"),
        ],
    },
    // QEMU's own network answers pings at 10.0.77.2, whether the machine has a network or not.
    Plugged {
        name: "virtio-net",
        arguments: &[
            ("-netdev", "user,id=given,net=10.0.77.0/24,restrict=on"),
            (
                "-device",
                "virtio-net-pci,netdev=given,mac=52:54:00:77:00:01,disable-legacy=on,\
                 iommu_platform=on,romfile=,bus=BUS",
            ),
        ],
    },
    // Two functions that can't be told apart: one group.
    Plugged {
        name: "grouped",
        arguments: &[
            ("-device", "virtio-rng-pci,bus=BUS,addr=0.0,multifunction=on,disable-legacy=on"),
            ("-device", "virtio-rng-pci,bus=BUS,addr=0.1,disable-legacy=on"),
        ],
    },
    Plugged {
        name: "large-bar",
        arguments: &[
            ("-object", "memory-backend-memfd,id=large,size=LARGE,share=on,reserve=off"),
            ("-device", "ivshmem-plain,memdev=large,bus=BUS"),
        ],
    },
];

/// What [`VARIABLE`] says on an emulated host.
pub(crate) fn names() -> String {
    let word = |(bus, device): (u8, &Plugged)| format!("{}=0000:{bus:02x}:00.0", device.name);
    (1..).zip(DEVICES).map(word).collect::<Vec<_>>().join(" ")
}

/// Gives QEMU an IOMMU, which must come before what is behind it, and the devices.
pub(super) fn add(command: &mut Command, disk: &Path) {
    let disk = disk.to_string_lossy().replace(',', ",,");
    command.args(["-device", "intel-iommu,intremap=on,caching-mode=on"]);
    for (slot, device) in (1..).zip(DEVICES) {
        let port = format!("pcie-root-port,id=port{slot},chassis={slot},slot={slot}");
        command.args(["-device", &port]);
        for (flag, value) in device.arguments {
            let value = value.replace("BUS", &format!("port{slot}"));
            let value = value.replace("DISK", &disk).replace("LARGE", LARGE_BAR);
            command.args([*flag, &value]);
        }
    }
}

/// The disks' content, made if it is not in the cache yet. QEMU keeps what is written elsewhere and
/// forgets it.
///
/// # Errors
/// The cache cannot be written.
pub(crate) fn disk(cache: &Cache) -> Result<PathBuf> {
    let recipe = format!("{DISK_BYTES} {BLOCK_BYTES} number at the start of each block");
    let name = format!("passthrough-disk-{}", key(&[recipe.as_bytes()]));
    cache.entry(&name, "making the disk that is given to guests", make_disk)
}

fn make_disk(path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut writer = BufWriter::new(file);
    for number in 0..DISK_BYTES / BLOCK_BYTES {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        writer.write_all(&number.to_le_bytes())?;
        for _ in 1..BLOCK_BYTES / 8 {
            // Marsaglia's xorshift: content that does not compress and repeats nowhere.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            writer.write_all(&state.to_le_bytes())?;
        }
    }
    writer.flush().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_root_port_and_a_name_with_its_address() {
        let mut command = Command::new("qemu");
        add(&mut command, Path::new("/a,b"));
        let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        let ports = arguments.iter().filter(|word| word.starts_with("pcie-root-port")).count();
        assert_eq!(ports, DEVICES.len());
        assert!(arguments[1].starts_with("intel-iommu"));
        assert!(arguments.iter().any(|word| word.ends_with("file=/a,,b")));
        assert!(names().contains("nvme=0000:02:00.0 virtio-net=0000:03:00.0"), "{}", names());
    }
}
