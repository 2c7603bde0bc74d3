//! A terminal.

use anyhow::{Result, ensure};
use nacre_tests::nacre::SANDBOX_PATIENCE;
use nacre_tests::process::until;
use nacre_tests::terminal::Terminal;
use nacre_tests::xtask::{host_up, xtask};

/// Ctrl-C.
const INTERRUPT: &str = "\x03";

#[test]
fn size_keys_and_interrupt_of_a_terminal_reach_the_container() -> Result<()> {
    host_up()?;
    let script = "stty size; trap 'stty size' WINCH; trap 'echo interrupted; exit 5' INT; \
        echo up; read line; echo got $line; while :; do sleep 0.1; done";
    let mut terminal = Terminal::open(31, 101)?;
    ensure!(terminal.is_cooked()?, "a fresh terminal that is raw");
    let run = terminal.start(&xtask(&["run", "-it", "--", "sh", "-c", script])?)?;
    terminal.until("31 101\r\n")?;
    terminal.until("up\r\n")?;
    ensure!(!terminal.is_cooked()?, "keys are not passed on as they come");
    terminal.types("some keys\n")?;
    terminal.until("got some keys\r\n")?;
    terminal.resize(40, 120)?;
    terminal.until("40 120\r\n")?;
    terminal.types(INTERRUPT)?;
    terminal.until("interrupted\r\n")?;
    let (status, said) = run.wait_for(SANDBOX_PATIENCE)?;
    ensure!(status.code() == Some(5), "{status}: {said}");
    ensure!(terminal.is_cooked()?, "the terminal's modes are not given back");
    Ok(())
}

#[test]
fn interrupting_before_anything_runs_leaves_the_terminal_as_it_was() -> Result<()> {
    host_up()?;
    let mut terminal = Terminal::open(24, 80)?;
    let mut run = terminal.start(&xtask(&["run", "-it", "--", "sleep", "1000"])?)?;
    // Raw as soon as the job is on its way, and long before the container runs.
    until("a raw terminal", || Ok(!terminal.is_cooked()? || !run.is_running()?))?;
    terminal.types(INTERRUPT)?;
    terminal.types(INTERRUPT)?;
    run.terminate()?;
    let (status, said) = run.wait_for(SANDBOX_PATIENCE)?;
    ensure!(status.code().is_some_and(|code| code != 0), "{status}: {said}");
    ensure!(terminal.is_cooked()?, "the terminal's modes are not given back");
    Ok(())
}
