//! Writes the archive that a Linux kernel unpacks as its initial root (cpio, format "newc").
//!
//! Format: linux Documentation/driver-api/early-userspace/buffer-format.rst. Inode numbers count
//! up, times and owners are zero: equal content gives equal bytes.

use std::io::{self, Write};

const MAGIC: &str = "070701";
const TYPE_FOLDER: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_LINK: u32 = 0o120_000;
const TYPE_CHARACTER: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

/// An archive under construction. Parents come before what they contain; the writer does not add
/// them.
#[derive(Debug)]
pub struct Archive<W: Write> {
    sink: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    /// Starts an archive in the given sink.
    pub fn new(sink: W) -> Self {
        Self { sink, entries: 0 }
    }

    /// Adds a folder.
    ///
    /// # Errors
    /// The sink cannot be written.
    pub fn folder(&mut self, path: &str) -> io::Result<()> {
        self.record(path, TYPE_FOLDER | 0o755, (0, 0), &[])
    }

    /// Adds a file with the given permission bits.
    ///
    /// # Errors
    /// The sink cannot be written, or the content is 4 GiB or more.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.record(path, TYPE_FILE | (permissions & 0o7777), (0, 0), content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// The sink cannot be written.
    pub fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.record(path, TYPE_LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device, which the kernel's own console needs before devtmpfs is mounted.
    ///
    /// # Errors
    /// The sink cannot be written.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.record(path, TYPE_CHARACTER | 0o600, (major, minor), &[])
    }

    /// Ends the archive and returns the sink.
    ///
    /// # Errors
    /// The sink cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.record(TRAILER, 0, (0, 0), &[])?;
        self.sink.flush()?;
        Ok(self.sink)
    }

    fn record(
        &mut self,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        let too_large = |_| io::Error::new(io::ErrorKind::FileTooLarge, path.to_owned());
        let content_bytes = u32::try_from(content.len()).map_err(too_large)?;
        let name_bytes = u32::try_from(path.len() + 1).map_err(too_large)?;
        self.entries += 1;
        let links = if mode & 0o170_000 == TYPE_FOLDER { 2 } else { 1 };
        let (major, minor) = device;
        // inode, mode, uid, gid, nlink, mtime, filesize, dev (2), rdev (2), namesize, check
        let fields =
            [self.entries, mode, 0, 0, links, 0, content_bytes, 0, 0, major, minor, name_bytes, 0];
        let mut header = MAGIC.to_owned();
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.sink.write_all(header.as_bytes())?;
        self.sink.write_all(path.as_bytes())?;
        self.sink.write_all(&[0])?;
        self.pad(header.len() + path.len() + 1)?;
        self.sink.write_all(content)?;
        self.pad(content.len())
    }

    /// Headers with their name, and contents, each end on a multiple of four bytes.
    fn pad(&mut self, written_bytes: usize) -> io::Result<()> {
        self.sink.write_all(&[0; 3][..written_bytes.next_multiple_of(4) - written_bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.folder("/dev").unwrap();
        archive.character_device("/dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"hello").unwrap();
        archive.link("sh", "init").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn a_file_record_has_its_mode_its_size_and_aligned_content() {
        let bytes = archive();
        let text = String::from_utf8_lossy(&bytes);
        let start = text.find("init\0").unwrap() - 110;
        let header = &text[start..start + 110];
        assert!(header.starts_with(MAGIC));
        assert_eq!(&header[14..22], "000081ed");
        assert_eq!(&header[54..62], "00000005");
        assert_eq!(start % 4, 0);
        let content = (start + 110 + 5).next_multiple_of(4);
        assert_eq!(&bytes[content..content + 8], b"hello\0\0\0");
    }

    #[test]
    fn an_archive_ends_with_its_trailer_on_a_word() {
        let bytes = archive();
        assert_eq!(bytes.len() % 4, 0);
        assert!(String::from_utf8_lossy(&bytes).trim_end_matches('\0').ends_with(TRAILER));
    }

    #[test]
    fn equal_content_gives_equal_bytes() {
        assert_eq!(archive(), archive());
    }
}
