//! Signals to this program, as requests to a supervisor.

use std::io;

use shim::sandbox::Request;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};

use crate::terminal;

/// How many requests may wait.
const DEPTH: usize = 16;

/// Requests, as long as this lives.
pub(crate) struct Requests {
    pub(crate) receiver: mpsc::Receiver<Request>,
    // Ended with this value.
    pub(crate) listeners: JoinSet<()>,
}

/// Starts to listen. From now on none of these signals ends the program by itself.
pub(crate) fn listen(with_terminal: bool) -> io::Result<Requests> {
    let (sender, receiver) = mpsc::channel(DEPTH);
    let mut listeners = JoinSet::new();
    let passed_on = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
    ];
    for kind in passed_on {
        let number = kind.as_raw_value();
        listeners.spawn(each(signal(kind)?, sender.clone(), move || Some(Request::Signal(number))));
    }
    if with_terminal {
        let size = || terminal::size().map(|(columns, rows)| Request::Resize { columns, rows });
        listeners.spawn(each(signal(SignalKind::window_change())?, sender, size));
    }
    Ok(Requests { receiver, listeners })
}

async fn each(
    mut signals: Signal,
    sender: mpsc::Sender<Request>,
    request: impl Fn() -> Option<Request> + Send,
) {
    while signals.recv().await.is_some() {
        if let Some(request) = request()
            && sender.send(request).await.is_err()
        {
            return;
        }
    }
}
