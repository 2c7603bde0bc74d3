//! Where a sandbox's shim is reached: a socket whose name is a digest of whose it is, so that everybody
//! who knows that finds it, in a folder of root's own.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::CommandError;

/// Where containerd's shims have their sockets.
const SOCKETS: &str = "/run/containerd/s";
/// The longest path that a socket can have, in bytes, by the kernel's `sockaddr_un`.
const MAX_PATH_BYTES: usize = 106;

/// A socket that is listened at, or one at which somebody does already.
pub(super) enum Bound {
    Listener(UnixListener),
    InUse,
}

/// The socket of a sandbox.
pub(super) fn socket(folder: Option<&str>, containerd: &str, namespace: &str, id: &str) -> PathBuf {
    let folder = folder.filter(|folder| !folder.is_empty()).unwrap_or(SOCKETS);
    let whose = format!("{containerd}/{namespace}/{id}");
    let digest = Sha256::digest(whose.as_bytes());
    let name = digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Path::new(folder).join(name)
}

/// As containerd is told.
pub(super) fn uri(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

/// The path in such a URI.
pub(super) fn path(uri: &str) -> &Path {
    Path::new(uri.strip_prefix("unix://").unwrap_or(uri))
}

/// Whether somebody listens there.
pub(super) fn is_served(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Listens at `socket`. One that a dead shim left is taken over.
pub(super) fn bind(socket: &Path) -> Result<Bound, CommandError> {
    let failed = |source| CommandError::File { path: socket.to_owned(), source };
    if socket.as_os_str().len() > MAX_PATH_BYTES {
        return Err(CommandError::LongPath(socket.to_owned()));
    }
    if let Some(folder) = socket.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    }
    let listener = match UnixListener::bind(socket) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(socket) {
                return Ok(Bound::InUse);
            }
            fs::remove_file(socket).map_err(failed)?;
            UnixListener::bind(socket)
        }
        bound => bound,
    }
    .map_err(failed)?;
    fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(Bound::Listener(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sandbox_has_a_socket_of_its_own() {
        let one = socket(None, "/run/containerd/containerd.sock", "k8s.io", "web");
        assert!(one.starts_with(SOCKETS) && one.as_os_str().len() <= MAX_PATH_BYTES);
        assert_ne!(one, socket(None, "/run/containerd/containerd.sock", "default", "web"));
        assert_ne!(one, socket(None, "/run/other.sock", "k8s.io", "web"));
        assert!(socket(Some("/x"), "a", "b", "c").starts_with("/x"));
        assert_eq!(path(&uri(&one)), one);
    }

    #[test]
    fn a_socket_in_use_is_left_alone_and_a_dead_one_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s/x");
        let Bound::Listener(listener) = bind(&socket).unwrap() else { panic!("in use") };
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        let sockets = fs::metadata(folder.path().join("s")).unwrap();
        assert_eq!(sockets.permissions().mode() & 0o777, 0o700);
        assert!(matches!(bind(&socket).unwrap(), Bound::InUse));
        drop(listener);
        assert!(matches!(bind(&socket).unwrap(), Bound::Listener(_)));
    }
}
