//! `nacre-blk`: serves one disk to one guest.

use std::process::ExitCode;

use backend_blk::args::Args;
use backend_blk::seccomp::POLICY;
use backend_daemon::process::run;
use clap::Parser as _;

fn main() -> ExitCode {
    let args = Args::parse();
    run("nacre-blk", &args.daemon, &POLICY, || args.device())
}
