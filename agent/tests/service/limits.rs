//! Limits of a container's control group, where the machine hands the controllers on.

use serde_json::{Value, json};

use crate::agent::{Agent, with_agent};

/// Whether the agent has a controller; says so if not.
pub(crate) fn has(agent: &Agent, controller: &str) -> bool {
    let controllers = agent.inside(&["cat", "/sys/fs/cgroup/nacre/cgroup.controllers"]);
    let has = controllers.split_whitespace().any(|found| found == controller);
    if !has {
        println!("SKIPPED: no {controller} controller in this machine's cgroup2 hierarchy");
    }
    has
}

pub(crate) fn limited(agent: &Agent, script: &str, resources: &Value) -> Value {
    let mut spec = agent.spec(&["sh", "-c", script]);
    spec["linux"]["resources"] = resources.clone();
    let mount = json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" });
    spec["mounts"].as_array_mut().unwrap().push(mount);
    spec
}

#[test]
fn a_container_that_takes_too_much_memory_is_killed_and_said_to_be() {
    with_agent(|agent| async move {
        if !has(&agent, "memory") {
            return;
        }
        let memory = json!({ "memory": { "limit": 32 << 20 } });
        let script = "exec dd if=/dev/zero of=/tmp/x bs=1048576 count=200";
        let (_text, exit) = agent.run("c", &limited(&agent, script, &memory)).await;
        assert_eq!((exit.exit_code, exit.oom_killed), (137, true));
        // A child that is struck counts as well; without one nobody was.
        let script = "dd if=/dev/zero of=/tmp/x bs=1048576 count=200; exit 4";
        let (_text, exit) = agent.run("c", &limited(&agent, script, &memory)).await;
        assert_eq!((exit.exit_code, exit.oom_killed), (4, true));
        let (_text, exit) = agent.run("c", &limited(&agent, "exit 9", &memory)).await;
        assert_eq!((exit.exit_code, exit.oom_killed), (9, false));
    });
}

#[test]
fn a_container_has_no_more_processes_than_it_may() {
    with_agent(|agent| async move {
        if !has(&agent, "pids") {
            return;
        }
        let pids = json!({ "pids": { "limit": 4 } });
        let script = "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo unreachable";
        let (text, exit) = agent.run("c", &limited(&agent, script, &pids)).await;
        assert_eq!((text.as_str(), exit.exit_code), ("", 2));
    });
}

#[test]
fn a_limit_that_cannot_be_set_fails_the_creation_and_leaves_nothing() {
    with_agent(|agent| async move {
        let resources = json!({ "memory": { "limit": -5 } });
        let spec = limited(&agent, "true", &resources);
        let created = agent.create_with(crate::agent::request("c", &spec)).await;
        assert!(created.is_err());
        agent.assert_no_trace("c");
    });
}
