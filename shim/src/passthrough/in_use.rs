//! Whether the host works with a device: what is mounted from its disks, what is built on them, and
//! whether its network is the host's way out. Such a device is not taken away, even if asked.

use std::{
    fs,
    path::{Path, PathBuf},
};

use vfio::HostAddress;

use crate::passthrough::Host;

/// How deep below a device its disks and interfaces are; an NVMe name space is three below.
const DEPTH: usize = 5;
/// How many folders are looked at below a device.
const MOST: usize = 512;

/// How the host works with it; none if it does not.
pub(super) fn by_host(host: &Host, address: HostAddress) -> Option<String> {
    let mut disks = Disks::read(host);
    for part in parts(&host.device(address)) {
        let how = match part.kind.as_str() {
            "block" => disks.use_of(&part),
            "net" => way_out(host, &part),
            _ => None,
        };
        if how.is_some() {
            return how;
        }
    }
    None
}

/// What a driver made of a device.
struct Part {
    /// The kernel's class of it, such as `block`.
    kind: String,
    name: String,
    folder: PathBuf,
}

fn parts(device: &Path) -> Vec<Part> {
    let mut found = Vec::new();
    let mut open = vec![(device.to_owned(), DEPTH)];
    let mut looked_at = 0;
    while let Some((folder, depth)) = open.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            // A link leads to another device, or up.
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || looked_at >= MOST {
                continue;
            }
            looked_at += 1;
            let folder = entry.path();
            let kind = fs::read_link(folder.join("subsystem")).ok();
            if let Some(kind) = kind.as_deref().and_then(Path::file_name) {
                let kind = kind.to_string_lossy().into_owned();
                let name = entry.file_name().to_string_lossy().into_owned();
                if kind == "nvme" {
                    open.extend(shared_disks(device, &folder).map(|folder| (folder, 1)));
                }
                found.push(Part { kind, name, folder: folder.clone() });
            }
            if depth > 1 {
                open.push((folder, depth - 1));
            }
        }
    }
    found
}

/// Where an NVMe controller's disks are if other controllers may have them too: below what the
/// kernel makes of all of them.
fn shared_disks(device: &Path, controller: &Path) -> Option<PathBuf> {
    let subsystems = device.ancestors().find(|folder| folder.ends_with("sys"))?;
    let subsystems = subsystems.join("class/nvme-subsystem");
    let name = controller.file_name()?;
    let all = fs::read_dir(subsystems).ok()?.flatten();
    all.map(|entry| entry.path()).find(|folder| folder.join(name).exists())
}

/// What the host does with its disks.
struct Disks {
    /// `MAJOR:MINOR` and place of each file system that is mounted.
    mounts: Vec<(String, String)>,
    /// The files of the host's swap.
    swaps: Vec<String>,
}

impl Disks {
    fn read(host: &Host) -> Self {
        let mounts = host.proc("self/mountinfo");
        let mount = |line: &str| {
            let mut fields = line.split(' ');
            Some((fields.nth(2)?.to_owned(), fields.nth(1)?.to_owned()))
        };
        let swaps = host.proc("swaps");
        let swap = |line: &str| line.split_whitespace().next().map(str::to_owned);
        Self {
            mounts: mounts.lines().filter_map(mount).collect(),
            swaps: swaps.lines().skip(1).filter_map(swap).collect(),
        }
    }

    fn use_of(&mut self, part: &Part) -> Option<String> {
        let name = &part.name;
        let number = fs::read_to_string(part.folder.join("dev")).unwrap_or_default();
        if let Some((_, place)) = self.mounts.iter().find(|(dev, _)| dev == number.trim()) {
            return Some(format!("its disk {name} is mounted on {place}"));
        }
        if self.swaps.iter().any(|file| file.strip_prefix("/dev/") == Some(name)) {
            return Some(format!("its disk {name} is swap"));
        }
        let holder = fs::read_dir(part.folder.join("holders")).ok()?.flatten().next()?;
        Some(format!("its disk {name} is part of {}", holder.file_name().to_string_lossy()))
    }
}

fn way_out(host: &Host, part: &Part) -> Option<String> {
    let routes = host.proc("self/net/route");
    let is_default = |line: &str| {
        let mut fields = line.split_whitespace();
        fields.next() == Some(&part.name) && fields.next() == Some("00000000")
    };
    routes.lines().any(is_default).then(|| format!("its interface {} is the way out", part.name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::passthrough::host::tests::tree;

    fn part(host: &Host, address: &str, path: &str, kind: &str) -> PathBuf {
        let folder = host.device(address.parse().unwrap()).join(path);
        fs::create_dir_all(&folder).unwrap();
        symlink(format!("/sys/class/{kind}"), folder.join("subsystem")).unwrap();
        folder
    }

    fn used(host: &Host, address: &str) -> Option<String> {
        by_host(host, address.parse().unwrap())
    }

    #[test]
    fn a_disk_that_is_mounted_swap_or_part_of_another_is_in_use() {
        let (root, host) = tree(&[("0000:01:00.0", 7, Some("nvme"))]);
        assert_eq!(used(&host, "0000:01:00.0"), None);
        part(&host, "0000:01:00.0", "nvme/nvme0", "nvme");
        let disk = part(&host, "0000:01:00.0", "nvme/nvme0/nvme0n1", "block");
        let second = part(&host, "0000:01:00.0", "nvme/nvme0/nvme0n1/nvme0n1p2", "block");
        fs::write(disk.join("dev"), "259:0\n").unwrap();
        fs::write(second.join("dev"), "259:2\n").unwrap();
        let proc = root.path().join("proc/self");
        fs::create_dir_all(&proc).unwrap();
        fs::write(proc.join("mountinfo"), "22 1 259:1 / / rw - ext4 /dev/root rw\n").unwrap();
        assert_eq!(used(&host, "0000:01:00.0"), None);
        fs::write(proc.join("mountinfo"), "22 1 259:2 / /srv rw - ext4 /dev/x rw\n").unwrap();
        let how = used(&host, "0000:01:00.0").unwrap();
        assert_eq!(how, "its disk nvme0n1p2 is mounted on /srv");
        fs::write(proc.join("mountinfo"), "").unwrap();
        fs::write(root.path().join("proc/swaps"), "Filename Type\n/dev/nvme0n1 partition 1\n")
            .unwrap();
        assert_eq!(used(&host, "0000:01:00.0").unwrap(), "its disk nvme0n1 is swap");
        fs::write(root.path().join("proc/swaps"), "Filename Type\n").unwrap();
        fs::create_dir_all(disk.join("holders/dm-0")).unwrap();
        assert_eq!(used(&host, "0000:01:00.0").unwrap(), "its disk nvme0n1 is part of dm-0");
    }

    #[test]
    fn a_disk_that_several_controllers_have_is_found_below_all_of_them() {
        let (root, host) = tree(&[("0000:01:00.0", 7, Some("nvme"))]);
        part(&host, "0000:01:00.0", "nvme/nvme0", "nvme");
        let shared = root.path().join("sys/class/nvme-subsystem/nvme-subsys0");
        fs::create_dir_all(shared.join("nvme0")).unwrap();
        fs::create_dir_all(shared.join("nvme0n1/holders/md0")).unwrap();
        symlink("/sys/class/block", shared.join("nvme0n1/subsystem")).unwrap();
        assert_eq!(used(&host, "0000:01:00.0").unwrap(), "its disk nvme0n1 is part of md0");
    }

    #[test]
    fn an_interface_that_is_the_way_out_is_in_use() {
        let (root, host) = tree(&[("0000:01:00.0", 7, Some("virtio-pci"))]);
        part(&host, "0000:01:00.0", "virtio0/net/eth1", "net");
        let net = root.path().join("proc/self/net");
        fs::create_dir_all(&net).unwrap();
        fs::write(net.join("route"), "Iface Destination\neth0 00000000 1\neth1 0000000A 1\n")
            .unwrap();
        assert_eq!(used(&host, "0000:01:00.0"), None);
        fs::write(net.join("route"), "Iface Destination\neth1 00000000 1\n").unwrap();
        let how = used(&host, "0000:01:00.0").unwrap();
        assert_eq!(how, "its interface eth1 is the way out");
    }
}
