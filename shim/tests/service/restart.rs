//! containerd that ends and begins anew, and guests that are lost.

use containerd_shim_protos::{
    api::{ConnectRequest, PidsRequest, StatsRequest, Status},
    ttrpc::Code,
};

use crate::containerd::{Bench, PATIENCE, code, limit};

#[tokio::test]
async fn a_containerd_that_begins_anew_finds_everything() {
    let mut bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    assert_eq!(bench.events(2).await.len(), 2);
    bench.stop_listening().await;
    bench.exec("pod", "x", &["exit", "5"]).await.unwrap();
    bench.start("pod", "x").await.unwrap();
    bench.wait("pod", "x").await.unwrap();
    bench.reconnect().await;
    let mut connect = ConnectRequest::new();
    connect.set_id("pod".to_owned());
    let connected = bench.task.connect(limit(), &connect).await.unwrap();
    assert_eq!(connected.shim_pid, std::process::id());
    assert_ne!(connected.task_pid, 0);
    let mut pids = PidsRequest::new();
    pids.set_id("pod".to_owned());
    let pids = bench.task.pids(limit(), &pids).await.unwrap().processes;
    assert!(!pids.is_empty() && pids.iter().all(|one| one.pid != 0));
    assert_eq!(bench.state("pod", "").await.unwrap().status(), Status::RUNNING);
    assert_eq!(bench.state("pod", "x").await.unwrap().exit_status, 5);
    bench.listen().await;
    let events = bench.events(5).await;
    assert_eq!(events[2..], ["exec-added pod x", "exec-started pod x", "exit pod x 5"]);
}

#[tokio::test]
async fn a_request_whose_client_goes_away_is_carried_through() {
    let mut bench = Bench::new().await;
    let request = bench.request("pod", &["sleep"]);
    let client = bench.task.clone();
    let asked = tokio::spawn(async move { client.create(limit(), &request).await });
    // Until the shim is at it.
    while bench.host.guest.lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    asked.abort();
    bench.reconnect().await;
    assert_eq!(bench.events(1).await, ["create pod"]);
    bench.start("pod", "").await.unwrap();
}

#[tokio::test]
async fn a_guest_that_is_lost_ends_all_and_everything_answers_at_once() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    bench.create("web", &["sleep"]).await;
    bench.exec("pod", "x", &["sleep"]).await.unwrap();
    bench.start("pod", "x").await.unwrap();
    bench.exec("pod", "unstarted", &["sleep"]).await.unwrap();
    let mut stats = StatsRequest::new();
    stats.set_id("pod".to_owned());
    bench.task.stats(limit(), &stats).await.unwrap();
    bench.guest().die("the VMM died");
    assert_eq!(bench.wait("pod", "").await.unwrap().exit_status, 137);
    assert_eq!(bench.wait("web", "").await.unwrap().exit_status, 137);
    assert_eq!(bench.wait("pod", "unstarted").await.unwrap().exit_status, 137);
    assert_eq!(bench.state("pod", "").await.unwrap().status(), Status::STOPPED);
    assert_eq!(bench.state("web", "").await.unwrap().status(), Status::STOPPED);
    bench.task.stats(limit(), &stats).await.unwrap();
    assert_eq!(code(bench.kill("pod", "", libc::SIGKILL).await), Code::NOT_FOUND);
    let more = bench.task.create(limit(), &bench.request("db", &["sleep"])).await;
    assert_eq!(code(more), Code::UNAVAILABLE);
    let events = bench.events(9).await;
    let ends = ["exit pod x 137", "exit pod pod 137", "exit web web 137"];
    assert_eq!(events[6..], ends);
    bench.delete("web", "").await.unwrap();
    bench.delete("pod", "").await.unwrap();
    assert!(bench.guest().was_asked("stop"), "what is left of it is taken down");
}

#[tokio::test]
async fn a_shim_that_is_told_to_end_ends_its_containers_and_tells_so() {
    let bench = Bench::new().await;
    bench.create("pod", &["sleep"]).await;
    bench.start("pod", "").await.unwrap();
    tokio::time::timeout(PATIENCE, bench.service.close()).await.unwrap();
    assert_eq!(bench.events(3).await, ["create pod", "start pod", "exit pod pod 137"]);
    assert!(bench.guest().was_asked("stop"));
}
