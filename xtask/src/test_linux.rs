//! The layers with real Linux guests: on the KVM host, and under QEMU on this machine.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
use crate::guest_image::{GuestImage, busybox_rootfs};
use crate::host::machine::has_room_for_two;
use crate::host::{Host, NAME_VARIABLE, devices};
use crate::packages::containerd;
use crate::packages::kernel::Kernel;
use crate::packages::tree::Tree;
use crate::programs::Programs;
use crate::report::{result, say};
use crate::test::{Tally, build_bare_guest, build_test, count_tests};
use crate::{shell_image, test_queue};

/// A host of the tests' own that nobody takes down ends after so long with nothing to do.
const IDLE_MAX_S: &str = "60";
/// So many are done before a second host would be up.
const FEW_TESTS: usize = 8;
const QEMU: &str = "usr/bin/qemu-system-x86_64";
const VIRTIOFSD: &str = "usr/libexec/virtiofsd";

/// What a guest needs, as variables for a test program.
fn variables(cache: &Cache, programs: &Programs) -> Result<Vec<(&'static str, PathBuf)>> {
    let guest = GuestImage::prepare(cache, &programs.agent)?;
    let rootfs = busybox_rootfs(cache)?;
    let kernel = Kernel::prepare(cache)?;
    let shell = shell_image::prepare(cache, &kernel, &rootfs)?;
    Ok(vec![
        ("NACRE_KERNEL", guest.kernel),
        ("NACRE_BZIMAGE", kernel.bzimage(cache)?),
        ("NACRE_INITRAMFS", guest.initramfs),
        ("NACRE_SHELL_INITRAMFS", shell),
        ("NACRE_ROOTFS", rootfs),
        ("NACRE_CONTAINERD", containerd::prepare(cache)?),
        ("NACRE_BIN_DIR", programs.folder.clone()),
    ])
}

/// Builds everything and runs the Linux tests on the KVM host, one at a time on each host there is: a
/// test looks at all that there is on its host.
pub(crate) fn run(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let cache = Cache::open()?;
    let programs = Programs::build()?;
    let test = build_test(root, "linux")?;
    let names = names(&test, filter)?;
    say(&Host::choose(&cache)?.describe());
    let own = own_hosts(&cache, names.len())?;
    let hosts: Result<Vec<OwnHost>> = thread::scope(|scope| {
        let coming: Vec<_> = (0..own).map(|_| scope.spawn(|| OwnHost::up(&cache))).collect();
        coming.into_iter().map(|host| host.join().expect("a start does not panic")).collect()
    });
    let hosts = hosts?;
    // Made once: what it prepares is the same for all of them.
    let base = host_command(&cache, &programs)?;
    let command = |host: usize, name: &str| {
        let mut command = Command::new(base.get_program());
        command.args(base.get_args()).arg("--").arg(&test).args(["--exact", name]);
        command.arg("--show-output").stdin(Stdio::null());
        if let Some(host) = hosts.get(host) {
            command.env(NAME_VARIABLE, &host.name);
        }
        Ok(command)
    };
    let counted = test_queue::run(&names, hosts.len().max(1), command, result);
    *tally = counted?.and(tally);
    Ok(())
}

/// An emulated host that is kept up for the tests of this run alone.
struct OwnHost {
    name: String,
    /// Held as long as nobody else may call a host the same.
    _name_lock: File,
}

impl OwnHost {
    /// Boots one under the first name that is free.
    fn up(cache: &Cache) -> Result<Self> {
        let mut numbers = 0..;
        let (name, lock) = loop {
            let name = format!("linux-tests-{}", numbers.next().context("a number")?);
            if let Some(lock) = cache.try_lock(&name)? {
                break (name, lock);
            }
        };
        let host = Self { name, _name_lock: lock };
        // One of the same name may be left of a run that was killed.
        host.command()?.arg("down").output().context("cannot start my own program")?;
        let status = host.command()?.args(["up", "--idle", IDLE_MAX_S]).status();
        ensure!(status.context("cannot start my own program")?.success(), "no emulated host");
        Ok(host)
    }

    fn command(&self) -> Result<Command> {
        let mut command = Command::new(env::current_exe().context("my own program")?);
        command.arg("host").env(NAME_VARIABLE, &self.name);
        Ok(command)
    }
}

impl Drop for OwnHost {
    fn drop(&mut self) {
        // One that does not hear of it ends after a while with nothing to do.
        drop(self.command().map(|mut command| command.arg("down").status()));
    }
}

/// The names of a test program's tests, those that the filter lets through.
fn names(test: &Path, filter: &[String]) -> Result<Vec<String>> {
    let output = Command::new(test).args(["--list", "--format", "terse"]).args(filter).output();
    let output = output.context("cannot start the tests")?;
    ensure!(output.status.success(), "the tests are not listed: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// How many emulated hosts run tests side by side that are theirs alone; none where this machine is
/// the host, or where one that is kept up is enough. A test often waits, and most of them keep hardly
/// more than one processor busy; but a host has to boot first, and may use its memory.
fn own_hosts(cache: &Cache, tests: usize) -> Result<usize> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let Host::Emulated(kept, _) = Host::choose(cache)? else { return Ok(0) };
    Ok(match tests {
        0 => 0,
        FEW_TESTS.. if processors >= 2 && has_room_for_two() => 2,
        _ => usize::from(!kept.is_up()?),
    })
}

/// This same program, which knows how to run a command on whichever host there is, with all the
/// variables for a test program; `--` and that program are to follow.
pub(crate) fn host_command(cache: &Cache, programs: &Programs) -> Result<Command> {
    let (tools, virtiofsd) = tools(cache)?;
    let mut command = Command::new(env::current_exe().context("my own program")?);
    command.arg("host").arg("--bind").arg(cache.root());
    for (name, value) in variables(cache, programs)? {
        command.arg("--env").arg(format!("{name}={}", value.display()));
    }
    command.arg("--env").arg(format!("NACRE_TOOLS={}", tools.display()));
    command.arg("--env").arg(format!("NACRE_VIRTIOFSD={virtiofsd}"));
    for (name, value) in passthrough(cache)? {
        command.arg("--env").arg(format!("{name}={value}"));
    }
    Ok(command)
}

/// Which devices tests may give to guests, and what is on the disks among them: the emulated
/// host's, or those that the user names, about whose content nothing is known.
fn passthrough(cache: &Cache) -> Result<Vec<(&'static str, String)>> {
    if Host::is_direct()? {
        let named = env::var(devices::VARIABLE).ok();
        return Ok(named.map(|words| (devices::VARIABLE, words)).into_iter().collect());
    }
    let disk = devices::disk(cache)?.display().to_string();
    Ok(vec![(devices::VARIABLE, devices::names()), (devices::DISK_VARIABLE, disk)])
}

/// A root with fio and its like, and Debian's virtiofsd as words: the emulated host's own, and the
/// same out of the host's package tree where there is no such host.
fn tools(cache: &Cache) -> Result<(PathBuf, String)> {
    if !Host::is_direct()? {
        return Ok((PathBuf::from("/"), format!("/{VIRTIOFSD}")));
    }
    let tree = Tree::prepare(cache, &Kernel::prepare(cache)?)?;
    let virtiofsd = words(&tree.command(VIRTIOFSD)).into_string().ok();
    Ok((tree.path(""), virtiofsd.context("the cache's path is not text")?))
}

/// QEMU as words, for a program on the KVM host: the emulated host's own, or the same out of the
/// host's package tree.
pub(crate) fn qemu(cache: &Cache) -> Result<String> {
    if !Host::is_direct()? {
        return Ok(format!("/{QEMU}"));
    }
    let tree = Tree::prepare(cache, &Kernel::prepare(cache)?)?;
    qemu_of(&tree).into_string().ok().context("the cache's path is not text")
}

fn qemu_of(tree: &Tree) -> OsString {
    let mut qemu = words(&tree.command(QEMU));
    for folder in ["usr/share/qemu", "usr/share/seabios"] {
        qemu.push(format!(" -L {}", tree.path(folder).display()));
    }
    qemu
}

/// Builds everything and runs the interoperation tests on this machine.
pub(crate) fn interop(root: &Path, filter: &[String], tally: &mut Tally) -> Result<()> {
    let cache = Cache::open()?;
    let programs = Programs::build()?;
    build_bare_guest(root)?;
    let test = build_test(root, "interop")?;
    let tree = Tree::prepare(&cache, &Kernel::prepare(&cache)?)?;
    let mut command = Command::new(test);
    command.arg("--test-threads=1").args(filter).envs(variables(&cache, &programs)?);
    command.env("NACRE_QEMU", qemu_of(&tree));
    command.env("NACRE_QSD", words(&tree.command("usr/bin/qemu-storage-daemon")));
    command.env("NACRE_VIRTIOFSD", words(&tree.command(VIRTIOFSD)));
    count_tests(&mut command, tally)
}

/// A command as words for another program's variable; no part of it has spaces.
fn words(command: &Command) -> OsString {
    let mut words = command.get_program().to_owned();
    for argument in command.get_args() {
        words.push(" ");
        words.push(argument);
    }
    words
}
