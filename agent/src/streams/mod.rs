//! Standard streams: one connection each, a hello frame, then raw bytes in one direction.

use std::{io, sync::Arc, time::Duration};

use nacre_proto::stream::{HEADER_BYTES, Hello, HelloError, Stream, frame_len};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    time::timeout,
};

use crate::{
    container::{ContainerError, Containers},
    ids::{IdError, ProcessId},
    process::Process,
    streams::{input::InputError, output::OutputError},
    text::chain,
};

pub(crate) mod input;
pub(crate) mod output;
pub(crate) mod pipe;
pub(crate) mod window;

/// How long a host may take to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);

/// Why a connection was not served to its end.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("no hello came")]
    NoHello(#[source] io::Error),
    #[error("no hello came within {} s", HELLO_LIMIT.as_secs())]
    Limit,
    #[error("the hello makes no sense")]
    Hello(#[from] HelloError),
    #[error("the hello has a bad name")]
    Id(#[from] IdError),
    #[error("there is no such process")]
    Process(#[from] ContainerError),
    #[error("{0} has no such stream")]
    NoStream(ProcessId),
    #[error("{id}: {stream:?} broke off")]
    Output {
        id: ProcessId,
        stream: Stream,
        #[source]
        source: OutputError,
    },
    #[error("{id}: Stdin broke off")]
    Input {
        id: ProcessId,
        #[source]
        source: InputError,
    },
}

/// Serves one connection until its stream or the connection ends.
pub(crate) async fn serve<C>(containers: Arc<Containers>, connection: C)
where
    C: AsyncRead + AsyncWrite + Unpin + Send,
{
    match attach(&containers, connection).await {
        Ok(()) => {}
        // What a host does that resumes a stream.
        Err(StreamError::Output {
            source: OutputError::Superseded | OutputError::Unwanted,
            ..
        }) => {}
        Err(error) => log::warn!("a stream's connection: {}", chain(&error)),
    }
}

async fn attach<C>(containers: &Containers, mut connection: C) -> Result<(), StreamError>
where
    C: AsyncRead + AsyncWrite + Unpin + Send,
{
    let hello = timeout(HELLO_LIMIT, hello(&mut connection));
    let hello = hello.await.map_err(|_elapsed| StreamError::Limit)??;
    let id = ProcessId::parse(&hello.container_id, &hello.exec_id)?;
    let process: Arc<Process> = containers.process(&id)?;
    let stdio = &process.stdio;
    let Hello { stream, offset, .. } = hello;
    let output = match stream {
        Stream::Stdin => {
            let input = stdio.stdin.as_ref().ok_or(StreamError::NoStream(id.clone()))?;
            let served = input.serve(connection, offset).await;
            return served.map_err(|source| StreamError::Input { id, source });
        }
        Stream::Stdout => Some(&stdio.stdout),
        Stream::Stderr => stdio.stderr.as_ref(),
    };
    let output = output.ok_or(StreamError::NoStream(id.clone()))?;
    let served = output.serve(connection, offset).await;
    served.map_err(|source| StreamError::Output { id, stream, source })
}

async fn hello(connection: &mut (impl AsyncRead + Unpin)) -> Result<Hello, StreamError> {
    let mut header = [0; HEADER_BYTES];
    connection.read_exact(&mut header).await.map_err(StreamError::NoHello)?;
    let mut frame = header.to_vec();
    frame.resize(frame_len(&header)?, 0);
    connection.read_exact(&mut frame[HEADER_BYTES..]).await.map_err(StreamError::NoHello)?;
    Ok(Hello::decode(&frame)?)
}
