//! The emulated host's processes on this machine: QEMU, which emulates a processor with SVM, and
//! virtiofsd, which gives the host this machine's file system. Both die with the thread that
//! started them.

use super::devices;
use super::initramfs;
use super::progress::Progress;
use crate::cache::Cache;
use crate::executor::{PORT_NAME, TASK_ENV};
use crate::packages::kernel::Kernel;
use crate::packages::tree::Tree;
use crate::sys::bound_to_us;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::{env, thread};

const MEMORY_MAX_MIB: u64 = 6144;
const MEMORY_MIN_MIB: u64 = 1024;
const CPUS_MAX: usize = 4;
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr \
    tsc=reliable no_timer_check random.trust_cpu=on audit=0 apparmor=0";

/// What the host is made of, in the cache.
#[derive(Debug)]
pub struct Parts {
    kernel: Kernel,
    tree: Tree,
    initramfs: PathBuf,
    /// What is on the disks that are given to guests.
    disk: PathBuf,
}

impl Parts {
    /// The parts, made if they are not in the cache yet.
    ///
    /// # Errors
    /// Packages cannot be fetched, or the cache cannot be written.
    pub fn prepare(cache: &Cache) -> Result<Self> {
        let kernel = Kernel::prepare(cache)?;
        let tree = Tree::prepare(cache, &kernel)?;
        let initramfs = initramfs::prepare(cache, &kernel, &tree)?;
        let disk = devices::disk(cache)?;
        Ok(Self { kernel, tree, initramfs, disk })
    }

    /// What tells hosts of different parts apart.
    pub fn identity(&self) -> String {
        let paths = [self.tree.image(), &self.initramfs, &self.disk];
        let mut parts = paths.map(|path| path.display().to_string()).to_vec();
        parts.push(devices::names());
        crate::cache::key(&parts.iter().map(String::as_bytes).collect::<Vec<_>>())
    }
}

/// A host that runs; dropping it ends its processes.
#[derive(Debug)]
pub(super) struct Machine {
    qemu: Child,
    files: Child,
    /// Our end of the host's virtio port.
    pub(super) port: UnixStream,
}

impl Machine {
    /// Starts the processes. The console's output goes to the log and counts as progress.
    pub(super) fn start(parts: &Parts, log: &Path, progress: &Arc<Progress>) -> Result<Self> {
        let (files, share) = start_files(parts, log)?;
        let (port, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let mut command = qemu(parts, &share, &theirs)?;
        bound_to_us(&mut command, vec![share, OwnedFd::from(theirs)]);
        let writer = open_log(log)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(writer.try_clone()?);
        let mut qemu = command.spawn().context("cannot start QEMU")?;
        let console = qemu.stdout.take().context("QEMU without a console")?;
        let progress = Arc::clone(progress);
        thread::spawn(move || keep_log(console, writer, &progress));
        Ok(Self { qemu, files, port })
    }

    /// Says how QEMU ended, if it has.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.qemu.try_wait().ok().flatten()?;
        Some(format!("QEMU ended with {status}"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in [&mut self.qemu, &mut self.files] {
            // Both fail only for a process that has ended already.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn open_log(log: &Path) -> Result<File> {
    let file = File::options().create(true).append(true).open(log);
    file.with_context(|| format!("cannot write {}", log.display()))
}

fn keep_log(mut console: impl Read, mut log: File, progress: &Progress) {
    let mut buffer = [0; 4096];
    while let Ok(read) = console.read(&mut buffer) {
        if read == 0 {
            return;
        }
        progress.made();
        // A full disk must not stop the host.
        drop(log.write_all(&buffer[..read]));
    }
}

/// Starts virtiofsd and connects to it before it listens itself, so that nothing has to wait.
fn start_files(parts: &Parts, log: &Path) -> Result<(Child, OwnedFd)> {
    let socket = log.with_extension("files");
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot listen at {}", socket.display()))?;
    let connection = UnixStream::connect(&socket);
    fs::remove_file(&socket).with_context(|| format!("cannot remove {}", socket.display()))?;
    let connection = connection.context("cannot connect to the share's socket")?;
    let mut command = parts.tree.command("usr/libexec/virtiofsd");
    command.args(["--shared-dir", "/", "--sandbox", "none", "--log-level", "error"]);
    command.args(["--allow-direct-io", "--inode-file-handles=never", "--xattr"]);
    command.arg(format!("--fd={}", listener.as_raw_fd()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(open_log(log)?);
    bound_to_us(&mut command, vec![OwnedFd::from(listener)]);
    let child = command.spawn().context("cannot start virtiofsd")?;
    Ok((child, OwnedFd::from(connection)))
}

fn qemu(parts: &Parts, share: &OwnedFd, port: &UnixStream) -> Result<Command> {
    let memory_mib = memory_mib(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    let cpus = thread::available_parallelism().map_or(1, usize::from).min(CPUS_MAX);
    let mut command = parts.tree.command("usr/bin/qemu-system-x86_64");
    command.arg("-L").arg(parts.tree.path("usr/share/qemu"));
    command.arg("-L").arg(parts.tree.path("usr/share/seabios"));
    command.args(["-name", "nacre-host", "-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args([
        "-display",
        "none",
        "-serial",
        "stdio",
        "-accel",
        "tcg,thread=multi,tb-size=1024",
    ]);
    command.args(["-machine", "q35,memory-backend=memory", "-cpu", "max"]);
    command.args(["-smp", &cpus.to_string(), "-m", &memory_mib.to_string()]);
    let object = format!("memory-backend-memfd,id=memory,size={memory_mib}M,share=on");
    command.args(["-object", &object]);
    command.arg("-kernel").arg(parts.kernel.vmlinux()).arg("-initrd").arg(&parts.initramfs);
    command.args(["-append", &kernel_arguments(&env::current_exe()?)?]);
    let image = parts.tree.image().to_string_lossy().replace(',', ",,");
    let drive = format!("if=none,id=root,format=raw,readonly=on,file={image}");
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=root"]);
    command.args(["-chardev", &format!("socket,id=share,fd={}", share.as_raw_fd())]);
    command.args(["-device", "vhost-user-fs-pci,chardev=share,tag=host"]);
    command.args(["-chardev", &format!("socket,id=jobs,fd={}", port.as_raw_fd())]);
    command.args(["-device", "virtio-serial-pci"]);
    command.args(["-device", &format!("virtserialport,chardev=jobs,name={PORT_NAME}")]);
    command.args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]);
    devices::add(&mut command, &parts.disk);
    Ok(command)
}

/// The executor is this very program, as the host sees it.
fn kernel_arguments(program: &Path) -> Result<String> {
    let program = program.to_str().filter(|path| !path.contains(['"', '\n']));
    let Some(program) = program else { bail!("the path of this program has odd characters") };
    Ok(format!("{KERNEL_ARGUMENTS} {} {TASK_ENV}=\"/host{program}\"", devices::KERNEL_ARGUMENTS))
}

/// Half of this machine's memory; QEMU takes it only as the host touches it.
fn memory_mib(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let total_kib = total.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    total_kib.map_or(MEMORY_MIN_MIB, |kib| kib / 2048).clamp(MEMORY_MIN_MIB, MEMORY_MAX_MIB)
}

/// Whether this machine's memory is enough for two hosts at once, and as much again for all else.
pub(crate) fn has_room_for_two() -> bool {
    has_room(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
}

fn has_room(meminfo: &str) -> bool {
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = available.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
    available.is_some_and(|kib| kib / 1024 >= 3 * memory_mib(meminfo))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_gets_half_the_memory_within_limits() {
        assert_eq!(memory_mib("MemTotal:  8388608 kB\nMemFree: 1 kB\n"), 4096);
        assert_eq!(memory_mib("MemTotal:  838860800 kB\n"), MEMORY_MAX_MIB);
        assert_eq!(memory_mib(""), MEMORY_MIN_MIB);
    }

    #[test]
    fn two_hosts_have_room_where_three_would_have() {
        let meminfo = |available_mib: u64| {
            format!("MemTotal: {} kB\nMemAvailable: {} kB\n", 24 << 20, available_mib << 10)
        };
        assert!(has_room(&meminfo(3 * MEMORY_MAX_MIB)));
        assert!(!has_room(&meminfo(3 * MEMORY_MAX_MIB - 1)) && !has_room(""));
    }

    #[test]
    fn a_program_path_with_a_space_stays_one_argument() {
        let arguments = kernel_arguments(Path::new("/a b/xtask")).unwrap();
        assert!(arguments.ends_with("nacre_executor=\"/host/a b/xtask\""), "{arguments}");
        assert!(kernel_arguments(Path::new("/a\"b")).is_err());
    }
}
