//! What others see of a device, and what they may ask of it. Its keeper decides.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{Mutex, Notify, OwnedMutexGuard, mpsc, oneshot, watch};

use crate::{plan::DevicePlan, record::ProcessRecord};

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// A process serves it.
    Serving,
    /// It has lost its process and will get another one.
    Lost,
    /// A process is being started for it.
    Starting,
    /// What it stands for is gone, and a process fails its requests.
    Failing,
}

/// What is known of a device.
#[derive(Clone, Debug)]
pub struct View {
    /// How it is.
    pub condition: Condition,
    /// Its last process.
    pub process: ProcessRecord,
    /// What its next process is started from, unless another program is asked for.
    pub program: PathBuf,
    /// How many processes came after the first one and served.
    pub restarts: u64,
}

/// Why a device's process was not replaced as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplaceError {
    /// One such request at a time.
    #[error("its process is being replaced already")]
    Busy,
    /// The program can't be one.
    #[error("{}: {why}", path.display())]
    Program {
        /// What was given.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The VMM does not let go of the process.
    #[error("the process stays: nacre-vmm can't do without it ({0})")]
    Kept(String),
    /// The new program does not serve; the old one does again.
    #[error("the new program does not serve ({0}); the old one does again")]
    FellBack(String),
    /// Nothing serves yet.
    #[error("the new process does not serve ({0}); its supervisor goes on trying")]
    NotBack(String),
    /// The sandbox ends.
    #[error("the sandbox is coming to its end")]
    Ending,
}

/// A request to replace a device's process.
#[derive(Debug)]
pub(crate) struct Order {
    /// Another program than before.
    pub(crate) program: Option<PathBuf>,
    answer: oneshot::Sender<Result<Duration, ReplaceError>>,
    /// Until it is answered no other one is taken.
    _turn: OwnedMutexGuard<()>,
}

impl Order {
    /// Answers: how long nothing was served, or what went wrong.
    pub(crate) fn answer(self, answer: Result<Duration, ReplaceError>) {
        if self.answer.send(answer).is_err() {
            log::debug!("nobody waits for the answer any more");
        }
    }
}

/// A way to look at a device and to ask for another process, to be copied freely.
#[derive(Clone, Debug)]
pub struct DeviceHandle {
    /// What it is.
    pub device: DevicePlan,
    view: watch::Receiver<View>,
    orders: mpsc::Sender<Order>,
    // Locked while a request is under way, which may outlast who made it.
    turn: Arc<Mutex<()>>,
}

/// The keeper's side of a [`DeviceHandle`].
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) orders: mpsc::Receiver<Order>,
    view: watch::Sender<View>,
    changed: Arc<Notify>,
}

impl DeviceHandle {
    /// A handle and its keeper's side. `changed` is told when there is another process.
    pub(crate) fn new(device: DevicePlan, view: View, changed: Arc<Notify>) -> (Self, Desk) {
        let (view_sender, view) = watch::channel(view);
        let (orders, receiver) = mpsc::channel(1);
        let turn = Arc::new(Mutex::new(()));
        let handle = Self { device, view, orders, turn };
        (handle, Desk { orders: receiver, view: view_sender, changed })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> &str {
        self.device.id()
    }

    /// Waits until it is kept no more: it was removed, or the sandbox ends.
    pub(crate) async fn ended(&self) {
        let mut view = self.view.clone();
        while view.changed().await.is_ok() {}
    }

    /// How it is.
    #[must_use]
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Every change of how it is.
    pub(crate) fn watch(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    /// Replaces its process in order, by one of `program` if one is given. Answers how long
    /// nothing was served.
    ///
    /// # Errors
    ///
    /// Fails as [`ReplaceError`] says; dropped, it goes on.
    pub async fn replace(&self, program: Option<PathBuf>) -> Result<Duration, ReplaceError> {
        if let Some(path) = &program {
            check_program(path).map_err(|why| ReplaceError::Program { path: path.clone(), why })?;
        }
        let turn = Arc::clone(&self.turn).try_lock_owned();
        let turn = turn.map_err(|_locked| ReplaceError::Busy)?;
        let (answer, answered) = oneshot::channel();
        let order = Order { program, answer, _turn: turn };
        self.orders.send(order).await.map_err(|_gone| ReplaceError::Ending)?;
        answered.await.unwrap_or(Err(ReplaceError::Ending))
    }
}

fn check_program(path: &Path) -> Result<(), String> {
    if !path.is_absolute() {
        return Err("not an absolute path".to_owned());
    }
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "no such program".to_owned(),
        _ => error.to_string(),
    })?;
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return Err("not an executable file".to_owned());
    }
    Ok(())
}

impl Desk {
    /// There is another process.
    pub(crate) fn started(&self, process: ProcessRecord) {
        self.view.send_modify(|view| {
            view.condition = Condition::Starting;
            view.process = process;
        });
        self.changed.notify_one();
    }

    /// That process serves, from `program`.
    pub(crate) fn serves(&self, program: &Path) {
        self.view.send_modify(|view| {
            view.condition = Condition::Serving;
            view.program = program.to_owned();
            view.restarts += 1;
        });
    }

    /// That process fails all requests.
    pub(crate) fn fails(&self) {
        self.view.send_modify(|view| view.condition = Condition::Failing);
    }

    /// There is no process.
    pub(crate) fn lost(&self) {
        self.view.send_modify(|view| view.condition = Condition::Lost);
    }
}
