//! Everything that comes from Debian packages: tools on the machine ([`machine`]), single packages
//! unpacked into the cache ([`apt`]), the kernel ([`kernel`]), the emulated host's tree ([`tree`])
//! and containerd in several releases ([`containerd`]).

pub mod apt;
pub mod containerd;
pub mod kernel;
pub mod machine;
pub mod tree;
