//! containerd's side: a client of the task and sandbox services over a socket, the server of events,
//! fifos and bundles.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest,
        ForwardRequest, KillRequest, StartRequest, StateRequest, StateResponse, WaitRequest,
        WaitResponse,
    },
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM},
    protobuf::{Message, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::{Events, TaskClient, create_events},
    ttrpc::{
        self, Code,
        asynchronous::{
            Client, Server, TtrpcContext,
            transport::{Listener, Socket},
        },
        context::{self, Context},
    },
};
use serde_json::json;
use shim::service::{Service, Setting, guest::Host};
use tokio::{net::UnixStream, sync::watch, time::timeout};

use crate::guest::{ScriptedGuest, ScriptedHost};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone)]
struct Listening {
    heard: Arc<Mutex<Vec<Envelope>>>,
    count: watch::Sender<usize>,
}

#[async_trait]
impl Events for Listening {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut heard = self.heard.lock().unwrap();
        heard.push(request.envelope.clone().unwrap());
        self.count.send_replace(heard.len());
        Ok(Empty::new())
    }
}

/// containerd, its shim, and the shim's guest.
pub(crate) struct Bench {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) host: Arc<ScriptedHost>,
    pub(crate) service: Service,
    pub(crate) task: TaskClient,
    listening: Listening,
    events: Option<Server>,
    _server: Server,
}

impl Bench {
    /// A shim of the sandbox `pod`.
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listening = Listening { heard: Arc::default(), count: watch::Sender::new(0) };
        let host = Arc::new(ScriptedHost::default());
        let service = Service::new(Setting {
            id: "pod".to_owned(),
            namespace: "tests".to_owned(),
            events: folder.path().join("events").display().to_string(),
            host: Arc::clone(&host) as Arc<dyn Host>,
        });
        let listener = tokio::net::UnixListener::bind(folder.path().join("shim")).unwrap();
        let mut server = Server::new()
            .add_listener(Listener::from(listener))
            .register_service(service.methods());
        server.start().await.unwrap();
        let task = TaskClient::new(connect(folder.path()).await);
        let mut bench =
            Self { folder, host, service, task, listening, events: None, _server: server };
        bench.listen().await;
        bench
    }

    /// Takes events from now on.
    pub(crate) async fn listen(&mut self) {
        let path = self.folder.path().join("events");
        drop(fs::remove_file(&path));
        let listener = tokio::net::UnixListener::bind(path).unwrap();
        let mut server = Server::new()
            .add_listener(Listener::from(listener))
            .register_service(create_events(Arc::new(self.listening.clone())));
        server.start().await.unwrap();
        self.events = Some(server);
    }

    /// As when containerd ends: no events are taken, and its connection breaks.
    pub(crate) async fn stop_listening(&mut self) {
        let mut server = self.events.take().unwrap();
        server.shutdown().await.unwrap();
        fs::remove_file(self.folder.path().join("events")).unwrap();
    }

    /// Another connection to the shim.
    pub(crate) async fn reconnect(&mut self) {
        self.task = TaskClient::new(connect(self.folder.path()).await);
    }

    pub(crate) async fn client(&self) -> Client {
        connect(self.folder.path()).await
    }

    pub(crate) fn guest(&self) -> Arc<ScriptedGuest> {
        Arc::clone(self.host.guest.lock().unwrap().as_ref().unwrap())
    }

    /// A bundle whose init runs `words`.
    pub(crate) fn bundle(
        &self,
        id: &str,
        words: &[&str],
        annotations: &serde_json::Value,
    ) -> PathBuf {
        let bundle = self.folder.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": process(words),
            "annotations": annotations,
            "linux": {},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    pub(crate) fn request(&self, id: &str, words: &[&str]) -> CreateTaskRequest {
        let annotations = if id == "pod" {
            json!({"io.kubernetes.cri.container-type": "sandbox"})
        } else {
            json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "pod",
            })
        };
        let mut request = CreateTaskRequest::new();
        request.set_id(id.to_owned());
        request.set_bundle(self.bundle(id, words, &annotations).display().to_string());
        request
    }

    /// Creates a container without streams.
    pub(crate) async fn create(&self, id: &str, words: &[&str]) {
        let request = self.request(id, words);
        assert_ne!(self.task.create(limit(), &request).await.unwrap().pid, 0);
    }

    pub(crate) async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let mut request = StartRequest::new();
        request.set_id(id.to_owned());
        request.set_exec_id(exec.to_owned());
        self.task.start(limit(), &request).await.map(|answer| answer.pid)
    }

    pub(crate) async fn exec(&self, id: &str, exec: &str, words: &[&str]) -> ttrpc::Result<Empty> {
        self.task.exec(limit(), &exec_request(id, exec, words)).await
    }

    pub(crate) async fn kill(&self, id: &str, exec: &str, signal: i32) -> ttrpc::Result<Empty> {
        let mut request = KillRequest::new();
        request.set_id(id.to_owned());
        request.set_exec_id(exec.to_owned());
        request.set_signal(signal.unsigned_abs());
        self.task.kill(limit(), &request).await
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        let mut request = WaitRequest::new();
        request.set_id(id.to_owned());
        request.set_exec_id(exec.to_owned());
        self.task.wait(limit(), &request).await
    }

    pub(crate) async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let mut request = DeleteRequest::new();
        request.set_id(id.to_owned());
        request.set_exec_id(exec.to_owned());
        self.task.delete(limit(), &request).await
    }

    pub(crate) async fn state(&self, id: &str, exec: &str) -> ttrpc::Result<StateResponse> {
        let mut request = StateRequest::new();
        request.set_id(id.to_owned());
        request.set_exec_id(exec.to_owned());
        self.task.state(limit(), &request).await
    }

    /// Waits until `count` events were heard, and tells them in words.
    pub(crate) async fn events(&self, count: usize) -> Vec<String> {
        let mut heard = self.listening.count.subscribe();
        let enough = timeout(PATIENCE, heard.wait_for(|heard| *heard >= count)).await;
        let told: Vec<String> = self.listening.heard.lock().unwrap().iter().map(tell).collect();
        assert!(enough.is_ok(), "only {told:?}");
        told
    }
}

async fn connect(folder: &Path) -> Client {
    let connection = UnixStream::connect(folder.join("shim")).await.unwrap();
    Client::new(Socket::from(connection))
}

pub(crate) fn limit() -> Context {
    context::with_timeout(i64::try_from(PATIENCE.as_nanos()).unwrap())
}

pub(crate) fn process(words: &[&str]) -> serde_json::Value {
    json!({"cwd": "/", "args": words, "user": {"uid": 0, "gid": 0}})
}

pub(crate) fn exec_request(id: &str, exec: &str, words: &[&str]) -> ExecProcessRequest {
    let mut request = ExecProcessRequest::new();
    request.set_id(id.to_owned());
    request.set_exec_id(exec.to_owned());
    let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
    let value = process(words).to_string().into_bytes();
    request.set_spec(Any { type_url, value, ..Any::new() });
    request
}

/// The gRPC code of a refusal.
pub(crate) fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

pub(crate) fn message<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> String {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => panic!("{other}"),
    }
}

fn tell(envelope: &Envelope) -> String {
    assert_eq!(envelope.namespace, "tests");
    let value = &envelope.event.value;
    let topic = envelope.topic.trim_start_matches("/tasks/");
    match topic {
        "exit" => {
            let exit = TaskExit::parse_from_bytes(value).unwrap();
            assert_ne!(exit.pid, 0);
            format!("exit {} {} {}", exit.container_id, exit.id, exit.exit_status)
        }
        "exec-added" => {
            let added = TaskExecAdded::parse_from_bytes(value).unwrap();
            format!("exec-added {} {}", added.container_id, added.exec_id)
        }
        "exec-started" => {
            let started = TaskExecStarted::parse_from_bytes(value).unwrap();
            assert_ne!(started.pid, 0);
            format!("exec-started {} {}", started.container_id, started.exec_id)
        }
        // The container is the first field of all others.
        other => {
            let id = TaskOOM::parse_from_bytes(value);
            format!("{other} {}", id.unwrap().container_id)
        }
    }
}
