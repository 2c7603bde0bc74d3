//! Where an image's blobs come from: an OCI layout, as a folder or as a tar archive of one.
//!
//! Nothing in an image is believed before its digest is checked. A blob is found by its digest
//! only, and its digest is hexadecimal digits only, so it names no other file.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use oci_spec::image::{Descriptor, DigestAlgorithm};
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use crate::image::beneath::{Beneath, Place};

/// The largest index, manifest or configuration, in bytes.
const MAX_JSON_BYTES: u64 = 4 << 20;
/// The most entries of an archive.
const MAX_ENTRIES: usize = 10_000;

/// Lets another thread call off a long unpacking.
#[derive(Clone, Debug, Default)]
// Shared: the thread that unpacks reads what the one that hears signals writes.
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Calls it off.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails if it was called off.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(io::Error::other("called off")) } else { Ok(()) }
    }
}

/// Why a part of an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is no image.
    #[error("{} can't be read", .0.display())]
    Open(PathBuf, #[source] io::Error),
    /// It is compressed as a whole.
    #[error("{} is compressed: unpack it first", .0.display())]
    Compressed(PathBuf),
    /// It is neither a layout nor an archive of one.
    #[error("{} is no OCI layout: it has no `index.json`", .0.display())]
    NoLayout(PathBuf, #[source] io::Error),
    /// A blob is not there.
    #[error("blob {0}")]
    Blob(String, #[source] io::Error),
    /// A document is malformed.
    #[error("{0} is malformed")]
    Json(String, #[source] serde_json::Error),
    /// The content is not what the digest says.
    #[error("blob {0} has other content than its digest says")]
    Digest(String),
    /// A digest that this program can't check.
    #[error("digest {0} is not SHA-256")]
    Algorithm(String),
}

#[derive(Debug)]
enum Form {
    Folder(Beneath),
    /// Offset and length of each regular file in the archive.
    Archive(File, HashMap<PathBuf, (u64, u64)>),
}

/// An OCI layout.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    form: Form,
    /// Whether it was called off.
    pub(super) cancel: Cancel,
}

impl Source {
    /// Opens the layout at `path`.
    ///
    /// # Errors
    ///
    /// Fails if there is nothing that looks like one.
    pub fn open(path: &Path, cancel: Cancel) -> Result<Self, SourceError> {
        let error = |source| SourceError::Open(path.to_owned(), source);
        let metadata = path.metadata().map_err(error)?;
        let form = if metadata.is_dir() {
            Form::Folder(Beneath::open(path).map_err(error)?)
        } else {
            let file = File::open(path).map_err(error)?;
            let mut magic = [0; 4];
            if file.read_exact_at(&mut magic, 0).is_ok() && Compression::of(&magic).is_some() {
                return Err(SourceError::Compressed(path.to_owned()));
            }
            let index = index(file.try_clone().map_err(error)?).map_err(error)?;
            Form::Archive(file, index)
        };
        Ok(Self { path: path.to_owned(), form, cancel })
    }

    fn file(&self, path: &Path) -> io::Result<Box<dyn Read + '_>> {
        match &self.form {
            Form::Folder(folder) => Ok(Box::new(folder.file(path)?)),
            Form::Archive(file, index) => {
                let (offset, len) = *index.get(path).ok_or(io::ErrorKind::NotFound)?;
                Ok(Box::new(Part { file, offset, left: len }))
            }
        }
    }

    /// The layout's `index.json`, the one document without a digest.
    ///
    /// # Errors
    ///
    /// Fails if it is missing or malformed.
    pub fn index<T: DeserializeOwned>(&self) -> Result<T, SourceError> {
        let error = |source| SourceError::NoLayout(self.path.clone(), source);
        let mut bytes = Vec::new();
        let file = self.file(Path::new("index.json")).map_err(error)?;
        file.take(MAX_JSON_BYTES).read_to_end(&mut bytes).map_err(error)?;
        serde_json::from_slice(&bytes)
            .map_err(|source| SourceError::Json("index.json".to_owned(), source))
    }

    /// A small document.
    ///
    /// # Errors
    ///
    /// Fails if it is missing, too large, not what its digest says, or malformed.
    pub fn document<T: DeserializeOwned>(&self, blob: &Descriptor) -> Result<T, SourceError> {
        let mut bytes = Vec::new();
        let mut reader = self.blob(blob)?;
        let error = |source| SourceError::Blob(blob.digest().to_string(), source);
        reader.by_ref().take(MAX_JSON_BYTES).read_to_end(&mut bytes).map_err(error)?;
        reader.finish()?;
        serde_json::from_slice(&bytes)
            .map_err(|source| SourceError::Json(format!("blob {}", blob.digest()), source))
    }

    /// A blob's bytes, not to be trusted before [`Verified::finish`] says so.
    ///
    /// # Errors
    ///
    /// Fails if it is missing.
    pub fn blob(&self, blob: &Descriptor) -> Result<Verified<'_>, SourceError> {
        let digest = blob.digest();
        if *digest.algorithm() != DigestAlgorithm::Sha256 {
            return Err(SourceError::Algorithm(digest.to_string()));
        }
        let path = Path::new("blobs/sha256").join(digest.digest());
        let file =
            self.file(&path).map_err(|source| SourceError::Blob(digest.to_string(), source))?;
        Ok(Verified {
            file: Box::new(file.take(blob.size())),
            hash: Sha256::new(),
            expected: digest.digest().to_owned(),
            cancel: self.cancel.clone(),
        })
    }
}

fn index(file: File) -> io::Result<HashMap<PathBuf, (u64, u64)>> {
    let mut archive = tar::Archive::new(file);
    let mut files = HashMap::new();
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if files.len() >= MAX_ENTRIES {
            return Err(io::Error::other("too many entries"));
        }
        if let (Some(place), true) =
            (Place::of(&entry.path()?)?, entry.header().entry_type().is_file())
        {
            files.insert(place.folder.join(place.name), (entry.raw_file_position(), entry.size()));
        }
    }
    Ok(files)
}

/// A stretch of a file; reading it moves no other reader.
struct Part<'a> {
    file: &'a File,
    offset: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..len], self.offset)?;
        let read_bytes = u64::try_from(read).unwrap_or_default();
        self.offset += read_bytes;
        self.left -= read_bytes;
        Ok(read)
    }
}

/// Reads a blob and computes its digest on the way.
pub struct Verified<'a> {
    file: Box<dyn Read + 'a>,
    hash: Sha256,
    expected: String,
    cancel: Cancel,
}

impl Verified<'_> {
    /// Reads what is left and checks the digest.
    ///
    /// # Errors
    ///
    /// Fails if it is another one.
    pub fn finish(mut self) -> Result<(), SourceError> {
        io::copy(&mut self, &mut io::sink())
            .map_err(|source| SourceError::Blob(self.expected.clone(), source))?;
        let digest = self.hash.finalize();
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        if digest == self.expected { Ok(()) } else { Err(SourceError::Digest(self.expected)) }
    }
}

impl Read for Verified<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.cancel.check()?;
        let read = self.file.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

/// How bytes are compressed, by how they begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstandard,
}

impl Compression {
    /// By the first bytes.
    #[must_use]
    pub fn of(first: &[u8]) -> Option<Self> {
        match first {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstandard),
            _ => None,
        }
    }
}
