//! `nacre-agent`: PID 1 of the guest. Arguments, mode, run, error chain, exit code.
//!
//! Four modes: PID 1 (set the guest up, serve on vsock, power off), `--listen-unix DIR` (the same
//! service on unix sockets inside private namespaces, for tests without a VM), `launch` (a
//! short-lived, single-threaded child that runs libcontainer once and ends) and `hold` (the first
//! process of the PID namespace that a sandbox's containers share).

use std::{env, process::ExitCode};

use crate::{args::Mode, monotonic::Monotonic, text::chain};

mod args;
mod cgroup;
mod container;
mod devices;
mod events;
mod forward;
mod holder;
mod ids;
mod init;
mod journal;
mod launch;
mod modules;
mod monotonic;
mod mounts;
mod process;
mod resources;
mod sandbox;
mod seccomp;
mod serve;
mod service;
mod shutdown;
mod streams;
mod sys;
mod text;

fn main() -> ExitCode {
    // Before anything else: for the host this is when the guest's user space began.
    let began = Monotonic::now();
    let mode = match Mode::parse(env::args_os().skip(1)) {
        Ok(mode) => mode,
        Err(error) => {
            journal::to_stderr();
            log::error!("{}", chain(&error));
            return ExitCode::from(2);
        }
    };
    let outcome = match &mode {
        Mode::Init => init::run_guest(began),
        Mode::ListenUnix(folder) => init::run_in_namespaces(folder, began),
        Mode::Hold => {
            journal::to_stderr();
            return holder::run();
        }
        Mode::Launch => {
            journal::to_stderr();
            return launch::child::run();
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // For PID 1 this ends in the kernel's panic, which is what the host watches for.
        Err(error) => {
            log::error!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
