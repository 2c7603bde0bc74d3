//! Which devices a container may use is enforced by the kernel, whatever nodes it has.

use serde_json::json;

use crate::agent::with_agent;

#[test]
fn a_container_uses_the_devices_that_its_rules_allow_and_no_others() {
    with_agent(|agent| async move {
        if !std::fs::read_to_string("/proc/misc").unwrap().contains(" fuse\n") {
            println!("SKIPPED: this machine has no device 10:229 (fuse)");
            return;
        }
        // 1:9 is urandom, 1:11 kmsg, 10:229 fuse.
        let script = "cd /dev; for n in 1:9 10:229 1:11; do busybox mknod n$n c ${n%:*} ${n#*:}; \
                      (: < n$n) 2>/dev/null && echo read $n; (: > n$n) 2>/dev/null && echo write $n; \
                      done; true";
        let mut spec = agent.spec(&["sh", "-c", script]);
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
        }
        spec["linux"]["resources"] = json!({ "devices": [
            { "allow": true, "access": "rwm" },
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "r" }
        ] });
        let (text, exit) = agent.run("c", &spec).await;
        assert_eq!((text.as_str(), exit.exit_code), ("read 1:9\nwrite 1:9\nread 10:229\n", 0));
        spec["linux"]["resources"] = json!({ "devices": [{ "allow": false, "access": "q" }] });
        let created = agent.create_with(crate::agent::request("c", &spec)).await;
        assert_eq!(created.unwrap_err().0, ttrpc::Code::INVALID_ARGUMENT);
        agent.assert_no_trace("c");
    });
}
