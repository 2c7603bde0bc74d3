//! Where a stream goes, read from containerd's words.

use std::{
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt, fs::FileTypeExt},
    path::{Path, PathBuf},
};

/// Why a stream's name can't be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(in crate::service) enum TargetError {
    #[error("streams of kind `{0}` are not supported")]
    Scheme(String),
    #[error("`{0}` is no absolute path")]
    Relative(String),
    #[error("standard input can't come from a program")]
    Input,
}

/// Where a stream goes to or comes from.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::service) enum Target {
    Nothing,
    Fifo(PathBuf),
    /// A file that is appended to.
    File(PathBuf),
    /// A program that is started for it.
    Program {
        path: PathBuf,
        arguments: Vec<OsString>,
    },
}

impl Target {
    /// Reads a path, which is a fifo's unless something else is there, or a URI.
    pub(in crate::service) fn parse(name: &str) -> Result<Self, TargetError> {
        if name.is_empty() {
            return Ok(Self::Nothing);
        }
        let Some((scheme, rest)) = name.split_once("://") else {
            let path = absolute(name)?;
            return Ok(if is_fifo(&path) { Self::Fifo(path) } else { Self::File(path) });
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = decode(path);
        let path = path.to_str().map_or(Ok(PathBuf::from(&path)), absolute)?;
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" => Ok(Self::Program { path, arguments: arguments(query) }),
            other => Err(TargetError::Scheme(other.to_owned())),
        }
    }
}

fn absolute(text: &str) -> Result<PathBuf, TargetError> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(TargetError::Relative(text.to_owned())) }
}

fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Each key of a query is an argument, and its value, if it has one, the next.
fn arguments(query: &str) -> Vec<OsString> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .flat_map(|pair| match pair.split_once('=') {
            Some((key, value)) if !value.is_empty() => vec![key, value],
            Some((key, _)) => vec![key],
            None => vec![pair],
        })
        .map(|word| decode(&word.replace('+', " ")))
        .collect()
}

/// Takes percent-encoding away; what is none stays.
fn decode(text: &str) -> OsString {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = (byte == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(escaped.unwrap_or(byte));
        at += if escaped.is_some() { 3 } else { 1 };
    }
    OsString::from_vec(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_name_is_told_apart() {
        assert_eq!(Target::parse("").unwrap(), Target::Nothing);
        assert_eq!(Target::parse("fifo:///a/b").unwrap(), Target::Fifo("/a/b".into()));
        assert_eq!(Target::parse("file:///a%20b").unwrap(), Target::File("/a b".into()));
        assert_eq!(Target::parse("/dev/null").unwrap(), Target::File("/dev/null".into()));
        let program = Target::parse("binary:///usr/bin/log?--to=%2Fx&-v").unwrap();
        let arguments = ["--to", "/x", "-v"].map(OsString::from).to_vec();
        assert_eq!(program, Target::Program { path: "/usr/bin/log".into(), arguments });
    }

    #[test]
    fn what_is_no_place_is_refused() {
        assert_eq!(Target::parse("tcp://a:1"), Err(TargetError::Relative("a:1".to_owned())));
        assert_eq!(Target::parse("npipe:///a"), Err(TargetError::Scheme("npipe".to_owned())));
        assert_eq!(Target::parse("a/b"), Err(TargetError::Relative("a/b".to_owned())));
    }
}
