//! The name of a sandbox: also a folder, a cgroup and the container's id, so it is checked once.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// The longest name, in bytes.
pub const MAX_BYTES: usize = 64;

/// A checked name: a letter or digit, then letters, digits, `_`, `.` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxName(String);

/// Why a text is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no name for a sandbox: a letter or digit, then letters, digits, `_`, `.` and `-`, \
     64 in all"
)]
pub struct NameError(String);

impl SandboxName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name that nobody else is likely to have.
    ///
    /// # Errors
    ///
    /// Fails if the host gives no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut random = [0; 4];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        Ok(Self::generated(u32::from_ne_bytes(random)))
    }

    /// A name made of `random`.
    #[must_use]
    pub fn generated(random: u32) -> Self {
        Self(format!("sandbox-{random:08x}"))
    }
}

impl FromStr for SandboxName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let follows = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if starts && text.len() <= MAX_BYTES && text.chars().all(follows) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError(text.chars().take(2 * MAX_BYTES).collect()))
        }
    }
}

impl TryFrom<String> for SandboxName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<SandboxName> for String {
    fn from(name: SandboxName) -> Self {
        name.0
    }
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_folder_are_refused() {
        for text in ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "a\n", "\u{e9}"] {
            assert!(text.parse::<SandboxName>().is_err(), "{text:?}");
        }
        assert!("x".repeat(65).parse::<SandboxName>().is_err());
    }

    #[test]
    fn ordinary_names_are_taken() {
        for text in ["a", "web-1", "A.b_c", &"x".repeat(64)] {
            assert_eq!(text.parse::<SandboxName>().unwrap().as_str(), text);
        }
        assert!(SandboxName::generated(7).as_str().parse::<SandboxName>().is_ok());
    }
}
