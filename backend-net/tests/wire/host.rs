//! The host's end of a tap, in a network namespace where nothing else is.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use backend_daemon::testing::{DEADLINE, Daemon};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, FdFlags, fcntl_setfd, read, write};
use rustix::net::Protocol;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RawProtocol, SocketFlags, SocketType, socket_with};

use crate::sys;

/// The tap's name; each test has it for itself, in its own namespace.
pub(crate) const TAP: &str = "nacre0";
/// What a tap has to be.
pub(crate) const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// The length of the header that a packet socket puts before a frame.
pub(crate) const PACKET_HEADER_BYTES: usize = 10;

/// Held while a program is started, and while a descriptor of a tap is open only for a moment: a
/// program that another test is just starting has a copy of it until it executes.
static STARTING: Mutex<()> = Mutex::new(());

pub(crate) fn starting() -> MutexGuard<'static, ()> {
    STARTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the calling thread a network namespace of its own; says on standard error if it can't.
pub(crate) fn own_network() -> bool {
    let tun = open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let error = match (tun, sys::own_network()) {
        (Err(error), _) => format!("cannot open /dev/net/tun: {error}"),
        (_, Err(error)) => format!("cannot make a network namespace: {error}"),
        (Ok(_), Ok(())) => {
            // The kernel would send router solicitations through every new interface.
            let disabled = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            // A kernel without IPv6 has no such file.
            assert!(disabled.is_ok() || !fs::exists("/proc/sys/net/ipv6").unwrap());
            return true;
        }
    };
    eprintln!("SKIPPED: {error}");
    false
}

/// Starts `nacre-net` on the tap.
pub(crate) fn serve(more: &[&str]) -> Daemon {
    start(&[&["--tap", TAP], more].concat())
}

pub(crate) fn start(args: &[&str]) -> Daemon {
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let _starting = starting();
    Daemon::start(env!("CARGO_BIN_EXE_nacre-net"), &args)
}

/// Starts `nacre-net` with descriptors that it inherits under their own numbers, and to die at one
/// of its steps.
pub(crate) fn start_with(args: &[&str], inherited: &[&OwnedFd], step: Option<u32>) -> Daemon {
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let _starting = starting();
    for fd in inherited {
        fcntl_setfd(fd, FdFlags::empty()).unwrap();
    }
    let program = env!("CARGO_BIN_EXE_nacre-net");
    let daemon = match step {
        Some(step) => Daemon::start_doomed(program, &args, step),
        None => Daemon::start(program, &args),
    };
    for fd in inherited {
        fcntl_setfd(fd, FdFlags::CLOEXEC).unwrap();
    }
    daemon
}

/// A descriptor of the tap as somebody else opens it.
pub(crate) fn open_tap(flags: i32) -> OwnedFd {
    let tun = open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    sys::attach_tap(tun.as_fd(), TAP, flags).unwrap();
    tun
}

/// Lets programs that are started from now on inherit a descriptor; gives its number.
pub(crate) fn pass_on(fd: &OwnedFd) -> String {
    fcntl_setfd(fd, FdFlags::empty()).unwrap();
    fd.as_raw_fd().to_string()
}

/// Lets the tap outlive its daemon, as a supervisor does that wants to replace it.
pub(crate) fn make_persistent() {
    let _starting = starting();
    let tun = open_tap(TAP_FLAGS);
    sys::set_persistent(tun.as_fd(), true).unwrap();
}

/// A packet socket on the tap.
pub(crate) struct Host {
    socket: OwnedFd,
}

impl Host {
    /// Waits for the tap, takes it up and listens on it.
    pub(crate) fn listen() -> Self {
        let protocol = RawProtocol::new(sys::every_protocol().into()).unwrap();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = Some(Protocol::from_raw(protocol));
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, protocol).unwrap();
        let until = Instant::now() + DEADLINE;
        let index = loop {
            match name_to_index(&socket, TAP) {
                Ok(index) => break index,
                Err(error) => assert!(Instant::now() < until, "there is no tap: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        // A packet socket on an interface that is down reports that first.
        sys::set_up(socket.as_fd(), TAP, true).unwrap();
        sys::set_packet_headers(socket.as_fd()).unwrap();
        sys::bind_packet(socket.as_fd(), index).unwrap();
        Self { socket }
    }

    pub(crate) fn set_up(&self, up: bool) {
        sys::set_up(self.socket.as_fd(), TAP, up).unwrap();
        // Going down is reported once on the socket.
        if !up && self.wait(Duration::from_secs(1)) {
            assert_eq!(read(&self.socket, &mut [0; 1]), Err(Errno::NETDOWN));
        }
    }

    /// Sends a frame to the guest.
    pub(crate) fn send(&self, frame: &[u8]) {
        self.send_with(&[0; PACKET_HEADER_BYTES], frame);
    }

    pub(crate) fn send_with(&self, header: &[u8], frame: &[u8]) {
        let bytes = [header, frame].concat();
        assert_eq!(write(&self.socket, &bytes), Ok(bytes.len()));
    }

    /// The next frame of the guest with its header.
    pub(crate) fn receive(&self) -> (Vec<u8>, Vec<u8>) {
        assert!(self.wait(DEADLINE), "the guest's frame does not come");
        let mut bytes = vec![0; 1 << 17];
        let len = read(&self.socket, &mut bytes).unwrap();
        let frame = bytes[PACKET_HEADER_BYTES..len].to_vec();
        bytes.truncate(PACKET_HEADER_BYTES);
        (bytes, frame)
    }

    /// Whether a frame of the guest comes within `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let timeout = Timespec::try_from(limit).unwrap();
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).unwrap() > 0
    }
}
