//! The serving process: one for each sandbox, and the supervisor of all its processes.
//!
//! It waits for its own children only, each by its pidfd; it is no subreaper and never waits for just
//! any child. Everything runs on the main thread, as the kernel ends the children of a thread that ends.

use std::{
    fs, io,
    os::{fd::AsFd, unix::net::UnixListener},
    time::Duration,
};

use containerd_shim_protos::ttrpc::asynchronous::{Server, transport::Listener};
use tokio::signal::unix::{SignalKind, signal};

use super::{CommandError, Flags, Parts, address, journal};
use crate::service::{Service, Setting};

/// How long the answer to the last request may take to be sent.
const ANSWERED: Duration = Duration::from_millis(50);
/// How long connections may take to be closed.
const CLOSED: Duration = Duration::from_secs(1);

pub(super) fn serve(flags: &Flags, parts: &Parts) -> Result<(), CommandError> {
    journal::init(&flags.id, flags.debug);
    let listener = listener().map_err(CommandError::Serve)?;
    if let Err(error) = rustix::process::setsid() {
        log::debug!("no session of its own: {error}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(CommandError::Serve)?;
    let served = runtime.block_on(until_unwanted(flags, parts, listener));
    runtime.shutdown_timeout(CLOSED);
    if let Err(error) = fs::remove_file(address::path(&flags.socket)) {
        log::debug!("the socket is gone already: {error}");
    }
    served
}

/// What the starting process handed in as standard input.
fn listener() -> io::Result<UnixListener> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    listener.local_addr()?;
    listener.set_nonblocking(true)?;
    rustix::stdio::dup2_stdin(fs::File::open("/dev/null")?)?;
    Ok(listener)
}

async fn until_unwanted(
    flags: &Flags,
    parts: &Parts,
    listener: UnixListener,
) -> Result<(), CommandError> {
    let service = Service::new(Setting {
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        events: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
        host: (parts.host)(flags),
    });
    let listener = tokio::net::UnixListener::from_std(listener).map_err(CommandError::Serve)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CommandError::Serve)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CommandError::Serve)?;
    let mut server =
        Server::new().add_listener(Listener::from(listener)).register_service(service.methods());
    server.start().await.map_err(|error| CommandError::Protocol(error.to_string()))?;
    log::info!("serves sandbox `{}`", flags.id);
    tokio::select! {
        () = service.wanted() => log::info!("is not needed any more"),
        _ = terminate.recv() => log::info!("is terminated"),
        _ = interrupt.recv() => log::info!("is interrupted"),
    }
    server.stop_listen().await;
    service.close().await;
    tokio::time::sleep(ANSWERED).await;
    if tokio::time::timeout(CLOSED, server.shutdown()).await.is_err() {
        log::debug!("a connection stays open");
    }
    Ok(())
}
