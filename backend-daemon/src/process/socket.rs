//! Where frontends come from: a path, a listening socket, or one that is connected already.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, open, statat, unlinkat};
use rustix::net::sockopt::socket_acceptconn;

use super::DaemonArgs;
use crate::sys;

/// Why there is no socket to serve.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocketError {
    #[error("neither a socket path nor a socket was given")]
    Missing,
    #[error("{} exists and is no socket", path.display())]
    Occupied { path: PathBuf },
    #[error("cannot listen on {}", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("descriptor {number} is no socket")]
    NoSocket { number: RawFd, source: io::Error },
}

/// The daemon's socket.
pub(super) enum Socket {
    /// Frontends come one after the other.
    Listening(UnixListener),
    /// There is one frontend, and the process ends with it.
    Connected(UnixStream),
}

/// A socket's path in the file system, to be removed at the end. By then the process may have
/// another root directory, so the path is kept as a name in an open folder.
pub(super) struct BoundPath {
    folder: OwnedFd,
    name: OsString,
    /// The device and inode: a successor may have bound the path since.
    identity: (u64, u64),
}

impl Socket {
    /// Takes or makes the socket that the arguments name.
    pub(super) fn open(args: &DaemonArgs) -> Result<(Self, Option<BoundPath>), SocketError> {
        if let Some(number) = args.fd {
            return Ok((Self::inherited(number)?, None));
        }
        let path = args.socket_path.as_deref().ok_or(SocketError::Missing)?;
        let listener = bind(path)?;
        let bound = BoundPath::of(path)
            .map_err(|source| SocketError::Listen { path: path.to_owned(), source })?;
        Ok((Self::Listening(listener), Some(bound)))
    }

    fn inherited(number: RawFd) -> Result<Self, SocketError> {
        let no_socket = |source| SocketError::NoSocket { number, source };
        let fd = sys::inherited_fd(number).map_err(no_socket)?;
        let listening = socket_acceptconn(&fd).map_err(|error| no_socket(error.into()))?;
        // The protocol thread blocks on it, whatever its last owner did.
        if listening {
            let listener = UnixListener::from(fd);
            listener.set_nonblocking(false).map_err(no_socket)?;
            return Ok(Self::Listening(listener));
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map_err(no_socket)?;
        Ok(Self::Connected(stream))
    }
}

/// Listens at `path`, in place of a socket that a dead predecessor left there.
fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path)
            .map_err(|source| SocketError::Listen { path: path.to_owned(), source })?,
        Ok(_) => return Err(SocketError::Occupied { path: path.to_owned() }),
        // Whatever is wrong with the path, binding says it better.
        Err(_) => {}
    }
    UnixListener::bind(path).map_err(|source| SocketError::Listen { path: path.to_owned(), source })
}

impl BoundPath {
    fn of(path: &Path) -> io::Result<Self> {
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            Some(_) | None => Path::new("."),
        };
        let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_owned();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(folder, flags, Mode::empty())?;
        let identity = identity(&folder, &name)?;
        Ok(Self { folder, name, identity })
    }

    /// The number of the open folder.
    pub(super) fn folder(&self) -> RawFd {
        self.folder.as_raw_fd()
    }

    /// Removes the path, unless another process has bound it since.
    pub(super) fn remove(&self) {
        if identity(&self.folder, &self.name).is_ok_and(|found| found == self.identity)
            && let Err(error) = unlinkat(&self.folder, &self.name, AtFlags::empty())
        {
            log::warn!("cannot remove the socket {}: {error}", self.name.display());
        }
    }
}

fn identity(folder: &OwnedFd, name: &OsStr) -> io::Result<(u64, u64)> {
    let stat = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::process;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("nacre-socket-{name}-{}", process::id()));
        match fs::remove_file(&path) {
            Ok(()) | Err(_) => path,
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_another_file_is_not() {
        let path = scratch("stale");
        drop(bind(&path).unwrap());
        drop(bind(&path).unwrap());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::Occupied { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_path_that_a_successor_bound_is_not_removed() {
        let path = scratch("successor");
        let _first = bind(&path).unwrap();
        let bound = BoundPath::of(&path).unwrap();
        let _second = bind(&path).unwrap();
        bound.remove();
        assert!(path.exists());
        BoundPath::of(&path).unwrap().remove();
        assert!(!path.exists());
    }
}
