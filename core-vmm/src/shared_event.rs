//! Eventfds that a backend holds too, used so that nobody waits for the backend.
//!
//! They are made non-blocking, but that is a property of what both ends share: a backend that was
//! taken over can change it at any time, and can keep the counter at its highest value. So an
//! eventfd is read by a call that does not wait whatever the flag says, and is looked at before it
//! is written. Between the look and the write there is a moment that a backend could use.

use std::io::{self, IoSliceMut};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::descriptor;

/// The position that stands for "where the file is": an eventfd has no other.
const CURRENT: u64 = u64::MAX;

/// Adds one, unless the counter is full: the other end then has enough to do.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn raise(event: &EventFd) -> io::Result<()> {
    if !is_ready(event, PollFlags::OUT) {
        return Ok(());
    }
    match event.write(1) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Takes what is in it.
pub fn drain(event: &EventFd) {
    let mut counter = [0; 8];
    let mut buffers = [IoSliceMut::new(&mut counter)];
    // With nothing in it the read fails, which is fine; so is what comes later anyway.
    preadv2(descriptor(event), &mut buffers, CURRENT, ReadWriteFlags::NOWAIT).ok();
}

/// Whether something is in it; it is not read.
#[must_use]
pub fn is_raised(event: &EventFd) -> bool {
    is_ready(event, PollFlags::IN)
}

fn is_ready(event: &EventFd, flags: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(descriptor(event), flags)];
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_CLOEXEC;

    use super::*;

    #[test]
    fn an_eventfd_that_was_made_blocking_holds_nobody_up() {
        let event = EventFd::new(EFD_CLOEXEC).unwrap();
        drain(&event);
        assert!(!is_raised(&event));
        raise(&event).unwrap();
        assert!(is_raised(&event));
        drain(&event);
        assert!(!is_raised(&event), "it is empty now");
        drain(&event);
        event.write(u64::MAX - 1).unwrap();
        raise(&event).unwrap();
        assert_eq!(event.read().unwrap(), u64::MAX - 1);
    }
}
