//! `nacre-vsock`: from the command line to a jailed process that serves one virtio socket device.

use std::process::ExitCode;

use backend_daemon::process::{self, BuildError, Policy};
use backend_vsock::args::Args;
use backend_vsock::device::Vsock;
use backend_vsock::host::{Host, Made};
use backend_vsock::packet::Cid;
use backend_vsock::seccomp;
use clap::Parser;

const POLICY: Policy = Policy {
    device_type: "vsock",
    features: &[],
    worker_syscalls: seccomp::WORKER,
    keep_capabilities: &[],
};

fn main() -> ExitCode {
    let args = Args::parse();
    let mut made = None;
    let exit = process::run("nacre-vsock", &args.daemon, &POLICY, || build(&args, &mut made));
    if let Some(Err(error)) = made.map(Made::remove) {
        log::warn!("cannot remove the socket: {error}");
    }
    exit
}

fn build(args: &Args, made: &mut Option<Made>) -> Result<Vsock, BuildError> {
    let (Some(cid), Some(path)) = (args.guest_cid, &args.uds_path) else {
        return Err(BuildError::Usage("--guest-cid and --uds-path are needed".to_owned()));
    };
    let listener = match args.uds_fd.map(process::inherited_fd).transpose() {
        Ok(listener) => listener,
        Err(error) => return Err(BuildError::Usage(format!("--uds-fd: {error}"))),
    };
    let (host, socket) = Host::open(path, listener).map_err(BuildError::resource)?;
    *made = socket;
    Ok(Vsock::new(Cid(cid), host))
}
