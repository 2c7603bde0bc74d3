//! Bad input of `nacre run`: for each kind one line that says what and where, an exit code of its
//! own, and nothing left behind.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::RunExit;
use nacre_tests::artifacts;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Answer, User, finish};

/// What one kind of bad input is answered with.
struct Refusal<'a> {
    exit: RunExit,
    /// How the one line begins, after `nacre: `.
    line: &'a str,
}

impl Refusal<'_> {
    fn check(&self, answer: Answer) -> Result<()> {
        let answer = answer.code(i32::from(u8::from(self.exit)))?;
        let lines: Vec<&str> = answer.said.lines().collect();
        let [line] = lines[..] else { anyhow::bail!("not one line: {answer:#?}") };
        let begins = line.strip_prefix("nacre: ").is_some_and(|rest| rest.starts_with(self.line));
        ensure!(begins, "not {:?}: {answer:#?}", self.line);
        ensure!(answer.out.is_empty(), "{answer:#?}");
        Ok(())
    }
}

fn refused(options: &[&str], exit: RunExit, line: &str) -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let answer = user.run(options, &["true"])?;
    Refusal { exit, line }.check(answer).with_context(|| format!("{options:?}"))?;
    before.and_nothing_more(user.state())
}

/// `command` under setpriv(1), as another user or as a root without some capabilities.
fn under_setpriv(options: &[&str], command: &Command, user: &User) -> Result<Answer> {
    let mut robbed = Command::new("setpriv");
    robbed.args(options).arg(command.get_program()).args(command.get_args());
    finish(robbed.env("NACRE_STATE", user.state()))
}

#[test]
fn a_kernel_that_is_missing_empty_or_none_is_named() -> Result<()> {
    let exit = RunExit::BootFile;
    refused(&["--kernel", "/no/kernel"], exit, "kernel /no/kernel: No such file")?;
    let folder = tempfile::tempdir()?;
    let dir = folder.path().display().to_string();
    refused(&["--kernel", &dir], exit, &format!("kernel {dir}: not a file"))?;
    let file = format!("{dir}/kernel");
    File::create(&file)?;
    refused(&["--kernel", &file], exit, &format!("kernel {file}: the file is empty"))?;
    // It opens and can't be read where nothing is mapped.
    let line = "kernel /proc/self/mem: Input/output error";
    refused(&["--kernel", "/proc/self/mem"], exit, line)?;
    refused(&["--initramfs", "/no/initrd"], exit, "initramfs /no/initrd: No such file")
}

#[test]
fn a_kernel_of_garbage_is_named_by_the_vmm() -> Result<()> {
    let garbage = tempfile::NamedTempFile::new()?;
    fs::write(garbage.path(), vec![0xa5; 1 << 20])?;
    let path = garbage.path().display().to_string();
    let line = format!(
        "nacre-vmm can't use the kernel or the initramfs; its last words: nacre-vmm: can't make \
         the VM: can't boot: the kernel {path} is neither"
    );
    refused(&["--kernel", &path], RunExit::BootFile, &line)
}

#[test]
fn a_root_file_system_that_is_missing_or_none_is_named() -> Result<()> {
    let exit = RunExit::RootFs;
    refused(&["--rootfs", "/no/rootfs"], exit, "root file system /no/rootfs: No such file")?;
    let line = "root file system /proc/version: not a folder";
    refused(&["--rootfs", "/proc/version"], exit, line)?;
    refused(&["--image", "/no/image"], exit, "image /no/image: ")
}

#[test]
fn a_disk_that_is_missing_empty_or_none_is_named() -> Result<()> {
    let exit = RunExit::Disk;
    refused(&["--disk", "/no/disk"], exit, "disk /no/disk: No such file")?;
    refused(&["--disk", "/dev/null"], exit, "disk /dev/null: neither a file nor a block device")?;
    let file = tempfile::NamedTempFile::new()?;
    let path = file.path().display().to_string();
    refused(&["--disk", &path], exit, &format!("disk {path}: the file is empty"))?;
    refused(&["-v", "/no/folder:/data"], RunExit::Volume, "volume /no/folder: No such file")
}

#[test]
fn what_root_may_not_read_is_named() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let folder = tempfile::tempdir()?;
    let (file, dir) = (folder.path().join("file"), folder.path().join("dir"));
    fs::write(&file, vec![7; 4096])?;
    fs::create_dir(&dir)?;
    for path in [&file, &dir] {
        fs::set_permissions(path, Permissions::from_mode(0o000))?;
    }
    let (file, dir) = (file.display().to_string(), dir.display().to_string());
    for (option, path, exit, what) in [
        ("--kernel", &file, RunExit::BootFile, "kernel"),
        ("--disk", &file, RunExit::Disk, "disk"),
        ("--rootfs", &dir, RunExit::RootFs, "root file system"),
    ] {
        let command = user.run_command(&[option, path], &["true"])?;
        // Without these two, root is held to the modes of its own files.
        let robbed = ["--bounding-set", "-dac_override,-dac_read_search"];
        let answer = under_setpriv(&robbed, &command, &user)?;
        let line = format!("{what} {path}: Permission denied");
        Refusal { exit, line: &line }.check(answer).context(option)?;
    }
    before.and_nothing_more(user.state())
}

#[test]
fn without_root_it_is_said_at_once_what_is_needed() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    // Bad input that would be told about next.
    let command = user.run_command(&["--kernel", "/no/kernel"], &["true"])?;
    // Nobody, who can still reach the program wherever it was built.
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps"];
    let options = [&nobody[..], &["+dac_read_search", "--ambient-caps", "+dac_read_search"]];
    let answer = under_setpriv(&options.concat(), &command, &user)?;
    let line = "`nacre run` needs root, for mount namespaces, taps and /dev/kvm, and runs as user \
                65534: try it with sudo";
    Refusal { exit: RunExit::NotPermitted, line }.check(answer)?;
    let answer = under_setpriv(&["--bounding-set", "-sys_admin"], &command, &user)?;
    let line = "`nacre run` needs the capability CAP_SYS_ADMIN, which this root does not have";
    Refusal { exit: RunExit::NotPermitted, line }.check(answer)?;
    before.and_nothing_more(user.state())
}

#[test]
fn memory_of_nothing_or_too_much_is_refused() -> Result<()> {
    let exit = RunExit::Memory;
    refused(&["--memory", "0"], exit, "a sandbox needs memory: --memory 0 was asked for")?;
    let line = "memory of 128G is more than the host's memory and swap, ";
    refused(&["--memory", "128G"], exit, line)?;
    // 2 to the 53rd: no x86 has more than 52 bits.
    refused(&["--memory", "8192T"], exit, "memory of 8192T is more than ")?;
    let line = "nacre-vmm can't have the guest's memory; its last words: nacre-vmm: can't make \
                the VM: no guest memory: --memory of 67108865 bytes is no multiple of 2 MiB";
    refused(&["--memory", "67108865"], exit, line)
}

#[test]
fn processors_of_none_or_more_than_kvm_allows_are_refused() -> Result<()> {
    refused(&["--cpus", "0"], RunExit::Cpus, "a sandbox needs at least one CPU")?;
    let line = "nacre-vmm can't have that many CPUs; its last words: nacre-vmm: can't make the \
                VM: no vCPUs: 60000 vCPUs are more than the ";
    refused(&["--cpus", "60000"], RunExit::Cpus, line)
}

#[test]
fn a_host_without_kvm_is_told() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let run = user.run_command(&[], &["true"])?;
    let mut without = Command::new("unshare");
    let script = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    without.args(["--mount", "sh", "-c", script, "sh"]).arg(run.get_program()).args(run.get_args());
    let answer = finish(without.env("NACRE_STATE", user.state()))?;
    let line = "nacre-vmm can't use KVM as asked; its last words: nacre-vmm: can't make the VM: \
                no VM in KVM: KVM on this host lacks ";
    Refusal { exit: RunExit::Kvm, line }.check(answer)?;
    before.and_nothing_more(user.state())
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused() -> Result<()> {
    refused(&["-v", "/tmp"], RunExit::Usage, "`/tmp` is no volume: HOST:GUEST")?;
    refused(&["--user", "nobody-here"], RunExit::Usage, "user `nobody-here` is not in")?;
    let user = User::new()?;
    let answer = user.run(&["--no-such-option"], &["true"])?;
    answer.code(i32::from(u8::from(RunExit::Usage)))?.tells("--no-such-option")?;
    Ok(())
}

/// A folder with all programs but `name`, which is `instead` or missing.
fn programs_but(name: &str, instead: Option<&Path>) -> Result<tempfile::TempDir> {
    let bin = tempfile::tempdir()?;
    let real = artifacts::bin_dir()?;
    for program in ["nacre-vmm", "nacre-fs", "nacre-vsock", "nacre-blk", "nacre-net"] {
        let target = real.join(program);
        match instead {
            _ if program != name => symlink(target, bin.path().join(program))?,
            Some(instead) => symlink(instead, bin.path().join(program))?,
            None => {}
        }
    }
    Ok(bin)
}

/// A backend's program and what it is called by messages.
const BACKENDS: [(&str, &str); 4] = [
    ("nacre-vsock", "nacre-vsock of `vsock`"),
    ("nacre-fs", "nacre-fs of `rootfs`"),
    ("nacre-blk", "nacre-blk of `disk-0`"),
    ("nacre-net", "nacre-net of `net`"),
];

fn without_program(name: &str, instead: Option<&Path>, refusal: &Refusal<'_>) -> Result<()> {
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(1 << 20)?;
    let disk = disk.path().display().to_string();
    let bin = programs_but(name, instead)?;
    let dir = bin.path().display().to_string();
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    let options = ["--bin-dir", &dir, "--net", "--disk", &disk];
    let answer = user.run(&options, &["true"])?;
    let line = refusal.line.replace("BIN", &dir);
    Refusal { exit: refusal.exit, line: &line }.check(answer).with_context(|| name.to_owned())?;
    before.and_nothing_more(user.state())
}

#[test]
fn a_missing_program_is_named() -> Result<()> {
    for (name, called) in BACKENDS.into_iter().chain([("nacre-vmm", "nacre-vmm")]) {
        let line = format!("{called}: no such program: BIN/{name}");
        without_program(name, None, &Refusal { exit: RunExit::Program, line: &line })?;
    }
    // A file that is no program.
    let line = "nacre-vmm: can't start BIN/nacre-vmm: Permission denied";
    let refusal = Refusal { exit: RunExit::Program, line };
    without_program("nacre-vmm", Some(Path::new("/etc/passwd")), &refusal)
}

#[test]
fn a_program_that_exits_at_once_is_named() -> Result<()> {
    let instead = Some(Path::new("/bin/false"));
    for (name, called) in BACKENDS {
        let line = format!("{called} ended with code 1");
        without_program(name, instead, &Refusal { exit: RunExit::BackendStart, line: &line })?;
    }
    let refusal = Refusal { exit: RunExit::VmmDied, line: "nacre-vmm failed" };
    without_program("nacre-vmm", instead, &refusal)
}

#[test]
fn an_agent_that_never_answers_has_its_own_code() -> Result<()> {
    let user = User::new()?;
    let before = Leftovers::now(user.state())?;
    // Its init finds no share called `job` and sleeps.
    let silent = artifacts::shell_initramfs()?.display().to_string();
    let answer = user.run(&["--initramfs", &silent, "--agent-timeout", "20"], &["true"])?;
    let answer = answer.code(i32::from(u8::from(RunExit::AgentSilent)))?;
    // After the one line comes what the guest's console said last.
    let first = answer.said.lines().next().unwrap_or_default();
    let line = "nacre: the guest's agent does not answer: no sign of progress for 2";
    ensure!(first.starts_with(line), "{answer:#?}");
    before.and_nothing_more(user.state())
}
