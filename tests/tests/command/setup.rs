//! What is made once, and kept for the next run.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nacre_tests::artifacts;
use nacre_tests::image::{Layer, Layout};
use nacre_tests::nacre::finish;
use nacre_tests::xtask::{cache, host_up, xtask};
use serde_json::json;

/// A folder of an unpacked image, removed with the value.
struct Unpacked(PathBuf);

impl Drop for Unpacked {
    fn drop(&mut self) {
        // What stays is an unpacked image in a cache of them.
        drop(fs::remove_dir_all(&self.0));
    }
}

fn unpacked_images() -> Result<BTreeSet<PathBuf>> {
    let Ok(entries) = fs::read_dir(cache()?.join("images")) else { return Ok(BTreeSet::new()) };
    let paths = entries.map(|entry| Ok(entry?.path()));
    let paths: Result<BTreeSet<_>> = paths.collect();
    Ok(paths?.into_iter().filter(|path| path.is_dir()).collect())
}

#[test]
fn an_image_is_unpacked_by_the_first_run_of_it_alone() -> Result<()> {
    host_up()?;
    // Beneath a folder that an emulated host has of its own: there this one has another name.
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let layout = folder.path().join("layout");
    // Its name is in it, so that no earlier test can have unpacked it.
    let name = folder.path().display().to_string();
    Layout::new(&layout)?
        .layer(&Layer::of_folder(&artifacts::busybox_rootfs()?)?)?
        .layer(&Layer::new().file("name", &name))?
        .finish(&json!({"Cmd": ["/bin/sh", "-c", "cat /name; ls /mark 2>/dev/null"]}))?;
    let path = layout.display().to_string();
    let before = unpacked_images()?;
    let answer = finish(&mut xtask(&["run", "--image", &path])?)?;
    let new: Vec<_> = unpacked_images()?.difference(&before).cloned().collect();
    ensure!(new.len() == 1, "not one unpacked image in the cache: {new:?}, {answer:?}");
    let unpacked = Unpacked(new.into_iter().next().context("an unpacked image")?);
    ensure!(answer.out == name, "{answer:?}");
    fs::write(unpacked.0.join("mark"), "")?;
    let answer = finish(&mut xtask(&["run", "--image", &path])?)?;
    answer.prints(&format!("{name}/mark\n"))?;
    Ok(())
}
