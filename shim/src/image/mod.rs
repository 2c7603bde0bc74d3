//! OCI images: finding the manifest for this machine, reading the configuration, and unpacking the
//! layers into a cache that is keyed by the manifest's digest.
//!
//! Only what the container needs is read; nothing is fetched. An image is untrusted.

pub mod accounts;
pub mod beneath;
pub mod layer;
pub mod source;

use std::{
    fs::{self, DirBuilder, File},
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use flate2::bufread::MultiGzDecoder;
use nacre_proto::exit::RunExit;
use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os,
};
use ruzstd::decoding::StreamingDecoder;

use crate::lock;

pub use layer::LayerError;
use layer::{Pass, Target};
pub use source::{Cancel, SourceError};
use source::{Compression, Source};

/// How deep an index may lead to other indexes.
const MAX_INDEX_DEPTH: usize = 4;
/// How long another process that unpacks an image may take.
const UNPACKED_WITHIN: Duration = Duration::from_secs(600);
/// The most layers of one image; the specification sets none.
const MAX_LAYERS: usize = 256;

/// Why an image can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A part of it can't be had.
    #[error("image {}", path.display())]
    Source {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: SourceError,
    },
    /// It is for other machines only.
    #[error("image {} has no manifest for linux on amd64", .0.display())]
    NoManifest(PathBuf),
    /// It has too many layers.
    #[error("image {} has {count} layers", path.display())]
    TooManyLayers {
        /// The image.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// A layer can't be applied.
    #[error("image {}: layer {digest}", path.display())]
    Layer {
        /// The image.
        path: PathBuf,
        /// The layer.
        digest: String,
        /// What is wrong.
        source: LayerError,
    },
    /// The cache can't be used.
    #[error("image cache {}", path.display())]
    Cache {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ImageError {
    /// The exit code of a command that fails by it.
    #[must_use]
    pub fn exit(&self) -> RunExit {
        if let Self::Cache { .. } = self { RunExit::Setup } else { RunExit::RootFs }
    }
}

/// What an image asks for its container, if nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Always run.
    pub entrypoint: Vec<String>,
    /// Run after the entry point unless a command is given.
    pub command: Vec<String>,
    /// `user`, `user:group`, or empty.
    pub user: String,
    /// Empty is `/`.
    pub working_dir: String,
}

/// An image, opened and not yet unpacked.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    source: Source,
    /// Hexadecimal; the cache's key.
    digest: String,
    layers: Vec<Descriptor>,
    /// What it asks for its container.
    pub defaults: ImageDefaults,
}

impl Image {
    /// Opens the OCI layout at `path`, a folder or an uncompressed tar archive.
    ///
    /// # Errors
    ///
    /// Fails if it is no image for this machine.
    pub fn open(path: &Path, cancel: Cancel) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Source { path: path.to_owned(), source };
        let source = Source::open(path, cancel).map_err(failed)?;
        let manifest_blob = find_manifest(&source)
            .map_err(failed)?
            .ok_or_else(|| ImageError::NoManifest(path.to_owned()))?;
        let manifest: ImageManifest = source.document(&manifest_blob).map_err(failed)?;
        let config: ImageConfiguration = source.document(manifest.config()).map_err(failed)?;
        let layers = manifest.layers().clone();
        if layers.len() > MAX_LAYERS {
            return Err(ImageError::TooManyLayers { path: path.to_owned(), count: layers.len() });
        }
        Ok(Self {
            path: path.to_owned(),
            source,
            digest: manifest_blob.digest().digest().to_owned(),
            layers,
            defaults: defaults(&config),
        })
    }

    /// The folder with the image's file system, unpacked below `cache` unless it is there already.
    ///
    /// # Errors
    ///
    /// Fails if a layer is damaged or hostile, or the cache can't be written. Nothing half-done
    /// is left.
    pub fn unpack(&self, cache: &Path) -> Result<PathBuf, ImageError> {
        let images = cache.join("images");
        let failed = |source| ImageError::Cache { path: images.clone(), source };
        let _lock = lock(&images, &self.source.cancel).map_err(failed)?;
        let folder = images.join(&self.digest);
        if folder.is_dir() {
            return Ok(folder);
        }
        // The lock is held, so whatever is here was left by a program that was killed.
        let unfinished = images.join("unfinished");
        remove_if_there(&unfinished).map_err(failed)?;
        DirBuilder::new().mode(0o755).create(&unfinished).map_err(failed)?;
        log::info!("unpacks image {}", self.path.display());
        let unpacked = self.apply_layers(&unfinished);
        if unpacked.is_err() {
            remove_if_there(&unfinished).map_err(failed)?;
        }
        unpacked?;
        fs::rename(&unfinished, &folder).map_err(failed)?;
        Ok(folder)
    }

    fn apply_layers(&self, folder: &Path) -> Result<(), ImageError> {
        let mut target = Target::open(folder)
            .map_err(|source| ImageError::Cache { path: folder.to_owned(), source })?;
        for blob in &self.layers {
            for pass in [Pass::Whiteouts, Pass::Entries] {
                self.apply(&mut target, blob, pass)?;
            }
        }
        Ok(())
    }

    fn apply(&self, target: &mut Target, blob: &Descriptor, pass: Pass) -> Result<(), ImageError> {
        let source = |source| ImageError::Source { path: self.path.clone(), source };
        let layer = |source| ImageError::Layer {
            path: self.path.clone(),
            digest: blob.digest().to_string(),
            source,
        };
        let mut verified = self.source.blob(blob).map_err(source)?;
        let reader = decompressed(&mut verified).map_err(LayerError::Archive).map_err(layer)?;
        let applied = target.apply(reader, pass);
        // A wrong digest explains whatever else was wrong with it.
        verified.finish().map_err(source)?;
        applied.map_err(layer)
    }
}

fn decompressed<'a>(layer: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut layer = BufReader::with_capacity(128 << 10, layer);
    match Compression::of(layer.fill_buf()?) {
        Some(Compression::Gzip) => Ok(Box::new(MultiGzDecoder::new(layer))),
        Some(Compression::Zstandard) => {
            Ok(Box::new(StreamingDecoder::new(layer).map_err(io::Error::other)?))
        }
        None => Ok(Box::new(layer)),
    }
}

fn find_manifest(source: &Source) -> Result<Option<Descriptor>, SourceError> {
    let mut index: ImageIndex = source.index()?;
    for _depth in 0..MAX_INDEX_DEPTH {
        let fits = |blob: &&Descriptor| {
            blob.platform().as_ref().is_none_or(|platform| {
                *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64
            })
        };
        let Some(blob) = index.manifests().iter().find(fits) else { return Ok(None) };
        let is_index = match blob.media_type() {
            MediaType::ImageIndex => true,
            MediaType::Other(name) => name.ends_with(".manifest.list.v2+json"),
            _ => false,
        };
        if !is_index {
            return Ok(Some(blob.clone()));
        }
        index = source.document(blob)?;
    }
    Ok(None)
}

fn defaults(config: &ImageConfiguration) -> ImageDefaults {
    let Some(config) = config.config() else { return ImageDefaults::default() };
    ImageDefaults {
        env: config.env().clone().unwrap_or_default(),
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        command: config.cmd().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
    }
}

fn lock(images: &Path, cancel: &Cancel) -> io::Result<File> {
    DirBuilder::new().recursive(true).mode(0o700).create(images)?;
    lock::exclusive(images, UNPACKED_WITHIN, || cancel.check())
}

fn remove_if_there(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "image_tests.rs"]
pub(crate) mod tests;
