//! Containers and added processes with a terminal.

use nacre_proto::stream::Stream;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use ttrpc::Code;

use crate::agent::{LIMIT, request, with_agent};

/// Reads until `end` was shown.
async fn shown_until(terminal: &mut UnixStream, end: &str) -> String {
    let mut text = String::new();
    while !text.contains(end) {
        let mut buffer = [0; 512];
        let len = timeout(LIMIT, terminal.read(&mut buffer)).await.unwrap().unwrap();
        assert!(len > 0, "the terminal closed after {text:?}");
        text.push_str(std::str::from_utf8(&buffer[..len]).unwrap());
    }
    text
}

#[test]
fn a_container_with_a_terminal_sees_its_size_and_its_changes() {
    with_agent(|agent| async move {
        let script = "stty size; trap 'stty size; echo changed' WINCH; \
                      test -t 0 && test -t 1 && test -t 2 && echo ready; \
                      while test \"$line\" != bye; do read line && echo got $line; done";
        let mut request = request("c", &agent.spec(&["sh", "-c", script]));
        request.terminal = true;
        agent.create_with(request).await.unwrap();
        agent.resize("c", "", 80, 24).await.unwrap();
        agent.start("c", "").await.unwrap();
        let mut out = agent.stream("c", "", Stream::Stdout, 0).await;
        let text = shown_until(&mut out, "ready").await;
        assert!(text.starts_with("24 80\r\n"), "{text:?}");
        agent.resize("c", "", 132, 50).await.unwrap();
        let text = shown_until(&mut out, "changed").await;
        assert!(text.contains("50 132\r\nchanged"), "{text:?}");
        let mut stdin = agent.stream("c", "", Stream::Stdin, 0).await;
        stdin.write_all(b"a line\n").await.unwrap();
        let text = shown_until(&mut out, "got a line").await;
        assert!(text.contains("a line\r\ngot a line"), "typed text is echoed: {text:?}");
        stdin.write_all(b"bye\n").await.unwrap();
        assert_eq!(agent.wait("c", "").await.exit_code, 0);
        let mut rest = Vec::new();
        timeout(LIMIT, out.read_to_end(&mut rest)).await.unwrap().unwrap();
        let stderr = agent.all_of("c", "", Stream::Stderr).await;
        assert_eq!(stderr, b"", "a terminal has no separate error stream");
        agent.delete("c", "").await.unwrap();
    });
}

#[test]
fn an_added_process_has_a_terminal_of_its_own() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        assert_eq!(agent.resize("c", "", 1, 1).await.unwrap_err().0, Code::FAILED_PRECONDITION);
        let oci = json!({ "args": ["sh", "-c", "stty size; test -t 1 && read x && echo got $x"] });
        agent.exec("c", "x", &oci, true).await.unwrap();
        agent.resize("c", "x", 100, 40).await.unwrap();
        agent.start("c", "x").await.unwrap();
        let mut out = agent.stream("c", "x", Stream::Stdout, 0).await;
        let text = shown_until(&mut out, "\r\n").await;
        assert!(text.starts_with("40 100\r\n"), "{text:?}");
        let mut stdin = agent.stream("c", "x", Stream::Stdin, 0).await;
        stdin.write_all(b"it\n").await.unwrap();
        shown_until(&mut out, "got it").await;
        assert_eq!(agent.wait("c", "x").await.exit_code, 0);
        agent.delete("c", "x").await.unwrap();
    });
}

#[test]
fn control_c_interrupts_the_foreground() {
    with_agent(|agent| async move {
        agent.create("c", &["sleep", "1000"]).await;
        agent.start("c", "").await.unwrap();
        let oci = json!({ "args": ["sh", "-c", "echo ready; exec sleep 1000"] });
        agent.exec("c", "x", &oci, true).await.unwrap();
        agent.start("c", "x").await.unwrap();
        let mut out = agent.stream("c", "x", Stream::Stdout, 0).await;
        shown_until(&mut out, "ready").await;
        let mut stdin = agent.stream("c", "x", Stream::Stdin, 0).await;
        stdin.write_all(b"\x03").await.unwrap();
        let exit = agent.wait("c", "x").await;
        assert_eq!((exit.exit_code, exit.signal), (130, 2));
    });
}
