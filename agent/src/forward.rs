//! Connections to TCP ports of the guest: a frame, one byte for the outcome, then raw bytes both ways.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use nacre_proto::forward::{CONNECTED, FAILED, FRAME_BYTES, Forward, ForwardError, REFUSED};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes},
    net::TcpStream,
    sync::Semaphore,
    time::timeout,
};

use crate::text::chain;

/// The most connections at a time.
const CONNECTIONS_MAX: usize = 512;
/// How long a host may take to say what it wants.
const FRAME_LIMIT: Duration = Duration::from_secs(10);
/// How long a connection to the guest itself may take.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// How much is under way in each direction, at the most.
const BUFFER_BYTES: usize = 32 << 10;

/// Why a connection was not served to its end.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("no frame came")]
    NoFrame(#[source] io::Error),
    #[error("no frame came within {} s", FRAME_LIMIT.as_secs())]
    Limit,
    #[error("the frame makes no sense")]
    Frame(#[from] ForwardError),
    #[error("port {port}: the host is gone")]
    Host {
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("port {port}")]
    Dial {
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("port {port}: broken off")]
    Broken {
        port: u16,
        #[source]
        source: io::Error,
    },
}

/// How many more connections there may be.
#[derive(Debug)]
pub(crate) struct Forwards {
    free: Semaphore,
}

impl Forwards {
    /// None is open.
    pub(crate) fn new() -> Self {
        Self { free: Semaphore::new(CONNECTIONS_MAX) }
    }

    /// Serves one connection until both directions or either side have ended.
    pub(crate) async fn serve<C>(self: Arc<Self>, connection: C)
    where
        C: AsyncRead + AsyncWrite + Unpin + Send,
    {
        match self.forward(connection).await {
            Ok(()) => {}
            // Everyday life of a connection.
            Err(error @ (ServeError::Broken { .. } | ServeError::Dial { .. })) => {
                log::debug!("a forwarded connection: {}", chain(&error));
            }
            Err(error) => log::warn!("a forwarded connection: {}", chain(&error)),
        }
    }

    async fn forward<C>(&self, mut host: C) -> Result<(), ServeError>
    where
        C: AsyncRead + AsyncWrite + Unpin + Send,
    {
        let mut frame = [0; FRAME_BYTES];
        let read = timeout(FRAME_LIMIT, host.read_exact(&mut frame)).await;
        read.map_err(|_elapsed| ServeError::Limit)?.map_err(ServeError::NoFrame)?;
        let Forward { port } = Forward::decode(&frame)?;
        let permit = self.free.try_acquire();
        let dialled = match &permit {
            Ok(_permit) => dial(port).await,
            Err(_none) => Err(io::Error::other("too many connections")),
        };
        let outcome = match &dialled {
            Ok(_server) => CONNECTED,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => REFUSED,
            Err(_other) => FAILED,
        };
        let answered = host.write_all(&[outcome]).await;
        answered.map_err(|source| ServeError::Host { port, source })?;
        let mut server = dialled.map_err(|source| ServeError::Dial { port, source })?;
        let (up, down) = (BUFFER_BYTES, BUFFER_BYTES);
        let carried = copy_bidirectional_with_sizes(&mut host, &mut server, up, down).await;
        carried.map(drop).map_err(|source| ServeError::Broken { port, source })
    }
}

/// Connects to whoever listens on the port for the guest alone or for all.
async fn dial(port: u16) -> io::Result<TcpStream> {
    let one = |address: SocketAddr| async move {
        let limit = timeout(DIAL_LIMIT, TcpStream::connect(address)).await;
        let stream = limit.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    match one((Ipv4Addr::LOCALHOST, port).into()).await {
        Ok(stream) => Ok(stream),
        // A guest without IPv6 refuses for another reason than the one that counts.
        Err(first) => one((Ipv6Addr::LOCALHOST, port).into()).await.map_err(|_second| first),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{DuplexStream, duplex},
        net::TcpListener,
    };

    use super::*;

    fn connect(forwards: &Arc<Forwards>) -> DuplexStream {
        let (host, agent) = duplex(1024);
        tokio::spawn(Arc::clone(forwards).serve(agent));
        host
    }

    async fn ask(forwards: &Arc<Forwards>, port: u16) -> (DuplexStream, u8) {
        let mut host = connect(forwards);
        host.write_all(&Forward { port }.encode()).await.unwrap();
        let outcome = host.read_u8().await.unwrap();
        (host, outcome)
    }

    /// Reads all, and only then answers with it, in capitals.
    fn answer_at_the_end(listener: TcpListener) {
        tokio::spawn(async move {
            let (mut stream, _peer) = listener.accept().await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            stream.write_all(&all.to_ascii_uppercase()).await.unwrap();
        });
    }

    #[tokio::test]
    async fn both_ends_are_half_closed_by_their_sender() {
        let forwards = Arc::new(Forwards::new());
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address).await else {
                println!("SKIPPED: no {address}");
                continue;
            };
            let port = listener.local_addr().unwrap().port();
            answer_at_the_end(listener);
            let (host, outcome) = ask(&forwards, port).await;
            assert_eq!(outcome, CONNECTED, "{address}");
            let sent = "a".repeat(100_000);
            let (mut from, mut to) = tokio::io::split(host);
            let reader = tokio::spawn(async move {
                let mut all = String::new();
                from.read_to_string(&mut all).await.map(|_length| all)
            });
            to.write_all(sent.as_bytes()).await.unwrap();
            to.shutdown().await.unwrap();
            assert_eq!(reader.await.unwrap().unwrap(), "A".repeat(100_000));
        }
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_on_is_refused() {
        let forwards = Arc::new(Forwards::new());
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().port()
        };
        let (mut host, outcome) = ask(&forwards, port).await;
        assert_eq!(outcome, REFUSED);
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn nonsense_is_hung_up_on_and_too_many_fail() {
        let forwards = Arc::new(Forwards::new());
        let mut host = connect(&forwards);
        host.write_all(b"GET / HT").await.unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
        let all = u32::try_from(CONNECTIONS_MAX).unwrap();
        let _taken = forwards.free.acquire_many(all).await.unwrap();
        assert_eq!(ask(&forwards, 1).await.1, FAILED);
    }
}
