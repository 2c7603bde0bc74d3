//! QEMU behind the command line of `nacre-vmm`: under this name a sandbox runs on a VMM that none
//! of us wrote, with our backends. `NACRE_QEMU` is the command that starts QEMU.

use std::env;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::process::{self, Command};

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::process::inherited;
use nacre_tests::relay;
use rustix::process::{Signal, set_parent_process_death_signal};

/// What of the VMM's command line matters to QEMU.
#[derive(Debug, Default)]
struct Machine {
    arguments: Vec<String>,
    memory: String,
    devices: usize,
}

/// The hidden first argument of the process that stands between QEMU and a backend.
const RELAY: &str = "relay";

fn main() -> Result<()> {
    if env::args().nth(1).as_deref() == Some(RELAY) {
        return relay();
    }
    let qemu = env::var("NACRE_QEMU").context("NACRE_QEMU")?;
    let mut machine = Machine::default();
    let mut flags = env::args().skip(1);
    while let Some(flag) = flags.next() {
        let value = flags.next().with_context(|| format!("{flag} without a value"))?;
        machine.take(&flag, &value)?;
    }
    let mut words = qemu.split_whitespace();
    let error = Command::new(words.next().context("NACRE_QEMU is empty")?)
        .args(words)
        .args(["-accel", "tcg,thread=multi", "-M", "q35,memory-backend=ram", "-cpu", "max"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-m", &machine.memory])
        .args(["-object", &format!("memory-backend-memfd,id=ram,size={},share=on", machine.memory)])
        .args(&machine.arguments)
        .exec();
    Err(error).context("cannot start QEMU")
}

/// Stands between QEMU, who will connect to standard input, and the backend at standard output.
fn relay() -> Result<()> {
    // QEMU is the parent: without it there is nothing to relay, whether it connected or not.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let listener = UnixListener::from(rustix::io::dup(rustix::stdio::stdin())?);
    let backend = rustix::io::dup(rustix::stdio::stdout())?;
    let (qemu, _) = listener.accept()?;
    relay::run(&qemu.into(), &backend)
}

impl Machine {
    fn take(&mut self, flag: &str, value: &str) -> Result<()> {
        match flag {
            "--kernel" => self.add(&["-kernel", value]),
            "--initramfs" => self.add(&["-initrd", value]),
            "--cmdline" => self.add(&["-append", value]),
            "--cpus" => self.add(&["-smp", value]),
            "--memory" => value.clone_into(&mut self.memory),
            "--vhost-user" => self.device(value)?,
            "--serial" => self.serial(value)?,
            // QEMU ends on a reset, has a monitor and a log of its own, and is asked for no more than
            // it begins with.
            "--on-reset" | "--control-fd" | "--log-level" | "--ready-fd" | "--max-cpus"
            | "--max-memory" => {}
            other => bail!("QEMU is not told about {other}"),
        }
        Ok(())
    }

    fn add(&mut self, arguments: &[&str]) {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    }

    fn serial(&mut self, value: &str) -> Result<()> {
        let number = value.strip_prefix("fd=").context("only a serial port to a descriptor")?;
        // A device file that is the descriptor: QEMU's chardev takes paths.
        self.add(&["-serial", &format!("file:/proc/self/fd/{number}")]);
        Ok(())
    }

    fn device(&mut self, value: &str) -> Result<()> {
        let field = |key: &str| value.split(',').find_map(|part| part.strip_prefix(key));
        let number = field("fd=").context("only devices given as fd")?;
        let kind = field("type=").context("a device without a type")?;
        let chardev = format!("c{}", self.devices);
        self.devices += 1;
        // QEMU passes no descriptors for a nic over a socket that was handed to it.
        let place = match kind {
            "net" => format!("path={},abstract=on", start_relay(number, &chardev)?),
            _ => format!("fd={number}"),
        };
        self.add(&["-chardev", &format!("socket,id={chardev},{place}")]);
        match kind {
            "blk" => self.add(&["-device", &format!("vhost-user-blk-pci,chardev={chardev}")]),
            "vsock" => self.add(&["-device", &format!("vhost-user-vsock-pci,chardev={chardev}")]),
            "fs" => {
                let config = field("config=").context("a share without its configuration")?;
                let tag = String::from_utf8(bytes(config)?)?;
                let tag = tag.split('\0').next().unwrap_or_default();
                let device = format!("vhost-user-fs-pci,chardev={chardev},tag={tag}");
                self.add(&["-device", &device]);
            }
            "net" => {
                let netdev = format!("vhost-user,id=n{chardev},chardev={chardev}");
                let config = field("config=").context("a nic without its configuration")?;
                let mac = bytes(config)?
                    .iter()
                    .take(6)
                    .map(|byte| format!("{byte:02x}"))
                    .collect::<Vec<_>>()
                    .join(":");
                self.add(&["-netdev", &netdev]);
                self.add(&["-device", &format!("virtio-net-pci,netdev=n{chardev},mac={mac}")]);
            }
            other => bail!("a device of type {other}"),
        }
        Ok(())
    }
}

/// Starts a process between the backend's socket and a new one, whose name it gives. The name is
/// in no folder, so that nothing is left of it.
fn start_relay(number: &str, chardev: &str) -> Result<String> {
    let name = format!("nacre-relay-{}-{chardev}", process::id());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    let backend = inherited(number.parse()?)?;
    let mut command = Command::new(env::current_exe()?);
    command.arg(RELAY).stdin(OwnedFd::from(listener)).stdout(backend).spawn()?;
    Ok(name)
}

/// What hexadecimal digits stand for.
fn bytes(digits: &str) -> Result<Vec<u8>> {
    ensure!(digits.is_ascii() && digits.len().is_multiple_of(2), "{digits} are no bytes");
    let pairs = (0..digits.len()).step_by(2);
    Ok(pairs
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16))
        .collect::<std::result::Result<_, _>>()?)
}
