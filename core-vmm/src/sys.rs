//! Everything in this crate that the compiler can't check, one system call a function.
//!
//! Owned, safe types come out; no caller needs to know an invariant of what is here.
#![expect(unsafe_code, reason = "KVM, signals and mappings have no safe interface")]

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicU8, Ordering},
};

use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void};

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// `KVM_GET_STATS_FD`, `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::Ioctl = 0xaece;

/// A descriptor of what KVM counts about a VM or a vCPU, which only reads.
///
/// # Errors
///
/// Fails if this KVM has none to give.
pub(crate) fn kvm_statistics(of: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: the request takes no argument and makes a new descriptor.
    let fd = check(unsafe { libc::ioctl(of.as_raw_fd(), KVM_GET_STATS_FD, 0) })?;
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// A port access that ended a vCPU's run.
///
/// A string instruction gives several at once: `data` is then as many elements of `size` bytes,
/// each an access of its own to the one port.
#[derive(Debug)]
pub(crate) struct PortAccess<'a> {
    /// Which port.
    pub(crate) port: u16,
    /// Whether `data` is to be filled.
    pub(crate) is_read: bool,
    /// Bytes of one access: 1, 2 or 4.
    pub(crate) size: usize,
    /// All the accesses' bytes.
    pub(crate) data: &'a mut [u8],
}

/// The port access for which `vcpu` last left the guest, if that was why.
pub(crate) fn port_access(vcpu: &mut VcpuFd) -> Option<PortAccess<'_>> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_IO {
        return None;
    }
    // SAFETY: the exit reason says that `io` is the union's field in use.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size);
    let len = size.checked_mul(usize::try_from(io.count).ok()?)?;
    let offset = usize::try_from(io.data_offset).ok()?;
    // SAFETY: KVM puts the data into the page that follows the one of `kvm_run` in the same
    // mapping, which `vcpu` keeps, and says where.
    let start = unsafe { ptr::from_mut(run).cast::<u8>().add(offset) };
    // SAFETY: as above; KVM keeps `count * size` within that page. The slice borrows `vcpu`, so
    // no run can change it meanwhile.
    let data = unsafe { slice::from_raw_parts_mut(start, len) };
    Some(PortAccess {
        port: io.port,
        is_read: u32::from(io.direction) == KVM_EXIT_IO_IN,
        size,
        data,
    })
}

/// The number by which KVM tells what it could not do, if that was why `vcpu` left the guest.
pub(crate) fn internal_suberror(vcpu: &mut VcpuFd) -> Option<u32> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: the exit reason says that `internal` is the union's field in use.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    Some(internal.suberror)
}

/// A second mapping of the first page that a vCPU shares with KVM, for asking it to leave the
/// guest from another thread.
#[derive(Debug)]
pub(crate) struct ImmediateExit {
    page: NonNull<c_void>,
}

const RUN_PAGE_BYTES: usize = 4096;

// SAFETY: the one byte that is ever touched through it is touched atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps it.
    ///
    /// # Errors
    ///
    /// Fails if the host can't map it.
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = vcpu.as_raw_fd();
        // SAFETY: no address is asked for, so the kernel picks one that nothing uses.
        let page =
            unsafe { libc::mmap(ptr::null_mut(), RUN_PAGE_BYTES, prot, libc::MAP_SHARED, fd, 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(page).map(|page| Self { page }).ok_or(io::ErrorKind::OutOfMemory.into())
    }

    /// Makes the next run end at once, or no longer so.
    pub(crate) fn set(&self, exit: bool) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the field lies in the first page, which is mapped as long as `self` lives.
        let byte = unsafe { self.page.cast::<u8>().add(offset) };
        // SAFETY: an atomic byte has no alignment; KVM only reads it, and no Rust reference to it
        // is used while a vCPU runs.
        let byte = unsafe { AtomicU8::from_ptr(byte.as_ptr()) };
        byte.store(u8::from(exit), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `of` and nothing else points into it.
        let result = unsafe { libc::munmap(self.page.as_ptr(), RUN_PAGE_BYTES) };
        debug_assert_eq!(result, 0, "the page is a mapping");
    }
}

extern "C" fn leave_guest(_signal: c_int) {}

/// The signal that interrupts a vCPU; nothing else uses it.
#[must_use]
pub(crate) fn kick_signal() -> c_int {
    libc::SIGRTMIN()
}

/// Lets the kick signal interrupt a system call and do nothing else.
///
/// # Errors
///
/// Fails if the kernel refuses the handler.
pub(crate) fn handle_kick_signal() -> io::Result<()> {
    // SAFETY: all zeros are a valid `sigaction`: no flags, so no SA_RESTART, and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int) = leave_guest;
    action.sa_sigaction = handler as *const () as usize;
    // SAFETY: the handler does nothing, so it is safe at any moment.
    check(unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) }).map(drop)
}

/// The calling thread, as the kernel names it.
#[must_use]
pub(crate) fn thread_id() -> c_int {
    // SAFETY: takes nothing, can't fail.
    unsafe { libc::gettid() }
}

/// Sends the kick signal to a thread of this process; one that is gone is left in peace.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(crate) fn kick_thread(thread: c_int) -> io::Result<()> {
    // SAFETY: takes nothing, can't fail.
    let process = unsafe { libc::getpid() };
    // SAFETY: `tgkill` takes three integers; at worst it signals a thread of this process, and the
    // signal does nothing but interrupt.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, kick_signal()) };
    match check(if result < 0 { -1 } else { 0 }) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Blocks the signals that ask the process to end and gives a descriptor that tells of them.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(crate) fn termination_signals() -> io::Result<File> {
    // SAFETY: all zeros are a valid `sigset_t`.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid set, and so after the call.
    check(unsafe { libc::sigemptyset(&raw mut set) })?;
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: `set` is a valid set and the signal's number is the system's own.
        check(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    }
    // SAFETY: `set` is a valid set; the old one is not asked for.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(result));
    }
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: -1 asks for a new descriptor; `set` is a valid set.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, flags) })?;
    // SAFETY: the descriptor is new, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Takes over a descriptor that the supervisor left open for this process.
///
/// # Errors
///
/// Fails if there is no such descriptor, or if it is one of the standard three.
pub(crate) fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= libc::STDERR_FILENO {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: asks for a descriptor's flags and changes nothing.
    check(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: sets the close-on-exec flag of a descriptor that exists.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and by the contract of the command line it was handed to this process
    // for this one option; the arguments refuse to name one twice.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has all threads allocate from one heap. When a thread's own shrinks, the GNU allocator opens
/// `/proc/sys/vm/overcommit_memory`, which no jailed thread may.
pub(crate) fn one_arena() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: the call takes no pointers and only sets a limit of the allocator.
        let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        debug_assert_eq!(set, 1, "the allocator knows its own option");
    }
}
