//! QEMU behind the command line of `nacre-vmm`: under this name a sandbox runs on a VMM that none
//! of us wrote, with our backends. `NACRE_QEMU` is the command that starts QEMU.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// What of the VMM's command line matters to QEMU.
#[derive(Debug, Default)]
struct Machine {
    arguments: Vec<String>,
    memory: String,
    devices: usize,
}

fn main() -> Result<()> {
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
            // QEMU ends on a reset, has a monitor and a log of its own.
            "--on-reset" | "--control-fd" | "--log-level" | "--ready-fd" => {}
            other => bail!("QEMU is not told about {other}"),
        }
        Ok(())
    }

    fn add(&mut self, arguments: &[&str]) {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    }

    fn serial(&mut self, value: &str) -> Result<()> {
        let path = value.strip_prefix("file=").context("only a serial port to a file")?;
        self.add(&["-serial", &format!("file:{path}")]);
        Ok(())
    }

    fn device(&mut self, value: &str) -> Result<()> {
        let field = |key: &str| value.split(',').find_map(|part| part.strip_prefix(key));
        let number = field("fd=").context("only devices given as fd")?;
        let chardev = format!("c{}", self.devices);
        self.devices += 1;
        self.add(&["-chardev", &format!("socket,id={chardev},fd={number}")]);
        match field("type=").context("a device without a type")? {
            "blk" => self.add(&["-device", &format!("vhost-user-blk-pci,chardev={chardev}")]),
            "vsock" => self.add(&["-device", &format!("vhost-user-vsock-pci,chardev={chardev}")]),
            "fs" => {
                let tag = tag(field("config=").context("a share without its configuration")?)?;
                let device = format!("vhost-user-fs-pci,chardev={chardev},tag={tag}");
                self.add(&["-device", &device]);
            }
            "net" => {
                let netdev = format!("vhost-user,id=n{chardev},chardev={chardev}");
                let mac = field("mac=").map_or(String::new(), |mac| format!(",mac={mac}"));
                self.add(&["-netdev", &netdev]);
                self.add(&["-device", &format!("virtio-net-pci,netdev=n{chardev}{mac}")]);
            }
            other => bail!("a device of type {other}"),
        }
        Ok(())
    }
}

/// The tag at the beginning of a virtio-fs configuration space in hexadecimal digits.
fn tag(config: &str) -> Result<String> {
    ensure!(config.is_ascii() && config.len() >= 72, "{config} is no virtio-fs configuration");
    let bytes: Vec<u8> = (0..36)
        .map(|at| u8::from_str_radix(&config[2 * at..2 * at + 2], 16))
        .collect::<std::result::Result<_, _>>()?;
    Ok(String::from_utf8(bytes)?.trim_end_matches('\0').to_owned())
}
