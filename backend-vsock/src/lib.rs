//! A virtio socket device as a process: hybrid vsock, Unix sockets on the host's side.
//!
//! One worker thread owns everything and polls. `connection.rs` is the protocol, as a pure state
//! machine; start there. What a killed process's successor must know is in `ledger.rs`, and what
//! makes each step exact is told in `connections.rs`.

pub mod args;
pub mod conduit;
pub mod connection;
pub mod connections;
pub mod credit;
pub mod death;
pub mod device;
pub mod entry;
pub mod fault;
pub mod handshake;
pub mod heritage;
pub mod host;
pub mod keep;
pub mod ledger;
pub mod outbox;
pub mod packet;
pub mod seccomp;
pub mod socket;
pub mod table;

mod sys;
