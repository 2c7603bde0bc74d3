//! The standard input of a process: from the host to its pipe.
//!
//! The host's half-close is the process's end of file; a lost connection is not: the host connects
//! again and says where it goes on. What was received already is skipped, a gap is refused.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::{Mutex, watch},
};

use crate::streams::pipe::{Slot, opened};

const CHUNK_BYTES: usize = 64 << 10;

/// Why a connection ended before the stream did.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    /// The host goes on beyond what was received.
    #[error("can't resume at {asked}: only {received} bytes were received")]
    Gap {
        /// Where the host goes on.
        asked: u64,
        /// What was received.
        received: u64,
    },
    /// The connection failed.
    #[error("the connection failed")]
    Connection(#[source] io::Error),
    /// The process takes no more.
    #[error("the process takes no more")]
    Pipe(#[source] io::Error),
    /// The host connected again.
    #[error("a newer connection took over")]
    Superseded,
}

/// What the end of the host's bytes means to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtEnd {
    /// A pipe: it is closed.
    Close,
    /// A terminal: nothing; it belongs to the output as well.
    Keep,
}

/// An input stream.
#[derive(Debug)]
pub(crate) struct Input {
    sink: watch::Sender<Slot>,
    at_end: AtEnd,
    /// How many bytes the process was given; held by the connection that is served.
    received: Mutex<u64>,
    /// Counts connections: a served one yields when it is no longer the newest.
    newest: watch::Sender<u64>,
}

impl Input {
    /// A stream whose pipe is there or comes later.
    pub(crate) fn new(sink: Slot, at_end: AtEnd) -> Self {
        Self {
            sink: watch::Sender::new(sink),
            at_end,
            received: Mutex::default(),
            newest: watch::Sender::new(0),
        }
    }

    /// Decides where the bytes go, once, or that nothing takes them any more.
    pub(crate) fn set_sink(&self, sink: Slot) {
        self.sink.send_replace(sink);
    }

    /// Gives the process what the host sends from `offset` on, until the host's end of file.
    pub(crate) async fn serve(
        &self,
        host: impl AsyncRead + Unpin,
        offset: u64,
    ) -> Result<(), InputError> {
        let mut number = 0;
        self.newest.send_modify(|newest| {
            *newest += 1;
            number = *newest;
        });
        let mut newest = self.newest.subscribe();
        tokio::select! {
            biased;
            _ = newest.wait_for(|newest| *newest != number) => Err(InputError::Superseded),
            done = self.receive(host, offset) => done,
        }
    }

    async fn receive(
        &self,
        mut host: impl AsyncRead + Unpin,
        offset: u64,
    ) -> Result<(), InputError> {
        let mut received = self.received.lock().await;
        let gap = InputError::Gap { asked: offset, received: *received };
        let mut repeated = received.checked_sub(offset).ok_or(gap)?;
        let Some(pipe) = opened(self.sink.subscribe()).await else {
            return Err(InputError::Pipe(io::ErrorKind::BrokenPipe.into()));
        };
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let len = host.read(&mut buffer).await.map_err(InputError::Connection)?;
            if len == 0 {
                break;
            }
            let skip = usize::try_from(repeated).unwrap_or(len).min(len);
            repeated -= skip as u64;
            let mut rest = &buffer[skip..len];
            while !rest.is_empty() {
                let taken = pipe.write(rest).await.map_err(InputError::Pipe)?;
                *received += taken as u64;
                rest = &rest[taken..];
            }
        }
        if self.at_end == AtEnd::Close {
            self.set_sink(Slot::Gone);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::streams::pipe::Pipe;

    fn input() -> (Input, File) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        (Input::new(Slot::Open(Pipe::new(write).unwrap()), AtEnd::Close), File::from(read))
    }

    /// Bytes, and then a lost connection instead of an end.
    fn lost_after(bytes: &'static [u8]) -> impl AsyncRead + Unpin {
        let error = io::Error::from(io::ErrorKind::ConnectionReset);
        tokio_test_chain(bytes, error)
    }

    fn tokio_test_chain(bytes: &'static [u8], error: io::Error) -> impl AsyncRead + Unpin {
        struct Fails(Option<io::Error>);
        impl AsyncRead for Fails {
            fn poll_read(
                mut self: std::pin::Pin<&mut Self>,
                _context: &mut std::task::Context<'_>,
                _buffer: &mut tokio::io::ReadBuf<'_>,
            ) -> std::task::Poll<io::Result<()>> {
                std::task::Poll::Ready(Err(self.0.take().unwrap()))
            }
        }
        AsyncReadExt::chain(bytes, Fails(Some(error)))
    }

    #[tokio::test]
    async fn the_hosts_end_is_the_processs_end_of_file() {
        let (input, mut process) = input();
        input.serve(&b"hello"[..], 0).await.unwrap();
        let mut text = String::new();
        process.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn a_lost_connection_is_resumed_without_a_gap_or_a_repetition() {
        let (input, mut process) = input();
        let lost = input.serve(lost_after(b"abcd"), 0).await;
        assert!(matches!(lost, Err(InputError::Connection(_))));
        let gap = input.serve(&b"x"[..], 5).await;
        assert!(matches!(gap, Err(InputError::Gap { asked: 5, received: 4 })));
        input.serve(&b"cdef"[..], 2).await.unwrap();
        let mut text = String::new();
        process.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abcdef");
    }
}
