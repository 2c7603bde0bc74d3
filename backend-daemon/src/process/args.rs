//! The part of a backend's command line that all backends share.
//!
//! It follows the vhost-user program conventions (`--socket-path`, `--fd`, `--print-capabilities`),
//! so that QEMU, libvirt and Cloud Hypervisor can start a backend as it is.

use std::os::fd::RawFd;
use std::path::PathBuf;

use log::LevelFilter;

/// Arguments of every backend; flatten it into the device's own.
///
/// A device's own required argument has to say `required_unless_present = "print_capabilities"`.
#[derive(Clone, Debug, clap::Args)]
pub struct DaemonArgs {
    /// Serve frontends one after the other on a Unix socket made at this path
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with = "fd",
        required_unless_present_any = ["fd", "print_capabilities"]
    )]
    pub socket_path: Option<PathBuf>,
    /// Serve on this inherited socket: a listening one, or one connected to its one frontend
    #[arg(long, value_name = "N")]
    pub fd: Option<RawFd>,
    /// Print what this program can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
    /// Write "ready" to this inherited descriptor once frontends are served, then close it
    #[arg(long, value_name = "N")]
    pub ready_fd: Option<RawFd>,
    /// Keep what a successor must know in this inherited, sealed memory file
    #[arg(long, value_name = "N", requires = "store_fd")]
    pub state_fd: Option<RawFd>,
    /// Leave descriptors for a successor to the supervisor at this inherited socket
    #[arg(long, value_name = "N", requires = "state_fd")]
    pub store_fd: Option<RawFd>,
    /// How much to log to standard error: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,
}
