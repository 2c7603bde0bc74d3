//! OCI images as their specification describes them, written byte by byte: layers may be hostile.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// tar's unit, in bytes.
const BLOCK_BYTES: usize = 512;
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layer, as an uncompressed tar archive (POSIX.1-1988, "ustar").
#[derive(Clone, Debug, Default)]
pub struct Layer {
    archive: Vec<u8>,
}

impl Layer {
    /// One with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One with all that is in a folder.
    ///
    /// # Errors
    ///
    /// Fails if tar(1) does.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let mut tar = Command::new("tar");
        tar.args(["--owner=0", "--group=0", "-c", "-C"]).arg(folder).arg(".");
        Ok(Self { archive: filtered(&mut tar, &[])? })
    }

    /// Adds a folder.
    #[must_use]
    pub fn folder(self, name: &str) -> Self {
        self.entry(name, b'5', "", b"")
    }

    /// Adds a file; its name is not looked at.
    #[must_use]
    pub fn file(self, name: &str, content: &str) -> Self {
        self.entry(name, b'0', "", content.as_bytes())
    }

    /// Adds a symbolic link; neither name nor target is looked at.
    #[must_use]
    pub fn link(self, name: &str, target: &str) -> Self {
        self.entry(name, b'2', target, b"")
    }

    fn entry(mut self, name: &str, kind: u8, target: &str, content: &[u8]) -> Self {
        let mut header = [b' '; BLOCK_BYTES];
        let mut put = |at: usize, len: usize, text: &str| {
            header[at..at + len].fill(0);
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
        };
        put(0, 100, name);
        put(100, 8, if kind == b'0' { "0000644" } else { "0000755" });
        put(108, 8, "0000000");
        put(116, 8, "0000000");
        put(124, 12, &format!("{:011o}", content.len()));
        put(136, 12, "00000000000");
        put(157, 100, target);
        put(257, 8, "ustar\x0000");
        put(265, BLOCK_BYTES - 265, "");
        header[156] = kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.archive.extend(header);
        self.archive.extend(content);
        self.archive.resize(self.archive.len().next_multiple_of(BLOCK_BYTES), 0);
        self
    }

    fn finished(&self) -> Vec<u8> {
        let mut archive = self.archive.clone();
        archive.extend([0; 2 * BLOCK_BYTES]);
        archive
    }
}

/// An image's layout in a folder.
#[derive(Debug)]
pub struct Layout<'a> {
    folder: &'a Path,
    layers: Vec<Value>,
    /// The digests of the layers as they are without compression.
    diff_ids: Vec<String>,
    name: Option<&'a str>,
}

impl<'a> Layout<'a> {
    /// One without layers.
    ///
    /// # Errors
    ///
    /// Fails if the folder can't be made.
    pub fn new(folder: &'a Path) -> Result<Self> {
        fs::create_dir_all(folder.join("blobs/sha256"))?;
        fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self { folder, layers: Vec::new(), diff_ids: Vec::new(), name: None })
    }

    /// Gives the image a name, by which containerd knows it once it is imported.
    #[must_use]
    pub fn named(mut self, name: &'a str) -> Self {
        self.name = Some(name);
        self
    }

    /// Adds a layer as it is.
    ///
    /// # Errors
    ///
    /// Fails if it can't be written.
    pub fn layer(mut self, layer: &Layer) -> Result<Self> {
        let content = layer.finished();
        self.diff_ids.push(digest(&content)?);
        let blob = self.blob(LAYER, &content)?;
        self.layers.push(blob);
        Ok(self)
    }

    /// Adds a layer compressed by gzip(1).
    ///
    /// # Errors
    ///
    /// Fails if it can't be written.
    pub fn gzip_layer(mut self, layer: &Layer) -> Result<Self> {
        let content = layer.finished();
        self.diff_ids.push(digest(&content)?);
        let packed = filtered(Command::new("gzip").arg("-c"), &content)?;
        let blob = self.blob(&format!("{LAYER}+gzip"), &packed)?;
        self.layers.push(blob);
        Ok(self)
    }

    /// Adds a layer whose blob then becomes something else of the same length.
    ///
    /// # Errors
    ///
    /// Fails if it can't be written.
    pub fn tampered_layer(self, layer: &Layer) -> Result<Self> {
        let layout = self.layer(layer)?;
        let digest = layout.layers.last().context("the layer")?["digest"].clone();
        let hex = digest.as_str().unwrap_or_default().trim_start_matches("sha256:").to_owned();
        let blob = layout.folder.join("blobs/sha256").join(hex);
        let mut bytes = fs::read(&blob)?;
        // In the time of the first entry, where the archive is none the worse for it.
        bytes[140] = b'1';
        fs::write(blob, bytes)?;
        Ok(layout)
    }

    /// Writes manifest and index; `config` is what the image asks for its container.
    ///
    /// # Errors
    ///
    /// Fails if they can't be written.
    pub fn finish(self, config: &Value) -> Result<()> {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
        });
        let kind = "application/vnd.oci.image.config.v1+json";
        let config = self.blob(kind, config.to_string().as_bytes())?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "config": config, "layers": self.layers,
        });
        let mut manifest = self.blob(kind, manifest.to_string().as_bytes())?;
        if let Some(name) = self.name {
            manifest["annotations"] = json!({"io.containerd.image.name": name});
        }
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(self.folder.join("index.json"), index.to_string())?;
        Ok(())
    }

    fn blob(&self, kind: &str, content: &[u8]) -> Result<Value> {
        let digest = digest(content)?;
        let file = digest.trim_start_matches("sha256:");
        fs::write(self.folder.join("blobs/sha256").join(file), content)?;
        Ok(json!({"mediaType": kind, "digest": digest, "size": content.len()}))
    }
}

/// The layout in `folder` as one tar archive.
///
/// # Errors
///
/// Fails if tar(1) does.
pub fn archive(folder: &Path, to: &Path) -> Result<()> {
    let status = Command::new("tar").arg("-cf").arg(to).arg("-C").arg(folder).arg(".").status()?;
    ensure!(status.success(), "tar: {status}");
    File::open(to)?.sync_all()?;
    Ok(())
}

fn digest(content: &[u8]) -> Result<String> {
    let sum = String::from_utf8(filtered(&mut Command::new("sha256sum"), content)?)?;
    Ok(format!("sha256:{}", sum.split(' ').next().context("a digest")?))
}

fn filtered(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("standard input")?;
    let input = input.to_owned();
    let writer = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output()?;
    let written = writer.join().ok().context("the writer")?;
    written.context("a filter's input")?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(output.stdout)
}
