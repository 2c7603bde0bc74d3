//! What the containers of a pod share, and what is mounted for one alone.

use nacre_proto::{
    agent::{CreateContainerRequest, SharedNamespace, Storage},
    stream::Stream,
};
use serde_json::{Value, json};
use ttrpc::Code;

use crate::agent::{Agent, Status, request, with_agent};

fn shared(kinds: &[&str], owner: &str) -> Vec<SharedNamespace> {
    let one = |kind: &&str| SharedNamespace {
        kind: (*kind).to_owned(),
        container_id: owner.to_owned(),
        ..SharedNamespace::new()
    };
    kinds.iter().map(one).collect()
}

fn storage(driver: &str, source: &str, at: &str, options: &[&str]) -> Storage {
    Storage {
        driver: driver.to_owned(),
        source: source.to_owned(),
        mount_point: at.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Storage::new()
    }
}

async fn create_in(
    agent: &Agent,
    id: &str,
    script: &str,
    namespaces: Vec<SharedNamespace>,
) -> Result<(), Status> {
    let spec = agent.spec(&["sh", "-c", script]);
    let request = CreateContainerRequest { namespaces, ..request(id, &spec) };
    agent.create_with(request).await.map(drop)
}

async fn exec(agent: &Agent, id: &str, exec: &str, script: &str) -> String {
    let process = json!({ "args": ["sh", "-c", script] });
    agent.exec(id, exec, &process, false).await.unwrap();
    agent.start(id, exec).await.unwrap();
    let text = agent.all_of(id, exec, Stream::Stdout).await;
    assert_eq!(agent.wait(id, exec).await.exit_code, 0, "{script}");
    agent.delete(id, exec).await.unwrap();
    String::from_utf8(text).unwrap().trim().to_owned()
}

fn groups(agent: &Agent, id: &str) -> String {
    agent.inside(&["cat", &format!("/sys/fs/cgroup/nacre/{id}/cgroup.procs")]).trim().to_owned()
}

#[test]
fn containers_share_the_namespaces_of_the_sandbox() {
    with_agent(|agent| async move {
        let kinds = ["ipc", "uts", "pid"];
        // Its child is orphaned and then ends: somebody has to reap it.
        let script = "(sleep 0.1 &); exec sleep 1001";
        create_in(&agent, "a", script, shared(&kinds, "")).await.unwrap();
        create_in(&agent, "b", "exec sleep 1002", shared(&kinds, "")).await.unwrap();
        create_in(&agent, "own", "exec sleep 1003", Vec::new()).await.unwrap();
        for id in ["a", "b", "own"] {
            agent.start(id, "").await.unwrap();
        }
        let links = "for n in ipc uts pid; do ls -l /proc/self/ns/$n; done | grep -o '[a-z]*:.*'";
        let of_a = exec(&agent, "a", "x", links).await;
        assert_eq!(of_a, exec(&agent, "b", "x", links).await);
        let of_own = exec(&agent, "own", "x", links).await;
        for (a, own) in of_a.lines().zip(of_own.lines()) {
            assert_ne!(a, own);
        }
        let seen = exec(&agent, "b", "x", "ps -o pid,args").await;
        assert!(seen.contains("sleep 1001") && seen.contains("sleep 1002"), "{seen}");
        assert!(!seen.contains("sleep 1003") && seen.contains("nacre-pause"), "{seen}");
        assert!(!seen.contains("listen-unix"), "the agent can be seen: {seen}");
        // The first process is no way into the guest.
        let script = "cat /proc/1/environ >/dev/null 2>&1 || echo denied; ls /proc/1/root/ 2>/dev/null | head -n 1; true";
        assert_eq!(exec(&agent, "b", "x", script).await, "denied");
        let zombies = "while ps -o stat,args | grep '^Z'; do sleep 0.01; done >/dev/null";
        exec(&agent, "b", "x", zombies).await;
        for id in ["a", "b", "own"] {
            agent.signal(id, "", 9, false).await.unwrap();
            agent.wait(id, "").await;
            agent.delete(id, "").await.unwrap();
            agent.assert_no_trace(id);
        }
    });
}

#[test]
fn a_container_lends_its_namespaces_to_others() {
    with_agent(|agent| async move {
        create_in(&agent, "pause", "exec sleep 1001", Vec::new()).await.unwrap();
        let script = "hostname from-app; ps -o args | grep 'sleep 1001'";
        // Whoever has not ended can lend.
        create_in(&agent, "app", script, shared(&["pid", "uts"], "pause")).await.unwrap();
        agent.start("pause", "").await.unwrap();
        agent.start("app", "").await.unwrap();
        let text = agent.all_of("app", "", Stream::Stdout).await;
        assert!(String::from_utf8(text).unwrap().contains("sleep 1001"));
        agent.signal("pause", "", 9, false).await.unwrap();
        agent.wait("pause", "").await;
        let gone = create_in(&agent, "late", "true", shared(&["pid"], "pause")).await;
        assert_eq!(gone.unwrap_err().0, Code::FAILED_PRECONDITION);
        let absent = create_in(&agent, "late", "true", shared(&["pid"], "nobody")).await;
        assert_eq!(absent.unwrap_err().0, Code::NOT_FOUND);
        let odd = create_in(&agent, "late", "true", shared(&["mount"], "")).await;
        assert_eq!(odd.unwrap_err().0, Code::INVALID_ARGUMENT);
        agent.assert_no_trace("late");
    });
}

#[test]
fn the_end_of_an_init_ends_its_container_and_no_other_of_the_namespace() {
    with_agent(|agent| async move {
        let script = "sleep 1001 & sleep 1002 & read line; exit 3";
        create_in(&agent, "a", script, shared(&["pid"], "")).await.unwrap();
        create_in(&agent, "b", "exec sleep 1003", shared(&["pid"], "")).await.unwrap();
        agent.start("a", "").await.unwrap();
        agent.start("b", "").await.unwrap();
        let process = json!({ "args": ["sleep", "1004"] });
        agent.exec("a", "x", &process, false).await.unwrap();
        agent.start("a", "x").await.unwrap();
        let _input = agent.stream("a", "", Stream::Stdin, 0).await;
        agent.signal("a", "", 9, false).await.unwrap();
        assert_eq!(agent.wait("a", "").await.exit_code, 137);
        assert_eq!(agent.wait("a", "x").await.exit_code, 137);
        let seen = exec(&agent, "b", "x", "ps -o args").await;
        assert!(!seen.contains("sleep 1001") && !seen.contains("sleep 1004"), "{seen}");
        assert!(seen.contains("sleep 1003"), "{seen}");
        assert_eq!(groups(&agent, "a"), "");
    });
}

fn with_mounts(agent: &Agent, script: &str, mounts: &[Value]) -> Value {
    let mut spec = agent.spec(&["sh", "-c", script]);
    spec["mounts"].as_array_mut().unwrap().extend_from_slice(mounts);
    spec
}

#[test]
fn what_is_mounted_for_a_container_goes_with_it() {
    with_agent(|agent| async move {
        let top = "/run/nacre/containers/c";
        let storages = || {
            vec![
                storage("tmpfs", "", &format!("{top}/memory"), &["size=1m", "mode=0777"]),
                storage("overlay", &format!("{top}/memory"), &format!("{top}/over"), &[]),
            ]
        };
        let bind = |from: &str, to: &str| {
            let source = format!("{top}/{from}");
            json!({ "destination": to, "type": "bind", "source": source, "options": ["rbind"] })
        };
        let mounts = [bind("memory", "/memory"), bind("over", "/over")];
        let script = "dd if=/dev/zero of=/memory/x bs=1024 count=2000 2>/dev/null; \
                      ls -l /memory/x | grep -o 1048576; echo lower > /over/y; cat /over/y; ls /memory";
        let spec = with_mounts(&agent, script, &mounts);
        let request = CreateContainerRequest { storages: storages(), ..request("c", &spec) };
        agent.create_with(request).await.unwrap();
        let mounted = agent.inside(&["cat", "/proc/1/mountinfo"]);
        assert_eq!(mounted.matches(top).count(), 2 + 1, "{mounted}");
        agent.start("c", "").await.unwrap();
        let text = agent.all_of("c", "", Stream::Stdout).await;
        assert_eq!(String::from_utf8(text).unwrap(), "1048576\nlower\nx\n");
        agent.wait("c", "").await;
        agent.delete("c", "").await.unwrap();
        assert_no_mounts(&agent);

        // Also if there is no container in the end.
        let broken = with_mounts(&agent, "true", &[bind("absent", "/absent")]);
        let storages = storages();
        let request = CreateContainerRequest { storages, ..crate::agent::request("c", &broken) };
        agent.create_with(request).await.unwrap_err();
        assert_no_mounts(&agent);
    });
}

fn assert_no_mounts(agent: &Agent) {
    let mounted = agent.inside(&["cat", "/proc/1/mountinfo"]);
    assert!(!mounted.contains("/run/nacre/"), "{mounted}");
    agent.assert_no_trace("c");
}

#[test]
fn storages_of_other_containers_are_refused() {
    with_agent(|agent| async move {
        let storages = vec![storage("tmpfs", "", "/run/nacre/containers/d/x", &[])];
        let spec = agent.spec(&["true"]);
        let request = CreateContainerRequest { storages, ..request("c", &spec) };
        let error = agent.create_with(request).await.unwrap_err();
        assert_eq!(error.0, Code::INVALID_ARGUMENT);
        agent.assert_no_trace("c");
    });
}
