//! The life of tasks: order of events, codes, waiting.

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, PauseRequest, ResumeRequest, ShutdownRequest, StatsRequest, Status,
        UpdateTaskRequest,
    },
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, well_known_types::any::Any},
    ttrpc::{Code, Request, asynchronous::Client},
};
use tokio::time::timeout;

use crate::containerd::{Bench, PATIENCE, code, limit, message};

#[tokio::test]
async fn a_container_is_told_of_in_order_and_its_added_processes_before_its_end() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    assert_eq!(bench.state("pod", "").await.unwrap().status(), Status::CREATED);
    bench.start("pod", "").await.unwrap();
    bench.exec("pod", "short", &["exit", "4"]).await.unwrap();
    bench.exec("pod", "long", &["sleep"]).await.unwrap();
    bench.start("pod", "long").await.unwrap();
    bench.start("pod", "short").await.unwrap();
    assert_eq!(bench.wait("pod", "short").await.unwrap().exit_status, 4);
    assert_eq!(bench.delete("pod", "short").await.unwrap().exit_status, 4);
    assert_eq!(bench.state("pod", "").await.unwrap().status(), Status::RUNNING);
    bench.kill("pod", "", libc::SIGTERM).await.unwrap();
    let ended = bench.wait("pod", "").await.unwrap();
    assert_eq!(ended.exit_status, 143);
    assert!(ended.exited_at.seconds > 0);
    let state = bench.state("pod", "").await.unwrap();
    assert_eq!((state.status(), state.exit_status), (Status::STOPPED, 143));
    assert_ne!(state.pid, 0);
    let deleted = bench.delete("pod", "").await.unwrap();
    assert_eq!(deleted.exit_status, 143);
    assert_eq!(
        bench.events(10).await,
        [
            "create pod",
            "start pod",
            "exec-added pod short",
            "exec-added pod long",
            "exec-started pod long",
            "exec-started pod short",
            "exit pod short 4",
            "exit pod long 137",
            "exit pod pod 143",
            "delete pod",
        ]
    );
    assert!(bench.guest().was_asked("stop"), "the last container takes the guest with it");
}

#[tokio::test]
async fn many_ends_at_once_keep_their_order() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    for number in 0..20 {
        let exec = format!("e{number}");
        bench.exec("pod", &exec, &["exit", "0"]).await.unwrap();
        bench.start("pod", &exec).await.unwrap();
    }
    bench.kill("pod", "", libc::SIGKILL).await.unwrap();
    let events = bench.events(2 + 3 * 20 + 1).await;
    let at = |what: &str| events.iter().position(|event| event == what).unwrap();
    for number in 0..20 {
        let added = at(&format!("exec-added pod e{number}"));
        let started = at(&format!("exec-started pod e{number}"));
        let ended = at(&format!("exit pod e{number} 0"));
        assert!(added < started && started < ended);
    }
    assert_eq!(at("exit pod pod 137"), events.len() - 1);
}

#[tokio::test]
async fn waiting_works_before_the_start() {
    let bench = Bench::new().await;
    bench.create("pod", &["exit", "7"]).await;
    let (ended, started) = tokio::join!(bench.wait("pod", ""), bench.start("pod", ""));
    started.unwrap();
    assert_eq!(ended.unwrap().exit_status, 7);
    assert_eq!(bench.wait("pod", "").await.unwrap().exit_status, 7);
}

#[tokio::test]
async fn what_can_not_be_is_refused_with_its_code() {
    let bench = Bench::new().await;
    assert_eq!(code(bench.state("pod", "").await), Code::NOT_FOUND);
    assert_eq!(code(bench.wait("pod", "").await), Code::NOT_FOUND);
    let stranger = bench.request("web", &["sleep"]);
    let refused = bench.task.create(limit(), &stranger).await;
    assert_eq!(code(refused), Code::FAILED_PRECONDITION);
    bench.create("pod", &["sleep"]).await;
    let again = bench.task.create(limit(), &bench.request("pod", &["sleep"])).await;
    assert_eq!(code(again), Code::ALREADY_EXISTS);
    bench.start("pod", "").await.unwrap();
    assert_eq!(code(bench.start("pod", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(bench.start("pod", "x").await), Code::NOT_FOUND);
    assert_eq!(code(bench.delete("pod", "").await), Code::FAILED_PRECONDITION);
    bench.exec("pod", "x", &["exit", "0"]).await.unwrap();
    assert_eq!(code(bench.exec("pod", "x", &["exit", "0"]).await), Code::ALREADY_EXISTS);
    assert_eq!(code(bench.exec("pod", "../x", &["a"]).await), Code::INVALID_ARGUMENT);
    assert_eq!(code(bench.kill("pod", "x", libc::SIGTERM).await), Code::FAILED_PRECONDITION);
    assert_eq!(code(bench.kill("pod", "", 99).await), Code::INVALID_ARGUMENT);
    let checkpoint = bench.task.checkpoint(limit(), &CheckpointTaskRequest::new()).await;
    assert_eq!(code(checkpoint), Code::UNIMPLEMENTED);
    bench.kill("pod", "", libc::SIGKILL).await.unwrap();
    bench.wait("pod", "").await.unwrap();
    assert_eq!(code(bench.kill("pod", "", libc::SIGKILL).await), Code::NOT_FOUND);
    assert_eq!(code(bench.start("pod", "x").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(bench.exec("pod", "y", &["a"]).await), Code::FAILED_PRECONDITION);
    bench.delete("pod", "").await.unwrap();
    assert_eq!(code(bench.delete("pod", "").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_program_that_is_not_there_fails_the_start_with_its_reason() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    bench.exec("pod", "x", &["missing"]).await.unwrap();
    assert!(message(bench.start("pod", "x").await).contains("no such file or directory"));
    bench.delete("pod", "x").await.unwrap();
    assert!(bench.guest().was_asked("delete pod x"), "it leaves nothing in the guest");
    let mut web = bench.request("web", &["missing"]);
    web.set_terminal(false);
    bench.task.create(limit(), &web).await.unwrap();
    assert!(message(bench.start("web", "").await).contains("no such file or directory"));
    bench.delete("web", "").await.unwrap();
    let events = bench.events(6).await;
    assert_eq!(events[3..], ["create web", "exit web web 255", "delete web"]);
}

#[tokio::test]
async fn a_container_is_paused_and_goes_on() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    let (mut pause, mut resume) = (PauseRequest::new(), ResumeRequest::new());
    pause.set_id("pod".to_owned());
    resume.set_id("pod".to_owned());
    let early = bench.task.pause(limit(), &pause).await;
    assert_eq!(code(early), Code::FAILED_PRECONDITION);
    bench.start("pod", "").await.unwrap();
    bench.task.pause(limit(), &pause).await.unwrap();
    assert_eq!(bench.state("pod", "").await.unwrap().status(), Status::PAUSED);
    assert_eq!(code(bench.exec("pod", "x", &["a"]).await), Code::FAILED_PRECONDITION);
    bench.task.resume(limit(), &resume).await.unwrap();
    assert_eq!(bench.state("pod", "").await.unwrap().status(), Status::RUNNING);
    assert_eq!(bench.events(4).await[2..], ["paused pod", "resumed pod"]);
}

#[tokio::test]
async fn limits_are_passed_on_and_what_is_none_is_refused() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    let mut update = UpdateTaskRequest::new();
    update.set_id("pod".to_owned());
    let resources = r#"{"memory":{"limit":1048576}}"#;
    update.set_resources(Any { value: resources.as_bytes().to_vec(), ..Any::new() });
    bench.task.update(limit(), &update).await.unwrap();
    assert!(bench.guest().was_asked(&format!("update {resources} pod")));
    update.set_resources(Any { value: b"{".to_vec(), ..Any::new() });
    assert_eq!(code(bench.task.update(limit(), &update).await), Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn figures_outlive_the_container_and_out_of_memory_is_told_once() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    bench.create("web", &["oom"]).await;
    bench.guest().strike("web");
    bench.guest().strike("nobody");
    assert_eq!(bench.events(4).await[3], "oom web");
    bench.start("web", "").await.unwrap();
    assert_eq!(bench.wait("web", "").await.unwrap().exit_status, 137);
    let mut request = StatsRequest::new();
    request.set_id("web".to_owned());
    let stats = bench.task.stats(limit(), &request).await.unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert_eq!((metrics.cpu.usage_usec, metrics.memory_events.oom_kill), (42, 1));
    bench.create("db", &["oom"]).await;
    bench.start("db", "").await.unwrap();
    let events = bench.events(10).await;
    assert_eq!(
        events[4..],
        ["start web", "exit web web 137", "create db", "start db", "oom db", "exit db db 137"]
    );
}

#[tokio::test]
async fn the_shim_ends_only_when_nothing_is_left() {
    let bench = Bench::new().await;
    bench.create("pod", &["exit", "0"]).await;
    bench.task.shutdown(limit(), &ShutdownRequest::new()).await.unwrap();
    bench.delete("pod", "").await.unwrap();
    let unwanted = timeout(std::time::Duration::from_millis(50), bench.service.wanted()).await;
    assert!(unwanted.is_err(), "the first request came too early");
    bench.task.shutdown(limit(), &ShutdownRequest::new()).await.unwrap();
    timeout(PATIENCE, bench.service.wanted()).await.unwrap();
}

#[tokio::test]
async fn a_shim_without_a_container_ends_too() {
    let bench = Bench::new().await;
    let mut request = bench.request("pod", &["sleep"]);
    bench.bundle("pod", &["sleep"], &serde_json::json!({"test.no-guest": "1"}));
    request.set_id("pod".to_owned());
    let failed = bench.task.create(limit(), &request).await;
    assert_eq!(code(failed), Code::UNAVAILABLE);
    assert_eq!(code(bench.state("pod", "").await), Code::NOT_FOUND);
    bench.task.shutdown(limit(), &ShutdownRequest::new()).await.unwrap();
    timeout(PATIENCE, bench.service.wanted()).await.unwrap();
}

#[tokio::test]
async fn the_pods_containers_end_with_its_sandbox() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    bench.create("web", &["sleep"]).await;
    bench.start("web", "").await.unwrap();
    bench.kill("pod", "", libc::SIGKILL).await.unwrap();
    assert_eq!(bench.wait("web", "").await.unwrap().exit_status, 137);
    bench.delete("pod", "").await.unwrap();
    assert!(!bench.guest().was_asked("stop"), "there is a container left");
    bench.delete("web", "").await.unwrap();
    assert!(bench.guest().was_asked("stop"));
}

#[tokio::test]
async fn a_container_is_restarted_in_the_same_guest() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    let guest = bench.guest();
    for number in 1..=3 {
        bench.create("web", &["exit", &number.to_string()]).await;
        bench.start("web", "").await.unwrap();
        assert_eq!(bench.wait("web", "").await.unwrap().exit_status, number);
        assert_eq!(bench.delete("web", "").await.unwrap().exit_status, number);
    }
    assert!(std::sync::Arc::ptr_eq(&guest, &bench.guest()));
}

#[tokio::test]
async fn both_versions_of_the_task_service_are_served() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    let client: Client = bench.client().await;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let mut state = containerd_shim_protos::api::StateRequest::new();
        state.set_id("pod".to_owned());
        let mut request = Request::new();
        request.service = service.to_owned();
        request.method = "State".to_owned();
        request.payload = state.write_to_bytes().unwrap();
        let answer = client.request(request).await.unwrap();
        let state = containerd_shim_protos::api::StateResponse::parse_from_bytes(&answer.payload);
        assert_eq!(state.unwrap().status(), Status::CREATED, "{service}");
    }
}
