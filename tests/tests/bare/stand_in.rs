//! A disk whose image is gone: its guest gets errors, and never hangs.

use std::fs::{self, File};

use anyhow::{Result, ensure};
use nacre_tests::control::Control;
use nacre_tests::machine::Machine;
use nacre_tests::supervised::Supervised;

#[test]
fn what_a_guest_asks_of_a_disk_that_is_gone_fails_in_a_stand_in() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    File::create(&image)?.set_len(4 << 20)?;
    let path = image.display().to_string();
    let mut disk = Supervised::new("nacre-blk", &["--disk", &path])?;
    let (mut control, theirs) = Control::new()?;
    let machine = Machine::bare("blk-until-it-fails")?.control(theirs);
    let mut running = machine.device_at("disk0", "blk", disk.start()?).start()?;
    running.until("READY")?;
    disk.kill()?;
    control.lost("disk0")?;
    fs::remove_file(&image)?;
    let gone = disk.start().err().map(|error| format!("{error:#}"));
    ensure!(gone.as_ref().is_some_and(|why| why.contains("No such file")), "{gone:?}");
    disk.becomes("nacre-blk", &["--disk", &path, "--stand-in"])?;
    control.reconnect("disk0", &disk.start()?)?;
    let ended = running.wait()?.passed("blk-until-it-fails")?;
    ensure!(ended.value("errors")?.parse::<u64>()? >= 100, "{ended:?}");
    Ok(())
}
