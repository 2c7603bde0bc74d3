//! The engine for hosts that refuse io_uring: each job is carried out at once, to its end.

use std::os::fd::AsFd as _;
use std::sync::Arc;

use crate::disk::Disk;
use crate::job::{Job, Progress};
use crate::request::Status;
use crate::sys;

/// Works on a disk by system calls that block.
pub(crate) struct Blocking {
    disk: Arc<Disk>,
}

impl Blocking {
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        Self { disk }
    }

    /// Carries a job out.
    pub(crate) fn finish(&self, job: &mut Job) -> Status {
        loop {
            let result = sys::take_step(self.disk.as_fd(), job);
            if let Progress::Finished(status) = job.advance(result) {
                return status;
            }
        }
    }
}
