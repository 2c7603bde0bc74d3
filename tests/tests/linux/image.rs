//! `--image`: what an image asks for, its layers, and images that lie.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::artifacts;
use nacre_tests::image::{Layer, Layout, archive};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Answer, User, finish};
use serde_json::json;
use tempfile::TempDir;

const SCRIPT: &str = "echo $FROM_IMAGE $(id -u) $(id -g) $(pwd); echo \"$@\"; ls /opaque; \
    ls -d /old /new /mark 2>/dev/null; true";

/// A folder with room for images and what is unpacked of them.
struct Ground {
    user: User,
    folder: TempDir,
}

impl Ground {
    fn new() -> Result<Self> {
        Ok(Self { user: User::new()?, folder: tempfile::tempdir()? })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, image: &Path, options: &[&str], command: &[&str]) -> Result<Answer> {
        let image = image.display().to_string();
        let options = [&["--image", image.as_str()], options].concat();
        let mut run = self.user.run_command(&options, command)?;
        finish(run.env("NACRE_CACHE", self.path("cache")))
    }

    /// An image that can't be used: one line, and nothing of it is kept or made.
    fn is_refused(&self, image: &Path, tells: &str) -> Result<()> {
        let before = Leftovers::now(self.user.state())?;
        let answer = self.run(image, &[], &["true"])?;
        let answer = answer.code(i32::from(u8::from(RunExit::RootFs)))?.tells(tells)?;
        ensure!(answer.said.lines().count() == 1, "one line: {answer:?}");
        ensure!(fs::read_dir(self.path("cache/images"))?.next().is_none(), "something is kept");
        before.and_nothing_more(self.user.state())
    }
}

#[test]
fn an_image_says_how_its_container_runs() -> Result<()> {
    let ground = Ground::new()?;
    let layout = ground.path("layout");
    let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:1234:1235::/srv:/bin/sh\n";
    let below = Layer::new().file("etc/passwd", passwd).folder("srv").file("old", "x");
    let below = below.folder("opaque").file("opaque/a", "x").file("opaque/b", "x");
    let above = Layer::new().file(".wh.old", "").file("opaque/.wh..wh..opq", "");
    let above = above.file("opaque/c", "x").file("new", "x");
    Layout::new(&layout)?
        .layer(&Layer::of_folder(&artifacts::busybox_rootfs()?)?)?
        .layer(&below)?
        .gzip_layer(&above)?
        .finish(&json!({
            "Env": ["PATH=/bin", "FROM_IMAGE=yes"], "User": "web", "WorkingDir": "/srv",
            "Entrypoint": ["/bin/sh", "-c", SCRIPT, "entry"], "Cmd": ["from", "image"],
        }))?;
    let own = ground.run(&layout, &[], &[])?;
    own.prints("yes 1234 1235 /srv\nfrom image\nc\n/new\n")?;
    let mut unpacked = fs::read_dir(ground.path("cache/images"))?;
    let unpacked = unpacked.next().context("an unpacked image")??.path();
    fs::write(unpacked.join("mark"), "")?;
    // The same image in its other form is the one that is unpacked already.
    let file = ground.path("image.tar");
    archive(&layout, &file)?;
    let options = ["-e", "FROM_IMAGE=no", "--user", "root", "--workdir", "/"];
    let other = ground.run(&file, &options, &["as", "asked"])?;
    other.prints("no 0 0 /\nas asked\nc\n/mark\n/new\n")?;
    Ok(())
}

#[test]
fn a_layer_of_other_content_than_its_digest_says_is_refused() -> Result<()> {
    let ground = Ground::new()?;
    let layout = ground.path("layout");
    let layer = Layer::new().file("file", "x");
    Layout::new(&layout)?.tampered_layer(&layer)?.finish(&json!({}))?;
    ground.is_refused(&layout, "other content than its digest says")
}

#[test]
fn a_hostile_layer_writes_nothing_outside_its_folder() -> Result<()> {
    let ground = Ground::new()?;
    let outside = ground.path("outside");
    fs::create_dir(&outside)?;
    let outside = outside.display().to_string();
    let layers = [
        Layer::new().file("../../evil", "x"),
        Layer::new().file(&format!("{outside}/evil"), "x"),
        Layer::new().link("out", &outside).file("out/evil", "x"),
        Layer::new().link("up", "../../../../../..").file("up/evil", "x"),
        Layer::new().link("evil", &format!("{outside}/evil")).file("evil", "x"),
    ];
    for (number, layer) in layers.iter().enumerate() {
        let layout = ground.path(&format!("layout-{number}"));
        Layout::new(&layout)?.layer(layer)?.finish(&json!({}))?;
        // Whether it is refused or tamed, no sandbox is wanted of it.
        let answer = ground.run(&layout, &["--kernel", "/no/kernel"], &["true"])?;
        let either = [RunExit::RootFs, RunExit::BootFile].map(|exit| i32::from(u8::from(exit)));
        ensure!(answer.code.is_some_and(|code| either.contains(&code)), "{number}: {answer:?}");
        let found = Command::new("find").arg(ground.folder.path()).args(["-name", "evil"]).output();
        let found = String::from_utf8(found?.stdout)?;
        let images = ground.path("cache/images");
        let escaped = found.lines().find(|path| !Path::new(path).starts_with(&images));
        ensure!(escaped.is_none() && !Path::new("/evil").exists(), "{number}: {escaped:?}");
    }
    Ok(())
}
