//! The sandbox service: a pod without a container that stands for it.

use containerd_shim_protos::{
    api::ShutdownRequest,
    cgroups_v2::metrics::Metrics,
    protobuf::{CodedOutputStream, Message, well_known_types::any::Any},
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest,
        SandboxStatusRequest, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
        WaitSandboxRequest,
    },
    sandbox_async::SandboxClient,
    ttrpc::Code,
};
use tokio::time::timeout;

use crate::containerd::{Bench, PATIENCE, code, limit};

/// A `PodSandboxConfig` with a host name.
fn config(hostname: &str) -> Any {
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    output.write_string(2, hostname).unwrap();
    output.flush().unwrap();
    drop(output);
    Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value, ..Any::new() }
}

async fn create(client: &SandboxClient, bench: &Bench) {
    let mut request = CreateSandboxRequest::new();
    request.set_sandbox_id("pod".to_owned());
    request.set_bundle_path(bench.folder.path().display().to_string());
    request.set_options(config("web-0"));
    request.set_netns_path("/run/netns/web".to_owned());
    client.create_sandbox(limit(), &request).await.unwrap();
    let again = client.create_sandbox(limit(), &request).await;
    assert_eq!(code(again), Code::ALREADY_EXISTS);
}

fn id() -> String {
    "pod".to_owned()
}

#[tokio::test]
async fn a_sandbox_lives_without_a_container_and_ends_when_it_is_told_to() {
    let bench = Bench::new().await;
    let client = SandboxClient::new(bench.client().await);
    let start = StartSandboxRequest { sandbox_id: id(), ..StartSandboxRequest::new() };
    let early = client.start_sandbox(limit(), &start).await;
    assert_eq!(code(early), Code::FAILED_PRECONDITION);
    create(&client, &bench).await;
    let started = client.start_sandbox(limit(), &start).await.unwrap();
    assert!(started.pid != 0 && started.created_at.seconds > 0);
    {
        let settings = bench.host.settings.lock().unwrap();
        let settings = settings.as_ref().unwrap();
        assert_eq!(settings.hostname, "web-0");
        assert_eq!(settings.netns.as_deref(), Some("/run/netns/web".as_ref()));
    }
    let platform = PlatformRequest { sandbox_id: id(), ..PlatformRequest::new() };
    let platform = client.platform(limit(), &platform).await.unwrap().platform.unwrap();
    assert_eq!((platform.os.as_str(), platform.architecture.is_empty()), ("linux", false));
    let ping = PingRequest { sandbox_id: id(), ..PingRequest::new() };
    client.ping_sandbox(limit(), &ping).await.unwrap();
    let stranger = PingRequest { sandbox_id: "other".to_owned(), ..PingRequest::new() };
    assert_eq!(code(client.ping_sandbox(limit(), &stranger).await), Code::NOT_FOUND);

    bench.create("web", &["sleep"]).await;
    bench.start("web", "").await.unwrap();
    bench.create("short", &["exit", "0"]).await;
    bench.start("short", "").await.unwrap();
    bench.wait("short", "").await.unwrap();
    bench.delete("short", "").await.unwrap();
    bench.task.shutdown(limit(), &ShutdownRequest::new()).await.unwrap();
    let metrics = SandboxMetricsRequest { sandbox_id: id(), ..SandboxMetricsRequest::new() };
    let metric = client.sandbox_metrics(limit(), &metrics).await.unwrap().metrics.unwrap();
    let metrics = Metrics::parse_from_bytes(&metric.data.value).unwrap();
    assert_eq!((metric.id.as_str(), metrics.cpu.usage_usec), ("pod", 42));

    let status =
        SandboxStatusRequest { sandbox_id: id(), verbose: true, ..SandboxStatusRequest::new() };
    let is = client.sandbox_status(limit(), &status).await.unwrap();
    assert_eq!((is.state.as_str(), is.info["containers"].as_str()), ("SANDBOX_READY", "1"));
    let stop =
        StopSandboxRequest { sandbox_id: id(), timeout_secs: 10, ..StopSandboxRequest::new() };
    let wait = WaitSandboxRequest { sandbox_id: id(), ..WaitSandboxRequest::new() };
    let (ended, stopped) =
        tokio::join!(client.wait_sandbox(limit(), &wait), client.stop_sandbox(limit(), &stop));
    stopped.unwrap();
    assert_eq!(ended.unwrap().exit_status, 0);
    assert_eq!(bench.wait("web", "").await.unwrap().exit_status, 137);
    let is = client.sandbox_status(limit(), &status).await.unwrap();
    assert_eq!(is.state, "SANDBOX_NOTREADY");
    assert!(bench.guest().was_asked("stop"));
    client.stop_sandbox(limit(), &stop).await.unwrap();
    bench.delete("web", "").await.unwrap();
    let end = ShutdownSandboxRequest { sandbox_id: id(), ..ShutdownSandboxRequest::new() };
    client.shutdown_sandbox(limit(), &end).await.unwrap();
    timeout(PATIENCE, bench.service.wanted()).await.unwrap();
}

#[tokio::test]
async fn the_loss_of_a_sandbox_is_told_to_who_waits_for_it() {
    let bench = Bench::new().await;
    let client = SandboxClient::new(bench.client().await);
    create(&client, &bench).await;
    let start = StartSandboxRequest { sandbox_id: id(), ..StartSandboxRequest::new() };
    client.start_sandbox(limit(), &start).await.unwrap();
    let wait = WaitSandboxRequest { sandbox_id: id(), ..WaitSandboxRequest::new() };
    bench.guest().die("the VMM died");
    assert_eq!(client.wait_sandbox(limit(), &wait).await.unwrap().exit_status, 137);
    let status =
        SandboxStatusRequest { sandbox_id: id(), verbose: true, ..SandboxStatusRequest::new() };
    let is = client.sandbox_status(limit(), &status).await.unwrap();
    assert_eq!(
        (is.state.as_str(), is.info["sandbox"].as_str()),
        ("SANDBOX_NOTREADY", "the VMM died")
    );
}
