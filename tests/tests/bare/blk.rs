//! `nacre-blk` and the virtio-blk driver of the `virtio-drivers` crate.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use nacre_proto::exit::VmmExit;
use nacre_tests::backend::Backend;
use nacre_tests::machine::{Ended, Machine};

const DISK_BYTES: u64 = 4 << 20;

fn disk(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("disk.img");
    fs::write(&path, b"written by the host")?;
    fs::File::options().write(true).open(&path)?.set_len(DISK_BYTES)?;
    Ok(path)
}

fn backend(dir: &Path, disk: &Path) -> Result<Backend> {
    let disk = disk.display().to_string();
    Backend::start("nacre-blk", dir, &["--disk", &disk, "--serial", "bare0"])
}

fn passes(name: &str) -> Result<(Ended, Vec<u8>)> {
    let dir = tempfile::tempdir()?;
    let image = disk(dir.path())?;
    let backend = backend(dir.path(), &image)?;
    let machine = Machine::bare(name)?.device("disk0", "blk", backend.socket());
    let ended = machine.run()?.passed(name)?;
    let (code, said) = backend.stop()?;
    ensure!(code == Some(0), "the backend ended with {code:?}: {said}");
    Ok((ended, fs::read(image)?))
}

#[test]
fn what_the_guest_writes_is_in_the_file_and_what_the_host_wrote_is_read() -> Result<()> {
    let (ended, image) = passes("blk")?;
    ensure!(ended.value("capacity")? == (DISK_BYTES / 512).to_string(), "{ended:?}");
    ensure!(ended.value("sector0")? == "written by the host", "{ended:?}");
    ensure!(ended.value("serial")?.trim_end_matches('\0') == "bare0", "{ended:?}");
    let long = &image[8 * 512..8 * 512 + (64 << 10)];
    ensure!(long.iter().all(|byte| *byte == 0x5a), "the long write is not in the file");
    Ok(())
}

#[test]
fn completions_interrupt_by_msix_and_masked_ones_wait() -> Result<()> {
    passes("blk-interrupts").map(drop)
}

#[test]
fn a_device_reset_leaves_the_disk_usable() -> Result<()> {
    passes("blk-reset").map(drop)
}

#[test]
fn a_machine_reset_keeps_the_backends_connection() -> Result<()> {
    let (ended, _) = passes("blk-reboot")?;
    ensure!(ended.guest.iter().any(|line| line == "second boot"), "{ended:?}");
    Ok(())
}

#[test]
fn one_backend_serves_one_machine_after_another() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = disk(dir.path())?;
    let backend = backend(dir.path(), &image)?;
    for _ in 0..3 {
        Machine::bare("blk")?.device("disk0", "blk", backend.socket()).run()?;
        fs::write(&image, b"written by the host")?;
        fs::File::options().write(true).open(&image)?.set_len(DISK_BYTES)?;
    }
    let last = Machine::bare("blk-reset")?.device("disk0", "blk", backend.socket()).run()?;
    last.passed("blk-reset")?;
    Ok(())
}

#[test]
fn a_backend_that_is_not_there_has_its_own_code() -> Result<()> {
    let ended = Machine::bare("hello")?.device("disk0", "blk", Path::new("/nowhere.sock")).run()?;
    ensure!(ended.ended(VmmExit::Backend), "{ended:#?}");
    ensure!(ended.said.contains("/nowhere.sock"), "{}", ended.said);
    Ok(())
}
