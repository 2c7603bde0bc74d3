//! A TCP port of the guest's own network, reached from outside.

use nacre_proto::{
    FORWARD_PORT,
    forward::{CONNECTED, Forward, REFUSED},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::agent::{Agent, with_agent};

async fn ask(agent: &Agent, port: u16) -> (UnixStream, u8) {
    let mut connection = agent.connection(FORWARD_PORT).await;
    connection.write_all(&Forward { port }.encode()).await.unwrap();
    let outcome = connection.read_u8().await.unwrap();
    (connection, outcome)
}

#[test]
fn a_server_that_listens_for_its_own_guest_alone_is_reached() {
    with_agent(|agent| async move {
        assert_eq!(ask(&agent, 8080).await.1, REFUSED);
        let server = ["busybox", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/etc"];
        agent.create("c", &server).await;
        agent.start("c", "").await.unwrap();
        let mut connection = loop {
            match ask(&agent, 8080).await {
                (connection, CONNECTED) => break connection,
                (_connection, outcome) => assert_eq!(outcome, REFUSED),
            }
            tokio::task::yield_now().await;
        };
        connection.write_all(b"GET /passwd HTTP/1.0\r\n\r\n").await.unwrap();
        connection.shutdown().await.unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("root:x:0:0:root:/:/bin/sh\n"), "{answer}");
    });
}
