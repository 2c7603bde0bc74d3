//! `nacre-fs`: one shared folder in one process. Arguments, device, serve, exit code.

use std::process::ExitCode;

use backend_daemon::process;
use backend_fs::args::Args;
use backend_fs::device::FsDevice;
use backend_fs::seccomp::POLICY;
use clap::Parser;

fn main() -> ExitCode {
    let args = Args::parse();
    process::run("nacre-fs", &args.daemon, &POLICY, || FsDevice::open(&args))
}
