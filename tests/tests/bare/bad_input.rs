//! What the VMM refuses: one clear line that says what and where, and a code of its own.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_tests::artifacts;
use nacre_tests::process::Process;

fn refused(args: &[&str], exit: VmmExit, tells: &str) -> Result<()> {
    let program = artifacts::program("nacre-vmm")?;
    let mut command = Command::new(&program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
    let (status, said) = Process::start(&program, &mut command)?.wait()?;
    ensure!(status.code() == Some(i32::from(u8::from(exit))), "{args:?}: {status}: {said}");
    ensure!(said.contains(tells), "{args:?} should tell of {tells:?}: {said}");
    Ok(())
}

fn with_guest(args: &[&str], exit: VmmExit, tells: &str) -> Result<()> {
    let guest = artifacts::bare_guest()?.display().to_string();
    let mut all = vec!["--kernel", guest.as_str(), "--cmdline", "test=hello"];
    all.extend(args);
    refused(&all, exit, tells)
}

#[test]
fn a_missing_kernel_is_named() -> Result<()> {
    let args = ["--kernel", "/no/such/kernel", "--cpus", "1", "--memory", "64M"];
    refused(&args, VmmExit::BootFile, "/no/such/kernel")
}

#[test]
fn an_empty_kernel_is_named() -> Result<()> {
    let empty = tempfile::NamedTempFile::new()?;
    let path = empty.path().display().to_string();
    refused(&["--kernel", &path, "--cpus", "1", "--memory", "64M"], VmmExit::BootFile, &path)
}

#[test]
fn a_kernel_of_garbage_is_named() -> Result<()> {
    let garbage = tempfile::NamedTempFile::new()?;
    std::fs::write(garbage.path(), vec![0xa5; 1 << 20])?;
    let path = garbage.path().display().to_string();
    refused(&["--kernel", &path, "--cpus", "1", "--memory", "64M"], VmmExit::BootFile, &path)
}

#[test]
fn a_missing_initramfs_is_named() -> Result<()> {
    let args = ["--initramfs", "/no/such/initramfs", "--cpus", "1", "--memory", "64M"];
    with_guest(&args, VmmExit::BootFile, "/no/such/initramfs")
}

#[test]
fn no_memory_is_refused() -> Result<()> {
    with_guest(&["--memory", "0"], VmmExit::Memory, "a guest needs memory: --memory is 0")
}

#[test]
fn more_memory_than_the_host_or_than_a_guest_can_address_is_refused() -> Result<()> {
    let info = rustix::system::sysinfo();
    let host_bytes = u64::from(info.mem_unit) * (info.totalram + info.totalswap);
    let too_much = ((host_bytes >> 21) + 1) << 21;
    let tells = format!(
        "no guest memory: --memory of {too_much} bytes is more than the host's memory and swap of \
         {host_bytes} bytes"
    );
    with_guest(&["--memory", &too_much.to_string()], VmmExit::Memory, &tells)?;
    // 2 to the 46th, which no guest is given more of.
    let tells = "bytes that a guest with ";
    with_guest(&["--memory", "64T"], VmmExit::Memory, tells)
}

#[test]
fn more_processors_than_kvm_allows_are_refused() -> Result<()> {
    with_guest(&["--cpus", "60000"], VmmExit::Cpus, "60000 vCPUs are more than the ")
}

#[test]
fn no_processor_is_a_wrong_command_line() -> Result<()> {
    with_guest(&["--cpus", "0", "--memory", "64M"], VmmExit::Usage, "cpus")
}

#[test]
fn an_unknown_flag_is_a_wrong_command_line() -> Result<()> {
    with_guest(&["--no-such-flag"], VmmExit::Usage, "--no-such-flag")
}
