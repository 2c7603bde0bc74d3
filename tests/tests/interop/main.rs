//! With software that none of us wrote: our backends under QEMU, our VMM on QEMU's storage daemon.
//! It runs on any machine: QEMU emulates its guest, and the guest without a kernel needs no more
//! than a /dev/kvm that emulates.

mod foreign;
mod guest;
mod nic;
mod ping;
mod reconnect;

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nacre_tests::artifacts;
use nacre_tests::machine::Machine;
use nacre_tests::nacre::{User, finish};
use nacre_tests::process::{Process, until};
use tempfile::TempDir;

/// How many seconds QEMU's guest may boot without a sign of progress.
const BOOT_PATIENCE: &str = "60";

/// A folder of programs in which QEMU stands in the place of `nacre-vmm`.
fn programs_with_qemu() -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    let real = artifacts::bin_dir()?;
    for name in ["nacre-blk", "nacre-net", "nacre-fs", "nacre-vsock"] {
        symlink(real.join(name), dir.path().join(name))?;
    }
    symlink(artifacts::program("qemu-as-vmm")?, dir.path().join("nacre-vmm"))?;
    Ok(dir)
}

#[test]
fn qemu_runs_a_container_on_our_fs_and_vsock() -> Result<()> {
    let bin = programs_with_qemu()?;
    let bin = bin.path().display().to_string();
    let options = ["--bin-dir", &bin, "--agent-timeout", BOOT_PATIENCE];
    let answer = User::new()?.run(&options, &["sh", "-c", "echo hello; exit 3"])?.code(3)?;
    ensure!(answer.out == "hello\n", "{answer:?}");
    Ok(())
}

#[test]
fn qemu_reads_and_writes_our_disk_and_reaches_the_network_through_our_nic() -> Result<()> {
    let bin = programs_with_qemu()?;
    let bin = bin.path().display().to_string();
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk.img");
    fs::write(&disk, vec![b'a'; 1 << 20])?;
    let path = disk.display().to_string();
    let script = "dd if=/dev/disk-0 bs=1M 2>/dev/null | md5sum | cut -d' ' -f1; \
        echo from-qemu | dd of=/dev/disk-0 conv=sync,fsync bs=512 seek=4 2>/dev/null; \
        ping -c 2 -W 20 $(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') >/dev/null && echo pong";
    let options = ["--bin-dir", &bin, "--agent-timeout", BOOT_PATIENCE, "--disk", &path, "--net"];
    let expected = Command::new("md5sum").arg(&disk).output()?;
    let expected = String::from_utf8(expected.stdout)?;
    let mut command = User::new()?.run_command(&options, &["sh", "-c", script])?;
    let answer = finish(&mut command)?.code(0)?;
    let sum = expected.split(' ').next().context("a sum")?;
    ensure!(answer.out == format!("{sum}\npong\n"), "{answer:?}");
    ensure!(fs::read(&disk)?[4 * 512..].starts_with(b"from-qemu"), "not in the file");
    Ok(())
}

#[test]
fn the_vmm_uses_qemus_storage_daemon() -> Result<()> {
    let daemon = env::var("NACRE_QSD").context("NACRE_QSD: run `cargo xtask test interop`")?;
    let dir = tempfile::tempdir()?;
    let (disk, socket) = (dir.path().join("disk.img"), dir.path().join("qsd.sock"));
    fs::write(&disk, b"written by the host")?;
    fs::File::options().write(true).open(&disk)?.set_len(4 << 20)?;
    let mut words = daemon.split_whitespace();
    let program = words.next().context("NACRE_QSD is empty")?;
    let mut command = Command::new(program);
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    command.args(words).args(["--blockdev"]);
    command.arg(format!("driver=file,node-name=d,filename={}", disk.display()));
    command.args(["--export", &export]).stdout(Stdio::null());
    let _daemon = Process::start(Path::new(program), &mut command)?;
    until("the storage daemon's socket", || Ok(socket.exists()))?;
    let ended = Machine::bare("blk")?.device("disk0", "blk", &socket).run()?.passed("blk")?;
    ensure!(ended.value("sector0")? == "written by the host", "{ended:?}");
    Ok(())
}
