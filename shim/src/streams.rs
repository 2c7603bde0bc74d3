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
    stream::{Hello, HelloError, Stream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
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
    moved_bytes: Arc<AtomicU64>,
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
        // Shared: the tasks add, and who waits for the end looks whether they still do.
        let moved_bytes = Arc::new(AtomicU64::new(0));
        let mut streams = Self {
            input: JoinSet::new(),
            outputs: JoinSet::new(),
            written,
            moved_bytes: Arc::clone(&moved_bytes),
        };
        if let Some(input) = input {
            let stream = open(vsock, process, Stream::Stdin).await?;
            streams.input.spawn(send(input, stream));
        }
        let stdout = open(vsock, process, Stream::Stdout).await?;
        streams.outputs.spawn(receive(stdout, output, Arc::clone(&moved_bytes)));
        if !terminal {
            let stderr = open(vsock, process, Stream::Stderr).await?;
            streams.outputs.spawn(receive(stderr, error, moved_bytes));
        }
        Ok(streams)
    }

    /// After the end of the process: waits until all that it printed is written. A stream that
    /// neither ends nor moves for `patience` is given up.
    pub async fn finish(self, patience: Duration) {
        let Self { input, mut outputs, written, moved_bytes } = self;
        drop(input);
        let mut seen = moved_bytes.load(Ordering::Relaxed);
        while !outputs.is_empty() {
            let ended = timeout(patience, outputs.join_next()).await;
            let moved = moved_bytes.load(Ordering::Relaxed);
            if ended.is_err() && moved == seen {
                log::warn!("a stream of the ended process stays open: its rest is given up");
                break;
            }
            seen = moved;
        }
        drop(outputs);
        if timeout(patience, written.wait()).await.is_err() {
            log::warn!("nobody takes the rest of the output");
        }
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

async fn receive(mut stream: UnixStream, output: Output, moved_bytes: Arc<AtomicU64>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) => return,
            Ok(read) => {
                // Without a taker the stream is still emptied: the process is not to be stopped.
                let taken = output.write(&buffer[..read]).await;
                log::trace!("{read} bytes, taken: {taken}");
                moved_bytes.fetch_add(u64::try_from(read).unwrap_or(1), Ordering::Relaxed);
            }
            Err(error) => {
                log::debug!("an output stream broke: {error}");
                return;
            }
        }
    }
}
