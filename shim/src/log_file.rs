//! Files that take what untrusted or chatty parties print: bounded in size, private, and read
//! back only after everything a terminal would obey is taken out.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// How much of a file's end [`tail`] looks at, in bytes.
const TAIL_BYTES: u64 = 16 << 10;
/// The longest line that is shown, in characters.
const LINE_CHARS: usize = 400;

/// Makes an empty file that only its owner can read, to be appended to.
///
/// # Errors
///
/// Fails as opening a file does.
pub fn create(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    file.set_len(0)?;
    Ok(file)
}

/// Opens a file that only its owner can read, to be appended to; what is in it goes to its
/// predecessor if it is more than `cap_bytes`. Also the place where it goes on.
///
/// # Errors
///
/// Fails as opening a file does.
pub fn go_on(path: &Path, cap_bytes: u64) -> io::Result<(File, u64)> {
    let open = || OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    let mut file = open()?;
    if file.metadata()?.len() > cap_bytes {
        fs::rename(path, predecessor(path))?;
        file = open()?;
    }
    let len_bytes = file.metadata()?.len();
    Ok((file, len_bytes))
}

/// A file of at most `cap` bytes and one predecessor of the same size, `<path>.1`.
#[derive(Debug)]
pub struct CappedFile {
    path: PathBuf,
    file: File,
    written_bytes: u64,
    cap_bytes: u64,
}

impl CappedFile {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// Fails as opening a file does.
    pub fn create(path: PathBuf, cap_bytes: u64) -> io::Result<Self> {
        let file = create(&path)?;
        Ok(Self { path, file, written_bytes: 0, cap_bytes })
    }

    /// Appends `bytes` in one piece.
    ///
    /// # Errors
    ///
    /// Fails as writing to a file does.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len_bytes = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if self.written_bytes > 0 && self.written_bytes.saturating_add(len_bytes) > self.cap_bytes {
            fs::rename(&self.path, predecessor(&self.path))?;
            self.file = create(&self.path)?;
            self.written_bytes = 0;
        }
        self.file.write_all(bytes)?;
        self.written_bytes = self.written_bytes.saturating_add(len_bytes);
        Ok(())
    }
}

/// Where the part of a capped file goes that no longer fits.
#[must_use]
pub fn predecessor(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

/// The last `lines` lines that are not empty, fit for a terminal; `None` if there are none.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> Option<String> {
    tail_from(path, 0, lines)
}

/// The same, of what comes after the first `start_bytes`.
#[must_use]
pub fn tail_from(path: &Path, start_bytes: u64, lines: usize) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let len_bytes = file.metadata().ok()?.len();
    let start_bytes = start_bytes.max(len_bytes.saturating_sub(TAIL_BYTES));
    file.seek(SeekFrom::Start(start_bytes)).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let mut last: Vec<String> = text
        .lines()
        .rev()
        .map(printable)
        .filter(|line| !line.trim().is_empty())
        .take(lines)
        .collect();
    last.reverse();
    if last.is_empty() { None } else { Some(last.join("\n")) }
}

/// What follows `start` in the last line that has it, among the last of the file; fit for a terminal.
#[must_use]
pub fn last_after(path: &Path, start: &str) -> Option<String> {
    let text = tail(path, usize::MAX)?;
    let rest = text.lines().rev().find_map(|line| line.split_once(start))?.1;
    Some(rest.to_owned())
}

/// One line of `text`, without control characters and of bounded length.
#[must_use]
pub fn printable(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => ' ',
        c if c.is_control() => '?',
        c => c,
    };
    text.trim_end().chars().take(LINE_CHARS).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capped_file_never_grows_past_its_cap() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut file = CappedFile::create(path.clone(), 10).unwrap();
        for text in ["123456", "abcdef", "ABCDEF"] {
            file.append(text.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "ABCDEF");
        assert_eq!(fs::read_to_string(predecessor(&path)).unwrap(), "abcdef");
    }

    #[test]
    fn a_file_goes_on_until_it_is_too_large() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        for (text, at, last) in [("one\n", 0, "one"), ("two\n", 4, "two"), ("x\n", 0, "x")] {
            let (mut file, start) = go_on(&path, 6).unwrap();
            assert_eq!((start, tail_from(&path, start, 1)), (at, None));
            file.write_all(text.as_bytes()).unwrap();
            assert_eq!(tail_from(&path, start, 9).unwrap(), last);
        }
        assert_eq!(fs::read_to_string(predecessor(&path)).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn the_tail_obeys_no_terminal_sequence() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "first\nsecond\x1b]0;title\x07\r\n\n  \nthird\n").unwrap();
        assert_eq!(tail(&path, 2).unwrap(), "second?]0;title?\nthird");
        assert_eq!(tail(&folder.path().join("none"), 2), None);
        assert_eq!(last_after(&path, "sec").unwrap(), "ond?]0;title?");
        assert_eq!(last_after(&path, "no such"), None);
    }
}
