//! A process's standard streams as containerd names them: a fifo, a file, or a program that takes a
//! log.
//!
//! Fifos are held open on both sides here. So output that nobody reads (containerd is being
//! restarted, say) waits in the pipe and then in the guest, and is not lost; and standard input ends
//! when containerd says so, not when one of its writers goes.

mod fifo;
mod logger;
mod target;

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    stdio::{Input, Outputs, Pieces},
    streams::Ends,
};
pub(super) use target::Target;
use target::TargetError;

/// Why streams can't be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum StdioError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("can't open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("log program {}", path.display())]
    Logger { path: PathBuf, source: io::Error },
    #[error("log program {} was not ready in time", .0.display())]
    LoggerMute(PathBuf),
    #[error("no thread for standard input")]
    Thread(#[source] io::Error),
}

impl StdioError {
    /// Whether what was asked can't be.
    pub(super) fn is_argument(&self) -> bool {
        matches!(self, Self::Target(_))
    }
}

/// What containerd says of a process's streams.
#[derive(Clone, Debug, Default)]
pub(super) struct Names {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) terminal: bool,
}

impl Names {
    /// Whether the process gets a standard input.
    pub(super) fn has_input(&self) -> bool {
        !self.stdin.is_empty()
    }
}

/// Whose streams they are: what a log program is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner<'a> {
    pub(super) namespace: &'a str,
    pub(super) id: &'a str,
}

/// What moves the bytes on this side. Dropped, it ends all of it.
#[derive(Debug)]
pub(super) struct Attachment {
    /// A fifo that is opened when the process starts, and where its bytes go.
    input: Later,
    /// Keeps standard input from ending.
    hold: Option<File>,
    is_closed: bool,
    tasks: JoinSet<()>,
}

/// A fifo and where its bytes go.
type Later = Option<(PathBuf, mpsc::Sender<Vec<u8>>)>;

impl Attachment {
    /// Takes standard input from now on. Not earlier: a client that finds its fifo read may be done
    /// with it before it knows of the task, and then never says that this was all.
    pub(super) fn begin_input(&mut self) -> Result<(), StdioError> {
        let Some((path, sender)) = self.input.take() else { return Ok(()) };
        let open = || Ok((fifo::open_input(&path)?, fifo::hold(&path)?));
        let (receiver, hold) =
            open().map_err(|source| StdioError::Open { path: path.clone(), source })?;
        self.hold = (!self.is_closed).then_some(hold);
        self.tasks.spawn(fifo::read_all(receiver, sender));
        Ok(())
    }

    /// Lets standard input end when its other writers go.
    pub(super) fn close_input(&mut self) {
        self.is_closed = true;
        self.hold = None;
    }
}

/// Opens the streams of a process.
pub(super) async fn open(
    names: &Names,
    owner: Owner<'_>,
) -> Result<(Ends, Attachment), StdioError> {
    let mut tasks = JoinSet::new();
    let (outputs, [out, err]) = Outputs::to_receivers();
    let stdout = Target::parse(&names.stdout)?;
    // A terminal has one output.
    let stderr = if names.terminal { Target::Nothing } else { Target::parse(&names.stderr)? };
    if let Target::Program { path, arguments } = &stdout {
        let pipes = logger::start(path, arguments, owner).await?;
        tasks.spawn(fifo::write_all(out, pipes.output));
        // As its own argument says, one program takes both.
        tasks.spawn(fifo::write_all(err, pipes.error));
    } else {
        output(&mut tasks, out, &stdout, owner).await?;
        output(&mut tasks, err, &stderr, owner).await?;
    }
    let (input, later) = input(&names.stdin)?;
    let ends = Ends { input, outputs, terminal: names.terminal, size: None };
    Ok((ends, Attachment { input: later, hold: None, is_closed: false, tasks }))
}

async fn output(
    tasks: &mut JoinSet<()>,
    pieces: Pieces,
    target: &Target,
    owner: Owner<'_>,
) -> Result<(), StdioError> {
    match target {
        Target::Nothing => {
            tasks.spawn(fifo::discard(pieces));
        }
        Target::Fifo(path) => {
            let sender = fifo::open_output(path)
                .map_err(|source| StdioError::Open { path: path.clone(), source })?;
            tasks.spawn(fifo::write_all(pieces, sender));
        }
        Target::File(path) => {
            let file = append(path)?;
            tasks.spawn(fifo::write_all(pieces, tokio::fs::File::from_std(file)));
        }
        Target::Program { path, arguments } => {
            let pipes = logger::start(path, arguments, owner).await?;
            tasks.spawn(fifo::write_all(pieces, pipes.error));
        }
    }
    Ok(())
}

fn append(path: &Path) -> Result<File, StdioError> {
    let open = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        File::options().append(true).create(true).mode(0o644).open(path)
    };
    open().map_err(|source| StdioError::Open { path: path.to_owned(), source })
}

fn input(name: &str) -> Result<(Option<Input>, Later), StdioError> {
    match Target::parse(name)? {
        Target::Nothing => Ok((None, None)),
        Target::Fifo(path) => {
            let (sender, input) = Input::from_sender();
            Ok((Some(input), Some((path, sender))))
        }
        Target::File(path) => {
            let file = File::open(&path).map_err(|source| StdioError::Open { path, source })?;
            Ok((Some(Input::from_file(file).map_err(StdioError::Thread)?), None))
        }
        Target::Program { .. } => Err(TargetError::Input.into()),
    }
}
