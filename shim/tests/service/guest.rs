//! A guest whose processes are scripted: the arguments of an OCI process are words of a tiny language.
//! Its streams are real: connections to a socket that speaks the protocol of the vsock backend.
//!
//! | words | what the process does |
//! |---|---|
//! | `echo WORDS` | prints them and ends |
//! | `fail WORDS` | prints them to standard error and ends with 3 |
//! | `exit N` | ends with N |
//! | `cat` | copies standard input to the end |
//! | `size` | prints its terminal's columns and rows |
//! | `flood N` | prints N KiB |
//! | `oom` | ends with 137, out of memory |
//! | `sleep` | waits for a signal; SIGTERM and SIGKILL end it |
//! | `missing` | can't be started |

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use nacre_proto::stream::{HEADER_BYTES, Hello, Stream};
use shim::{
    agent::ProcessId,
    service::guest::{
        Guest, GuestEnd, GuestError, GuestErrorKind, Host, NewContainer, NewProcess,
        SandboxSettings,
    },
    streams::{Ends, Streams},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
    time::sleep,
};

type Key = (String, String);

/// What a process is connected to.
#[derive(Default)]
struct Connected {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

struct Scripted {
    words: Vec<String>,
    terminal: bool,
    has_stdin: bool,
    connected: Connected,
    size: (u16, u16),
    signals: watch::Sender<i32>,
    end: watch::Sender<Option<GuestEnd>>,
    is_started: bool,
}

impl Scripted {
    fn new(words: Vec<String>, terminal: bool, has_stdin: bool) -> Self {
        let connected = Connected::default();
        let (signals, end) = (watch::Sender::new(0), watch::Sender::new(None));
        Self {
            words,
            terminal,
            has_stdin,
            connected,
            size: (0, 0),
            signals,
            end,
            is_started: false,
        }
    }

    fn is_connected(&self) -> bool {
        let Connected { stdin, stdout, stderr } = &self.connected;
        (stdin.is_some() || !self.has_stdin)
            && stdout.is_some()
            && (stderr.is_some() || self.terminal)
    }
}

/// See the module.
pub(crate) struct ScriptedGuest {
    socket: PathBuf,
    _folder: tempfile::TempDir,
    processes: Mutex<HashMap<Key, Scripted>>,
    /// All calls, in their order.
    pub(crate) calls: Mutex<Vec<String>>,
    changed: watch::Sender<u64>,
    died: watch::Sender<Option<String>>,
    out_of_memory: mpsc::UnboundedSender<String>,
    out_of_memory_of: tokio::sync::Mutex<mpsc::UnboundedReceiver<String>>,
}

/// Starts guests, and knows the last one.
#[derive(Default)]
pub(crate) struct ScriptedHost {
    pub(crate) guest: Mutex<Option<Arc<ScriptedGuest>>>,
    pub(crate) settings: Mutex<Option<SandboxSettings>>,
}

#[async_trait]
impl Host for ScriptedHost {
    async fn launch(&self, settings: SandboxSettings) -> Result<Arc<dyn Guest>, GuestError> {
        if settings.annotations.contains_key("test.no-guest") {
            return Err(GuestError::new(GuestErrorKind::Unavailable, "no guest today"));
        }
        let guest = ScriptedGuest::new();
        *self.guest.lock().unwrap() = Some(Arc::clone(&guest));
        *self.settings.lock().unwrap() = Some(settings);
        Ok(guest)
    }
}

impl ScriptedGuest {
    fn new() -> Arc<Self> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vsock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (out_of_memory, out_of_memory_of) = mpsc::unbounded_channel();
        let guest = Arc::new(Self {
            socket,
            _folder: folder,
            processes: Mutex::default(),
            calls: Mutex::default(),
            changed: watch::Sender::new(0),
            died: watch::Sender::new(None),
            out_of_memory,
            out_of_memory_of: tokio::sync::Mutex::new(out_of_memory_of),
        });
        let accepting = Arc::clone(&guest);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let guest = Arc::clone(&accepting);
                tokio::spawn(async move { guest.take(stream).await });
            }
        });
        guest
    }

    /// Takes one stream, as the vsock backend and the agent do.
    async fn take(&self, mut stream: UnixStream) {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let Ok(byte) = stream.read_u8().await else { return };
            line.push(byte);
        }
        stream.write_all(b"OK 1\n").await.unwrap();
        let mut frame = vec![0; HEADER_BYTES];
        stream.read_exact(&mut frame).await.unwrap();
        let ids = usize::from(frame[6]) + usize::from(frame[7]);
        frame.resize(HEADER_BYTES + ids, 0);
        stream.read_exact(&mut frame[HEADER_BYTES..]).await.unwrap();
        let hello = Hello::decode(&frame).unwrap();
        {
            let mut processes = self.processes.lock().unwrap();
            let key = (hello.container_id, hello.exec_id);
            let Some(process) = processes.get_mut(&key) else { return };
            let place = match hello.stream {
                Stream::Stdin => &mut process.connected.stdin,
                Stream::Stdout => &mut process.connected.stdout,
                Stream::Stderr => &mut process.connected.stderr,
            };
            *place = Some(stream);
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// As if its machine died.
    pub(crate) fn die(&self, reason: &str) {
        self.died.send_replace(Some(reason.to_owned()));
        // Its connections break.
        for scripted in self.processes.lock().unwrap().values_mut() {
            scripted.connected = Connected::default();
        }
    }

    /// As if the out-of-memory killer struck in `container`.
    pub(crate) fn strike(&self, container: &str) {
        self.out_of_memory.send(container.to_owned()).unwrap();
    }

    pub(crate) fn was_asked(&self, call: &str) -> bool {
        self.calls.lock().unwrap().iter().any(|one| one == call)
    }

    fn note(&self, call: &str, process: &ProcessId) {
        let call = format!("{call} {} {}", process.container, process.exec);
        self.calls.lock().unwrap().push(call.trim_end().to_owned());
    }

    fn with<T>(
        &self,
        process: &ProcessId,
        look: impl FnOnce(&mut Scripted) -> T,
    ) -> Result<T, GuestError> {
        if let Some(reason) = self.died.borrow().clone() {
            return Err(GuestError::new(GuestErrorKind::Unavailable, reason));
        }
        let mut processes = self.processes.lock().unwrap();
        let found = processes.get_mut(&key(process));
        found.map(look).ok_or_else(|| GuestError::new(GuestErrorKind::NotFound, "no such process"))
    }
}

fn key(process: &ProcessId) -> Key {
    (process.container.clone(), process.exec.clone())
}

fn ended(code: u8, out_of_memory: bool) -> GuestEnd {
    GuestEnd { code, out_of_memory, at: SystemTime::now() }
}

/// Runs the words.
async fn run(
    words: &[String],
    connected: &mut Connected,
    size: (u16, u16),
    signals: &mut watch::Receiver<i32>,
) -> GuestEnd {
    let said = words[1..].join(" ");
    let stdout = connected.stdout.as_mut().unwrap();
    match words[0].as_str() {
        "echo" => stdout.write_all(format!("{said}\n").as_bytes()).await.unwrap(),
        "size" => {
            stdout.write_all(format!("{} {}\n", size.0, size.1).as_bytes()).await.unwrap();
        }
        "flood" => {
            for _ in 0..said.parse::<usize>().unwrap() {
                stdout.write_all(&[b'x'; 1024]).await.unwrap();
            }
        }
        "fail" => {
            let stderr = connected.stderr.as_mut().unwrap();
            stderr.write_all(format!("{said}\n").as_bytes()).await.unwrap();
            return ended(3, false);
        }
        "cat" => {
            tokio::io::copy(connected.stdin.as_mut().unwrap(), stdout).await.unwrap();
        }
        "exit" => return ended(said.parse().unwrap(), false),
        "oom" => return ended(137, true),
        _ => {
            let deadly = |signal: &i32| matches!(*signal, libc::SIGTERM | libc::SIGKILL);
            let signal = *signals.wait_for(deadly).await.unwrap();
            return ended(128 + u8::try_from(signal).unwrap(), false);
        }
    }
    ended(0, false)
}

#[async_trait]
impl Guest for ScriptedGuest {
    async fn create(&self, container: NewContainer) -> Result<(), GuestError> {
        let process = ProcessId { container: container.id.clone(), exec: String::new() };
        self.note("create", &process);
        let words = container.spec.process().as_ref().unwrap().args().clone().unwrap();
        let scripted = Scripted::new(words, container.terminal, container.stdin);
        self.processes.lock().unwrap().insert(key(&process), scripted);
        Ok(())
    }

    async fn exec(&self, process: &ProcessId, new: NewProcess) -> Result<(), GuestError> {
        self.note("exec", process);
        let spec: oci_spec::runtime::Process = serde_json::from_slice(&new.json).unwrap();
        let scripted = Scripted::new(spec.args().clone().unwrap(), new.terminal, new.stdin);
        self.processes.lock().unwrap().insert(key(process), scripted);
        Ok(())
    }

    async fn connect(&self, process: &ProcessId, ends: Ends) -> Result<Streams, GuestError> {
        Streams::connect(&self.socket, process, ends)
            .await
            .map_err(|error| GuestError::new(GuestErrorKind::Unavailable, error.to_string()))
    }

    async fn start(&self, process: &ProcessId) -> Result<(), GuestError> {
        self.note("start", process);
        let mut changed = self.changed.subscribe();
        while !self.with(process, |scripted| scripted.is_connected())? {
            changed.changed().await.unwrap();
        }
        let words = self.with(process, |scripted| scripted.words.clone())?;
        if words[0] == "missing" {
            let message = "exec: \"missing\": no such file or directory";
            return Err(GuestError::new(GuestErrorKind::NotFound, message));
        }
        let (mut connected, size, mut signals, end) = self.with(process, |scripted| {
            scripted.is_started = true;
            let connected = std::mem::take(&mut scripted.connected);
            (connected, scripted.size, scripted.signals.subscribe(), scripted.end.clone())
        })?;
        let mut died = self.died.subscribe();
        tokio::spawn(async move {
            let end_of_it = tokio::select! {
                end = run(&words, &mut connected, size, &mut signals) => end,
                _ = died.wait_for(Option::is_some) => return,
            };
            drop(connected);
            end.send_replace(Some(end_of_it));
        });
        Ok(())
    }

    async fn signal(&self, process: &ProcessId, signal: i32, all: bool) -> Result<(), GuestError> {
        self.note(&format!("signal {signal}{}", if all { " all" } else { "" }), process);
        self.with(process, |_| ())?;
        for ((container, exec), scripted) in self.processes.lock().unwrap().iter() {
            let is_meant = *container == process.container && (all || *exec == process.exec);
            if is_meant {
                scripted.signals.send_replace(signal);
                if !scripted.is_started && signal == libc::SIGKILL {
                    scripted.end.send_replace(Some(ended(137, false)));
                }
            }
        }
        Ok(())
    }

    async fn wait(&self, process: &ProcessId) -> Result<GuestEnd, GuestError> {
        let mut end = self.with(process, |scripted| scripted.end.subscribe())?;
        let mut died = self.died.subscribe();
        tokio::select! {
            end = end.wait_for(Option::is_some) => Ok(end.unwrap().unwrap()),
            _ = died.wait_for(Option::is_some) => {
                Err(GuestError::new(GuestErrorKind::Unavailable, "the guest is gone"))
            }
        }
    }

    async fn resize(&self, process: &ProcessId, columns: u16, rows: u16) -> Result<(), GuestError> {
        self.note(&format!("resize {columns} {rows}"), process);
        self.with(process, |scripted| scripted.size = (columns, rows))
    }

    async fn delete(&self, process: &ProcessId) -> Result<(), GuestError> {
        self.note("delete", process);
        self.with(process, |_| ())?;
        self.processes.lock().unwrap().remove(&key(process));
        Ok(())
    }

    async fn pause(&self, container: &str) -> Result<(), GuestError> {
        let process = ProcessId { container: container.to_owned(), exec: String::new() };
        self.note("pause", &process);
        self.with(&process, |_| ())
    }

    async fn resume(&self, container: &str) -> Result<(), GuestError> {
        let process = ProcessId { container: container.to_owned(), exec: String::new() };
        self.note("resume", &process);
        self.with(&process, |_| ())
    }

    async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), GuestError> {
        let process = ProcessId { container: container.to_owned(), exec: String::new() };
        self.note(&format!("update {}", String::from_utf8(resources).unwrap()), &process);
        self.with(&process, |_| ())
    }

    async fn stats(&self, container: &str) -> Result<Metrics, GuestError> {
        let process = ProcessId { container: container.to_owned(), exec: String::new() };
        self.with(&process, |_| ())?;
        let mut metrics = Metrics::new();
        metrics.cpu.mut_or_insert_default().usage_usec = 42;
        metrics.memory.mut_or_insert_default().usage = 4096;
        metrics.memory_events.mut_or_insert_default().oom_kill = 1;
        Ok(metrics)
    }

    async fn out_of_memory(&self) -> String {
        match self.out_of_memory_of.lock().await.recv().await {
            Some(container) => container,
            None => std::future::pending().await,
        }
    }

    async fn died(&self) -> String {
        let mut died = self.died.subscribe();
        let reason = died.wait_for(Option::is_some).await.unwrap().clone();
        // A moment, in which others may find out first.
        sleep(Duration::from_millis(5)).await;
        reason.unwrap()
    }

    fn host_pid(&self) -> u32 {
        std::process::id()
    }

    async fn stop(&self) {
        self.calls.lock().unwrap().push("stop".to_owned());
        self.died.send_replace(Some("stopped".to_owned()));
    }
}
