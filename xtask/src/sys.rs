//! The unsafe edge: what happens between fork and exec, and memory handed to KVM.

#![expect(unsafe_code, reason = "pre_exec hooks and KVM memory have no safe interface")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, ioctl_tiocsctty, set_parent_process_death_signal, setsid};
use rustix::stdio::stdin;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// Makes the command's process die with the thread that starts it, and inherit the given files
/// under the numbers they have now. The command owns the files: drop it after the start.
pub(crate) fn bound_to_us(command: &mut Command, inherited: Vec<OwnedFd>) {
    let prepare = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        for file in &inherited {
            fcntl_setfd(file, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the hook runs between fork and exec; it only makes system calls, allocates nothing
    // and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// Makes the command's process lead a new session, whose terminal is its standard input if
/// `with_terminal` says so; the given files are inherited as in [`bound_to_us`], and no others: what
/// leads a session may outlive who starts it, whose lock on a file, say, is not to be held by it.
pub(crate) fn leads_session(command: &mut Command, with_terminal: bool, inherited: Vec<OwnedFd>) {
    let prepare = move || -> io::Result<()> {
        setsid()?;
        if with_terminal {
            ioctl_tiocsctty(stdin())?;
        }
        close_others_on_exec()?;
        for file in &inherited {
            fcntl_setfd(file, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: as in `bound_to_us`: system calls alone.
    unsafe { command.pre_exec(prepare) };
}

/// Has all files but the three standard ones closed when a program is started.
fn close_others_on_exec() -> io::Result<()> {
    let (first, last, flags) = (3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: with this flag the call closes nothing and takes no pointer; it marks the files.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes over a file that our parent left open for us under this number.
///
/// # Errors
/// No file has this number.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the borrow ends within this function; a number without a file gives an error below.
    let file = unsafe { BorrowedFd::borrow_raw(number) };
    // The clone is closed on exec; the old number stays until we end, but not in our children.
    fcntl_setfd(file, FdFlags::CLOEXEC)?;
    file.try_clone_to_owned()
}

/// Makes the first region of `memory` the guest's memory from address 0.
///
/// # Errors
/// KVM refuses the region.
pub(crate) fn give_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> io::Result<()> {
    let region = memory.iter().next().ok_or(io::ErrorKind::InvalidInput)?;
    let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: region.len(),
        userspace_addr: host.expose_provenance() as u64,
    };
    // SAFETY: the region is a mapping of `memory`, which is that long; the caller keeps `memory`
    // for as long as the virtual machine.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn what_leads_a_session_inherits_what_it_is_given_and_nothing_else() {
        let [given, other] = [(); 2].map(|()| OwnedFd::from(io::pipe().unwrap().0));
        fcntl_setfd(&other, FdFlags::empty()).unwrap();
        let [is_there, is_not] = [given.as_raw_fd(), other.as_raw_fd()];
        let script =
            format!("test -e /proc/self/fd/{is_there} && ! test -e /proc/self/fd/{is_not}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]);
        leads_session(&mut command, false, vec![given]);
        assert!(command.status().unwrap().success(), "{script}");
    }
}
