//! The VMM: started with the guest's devices handed in, asked through its control socket, and
//! listened to where the guest's kernel prints.

mod link;
mod news;

use std::{
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use nacre_proto::{exit::VmmExit, vmm::MessageError};
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::watch, task::JoinSet, time::timeout};
use vfio::Opened;

use crate::{
    backends::{Surroundings, VmmEnd},
    child::{Child, ChildError, End, Launch},
    log_file::{self, CappedFile},
    plan::{DevicePlan, SandboxPlan, passthrough_id},
};

pub(crate) use link::{Link, Parting, pair};
pub(crate) use news::{DeviceNews, ResourceNews};

/// How much of what the guest's kernel prints is kept, in bytes; once more before that.
const CONSOLE_BYTES: u64 = 1 << 20;
/// How many of the console's last lines are repeated when everything is told.
const DEBUG_LINES: usize = 60;

/// Why there is no VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It can't be started.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// What it is to be started with can't be made.
    #[error("nacre-vmm: no {what} for it")]
    Prepare {
        /// What is missing.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It can't be asked.
    #[error("nacre-vmm does not answer")]
    Control(#[source] io::Error),
    /// It answers nonsense.
    #[error("nacre-vmm's answer is malformed")]
    Answer(#[from] MessageError),
    /// It refuses.
    #[error("nacre-vmm refuses: {0}")]
    Refused(String),
}

impl VmmError {
    /// Whether the VMM has hung up, as it does when it ends.
    pub(crate) fn is_hang_up(&self) -> bool {
        let gone = [
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::BrokenPipe,
            io::ErrorKind::ConnectionReset,
        ];
        matches!(self, Self::Control(error) if gone.contains(&error.kind()))
    }
}

/// A running VMM. Dropping it ends it.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    link: Link,
    console_bytes: watch::Receiver<u64>,
    console_log: PathBuf,
    // Aborted with the VMM.
    _listeners: JoinSet<()>,
    started: Instant,
}

impl Vmm {
    /// Starts the VMM of `plan` on the backends' sockets.
    ///
    /// # Errors
    ///
    /// Fails if it can't be started.
    pub fn start(
        plan: &SandboxPlan,
        surroundings: &Surroundings,
        devices: Vec<VmmEnd>,
        given: Vec<Opened>,
    ) -> Result<Self, VmmError> {
        let prepare = |what| move |source: io::Error| VmmError::Prepare { what, source };
        let (console, console_in_child) = io::pipe().map_err(prepare("pipe"))?;
        let functions: Vec<_> = (0..plan.config.passthrough.len()).map(passthrough_id).collect();
        let ids = plan.devices.iter().map(DevicePlan::id);
        let ids: Vec<&str> = ids.chain(functions.iter().map(String::as_str)).collect();
        let (link, listener, control_in_child) = pair(&ids).map_err(prepare("control socket"))?;
        let mut launch = surroundings
            .launch("nacre-vmm", &surroundings.path_of("nacre-vmm"))
            .map_err(prepare("cgroup"))?;
        let serial = launch.hand_in(console_in_child.into());
        let control_number = launch.hand_in(control_in_child);
        let mut words = vec![
            "--cpus".to_owned(),
            plan.config.cpus.to_string(),
            "--max-cpus".to_owned(),
            plan.max_cpus.to_string(),
            "--memory".to_owned(),
            plan.config.memory.to_string(),
            "--max-memory".to_owned(),
            plan.max_memory.to_string(),
            "--cmdline".to_owned(),
            plan.command_line.clone(),
            "--serial".to_owned(),
            format!("fd={serial}"),
            "--on-reset".to_owned(),
            "exit".to_owned(),
            "--control-fd".to_owned(),
            control_number.to_string(),
        ];
        for VmmEnd { id, kind, config, socket } in devices {
            let number = launch.hand_in(socket);
            let mut device = format!("id={id},fd={number},type={kind}");
            if !config.is_empty() {
                let digits: String = config.iter().map(|byte| format!("{byte:02x}")).collect();
                device = format!("{device},config={digits}");
            }
            words.extend(["--vhost-user".to_owned(), device]);
        }
        words.extend(passthrough_words(plan, given, &mut launch));
        let launch = launch
            .args([
                "--kernel".into(),
                plan.config.kernel.as_os_str().to_owned(),
                "--initramfs".into(),
                plan.config.initramfs.as_os_str().to_owned(),
            ])
            .args(words);
        let file = CappedFile::create(surroundings.files.console(), CONSOLE_BYTES)
            .map_err(prepare("console log"))?;
        let console = pipe::Receiver::from_owned_fd(console.into()).map_err(prepare("console"))?;
        let child = launch.start(&surroundings.files.child_log("vmm"))?;
        let (sender, console_bytes) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(listen(console, file, sender));
        tasks.spawn(listener.listen());
        Ok(Self {
            child,
            link,
            console_bytes,
            console_log: surroundings.files.console(),
            _listeners: tasks,
            started: Instant::now(),
        })
    }

    /// Its process.
    #[must_use]
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// When it was started.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// How much the guest's kernel has printed so far.
    #[must_use]
    pub fn console(&self) -> watch::Receiver<u64> {
        self.console_bytes.clone()
    }

    /// Waits until all that the guest's kernel printed is kept, once the VMM has ended.
    pub async fn console_ended(&self, limit: Duration) {
        let mut console = self.console();
        let ended = async { while console.changed().await.is_ok() {} };
        if timeout(limit, ended).await.is_err() {
            log::debug!("the guest's console does not end");
        }
    }

    /// A way to ask it.
    pub(crate) fn link(&self) -> Link {
        self.link.clone()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if log::log_enabled!(log::Level::Debug)
            && let Some(said) = log_file::tail(&self.console_log, DEBUG_LINES)
        {
            log::debug!("the guest's console ends with:\n{said}");
        }
    }
}

/// The arguments for the host's devices that the guest is given, in the plan's order.
fn passthrough_words(plan: &SandboxPlan, given: Vec<Opened>, launch: &mut Launch) -> Vec<String> {
    let mut words = Vec::new();
    let functions = plan.config.passthrough.iter();
    for (index, (function, Opened { container, group, device })) in functions.zip(given).enumerate()
    {
        let (id, address) = (passthrough_id(index), function.address);
        let [container, group, device] = [container, group, device].map(|fd| launch.hand_in(fd));
        let fds = format!("container-fd={container},group-fd={group},device-fd={device}");
        words.extend(["--vfio".to_owned(), format!("id={id},address={address},{fds}")]);
    }
    words
}

/// What the VMM's exit code means; `None` if it did not exit in a way that it knows.
#[must_use]
pub fn meaning(end: End) -> Option<VmmExit> {
    match end {
        End::Code(code) => VmmExit::from_code(code),
        End::Signal(_) => None,
    }
}

async fn listen(mut console: pipe::Receiver, mut file: CappedFile, bytes: watch::Sender<u64>) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match console.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => {
                if let Err(error) = file.append(&buffer[..read]) {
                    log::debug!("the guest's console is not kept: {error}");
                }
                bytes.send_modify(|bytes| *bytes += u64::try_from(read).unwrap_or(1));
            }
            Err(error) => {
                log::debug!("the guest's console breaks: {error}");
                return;
            }
        }
    }
}
