//! The disk: numbered writes, eight at a time, each read back now and then.

use std::fs::File;

use anyhow::Result;
use nacre_tests::blackout::Summary;
use nacre_tests::supervised::Supervised;

use crate::load::Load;

const DISK_BYTES: u64 = 4 << 20;

pub(crate) fn measure(kills: usize) -> Result<Summary> {
    let dir = tempfile::tempdir()?;
    let image = dir.path().join("disk.img");
    File::create(&image)?.set_len(DISK_BYTES)?;
    let mut device = Supervised::new("nacre-blk", &["--disk", &image.display().to_string()])?;
    let mut load = Load::start("blk", &mut device)?;
    let mut summary = load.kill(&mut device, kills)?;
    load.end()?;
    summary.tally = load.last_report()?.tally;
    Ok(summary)
}
