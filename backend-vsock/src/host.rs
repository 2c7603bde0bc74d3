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

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
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
    name: OsString,
}

/// The folder that the process is to be confined to.
#[derive(Debug)]
pub struct Folder {
    folder: OwnedFd,
    /// Whether the process may stay in its network if the host does not let it leave.
    may_keep_network: bool,
}

/// Why the process can't be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The host lets it have no network namespace of its own.
    #[error(
        "cannot leave the network, where sockets with abstract names are in reach (--keep-network serves all the same)"
    )]
    Network(#[source] io::Error),
    /// The host does not let it change its root directory.
    #[error("cannot leave all folders but one")]
    Root(#[source] io::Error),
}

/// What there is after the host's side was opened.
#[derive(Debug)]
pub struct Opened {
    /// The sockets.
    pub host: Host,
    /// Where they are.
    pub folder: Folder,
    /// The file that was made, if any.
    pub made: Option<Made>,
}

/// The socket that this process made; to be removed at the end.
#[derive(Debug)]
pub struct Made {
    folder: OwnedFd,
    name: OsString,
    /// The device and inode: a successor may have taken the name since.
    identity: (u64, u64),
}

impl Host {
    /// Listens at `path`, or on `listener` if that was handed in. The process must have no other
    /// threads yet.
    ///
    /// # Errors
    ///
    /// See [`HostError`].
    pub fn open(path: &Path, listener: Option<OwnedFd>) -> Result<Opened, HostError> {
        let name = path.file_name().ok_or_else(|| HostError::NoName { path: path.into() })?;
        if name.as_bytes().len() > NAME_BYTES {
            return Err(HostError::NameTooLong { path: path.into() });
        }
        let folder = open_folder(path)?;
        let (listener, made) = match listener {
            Some(listener) => {
                check(&listener).map_err(|_error| HostError::NotListening { path: path.into() })?;
                (listener, None)
            }
            None => listen_at(path, &folder, name)?,
        };
        let host = Self { listener, name: name.to_owned() };
        Ok(Opened { host, folder: Folder { folder, may_keep_network: false }, made })
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

    /// A socket for [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// Fails if the host has no more of them.
    pub fn socket(&self) -> io::Result<UnixStream> {
        Ok(socket()?.into())
    }

    /// Connects to the host program that listens for guests on `port`; a socket that a predecessor
    /// connected is connected already. The process must be confined: see [`Folder::confine`].
    ///
    /// # Errors
    ///
    /// Fails if nobody listens, or the one who does has a full backlog.
    pub fn connect(&self, socket: BorrowedFd<'_>, port: u32) -> io::Result<()> {
        let mut path = OsString::from("/");
        path.push(&self.name);
        path.push(format!("_{port}"));
        match rustix::net::connect(socket, &SocketAddrUnix::new(Path::new(&path))?) {
            Ok(()) | Err(Errno::ISCONN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Folder {
    /// Lets the process stay in its network if the host does not let it leave.
    pub fn keep_network(&mut self, may: bool) {
        self.may_keep_network = may;
    }

    /// Makes the folder all that this process can name. It must have no other threads yet.
    ///
    /// # Errors
    ///
    /// Fails if the host does not let the process leave its network, or its root directory.
    pub fn confine(&self) -> Result<(), ConfineError> {
        match leave_network() {
            Err(error) if self.may_keep_network => {
                log::warn!("cannot leave the network; abstract sockets stay in reach: {error}");
            }
            left => left.map_err(ConfineError::Network)?,
        }
        rustix::process::fchdir(&self.folder)
            .and_then(|()| rustix::process::chroot("."))
            .and_then(|()| rustix::process::chdir("/"))
            .map_err(|error| ConfineError::Root(error.into()))
    }
}

impl Made {
    fn of(folder: &OwnedFd, name: &OsStr) -> io::Result<Self> {
        let (folder, name) = (folder.try_clone()?, name.to_owned());
        let identity = identity(&folder, &name)?;
        Ok(Self { folder, name, identity })
    }

    /// Removes the socket, unless somebody else has put another in its place. The process may
    /// have got another root directory since.
    ///
    /// # Errors
    ///
    /// What `unlinkat` gives.
    pub fn remove(self) -> io::Result<()> {
        match identity(&self.folder, &self.name) {
            Ok(found) if found == self.identity => {
                Ok(rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty())?)
            }
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn identity(folder: &OwnedFd, name: &OsStr) -> rustix::io::Result<(u64, u64)> {
    let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn open_folder(path: &Path) -> Result<OwnedFd, HostError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) | None => Path::new("."),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty())
        .map_err(|error| HostError::Folder { folder: folder.into(), source: error.into() })
}

/// Leaves the network, with the right to change the root directory afterwards: as root by right,
/// as anybody else by a user namespace of its own.
fn leave_network() -> io::Result<()> {
    sys::unshare(UnshareFlags::NEWNET)
        .or_else(|_error| sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNET))
}

fn check(listener: &OwnedFd) -> rustix::io::Result<()> {
    let unix = sockopt::socket_domain(listener)? == AddressFamily::UNIX;
    let stream = sockopt::socket_type(listener)? == SocketType::STREAM;
    let listening = sockopt::socket_acceptconn(listener)?;
    if !(unix && stream && listening) {
        return Err(Errno::INVAL);
    }
    rustix::io::ioctl_fionbio(listener, true)
}

/// Listens at `name` in `folder`. It goes there for the while, since the whole path may not fit
/// into a socket's address.
fn listen_at(
    path: &Path,
    folder: &OwnedFd,
    name: &OsStr,
) -> Result<(OwnedFd, Option<Made>), HostError> {
    let failed = |source: io::Error| HostError::Listen { path: path.into(), source };
    let back = rustix::fs::open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let back = back.map_err(|error| failed(error.into()))?;
    rustix::process::fchdir(folder).map_err(|error| failed(error.into()))?;
    let listener = remove_stale(path, Path::new(name)).and_then(|()| {
        let listener = listen(Path::new(name)).map_err(|error| failed(error.into()))?;
        Ok((listener, Some(Made::of(folder, name).map_err(failed)?)))
    });
    rustix::process::fchdir(&back).map_err(|error| failed(error.into()))?;
    listener
}

/// Removes a socket that a dead predecessor left.
fn remove_stale(path: &Path, name: &Path) -> Result<(), HostError> {
    let failed = |error: Errno| HostError::Listen { path: path.into(), source: error.into() };
    let stat = match rustix::fs::lstat(name) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !FileType::from_raw_mode(stat.st_mode).is_socket() {
        return Err(HostError::NotASocket { path: path.into() });
    }
    let probe = socket().map_err(failed)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(name).map_err(failed)?) {
        Err(Errno::CONNREFUSED) => rustix::fs::unlink(name).map_err(failed),
        Ok(()) | Err(Errno::AGAIN) => Err(HostError::InUse { path: path.into() }),
        Err(error) => Err(failed(error)),
    }
}

fn listen(name: &Path) -> rustix::io::Result<OwnedFd> {
    let listener = socket()?;
    // Before `bind`, so that the file never has another mode (unix(7): the file takes over the
    // mode of the socket, less the umask).
    rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(name)?)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}
