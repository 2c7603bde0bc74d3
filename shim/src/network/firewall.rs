//! Letting a guest's packets out through the host, with the host's address, and back.
//!
//! With `nft` it is one table a sandbox, removed as one; with `iptables` three rules that carry
//! the sandbox's interface and are removed one by one. Which one is there decides.

use std::{
    env,
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::{log_file, network::NetworkError, record::Firewall};

/// How long a program of the host may take: generous, for they wait for locks of their own.
const RUN_WITHIN: Duration = Duration::from_secs(20);

/// Runs a program of the host.
///
/// # Errors
///
/// Fails if it is missing, does not end or does not succeed; the error carries the first line it
/// printed.
pub(crate) fn run(
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<(), NetworkError> {
    run_within(RUN_WITHIN, program, arguments, input)?;
    Ok(())
}

/// Runs a program of the host and gives what it prints.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn ask(program: &'static str, arguments: &[&str]) -> Result<String, NetworkError> {
    run_within(RUN_WITHIN, program, arguments, "")
}

/// Whether `child` ends in time.
fn ends_within(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn run_within(
    limit: Duration,
    program: &'static str,
    arguments: &[&str],
    input: &str,
) -> Result<String, NetworkError> {
    let failed = |source| match source {
        error if io::Error::kind(&error) == io::ErrorKind::NotFound => {
            NetworkError::MissingProgram(program)
        }
        source => NetworkError::Run { program, source },
    };
    log::debug!("runs {program} {arguments:?} {input}");
    // Unlike a pipe it takes however much is printed before somebody reads.
    let printed = memfd_create("printed", MemfdFlags::CLOEXEC).map(File::from);
    let mut printed = printed.map_err(|errno| failed(errno.into()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(printed.try_clone().map_err(failed)?)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // All that is ever fed fits into a pipe, so it does not block.
    let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    if !ends_within(&child, limit).map_err(failed)? {
        child.kill().and_then(|()| child.wait()).map_err(failed)?;
        let (arguments, seconds) = (arguments.join(" "), limit.as_secs());
        return Err(NetworkError::Hung { program, arguments, seconds });
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        fed.map_err(failed)?;
        let mut text = Vec::new();
        printed.rewind().and_then(|()| printed.read_to_end(&mut text)).map_err(failed)?;
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = log_file::printable(said.lines().next().unwrap_or("nothing"));
    Err(NetworkError::Failed { program, arguments: arguments.join(" "), said })
}

fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The way that this host offers.
///
/// # Errors
///
/// Fails if it offers none.
pub fn available() -> Result<Firewall, NetworkError> {
    if is_installed("nft") {
        Ok(Firewall::Nft)
    } else if is_installed("iptables") {
        Ok(Firewall::Iptables)
    } else {
        Err(NetworkError::NoFirewall)
    }
}

/// Lets the guest behind `tap` out.
///
/// # Errors
///
/// Fails if the host's program does.
pub fn add(firewall: Firewall, tap: &str, guest: Ipv4Addr) -> Result<(), NetworkError> {
    match firewall {
        Firewall::Nft => run("nft", &["-f", "-"], &nft_table(tap, guest)),
        Firewall::Iptables => iptables_rules(tap, guest)
            .iter()
            .try_for_each(|rule| run("iptables", &rule_arguments("-I", rule), "")),
    }
}

/// Undoes [`add`], as far as it went.
pub fn remove(firewall: Firewall, tap: &str, guest: Ipv4Addr) {
    let undo = |program, arguments: &[&str]| {
        if let Err(error) = run(program, arguments, "") {
            log::debug!("{error}");
        }
    };
    match firewall {
        Firewall::Nft => undo("nft", &["delete", "table", "ip", tap]),
        Firewall::Iptables => iptables_rules(tap, guest)
            .iter()
            .for_each(|rule| undo("iptables", &rule_arguments("-D", rule))),
    }
}

fn nft_table(tap: &str, guest: Ipv4Addr) -> String {
    format!(
        "table ip {tap} {{
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    ip saddr {guest} oifname != \"{tap}\" masquerade
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname \"{tap}\" ip saddr != {guest} drop
    oifname \"{tap}\" ct state established,related accept
    oifname \"{tap}\" drop
  }}
}}
"
    )
}

/// Table and rule of each; the command goes between.
type Rule = (&'static str, Vec<String>);

fn iptables_rules(tap: &str, guest: Ipv4Addr) -> [Rule; 4] {
    let rule = |text: String| text.split(' ').map(str::to_owned).collect();
    [
        ("nat", rule(format!("POSTROUTING -s {guest}/32 ! -o {tap} -j MASQUERADE"))),
        ("filter", rule(format!("FORWARD -i {tap} -s {guest}/32 -j ACCEPT"))),
        ("filter", rule(format!("FORWARD -o {tap} -j DROP"))),
        (
            "filter",
            rule(format!("FORWARD -o {tap} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT")),
        ),
    ]
}

fn rule_arguments<'a>(command: &'a str, (table, rule): &'a Rule) -> Vec<&'a str> {
    ["-w", "-t", table, command].into_iter().chain(rule.iter().map(String::as_str)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_sandbox_is_named_after_its_interface() {
        let table = nft_table("nacre3", Ipv4Addr::new(10, 88, 0, 14));
        assert!(table.starts_with("table ip nacre3 {"));
        assert!(table.contains("ip saddr 10.88.0.14 oifname != \"nacre3\" masquerade"));
    }

    #[test]
    fn a_failing_program_is_told_with_what_it_said() {
        let error = run("sh", &["-c", "echo no luck >&2; exit 1"], "").unwrap_err();
        assert_eq!(error.to_string(), "`sh -c echo no luck >&2; exit 1` failed and said: no luck");
        assert!(matches!(
            run("nacre-no-such-program", &[], ""),
            Err(NetworkError::MissingProgram("nacre-no-such-program"))
        ));
    }

    #[test]
    fn all_that_a_program_prints_is_given() {
        assert_eq!(ask("seq", &["30000"]).unwrap().lines().count(), 30_000);
    }

    #[test]
    fn a_program_that_hangs_is_killed_and_told() {
        let error = run_within(Duration::from_millis(50), "sleep", &["1000"], "").unwrap_err();
        let words = "`sleep 1000` does not end: it was killed after 0 s";
        assert_eq!(error.to_string(), words);
    }
}
