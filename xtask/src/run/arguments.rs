//! The command line of `nacre run`, made independent of the folder it was typed in: relative
//! paths become absolute ones, and whatever it takes from this process's environment is put in.
//!
//! `nacre` itself judges the command line; here only the options that name paths are understood.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf, absolute};

/// The command line, and what follows from it for the host.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Mapping {
    /// What `nacre run` gets.
    pub(super) arguments: Vec<String>,
    /// Existing paths that the host must show at their place.
    pub(super) paths: Vec<PathBuf>,
    /// Whether a root file system is named.
    pub(super) has_root: bool,
    /// Whether the container wants a terminal.
    pub(super) terminal: bool,
    /// Whether it wants our standard input.
    pub(super) interactive: bool,
    /// Whether the sandbox outlives the command.
    pub(super) detached: bool,
    /// Whether the sandbox has a network.
    pub(super) network: bool,
}

/// What an option's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// A path.
    Path,
    /// A path, and more after a colon.
    PathColon,
    /// A variable, perhaps without its value.
    Variable,
    /// Something that means the same everywhere.
    Plain,
}

const LONG: &[(&str, Value)] = &[
    ("rootfs", Value::Path),
    ("image", Value::Path),
    ("kernel", Value::Path),
    ("initramfs", Value::Path),
    ("bin-dir", Value::Path),
    ("volume", Value::PathColon),
    ("disk", Value::PathColon),
    ("env", Value::Variable),
    ("name", Value::Plain),
    ("kernel-args", Value::Plain),
    ("cpus", Value::Plain),
    ("device", Value::Plain),
    ("memory", Value::Plain),
    ("user", Value::Plain),
    ("workdir", Value::Plain),
    ("hostname", Value::Plain),
    ("memory-limit", Value::Plain),
    ("pids-limit", Value::Plain),
    ("host-memory-limit", Value::Plain),
    ("host-pids-limit", Value::Plain),
    ("host-cpu-limit", Value::Plain),
    ("agent-timeout", Value::Plain),
    ("log-level", Value::Plain),
];
const SHORT: &[(char, Value)] =
    &[('v', Value::PathColon), ('e', Value::Variable), ('u', Value::Plain), ('w', Value::Plain)];

/// Maps the arguments after `run`; `names` is how the host calls a path of this machine, `lookup`
/// finds a variable of this process.
pub(super) fn map_run(
    arguments: &[String],
    names: impl Fn(&Path) -> PathBuf,
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Mapping> {
    let mut mapping = Mapping::default();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let Some((option, value, given)) = option_with_value(argument) else {
            mapping.flag(argument);
            mapping.arguments.push(argument.clone());
            if argument == "--" || !argument.starts_with('-') {
                mapping.arguments.extend(rest.cloned());
                break;
            }
            continue;
        };
        // Without its value the option is nacre's to complain about.
        let Some(given) = given.or_else(|| rest.next().cloned()) else {
            mapping.arguments.push(argument.clone());
            break;
        };
        let mapped = mapping.value(value, &given, &names, &lookup)?;
        mapping.has_root |= matches!(option.as_str(), "--rootfs" | "--image");
        mapping.flag(&option);
        mapping.arguments.extend([option, mapped]);
    }
    Ok(mapping)
}

/// What `nacre exec` and its like want of our streams; the arguments stay as they are.
pub(super) fn map_other(arguments: Vec<String>) -> Mapping {
    let mut mapping = Mapping::default();
    let options = arguments.iter().skip(1).take_while(|argument| argument.starts_with('-'));
    options.for_each(|option| mapping.flag(option));
    Mapping { arguments, ..mapping }
}

/// Splits an argument that is an option with a value: its name, the value's kind, and the value
/// if it is in the same argument.
fn option_with_value(argument: &str) -> Option<(String, Value, Option<String>)> {
    if let Some(long) = argument.strip_prefix("--") {
        let (name, given) = match long.split_once('=') {
            Some((name, given)) => (name, Some(given.to_owned())),
            None => (long, None),
        };
        let (_, value) = LONG.iter().find(|(known, _)| *known == name)?;
        return Some((format!("--{name}"), *value, given));
    }
    let letters = argument.strip_prefix('-')?;
    let (at, value) = letters.char_indices().find_map(|(at, letter)| {
        let (_, value) = SHORT.iter().find(|(known, _)| *known == letter)?;
        Some((at, *value))
    })?;
    let (flags, given) = letters.split_at(at + 1);
    let given = given.strip_prefix('=').unwrap_or(given);
    Some((format!("-{flags}"), value, (!given.is_empty()).then(|| given.to_owned())))
}

impl Mapping {
    fn flag(&mut self, argument: &str) {
        let letters = argument.strip_prefix('-').filter(|letters| !letters.starts_with('-'));
        let has = |letter| letters.is_some_and(|letters| letters.contains(letter));
        self.terminal |= argument == "--tty" || has('t');
        self.interactive |= argument == "--interactive" || has('i');
        self.detached |= argument == "--detach" || has('d');
        self.network |= argument == "--net";
    }

    fn value(
        &mut self,
        value: Value,
        given: &str,
        names: impl Fn(&Path) -> PathBuf,
        lookup: impl Fn(&str) -> Option<String>,
    ) -> Result<String> {
        Ok(match value {
            Value::Plain => given.to_owned(),
            Value::Path => self.path(given, names)?,
            Value::PathColon => match given.split_once(':') {
                Some((path, more)) => format!("{}:{more}", self.path(path, names)?),
                None => self.path(given, names)?,
            },
            Value::Variable if given.contains('=') => given.to_owned(),
            Value::Variable => match lookup(given) {
                Some(found) => format!("{given}={found}"),
                None => given.to_owned(),
            },
        })
    }

    /// An existing path without its links, since those lead elsewhere in the host; a missing one
    /// as an absolute path, for nacre to name in its complaint.
    fn path(&mut self, given: &str, names: impl Fn(&Path) -> PathBuf) -> Result<String> {
        let path = match fs::canonicalize(given) {
            Ok(path) => {
                let named = names(&path);
                self.paths.push(path);
                named
            }
            Err(_) if given.is_empty() => return Ok(String::new()),
            Err(_) => absolute(Path::new(given)).context("no current folder")?,
        };
        path.into_os_string().into_string().ok().with_context(|| format!("{given} is not text"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(line: &str) -> Mapping {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        map_run(&words, Path::to_path_buf, |name| (name == "HERE").then(|| "value".to_owned()))
            .unwrap()
    }

    #[test]
    fn paths_of_options_become_absolute_and_known() {
        let mapping = map("--rootfs /etc -v=/usr:/mnt:ro --disk /no/such:ro -- ls /etc ./x");
        let expected =
            ["--rootfs", "/etc", "-v", "/usr:/mnt:ro", "--disk", "/no/such:ro", "--", "ls"];
        assert_eq!(mapping.arguments[..8], expected);
        assert_eq!(mapping.arguments[8..], ["/etc", "./x"]);
        assert_eq!(mapping.paths, [PathBuf::from("/etc"), PathBuf::from("/usr")]);
        assert!(mapping.has_root);
    }

    #[test]
    fn a_path_gets_the_name_that_it_has_in_the_host() {
        let words = ["-v".to_owned(), "/etc:/data".to_owned(), "ls".to_owned(), "/etc".to_owned()];
        let names = |path: &Path| Path::new("/host").join(path.strip_prefix("/").unwrap());
        let mapping = map_run(&words, names, |_| None).unwrap();
        assert_eq!(mapping.arguments, ["-v", "/host/etc:/data", "ls", "/etc"]);
        assert_eq!(mapping.paths, [PathBuf::from("/etc")]);
    }

    #[test]
    fn a_relative_path_starts_at_the_current_folder() {
        let mapping = map("--disk=no-such-file x");
        let here = std::env::current_dir().unwrap().join("no-such-file");
        assert_eq!(mapping.arguments, ["--disk", here.to_str().unwrap(), "x"]);
        assert!(mapping.paths.is_empty());
    }

    #[test]
    fn what_stands_in_the_command_is_not_an_option() {
        for line in ["sh -t -d --rootfs x", "-- sh -t -d --rootfs x", "--cpus 2 sh -t -d"] {
            let mapping = map(line);
            assert!(!mapping.terminal && !mapping.detached && !mapping.has_root, "{line}");
            assert_eq!(mapping.arguments.join(" "), line);
        }
    }

    #[test]
    fn letters_may_stand_together() {
        assert!(map("-it sh").terminal);
        assert!(map("--tty sh").terminal);
        assert!(map("-d sh").detached);
        assert!(map("--net sh").network && !map("sh --net").network);
        let mapping = map("-ite A=1 sh");
        assert!(mapping.terminal);
        assert_eq!(mapping.arguments, ["-ite", "A=1", "sh"]);
    }

    #[test]
    fn exec_wants_a_terminal_only_by_its_own_options() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let wants = |line| {
            let mapping = map_other(words(line));
            (mapping.terminal, mapping.interactive)
        };
        assert_eq!(wants("exec -it web sh"), (true, true));
        assert_eq!(wants("exec --interactive web cat"), (false, true));
        assert_eq!(wants("exec web sh -t -i"), (false, false));
        assert_eq!(wants("ps"), (false, false));
    }

    #[test]
    fn a_variable_gets_the_value_it_has_here() {
        assert_eq!(
            map("-e HERE -e GONE -e A=b x").arguments,
            ["-e", "HERE=value", "-e", "GONE", "-e", "A=b", "x"]
        );
    }
}
