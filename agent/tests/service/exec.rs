//! Processes that are added to a container.

use nacre_proto::stream::Stream;
use serde_json::json;

use crate::agent::with_agent;

#[test]
fn an_added_process_is_in_the_container_and_inherits_what_is_absent() {
    with_agent(|agent| async move {
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec["process"]["cwd"] = json!("/tmp");
        agent.create_with(crate::agent::request("c", &spec)).await.unwrap();
        agent.start("c", "").await.unwrap();
        let script = "hostname; pwd; echo $MARK; id -u; cat /proc/1/cmdline | tr '\\0' ' '; \
                      grep CapEff /proc/self/status; cat /proc/self/oom_score_adj; \
                      grep 0:: /proc/self/cgroup; exit 5";
        agent.exec("c", "x", &json!({ "args": ["sh", "-c", script] }), false).await.unwrap();
        agent.start("c", "x").await.unwrap();
        let text = String::from_utf8(agent.all_of("c", "x", Stream::Stdout).await).unwrap();
        let expected = "box\n/tmp\nof-the-container\n0\nsleep 1000 CapEff:\t00000000000000e1\n\
                        0\n0::/\n";
        assert_eq!(text, expected);
        assert_eq!(agent.wait("c", "x").await.exit_code, 5);
        agent.delete("c", "x").await.unwrap();
    });
}

#[test]
fn an_added_process_may_be_another_user_with_another_environment() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        let script = "id -u; id -g; pwd; echo $X; grep CapEff /proc/self/status";
        let oci = json!({
            "args": ["sh", "-c", script], "user": { "uid": 7, "gid": 8 },
            "env": ["PATH=/bin", "X=y"], "cwd": "/bin"
        });
        agent.exec("c", "x", &oci, false).await.unwrap();
        agent.start("c", "x").await.unwrap();
        let text = String::from_utf8(agent.all_of("c", "x", Stream::Stdout).await).unwrap();
        assert_eq!(text, "7\n8\n/bin\ny\nCapEff:\t0000000000000000\n");
    });
}

#[test]
fn input_reaches_an_added_process() {
    with_agent(|agent| async move {
        use tokio::io::AsyncWriteExt;
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        agent.exec("c", "x", &json!({ "args": ["cat"] }), false).await.unwrap();
        // Before the process exists.
        let mut stdin = agent.stream("c", "x", Stream::Stdin, 0).await;
        stdin.write_all(b"early").await.unwrap();
        stdin.shutdown().await.unwrap();
        agent.start("c", "x").await.unwrap();
        assert_eq!(agent.all_of("c", "x", Stream::Stdout).await, b"early");
        assert_eq!(agent.wait("c", "x").await.exit_code, 0);
    });
}

#[test]
fn thirty_added_processes_leave_nothing_behind() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        for number in 0..30 {
            let exec = format!("x{number}");
            agent.exec("c", &exec, &json!({ "args": ["true"] }), false).await.unwrap();
            agent.start("c", &exec).await.unwrap();
            assert_eq!(agent.wait("c", &exec).await.exit_code, 0);
            agent.delete("c", &exec).await.unwrap();
        }
        let fds = agent.inside(&["sh", "-c", "ls /proc/1/fd | wc -l"]);
        assert!(fds.trim().parse::<u32>().unwrap() < 40, "{fds}");
        let files = agent.inside(&["sh", "-c", "find /run/nacre -type f -o -type s -o -type l"]);
        assert!(!files.contains("exec-"), "{files}");
        let zombies = agent.inside(&["sh", "-c", "cat /proc/[0-9]*/stat | grep -c ' Z ' || true"]);
        assert_eq!(zombies.trim(), "0");
    });
}
