//! The ports that a guest has open on its own loopback interface, as ports of the namespace's.
//!
//! That is where `kubectl port-forward` ends: containerd connects to 127.0.0.1 or ::1 in the
//! namespace, in which nobody listens, for the pod's processes are in the guest. One rule leads all
//! such connections to one listener here, which asks the kernel where each was to go, and hands it to
//! the agent.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nacre_proto::{
    FORWARD_PORT,
    forward::{CONNECTED, Forward, REFUSED},
};
use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst, set_socket_linger};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{Namespace, NamespaceError};
use crate::hybrid_vsock::{self, ConnectError};

/// How many connections there may be at a time; others wait.
const MOST_CONNECTIONS: usize = 256;
/// How long the agent may take to connect.
const CONNECT: Duration = Duration::from_secs(30);
/// The pause after a connection that could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Why a connection is not handed on.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("it is not known where it was to go")]
    Destination(#[source] io::Error),
    #[error("the agent can't be reached")]
    Agent(#[from] ConnectError),
    #[error("the agent does not answer")]
    Mute,
    #[error("the connection to the agent breaks")]
    Broken(#[from] io::Error),
    #[error("nobody in the guest listens on port {0}")]
    Refused(u16),
    #[error("the agent answers {0}")]
    Answer(u8),
}

/// The listener. Dropping it ends its connections; the rule stays with the namespace, and leads
/// nowhere.
#[derive(Debug)]
pub struct Forwarding {
    _serving: JoinSet<()>,
}

impl Forwarding {
    /// Leads the connections in `namespace` to the guest behind `vsock`.
    ///
    /// # Errors
    ///
    /// Fails without `nft`, or if the kernel refuses.
    pub fn open(namespace: &Namespace, vsock: &Path) -> Result<Self, NamespaceError> {
        let listeners = namespace.inside(listen)?;
        let port = match listeners.first().map(TcpListener::local_addr) {
            Some(Ok(address)) => address.port(),
            Some(Err(error)) => return Err(namespace.failed_inside(error)),
            None => 0,
        };
        namespace.feed(&["nft", "-f", "-"], &rules(port))?;
        let limit = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let mut serving = JoinSet::new();
        for listener in listeners {
            let listener = tokio::net::TcpListener::from_std(listener);
            let listener = listener.map_err(|error| namespace.failed_inside(error))?;
            serving.spawn(serve(listener, vsock.to_owned(), Arc::clone(&limit)));
        }
        Ok(Self { _serving: serving })
    }
}

/// One for each protocol that there is, on the same port.
fn listen() -> io::Result<Vec<TcpListener>> {
    let four = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = four.local_addr()?.port();
    let mut listeners = vec![four];
    match TcpListener::bind((Ipv6Addr::LOCALHOST, port)) {
        Ok(six) => listeners.push(six),
        Err(error) => log::debug!("no connections to ::1 are handed on: {error}"),
    }
    for listener in &listeners {
        listener.set_nonblocking(true)?;
    }
    Ok(listeners)
}

/// A table of our own, made anew if there is one of before.
fn rules(port: u16) -> String {
    format!(
        "table inet nacre {{}}
delete table inet nacre
table inet nacre {{
  chain output {{
    type nat hook output priority -100; policy accept;
    ip daddr 127.0.0.0/8 tcp dport != {port} redirect to :{port}
    ip6 daddr ::1 tcp dport != {port} redirect to :{port}
  }}
}}
"
    )
}

async fn serve(listener: tokio::net::TcpListener, vsock: PathBuf, limit: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    let (vsock, limit) = (vsock.clone(), Arc::clone(&limit));
                    connections.spawn(async move {
                        let Ok(_permit) = limit.acquire().await else { return };
                        attend(client, vsock).await;
                    });
                }
                Err(error) => {
                    log::debug!("a connection can't be taken: {error}");
                    sleep(PAUSE).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn attend(mut client: TcpStream, vsock: PathBuf) {
    let handed = async {
        let port = destination(&client).map_err(ForwardError::Destination)?;
        let mut guest = match timeout(CONNECT, reach(&vsock, port)).await {
            Ok(guest) => guest?,
            Err(_elapsed) => return Err(ForwardError::Mute),
        };
        copy_bidirectional(&mut client, &mut guest).await?;
        Ok::<_, ForwardError>(())
    };
    if let Err(error) = handed.await {
        log::info!("a forwarded connection: {}", crate::error_chain(&error));
        // Whoever asked is told by a reset, as if nobody listened.
        set_socket_linger(&client, Some(Duration::ZERO)).ok();
    }
}

/// Where the client wanted to go, before the rule.
fn destination(client: &TcpStream) -> io::Result<u16> {
    let port = match client.local_addr()? {
        SocketAddr::V4(_) => ip_original_dst(client)?.port(),
        SocketAddr::V6(_) => ipv6_original_dst(client)?.port(),
    };
    Ok(port)
}

async fn reach(vsock: &Path, port: u16) -> Result<UnixStream, ForwardError> {
    let mut guest = hybrid_vsock::connect(vsock, FORWARD_PORT).await?;
    guest.write_all(&Forward { port }.encode()).await?;
    match guest.read_u8().await? {
        CONNECTED => Ok(guest),
        REFUSED => Err(ForwardError::Refused(port)),
        other => Err(ForwardError::Answer(other)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        thread,
    };

    use nacre_proto::forward::FRAME_BYTES;
    use tokio::{net::UnixListener, task::spawn_blocking};

    use super::{
        super::tests::{Place, is_root},
        *,
    };

    /// An agent with an echo on every even port.
    async fn agent(path: &Path) {
        let listener = UnixListener::bind(path).unwrap();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1026\n");
            stream.write_all(b"OK 1\n").await.unwrap();
            let mut frame = [0; FRAME_BYTES];
            stream.read_exact(&mut frame).await.unwrap();
            let Forward { port } = Forward::decode(&frame).unwrap();
            if port % 2 == 1 {
                stream.write_all(&[REFUSED]).await.unwrap();
                continue;
            }
            stream.write_all(&[CONNECTED]).await.unwrap();
            let (mut from, mut to) = stream.into_split();
            tokio::spawn(async move {
                to.write_all(format!("{port}:").as_bytes()).await.unwrap();
                tokio::io::copy(&mut from, &mut to).await.unwrap();
            });
        }
    }

    fn talk(namespace: &Namespace, address: &str) -> io::Result<String> {
        let talked = namespace.inside(|| {
            let mut stream = std::net::TcpStream::connect(address)?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"hello")?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        talked.map_err(|error| match error {
            NamespaceError::Enter(_, source) => source,
            other => panic!("{other:?}"),
        })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn connections_to_the_loopback_address_reach_the_guests_port() {
        if !is_root() {
            println!("SKIPPED: only root can make network namespaces");
            return;
        }
        let place = Place::new();
        let namespace = place.namespace();
        namespace.run(&["ip", "link", "set", "dev", "lo", "up"]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let vsock = folder.path().join("vsock");
        let for_agent = vsock.clone();
        tokio::spawn(async move { agent(&for_agent).await });
        let forwarding = Forwarding::open(&namespace, &vsock).unwrap();
        // Also in the place of one of before.
        drop(forwarding);
        let _forwarding = Forwarding::open(&namespace, &vsock).unwrap();
        let talked = spawn_blocking(move || {
            thread::scope(|scope| {
                let addresses = ["127.0.0.1:8080", "127.0.0.5:80", "[::1]:6378"];
                let clients = addresses.map(|to| scope.spawn(|| talk(&namespace, to)));
                let said = clients.map(|client| client.join().unwrap().unwrap());
                assert_eq!(said, ["8080:hello", "80:hello", "6378:hello"]);
                talk(&namespace, "127.0.0.1:81").unwrap_err().kind()
            })
        });
        let refused = talked.await.unwrap();
        assert!(
            matches!(refused, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
            "{refused:?}"
        );
    }
}
