//! What the agent refuses, and with which status.

use nacre_proto::agent::ResizeTerminalRequest;
use serde_json::json;
use ttrpc::Code;

use crate::agent::{context, process, request, with_agent};

#[test]
fn a_program_that_is_not_there_is_not_found() {
    with_agent(|agent| async move {
        for (id, program, code, words) in [
            ("a", "/bin/nothing", Code::NOT_FOUND, "no such file or directory"),
            ("b", "nothing", Code::NOT_FOUND, "no such file or directory"),
            ("c", "/bin/not-executable", Code::PERMISSION_DENIED, "permission denied"),
            ("d", "/bin", Code::PERMISSION_DENIED, "permission denied"),
        ] {
            agent.create(id, &[program]).await;
            let (found, text) = agent.start(id, "").await.unwrap_err();
            assert_eq!(found, code, "{text}");
            assert!(text.contains(words), "{text}");
            agent.wait(id, "").await;
            agent.delete(id, "").await.unwrap();
            agent.assert_no_trace(id);
        }
    });
}

#[test]
fn an_added_program_that_is_not_there_is_not_found_and_leaves_the_container_alone() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        agent.exec("c", "x", &json!({ "args": ["nothing"] }), false).await.unwrap();
        let (code, text) = agent.start("c", "x").await.unwrap_err();
        assert_eq!(code, Code::NOT_FOUND, "{text}");
        assert!(text.contains("no such file or directory"), "{text}");
        assert_eq!(agent.wait("c", "x").await.exit_code, 127);
        agent.delete("c", "x").await.unwrap();
        agent.exec("c", "x", &json!({ "args": ["/bin/not-executable"] }), false).await.unwrap();
        assert_eq!(agent.start("c", "x").await.unwrap_err().0, Code::PERMISSION_DENIED);
        assert_eq!(agent.wait("c", "x").await.exit_code, 126);
        agent.exec("c", "y", &json!({ "args": ["true"] }), false).await.unwrap();
        agent.start("c", "y").await.unwrap();
        assert_eq!(agent.wait("c", "y").await.exit_code, 0);
    });
}

#[test]
fn a_name_is_used_once_and_well_formed() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        let again = agent.create_with(request("c", &agent.spec(&["true"]))).await;
        assert_eq!(again.unwrap_err().0, Code::ALREADY_EXISTS);
        for id in ["", ".x", "..", "a/b", "a b", &"x".repeat(129)] {
            let refused = agent.create_with(request(id, &agent.spec(&["true"]))).await;
            assert_eq!(refused.unwrap_err().0, Code::INVALID_ARGUMENT, "{id:?}");
        }
        agent.start("c", "").await.unwrap();
        let oci = json!({ "args": ["true"] });
        agent.exec("c", "x", &oci, false).await.unwrap();
        assert_eq!(agent.exec("c", "x", &oci, false).await.unwrap_err().0, Code::ALREADY_EXISTS);
        assert_eq!(agent.exec("c", "", &oci, false).await.unwrap_err().0, Code::INVALID_ARGUMENT);
        assert_eq!(
            agent.exec("c", "../y", &oci, false).await.unwrap_err().0,
            Code::INVALID_ARGUMENT
        );
    });
}

#[test]
fn what_runs_is_not_deleted_and_not_started_again() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        let early = agent.exec("c", "x", &json!({ "args": ["true"] }), false).await;
        assert_eq!(early.unwrap_err().0, Code::FAILED_PRECONDITION);
        agent.start("c", "").await.unwrap();
        assert_eq!(agent.delete("c", "").await.unwrap_err().0, Code::FAILED_PRECONDITION);
        assert_eq!(agent.start("c", "").await.unwrap_err().0, Code::FAILED_PRECONDITION);
        agent.exec("c", "x", &json!({ "args": ["sleep", "1000"] }), false).await.unwrap();
        let unstarted = agent.signal("c", "x", libc::SIGTERM, false).await;
        assert_eq!(unstarted.unwrap_err().0, Code::FAILED_PRECONDITION);
        agent.start("c", "x").await.unwrap();
        assert_eq!(agent.delete("c", "x").await.unwrap_err().0, Code::FAILED_PRECONDITION);
        agent.signal("c", "", libc::SIGKILL, false).await.unwrap();
        // The kernel ends the added process first: it is in the init's PID namespace.
        assert_eq!(agent.wait("c", "x").await.exit_code, 137);
        agent.wait("c", "").await;
        let late = agent.exec("c", "y", &json!({ "args": ["true"] }), false).await;
        assert_eq!(late.unwrap_err().0, Code::FAILED_PRECONDITION);
        agent.delete("c", "").await.unwrap();
    });
}

#[test]
fn what_is_not_there_is_not_found() {
    with_agent(|agent| async move {
        assert_eq!(agent.start("c", "").await.unwrap_err().0, Code::NOT_FOUND);
        assert_eq!(agent.delete("c", "").await.unwrap_err().0, Code::NOT_FOUND);
        assert_eq!(agent.signal("c", "", 9, false).await.unwrap_err().0, Code::NOT_FOUND);
        assert!(agent.client.wait(context(), &process("c", "")).await.is_err());
        agent.create("c", &["true"]).await;
        assert_eq!(agent.delete("c", "x").await.unwrap_err().0, Code::NOT_FOUND);
        let resize =
            ResizeTerminalRequest { container_id: "c".to_owned(), ..ResizeTerminalRequest::new() };
        assert!(agent.client.resize_terminal(context(), &resize).await.is_err());
    });
}

#[test]
fn a_specification_that_cannot_be_honoured_is_refused_and_leaves_nothing() {
    with_agent(|agent| async move {
        let mut user = agent.spec(&["true"]);
        user["linux"]["namespaces"] = json!([{ "type": "user" }]);
        let mut rootless = agent.spec(&["true"]);
        rootless["root"]["path"] = json!("/nowhere");
        let mut hooked = agent.spec(&["true"]);
        hooked["hooks"] = json!({ "poststop": [{ "path": "/bin/true" }] });
        let mut mount = agent.spec(&["true"]);
        mount["mounts"][0]["source"] = json!("/nowhere");
        mount["mounts"][0]["type"] = json!("bind");
        mount["mounts"][0]["options"] = json!(["bind"]);
        let mut cwd = agent.spec(&["true"]);
        cwd["process"]["cwd"] = json!("/nowhere/\u{0}");
        for (spec, code) in [
            (user, Code::UNIMPLEMENTED),
            (rootless, Code::INTERNAL),
            (hooked, Code::UNIMPLEMENTED),
            (mount, Code::INTERNAL),
            (json!({}), Code::INVALID_ARGUMENT),
            (json!("x"), Code::INVALID_ARGUMENT),
        ] {
            let (found, text) = agent.create_with(request("c", &spec)).await.unwrap_err();
            assert_eq!(found, code, "{text}");
            agent.assert_no_trace("c");
        }
        agent.create_with(request("c", &agent.spec(&["true"]))).await.unwrap();
    });
}

#[test]
fn signals_out_of_range_are_refused() {
    with_agent(|agent| async move {
        agent.create("c", &["true"]).await;
        for signal in [0, 65, 1000] {
            let refused = agent.signal("c", "", signal, false).await;
            assert_eq!(refused.unwrap_err().0, Code::INVALID_ARGUMENT);
        }
        let refused = agent.signal("c", "x", 9, true).await;
        assert_eq!(refused.unwrap_err().0, Code::INVALID_ARGUMENT);
    });
}
