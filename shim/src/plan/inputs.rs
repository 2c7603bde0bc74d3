//! What a plan needs to know of the host, and whether the files that it names can be used.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    net::Ipv4Addr,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    thread,
};

use nacre_proto::exit::RunExit;

use crate::{
    image::beneath::Beneath,
    network,
    plan::{Contents, SandboxConfig},
    size::ByteSize,
};

/// The largest account file that is read, in bytes.
const MAX_ACCOUNTS_BYTES: u64 = 1 << 20;
/// What a disk's size is a multiple of, in bytes (virtio 1.3, section 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// What a plan takes from the host.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// How many processors are online.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// Memory and swap.
    pub memory_and_swap: ByteSize,
    /// The physical address width of the processors, if the kernel tells.
    pub address_bits: Option<u32>,
    /// The name servers that a guest can reach.
    pub nameservers: Vec<Ipv4Addr>,
    /// /etc/passwd of the container's root file system, or nothing.
    pub passwd: String,
    /// /etc/group of the container's root file system, or nothing.
    pub group: String,
}

/// What a file or a folder is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The guest's kernel.
    Kernel,
    /// The guest's initial file system.
    Initramfs,
    /// The container's root file system.
    RootFs,
    /// A folder that is shared.
    Volume,
    /// A disk image or a block device.
    Disk,
    /// Where the host tells of its memory.
    HostMemory,
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::RootFs => "root file system",
            Self::Volume => "volume",
            Self::Disk => "disk",
            Self::HostMemory => "the host's memory",
        })
    }
}

/// A file that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}{}", path.display(), complaint.words())]
pub struct InputError {
    what: Input,
    path: PathBuf,
    #[source]
    source: Option<io::Error>,
    complaint: Complaint,
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Complaint {
    /// The kernel's error says it.
    Unusable,
    Empty,
    NotFile,
    NotFolder,
    NotDisk,
    NotSectors,
}

impl Complaint {
    fn words(self) -> &'static str {
        match self {
            Self::Unusable => "",
            Self::Empty => ": the file is empty",
            Self::NotFile => ": not a file",
            Self::NotFolder => ": not a folder",
            Self::NotDisk => ": neither a file nor a block device",
            Self::NotSectors => ": its size is no multiple of 512 bytes",
        }
    }
}

impl InputError {
    fn new(what: Input, path: &Path, complaint: Complaint) -> Self {
        Self { what, path: path.to_owned(), source: None, complaint }
    }

    fn unusable(what: Input, path: &Path) -> impl Fn(io::Error) -> Self {
        move |error| Self { source: Some(error), ..Self::new(what, path, Complaint::Unusable) }
    }

    /// The exit code of a command that fails by it.
    #[must_use]
    pub fn exit(&self) -> RunExit {
        match self.what {
            Input::Kernel | Input::Initramfs => RunExit::BootFile,
            Input::RootFs => RunExit::RootFs,
            Input::Volume => RunExit::Volume,
            Input::Disk => RunExit::Disk,
            Input::HostMemory => RunExit::Setup,
        }
    }
}

impl HostFacts {
    /// Asks the host, and the container's root file system for its accounts, if there is one.
    ///
    /// # Errors
    ///
    /// Fails if /proc is not there or the root file system is no folder.
    pub fn gather(rootfs: Option<&Path>) -> Result<Self, InputError> {
        let meminfo = Path::new("/proc/meminfo");
        let text = fs::read_to_string(meminfo);
        let text = text.map_err(InputError::unusable(Input::HostMemory, meminfo))?;
        let open = |rootfs: &Path| {
            Beneath::open(rootfs).map_err(InputError::unusable(Input::RootFs, rootfs))
        };
        let root = rootfs.map(open).transpose()?;
        let accounts = |path: &str| {
            let Some(root) = &root else { return String::new() };
            let bytes = root.read(Path::new(path), MAX_ACCOUNTS_BYTES);
            let bytes = bytes.inspect_err(|error| log::debug!("the container's {path}: {error}"));
            String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
        };
        Ok(Self {
            cpus: u32::try_from(num_cpus()).unwrap_or(u32::MAX),
            memory: ByteSize(meminfo_bytes(&text, "MemTotal:")),
            memory_and_swap: memory_and_swap(&text),
            address_bits: address_bits(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            nameservers: network::nameservers(),
            passwd: accounts("etc/passwd"),
            group: accounts("etc/group"),
        })
    }
}

/// How many processors this process may use, as long as nothing keeps it from more.
fn num_cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// A field of /proc/meminfo; 0 if it is not there.
fn meminfo_bytes(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default().saturating_mul(1024)
}

fn memory_and_swap(meminfo: &str) -> ByteSize {
    let bytes = |name| meminfo_bytes(meminfo, name);
    ByteSize(bytes("MemTotal:").saturating_add(bytes("SwapTotal:")))
}

/// The line of /proc/cpuinfo is `address sizes   : 46 bits physical, 48 bits virtual`.
fn address_bits(cpuinfo: &str) -> Option<u32> {
    let line = cpuinfo.lines().find(|line| line.starts_with("address sizes"))?;
    line.split_once(':')?.1.split_once("bits physical")?.0.trim().parse().ok()
}

/// Checks that every file and folder of `config` can be used, before anything is started: that it
/// is there and of the right kind, and that its first byte, or its list of names, can be read.
///
/// # Errors
///
/// Fails with the first that can't.
pub fn check(config: &SandboxConfig) -> Result<(), InputError> {
    content(Input::Kernel, &config.kernel)?;
    content(Input::Initramfs, &config.initramfs)?;
    let Contents::Container(container) = &config.contents else { return Ok(()) };
    folder(Input::RootFs, &container.rootfs)?;
    for volume in &container.volumes {
        self::volume(&volume.host)?;
    }
    for given in &container.disks {
        disk(&given.path, given.read_only)?;
    }
    Ok(())
}

/// Checks a folder that is to be shared.
///
/// # Errors
///
/// Fails if it can't be listed.
pub(crate) fn volume(path: &Path) -> Result<(), InputError> {
    folder(Input::Volume, path)
}

/// Whether there is a first byte.
fn has_content(mut file: &File) -> io::Result<bool> {
    Ok(file.read(&mut [0])? > 0)
}

fn content(what: Input, path: &Path) -> Result<(), InputError> {
    let failed = InputError::unusable(what, path);
    if !fs::metadata(path).map_err(&failed)?.is_file() {
        return Err(InputError::new(what, path, Complaint::NotFile));
    }
    let file = File::open(path).map_err(&failed)?;
    if has_content(&file).map_err(&failed)? {
        Ok(())
    } else {
        Err(InputError::new(what, path, Complaint::Empty))
    }
}

fn folder(what: Input, path: &Path) -> Result<(), InputError> {
    let failed = InputError::unusable(what, path);
    if !fs::metadata(path).map_err(&failed)?.is_dir() {
        return Err(InputError::new(what, path, Complaint::NotFolder));
    }
    let first = fs::read_dir(path).map_err(&failed)?.next();
    first.transpose().map_err(&failed).map(drop)
}

/// Checks a disk image or a block device.
///
/// # Errors
///
/// Fails if it can't be used as one.
pub(crate) fn disk(path: &Path, read_only: bool) -> Result<(), InputError> {
    let failed = InputError::unusable(Input::Disk, path);
    let kind = fs::metadata(path).map_err(&failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(InputError::new(Input::Disk, path, Complaint::NotDisk));
    }
    let mut file = File::options().read(true).write(!read_only).open(path).map_err(&failed)?;
    if !has_content(&file).map_err(&failed)? {
        return Err(InputError::new(Input::Disk, path, Complaint::Empty));
    }
    // The end of a block device is its size, though its metadata says 0.
    let bytes = file.seek(SeekFrom::End(0)).map_err(&failed)?;
    if bytes.is_multiple_of(SECTOR_BYTES) {
        Ok(())
    } else {
        Err(InputError::new(Input::Disk, path, Complaint::NotSectors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_swap_are_added() {
        let text = "MemTotal:        2048 kB\nMemFree: 1 kB\nSwapTotal:       1024 kB\n";
        assert_eq!(memory_and_swap(text), ByteSize(3 << 20));
    }

    #[test]
    fn the_address_width_is_the_physical_one() {
        let text = "flags\t: fpu\naddress sizes\t: 46 bits physical, 48 bits virtual\n";
        assert_eq!(address_bits(text), Some(46));
        assert_eq!(address_bits("address sizes\t: many\n"), None);
        assert_eq!(address_bits(""), None);
    }

    fn complaint(result: Result<(), InputError>) -> Complaint {
        result.unwrap_err().complaint
    }

    #[test]
    fn a_file_that_is_missing_empty_unreadable_or_none_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernel");
        let kernel = |path: &Path| content(Input::Kernel, path);
        assert_eq!(complaint(kernel(&file)), Complaint::Unusable);
        fs::write(&file, "").unwrap();
        assert_eq!(complaint(kernel(&file)), Complaint::Empty);
        assert_eq!(complaint(kernel(folder.path())), Complaint::NotFile);
        // It opens, and nothing is mapped at address 0.
        assert_eq!(complaint(kernel(Path::new("/proc/self/mem"))), Complaint::Unusable);
        fs::write(&file, "x").unwrap();
        kernel(&file).unwrap();
        assert_eq!(complaint(super::folder(Input::Volume, &file)), Complaint::NotFolder);
    }

    #[test]
    fn a_disk_is_a_file_of_whole_sectors() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        assert_eq!(complaint(disk(&file, true)), Complaint::Unusable);
        assert_eq!(complaint(disk(folder.path(), true)), Complaint::NotDisk);
        assert_eq!(complaint(disk(Path::new("/dev/null"), true)), Complaint::NotDisk);
        fs::write(&file, "").unwrap();
        assert_eq!(complaint(disk(&file, true)), Complaint::Empty);
        fs::write(&file, [7; 513]).unwrap();
        assert_eq!(complaint(disk(&file, true)), Complaint::NotSectors);
        fs::write(&file, [7; 1024]).unwrap();
        disk(&file, false).unwrap();
    }
}
