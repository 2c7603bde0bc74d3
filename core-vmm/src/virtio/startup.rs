//! All devices of a VM at once: their backends are talked to side by side, so that the slowest one
//! alone decides how long it takes.

use std::os::unix::net::UnixStream;
use std::thread;

use super::frontend::{DeviceConfig, FrontendError, Negotiated, connect};
use super::watchdog::Watchdog;

/// Which device has no backend.
#[derive(Debug, thiserror::Error)]
#[error("device {id} has no backend")]
pub struct ConnectError {
    /// The device's name.
    pub id: String,
    /// Why.
    pub source: FrontendError,
}

/// Negotiates with every backend, each on a thread of its own that ends before this returns. The
/// result is in the order of `devices`.
///
/// # Errors
///
/// Fails with the first device, in that order, that has no backend.
pub fn connect_all(
    devices: Vec<(DeviceConfig, UnixStream)>,
    watchdog: &Watchdog,
) -> Result<Vec<Negotiated>, ConnectError> {
    thread::scope(|scope| {
        let start = |(config, socket): (DeviceConfig, UnixStream)| {
            let id = config.id.clone();
            let body = move || connect(config, socket, watchdog);
            let thread =
                thread::Builder::new().name(format!("connect {id}")).spawn_scoped(scope, body);
            (id, thread)
        };
        // All are started before the first is waited for.
        let started: Vec<_> = devices.into_iter().map(start).collect();
        let outcomes: Vec<_> = started
            .into_iter()
            .map(|(id, thread)| {
                let outcome = thread
                    .map_err(|source| FrontendError::Host { what: "start a thread", source })
                    .and_then(|thread| thread.join().unwrap_or(Err(FrontendError::Panicked)));
                outcome.map_err(|source| ConnectError { id, source })
            })
            .collect();
        outcomes.into_iter().collect()
    })
}
