//! Raw frames on a network interface, in a network namespace that the test made.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::sys;

/// The largest frame that can be received, in bytes.
const FRAME_BYTES: usize = 65_536;

/// A packet socket bound to one interface: sees what leaves and enters it.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

/// Puts the calling thread, and what it will start, into an empty network namespace.
///
/// # Errors
///
/// Fails without the privilege for it.
pub fn own_namespace() -> Result<()> {
    sys::unshare_network().context("cannot make a network namespace")
}

/// A tap in this thread's network namespace, up, for as long as the descriptor is open. What the
/// kernel itself would send through it is switched off as far as it can be.
///
/// # Errors
///
/// Fails without `/dev/net/tun` or the privilege for it.
pub fn tap(name: &str) -> Result<OwnedFd> {
    // A kernel without IPv6 has no such file, and sends no router solicitations.
    drop(fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"));
    let tap = sys::tap(name).with_context(|| format!("cannot make the tap {name}"))?;
    let up = Command::new("ip").args(["link", "set", name, "up"]).status();
    ensure!(up.context("the ip command")?.success(), "cannot set {name} up");
    Ok(tap)
}

impl PacketSocket {
    /// Opens a socket on the interface called `name`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such interface, or without the privilege for it.
    pub fn on(name: &str) -> Result<Self> {
        Ok(Self(sys::packet_socket(name).with_context(|| format!("packet socket on {name}"))?))
    }

    /// Sends a frame out of the interface: for a tap, to its other side.
    ///
    /// # Errors
    ///
    /// Fails if the interface does not take it.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = send(&self.0, frame, SendFlags::empty()).context("cannot send a frame")?;
        ensure!(sent == frame.len(), "{sent} of {} bytes sent", frame.len());
        Ok(())
    }

    /// The next frame on the interface, in either direction.
    ///
    /// # Errors
    ///
    /// Fails if none comes within `patience`.
    pub fn receive(&self, patience: Duration) -> Result<Vec<u8>> {
        let timeout = Timespec::try_from(patience)?;
        let ready = poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout))?;
        ensure!(ready == 1, "no frame within {patience:?}");
        let mut frame = vec![0; FRAME_BYTES];
        let (len, _) = recv(&self.0, frame.as_mut_slice(), RecvFlags::empty())
            .map_err(io::Error::from)
            .context("cannot receive a frame")?;
        frame.truncate(len);
        Ok(frame)
    }
}
