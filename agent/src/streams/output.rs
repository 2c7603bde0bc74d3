//! One output stream of a process: from its pipe, through the window, to the host.
//!
//! The pipe is read only while a connection wants its bytes, so the kernel's pipe buffer holds a
//! process back whose output nobody takes. At most one connection is served: a newer one takes
//! over, since the host makes a second only when it has given the first up.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    sync::{Mutex, watch},
};

use crate::streams::{
    pipe::{Pipe, Slot, opened},
    window::{NotKept, Window},
};

/// The most bytes moved at once: a pipe's default capacity.
const CHUNK_BYTES: usize = 64 << 10;

/// Why a connection ended before the stream did.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputError {
    /// The host wants bytes that are gone, or not there yet.
    #[error("can't resume")]
    NotKept(#[from] NotKept),
    /// The connection failed.
    #[error("the connection failed")]
    Connection(#[source] io::Error),
    /// The process's end failed.
    #[error("the process's end failed")]
    Pipe(#[source] io::Error),
    /// Nobody on the host takes the stream any more.
    #[error("the host wants no more")]
    Unwanted,
    /// The host connected again.
    #[error("a newer connection took over")]
    Superseded,
}

/// An output stream.
#[derive(Debug)]
pub(crate) struct Output {
    source: watch::Sender<Slot>,
    /// Held by the connection that is served.
    window: Mutex<Window>,
    /// Counts connections: a served one yields when it is no longer the newest.
    newest: watch::Sender<u64>,
}

impl Output {
    /// A stream whose pipe is there or comes later.
    pub(crate) fn new(source: Slot) -> Self {
        Self {
            source: watch::Sender::new(source),
            window: Mutex::default(),
            newest: watch::Sender::new(0),
        }
    }

    /// Decides where the bytes come from, once.
    pub(crate) fn set_source(&self, source: Slot) {
        self.source.send_replace(source);
    }

    /// Sends the stream from `offset` on, until its end.
    pub(crate) async fn serve<C>(&self, connection: C, offset: u64) -> Result<(), OutputError>
    where
        C: AsyncRead + AsyncWrite,
    {
        let mut number = 0;
        self.newest.send_modify(|newest| {
            *newest += 1;
            number = *newest;
        });
        let mut newest = self.newest.subscribe();
        let (reader, writer) = split(connection);
        let served = tokio::select! {
            biased;
            _ = newest.wait_for(|newest| *newest != number) => Err(OutputError::Superseded),
            error = lost(reader) => Err(error),
            done = self.send(writer, offset) => done,
        };
        if matches!(served, Err(OutputError::Unwanted)) {
            // The last reader of the process's pipe goes with it.
            self.set_source(Slot::Gone);
        }
        served
    }

    async fn send(
        &self,
        mut host: impl AsyncWrite + Unpin,
        mut offset: u64,
    ) -> Result<(), OutputError> {
        let mut window = self.window.lock().await;
        let pipe = opened(self.source.subscribe()).await;
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let piece = window.piece(offset)?;
            if !piece.is_empty() {
                let sent = host.write(piece).await.map_err(OutputError::Connection)?;
                offset += sent as u64;
                continue;
            }
            let more = match &pipe {
                Some(pipe) => fill(&mut window, pipe, &mut buffer).await?,
                None => false,
            };
            if !more {
                return host.shutdown().await.map_err(OutputError::Connection);
            }
        }
    }
}

/// Takes the next bytes of the process; false at the end of the stream.
async fn fill(window: &mut Window, pipe: &Pipe, buffer: &mut [u8]) -> Result<bool, OutputError> {
    let len = pipe.read(buffer).await.map_err(OutputError::Pipe)?;
    window.push(&buffer[..len]);
    Ok(len > 0)
}

/// Ends when the connection is known to be lost, or the host says that it wants no more; one that
/// only listens half-closes its side.
async fn lost(mut host: impl AsyncRead + Unpin) -> OutputError {
    match host.read_u8().await {
        // The host has nothing else to say on an output stream.
        Ok(_unwanted) => OutputError::Unwanted,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => std::future::pending().await,
        Err(error) => OutputError::Connection(error),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::Arc};

    use nacre_proto::stream::UNWANTED;
    use rustix::pipe::{PipeFlags, pipe_with};
    use tokio::{io::duplex, net::UnixStream};

    use super::*;

    fn output() -> (Arc<Output>, std::fs::File) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let output = Output::new(Slot::Open(Pipe::new(read).unwrap()));
        (Arc::new(output), std::fs::File::from(write))
    }

    #[tokio::test]
    async fn what_was_written_before_the_connection_arrives_with_its_end() {
        let (output, mut process) = output();
        process.write_all(b"hello").unwrap();
        drop(process);
        let (agent, mut host) = duplex(16);
        let serve = output.serve(agent, 0);
        let mut text = String::new();
        let (served, read) = tokio::join!(serve, host.read_to_string(&mut text));
        served.unwrap();
        read.unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn a_second_connection_resumes_where_it_wants_and_the_first_yields() {
        let (output, mut process) = output();
        process.write_all(b"abcdef").unwrap();
        let (agent, mut host) = UnixStream::pair().unwrap();
        let first = tokio::spawn({
            let output = Arc::clone(&output);
            async move { output.serve(agent, 0).await }
        });
        let mut six = [0; 6];
        host.read_exact(&mut six).await.unwrap();
        let (agent, mut host) = UnixStream::pair().unwrap();
        let second = tokio::spawn({
            let output = Arc::clone(&output);
            async move { output.serve(agent, 4).await }
        });
        let mut two = [0; 2];
        host.read_exact(&mut two).await.unwrap();
        assert_eq!(&two, b"ef");
        assert!(matches!(first.await.unwrap(), Err(OutputError::Superseded)));
        drop(process);
        second.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_process_of_an_unwanted_stream_finds_its_pipe_broken() {
        let (output, mut process) = output();
        process.write_all(b"first").unwrap();
        let (agent, mut host) = UnixStream::pair().unwrap();
        host.write_all(&[UNWANTED]).await.unwrap();
        assert!(matches!(output.serve(agent, 0).await, Err(OutputError::Unwanted)));
        let error = process.write_all(b"second").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn an_offset_that_never_was_is_refused() {
        let (output, _process) = output();
        let (agent, _host) = duplex(16);
        assert!(matches!(output.serve(agent, 1).await, Err(OutputError::NotKept(_))));
    }

    #[tokio::test]
    async fn a_pipe_that_never_comes_is_an_empty_stream() {
        let output = Output::new(Slot::Awaited);
        let (agent, mut host) = duplex(16);
        let mut text = String::new();
        let (served, read, ()) =
            tokio::join!(output.serve(agent, 0), host.read_to_string(&mut text), async {
                output.set_source(Slot::Gone);
            });
        served.unwrap();
        assert_eq!(read.unwrap(), 0);
    }
}
