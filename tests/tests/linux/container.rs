//! One container in one sandbox: output, exit codes, input, user, environment, image.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::nacre::{EATER, User, finish};

fn code(exit: RunExit) -> i32 {
    i32::from(u8::from(exit))
}

#[test]
fn what_the_container_prints_is_printed_alone_and_its_exit_code_is_the_commands() -> Result<()> {
    let script = "echo hello; echo to-stderr >&2; exit 42";
    let answer = User::new()?.run(&[], &["sh", "-c", script])?.code(42)?;
    ensure!(answer.out == "hello\n" && answer.said == "to-stderr\n", "{answer:?}");
    Ok(())
}

#[test]
fn a_container_ended_by_a_signal_gives_128_and_its_number() -> Result<()> {
    // The first process of a namespace is safe from its own signals, not from the kernel's.
    let script = "ulimit -t 1; while :; do :; done";
    User::new()?.run(&[], &["sh", "-c", script])?.code(128 + 9)?;
    Ok(())
}

#[test]
fn a_program_that_is_not_there_gives_127_and_one_that_is_no_program_126() -> Result<()> {
    let user = User::new()?;
    user.run(&[], &["no-such-program"])?.code(code(RunExit::NotFound))?.tells("no-such-program")?;
    user.run(&[], &["/etc/passwd"])?.code(code(RunExit::CannotExecute))?.tells("/etc/passwd")?;
    Ok(())
}

#[test]
fn standard_input_reaches_the_container_and_ends() -> Result<()> {
    let user = User::new()?;
    let mut command = user.run_command(&["-i"], &["md5sum"])?;
    let bytes: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().write_all(&bytes)?;
    command.stdin(file.reopen()?);
    let expected = std::process::Command::new("md5sum").arg(file.path()).output()?;
    let expected = String::from_utf8(expected.stdout)?;
    let answer = finish(&mut command)?.code(0)?;
    ensure!(answer.out.split(' ').next() == expected.split(' ').next(), "{answer:?} {expected}");
    Ok(())
}

#[test]
fn a_long_output_arrives_whole() -> Result<()> {
    let script = "dd if=/dev/zero bs=1M count=32 2>/dev/null | tr '\\0' x";
    let answer = User::new()?.run(&[], &["sh", "-c", script])?.code(0)?;
    ensure!(answer.out.len() == 32 << 20, "{} bytes", answer.out.len());
    ensure!(answer.out.bytes().all(|byte| byte == b'x'), "changed on the way");
    Ok(())
}

#[test]
fn environment_user_folder_and_host_name_are_as_asked_and_time_and_entropy_right() -> Result<()> {
    let script = "echo $GREETING; id -u; pwd; hostname; head -c 16 /dev/random | wc -c; date +%s";
    let options =
        ["-e", "GREETING=salve", "--user", "1000", "--workdir", "/tmp", "--hostname", "shell"];
    let answer = User::new()?.run(&options, &["sh", "-c", script])?.code(0)?;
    let rest = answer.out.strip_prefix("salve\n1000\n/tmp\nshell\n16\n");
    let guest: i64 = rest.with_context(|| format!("{answer:?}"))?.trim().parse()?;
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    ensure!((i64::try_from(host)? - guest).abs() < 120, "{guest} against {host}");
    Ok(())
}

#[test]
fn the_container_is_contained() -> Result<()> {
    let script = "echo pid $$; ls /proc/self/ns | wc -l; \
        grep -c . /proc/1/cmdline; grep CapEff /proc/self/status | cut -f2; \
        stat -f -c %T /sys/fs/cgroup; touch /proc/sys/kernel/x 2>/dev/null || echo ro; \
        touch /root-is-writable && echo rw";
    let answer = User::new()?.run(&[], &["sh", "-c", script])?.code(0)?;
    ensure!(answer.out.contains("pid 1\n"), "{answer:?}");
    ensure!(!answer.out.contains("000001ffffffffff"), "all capabilities: {answer:?}");
    ensure!(answer.out.contains("ro\n") && answer.out.contains("rw\n"), "{answer:?}");
    Ok(())
}

#[test]
fn the_root_file_system_of_the_host_is_not_changed() -> Result<()> {
    let user = User::new()?;
    user.run(&[], &["sh", "-c", "echo gone > /written; rm -rf /etc"])?.code(0)?;
    user.run(&[], &["sh", "-c", "test ! -e /written && test -e /etc/passwd"])?.code(0)?;
    Ok(())
}

#[test]
fn running_out_of_memory_has_its_own_code() -> Result<()> {
    let answer = User::new()?.run(&["--memory-limit", "32M"], EATER)?;
    answer.code(code(RunExit::OutOfMemory))?.tells("memory")?;
    Ok(())
}

#[test]
fn a_terminal_is_given_when_asked() -> Result<()> {
    let user = User::new()?;
    let run = user.run_command(&["-t"], &["sh", "-c", "test -t 0 && test -t 1 && stty size"])?;
    let mut line = run.get_program().to_string_lossy().into_owned();
    for arg in run.get_args() {
        line = format!("{line} '{}'", arg.to_string_lossy());
    }
    // script(1) gives the command a terminal of the asked size.
    let mut command = std::process::Command::new("script");
    command.args(["-qec", &format!("stty rows 31 cols 101; {line}"), "/dev/null"]);
    command.env("NACRE_STATE", user.state()).stdin(Stdio::null());
    let answer = finish(&mut command)?.code(0)?;
    ensure!(answer.out.contains("31 101"), "{answer:?}");
    Ok(())
}
