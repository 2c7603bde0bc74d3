//! The host's side of the address space: one folder, and sockets in it.
//!
//! Host programs connect to `<path>` and name a guest port; a guest that connects to host port P
//! reaches whoever listens on `<path>_<P>`.
//!
//! The folder becomes the process's root directory, and a network namespace of its own keeps it
//! from abstract sockets and from every network, before the guest's first byte is read. So even a
//! process that is taken over can `connect` to nothing but sockets in this folder: that is a
//! property of the kernel's state, not of the paths that are passed to it. A file descriptor of
//! the folder, or a check of the path, would bind only a process that still behaves.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::thread::UnshareFlags;

use crate::sys;

/// The longest file name of the socket: with a slash, an underscore, a port and a final zero it
/// has to fit into an address of 108 bytes (unix(7)).
const NAME_BYTES: usize = 108 - 1 - 1 - 10 - 1;
const BACKLOG: i32 = 1024;

/// Why the host's side can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The path names no file.
    #[error("{} names no socket", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// The file name leaves no room for a port.
    #[error("the file name of {} is longer than {NAME_BYTES} bytes", path.display())]
    NameTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The folder of the socket can't be opened.
    #[error("cannot open the folder {}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder can't become the process's root directory.
    #[error("cannot confine the process to the folder {}", folder.display())]
    Confine {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is something else at the path.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Somebody else serves there.
    #[error("{} is in use", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The socket can't be made.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The descriptor that was handed in is not a listening Unix socket.
    #[error("the descriptor for {} is not a listening unix socket", path.display())]
    NotListening {
        /// The path.
        path: PathBuf,
    },
}

/// The listening socket, and the names beside it.
#[derive(Debug)]
pub struct Host {
    listener: OwnedFd,
    /// The socket's path in the process's new root directory.
    path: PathBuf,
}

/// The path of the socket that this process made; to be removed at the end.
#[derive(Debug)]
pub struct Made(PathBuf);

impl Host {
    /// Confines the process to the folder of `path` and listens there, on `listener` if it was
    /// handed in. The process must have no other threads yet.
    ///
    /// # Errors
    ///
    /// See [`HostError`].
    pub fn open(path: &Path, listener: Option<OwnedFd>) -> Result<(Self, Option<Made>), HostError> {
        let name = path.file_name().ok_or_else(|| HostError::NoName { path: path.into() })?;
        if name.as_bytes().len() > NAME_BYTES {
            return Err(HostError::NameTooLong { path: path.into() });
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            Some(_) | None => Path::new("."),
        };
        confine(folder)?;
        let inside = Path::new("/").join(name);
        if let Some(listener) = listener {
            check(&listener).map_err(|_error| HostError::NotListening { path: path.into() })?;
            return Ok((Self { listener, path: inside }, None));
        }
        remove_stale(&inside, path)?;
        let listener = listen(&inside)
            .map_err(|error| HostError::Listen { path: path.into(), source: error.into() })?;
        Ok((Self { listener, path: inside.clone() }, Some(Made(inside))))
    }

    /// The listening socket.
    #[must_use]
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes a host program that waits to be connected.
    ///
    /// # Errors
    ///
    /// What `accept` gives; `WouldBlock` if nobody waits.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        Ok(rustix::net::accept_with(&self.listener, flags)?.into())
    }

    /// Connects to the host program that listens for guests on `port`.
    ///
    /// # Errors
    ///
    /// Fails if nobody listens, or the one who does has a full backlog.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(Path::new(&path))?)?;
        Ok(socket.into())
    }
}

impl Made {
    /// Removes the socket from its folder.
    ///
    /// # Errors
    ///
    /// What `unlink` gives.
    pub fn remove(self) -> io::Result<()> {
        std::fs::remove_file(self.0)
    }
}

/// Makes `folder` all that this process can name.
fn confine(folder: &Path) -> Result<(), HostError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(folder, flags, Mode::empty())
        .map_err(|error| HostError::Folder { folder: folder.into(), source: error.into() })?;
    leave_network();
    rustix::process::fchdir(&opened)
        .and_then(|()| rustix::process::chroot("."))
        .and_then(|()| rustix::process::chdir("/"))
        .map_err(|error| HostError::Confine { folder: folder.into(), source: error.into() })
}

/// Leaves the network, with the right to change the root directory afterwards: as root by right,
/// as anybody else by a user namespace of its own.
fn leave_network() {
    let alone = sys::unshare(UnshareFlags::NEWNET)
        .or_else(|_error| sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNET));
    if let Err(error) = alone {
        log::warn!("cannot leave the network; abstract sockets stay in reach: {error}");
    }
}

fn check(listener: &OwnedFd) -> rustix::io::Result<()> {
    let unix = rustix::net::sockopt::socket_domain(listener)? == AddressFamily::UNIX;
    let stream = rustix::net::sockopt::socket_type(listener)? == SocketType::STREAM;
    let listening = rustix::net::sockopt::socket_acceptconn(listener)?;
    if !(unix && stream && listening) {
        return Err(Errno::INVAL);
    }
    rustix::io::ioctl_fionbio(listener, true)
}

fn remove_stale(inside: &Path, path: &Path) -> Result<(), HostError> {
    let listen_error = |source: io::Error| HostError::Listen { path: path.into(), source };
    let stat = match rustix::fs::lstat(inside) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(listen_error(error.into())),
    };
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_socket() {
        return Err(HostError::NotASocket { path: path.into() });
    }
    let probe = socket().map_err(|error| listen_error(error.into()))?;
    let address = SocketAddrUnix::new(inside).map_err(|error| listen_error(error.into()))?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(inside).map_err(listen_error),
        Ok(()) | Err(Errno::AGAIN) => Err(HostError::InUse { path: path.into() }),
        Err(error) => Err(listen_error(error.into())),
    }
}

fn listen(inside: &Path) -> rustix::io::Result<OwnedFd> {
    let listener = socket()?;
    // Before `bind`, so that the file never has another mode (unix(7): the file takes over the
    // mode of the socket, less the umask).
    rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(inside)?)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}
