//! Standard streams, byte for byte.

use std::time::Duration;

use nacre_proto::stream::Stream;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::agent::{LIMIT, with_agent};

const TEN_MIB: usize = 10 << 20;

#[test]
fn ten_mebibytes_arrive_unchanged() {
    with_agent(|agent| async move {
        let expected: Vec<u8> =
            (0..TEN_MIB).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
        std::fs::write(agent.root().join("tmp/data"), &expected).unwrap();
        agent.create("c", &["cat", "/tmp/data"]).await;
        agent.start("c", "").await.unwrap();
        let bytes = agent.all_of("c", "", Stream::Stdout).await;
        assert_eq!(bytes.len(), TEN_MIB);
        assert!(bytes == expected);
        assert_eq!(agent.wait("c", "").await.exit_code, 0);
    });
}

#[test]
fn ten_mebibytes_go_in_and_come_back() {
    with_agent(|agent| async move {
        agent.create("c", &["cat"]).await;
        agent.start("c", "").await.unwrap();
        let sent: Vec<u8> = (0..TEN_MIB).map(|at| u8::try_from(at * 11 % 253).unwrap()).collect();
        let mut stdin = agent.stream("c", "", Stream::Stdin, 0).await;
        let send = async {
            stdin.write_all(&sent).await.unwrap();
            stdin.shutdown().await.unwrap();
        };
        let ((), back) = tokio::join!(send, agent.all_of("c", "", Stream::Stdout));
        assert!(back == sent);
        assert_eq!(agent.wait("c", "").await.exit_code, 0);
    });
}

#[test]
fn without_a_reader_a_process_is_held_back_and_loses_nothing() {
    with_agent(|agent| async move {
        agent.create("c", &["sh", "-c", "dd if=/dev/zero bs=65536 count=64 2>/dev/null"]).await;
        agent.start("c", "").await.unwrap();
        let early = timeout(Duration::from_millis(300), agent.wait("c", "")).await;
        assert!(early.is_err(), "4 MiB do not fit into a pipe");
        assert_eq!(agent.all_of("c", "", Stream::Stdout).await.len(), 4 << 20);
        assert_eq!(agent.wait("c", "").await.exit_code, 0);
    });
}

#[test]
fn an_output_resumes_at_an_offset_after_its_connection_is_lost() {
    with_agent(|agent| async move {
        let script = "echo 0123456789; cat; echo end";
        agent.create("c", &["sh", "-c", script]).await;
        agent.start("c", "").await.unwrap();
        let mut first = agent.stream("c", "", Stream::Stdout, 0).await;
        let mut bytes = [0; 11];
        first.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"0123456789\n");
        drop(first);
        let mut second = agent.stream("c", "", Stream::Stdout, 5).await;
        let mut stdin = agent.stream("c", "", Stream::Stdin, 0).await;
        stdin.write_all(b"more\n").await.unwrap();
        stdin.shutdown().await.unwrap();
        let mut rest = String::new();
        timeout(LIMIT, second.read_to_string(&mut rest)).await.unwrap().unwrap();
        assert_eq!(rest, "56789\nmore\nend\n");
        let mut third = agent.stream("c", "", Stream::Stdout, 17).await;
        let mut rest = String::new();
        third.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "nd\n");
    });
}

#[test]
fn an_input_that_is_not_wanted_is_empty() {
    with_agent(|agent| async move {
        let mut request = crate::agent::request("c", &agent.spec(&["cat"]));
        request.stdin = false;
        agent.create_with(request).await.unwrap();
        agent.start("c", "").await.unwrap();
        assert_eq!(agent.wait("c", "").await.exit_code, 0);
    });
}

#[test]
fn a_hello_that_makes_no_sense_is_hung_up_on() {
    with_agent(|agent| async move {
        for (id, stream, offset) in
            [("nobody", Stream::Stdout, 0), ("..", Stream::Stdout, 0), ("c", Stream::Stdout, 9)]
        {
            if id == "c" {
                agent.create("c", &["sleep", "1000"]).await;
            }
            let mut connection = agent.stream(id, "", stream, offset).await;
            let mut bytes = Vec::new();
            let read = timeout(LIMIT, connection.read_to_end(&mut bytes)).await.unwrap();
            assert!(read.is_err() || bytes.is_empty(), "{id}");
        }
    });
}

#[test]
fn a_programs_own_user_may_open_its_streams_again() {
    with_agent(|agent| async move {
        let mut spec = agent.spec(&["sh", "-c", "echo again > /proc/self/fd/1; id -u"]);
        spec["process"]["user"] = serde_json::json!({ "uid": 1000, "gid": 1000 });
        let (text, exit) = agent.run("c", &spec).await;
        assert_eq!((text.as_str(), exit.exit_code), ("again\n1000\n", 0));
    });
}
