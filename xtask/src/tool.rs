//! Runs a program of the machine and turns its failure into an error that names it.

use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};

/// How much of a failed program's output its error quotes.
const QUOTED_LINES: usize = 20;

/// Runs the command with no input, keeps its output, and returns its standard output as text.
///
/// # Errors
/// The program cannot be started, or fails; the error quotes the end of its output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {name}"))?;
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    if !done.status.success() {
        let errors = String::from_utf8_lossy(&done.stderr);
        let said = tail(&format!("{text}{errors}"));
        bail!("{name} ended with {}:\n{said}", done.status);
    }
    Ok(text)
}

/// The last lines of a text, for a report.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(QUOTED_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_named_with_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("sh ended with exit status: 3"), "{text}");
        assert!(text.contains("reason"), "{text}");
    }

    #[test]
    fn a_tail_keeps_the_last_lines_only() {
        let text = (0..50).map(|n| n.to_string()).collect::<Vec<_>>().join("\n");
        assert!(tail(&text).starts_with("30\n"));
    }
}
