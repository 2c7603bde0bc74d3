//! The command line, as typed. What it means is decided in the modules of the commands.

use std::path::PathBuf;

use clap::{Args as Group, Parser, Subcommand};
use log::LevelFilter;
use shim::{cgroup::CpuShare, name::SandboxName, size::ByteSize};

/// Containers in virtual machines of their own.
#[derive(Debug, Parser)]
#[command(name = "nacre", version)]
pub(crate) struct Args {
    /// How much to tell on standard error: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub(crate) log_level: LevelFilter,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a program in a new sandbox.
    Run(Box<Run>),
    /// List the sandboxes.
    Ps(Ps),
    /// Run another program in a running sandbox.
    Exec(Exec),
    /// Show what a detached sandbox printed.
    Logs(Logs),
    /// End a sandbox: SIGTERM, then SIGKILL, then the machine itself.
    Stop(Stop),
    /// Look at a sandbox's devices, add and remove them, or replace the process of one, while the
    /// guest runs.
    #[command(subcommand)]
    Device(Device),
    /// Give a running sandbox more or fewer processors, more or less memory.
    Resize(Resize),
    /// Remove a sandbox that has ended, and what is left of one whose supervisor died.
    Rm(Rm),
}

#[derive(Debug, Group)]
pub(crate) struct Run {
    /// The sandbox's name; one is made up if none is given.
    #[arg(long)]
    pub(crate) name: Option<SandboxName>,
    /// Run in the background and print the name.
    #[arg(long, short = 'd', conflicts_with_all = ["interactive", "tty"])]
    pub(crate) detach: bool,
    /// The guest's kernel.
    #[arg(
        long,
        env = "NACRE_KERNEL",
        value_name = "PATH",
        default_value = "/usr/share/nacre/vmlinux"
    )]
    pub(crate) kernel: PathBuf,
    /// The guest's initial file system, with the agent.
    #[arg(
        long,
        env = "NACRE_INITRAMFS",
        value_name = "PATH",
        default_value = "/usr/share/nacre/initramfs"
    )]
    pub(crate) initramfs: PathBuf,
    /// Words added to the kernel's command line.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    pub(crate) kernel_args: Vec<String>,
    /// A folder as the container's root file system, read-only below an overlay in memory.
    #[arg(long, value_name = "DIR", required_unless_present = "image")]
    pub(crate) rootfs: Option<PathBuf>,
    /// An OCI layout, as a folder or a tar archive, as the container's root file system.
    #[arg(long, value_name = "LAYOUT", conflicts_with = "rootfs")]
    pub(crate) image: Option<PathBuf>,
    /// Let the container write to the folder given with --rootfs.
    #[arg(long, conflicts_with = "image")]
    pub(crate) writable_rootfs: bool,
    /// How many processors the guest has.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u32,
    /// How many processors it can be given later; as many as the host has unless told otherwise.
    #[arg(long, value_name = "N")]
    pub(crate) max_cpus: Option<u32>,
    /// How much memory the guest has.
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub(crate) memory: ByteSize,
    /// How much memory it can be given later; as much as the host has unless told otherwise.
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_memory: Option<ByteSize>,
    /// A folder of the host for the container: HOST:GUEST or HOST:GUEST:ro.
    #[arg(long, short = 'v', value_name = "HOST:GUEST[:ro]")]
    pub(crate) volume: Vec<String>,
    /// A disk image for the container, as /dev/disk-0, /dev/disk-1 and so on.
    #[arg(long, value_name = "FILE[:ro]")]
    pub(crate) disk: Vec<String>,
    /// A PCI device of the host for the guest, by VFIO; with `bind`, taken from its driver and given
    /// back at the end. Its interfaces get the address of `ip`.
    #[arg(long, value_name = "vfio:ADDRESS[,bind][,ip=ADDRESS/BITS]")]
    pub(crate) device: Vec<String>,
    /// Give the sandbox a network, with a way out where the host has one.
    #[arg(long)]
    pub(crate) net: bool,
    #[command(flatten)]
    pub(crate) process: Process,
    /// The name that the container has for itself; the sandbox's unless given.
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname: Option<String>,
    /// The container's memory limit in the guest.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory_limit: Option<ByteSize>,
    /// The container's limit of processes in the guest.
    #[arg(long, value_name = "N")]
    pub(crate) pids_limit: Option<u32>,
    /// The limit of memory of all the sandbox's processes on the host.
    #[arg(long, value_name = "SIZE")]
    pub(crate) host_memory_limit: Option<ByteSize>,
    /// The limit of all the sandbox's processes and threads on the host.
    #[arg(long, value_name = "N")]
    pub(crate) host_pids_limit: Option<u32>,
    /// The limit of processor time of all the sandbox's processes on the host, in processors.
    #[arg(long, value_name = "N")]
    pub(crate) host_cpu_limit: Option<CpuShare>,
    /// Where the other programs are; beside this one unless given.
    #[arg(long, value_name = "DIR")]
    pub(crate) bin_dir: Option<PathBuf>,
    /// How many seconds the guest may boot without a sign of progress.
    #[arg(long, value_name = "SECONDS", default_value_t = 120,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) agent_timeout: u64,
    /// Print when what happened, on standard error, at the end.
    #[arg(long)]
    pub(crate) timing: bool,
    /// The program and its arguments; an image may have its own.
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// How a program is to be run, in a new sandbox or in one that runs.
#[derive(Debug, Group)]
pub(crate) struct Process {
    /// Connect standard input.
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// Give the program a terminal.
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// A variable of the environment; without a value, with the one it has here.
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Who runs the program: USER or USER:GROUP, names or numbers.
    #[arg(long, short = 'u', value_name = "USER")]
    pub(crate) user: Option<String>,
    /// The folder in which it starts.
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<String>,
}

#[derive(Debug, Group)]
pub(crate) struct Ps {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Exec {
    #[command(flatten)]
    pub(crate) process: Process,
    /// Which sandbox.
    pub(crate) name: SandboxName,
    /// The program and its arguments.
    #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Group)]
pub(crate) struct Logs {
    /// Go on until the sandbox ends.
    #[arg(long, short = 'f')]
    pub(crate) follow: bool,
    /// Which sandbox.
    pub(crate) name: SandboxName,
}

#[derive(Debug, Group)]
pub(crate) struct Stop {
    /// How many seconds the container has after SIGTERM.
    #[arg(long, short = 't', default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub(crate) time: u64,
    /// Which sandboxes.
    #[arg(required = true)]
    pub(crate) names: Vec<SandboxName>,
}

#[derive(Debug, Group)]
pub(crate) struct Rm {
    /// End it first if it runs.
    #[arg(long, short = 'f')]
    pub(crate) force: bool,
    /// Which sandboxes.
    #[arg(required = true)]
    pub(crate) names: Vec<SandboxName>,
}

#[derive(Debug, Group)]
pub(crate) struct Resize {
    /// How many processors the guest is to have.
    #[arg(long, value_name = "N", required_unless_present = "memory")]
    pub(crate) cpus: Option<u32>,
    /// How much memory the guest is to have, all together.
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Which sandbox.
    pub(crate) name: SandboxName,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Device {
    /// List the devices and their processes.
    List(DeviceList),
    /// Give the running sandbox another device, and print what the container knows it by.
    Add(DeviceAdd),
    /// Take a device from the running sandbox.
    Remove(DeviceRemove),
    /// Replace a device's process by a new one of the same program.
    Restart(DeviceRestart),
    /// Replace a device's process by one of another program, which later ones are started from,
    /// too. If it does not serve, the old one is started again.
    Upgrade(DeviceUpgrade),
}

#[derive(Debug, Group)]
pub(crate) struct DeviceList {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Of which sandbox.
    pub(crate) name: SandboxName,
}

#[derive(Debug, Group)]
pub(crate) struct DeviceAdd {
    /// To which sandbox.
    pub(crate) name: SandboxName,
    #[command(subcommand)]
    pub(crate) kind: DeviceKind,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceKind {
    /// A disk image or a block device: /dev/disk-0, /dev/disk-1 and so on in the container.
    Disk {
        /// The image.
        #[arg(value_name = "FILE[:ro]")]
        disk: String,
    },
    /// A folder of the host.
    Share {
        /// Where it is, and where the container is to have it.
        #[arg(value_name = "HOST:GUEST[:ro]")]
        volume: String,
    },
    /// A network interface with an address of its own.
    Net,
    /// A PCI device of the host, by VFIO.
    Vfio {
        /// Which, as for `nacre run --device`.
        #[arg(value_name = "ADDRESS[,bind][,ip=ADDRESS/BITS]")]
        function: String,
    },
}

#[derive(Debug, Group)]
pub(crate) struct DeviceRemove {
    /// From which sandbox.
    pub(crate) name: SandboxName,
    /// Which device.
    pub(crate) device: String,
}

#[derive(Debug, Group)]
pub(crate) struct DeviceRestart {
    /// Of which sandbox.
    pub(crate) name: SandboxName,
    /// Which device.
    pub(crate) device: String,
}

#[derive(Debug, Group)]
pub(crate) struct DeviceUpgrade {
    /// The program; what is at the path of the running one unless given.
    #[arg(long, value_name = "PATH")]
    pub(crate) binary: Option<PathBuf>,
    /// Of which sandbox.
    pub(crate) name: SandboxName,
    /// Which device.
    pub(crate) device: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parsed(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_follows_the_options_is_the_containers() {
        let args = parsed("nacre run --rootfs /r -i -- ls -l --net").unwrap();
        let Command::Run(run) = args.command else { panic!("not run") };
        assert_eq!(run.command, ["ls", "-l", "--net"]);
        assert!(run.process.interactive && !run.net);
        let args = parsed("nacre run --rootfs /r ls -l --net -- x").unwrap();
        let Command::Run(run) = args.command else { panic!("not run") };
        assert_eq!(run.command, ["ls", "-l", "--net", "--", "x"]);
        let args = parsed("nacre exec -it web sh -c ls").unwrap();
        let Command::Exec(exec) = args.command else { panic!("not exec") };
        assert_eq!(exec.command, ["sh", "-c", "ls"]);
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "nacre run -- ls",
            "nacre run --rootfs /r --image /i",
            "nacre run --image /i --writable-rootfs",
            "nacre run --rootfs /r --detach -t",
            "nacre run --rootfs /r --name ../x",
            "nacre run --rootfs /r --memory 1Q",
            "nacre run --rootfs /r --no-such-option ls",
            "nacre exec web",
            "nacre resize web",
            "nacre resize --cpus 2",
            "nacre device add web",
            "nacre device add web disk",
            "nacre device add web net x",
            "nacre device remove web",
            "nacre exec web --no-such-option ls",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
