//! The command line, in the manner of Go's programs: `-name value` or `-name=value`, one dash or two,
//! and then an action.

use std::{ffi::OsString, path::PathBuf};

use crate::service::bundle;

/// Why a command line makes no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FlagsError {
    /// There is no such flag.
    #[error("there is no flag `{0}`")]
    Unknown(String),
    /// A flag has no value.
    #[error("flag `{0}` needs a value")]
    Value(String),
    /// An argument is not UTF-8.
    #[error("an argument is not UTF-8")]
    Encoding,
    /// There is no such action.
    #[error("there is no action `{0}`")]
    Action(String),
    /// An id or a namespace can be none.
    #[error("`{0}` is no id")]
    Id(String),
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace.
    pub namespace: String,
    /// The container's or sandbox's id.
    pub id: String,
    /// containerd's own socket.
    pub address: String,
    /// containerd's program, for events; events go by its socket here.
    pub publish_binary: String,
    /// The bundle; else the current folder is it.
    pub bundle: Option<PathBuf>,
    /// The address to serve at.
    pub socket: String,
    /// Whether to log more.
    pub debug: bool,
    /// Whether to tell what the runtime is.
    pub info: bool,
    /// Whether to tell its version.
    pub version: bool,
    /// `start`, `delete`, or nothing: serve.
    pub action: String,
}

impl Flags {
    /// Reads the arguments that follow the program's name.
    ///
    /// # Errors
    ///
    /// Fails if they make no sense.
    pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, FlagsError> {
        let mut flags = Self::default();
        let mut arguments =
            arguments.map(|argument| argument.into_string().map_err(|_bytes| FlagsError::Encoding));
        while let Some(argument) = arguments.next() {
            let argument = argument?;
            let Some(flag) = argument.strip_prefix('-') else {
                flags.action = argument;
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if let Some(switch) = flags.switch(name) {
                *switch = value.is_none_or(|value| matches!(value.as_str(), "1" | "t" | "true"));
                continue;
            }
            let value = match value {
                Some(value) => value,
                None => arguments.next().ok_or_else(|| FlagsError::Value(name.to_owned()))??,
            };
            flags.set(name, value)?;
        }
        flags.check()
    }

    fn switch(&mut self, name: &str) -> Option<&mut bool> {
        match name {
            "debug" => Some(&mut self.debug),
            "info" => Some(&mut self.info),
            "v" | "version" => Some(&mut self.version),
            _ => None,
        }
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), FlagsError> {
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "bundle" => self.bundle = Some(value).filter(|path| !path.is_empty()).map(Into::into),
            "socket" => self.socket = value,
            // Of use to a debugger of Go's only.
            "debug-socket" => {}
            other => return Err(FlagsError::Unknown(other.to_owned())),
        }
        Ok(())
    }

    fn check(self) -> Result<Self, FlagsError> {
        let tells = self.version || self.info;
        for id in [&self.id, &self.namespace] {
            if !tells && !bundle::is_id(id) {
                return Err(FlagsError::Id(id.clone()));
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Flags, FlagsError> {
        Flags::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn flags_are_read_in_the_manner_of_go() {
        let flags = parse(&[
            "-namespace",
            "k8s.io",
            "-id=web",
            "--address",
            "/run/c.sock",
            "-debug",
            "-publish-binary",
            "",
            "start",
        ])
        .unwrap();
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("k8s.io", "web"));
        assert_eq!((flags.address.as_str(), flags.action.as_str()), ("/run/c.sock", "start"));
        assert!(flags.debug && !flags.info);
        let delete = parse(&["-namespace", "a", "-id", "b", "-bundle", "/x", "delete"]).unwrap();
        assert_eq!(delete.bundle, Some(PathBuf::from("/x")));
        assert!(!parse(&["-debug=false", "-v"]).unwrap().debug);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(parse(&["-x=1"]), Err(FlagsError::Unknown("x".to_owned())));
        assert_eq!(parse(&["-id"]), Err(FlagsError::Value("id".to_owned())));
        let path = parse(&["-namespace", "a", "-id", "../b", "delete"]);
        assert_eq!(path, Err(FlagsError::Id("../b".to_owned())));
        assert_eq!(parse(&["start"]), Err(FlagsError::Id(String::new())));
    }
}
