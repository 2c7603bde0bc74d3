//! The engine on io_uring: the kernel works on many jobs at a time.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};

use crate::disk::Disk;
use crate::job::{Job, Progress};
use crate::request::Status;
use crate::sys::KernelRing;

/// Works on a disk through one ring, for one queue.
pub(crate) struct Uring {
    ring: KernelRing,
}

impl Uring {
    /// A ring for so many jobs at a time.
    pub(crate) fn new(disk: &Disk, jobs: u16) -> io::Result<Self> {
        Ok(Self { ring: KernelRing::new(disk.as_fd(), jobs)? })
    }

    /// The descriptor that can be read when something ended.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.ring.descriptor()
    }

    /// Whether no further job can be started before another ends.
    pub(crate) fn is_full(&self) -> bool {
        self.ring.is_full()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// Starts a job; `submit` has to follow. Gives it back if the engine is full.
    pub(crate) fn start(&mut self, job: Job) -> Result<(), Box<Job>> {
        self.ring.queue(job)
    }

    /// Tells the kernel of the jobs that were started.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.ring.submit(0)
    }

    /// Waits until a job has made progress.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        self.ring.submit(1)
    }

    /// A job that is finished. Jobs with steps left are started again; `submit` has to follow
    /// once this gives nothing more.
    pub(crate) fn finished(&mut self) -> Option<(Job, Status)> {
        while let Some((mut job, result)) = self.ring.ended() {
            match job.advance(result) {
                Progress::Finished(status) => return Some((job, status)),
                Progress::More => {
                    // Its own place has just become free.
                    if let Err(job) = self.ring.queue(job) {
                        return Some((*job, Status::IoError));
                    }
                }
            }
        }
        None
    }
}
