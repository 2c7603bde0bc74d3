//! Sandboxes that outlive the command that started them.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Result, anyhow, ensure};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Attached, User, finish};
use serde_json::Value;

#[test]
fn two_sandboxes_run_at_once_and_each_can_be_entered() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    for name in ["one", "two"] {
        let options = ["--name", name, "--detach", "--hostname", name];
        user.run(
            &options,
            &["sh", "-c", "echo started; trap 'exit 5' TERM; while :; do sleep 1; done"],
        )?
        .code(0)?;
    }
    let listed = user.nacre(&["ps"])?.code(0)?;
    ensure!(listed.out.contains("one") && listed.out.contains("two"), "{listed:?}");
    for name in ["one", "two"] {
        user.nacre(&["exec", name, "hostname"])?.prints(&format!("{name}\n"))?;
        user.nacre(&["logs", name])?.prints("started\n")?;
    }
    user.nacre(&["exec", "one", "sh", "-c", "exit 9"])?.code(9)?;
    user.nacre(&["exec", "one", "sh", "-c", "kill -KILL $$"])?.code(128 + 9)?;
    user.nacre(&["stop", "one"])?.code(0)?;
    let listed = user.nacre(&["ps"])?.code(0)?;
    ensure!(listed.out.contains("two"), "{listed:?}");
    user.nacre(&["rm", "one"])?.code(0)?;
    user.nacre(&["rm", "-f", "two"])?.code(0)?;
    before.and_nothing_more(user.state())
}

#[test]
fn a_name_in_use_is_refused_and_an_unknown_one_told() -> Result<()> {
    let user = User::new()?;
    user.run(&["--name", "same", "--detach"], &["sleep", "1000"])?.code(0)?;
    user.run(&["--name", "same", "--detach"], &["sleep", "1000"])?.code(107)?.tells("same")?;
    user.nacre(&["exec", "other", "true"])?.code(107)?.tells("other")?;
    user.nacre(&["rm", "-f", "same"])?.code(0)?;
    Ok(())
}

#[test]
fn a_detached_sandbox_is_followed_entered_and_stopped() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let script = "trap '' TERM; echo tick 1; until test -e /go; do sleep 0.1; done; \
        echo tick 2; while :; do sleep 0.1; done";
    let options = ["--name", "live", "--detach"];
    user.run(&options, &["sh", "-c", script])?.code(0)?;
    let follow = Attached::start(&mut user.command(&["logs", "-f", "live"])?)?;
    follow.until("tick 1")?;
    user.nacre(&["exec", "live", "touch", "/go"])?.prints("")?;
    follow.until("tick 2")?;

    let mut exec = user.command(&["exec", "-i", "live", "sh", "-c", "cat; echo end"])?;
    let input = tempfile::NamedTempFile::new()?;
    fs::write(input.path(), "in\n")?;
    finish(exec.stdin(input.reopen()?))?.prints("in\nend\n")?;

    let exec = user.command(&["exec", "-t", "live", "sh", "-c", "test -t 0 && stty size"])?;
    finish(&mut in_terminal(&exec, &user))?.code(0)?.prints("31 101\r\n")?;

    // A reader that leaves ends a program that was added, by its signal.
    let exec = Attached::start(&mut user.command(&["exec", "live", "yes"])?)?;
    exec.until("y")?;
    exec.leave()?.code(128 + 13)?;

    let [live] = listed(&user)?;
    ensure!(live["status"] == "running" && live["exit_code"].is_null(), "{live}");
    user.nacre(&["stop", "-t", "1", "live"])?.code(0)?;
    follow.wait()?.prints("")?;
    let [live] = listed(&user)?;
    ensure!(live["status"] == "exited" && live["exit_code"] == 128 + 9, "{live}");
    user.nacre(&["logs", "live"])?.prints("tick 1\ntick 2\n")?;
    user.nacre(&["rm", "live"])?.code(0)?;
    before.and_nothing_more(user.state())
}

/// What `nacre ps --json` lists, if it is as much as is asked for.
fn listed<const COUNT: usize>(user: &User) -> Result<[Value; COUNT]> {
    let answer = user.nacre(&["ps", "--json"])?.code(0)?;
    let list: Vec<Value> = serde_json::from_str(&answer.out)?;
    list.try_into().map_err(|list| anyhow!("not {COUNT} sandboxes: {list:?}"))
}

/// The command with a terminal of 31 lines and 101 columns, by script(1).
fn in_terminal(command: &Command, user: &User) -> Command {
    let mut line = format!("stty rows 31 cols 101; {}", command.get_program().to_string_lossy());
    for arg in command.get_args() {
        line = format!("{line} '{}'", arg.to_string_lossy());
    }
    let mut script = Command::new("script");
    script.args(["-qec", &line, "/dev/null"]).env("NACRE_STATE", user.state()).stdin(Stdio::null());
    script
}
