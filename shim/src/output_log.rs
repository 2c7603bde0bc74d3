//! What a detached container printed, kept for `nacre logs`.
//!
//! A log is a sequence of chunks: stream u8 (1 or 2), three zero bytes, length u32 and nanoseconds
//! since the Unix epoch u64, little-endian, then the bytes. So the order between standard output
//! and error is kept, and no byte of either is changed.

use std::{
    io,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::log_file::CappedFile;

/// The largest log, in bytes; one predecessor of the same size is kept.
pub const CAP_BYTES: u64 = 64 << 20;
const HEADER_BYTES: usize = 16;
/// The largest chunk, in bytes; larger writes are split.
const CHUNK_BYTES: usize = 1 << 20;

/// Which stream a chunk came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard output, and all that a terminal shows.
    Output,
    /// Standard error.
    Error,
}

/// The writing end.
#[derive(Debug)]
pub struct OutputLog(CappedFile);

impl OutputLog {
    /// An empty log.
    ///
    /// # Errors
    ///
    /// Fails as opening a file does.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        Ok(Self(CappedFile::create(path, CAP_BYTES)?))
    }

    /// Appends what `source` printed.
    ///
    /// # Errors
    ///
    /// Fails as writing to a file does.
    pub fn append(&mut self, source: Source, bytes: &[u8]) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        bytes
            .chunks(CHUNK_BYTES)
            .try_for_each(|chunk| self.0.append(&encode(source, now_ns, chunk)))
    }
}

fn encode(source: Source, time_ns: u64, bytes: &[u8]) -> Vec<u8> {
    let len_bytes = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let stream = match source {
        Source::Output => 1,
        Source::Error => 2,
    };
    let mut chunk = vec![stream, 0, 0, 0];
    chunk.extend(len_bytes.to_le_bytes());
    chunk.extend(time_ns.to_le_bytes());
    chunk.extend(bytes);
    chunk
}

/// A log that is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the log is damaged at byte {0}")]
pub struct Damaged(u64);

/// Takes a log apart, in whatever pieces it is read.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    offset_bytes: u64,
}

impl Decoder {
    /// Takes more bytes of the log.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.extend(bytes);
    }

    /// The next whole chunk, if it is there.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are no log.
    pub fn next_chunk(&mut self) -> Result<Option<(Source, Vec<u8>)>, Damaged> {
        let Some((header, rest)) = self.pending.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let source = match header[..4] {
            [1, 0, 0, 0] => Source::Output,
            [2, 0, 0, 0] => Source::Error,
            _ => return Err(Damaged(self.offset_bytes)),
        };
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > CHUNK_BYTES {
            return Err(Damaged(self.offset_bytes));
        }
        if rest.len() < len {
            return Ok(None);
        }
        let bytes = rest[..len].to_vec();
        self.pending.drain(..HEADER_BYTES + len);
        self.offset_bytes += u64::try_from(HEADER_BYTES + len).unwrap_or(u64::MAX);
        Ok(Some((source, bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_read_byte_by_byte_gives_what_was_written() {
        let mut log = encode(Source::Output, 1, b"out\0\xff");
        log.extend(encode(Source::Error, 2, b"err"));
        let mut decoder = Decoder::default();
        let mut chunks = Vec::new();
        for byte in log {
            decoder.feed(&[byte]);
            chunks.extend(decoder.next_chunk().unwrap());
        }
        let expected = [(Source::Output, b"out\0\xff".to_vec()), (Source::Error, b"err".to_vec())];
        assert_eq!(chunks, expected);
    }

    #[test]
    fn bytes_that_are_no_log_are_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(b"something else altogether");
        assert_eq!(decoder.next_chunk(), Err(Damaged(0)));
    }
}
