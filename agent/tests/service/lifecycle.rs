//! Containers from creation to deletion.

use std::time::Duration;

use nacre_proto::{agent::HelloRequest, stream::Stream};
use serde_json::json;
use tokio::{io::AsyncReadExt, time::timeout};
use ttrpc::Code;

use crate::agent::{LIMIT, context, request, with_agent};

#[test]
fn hello_tells_about_the_guest_and_refuses_another_major_version() {
    with_agent(|agent| async move {
        let hello = HelloRequest { major: nacre_proto::AGENT_MAJOR, ..HelloRequest::new() };
        let answer = agent.client.hello(context(), &hello).await.unwrap();
        assert!(answer.online_cpus > 0 && answer.memory_bytes > 0);
        assert!(!answer.kernel_release.is_empty());
        let hello = HelloRequest { major: nacre_proto::AGENT_MAJOR + 1, ..HelloRequest::new() };
        assert!(agent.client.hello(context(), &hello).await.is_err());
    });
}

#[test]
fn a_container_gives_its_output_and_its_exit_code() {
    with_agent(|agent| async move {
        let spec = agent.spec(&["sh", "-c", "echo hello; echo oops >&2; exit 7"]);
        agent.create_with(request("c", &spec)).await.unwrap();
        agent.start("c", "").await.unwrap();
        let exit = agent.wait("c", "").await;
        assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (7, 0, false));
        assert!(exit.exited_at_ns > 0);
        // After the end, and in any order.
        assert_eq!(agent.all_of("c", "", Stream::Stderr).await, b"oops\n");
        assert_eq!(agent.all_of("c", "", Stream::Stdout).await, b"hello\n");
        assert_eq!(agent.wait("c", "").await.exit_code, 7);
        agent.delete("c", "").await.unwrap();
        agent.assert_no_trace("c");
    });
}

#[test]
fn a_container_is_alone_with_its_own_root_name_and_processes() {
    with_agent(|agent| async move {
        let script = "hostname; echo pid $$; ls /; ls /proc | grep -c '^[0-9]'; \
                      cat /proc/self/oom_score_adj; grep 0:: /proc/self/cgroup; env; \
                      grep CapEff /proc/self/status";
        let (text, exit) = agent.run("c", &agent.spec(&["sh", "-c", script])).await;
        assert_eq!(exit.exit_code, 0);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[..7], ["box", "pid 1", "bin", "dev", "etc", "proc", "tmp"]);
        // The shell and its three-process pipeline, at most.
        assert!(lines[7].parse::<u32>().unwrap() <= 4, "{text}");
        assert_eq!(lines[8..10], ["0", "0::/"]);
        assert!(lines.contains(&"MARK=of-the-container"), "{text}");
        assert!(lines.contains(&"CapEff:\t00000000000000e1"), "{text}");
    });
}

#[test]
fn the_agent_itself_keeps_its_own_standing() {
    with_agent(|agent| async move {
        let (_text, exit) = agent.run("c", &agent.spec(&["true"])).await;
        assert_eq!(exit.exit_code, 0);
        let groups = agent.inside(&["cat", "/proc/1/cgroup"]);
        assert!(
            groups.lines().any(|line| line.starts_with("0::") && line.ends_with("/nacre-agent"))
        );
        if agent.log().contains("can't protect the agent") {
            println!("SKIPPED: oom_score_adj can't be lowered without CAP_SYS_RESOURCE");
        } else {
            assert_eq!(agent.inside(&["cat", "/proc/1/oom_score_adj"]).trim(), "-1000");
        }
        // Nothing but the agent is left: no launcher, no zombie.
        let processes = agent.inside(&["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]);
        assert!(processes.trim().parse::<u32>().unwrap() <= 4, "{processes}");
    });
}

#[test]
fn a_signal_ends_a_process_with_128_and_its_number() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        agent.exec("c", "x", &json!({ "args": ["sleep", "1000"] }), false).await.unwrap();
        agent.start("c", "x").await.unwrap();
        agent.signal("c", "x", libc::SIGTERM, false).await.unwrap();
        let exit = agent.wait("c", "x").await;
        assert_eq!((exit.exit_code, exit.signal), (143, 15));
        agent.signal("c", "", libc::SIGKILL, false).await.unwrap();
        let exit = agent.wait("c", "").await;
        assert_eq!((exit.exit_code, exit.signal), (137, 9));
        let again = agent.signal("c", "", libc::SIGKILL, false).await;
        assert_eq!(again.unwrap_err().0, Code::NOT_FOUND);
        agent.delete("c", "").await.unwrap();
    });
}

#[test]
fn a_signal_reaches_all_processes_of_a_container() {
    with_agent(|agent| async move {
        // It outlives the signal: what is left of a container ends with its first process.
        let script = "trap 'echo' USR1; echo; while :; do sleep 1000 & wait; done";
        agent.create("c", &["sh", "-c", script]).await;
        let mut output = agent.stream("c", "", Stream::Stdout, 0).await;
        agent.start("c", "").await.unwrap();
        // Only now it does not die of the signal any more.
        timeout(LIMIT, output.read_exact(&mut [0])).await.unwrap().unwrap();
        agent.exec("c", "x", &json!({ "args": ["sleep", "1000"] }), false).await.unwrap();
        agent.start("c", "x").await.unwrap();
        agent.signal("c", "", libc::SIGUSR1, true).await.unwrap();
        assert_eq!(agent.wait("c", "x").await.signal, 10);
        timeout(LIMIT, output.read_exact(&mut [0])).await.unwrap().unwrap();
        agent.signal("c", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(agent.wait("c", "").await.signal, 9);
        agent.delete("c", "").await.unwrap();
    });
}

#[test]
fn killing_all_ends_the_container() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        agent.signal("c", "", libc::SIGKILL, true).await.unwrap();
        assert_eq!(agent.wait("c", "").await.exit_code, 137);
        agent.delete("c", "").await.unwrap();
        agent.assert_no_trace("c");
    });
}

#[test]
fn a_background_child_that_holds_the_output_does_not_delay_the_end() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        let oci = json!({ "args": ["sh", "-c", "sleep 1000 & echo done"] });
        agent.exec("c", "x", &oci, false).await.unwrap();
        agent.start("c", "x").await.unwrap();
        let exit = timeout(Duration::from_secs(20), agent.wait("c", "x")).await.unwrap();
        assert_eq!(exit.exit_code, 0);
        agent.delete("c", "x").await.unwrap();
        agent.signal("c", "", libc::SIGKILL, false).await.unwrap();
        agent.wait("c", "").await;
        agent.delete("c", "").await.unwrap();
    });
}

#[test]
fn a_created_container_waits_and_can_be_waited_for_killed_and_deleted() {
    with_agent(|agent| async move {
        agent.create("c", &["sh", "-c", "echo ran > /tmp/ran"]).await;
        agent.signal("c", "", libc::SIGKILL, false).await.unwrap();
        assert_eq!(agent.wait("c", "").await.exit_code, 137);
        agent.delete("c", "").await.unwrap();
        agent.create("d", &["sh", "-c", "echo ran > /tmp/ran"]).await;
        agent.delete("d", "").await.unwrap();
        agent.assert_no_trace("d");
        assert!(!agent.root().join("tmp/ran").exists());
    });
}

#[test]
fn a_name_can_be_used_again_and_many_containers_run_at_once() {
    with_agent(|agent| async move {
        for round in 0..3 {
            let (text, _exit) = agent.run("same", &agent.spec(&["echo", &round.to_string()])).await;
            assert_eq!(text, format!("{round}\n"));
        }
        let agent = &agent;
        let runs = (0..8).map(|number| async move {
            let spec = agent.spec(&["sh", "-c", &format!("echo {number}; exit {number}")]);
            let (text, exit) = agent.run(&format!("c{number}"), &spec).await;
            assert_eq!((text, exit.exit_code), (format!("{number}\n"), number));
        });
        let runs: Vec<_> = runs.map(Box::pin).collect();
        for run in futures_in_order(runs).await {
            run.unwrap();
        }
    });
}

/// Drives all futures at once.
async fn futures_in_order<F: Future<Output = ()>>(
    futures: Vec<std::pin::Pin<Box<F>>>,
) -> Vec<Result<(), ()>> {
    let mut futures: Vec<_> = futures.into_iter().map(Some).collect();
    std::future::poll_fn(move |context| {
        for slot in &mut futures {
            if slot.as_mut().is_some_and(|future| future.as_mut().poll(context).is_ready()) {
                *slot = None;
            }
        }
        if futures.iter().all(Option::is_none) {
            std::task::Poll::Ready(futures.iter().map(|_| Ok(())).collect())
        } else {
            std::task::Poll::Pending
        }
    })
    .await
}

#[test]
fn shutdown_ends_what_runs_and_then_the_agent() {
    with_agent(|mut agent| async move {
        agent.create("c", &["sh", "-c", "trap 'exit 0' TERM; sleep 1000 & wait"]).await;
        agent.start("c", "").await.unwrap();
        agent.shutdown().await.unwrap();
        assert!(agent.gone().await, "{}", agent.log());
    });
}
