//! The region in which a backend marks what is in flight, kept for its successor.
//!
//! The VMM never looks into it: it gets the file from one backend and hands it to the next, which
//! checks it. One region serves one driver, from DRIVER_OK to its reset: what a driver before it
//! left must never be taken up.

use std::fmt;
use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// A region and how it is described to backends.
pub struct InflightRegion {
    shape: VhostUserInflight,
    file: File,
}

impl InflightRegion {
    /// Has the backend make an empty one.
    pub(super) fn ask(frontend: &mut Frontend, queues: u16, size: u16) -> vhost::Result<Self> {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (shape, file) = frontend.get_inflight_fd(&wanted)?;
        Ok(Self { shape, file })
    }

    /// Gives it to a backend, before its rings start.
    pub(super) fn give(&self, frontend: &mut Frontend) -> vhost::Result<()> {
        frontend.set_inflight_fd(&self.shape, self.file.as_raw_fd())
    }
}

impl fmt::Debug for InflightRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InflightRegion").field("file", &self.file).finish_non_exhaustive()
    }
}
