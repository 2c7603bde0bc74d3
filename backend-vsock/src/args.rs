//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;

use backend_daemon::process::DaemonArgs;

use crate::packet::FIRST_GUEST_CID;

/// Serves one virtio socket device to a vhost-user frontend.
///
/// Host programs connect to the Unix socket PATH, write "CONNECT <port>" and a newline, read
/// "OK <port>" and a newline, and then talk to the guest's port. A guest that connects to port P
/// of the host (context id 2) reaches the Unix socket `PATH_P`.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "nacre-vsock", version)]
pub struct Args {
    /// What all backends share.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// The guest's context id: 3 to 4294967294
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(FIRST_GUEST_CID..u64::from(u32::MAX)),
        required_unless_present = "print_capabilities"
    )]
    pub guest_cid: Option<u64>,
    /// Where host programs connect; its folder is all that the process can reach
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    pub uds_path: Option<PathBuf>,
    /// Accept host programs on this inherited socket, which listens at PATH already
    #[arg(long, value_name = "N")]
    pub uds_fd: Option<RawFd>,
    /// Serve even where the host does not let the process leave its network: the sockets with
    /// abstract names there stay in its reach
    #[arg(long)]
    pub keep_network: bool,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from([&["nacre-vsock"], arguments].concat())
    }

    #[test]
    fn context_ids_of_other_machines_are_refused() {
        for cid in ["0", "1", "2", "4294967295", "18446744073709551615", "x", ""] {
            let arguments = ["--socket-path", "s", "--uds-path", "u", "--guest-cid", cid];
            assert!(parse(&arguments).is_err(), "{cid}");
        }
        let arguments = ["--socket-path", "s", "--uds-path", "u", "--guest-cid", "3"];
        assert_eq!(parse(&arguments).unwrap().guest_cid, Some(3));
    }

    #[test]
    fn capabilities_can_be_asked_for_without_anything_else() {
        assert!(parse(&["--print-capabilities"]).unwrap().daemon.print_capabilities);
        assert!(parse(&["--socket-path", "s", "--guest-cid", "3"]).is_err());
        assert!(parse(&["--socket-path", "s", "--uds-path", "u"]).is_err());
    }
}
