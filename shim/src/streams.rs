//! A process's standard streams between the guest and here: one vsock connection each, raw bytes
//! after a hello frame, the end of file by half-closing.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use nacre_proto::{
    STREAM_PORT,
    stream::{Hello, HelloError, Stream, UNWANTED},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use crate::{
    agent::ProcessId,
    hybrid_vsock::{self, ConnectError},
    stdio::{CHUNK_BYTES, Input, Output, Outputs, Written},
};

/// How long one connection may take to be made.
const CONNECT: Duration = Duration::from_secs(60);

/// Why a stream can't be connected.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The guest does not take it.
    #[error("the process's streams can't be connected")]
    Connect(#[from] ConnectError),
    /// The guest took too long.
    #[error("the process's streams are not taken by the guest")]
    Timeout,
    /// The ids don't fit into the frame.
    #[error("the process's streams can't be named")]
    Hello(#[from] HelloError),
    /// The connection broke at once.
    #[error("the process's streams break at once")]
    Broken(#[source] std::io::Error),
}

/// The local ends.
#[derive(Debug)]
pub struct Ends {
    /// Nothing if the process gets no standard input.
    pub input: Option<Input>,
    /// Where its output goes.
    pub outputs: Outputs,
    /// Whether the process has a terminal, and so no standard error of its own.
    pub terminal: bool,
    /// The terminal's size at the start: columns and rows.
    pub size: Option<(u16, u16)>,
}

/// Connected streams, moving.
#[derive(Debug)]
pub struct Streams {
    input: JoinSet<()>,
    outputs: JoinSet<()>,
    written: Written,
    unread: watch::Receiver<bool>,
    flow: Arc<Flow>,
}

/// How the output moves. Shared: the tasks count, and who waits for the end looks whether they do.
#[derive(Debug, Default)]
struct Flow {
    read_bytes: AtomicU64,
    /// Streams that wait for somebody here to take what was read.
    waiting: AtomicU64,
}

impl Flow {
    /// Whether nothing is on its way, and nothing was read since `seen` bytes.
    fn rests(&self, seen: u64) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0 && self.read() == seen
    }

    fn read(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}

impl Streams {
    /// Connects the streams of `process`. To be done before it is started, so that nothing it says
    /// is lost.
    ///
    /// # Errors
    ///
    /// Fails if the guest does not take a connection.
    pub async fn connect(
        vsock: &Path,
        process: &ProcessId,
        ends: Ends,
    ) -> Result<Self, StreamError> {
        let Ends { input, outputs, terminal, size: _ } = ends;
        let Outputs { output, error, written } = outputs;
        let flow = Arc::new(Flow::default());
        let mut streams = Self {
            input: JoinSet::new(),
            outputs: JoinSet::new(),
            written,
            unread: output.unread(),
            flow: Arc::clone(&flow),
        };
        if let Some(input) = input {
            let stream = open(vsock, process, Stream::Stdin).await?;
            streams.input.spawn(send(input, stream));
        }
        let stdout = open(vsock, process, Stream::Stdout).await?;
        if terminal {
            streams.outputs.spawn(receive(stdout, output, flow));
        } else {
            streams.outputs.spawn(receive_or_refuse(stdout, output, Arc::clone(&flow)));
            let stderr = open(vsock, process, Stream::Stderr).await?;
            streams.outputs.spawn(receive_or_refuse(stderr, error, flow));
        }
        Ok(streams)
    }

    /// Resolves when the reader of the process's standard output is gone.
    pub async fn unread(&self) {
        let mut unread = self.unread.clone();
        if unread.wait_for(|unread| *unread).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// After the end of the process: waits until all that it printed is written, however slowly it
    /// is taken here. A stream that the guest neither ends nor moves for `patience` is given up.
    pub async fn finish(self, patience: Duration) {
        let Self { input, mut outputs, written, unread: _, flow } = self;
        drop(input);
        let mut seen = flow.read();
        while !outputs.is_empty() {
            let ended = timeout(patience, outputs.join_next()).await;
            if ended.is_err() && flow.rests(seen) {
                log::warn!("a stream of the ended process stays open: its rest is given up");
                break;
            }
            seen = flow.read();
        }
        drop(outputs);
        written.wait().await;
    }
}

async fn open(
    vsock: &Path,
    process: &ProcessId,
    stream: Stream,
) -> Result<UnixStream, StreamError> {
    let hello = Hello {
        container_id: process.container.clone(),
        exec_id: process.exec.clone(),
        stream,
        offset: 0,
    };
    let frame = hello.encode()?;
    let connect = hybrid_vsock::connect(vsock, STREAM_PORT);
    let mut connection =
        timeout(CONNECT, connect).await.map_err(|_elapsed| StreamError::Timeout)??;
    connection.write_all(&frame).await.map_err(StreamError::Broken)?;
    Ok(connection)
}

async fn send(mut input: Input, mut stream: UnixStream) {
    while let Some(bytes) = input.next().await {
        if let Err(error) = stream.write_all(&bytes).await {
            log::debug!("standard input is no longer taken: {error}");
            return;
        }
    }
    if let Err(error) = stream.shutdown().await {
        log::debug!("standard input can't be ended: {error}");
    }
    // Kept until the process has ended: closing it altogether would look like a reset.
    std::future::pending::<()>().await;
}

/// Once the local reader is gone, the process is to find its pipe broken too. Not for a terminal,
/// which can't break: the process would wait for ever to print.
async fn receive_or_refuse(stream: UnixStream, output: Output, flow: Arc<Flow>) {
    let mut unread = output.unread();
    let (from_process, mut to_agent) = stream.into_split();
    let refuse = async {
        if unread.wait_for(|unread| *unread).await.is_ok()
            && let Err(error) = to_agent.write_all(&[UNWANTED]).await
        {
            log::debug!("an output stream can't be refused: {error}");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = receive(from_process, output, flow) => {}
        () = refuse => {}
    }
}

async fn receive(mut stream: impl AsyncRead + Unpin, output: Output, flow: Arc<Flow>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => {
                // Without a taker the stream is still emptied: the process is not to wait.
                flow.read_bytes.fetch_add(u64::try_from(read).unwrap_or(1), Ordering::Relaxed);
                flow.waiting.fetch_add(1, Ordering::Relaxed);
                let taken = output.write(&buffer[..read]).await;
                flow.waiting.fetch_sub(1, Ordering::Relaxed);
                log::trace!("{read} bytes, taken: {taken}");
            }
            Err(error) => {
                log::debug!("an output stream broke: {error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, time::Instant};

    use nacre_proto::stream::HEADER_BYTES;
    use tokio::net::UnixListener;

    use super::*;

    /// Takes one stream connection, as the backend and the agent would.
    async fn accept(listener: &UnixListener) -> (Hello, UnixStream) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(stream.read_u8().await.unwrap());
        }
        assert_eq!(line, b"CONNECT 1025\n");
        stream.write_all(b"OK 1\n").await.unwrap();
        let mut frame = vec![0; HEADER_BYTES];
        stream.read_exact(&mut frame).await.unwrap();
        let ids = usize::from(frame[6]) + usize::from(frame[7]);
        frame.resize(HEADER_BYTES + ids, 0);
        stream.read_exact(&mut frame[HEADER_BYTES..]).await.unwrap();
        (Hello::decode(&frame).unwrap(), stream)
    }

    fn process() -> ProcessId {
        ProcessId { container: "web".to_owned(), exec: String::new() }
    }

    fn ends(folder: &Path, input: Option<Input>, terminal: bool) -> Ends {
        let file = |name| File::create(folder.join(name)).unwrap();
        let outputs = Outputs::to_files(file("out"), file("err")).unwrap();
        Ends { input, outputs, terminal, size: None }
    }

    #[tokio::test]
    async fn each_stream_carries_its_own_bytes_to_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::write(folder.path().join("in"), vec![7; 300_000]).unwrap();
        let input = Input::from_file(File::open(folder.path().join("in")).unwrap()).unwrap();
        let guest = async {
            let (hello, mut stdin) = accept(&listener).await;
            assert_eq!((hello.stream, hello.container_id.as_str()), (Stream::Stdin, "web"));
            let (hello, mut stdout) = accept(&listener).await;
            assert_eq!((hello.stream, hello.offset), (Stream::Stdout, 0));
            let (hello, mut stderr) = accept(&listener).await;
            assert_eq!(hello.stream, Stream::Stderr);
            let mut all = Vec::new();
            stdin.read_to_end(&mut all).await.unwrap();
            stdout.write_all(&all).await.unwrap();
            stderr.write_all(b"oops").await.unwrap();
        };
        let process = process();
        let ends = ends(folder.path(), Some(input), false);
        let ((), streams) = tokio::join!(guest, Streams::connect(&path, &process, ends));
        streams.unwrap().finish(Duration::from_secs(60)).await;
        assert!(std::fs::read(folder.path().join("out")).unwrap() == vec![7; 300_000]);
        assert_eq!(std::fs::read(folder.path().join("err")).unwrap(), b"oops");
    }

    #[tokio::test]
    async fn a_stream_that_the_guest_never_ends_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let process = process();
        let ends = ends(folder.path(), None, true);
        let (streams, (_, mut stdout)) =
            tokio::join!(Streams::connect(&path, &process, ends), accept(&listener));
        stdout.write_all(b"said").await.unwrap();
        let begun = Instant::now();
        streams.unwrap().finish(Duration::from_millis(50)).await;
        assert!(begun.elapsed() >= Duration::from_millis(50));
        assert_eq!(std::fs::read(folder.path().join("out")).unwrap(), b"said");
        drop(stdout);
    }
}
