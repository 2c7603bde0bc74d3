//! Asks runtimes the same things by `ctr` and writes their answers side by side:
//! `containerd-table FILE RUNTIME...`. The exit code tells whether all of them answered alike.

#![expect(clippy::print_stderr, reason = "whoever waits for it is told what it does")]

use std::env;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nacre_tests::containerd::cases::{ALL, Case, SMOKE};
use nacre_tests::containerd::pods;
use nacre_tests::containerd::table::{self, Answers};
use nacre_tests::containerd::traces::Traces;
use nacre_tests::containerd::{Containerd, Release, Runtime};

const HEAD: &str = "# Answers of runtimes to containerd's users

What `ctr` printed and its exit code, for the same command lines by each runtime; made by
`cargo xtask table containerd` on the KVM host, with Debian's containerd and runc. `{id}` is the
container's name, `{image}` an image with busybox; what stands before `|>` is standard input, `tty`
gives a terminal, `await` waits until the task is in that state. A cell is the exit code, and what
was printed on standard output or how long that was.
";

fn main() -> Result<ExitCode> {
    let mut args = env::args().skip(1);
    let file = args.next().context("containerd-table FILE RUNTIME...")?;
    let runtimes = args.map(|name| runtime(&name)).collect::<Result<Vec<_>>>()?;
    let mut text = HEAD.to_owned();
    let mut alike = true;
    for (release, cases) in
        [(Release::Bookworm, SMOKE), (Release::Trixie, ALL), (Release::Sid, SMOKE)]
    {
        let (part, answers) = ask(release, cases, &runtimes)?;
        text.push_str(&part);
        for line in answers.iter().flat_map(Answers::unanswered) {
            eprintln!("{line}");
            alike = false;
        }
        for error in answers.iter().filter_map(|answers| answers.agree().err()) {
            eprintln!("{error:#}");
            alike = false;
        }
    }
    fs::write(&file, text).with_context(|| format!("cannot write {file}"))?;
    Ok(if alike { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn runtime(name: &str) -> Result<Runtime> {
    let known = [Runtime::Runc, Runtime::Nacre];
    match known.into_iter().find(|runtime| runtime.name() == name) {
        Some(runtime) => Ok(runtime),
        None => bail!("no runtime is called {name}"),
    }
}

fn ask(release: Release, cases: &[Case], runtimes: &[Runtime]) -> Result<(String, Vec<Answers>)> {
    let daemon = Containerd::start(release)?;
    let version = daemon.version()?;
    eprintln!("containerd {version}");
    let folder = daemon.path("");
    let before = Traces::now(&folder)?;
    let mut answers = table::run(&daemon, cases, runtimes)?;
    answers.push(pods::ask(&daemon, runtimes)?);
    before.and_nothing_more(&folder)?;
    daemon.stop()?;
    Ok((table::markdown(&version, &answers), answers))
}
