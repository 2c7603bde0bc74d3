//! The command line of `nacre-vmm`.

use std::{collections::HashSet, os::fd::RawFd, path::PathBuf};

use clap::Parser;
use log::LevelFilter;

use crate::{
    config::{AssignedConfig, Config, DeviceConfig, Endpoint, OnReset, SerialConfig},
    memory::layout,
};

/// Runs one virtual machine whose devices are vhost-user processes.
#[derive(Debug, Parser)]
#[command(name = "nacre-vmm", version)]
pub struct Args {
    /// The kernel: an ELF image with a PVH entry (vmlinux), or a bzImage.
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    /// The initial RAM file system.
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "STR", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// How many vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// How many vCPUs there can be, with those that are added later [default: no more].
    #[arg(long, value_name = "N")]
    max_cpus: Option<u32>,
    /// How much memory: a multiple of 2 MiB, in bytes or with K, M, G or T.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    memory: u64,
    /// How much memory there can be by hotplug; the same units. By default none is plugged.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_memory: Option<u64>,
    /// A device: id=NAME,(socket=PATH|fd=N),type=blk|net|fs|vsock|NUMBER[,queues=N]
    /// [,queue-size=N][,config=HEX].
    #[arg(long = "vhost-user", value_name = "DEVICE", value_parser = parse_device)]
    devices: Vec<DeviceConfig>,
    /// A device of the host's: id=NAME,address=0000:01:00.0[,container-fd=N,group-fd=N,device-fd=N].
    #[arg(long = "vfio", value_name = "DEVICE", value_parser = parse_assigned)]
    assigned: Vec<AssignedConfig>,
    /// How many PCI segments, each of which has room for 31 devices.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(layout::MAX_PCI_SEGMENTS)))]
    pci_segments: u16,
    /// The serial port: none, stdio, fd=N or file=PATH.
    #[arg(long, value_name = "WHERE", default_value = "none", value_parser = parse_serial)]
    serial: SerialConfig,
    /// What a reset by the guest does.
    #[arg(long, value_enum, default_value_t = OnReset::Restart)]
    on_reset: OnReset,
    /// The supervisor's SOCK_SEQPACKET socket.
    #[arg(long, value_name = "N")]
    control_fd: Option<RawFd>,
    /// What is logged to standard error: off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log_level: LevelFilter,
}

/// Why a command line makes no sense as a whole.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// Two devices of one name.
    #[error("two devices have the id {0}")]
    DuplicateId(String),
    /// A VM that has more than it can have.
    #[error("--cpus {cpus} is more than --max-cpus {max_cpus}")]
    MaxCpus {
        /// As given.
        cpus: u32,
        /// As given.
        max_cpus: u32,
    },
    /// A descriptor for two things.
    #[error("descriptor {0} is given twice")]
    DuplicateFd(RawFd),
}

impl Args {
    /// How much to log.
    #[must_use]
    pub fn log_level(&self) -> LevelFilter {
        self.log_level
    }

    /// The VM they describe.
    ///
    /// # Errors
    ///
    /// Fails if two arguments contradict each other.
    pub fn into_config(self) -> Result<Config, ArgsError> {
        let mut ids = HashSet::new();
        let device_ids = self.devices.iter().map(|device| &device.id);
        for id in device_ids.chain(self.assigned.iter().map(|device| &device.id)) {
            if !ids.insert(id) {
                return Err(ArgsError::DuplicateId(id.clone()));
            }
        }
        let mut fds = HashSet::new();
        let device_fds = self.devices.iter().filter_map(|device| match device.endpoint {
            Endpoint::Fd(fd) => Some(fd),
            Endpoint::Socket(_) => None,
        });
        let assigned_fds = self.assigned.iter().filter_map(|device| device.fds).flatten();
        let serial_fd = if let SerialConfig::Fd(fd) = self.serial { Some(fd) } else { None };
        for fd in device_fds.chain(assigned_fds).chain(serial_fd).chain(self.control_fd) {
            if !fds.insert(fd) {
                return Err(ArgsError::DuplicateFd(fd));
            }
        }
        let (cpus, max_cpus) = (self.cpus, self.max_cpus.unwrap_or(self.cpus));
        if cpus > max_cpus {
            return Err(ArgsError::MaxCpus { cpus, max_cpus });
        }
        Ok(Config {
            kernel: self.kernel,
            initramfs: self.initramfs,
            command_line: self.cmdline,
            cpus,
            max_cpus,
            memory_bytes: self.memory,
            max_memory_bytes: self.max_memory.unwrap_or(self.memory),
            pci_segments: self.pci_segments,
            devices: self.devices,
            assigned: self.assigned,
            serial: self.serial,
            on_reset: self.on_reset,
            control_fd: self.control_fd,
        })
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((end, 'K')) => (&text[..end], 10),
        Some((end, 'M')) => (&text[..end], 20),
        Some((end, 'G')) => (&text[..end], 30),
        Some((end, 'T')) => (&text[..end], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|error| format!("no size: {error}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "a size beyond 64 bits".to_owned())
}

fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(SerialConfig::None),
        None if text == "stdio" => Ok(SerialConfig::Stdio),
        Some(("fd", fd)) => Ok(SerialConfig::Fd(parse_fd(fd)?)),
        Some(("file", path)) if !path.is_empty() => Ok(SerialConfig::File(path.into())),
        _ => Err("neither none, stdio, fd=N nor file=PATH".to_owned()),
    }
}

fn parse_fd(text: &str) -> Result<RawFd, String> {
    match text.parse() {
        Ok(fd) if fd > libc::STDERR_FILENO => Ok(fd),
        _ => Err(format!("{text} is no descriptor above 2")),
    }
}

fn parse_number<T: std::str::FromStr>(key: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_error| format!("{key}={text} is no number in range"))
}

fn parse_type(text: &str) -> Result<u16, String> {
    // Virtio 1.3, chapter 5.
    match text {
        "net" => Ok(1),
        "blk" => Ok(2),
        "vsock" => Ok(19),
        "fs" => Ok(26),
        // The PCI device id has 6 bits for it.
        _ => match parse_number("type", text)? {
            number @ 1..=63 => Ok(number),
            number => Err(format!("type={number} is not in 1..=63")),
        },
    }
}

fn parse_hex(text: &str) -> Result<Vec<u8>, String> {
    let error = || "config is no even number of hexadecimal digits".to_owned();
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return Err(error());
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_error| error()))
        .collect()
}

/// What `key=value,key=value` says, each key once.
fn fields(text: &str) -> impl Iterator<Item = Result<(&str, &str), String>> {
    let mut keys = HashSet::new();
    text.split(',').map(move |part| {
        let (key, value) =
            part.split_once('=').ok_or_else(|| format!("{part:?} is no key=value"))?;
        if value.is_empty() || !keys.insert(key) {
            return Err(format!("{key} is empty or given twice"));
        }
        Ok((key, value))
    })
}

fn parse_assigned(text: &str) -> Result<AssignedConfig, String> {
    let (mut id, mut address) = (None, None);
    let mut fds = [None; 3];
    for field in fields(text) {
        let (key, value) = field?;
        match key {
            "id" => id = Some(value.to_owned()),
            "address" => address = Some(value.parse().map_err(|error| format!("{error}"))?),
            "container-fd" => fds[0] = Some(parse_fd(value)?),
            "group-fd" => fds[1] = Some(parse_fd(value)?),
            "device-fd" => fds[2] = Some(parse_fd(value)?),
            _ => return Err(format!("{key} is unknown")),
        }
    }
    let fds = match fds {
        [None, None, None] => None,
        [Some(container), Some(group), Some(device)] => Some([container, group, device]),
        _ => return Err("container-fd, group-fd and device-fd go together".to_owned()),
    };
    let address = address.ok_or("address is missing")?;
    Ok(AssignedConfig { id: id.ok_or("id is missing")?, address, fds })
}

fn parse_device(text: &str) -> Result<DeviceConfig, String> {
    let (mut id, mut socket, mut fd, mut device_type) = (None, None, None, None);
    let (mut queues, mut queue_size, mut config_space) = (None, None, None);
    for field in fields(text) {
        let (key, value) = field?;
        match key {
            "id" => id = Some(value.to_owned()),
            "socket" => socket = Some(Endpoint::Socket(value.into())),
            "fd" => fd = Some(Endpoint::Fd(parse_fd(value)?)),
            "type" => device_type = Some(parse_type(value)?),
            "queues" => queues = Some(parse_number(key, value)?),
            "queue-size" => queue_size = Some(parse_number(key, value)?),
            "config" => config_space = Some(parse_hex(value)?),
            _ => return Err(format!("{key} is unknown")),
        }
    }
    if socket.is_some() && fd.is_some() {
        return Err("either socket or fd".to_owned());
    }
    Ok(DeviceConfig {
        id: id.ok_or("id is missing")?,
        endpoint: socket.or(fd).ok_or("socket or fd is missing")?,
        device_type: device_type.ok_or("type is missing")?,
        queues,
        queue_size,
        config_space,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Config {
        let args = ["nacre-vmm", "--kernel", "k"].iter().chain(args);
        Args::try_parse_from(args).unwrap().into_config().unwrap()
    }

    #[test]
    fn a_kernel_alone_is_a_machine() {
        let config = parse(&[]);
        assert_eq!((config.cpus, config.memory_bytes), (1, 512 << 20));
        assert_eq!(config.max_memory_bytes, 512 << 20);
        assert_eq!(config.serial, SerialConfig::None);
        assert_eq!(config.pci_segments, 1);
        assert_eq!(config.on_reset, OnReset::Restart);
    }

    #[test]
    fn memory_can_become_more_than_there_is_at_first() {
        let config = parse(&["--memory", "1G", "--max-memory", "4G"]);
        assert_eq!((config.memory_bytes, config.max_memory_bytes), (1 << 30, 4 << 30));
    }

    #[test]
    fn vcpus_may_come_later_but_none_may_be_missing() {
        let config = |cpus, max| {
            let args = ["nacre-vmm", "--kernel", "k", "--cpus", cpus, "--max-cpus", max];
            Args::try_parse_from(args).unwrap().into_config()
        };
        let counts = |config: Config| (config.cpus, config.max_cpus);
        assert_eq!(config("2", "4").map(counts), Ok((2, 4)));
        assert_eq!(counts(parse(&["--cpus", "3"])), (3, 3));
        assert_eq!(config("5", "4"), Err(ArgsError::MaxCpus { cpus: 5, max_cpus: 4 }));
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2M"), Ok(2 << 20));
        assert_eq!(parse_size("3G"), Ok(3 << 30));
        for text in ["", "M", "-1", "1.5G", "99999999T", "4MB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_device_is_read_in_full() {
        let device =
            parse_device("id=d0,fd=7,type=blk,queues=2,queue-size=128,config=00ff").unwrap();
        assert_eq!(
            device,
            DeviceConfig {
                id: "d0".to_owned(),
                endpoint: Endpoint::Fd(7),
                device_type: 2,
                queues: Some(2),
                queue_size: Some(128),
                config_space: Some(vec![0, 0xff]),
            }
        );
        let other = parse_device("id=x,socket=/run/s,type=26").unwrap();
        assert_eq!(other.endpoint, Endpoint::Socket("/run/s".into()));
        assert_eq!(other.device_type, 26);
    }

    #[test]
    fn a_device_that_makes_no_sense_is_refused() {
        for text in [
            "",
            "id=a",
            "id=a,type=blk",
            "id=a,fd=7",
            "id=a,fd=1,type=blk",
            "id=a,fd=7,socket=s,type=blk",
            "id=a,id=b,fd=7,type=blk",
            "id=a,fd=7,type=64",
            "id=a,fd=7,type=disk",
            "id=a,fd=7,type=blk,config=0",
            "id=a,fd=7,type=blk,queues=70000",
            "id=a,fd=7,type=blk,color=red",
        ] {
            assert!(parse_device(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_device_of_the_host_s_has_an_address_and_all_descriptors_or_none() {
        let address = "0000:01:00.0".parse().unwrap();
        let bare = parse_assigned("id=disk,address=01:00.0");
        assert_eq!(bare, Ok(AssignedConfig { id: "disk".to_owned(), address, fds: None }));
        let whole = "id=disk,address=0000:01:00.0,container-fd=5,group-fd=6,device-fd=7";
        assert_eq!(parse_assigned(whole).unwrap().fds, Some([5, 6, 7]));
        for text in [
            "id=disk",
            "address=01:00.0",
            "id=disk,address=1",
            "id=disk,address=01:00.0,group-fd=6",
            "id=disk,address=01:00.0,socket=x",
        ] {
            assert!(parse_assigned(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_and_descriptors_are_given_once() {
        let config = |args: &[&str]| {
            let args = ["nacre-vmm", "--kernel", "k"].iter().chain(args);
            Args::try_parse_from(args).unwrap().into_config()
        };
        let first = "id=a,fd=7,type=blk";
        assert_eq!(
            config(&["--vhost-user", first, "--vhost-user", "id=a,fd=8,type=net"]),
            Err(ArgsError::DuplicateId("a".to_owned()))
        );
        assert_eq!(
            config(&["--vhost-user", first, "--vfio", "id=a,address=01:00.0"]),
            Err(ArgsError::DuplicateId("a".to_owned()))
        );
        assert_eq!(
            config(&["--vhost-user", first, "--control-fd", "7"]),
            Err(ArgsError::DuplicateFd(7))
        );
    }
}
