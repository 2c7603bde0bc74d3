//! Watching a container's memory: each time the out-of-memory killer strikes in it is an event.

use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use crate::{cgroup::Cgroup, events::Events, ids::ContainerId, streams::pipe::Pipe, text::chain};

/// How often the killer struck in a container, as far as the host was told.
#[derive(Debug)]
pub(super) struct Killings {
    container: ContainerId,
    cgroup: Arc<Cgroup>,
    events: Arc<Events>,
    /// Counted and told of; held while both are done, so that nothing is told twice.
    told: Mutex<u64>,
}

impl Killings {
    /// None yet.
    pub(super) fn new(container: ContainerId, cgroup: Arc<Cgroup>, events: Arc<Events>) -> Self {
        Self { container, cgroup, events, told: Mutex::default() }
    }

    /// Looks, tells what is new, and answers whether the killer struck at all.
    pub(super) fn look(&self) -> bool {
        // Counting does not panic half-way.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let kills = self.cgroup.oom_kills();
        // Several since the last look are one event: they were one shortage.
        if kills > *told {
            *told = kills;
            self.events.out_of_memory(self.container.clone());
        }
        kills > 0
    }

    /// Ends what is left of the container, so that its init's end is its last.
    pub(super) async fn end_group(&self) {
        if let Err(error) = self.cgroup.empty().await {
            log::error!("{}: {}", self.container, chain(&error));
        }
    }

    /// Looks each time that the kernel counts something, until this is dropped.
    pub(super) fn watch(self: &Arc<Self>) -> io::Result<Watch> {
        let file = self.cgroup.memory_events();
        if !file.exists() {
            log::debug!("no memory controller: nothing to watch for {}", self.container);
            return Ok(Watch(None));
        }
        let changes = changes(&file)?;
        let killings = Arc::clone(self);
        let task = tokio::spawn(async move {
            loop {
                // What happened before the file was watched, too.
                killings.look();
                if let Err(error) = changed(&changes).await {
                    log::error!("{}: no more watch on its memory: {error}", killings.container);
                    return;
                }
            }
        });
        Ok(Watch(Some(task)))
    }
}

/// A watch that ends with this value.
#[derive(Debug)]
pub(super) struct Watch(Option<tokio::task::JoinHandle<()>>);

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// The kernel tells of its own changes of such a file as of writes (cgroup-v2, "memory.events").
fn changes(file: &Path) -> io::Result<Pipe> {
    let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&queue, file, WatchFlags::MODIFY)?;
    Pipe::new(queue)
}

async fn changed(changes: &Pipe) -> io::Result<()> {
    // One record without a name is 16 bytes, and equal ones in a row are one.
    let mut records = [0; 1024];
    match changes.read(&mut records).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn each_time_that_the_killer_strikes_is_told_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("memory.events");
        fs::write(&file, "low 0\noom_kill 0\n").unwrap();
        let events = Arc::new(Events::new());
        let id = ContainerId::parse("c").unwrap();
        let cgroup = Arc::new(Cgroup::of_tests(folder.path()));
        let killings = Arc::new(Killings::new(id, cgroup, Arc::clone(&events)));
        let watch = killings.watch().unwrap();
        for number in 1..=3 {
            fs::write(&file, format!("low {number}\noom_kill {}\n", number * 2)).unwrap();
            let event = timeout(Duration::from_secs(30), events.next(number - 1)).await.unwrap();
            assert_eq!((event.number, event.out_of_memory().container_id.as_str()), (number, "c"));
            assert!(killings.look());
        }
        drop(watch);
        // What the last moment brings is told by who looks then.
        fs::write(&file, "oom_kill 9\n").unwrap();
        assert!(killings.look() && killings.look());
        assert_eq!(events.next(3).await.number, 4);
    }
}
