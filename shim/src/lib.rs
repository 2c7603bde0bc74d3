//! The orchestration of a sandbox: one virtual machine, one process for each of its devices, and
//! a container inside.
//!
//! The way through: a front end (the `nacre` command, later the containerd shim) fills in a
//! [`plan::SandboxConfig`]; [`plan::SandboxPlan::new`] checks it and says what will exist;
//! [`sandbox`] makes it exist, watches it and takes it down again. The library knows the other
//! programs as executables and sockets only. It never reads a command line and never prints.

pub mod agent;
pub mod backends;
pub mod cgroup;
pub mod child;
pub mod devices;
pub mod fault;
pub mod hybrid_vsock;
pub mod image;
mod lock;
pub mod log_file;
pub mod name;
pub mod network;
pub mod output_log;
mod packets;
pub mod passthrough;
pub mod paths;
pub mod plan;
pub mod pod;
pub mod record;
pub mod registry;
pub mod sandbox;
pub mod service;
pub mod size;
pub mod stdio;
pub mod streams;
pub mod sys;
pub mod timing;
pub mod vmm;

use std::error::Error;

/// An error and its causes in one line.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line = format!("{line}: {error}");
        source = error.source();
    }
    line
}
