//! `nacre-net`: one network device in one process. Arguments, device, serve, exit code.

use std::process::ExitCode;

use backend_daemon::process;
use backend_net::args::Args;
use backend_net::device::NetDevice;
use backend_net::seccomp::POLICY;
use clap::Parser;

fn main() -> ExitCode {
    let args = Args::parse();
    process::run("nacre-net", &args.daemon, &POLICY, || NetDevice::open(&args))
}
