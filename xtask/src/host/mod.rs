//! The KVM host on which sandboxes run: this machine, or an emulated one.
//!
//! `/dev/kvm` is probed. If it is full, commands run on this machine. If not, QEMU emulates a
//! processor with SVM, a Debian kernel with kvm_amd boots in it, and the same commands run there,
//! with this machine's files at their own places.
//!
//! ```text
//! xtask -- socket --> server (owns QEMU, virtiofsd) -- virtio port --> executor --> job
//! ```
//!
//! A host is private to one xtask, or kept: then it serves many, until `cargo xtask host down`.

mod client;
pub mod command;
pub(crate) mod devices;
mod initramfs;
pub mod machine;
pub mod places;
pub mod probe;
mod progress;
pub mod protocol;
pub mod server;
mod session;
pub(crate) mod window;

pub use session::{Captured, Emulated, NAME_VARIABLE, Session, job};

use crate::cache::Cache;
use anyhow::{Result, bail};
use probe::{KvmClass, probe};
use std::env;

/// The variable that chooses the host: `direct` or `emulated`; else the probe decides.
pub const HOST_VARIABLE: &str = "NACRE_HOST";

/// Where sandboxes run.
#[derive(Debug)]
pub enum Host {
    /// On this machine.
    Direct,
    /// On an emulated one, since `/dev/kvm` is not good enough.
    Emulated(Box<Emulated>, KvmClass),
}

impl Host {
    /// Chooses by the probe, or as `NACRE_HOST` says; prepares what an emulated host is made of.
    ///
    /// # Errors
    /// The variable has another value, or the emulated host's parts cannot be made.
    pub fn choose(cache: &Cache) -> Result<Self> {
        let class = probe();
        if forced()?.unwrap_or(class == KvmClass::Full) {
            return Ok(Self::Direct);
        }
        Ok(Self::Emulated(Box::new(Emulated::prepare(cache)?), class))
    }

    /// Whether this machine's own `/dev/kvm` will be used; prepares nothing.
    ///
    /// # Errors
    /// The variable has another value.
    pub fn is_direct() -> Result<bool> {
        Ok(forced()?.unwrap_or_else(|| probe() == KvmClass::Full))
    }

    /// One line for people: which host, and why.
    pub fn describe(&self) -> String {
        match self {
            Self::Direct => "host: this machine's /dev/kvm".to_owned(),
            Self::Emulated(_, class) => format!("host: emulated ({class})"),
        }
    }
}

/// What `NACRE_HOST` asks for, if anything: whether to use this machine.
pub(crate) fn forced() -> Result<Option<bool>> {
    match env::var(HOST_VARIABLE).as_deref() {
        Ok("direct") => Ok(Some(true)),
        Ok("emulated") => Ok(Some(false)),
        Ok("") | Err(_) => Ok(None),
        Ok(other) => bail!("{HOST_VARIABLE} is {other}: neither direct nor emulated"),
    }
}
