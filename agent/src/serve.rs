//! The three listeners, and the life of the service between them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nacre_proto::{AGENT_PORT, FORWARD_PORT, STREAM_PORT, agent_ttrpc::create_agent};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    container::Containers, forward::Forwards, monotonic::Monotonic, process::reap::Reaper,
    sandbox::Sandbox, service::Service, streams,
};

/// How long the answer to Shutdown may take to leave before the machine goes off.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// Why the agent could not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// A port or socket is not to be had.
    #[error("can't listen on {at}")]
    Listen {
        /// Which.
        at: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Children can't be reaped.
    #[error("can't listen to the end of children")]
    Reap(#[source] io::Error),
    /// ttrpc failed.
    #[error("can't serve ttrpc")]
    Ttrpc(#[source] ttrpc::Error),
}

/// Where the host connects.
#[derive(Clone, Debug)]
pub(crate) enum Endpoint {
    /// From outside the guest.
    Vsock,
    /// Sockets named like the ports, in this folder.
    Unix(PathBuf),
}

/// Serves until a host has asked for Shutdown and was answered.
pub(crate) async fn run(endpoint: &Endpoint, began: Monotonic) -> Result<(), ServeError> {
    let reaper = Arc::new(Reaper::default());
    reaper.start().map_err(ServeError::Reap)?;
    let containers = Arc::new(Containers::new(reaper));
    let done = Arc::new(Notify::new());
    let service =
        Service::new(Arc::clone(&containers), Sandbox::default(), Arc::clone(&done), began);

    let bind = |port| match endpoint {
        Endpoint::Vsock => vsock(port).map(Connections::Vsock),
        Endpoint::Unix(folder) => unix(folder, port).map(Connections::Unix),
    };
    let (streams, forwards) = (bind(STREAM_PORT)?, bind(FORWARD_PORT)?);
    // Last: whoever finds this socket may connect to all.
    let calls = match bind(AGENT_PORT)? {
        Connections::Vsock(listener) => Listener::from(listener),
        Connections::Unix(listener) => Listener::from(listener),
    };
    let mut server =
        Server::new().add_listener(calls).register_service(create_agent(Arc::new(service)));
    server.start().await.map_err(ServeError::Ttrpc)?;
    log::info!("serving on {endpoint:?}");
    tokio::select! {
        () = accept_all(streams, Purpose::Stream(containers)) => {}
        () = accept_all(forwards, Purpose::Forward(Arc::new(Forwards::new()))) => {}
        () = done.notified() => {}
    }
    farewell(&mut server).await;
    Ok(())
}

/// Lets the answer to Shutdown leave; a host that is satisfied closes its connection.
async fn farewell(server: &mut Server) {
    // The answer is queued by the handler's return, which comes right after the notification, and
    // is written by the connection's own task: both run before this timer fires.
    sleep(Duration::from_millis(20)).await;
    if timeout(FAREWELL_LIMIT, server.shutdown()).await.is_err() {
        log::warn!("a connection is still open");
    }
}

enum Connections {
    Vsock(VsockListener),
    Unix(UnixListener),
}

/// What becomes of the connections of a port.
enum Purpose {
    /// A standard stream of a process.
    Stream(Arc<Containers>),
    /// A connection to a TCP port.
    Forward(Arc<Forwards>),
}

impl Purpose {
    fn spawn<C>(&self, connection: C)
    where
        C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self {
            Self::Stream(containers) => {
                tokio::spawn(streams::serve(Arc::clone(containers), connection))
            }
            Self::Forward(forwards) => tokio::spawn(Arc::clone(forwards).serve(connection)),
        };
    }
}

async fn accept_all(mut connections: Connections, purpose: Purpose) {
    loop {
        let accepted = match &mut connections {
            Connections::Vsock(listener) => {
                listener.accept().await.map(|(stream, _peer)| purpose.spawn(stream))
            }
            Connections::Unix(listener) => {
                listener.accept().await.map(|(stream, _peer)| purpose.spawn(stream))
            }
        };
        if let Err(error) = accepted {
            // Descriptors have run out, or the connection was gone again.
            log::warn!("can't accept a connection: {error}");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn vsock(port: u32) -> Result<VsockListener, ServeError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .map_err(|source| ServeError::Listen { at: format!("vsock port {port}"), source })
}

fn unix(folder: &Path, port: u32) -> Result<UnixListener, ServeError> {
    let path = folder.join(port.to_string());
    let failed = |source| ServeError::Listen { at: path.display().to_string(), source };
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(&path).map_err(failed)
}
