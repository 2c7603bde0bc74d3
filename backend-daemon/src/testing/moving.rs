//! What a frontend does that moves a running guest: it has written pages logged, and copies them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, memfd_create};

use super::Driver;

/// The log of written pages.
pub struct DirtyLog(File);

impl DirtyLog {
    /// The pages that were logged so far, by their numbers.
    #[must_use]
    pub fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; usize::try_from(self.0.metadata().unwrap().len()).unwrap()];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        let set = |(at, byte): (u64, u8)| {
            (0..8).filter(move |bit| byte & 1 << bit != 0).map(move |bit| 8 * at + bit)
        };
        (0..).zip(bytes).flat_map(set).collect()
    }
}

impl Driver {
    /// Has the device log the pages that it writes to, from now on, whether or not queues run.
    pub fn log_dirty(&mut self) -> DirtyLog {
        let log = File::from(memfd_create("dirty", MemfdFlags::CLOEXEC).unwrap());
        log.set_len((self.memory.page_count() / 8).next_multiple_of(4096)).unwrap();
        self.connection.log_dirty(&log, &self.queues, &self.memory).unwrap();
        DirtyLog(log)
    }

    /// Ends that.
    pub fn stop_log(&mut self) {
        self.connection.stop_log().unwrap();
    }

    /// The guest's memory, page by page.
    #[must_use]
    pub fn pages(&self) -> BTreeMap<u64, Vec<u8>> {
        self.memory.pages()
    }
}
