//! The share: records appended one after the other and read back, files made and removed.

use anyhow::Result;
use nacre_tests::blackout::Summary;
use nacre_tests::supervised::Supervised;

use crate::load::Load;

pub(crate) fn measure(kills: usize) -> Result<Summary> {
    let dir = tempfile::tempdir()?;
    let folder = dir.path().display().to_string();
    let arguments = ["--shared-dir", &folder, "--tag", "bench"];
    let mut device = Supervised::new("nacre-fs", &arguments)?;
    let mut load = Load::start("fs", &mut device)?;
    let mut summary = load.kill(&mut device, kills)?;
    load.end()?;
    summary.tally = load.last_report()?.tally;
    Ok(summary)
}
