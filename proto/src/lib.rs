//! Everything that crosses a process or VM boundary, as types with their framing and nothing else.
//!
//! This crate never opens a socket, never logs and knows no policy.

pub mod exit;
pub mod forward;
pub mod pci;
pub mod store;
pub mod stream;
pub mod supervisor;
pub mod vmm;

mod generated;

pub use generated::{agent, agent_ttrpc};

/// The agent protocol's major version: both sides refuse any other.
pub const AGENT_MAJOR: u32 = 1;
/// The agent protocol's minor version: a higher one only adds.
pub const AGENT_MINOR: u32 = 3;
/// The vsock port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// The vsock port on which the agent takes standard streams, one connection each.
pub const STREAM_PORT: u32 = 1025;
/// The vsock port on which the agent takes connections to TCP ports inside the guest.
pub const FORWARD_PORT: u32 = 1026;
