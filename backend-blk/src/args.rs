//! The command line, as typed, and the device that it describes.

use std::error::Error;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use backend_daemon::process::{BuildError, DaemonArgs, inherited_fd};

use crate::device::{BlockDevice, Setup};
use crate::disk::{Disk, DiskError, Mode};
use crate::kept;

/// Serves a raw disk image or a block device to one guest.
#[derive(Debug, clap::Parser)]
#[command(name = "nacre-blk", version, about)]
pub struct Args {
    /// The image or block device to serve
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with = "disk_fd",
        required_unless_present_any = ["disk_fd", "stand_in", "print_capabilities"]
    )]
    disk: Option<PathBuf>,
    /// Serve what is open under this inherited descriptor instead
    #[arg(long, value_name = "N")]
    disk_fd: Option<RawFd>,
    /// Be the disk of a predecessor (--state-fd) that can't be had any more: fail each request that
    /// is in flight or comes. Takes the predecessor's arguments; if its disk is still there, what
    /// it had handed to the kernel is waited for
    #[arg(long, requires = "state_fd")]
    stand_in: bool,
    /// Refuse writes, and let others read the image too
    #[arg(long)]
    read_only: bool,
    /// Bypass the host's page cache
    #[arg(long)]
    direct: bool,
    /// Wait so long for the image's lock; a successor that --state-fd makes waits two minutes if
    /// nothing is said here, others do not wait
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=86400))]
    lock_wait: Option<u32>,
    /// How to reach the disk
    #[arg(long, value_enum, value_name = "ENGINE", default_value_t = EngineChoice::Auto)]
    engine: EngineChoice,
    /// How many queues to offer, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// How many descriptors the frontend's queues will have, a power of two: no more requests are
    /// worked on at a time, and none may have more buffers
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = queue_size)]
    queue_size: u16,
    /// The serial number that the guest sees, at most 20 bytes
    #[arg(long, value_name = "ID", default_value = "", value_parser = serial)]
    serial: String,
    /// What all backends have in common.
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

/// How requests reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// By io_uring where the host allows it, else by blocking system calls
    Auto,
    /// By blocking system calls, one request of a queue after the other
    Blocking,
}

/// Longer than a disk takes that works at all.
const SUCCESSOR_WAIT_SECONDS: u32 = 120;

/// The longest serial number: `VIRTIO_BLK_ID_BYTES`.
const SERIAL_BYTES: usize = 20;

impl Args {
    /// Opens and locks the disk, and makes the device of it.
    ///
    /// # Errors
    ///
    /// Fails if the disk can't be had, or can't be a disk.
    pub fn device(&self) -> Result<BlockDevice, BuildError> {
        let estate = self.daemon.estate().map_err(BuildError::resource)?;
        let mut serial = [0; SERIAL_BYTES];
        serial[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
        let setup = Setup {
            serial,
            queues: self.num_queues,
            queue_size: self.queue_size,
            engine: self.engine,
        };
        let disk = self.disk();
        if self.stand_in {
            let limits = kept::read(estate.as_ref()).map_err(BuildError::state)?;
            match disk {
                // Who holds it may still answer into the guest's memory.
                Err(BuildError::Resource(error)) if is_in_use(&*error) => {
                    return Err(BuildError::Resource(error));
                }
                Err(error) => log::warn!("every request fails from here on: {error}"),
                Ok(_disk) => log::warn!("every request fails from here on: a stand-in serves"),
            }
            return Ok(BlockDevice::stand_in(limits, setup, estate));
        }
        let disk = disk?;
        kept::write(estate.as_ref(), &disk.limits).map_err(BuildError::state)?;
        let mut limits = disk.limits;
        if let Ok(known) = kept::read(estate.as_ref()) {
            // What it has grown by meanwhile, nobody has told the guest.
            limits.size_bytes = limits.size_bytes.min(known.size_bytes);
        }
        Ok(BlockDevice::new(disk, limits, setup, estate))
    }

    fn disk(&self) -> Result<Disk, BuildError> {
        let mode = Mode {
            read_only: self.read_only,
            direct: self.direct,
            lock_wait: Duration::from_secs(self.lock_wait_seconds().into()),
        };
        let disk = match (&self.disk, self.disk_fd) {
            (Some(path), _) => Disk::open(path, mode),
            (None, Some(number)) => inherited_fd(number)
                .map_err(|source| DiskError::Descriptor { number, source })
                .and_then(|fd| Disk::reopen(fd, &format!("descriptor {number}"), mode)),
            (None, None) => return Err(BuildError::Usage("no disk was given".to_owned())),
        };
        disk.map_err(BuildError::resource)
    }

    /// A predecessor that was killed may hold the lock, until what it had handed to the kernel
    /// has ended.
    fn lock_wait_seconds(&self) -> u32 {
        let usual = if self.daemon.state_fd.is_some() { SUCCESSOR_WAIT_SECONDS } else { 0 };
        self.lock_wait.unwrap_or(usual)
    }
}

fn is_in_use(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(DiskError::InUse { .. }))
}

fn queue_size(typed: &str) -> Result<u16, String> {
    let size: u16 = typed.parse().map_err(|_error| "no number of descriptors".to_owned())?;
    if (4..=1024).contains(&size) && size.is_power_of_two() {
        return Ok(size);
    }
    Err("a queue has a power of two of descriptors, from 4 to 1024".to_owned())
}

fn serial(typed: &str) -> Result<String, String> {
    if typed.len() <= SERIAL_BYTES && typed.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(typed.to_owned());
    }
    Err(format!("a serial number has at most {SERIAL_BYTES} printable ASCII characters"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let parse = |extra: &[&str]| {
            let base = ["nacre-blk", "--socket-path", "/s", "--disk", "/d"];
            Args::try_parse_from(base.iter().chain(extra))
        };
        assert!(parse(&[]).is_ok());
        for bad in [
            ["--queue-size", "100"],
            ["--queue-size", "2"],
            ["--num-queues", "0"],
            ["--serial", "123456789012345678901"],
            ["--disk-fd", "5"],
            ["--fd", "5"],
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
        assert!(Args::try_parse_from(["nacre-blk", "--socket-path", "/s"]).is_err());
        assert!(Args::try_parse_from(["nacre-blk", "--print-capabilities"]).is_ok());
        assert!(parse(&["--stand-in"]).is_err(), "nobody's stand-in");
        assert!(parse(&["--stand-in", "--state-fd", "5", "--store-fd", "6"]).is_ok());
    }

    #[test]
    fn who_may_have_a_predecessor_waits_for_the_lock() {
        let seconds = |extra: &[&str]| {
            let base = ["nacre-blk", "--socket-path", "/s", "--disk", "/d"];
            let args = Args::try_parse_from(base.iter().chain(extra));
            args.unwrap().lock_wait_seconds()
        };
        assert_eq!(seconds(&[]), 0);
        assert_eq!(seconds(&["--state-fd", "5", "--store-fd", "6"]), 120);
        assert_eq!(seconds(&["--state-fd", "5", "--store-fd", "6", "--lock-wait", "0"]), 0);
        assert_eq!(seconds(&["--lock-wait", "3"]), 3);
    }
}
