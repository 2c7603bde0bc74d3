//! What end-to-end tests are written with: built programs, processes with deadlines, machines.
//!
//! Nothing here depends on the crates under test: they are programs and sockets, as for a user.

pub mod artifacts;
pub mod backend;
pub mod blackout;
pub mod containerd;
pub mod control;
pub mod hybrid_vsock;
pub mod image;
pub mod leftovers;
pub mod machine;
pub mod nacre;
pub mod packet;
pub mod passthrough;
pub mod process;
pub mod relay;
pub mod soak;
pub mod supervised;
pub mod surroundings;
pub mod terminal;
pub mod versus;
pub mod xtask;

mod sys;
