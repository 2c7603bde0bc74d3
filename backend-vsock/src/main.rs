//! `nacre-vsock`: from the command line to a jailed process that serves one virtio socket device.

use std::process::ExitCode;

use backend_daemon::process::{self, BuildError, Policy};
use backend_vsock::args::Args;
use backend_vsock::connections::TakeOverError;
use backend_vsock::device::Vsock;
use backend_vsock::heritage::{Heritage, HeritageError};
use backend_vsock::host::{Host, Made};
use backend_vsock::packet::Cid;
use backend_vsock::seccomp;
use backend_vsock::table::DESCRIPTORS_MAX;
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const POLICY: Policy = Policy { worker_syscalls: seccomp::WORKER, ..Policy::of("vsock") };

fn main() -> ExitCode {
    let args = Args::parse();
    let mut made = None;
    // A socket that was handed in is its owner's to remove, and one that outlives the process is
    // its supervisor's.
    let made_here = args.uds_fd.is_none() && args.daemon.store_fd.is_none();
    let policy = Policy { removes_files: made_here, ..POLICY };
    let exit = process::run("nacre-vsock", &args.daemon, &policy, || build(&args, &mut made));
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
    allow_descriptors();
    let cid = Cid(cid);
    let estate = args.daemon.estate().map_err(BuildError::resource)?;
    let mut heritage = Heritage::take(estate, cid).map_err(|error| match error {
        HeritageError::Ledger(_) => BuildError::state(error),
        HeritageError::Conduit(_) | HeritageError::Listener(_) => BuildError::resource(error),
    })?;
    let listener = heritage.listener.take().or(listener);
    let mut opened = Host::open(path, listener).map_err(BuildError::resource)?;
    if heritage.keep.is_kept() {
        // A successor listens there too. The folder is the supervisor's to remove.
        opened.made = None;
        heritage.keep_listener(opened.host.listener()).map_err(BuildError::resource)?;
    }
    *made = opened.made;
    opened.folder.keep_network(args.keep_network);
    Vsock::new(cid, opened.host, opened.folder, heritage).map_err(|error| match error {
        TakeOverError::Ledger(_) => BuildError::state(error),
        TakeOverError::Host(_) => BuildError::resource(error),
    })
}

/// The usual limit is just below what a full table needs.
fn allow_descriptors() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= DESCRIPTORS_MAX) {
        return;
    }
    let wanted = maximum.map_or(DESCRIPTORS_MAX, |maximum| maximum.min(DESCRIPTORS_MAX));
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }) {
        log::warn!("cannot have {wanted} open descriptors: {error}");
    }
}
