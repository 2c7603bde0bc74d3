//! A sandbox that runs gets more and less: processors, memory, devices.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nacre_proto::exit::{DeviceExit, ResizeExit, RunExit};
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Answer, User};
use nacre_tests::process::{Signal, kill_child_of, until};
use rustix::process::{Pid, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const NAME: &str = "grows";
const MIB: u64 = 1 << 20;

/// A user's detached sandbox that does nothing by itself.
struct Sandbox {
    user: User,
    folder: TempDir,
    before: Leftovers,
}

impl Sandbox {
    fn start(options: &[&str]) -> Result<Self> {
        let (user, folder) = (User::new()?, tempfile::tempdir()?);
        let before = Leftovers::now(user.state())?;
        let mut all = vec!["--name", NAME, "--detach"];
        all.extend(options);
        let stay = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
        user.run(&all, &["sh", "-c", stay])?.code(0)?;
        Ok(Self { user, folder, before })
    }

    fn resize(&self, words: &[&str]) -> Result<Answer> {
        self.user.nacre(&[&["resize", NAME], words].concat())
    }

    fn device(&self, words: &[&str]) -> Result<Answer> {
        self.user.nacre(&[&["device"], words].concat())
    }

    fn add(&self, words: &[&str]) -> Result<Answer> {
        self.device(&[&["add", NAME], words].concat())
    }

    /// What a shell in the container prints, without the end of its line.
    fn shell(&self, script: &str) -> Result<String> {
        let answer = self.user.nacre(&["exec", NAME, "sh", "-c", script])?.code(0)?;
        Ok(answer.out.trim_end().to_owned())
    }

    fn total_memory(&self) -> Result<u64> {
        let kib = self.shell("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
        Ok(kib.parse::<u64>()? << 10)
    }

    fn listed(&self, id: &str) -> Result<Option<Value>> {
        let answer = self.device(&["list", "--json", NAME])?.code(0)?;
        let list: Vec<Value> = serde_json::from_str(&answer.out)?;
        Ok(list.into_iter().find(|device| device["id"] == id))
    }

    fn record(&self) -> Result<Value> {
        let answer = self.user.nacre(&["ps", "--json"])?.code(0)?;
        let list: Vec<Value> = serde_json::from_str(&answer.out)?;
        list.into_iter().find(|sandbox| sandbox["name"] == NAME).context("the sandbox")
    }

    fn supervisor(&self) -> Result<u32> {
        let pid = self.record()?["supervisor_pid"].as_u64().context("a process")?;
        Ok(u32::try_from(pid)?)
    }

    fn disk(&self) -> Result<PathBuf> {
        let path = self.folder.path().join("disk.img");
        fs::write(&path, b"on the disk\n".repeat(1 << 16))?;
        fs::File::options().write(true).open(&path)?.set_len(MIB)?;
        Ok(path)
    }

    fn end(self) -> Result<()> {
        self.user.nacre(&["rm", "-f", NAME])?.code(0)?;
        self.before.and_nothing_more(self.user.state())
    }
}

fn code(exit: impl Into<u8>) -> i32 {
    i32::from(exit.into())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_guest_is_given_processors_and_gives_them_up() -> Result<()> {
    let sandbox = Sandbox::start(&["--cpus", "1", "--max-cpus", "3"])?;
    ensure!(sandbox.shell("nproc")? == "1", "not one to begin with");
    let answer = sandbox.resize(&["--cpus", "3"])?.code(0)?;
    ensure!(answer.out.starts_with("3 of 3 CPUs, "), "{answer:?}");
    ensure!(sandbox.shell("nproc")? == "3", "{}", sandbox.shell("nproc")?);
    sandbox.resize(&["--cpus", "1"])?.code(0)?;
    ensure!(sandbox.shell("nproc")? == "1", "{}", sandbox.shell("nproc")?);
    let refused = code(ResizeExit::Refused);
    let why = "4 CPUs are more than the 3 that it can have";
    sandbox.resize(&["--cpus", "4"])?.code(refused)?.tells(why)?;
    sandbox.resize(&["--cpus", "0"])?.code(refused)?.tells("at least one CPU")?;
    sandbox.user.nacre(&["resize", "other", "--cpus", "1"])?.code(code(RunExit::Name))?;
    let record = sandbox.record()?;
    ensure!(record["cpus"] == 1 && record["max_cpus"] == 3, "{record}");
    sandbox.end()
}

#[test]
fn a_guest_is_given_memory_and_gives_it_up() -> Result<()> {
    let sandbox = Sandbox::start(&["--memory", "512M", "--max-memory", "1G"])?;
    let had = sandbox.total_memory()?;
    let answer = sandbox.resize(&["--memory", "768M"])?.code(0)?;
    ensure!(answer.out.ends_with(", 768M of 1G memory\n"), "{answer:?}");
    let has = sandbox.total_memory()?;
    ensure!(has > had + 250 * MIB, "{had} and then {has}");
    ensure!(sandbox.record()?["memory_bytes"] == 768 * MIB, "{}", sandbox.record()?);
    sandbox.resize(&["--memory", "512M"])?.code(0)?;
    let has = sandbox.total_memory()?;
    ensure!(has < had + 10 * MIB, "{had} and in the end {has}");
    let refused = code(ResizeExit::Refused);
    for (size, why) in [
        ("2G", "memory of 2G is more than the 1G that it can have"),
        ("600M", "memory comes and goes by 128M: not from 512M to 600M"),
        ("384M", ""),
    ] {
        sandbox.resize(&["--memory", size])?.code(refused)?.tells(why)?;
    }
    sandbox.end()
}

#[test]
fn a_disk_comes_to_a_container_that_runs_and_goes_when_nobody_uses_it() -> Result<()> {
    let sandbox = Sandbox::start(&[])?;
    let disk = text(&sandbox.disk()?);
    let answer = sandbox.add(&["disk", &disk])?.code(0)?;
    ensure!(
        answer.out.starts_with("disk-0 0000:") && answer.out.ends_with(" /dev/disk-0\n"),
        "{answer:?}"
    );
    let read = "dd if=/dev/disk-0 bs=512 count=1 iflag=direct 2>/dev/null | head -n 1";
    ensure!(sandbox.shell(read)? == "on the disk", "not what is on it");
    kill_child_of(sandbox.supervisor()?, "nacre-blk")?;
    sandbox.shell(
        "dd if=/dev/zero of=/dev/disk-0 bs=4k count=16 oflag=direct conv=fsync 2>/dev/null",
    )?;
    until("it serves again", || {
        let listed = sandbox.listed("disk-0")?.context("the disk")?;
        Ok(listed["state"] == "serving" && listed["restarts"] == 1)
    })?;
    sandbox.device(&["restart", NAME, "disk-0"])?.code(0)?;
    sandbox.shell("(sleep 1000 </dev/disk-0 >/dev/null 2>&1 & echo $! >/pid)")?;
    let kept = code(DeviceExit::Kept);
    let answer = sandbox.device(&["remove", NAME, "disk-0"])?.code(kept)?;
    let answer = answer.tells("the disk vda is in use: process ")?;
    answer.tells("(sleep) has it open")?;
    sandbox.shell("kill $(cat /pid)")?;
    sandbox.device(&["remove", NAME, "disk-0"])?.prints("disk-0: removed\n")?;
    ensure!(sandbox.listed("disk-0")?.is_none(), "it is still listed");
    ensure!(sandbox.shell("ls /dev | grep disk; true")?.is_empty(), "its node is still there");
    // The image is free again, and the next one has its name.
    sandbox.add(&["disk", &format!("{disk}:ro")])?.code(0)?;
    let write = "dd if=/dev/zero of=/dev/disk-0 bs=512 count=1 2>/dev/null && echo written; true";
    ensure!(sandbox.shell(write)?.is_empty(), "written although read-only");
    refusals(&sandbox)?;
    sandbox.end()
}

fn refusals(sandbox: &Sandbox) -> Result<()> {
    let refused = code(DeviceExit::Refused);
    for (words, why) in [
        (&["remove", NAME, "disk-7"][..], "there is no device `disk-7`"),
        (&["remove", NAME, "rootfs"], "the container's root is on it"),
        (&["remove", NAME, "vsock"], "it is the way to the guest's agent"),
        (&["add", NAME, "disk", "/no/disk"], "disk /no/disk: No such file"),
        (&["add", NAME, "share", "/no/folder:/mnt"], "volume /no/folder: No such file"),
        (&["add", NAME, "share", "/etc:/"], "can't be mounted on the container's `/`"),
    ] {
        sandbox.device(words)?.code(refused)?.tells(why)?;
    }
    sandbox.device(&["remove", "other", "disk-0"])?.code(code(RunExit::Name))?;
    Ok(())
}

#[test]
fn a_share_and_a_network_come_to_a_container_that_runs_and_go() -> Result<()> {
    let sandbox = Sandbox::start(&[])?;
    let share = sandbox.folder.path().join("share");
    fs::create_dir(&share)?;
    fs::write(share.join("file"), "of the host\n")?;
    let answer = sandbox.add(&["share", &format!("{}:/mnt/a/b", share.display())])?.code(0)?;
    ensure!(answer.out.ends_with(" /mnt/a/b\n"), "{answer:?}");
    ensure!(sandbox.shell("cat /mnt/a/b/file")? == "of the host", "not the host's");
    kill_child_of(sandbox.supervisor()?, "nacre-fs")?;
    sandbox.shell("echo of the guest >/mnt/a/b/file; sync")?;
    ensure!(fs::read_to_string(share.join("file"))? == "of the guest\n", "not the guest's");
    sandbox.shell("(cd /mnt/a/b; sleep 1000 >/dev/null 2>&1 & echo $! >/pid)")?;
    let kept = code(DeviceExit::Kept);
    sandbox.device(&["remove", NAME, "volume-0"])?.code(kept)?.tells("is in use")?;
    sandbox.shell("kill $(cat /pid); ls /mnt/a/b")?;
    sandbox.device(&["remove", NAME, "volume-0"])?.code(0)?;
    ensure!(sandbox.shell("ls /mnt/a/b")?.is_empty(), "the share is still there");

    let answer = sandbox.add(&["net"])?.code(0)?;
    ensure!(answer.out.starts_with("net 0000:") && answer.out.ends_with(" eth0\n"), "{answer:?}");
    let gateway = sandbox.shell("ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'")?;
    sandbox.shell(&format!("ping -c 1 -W 20 {gateway} >/dev/null"))?;
    sandbox.device(&["remove", NAME, "net"])?.code(0)?;
    ensure!(sandbox.shell("ls /sys/class/net")? == "lo", "the interface is still there");
    sandbox.end()
}

#[test]
fn a_killed_supervisor_takes_with_it_what_was_added() -> Result<()> {
    let sandbox = Sandbox::start(&[])?;
    let disk = text(&sandbox.disk()?);
    sandbox.add(&["disk", &disk])?.code(0)?;
    sandbox.add(&["net"])?.code(0)?;
    let supervisor = Pid::from_raw(i32::try_from(sandbox.supervisor()?)?).context("a process")?;
    kill_process(supervisor, Signal::KILL)?;
    until("it is dead", || Ok(sandbox.record()?["status"] == "dead"))?;
    sandbox.end()
}
