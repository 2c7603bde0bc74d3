//! What kubelet asks of a runtime, as one story: a pod of several containers, from its start to its
//! end.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cases::{Case, Keep};
use super::cri::{Cri, Pod};
use super::table::{Answers, Told};
use super::{Containerd, Runtime};
use crate::nacre::{EATER, finish};

/// A container that eats memory may have so much, in bytes.
const SCARCE_BYTES: i64 = 32 << 20;

/// What is asked, in the order of the answers.
const STORY: Case = Case {
    name: "a pod of several containers (CRI)",
    lines: &[
        "the pod's address answers a ping",
        "host name, name servers and the name of the pod in /etc/hosts, by a container",
        "the log of a container that exited, and its exit code",
        "the exit code of a program that was added",
        "a program that takes longer than it may",
        "a file in /dev/shm that another container made",
        "a connection to another container by 127.0.0.1",
        "memory is counted",
        "a container beyond its limit of memory",
        "a container in another one's place",
    ],
    keep: Keep::All,
};

/// Has each runtime go through the story.
///
/// # Errors
///
/// Fails if the pod can't be made or not be taken away.
pub fn ask(daemon: &Containerd, runtimes: &[Runtime]) -> Result<Answers> {
    let mut by_runtime = Vec::new();
    for &runtime in runtimes {
        let pod = Pod::run(&Cri::of(daemon), "story", runtime, &daemon.path("logs"));
        let told = match pod {
            Ok(pod) => {
                let told = tell(&pod);
                pod.remove().with_context(|| format!("{told:#?}"))?;
                told
            }
            Err(error) => vec![of(Err(error)); STORY.lines.len()],
        };
        by_runtime.push((runtime, told));
    }
    Ok(Answers::of(STORY, by_runtime))
}

type Step = fn(&Pod) -> Result<(i32, String)>;

fn tell(pod: &Pod) -> Vec<Told> {
    let steps: [Step; STORY.lines.len()] =
        [ping, names, log, code, timeout, memory_file, loopback, measured, eater, successor];
    let server = pod.start("server", &["sh", "-c", SERVER], None);
    if let Err(error) = server {
        return vec![of(Err(error)); STORY.lines.len()];
    }
    steps.into_iter().map(|step| of(step(pod))).collect()
}

fn of(answer: Result<(i32, String)>) -> Told {
    match answer {
        Ok((code, out)) => Told { code: Some(code), out, said: String::new() },
        Err(error) => Told { code: None, out: String::new(), said: format!("{error:#}") },
    }
}

/// Answers one connection after the other.
const SERVER: &str = "echo shared >/dev/shm/file; while :; do nc -l -p 8080 -e echo served; done";

fn ping(pod: &Pod) -> Result<(i32, String)> {
    let address = pod.address()?;
    ensure!(address.starts_with("10.88.77."), "{address:?}");
    let answer = finish(Command::new("ping").args(["-c", "1", "-W", "20", &address]))?;
    Ok((answer.code.unwrap_or(-1), String::new()))
}

fn names(pod: &Pod) -> Result<(i32, String)> {
    let script = "hostname; cat /etc/resolv.conf; cat /etc/hostname";
    ended(pod, "names", &["sh", "-c", script])
}

fn log(pod: &Pod) -> Result<(i32, String)> {
    ended(pod, "log", &["sh", "-c", "echo to the log; echo also >&2; exit 3"])
}

fn code(pod: &Pod) -> Result<(i32, String)> {
    let container = pod.start("code", &["sleep", "1000"], None)?;
    let answer = container.exec(&["sh", "-c", "echo inside; exit 7"], 0);
    container.remove()?;
    answer
}

fn timeout(pod: &Pod) -> Result<(i32, String)> {
    let container = pod.start("timeout", &["sleep", "1000"], None)?;
    let answer = container.exec(&["sleep", "1000"], 1);
    container.remove()?;
    answer
}

fn memory_file(pod: &Pod) -> Result<(i32, String)> {
    let script = "until cat /dev/shm/file 2>/dev/null; do sleep 0.1; done";
    ended(pod, "memory-file", &["timeout", "20", "sh", "-c", script])
}

fn loopback(pod: &Pod) -> Result<(i32, String)> {
    let script = "until nc 127.0.0.1 8080 </dev/null 2>/dev/null; do sleep 0.1; done";
    ended(pod, "loopback", &["timeout", "20", "sh", "-c", script])
}

fn measured(pod: &Pod) -> Result<(i32, String)> {
    let container = pod.start("measured", &["sleep", "1000"], None)?;
    let memory_bytes = container.memory_bytes();
    container.remove()?;
    Ok((i32::from(memory_bytes? == 0), String::new()))
}

fn eater(pod: &Pod) -> Result<(i32, String)> {
    let container = pod.start("eater", EATER, Some(SCARCE_BYTES))?;
    let answer = container.wait();
    container.remove()?;
    answer
}

fn successor(pod: &Pod) -> Result<(i32, String)> {
    // The name of one that was removed.
    ended(pod, "eater", &["echo", "again"])
}

/// Runs a container to its end; gives its exit code and its log.
fn ended(pod: &Pod, name: &str, command: &[&str]) -> Result<(i32, String)> {
    let container = pod.start(name, command, None)?;
    let answer = container.wait().and_then(|(code, _)| Ok((code, container.log()?)));
    container.remove()?;
    answer
}
