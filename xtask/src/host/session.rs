//! An emulated host as its users see it: connect, run jobs, keep it up or take it down.

use super::client::{Client, Streams, terminal_size};
use super::command::SERVE_TASK;
use super::machine::Parts;
use super::places::place;
use super::protocol::{Ending, JobSpec, VERSION};
use crate::cache::Cache;
use crate::programs::workspace;
use crate::sys::leads_session;
use anyhow::{Context, Result, bail, ensure};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio, id};
use std::time::Duration;
use std::{env, thread};

/// The variable that names a kept host of one's own.
pub const NAME_VARIABLE: &str = "NACRE_HOST_NAME";

/// An emulated host of certain parts, up or not.
#[derive(Debug)]
pub struct Emulated {
    cache: Cache,
    parts: Parts,
    folder: PathBuf,
}

/// A connection to a host that is up: good for one job.
#[derive(Debug)]
pub struct Session {
    client: Client,
    /// The server of a private host, which ends after us.
    server: Option<Child>,
}

/// What a job wrote, and how it ended.
#[derive(Debug)]
pub struct Captured {
    /// How it ended.
    pub ending: Ending,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Emulated {
    /// Prepares what the host is made of; starts nothing.
    ///
    /// # Errors
    /// The parts cannot be made.
    pub fn prepare(cache: &Cache) -> Result<Self> {
        let parts = Parts::prepare(cache)?;
        let name =
            env::var(NAME_VARIABLE).map_or_else(|_| String::new(), |name| format!("-{name}"));
        let plain = name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '-');
        ensure!(plain, "{NAME_VARIABLE} is {name:?}: only letters, digits and - can stand there");
        let folder = cache.folder(&format!("host-{}-{VERSION}{name}", parts.identity()))?;
        Ok(Self { cache: cache.clone(), parts, folder })
    }

    /// The parts themselves.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Connects to the kept host if one is up, else boots one that ends with the session.
    ///
    /// # Errors
    /// The host does not come up.
    pub fn session(&self) -> Result<Session> {
        // One that is just going down does not answer any more.
        if let Some(client) = self.kept()?.and_then(|stream| Client::greet(stream).ok()) {
            return Ok(Session { client, server: None });
        }
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let command = self.server_command(Stdio::inherit())?;
        let server = start_server(command, "--client", OwnedFd::from(theirs))?;
        Ok(Session { client: Client::greet(ours)?, server: Some(server) })
    }

    /// Whether the kept host is up.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn is_up(&self) -> Result<bool> {
        Ok(self.kept()?.is_some())
    }

    /// Boots a host that stays up until nothing has run in it for `idle_max`, unless one is up;
    /// returns how long it took to boot.
    ///
    /// # Errors
    /// The host does not come up.
    pub fn up(&self, idle_max: Duration) -> Result<u32> {
        let lock = self.cache.lock("host-up")?;
        let stream = match self.kept()? {
            Some(stream) => stream,
            None => self.keep(idle_max)?,
        };
        drop(lock);
        let log = self.folder.join("server.log");
        let greeted = Client::greet(stream);
        Ok(greeted.with_context(|| fs::read_to_string(log).unwrap_or_default())?.boot_ms)
    }

    /// Takes the kept host down; false if none was up.
    ///
    /// # Errors
    /// It does not answer.
    pub fn down(&self) -> Result<bool> {
        let _lock = self.cache.lock("host-up")?;
        let Some(stream) = self.kept()? else { return Ok(false) };
        Client::greet(stream)?.stop()?;
        Ok(true)
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("control")
    }

    fn kept(&self) -> Result<Option<UnixStream>> {
        match UnixStream::connect(self.socket()) {
            Ok(stream) => Ok(Some(stream)),
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot connect to {}", self.socket().display()))
            }
        }
    }

    /// Starts a server for a kept host, and connects. The caller holds the lock.
    fn keep(&self, idle_max: Duration) -> Result<UnixStream> {
        let socket = self.socket();
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", socket.display()));
            }
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        let log = File::create(self.folder.join("server.log")).context("cannot make a log")?;
        let mut command = self.server_command(log.into())?;
        command.arg("--idle").arg(idle_max.as_secs().to_string());
        let mut server = start_server(command, "--listener", OwnedFd::from(listener))?;
        // It outlives us; if it ends before, it must not stay a zombie.
        thread::spawn(move || server.wait());
        UnixStream::connect(&socket).context("cannot connect to the emulated host's server")
    }

    fn server_command(&self, errors: Stdio) -> Result<Command> {
        let log = self.folder.join(format!("console-{}", id()));
        let program = env::current_exe().context("cannot find my own program")?;
        let mut command = Command::new(program);
        command.arg(SERVE_TASK).arg("--log").arg(log).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        Ok(command)
    }
}

fn start_server(mut command: Command, role: &str, socket: OwnedFd) -> Result<Child> {
    command.arg(role).arg(socket.as_raw_fd().to_string());
    // A session of its own: Ctrl-C is for the job, which ends the session in its turn.
    leads_session(&mut command, false, vec![socket]);
    command.spawn().context("cannot start the emulated host's server")
}

impl Session {
    /// How long the host took to come up.
    pub fn boot_ms(&self) -> u32 {
        self.client.boot_ms
    }

    /// Runs the job with our standard streams, passes signals on, and returns how it ended. With
    /// `terminal`, the job gets a terminal of the size of ours, which must be one. Without `input`
    /// its standard input is at its end, and ours is not read.
    ///
    /// # Errors
    /// The job cannot be started, or the host is gone.
    pub fn run(self, mut spec: JobSpec, terminal: bool, input: bool) -> Result<Ending> {
        let raw = if terminal {
            spec.terminal = terminal_size();
            pass_variable("TERM", &mut spec);
            Some(RawTerminal::enter()?)
        } else {
            None
        };
        self.client.pass_signals()?;
        let (mut output, mut error) = (io::stdout().lock(), io::stderr());
        let input: Option<Box<dyn io::Read + Send>> = if input {
            let own = rustix::io::dup(rustix::stdio::stdin()).context("no standard input")?;
            Some(Box::new(File::from(own)))
        } else {
            None
        };
        let ending = self.finish(spec, Streams { input, output: &mut output, error: &mut error });
        drop(raw);
        ending
    }

    /// Runs the job without input, and returns how it ended and what it wrote.
    ///
    /// # Errors
    /// The job cannot be started, or the host is gone.
    pub fn output(self, spec: JobSpec) -> Result<Captured> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let streams = Streams { input: None, output: &mut stdout, error: &mut stderr };
        let ending = self.finish(spec, streams)?;
        Ok(Captured { ending, stdout, stderr })
    }

    fn finish(self, spec: JobSpec, streams: Streams<'_>) -> Result<Ending> {
        let ending = self.client.run(spec, streams);
        if let Some(mut server) = self.server {
            server.wait().context("cannot wait for the emulated host's server")?;
        }
        ending
    }
}

/// A job for the host: this command, in this folder, with these of our paths at their places.
///
/// # Errors
/// An argument is not text, or the folder is unknown.
pub fn job(argv: &[String], paths: &[PathBuf]) -> Result<JobSpec> {
    let folder = env::current_dir().context("no current folder")?;
    let folder_place = place(&folder);
    let mut spec =
        JobSpec { argv: argv.to_vec(), folder: folder_place.inside, ..JobSpec::default() };
    let mut binds: Vec<PathBuf> = folder_place.bind.into_iter().collect();
    let named = argv.iter().map(PathBuf::from).filter(|path| path.is_absolute() && path.exists());
    for path in paths.iter().cloned().chain(named) {
        let resolved = fs::canonicalize(&path);
        resolved.with_context(|| format!("cannot share {}", path.display()))?;
        binds.extend(place(&path).bind);
    }
    binds.extend(place(workspace()?).bind.filter(|path| path.exists()));
    binds.sort();
    binds.dedup();
    spec.binds = binds;
    for name in ["RUST_LOG", "RUST_BACKTRACE"] {
        pass_variable(name, &mut spec);
    }
    Ok(spec)
}

fn pass_variable(name: &str, spec: &mut JobSpec) {
    if let Ok(value) = env::var(name) {
        spec.env.push((name.to_owned(), value));
    }
}

/// Our terminal passes every key on; dropping this gives it its old ways back.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self> {
        let Ok(before) = tcgetattr(rustix::stdio::stdin()) else {
            bail!("standard input is not a terminal")
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)
            .context("cannot set the terminal")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to restore.
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before).unwrap_or_default();
    }
}
