//! `start`: finds the shim that a container belongs to, or starts it, and tells containerd where it is.

use std::{
    env, fs,
    fs::File,
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

use super::{
    CommandError, Flags,
    address::{self, Bound},
};
use crate::service::{bundle, events::bytes};

/// How much containerd may write to standard input.
const MAX_INPUT_BYTES: u64 = 10 << 20;
/// The version of the task service that a containerd with the new bootstrap protocol is told.
const TASK_VERSION: i32 = 3;

pub(super) fn start(flags: &Flags) -> Result<Vec<u8>, CommandError> {
    let mut input = Vec::new();
    io::stdin().take(MAX_INPUT_BYTES).read_to_end(&mut input).map_err(CommandError::Input)?;
    let params = params(&input, flags);
    let folder = flags.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let spec = bundle::read_spec(&folder)?;
    let sandbox = bundle::sandbox_of(&flags.id, spec.as_ref());
    let sockets = params.as_ref().and_then(|params| params.socket_dir.as_deref());
    let socket = address::socket(sockets, &flags.address, &flags.namespace, &sandbox);
    let uri = address::uri(&socket);
    if sandbox == flags.id {
        match address::bind(&socket)? {
            Bound::Listener(listener) => {
                let shim = spawn(flags, &uri, listener, &folder);
                if shim.is_err() && fs::remove_file(&socket).is_err() {
                    // It would be taken over the next time.
                }
                write(&folder.join("shim.pid"), &shim?.id().to_string())?;
            }
            Bound::InUse => {}
        }
    } else if !address::is_served(&socket) {
        return Err(CommandError::NoSandbox(sandbox));
    }
    // Before 2.0 containerd finds the shim by this file alone when it is started again.
    write(&folder.join("address"), &uri)?;
    Ok(reply(params.is_some(), uri))
}

/// What containerd 2.3 and later write. Earlier ones write runtime options, which are no error to
/// read as such but name nothing that is known.
fn params(input: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let is_for_us = params.instance_id == flags.id && params.namespace == flags.namespace;
    is_for_us.then_some(params)
}

fn reply(is_bootstrap: bool, uri: String) -> Vec<u8> {
    if !is_bootstrap {
        // Every version understands it: as version 2 of the task service.
        return uri.into_bytes();
    }
    let mut result = BootstrapResult::new();
    result.set_version(TASK_VERSION);
    result.set_address(uri);
    result.set_protocol("ttrpc".to_owned());
    bytes(&result)
}

/// Starts the serving process. It gets the listener as standard input, so that containerd can
/// connect from now on, and the log's fifo as standard error.
fn spawn(
    flags: &Flags,
    uri: &str,
    listener: UnixListener,
    folder: &Path,
) -> Result<Child, CommandError> {
    let program = env::current_exe().map_err(CommandError::Spawn)?;
    let log = log_fifo(folder).map_or_else(|_none| Stdio::null(), Stdio::from);
    let mut command = Command::new(program);
    command
        .args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address])
        .args(["-publish-binary", &flags.publish_binary, "-socket", uri])
        .args(flags.debug.then_some("-debug"))
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(log);
    command.spawn().map_err(CommandError::Spawn)
}

/// containerd reads the shim's log from a fifo. Open on both sides, so that the shim outlives the
/// reader; a full one takes no more lines.
fn log_fifo(folder: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(folder.join("log"))
}

/// Writes a file that a reader sees whole or not at all.
fn write(path: &Path, text: &str) -> Result<(), CommandError> {
    let failed = |source| CommandError::File { path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    fs::write(&new, text).map_err(failed)?;
    fs::rename(&new, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn flags() -> Flags {
        Flags { namespace: "k8s.io".to_owned(), id: "web".to_owned(), ..Flags::default() }
    }

    #[test]
    fn the_new_protocol_is_told_from_runtime_options() {
        let mut new = BootstrapParams::new();
        new.set_instance_id("web".to_owned());
        new.set_namespace("k8s.io".to_owned());
        assert!(params(&bytes(&new), &flags()).is_some());
        let mut options = Any::new();
        options.type_url = "runtimeoptions.v1.Options".to_owned();
        options.value = b"\x0a\x01x".to_vec();
        assert!(params(&bytes(&options), &flags()).is_none());
        assert!(params(b"", &flags()).is_none());
        assert!(params(b"\xff\xff", &flags()).is_none());
    }

    #[test]
    fn each_containerd_is_answered_in_its_own_way() {
        assert_eq!(reply(false, "unix:///s".to_owned()), b"unix:///s");
        let result = BootstrapResult::parse_from_bytes(&reply(true, "unix:///s".to_owned()));
        let result = result.unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///s"));
        assert_eq!(result.protocol, "ttrpc");
    }
}
