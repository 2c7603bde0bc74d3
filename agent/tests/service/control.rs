//! A container that is stopped where it is, limited, counted, and whose lack of memory is told.

use std::time::Duration;

use nacre_proto::{
    agent::{ContainerRequest, NextEventRequest, StatsResponse, UpdateRequest},
    stream::Stream,
};
use serde_json::{Value, json};
use tokio::{io::AsyncReadExt, time::timeout};
use ttrpc::Code;

use crate::{
    agent::{Agent, LIMIT, Status, context, request, status, with_agent},
    limits::{has, limited},
};

fn named(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..ContainerRequest::new() }
}

impl Agent {
    async fn pause(&self, id: &str) -> Result<(), Status> {
        self.client.pause(context(), &named(id)).await.map(drop).map_err(status)
    }

    async fn resume(&self, id: &str) -> Result<(), Status> {
        self.client.resume(context(), &named(id)).await.map(drop).map_err(status)
    }

    async fn stats(&self, id: &str) -> Result<StatsResponse, Status> {
        self.client.stats(context(), &named(id)).await.map_err(status)
    }

    async fn update(&self, id: &str, resources: &Value) -> Result<(), Status> {
        let request = UpdateRequest {
            container_id: id.to_owned(),
            oci_resources: resources.to_string().into_bytes(),
            ..UpdateRequest::new()
        };
        self.client.update(context(), &request).await.map(drop).map_err(status)
    }

    async fn next_event(&self, after: u64) -> (u64, String) {
        let request = NextEventRequest { after, ..NextEventRequest::new() };
        let event = self.client.next_event(context(), &request).await.unwrap();
        (event.number, event.out_of_memory().container_id.clone())
    }

    fn group_file(&self, id: &str, file: &str) -> String {
        let text = self.inside(&["cat", &format!("/sys/fs/cgroup/nacre/{id}/{file}")]);
        text.trim().to_owned()
    }
}

#[test]
fn a_paused_container_does_nothing_until_it_is_resumed() {
    with_agent(|agent| async move {
        agent.create("c", &["sh", "-c", "while echo tick; do sleep 0.01; done"]).await;
        assert_eq!(agent.pause("c").await.unwrap_err().0, Code::FAILED_PRECONDITION);
        agent.start("c", "").await.unwrap();
        let mut output = agent.stream("c", "", Stream::Stdout, 0).await;
        let mut tick = [0; 5];
        timeout(LIMIT, output.read_exact(&mut tick)).await.unwrap().unwrap();

        agent.pause("c").await.unwrap();
        assert!(agent.group_file("c", "cgroup.events").contains("frozen 1"));
        assert_eq!(agent.pause("c").await.unwrap_err().0, Code::FAILED_PRECONDITION);
        // What was on its way comes, and then nothing.
        let mut late = [0; 4096];
        while timeout(Duration::from_millis(300), output.read(&mut late)).await.is_ok() {}
        // A process that was added could not run.
        agent.exec("c", "x", &json!({ "args": ["true"] }), false).await.unwrap();
        assert_eq!(agent.start("c", "x").await.unwrap_err().0, Code::FAILED_PRECONDITION);

        agent.resume("c").await.unwrap();
        assert_eq!(agent.resume("c").await.unwrap_err().0, Code::FAILED_PRECONDITION);
        timeout(LIMIT, output.read_exact(&mut tick)).await.unwrap().unwrap();
        agent.start("c", "x").await.unwrap();
        assert_eq!(agent.wait("c", "x").await.exit_code, 0);

        // A stopped one can be killed.
        agent.pause("c").await.unwrap();
        agent.signal("c", "", 9, true).await.unwrap();
        assert_eq!(agent.wait("c", "").await.exit_code, 137);
        agent.delete("c", "").await.unwrap();
        agent.assert_no_trace("c");
    });
}

#[test]
fn what_a_container_used_is_told_until_it_is_deleted() {
    with_agent(|agent| async move {
        assert_eq!(agent.stats("c").await.unwrap_err().0, Code::NOT_FOUND);
        let script = "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done";
        agent.create("c", &["sh", "-c", script]).await;
        let before = agent.stats("c").await.unwrap();
        agent.start("c", "").await.unwrap();
        let exit = agent.wait("c", "").await;
        let after = agent.stats("c").await.unwrap();
        assert!(after.cpu["usage_usec"] > before.cpu["usage_usec"], "{before:?} {after:?}");
        assert!(before.at_ns < exit.exited_at_ns && exit.exited_at_ns < after.at_ns);
        agent.delete("c", "").await.unwrap();
        assert_eq!(agent.stats("c").await.unwrap_err().0, Code::NOT_FOUND);
    });
}

#[test]
fn limits_change_all_or_none() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        for nonsense in [json!({ "memory": { "limit": -7 } }), json!({ "cpu": { "cpus": "x" } })] {
            assert_eq!(agent.update("c", &nonsense).await.unwrap_err().0, Code::INVALID_ARGUMENT);
        }
        let unknown = json!({ "unified": { "no.such": "1" } });
        assert!(agent.update("c", &unknown).await.unwrap_err().1.contains("no.such"));
        let pages = |bytes: u64, more: &Value| {
            let limit = json!([{ "pageSize": "2MB", "limit": bytes }]);
            json!({ "hugepageLimits": limit, "unified": more })
        };
        if has(&agent, "hugetlb") {
            agent.update("c", &pages(4 << 20, &json!({}))).await.unwrap();
            assert_eq!(agent.group_file("c", "hugetlb.2MB.max"), (4 << 20).to_string());
            let broken = pages(8 << 20, &json!({ "no.such": "1" }));
            agent.update("c", &broken).await.unwrap_err();
            assert_eq!(agent.group_file("c", "hugetlb.2MB.max"), (4 << 20).to_string());
        }
        if has(&agent, "memory") && has(&agent, "cpu") && has(&agent, "pids") {
            let limits = json!({
                "memory": { "limit": 64 << 20, "swap": 64 << 20 }, "pids": { "limit": 30 },
                "cpu": { "shares": 512, "quota": 20_000, "period": 100_000 },
                "unified": { "memory.high": "33554432" }
            });
            agent.update("c", &limits).await.unwrap();
            for (file, value) in [
                ("memory.max", "67108864"),
                ("memory.swap.max", "0"),
                ("memory.high", "33554432"),
                ("pids.max", "30"),
                ("cpu.weight", "59"),
                ("cpu.max", "20000 100000"),
            ] {
                assert_eq!(agent.group_file("c", file), value, "{file}");
            }
        }
        agent.signal("c", "", 9, false).await.unwrap();
        agent.wait("c", "").await;
        assert_eq!(agent.update("c", &json!({})).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    });
}

#[test]
fn limits_hold_from_the_first_instruction() {
    with_agent(|agent| async move {
        let wanted = [
            ("memory", json!({ "memory": { "limit": 64 << 20 } }), "memory.max", "67108864"),
            ("pids", json!({ "pids": { "limit": 9 } }), "pids.max", "9"),
            ("cpu", json!({ "cpu": { "quota": 5000 } }), "cpu.max", "5000 100000"),
            ("cpuset", json!({ "cpu": { "cpus": "0" } }), "cpuset.cpus", "0"),
            ("io", json!({ "blockIO": { "weight": 500 } }), "io.weight", "default 4950"),
            ("memory", json!({ "unified": { "memory.high": "4096" } }), "memory.high", "4096"),
            (
                "hugetlb",
                json!({ "hugepageLimits": [{ "pageSize": "2MB", "limit": 2 << 20 }] }),
                "hugetlb.2MB.max",
                "2097152",
            ),
        ];
        for (controller, resources, file, value) in wanted {
            if has(&agent, controller) {
                let spec = limited(&agent, "true", &resources);
                agent.create_with(request("c", &spec)).await.unwrap();
                assert_eq!(agent.group_file("c", file), value, "{resources}");
                agent.delete("c", "").await.unwrap();
            }
        }
    });
}

#[test]
fn every_time_that_the_killer_strikes_is_an_event() {
    with_agent(|agent| async move {
        if !has(&agent, "memory") {
            return;
        }
        let memory = json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } });
        let take = "read line; dd if=/dev/zero of=/tmp/x bs=1048576 count=200; rm /tmp/x; ";
        let spec = limited(&agent, &format!("{take}{take}{take}exit 5"), &memory);
        agent.create_with(request("c", &spec)).await.unwrap();
        agent.start("c", "").await.unwrap();
        let mut input = agent.stream("c", "", Stream::Stdin, 0).await;
        for number in 1..=3 {
            tokio::io::AsyncWriteExt::write_all(&mut input, b"\n").await.unwrap();
            assert_eq!(agent.next_event(number - 1).await, (number, "c".to_owned()));
        }
        let exit = agent.wait("c", "").await;
        assert_eq!((exit.exit_code, exit.oom_killed), (5, true));
        assert!(agent.stats("c").await.unwrap().memory_events["oom_kill"] >= 3);
        assert_eq!(agent.next_event(0).await.0, 1);
    });
}
