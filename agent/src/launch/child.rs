//! The child's side of a launch: single-threaded, blocking, short-lived.

use std::{
    env,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use libcontainer::{
    container::{Container, builder::ContainerBuilder},
    error::LibcontainerError,
    oci_spec::{OciSpecError, runtime::Spec},
    syscall::syscall::SyscallType,
};
use rustix::stdio::stdin;

use crate::{
    launch::{
        Answer, BUNDLES, CAPABILITIES_SUFFIX, Kind, LIBCONTAINER_STATE, Order, START,
        executor::{Filter, Program},
        socket,
    },
    seccomp::{self, SeccompError},
    text::chain,
};

/// Where libcontainer sends the master of a terminal, in the bundle.
const CONSOLE: &str = "console.sock";

#[derive(Debug, thiserror::Error)]
enum LaunchError {
    #[error("the agent is gone")]
    Agent(#[source] io::Error),
    #[error("the order makes no sense")]
    Order,
    #[error("can't read the order")]
    Parse(#[source] serde_json::Error),
    #[error("can't use {path:?}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("can't read the specification")]
    Spec(#[source] OciSpecError),
    #[error("can't compile the seccomp profile")]
    Seccomp(#[source] SeccompError),
    #[error("libcontainer failed")]
    Libcontainer(#[source] LibcontainerError),
    #[error("no terminal came")]
    Terminal(#[source] io::Error),
}

/// Does what the order on standard input says.
pub(crate) fn run() -> ExitCode {
    let control = stdin();
    match serve(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let answer = Answer::Failed { reason: chain(&error) };
            if let Err(error) = reply(control, &answer, &[]) {
                log::error!("{}", chain(&error));
            }
            ExitCode::FAILURE
        }
    }
}

fn reply(control: impl AsFd, answer: &Answer, fds: &[OwnedFd]) -> Result<(), LaunchError> {
    let mut answer = answer.clone();
    if let Answer::Failed { reason } = &mut answer {
        // JSON may double the length of a text.
        reason.truncate(reason.floor_char_boundary(socket::MESSAGE_BYTES / 4));
    }
    let bytes = serde_json::to_vec(&answer).map_err(LaunchError::Parse)?;
    socket::send(control, &bytes, fds).map_err(LaunchError::Agent)
}

fn serve(control: impl AsFd + Copy) -> Result<(), LaunchError> {
    let (bytes, mut fds) = socket::receive(control).map_err(LaunchError::Agent)?;
    let order: Order = serde_json::from_slice(&bytes).map_err(LaunchError::Parse)?;
    let streams = fds.split_off(fds.len().min(1));
    let status = fds.pop().ok_or(LaunchError::Order)?;
    let bundle = Path::new(BUNDLES).join(&order.container_id);
    let launch = Launch::new(&order, &bundle, status)?;
    match &order.kind {
        Kind::Create => {
            let (mut container, master) = launch.create(streams)?;
            let pid = container.pid().ok_or(LaunchError::Order)?.as_raw();
            reply(control, &Answer::Made { pid }, &master)?;
            let (word, _fds) = socket::receive(control).map_err(LaunchError::Agent)?;
            if word == START {
                container.start().map_err(LaunchError::Libcontainer)?;
            }
        }
        Kind::Join { process_file } => {
            let (pid, master) = launch.join(process_file, streams)?;
            reply(control, &Answer::Made { pid }, &master)?;
        }
    }
    Ok(())
}

struct Launch<'a> {
    order: &'a Order,
    bundle: &'a Path,
    program: Program,
    console: Option<UnixListener>,
}

impl<'a> Launch<'a> {
    fn new(order: &'a Order, bundle: &'a Path, status: OwnedFd) -> Result<Self, LaunchError> {
        let filter = filter(order, bundle)?;
        let program = Program { status: Arc::new(status), filter, size: order.size };
        let console = if order.terminal { Some(listen(bundle)?) } else { None };
        Ok(Self { order, bundle, program, console })
    }

    fn builder(&self, streams: Vec<OwnedFd>) -> Result<ContainerBuilder, LaunchError> {
        let mut builder =
            ContainerBuilder::new(self.order.container_id.clone(), SyscallType::default())
                .with_root_path(LIBCONTAINER_STATE)
                .map_err(LaunchError::Libcontainer)?
                .with_executor(self.program.clone());
        if self.console.is_some() {
            return Ok(builder.with_console_socket(Some(self.bundle.join(CONSOLE))));
        }
        let [stdin, stdout, stderr] =
            <[OwnedFd; 3]>::try_from(streams).map_err(|_streams| LaunchError::Order)?;
        builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
        Ok(builder)
    }

    fn create(self, streams: Vec<OwnedFd>) -> Result<(Container, Vec<OwnedFd>), LaunchError> {
        let container = self
            .builder(streams)?
            .as_init(self.bundle)
            .with_systemd(false)
            .as_sibling(true)
            .build()
            .map_err(LaunchError::Libcontainer)?;
        Ok((container, self.master()?))
    }

    fn join(
        self,
        process_file: &str,
        streams: Vec<OwnedFd>,
    ) -> Result<(i32, Vec<OwnedFd>), LaunchError> {
        let pid = self
            .builder(streams)?
            .as_tenant()
            .with_process(Some(self.bundle.join(process_file)))
            .with_detach(true)
            .as_sibling(true)
            .build()
            .map_err(LaunchError::Libcontainer)?;
        Ok((pid.as_raw(), self.master()?))
    }

    /// The terminal's master, which waits in the console socket since the process set itself up.
    fn master(self) -> Result<Vec<OwnedFd>, LaunchError> {
        let Some(console) = &self.console else {
            return Ok(Vec::new());
        };
        let (connection, _address) = console.accept().map_err(LaunchError::Terminal)?;
        let (_name, masters) = socket::receive(connection).map_err(LaunchError::Terminal)?;
        if masters.len() == 1 {
            Ok(masters)
        } else {
            Err(LaunchError::Terminal(io::ErrorKind::UnexpectedEof.into()))
        }
    }
}

/// Listens in the bundle, by a relative name: the bundle's path may be too long for an address.
fn listen(bundle: &Path) -> Result<UnixListener, LaunchError> {
    let failed = |source| LaunchError::File { path: bundle.join(CONSOLE), source };
    env::set_current_dir(bundle).map_err(failed)?;
    match fs::remove_file(CONSOLE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(CONSOLE).map_err(failed)
}

/// The container's seccomp profile as a filter; every process of a container has it.
fn filter(order: &Order, bundle: &Path) -> Result<Option<Filter>, LaunchError> {
    let spec = Spec::load(bundle.join("config.json")).map_err(LaunchError::Spec)?;
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let Some(profile) = profile else {
        return Ok(None);
    };
    let compiled = seccomp::compile(profile).map_err(LaunchError::Seccomp)?;
    let process_file = match &order.kind {
        Kind::Create => "config.json",
        Kind::Join { process_file } => process_file,
    };
    let path = bundle.join(format!("{process_file}{CAPABILITIES_SUFFIX}"));
    let capabilities_after = match File::open(&path) {
        Ok(file) => Some(serde_json::from_reader(file).map_err(LaunchError::Parse)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(LaunchError::File { path, source }),
    };
    Ok(Some(Filter { program: compiled.program, flags: compiled.flags, capabilities_after }))
}
