//! `nacre-vsock` and the socket driver of the `virtio-drivers` crate.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use anyhow::{Result, ensure};
use nacre_tests::backend::Backend;
use nacre_tests::hybrid_vsock::connect;
use nacre_tests::machine::Machine;

#[test]
fn bytes_come_back_as_they_went() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let uds = dir.path().join("vsock");
    let path = uds.display().to_string();
    let args = ["--guest-cid", "42", "--uds-path", &path];
    let backend = Backend::start("nacre-vsock", dir.path(), &args)?;
    let mut running = Machine::bare("vsock")?.device("vsock", "vsock", backend.socket()).start()?;
    ensure!(running.until("cid=")? == "42");
    running.until("READY")?;

    let mut stream = connect(&uds, 5000)?;
    let sent: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut writer = stream.try_clone()?;
    let bytes = sent.clone();
    let writing = thread::spawn(move || writer.write_all(&bytes));
    let mut received = vec![0; sent.len()];
    stream.read_exact(&mut received)?;
    ensure!(received == sent, "the echo differs");
    writing.join().expect("the writer does not panic")?;
    stream.shutdown(Shutdown::Both)?;

    let ended = running.wait()?.passed("vsock")?;
    ensure!(ended.value("echoed")? == sent.len().to_string(), "{ended:?}");
    Ok(())
}
