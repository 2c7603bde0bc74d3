//! Names that the host gives to containers and processes, checked once at the border.
//!
//! They become folder and cgroup names, so nothing that a path could be built from gets in.

use std::{fmt, path::Path};

/// The longest name, in characters.
const MAX_CHARS: usize = 128;

/// Why a name is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdError {
    /// No name at all.
    #[error("the {0} id is empty")]
    Empty(&'static str),
    /// Longer than 128 characters.
    #[error("a {kind} id of {chars} characters: at most {MAX_CHARS} are allowed")]
    TooLong {
        /// What the name is for.
        kind: &'static str,
        /// Its length.
        chars: usize,
    },
    /// A character outside the allowed ones, or a leading dot.
    #[error("the {kind} id {id:?} may have only A-Z a-z 0-9 _ . - and no leading dot")]
    Character {
        /// What the name is for.
        kind: &'static str,
        /// The name.
        id: String,
    },
}

fn check(kind: &'static str, id: &str) -> Result<String, IdError> {
    let chars = id.chars().count();
    if chars == 0 {
        return Err(IdError::Empty(kind));
    }
    if chars > MAX_CHARS {
        return Err(IdError::TooLong { kind, chars });
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if id.starts_with('.') || !id.bytes().all(allowed) {
        return Err(IdError::Character { kind, id: id.to_owned() });
    }
    Ok(id.to_owned())
}

/// The name of a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ContainerId(String);

impl ContainerId {
    /// Checks a name that the host gave.
    pub(crate) fn parse(id: &str) -> Result<Self, IdError> {
        check("container", id).map(Self)
    }
}

impl AsRef<Path> for ContainerId {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a process that was added to a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ExecId(String);

impl ExecId {
    /// Checks a name that the host gave.
    pub(crate) fn parse(id: &str) -> Result<Self, IdError> {
        check("exec", id).map(Self)
    }
}

impl fmt::Display for ExecId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A process of a container: its init, or one that was added.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ProcessId {
    /// Whose process.
    pub(crate) container: ContainerId,
    /// Absent for the container's init.
    pub(crate) exec: Option<ExecId>,
}

impl ProcessId {
    /// Checks the names that the host gave; an empty `exec` is the container's init.
    pub(crate) fn parse(container: &str, exec: &str) -> Result<Self, IdError> {
        let exec = if exec.is_empty() { None } else { Some(ExecId::parse(exec)?) };
        Ok(Self { container: ContainerId::parse(container)?, exec })
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "{}", self.container),
            Some(exec) => write!(f, "{}/{exec}", self.container),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_names_pass() {
        for id in ["a", "Web-1_x.y", &"x".repeat(128)] {
            assert_eq!(ContainerId::parse(id).unwrap().to_string(), id);
        }
    }

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for id in ["", ".", "..", ".hidden", "a/b", "a b", "a\0", "\u{e9}", &"x".repeat(129)] {
            assert!(ContainerId::parse(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn an_empty_exec_id_is_the_init() {
        assert_eq!(ProcessId::parse("c", "").unwrap().exec, None);
        assert!(ProcessId::parse("c", "../x").is_err());
    }
}
