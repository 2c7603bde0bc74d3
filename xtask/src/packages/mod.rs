//! Everything that comes from Debian packages: tools on the machine ([`machine`]), single packages
//! unpacked into the cache ([`apt`]), the kernel ([`kernel`]) and the emulated host's tree
//! ([`tree`]).

pub mod apt;
pub mod kernel;
pub mod machine;
pub mod tree;
