//! Seccomp profiles are in force, in the init and in added processes.

use nacre_proto::stream::Stream;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::agent::{Agent, request, with_agent};

/// Everything but mkdir, which fails with "File exists" though nothing does.
fn profile() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{
            "names": ["mkdir", "mkdirat", "a_call_of_another_machine"],
            "action": "SCMP_ACT_ERRNO", "errnoRet": 17
        }]
    })
}

async fn assert_in_force(agent: &Agent, no_new_privileges: bool) {
    let script = "mkdir /tmp/made; grep -e Seccomp: -e NoNewPrivs: -e CapEff: /proc/self/status";
    let mut spec = agent.spec(&["sh", "-c", &format!("{script}; exec sleep 1000")]);
    spec["linux"]["seccomp"] = profile();
    spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
    agent.create_with(request("c", &spec)).await.unwrap();
    agent.start("c", "").await.unwrap();
    agent.exec("c", "x", &json!({ "args": ["sh", "-c", script] }), false).await.unwrap();
    agent.start("c", "x").await.unwrap();
    agent.wait("c", "x").await;
    let text = String::from_utf8(agent.all_of("c", "x", Stream::Stdout).await).unwrap();
    let nnp = i32::from(no_new_privileges);
    assert_eq!(text, format!("CapEff:\t00000000000000e1\nNoNewPrivs:\t{nnp}\nSeccomp:\t2\n"));
    let stderr = String::from_utf8(agent.all_of("c", "x", Stream::Stderr).await).unwrap();
    assert!(stderr.contains("File exists"), "{stderr}");
    agent.signal("c", "", libc::SIGKILL, false).await.unwrap();
    agent.wait("c", "").await;
    assert_eq!(String::from_utf8(agent.all_of("c", "", Stream::Stdout).await).unwrap(), text);
    agent.delete("c", "").await.unwrap();
    assert!(!agent.root().join("tmp/made").exists());
}

#[test]
fn a_profile_is_in_force_with_and_without_no_new_privileges() {
    with_agent(|agent| async move {
        assert_in_force(&agent, true).await;
        assert_in_force(&agent, false).await;
    });
}

#[test]
fn a_profile_that_needs_a_partner_is_refused() {
    with_agent(|agent| async move {
        let mut spec = agent.spec(&["true"]);
        spec["linux"]["seccomp"] = profile();
        spec["linux"]["seccomp"]["defaultAction"] = json!("SCMP_ACT_NOTIFY");
        let (code, text) = agent.create_with(request("c", &spec)).await.unwrap_err();
        assert_eq!(code, Code::INTERNAL);
        assert!(text.contains("seccomp"), "{text}");
        agent.assert_no_trace("c");
    });
}
