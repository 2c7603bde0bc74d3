//! Runs cases by several runtimes, and puts their answers side by side.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::cases::{Case, Keep};
use super::{BUSYBOX, Containerd, Runtime};
use crate::nacre::{Answer, SANDBOX_PATIENCE};
use crate::process::{PATIENCE, Process};

/// Each look at a task's state costs its host a process.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How much of an output is shown.
const SHOWN_CHARS: usize = 600;

/// What one runtime answered to one line.
#[derive(Clone, Debug)]
pub struct Told {
    /// The exit code, or none if a signal ended the command.
    pub code: Option<i32>,
    /// The part of standard output that counts.
    pub out: String,
    /// Standard error, for people: runtimes word it differently.
    pub said: String,
}

/// The answers to one case, for each runtime in the order in which they were asked.
#[derive(Debug)]
pub struct Answers {
    case: Case,
    by_runtime: Vec<(Runtime, Vec<Told>)>,
}

/// Runs each case by each runtime.
///
/// # Errors
///
/// Fails if a command can't be started or does not end; not for what it answers.
pub fn run(daemon: &Containerd, cases: &[Case], runtimes: &[Runtime]) -> Result<Vec<Answers>> {
    let mut all = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let mut by_runtime = Vec::new();
        for &runtime in runtimes {
            let id = format!("{}-{number}", runtime.name());
            let told: Result<Vec<_>> = case
                .lines
                .iter()
                .map(|line| ask(daemon, line, &id, (runtime, case.keep)))
                .collect();
            let told = told.with_context(|| format!("{} by {}", case.name, runtime.name()))?;
            by_runtime.push((runtime, told));
        }
        all.push(Answers { case: *case, by_runtime });
    }
    clear(daemon)?;
    Ok(all)
}

impl Answers {
    /// What was not answered at all, with the reasons.
    #[must_use]
    pub fn unanswered(&self) -> Vec<String> {
        let all = self.by_runtime.iter().flat_map(|(runtime, told)| {
            let lines = self.case.lines.iter().zip(told).filter(|(_, told)| told.code.is_none());
            lines.map(|(line, told)| format!("{}: {line}: {}", runtime.name(), told.said))
        });
        all.collect()
    }

    /// Answers that were had in another way than by `ctr`.
    #[must_use]
    pub fn of(case: Case, by_runtime: Vec<(Runtime, Vec<Told>)>) -> Self {
        Self { case, by_runtime }
    }

    /// Every runtime answered as the first one did.
    ///
    /// # Errors
    ///
    /// Fails with the first answer that differs.
    pub fn agree(&self) -> Result<()> {
        let Some(((_, reference), others)) = self.by_runtime.split_first() else { return Ok(()) };
        for (runtime, told) in others {
            ensure!(told.len() == reference.len(), "{}: answers are missing", self.case.name);
            for ((line, theirs), ours) in self.case.lines.iter().zip(reference).zip(told) {
                ensure!(
                    (theirs.code, &theirs.out) == (ours.code, &ours.out),
                    "{}: {}: {line}: {ours:#?} instead of {theirs:#?}",
                    self.case.name,
                    runtime.name(),
                );
            }
        }
        Ok(())
    }
}

/// The answers as a table in Markdown, without what changes from run to run.
#[must_use]
pub fn markdown(version: &str, answers: &[Answers]) -> String {
    let mut text = format!("\n## containerd {version}\n");
    for Answers { case, by_runtime } in answers {
        let runtimes: Vec<_> = by_runtime.iter().map(|(runtime, _)| runtime.name()).collect();
        let head = runtimes.join(" | ");
        let rule = "---|".repeat(runtimes.len() + 1);
        // Writing to a string can't fail.
        write!(text, "\n### {}\n\n| | {head} |\n|{rule}\n", case.name).unwrap_or_default();
        for (number, line) in case.lines.iter().enumerate() {
            write!(text, "| `{}` |", cell(line)).unwrap_or_default();
            for told in by_runtime.iter().filter_map(|(_, told)| told.get(number)) {
                write!(text, " {} |", answer_cell(told)).unwrap_or_default();
            }
            text.push('\n');
        }
    }
    text
}

fn answer_cell(told: &Told) -> String {
    let code = told.code.map_or_else(|| "no answer".to_owned(), |code| code.to_string());
    let mut shown: String = told.out.chars().take(SHOWN_CHARS).collect();
    if shown.len() < told.out.len() {
        shown = format!("{} bytes", told.out.len());
    }
    let out = cell(shown.trim_end());
    if out.is_empty() { code } else { format!("{code}: `{out}`") }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " / ")
}

fn ask(daemon: &Containerd, line: &str, id: &str, how: (Runtime, Keep)) -> Result<Told> {
    let (runtime, keep) = how;
    if let Some(state) = line.strip_prefix("await ") {
        return await_state(daemon, id, state);
    }
    let (input, line) = line.split_once(" |> ").unwrap_or(("", line));
    let (terminal, line) = line.strip_prefix("tty ").map_or((false, line), |line| (true, line));
    let mut args = words(line);
    for arg in &mut args {
        *arg = arg.replace("{id}", id).replace("{image}", BUSYBOX);
    }
    if args.first().is_some_and(|first| first == "run") {
        args.splice(1..1, ["--runtime".to_owned(), runtime.kind().to_owned()]);
    }
    let command = daemon.ctr_command(&args);
    let mut command = if terminal { in_terminal(&command) } else { command };
    let answer = feed(&mut command, (!terminal).then_some(input))?;
    Ok(Told { code: answer.code, out: keep.of(&answer.out).replace(id, "{id}"), said: answer.said })
}

/// The command with a terminal of 31 lines and 101 columns, by script(1).
fn in_terminal(command: &Command) -> Command {
    let mut line = "stty rows 31 cols 101; exec".to_owned();
    for word in [command.get_program()].into_iter().chain(command.get_args()) {
        write!(line, " '{}'", word.to_string_lossy()).unwrap_or_default();
    }
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]);
    script
}

/// Runs a command; a terminal is one whose input has no end. Another input ends when its first output is there: `ctr` does not pass on the end of
/// an input that was over before the container ran.
fn feed(command: &mut Command, input: Option<&str>) -> Result<Answer> {
    let program = PathBuf::from(command.get_program());
    let mut process =
        Process::start(&program, command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    let mut stdin = process.child().stdin.take();
    let mut stdout = process.child().stdout.take().context("standard output")?;
    let (began, has_begun) = channel::<()>();
    let out = thread::spawn(move || {
        let mut first = [0];
        let mut bytes = Vec::new();
        if stdout.read_exact(&mut first).is_ok() {
            bytes.extend(first);
        }
        drop(began);
        // A pipe that breaks ends what can be read.
        drop(stdout.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    });
    if let (Some(input), Some(mut stdin)) = (input, stdin.take_if(|_| input.is_some())) {
        // Whoever does not read it, ends without it.
        drop(stdin.write_all(input.as_bytes()));
        if !input.is_empty() {
            // The sender's end is what is waited for; without one the command is waited for below.
            has_begun.recv_timeout(SANDBOX_PATIENCE).unwrap_or_default();
        }
    }
    let (status, said) = process.wait_for(SANDBOX_PATIENCE)?;
    Ok(Answer { code: status.code(), out: out.join().unwrap_or_default(), said })
}

/// The state in which the task is, once it is the wanted one; another one if that never comes.
fn await_state(daemon: &Containerd, id: &str, state: &str) -> Result<Told> {
    let mut last = Answer { code: None, out: String::new(), said: String::new() };
    let deadline = Instant::now() + PATIENCE;
    let mut seen = None;
    while seen.as_deref() != Some(state) && Instant::now() < deadline {
        last = daemon.ctr(&["task", "ls"])?.code(0)?;
        thread::sleep(LOOK_EVERY);
        let mut tasks = last.out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let task = tasks.find(|task| task.first() == Some(&id));
        seen = task.and_then(|task| task.last().map(|&word| word.to_owned()));
    }
    let out = seen.unwrap_or_else(|| "no such task".to_owned());
    Ok(Told { code: last.code, out, said: last.said })
}

/// Takes away whatever cases left, as they may end anywhere.
fn clear(daemon: &Containerd) -> Result<()> {
    for id in daemon.ctr(&["container", "ls", "-q"])?.code(0)?.out.lines() {
        daemon.ctr(&["task", "delete", "--force", id])?;
        daemon.ctr(&["container", "delete", id])?.code(0)?;
    }
    Ok(())
}

/// A line's words; what stands between two `'` is one of them, or a part of one.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            _ => words.last_mut().expect("there is always one").push(letter),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_quoted_stays_one_word() {
        assert_eq!(
            words("run  {id} sh -c 'echo \"a b\"'"),
            ["run", "{id}", "sh", "-c", "echo \"a b\""]
        );
    }

    #[test]
    fn an_answer_that_differs_is_told() {
        let told = |out: &str| Told { code: Some(0), out: out.to_owned(), said: String::new() };
        let case = Case { name: "a case", lines: &["run"], keep: Keep::All };
        let answers = |ours: &str| Answers {
            case,
            by_runtime: vec![
                (Runtime::Runc, vec![told("x\n")]),
                (Runtime::Nacre, vec![told(ours)]),
            ],
        };
        assert!(answers("x\n").agree().is_ok());
        assert!(answers("y\n").agree().unwrap_err().to_string().contains("nacre: run"));
        assert!(markdown("1", &[answers("y|\n")]).contains("| `run` | 0: `x` | 0: `y\\|` |"));
    }
}
