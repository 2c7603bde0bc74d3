//! The one place that writes to a person: standard error, since standard output belongs to the
//! command that runs in the host.

use std::io::{self, Write};

/// Prints one line of progress. A closed standard error is no reason to stop the work.
pub fn say(line: &str) {
    drop(writeln!(io::stderr().lock(), "xtask: {line}"));
}

/// Prints one line of a task's result on standard output.
///
/// # Errors
/// Standard output is closed.
pub fn result(line: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{line}")
}
