//! The command line, as one of the agent's four modes.

use std::{ffi::OsString, path::PathBuf};

use rustix::process::getpid;

use crate::holder::MODE;

/// What this process is to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// PID 1 of a guest.
    Init,
    /// The service on the sockets `1024` to `1026` of a folder, inside private namespaces.
    ListenUnix(PathBuf),
    /// A child of the agent that runs libcontainer once; its standard input is the control socket.
    Launch,
    /// The first process of a PID namespace, which has nothing to do.
    Hold,
}

/// Why the command line makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArgsError {
    /// Nothing that names a mode.
    #[error("usage: nacre-agent --listen-unix FOLDER (without arguments only as PID 1)")]
    Usage,
    /// The folder is relative; the agent changes its root and its working folder.
    #[error("the socket folder {0:?} is not an absolute path")]
    Relative(PathBuf),
}

impl Mode {
    /// Reads the arguments after the program's name.
    pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Result<Self, ArgsError> {
        let args: Vec<OsString> = args.collect();
        match args.as_slice() {
            [flag, folder] if flag == "--listen-unix" => {
                let folder = PathBuf::from(folder);
                if folder.is_absolute() {
                    Ok(Self::ListenUnix(folder))
                } else {
                    Err(ArgsError::Relative(folder))
                }
            }
            [word] if word == "launch" => Ok(Self::Launch),
            // Before the mode of a guest: it is a PID 1, too. The kernel's own words are never this
            // one alone, for a guest's command line always has others.
            [word] if word == MODE => Ok(Self::Hold),
            // The kernel hands the words of its command line that it doesn't know to PID 1.
            _ if getpid().is_init() => Ok(Self::Init),
            _ => Err(ArgsError::Usage),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Mode, ArgsError> {
        Mode::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn each_mode_has_its_words() {
        assert_eq!(
            parse(&["--listen-unix", "/tmp/x"]).unwrap(),
            Mode::ListenUnix(PathBuf::from("/tmp/x"))
        );
        assert_eq!(parse(&["launch"]).unwrap(), Mode::Launch);
        assert_eq!(parse(&["hold"]).unwrap(), Mode::Hold);
    }

    #[test]
    fn other_words_are_refused_outside_a_guest() {
        assert!(matches!(parse(&[]), Err(ArgsError::Usage)));
        assert!(matches!(parse(&["--listen-unix"]), Err(ArgsError::Usage)));
        assert!(matches!(parse(&["--listen-unix", "x"]), Err(ArgsError::Relative(_))));
    }
}
