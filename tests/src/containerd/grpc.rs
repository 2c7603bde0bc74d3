//! As much of gRPC as one question and one answer take: HTTP/2 by a crate, and the five bytes
//! before each message.
//!
//! Protocol: gRPC's "gRPC over HTTP2". A connection serves one call, so that one that hangs hangs
//! alone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::timeout;

/// Before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// Asks and waits for the answer.
///
/// # Errors
///
/// Fails if the server can't be reached, answers with a status that is not OK (the error is that
/// status), or not within `patience`.
pub(super) fn call<A: Message>(
    socket: &Path,
    method: &str,
    question: &impl Message,
    patience: Duration,
) -> Result<A> {
    let message = question.write_to_bytes()?;
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let answered =
        runtime.block_on(async { timeout(patience, ask(socket, method, &message)).await });
    let bytes = answered.with_context(|| format!("no answer to {method} within {patience:?}"))?;
    let bytes = bytes.with_context(|| method.to_owned())?;
    Ok(A::parse_from_bytes(&bytes)?)
}

async fn ask(socket: &Path, method: &str, message: &[u8]) -> Result<Bytes> {
    let stream = UnixStream::connect(socket).await.context("cannot connect")?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    let serving = tokio::spawn(connection);
    let mut sender = sender.ready().await?;
    let request = Request::post(format!("http://localhost{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut body) = sender.send_request(request, false)?;
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len())?);
    framed.put_slice(message);
    body.send_data(framed.freeze(), true)?;
    let (head, mut body) = answer.await?.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        bytes.extend_from_slice(&part);
    }
    // A failure may come without any message, in the head alone.
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    serving.abort();
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        Some("0") => {}
        status => bail!("status {}: {}", status.unwrap_or("?"), text("grpc-message").unwrap_or("")),
    }
    ensure!(bytes.len() >= PREFIX_BYTES && bytes[0] == 0, "no plain message");
    Ok(bytes.freeze().slice(PREFIX_BYTES..))
}
