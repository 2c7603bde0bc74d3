//! Locks on folders, between processes: waited for, but never for ever.

use std::{
    fs::File,
    io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock},
    io::Errno,
};

/// How often a lock that is taken is tried again.
const TRY_EVERY: Duration = Duration::from_millis(10);

/// Locks `folder` for this process alone, for as long as the answer lives. `called_off` is asked
/// while waiting and ends it by an error.
///
/// # Errors
///
/// Fails if the folder can't be opened, or another process holds the lock for all of `patience`.
pub(crate) fn exclusive(
    folder: &Path,
    patience: Duration,
    called_off: impl Fn() -> io::Result<()>,
) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file = rustix::fs::open(folder, flags, Mode::empty())?;
    let begun = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(File::from(file)),
            Err(Errno::WOULDBLOCK) if begun.elapsed() >= patience => {
                let text = format!("another process keeps it locked for {} s", patience.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        called_off()?;
        thread::sleep(TRY_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_exclusive_and_waiting_for_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let lock = |patience| exclusive(folder.path(), patience, || Ok(()));
        let held = lock(Duration::ZERO).unwrap();
        let error = lock(Duration::from_millis(30)).unwrap_err();
        assert_eq!(error.to_string(), "another process keeps it locked for 0 s");
        let called_off = || Err(io::Error::other("called off"));
        let error = exclusive(folder.path(), Duration::from_secs(60), called_off).unwrap_err();
        assert_eq!(error.to_string(), "called off");
        drop(held);
        lock(Duration::ZERO).unwrap();
    }
}
