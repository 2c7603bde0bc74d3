//! Device processes die and are replaced while the guest works; it must not notice.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_proto::exit::{DeviceExit, RunExit};
use nacre_tests::artifacts;
use nacre_tests::leftovers::Leftovers;
use nacre_tests::nacre::{Answer, Attached, SANDBOX_PATIENCE, User};
use nacre_tests::process::{Signal, child_of, kill_child_of, until};
use rustix::process::kill_process;
use serde_json::Value;
use tempfile::TempDir;

const NAME: &str = "restarts";
/// Writes each block of 16 MiB once, at a pace that leaves time for many deaths, and reads them all.
const FIO: &str = "fio --name=verify --filename=/dev/disk-0 --direct=1 --ioengine=libaio \
    --iodepth=16 --rw=randwrite --bs=4k --size=16M --rate_iops=400 --verify=crc32c --do_verify=1 \
    --minimal >/dev/null && echo verified";
/// Waits for SIGTERM and ends in order.
const STAY: &str = "trap 'exit 0' TERM; echo stays; while :; do sleep 0.1; done";

/// A user's running sandbox with a disk and a folder of programs of its own.
struct Sandbox {
    user: User,
    run: Attached,
    folder: TempDir,
    before: Leftovers,
}

impl Sandbox {
    fn start(options: &[&str], script: &str) -> Result<Self> {
        let (user, folder) = (User::new()?, tempfile::tempdir()?);
        let before = Leftovers::now(user.state())?;
        let disk = folder.path().join("disk.img");
        fs::File::create(&disk)?.set_len(64 << 20)?;
        for entry in fs::read_dir(artifacts::bin_dir()?)? {
            let path = entry?.path();
            let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
            if name.starts_with("nacre-") && !name.contains('.') && path.is_file() {
                symlink(&path, folder.path().join(name))?;
            }
        }
        let (disk, programs) = (disk.display().to_string(), folder.path().display().to_string());
        let mut all = vec!["--name", NAME, "--disk", &disk, "--bin-dir", &programs];
        all.extend(options);
        let script = format!("echo up; {script}; {STAY}");
        let run = Attached::start(&mut user.run_command(&all, &["sh", "-c", &script])?)?;
        Self { user, run, folder, before }.until("up")
    }

    /// Puts a program in the place of another one of the sandbox's own.
    fn write_program(&self, name: &str, script: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        let new = self.folder.path().join("new");
        fs::write(&new, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::rename(&new, &path)?;
        Ok(path)
    }

    fn device(&self, words: &[&str]) -> Result<Answer> {
        self.user.nacre(&[&["device"], words].concat())
    }

    fn listed(&self, id: &str) -> Result<Value> {
        let answer = self.device(&["list", "--json", NAME])?.code(0)?;
        let list: Vec<Value> = serde_json::from_str(&answer.out)?;
        list.into_iter().find(|device| device["id"] == id).context("the device")
    }

    fn serves(&self, id: &str) -> Result<bool> {
        Ok(self.listed(id)?["state"] == "serving")
    }

    /// The guest's kernel has nothing to say against its devices.
    fn console_is_clean(&self) -> Result<()> {
        let console = self.user.state().join(NAME).join("console.log");
        let said = fs::read_to_string(console)?;
        let bad = ["I/O error", "virtio_blk", "blk_update", "NETDEV WATCHDOG", "hung", "reset"];
        ensure!(!bad.iter().any(|bad| said.contains(bad)), "the guest noticed: {said}");
        Ok(())
    }

    /// Waits for a line of the container's; without it, all that was said is told.
    fn until(mut self, line: &str) -> Result<Self> {
        if let Err(error) = self.run.until(line) {
            self.run.process().signal(Signal::KILL)?;
            bail!("{error}: {:?}", self.run.wait()?);
        }
        Ok(self)
    }

    /// Has the container end, which it does in order, and nothing is left.
    fn end(mut self) -> Result<Answer> {
        self.console_is_clean()?;
        self.run.process().signal(Signal::TERM)?;
        let answer = self.run.wait()?.code(0)?;
        self.before.and_nothing_more(self.user.state())?;
        Ok(answer)
    }
}

/// Kills a child of a process again and again.
struct Storm {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Storm {
    fn start(parent: u32, name: &'static str) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let thread = thread::spawn(move || {
            let mut kills = 0;
            while !is_over.load(Ordering::Relaxed) {
                if let Some(child) = child_of(parent, name)? {
                    // It may have ended in between.
                    kills += u64::from(kill_process(child, Signal::KILL).is_ok());
                }
                // Not a wait for anything: the pauses differ, so that deaths fall anywhere.
                thread::sleep(Duration::from_millis(300 + kills * 97 % 800));
            }
            Ok(kills)
        });
        Self { over, thread }
    }

    fn end(self) -> Result<u64> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the storm does not panic")
    }
}

#[test]
fn a_disk_whose_process_is_killed_again_and_again_loses_nothing() -> Result<()> {
    let mut sandbox = Sandbox::start(&["--rootfs", "/"], FIO)?;
    let storm = Storm::start(sandbox.run.process().id(), "nacre-blk");
    let verified = sandbox.until("verified");
    let kills = storm.end()?;
    let sandbox = verified?;
    until("it serves again", || sandbox.serves("disk-0"))?;
    let disk = sandbox.listed("disk-0")?;
    ensure!(kills >= 5 && disk["restarts"].as_u64() > Some(2), "{kills} kills: {disk}");
    let said = sandbox.end()?.said;
    let line = "nacre-blk of `disk-0` was ended by signal 9; it was replaced and serves again";
    ensure!(said.contains(line), "{said}");
    Ok(())
}

#[test]
fn a_stream_goes_on_while_the_network_s_process_is_killed_again_and_again() -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let script = format!(
        "gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'); \
         seq 1000000 1999999 | nc $gateway {port}; echo sent"
    );
    let mut sandbox = Sandbox::start(&["--net"], &script)?;
    let stream = accepted(&listener)?;
    let parent = sandbox.run.process().id();
    let kills = read_and_kill(stream, || kill_child_of(parent, "nacre-net"))?;
    let sandbox = sandbox.until("sent")?;
    until("it serves again", || sandbox.serves("net"))?;
    let net = sandbox.listed("net")?;
    ensure!(net["restarts"].as_u64() >= Some(kills), "{kills} kills: {net}");
    sandbox.end()?.tells("nacre-net of `net` was ended by signal 9; it was replaced")?;
    Ok(())
}

fn accepted(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let mut stream = None;
    until("the guest connects", || {
        stream = listener.accept().ok();
        Ok(stream.is_some())
    })?;
    let (stream, _) = stream.context("a stream")?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SANDBOX_PATIENCE))?;
    Ok(stream)
}

/// Reads all numbers in their order, and calls `kill` each mebibyte; answers how often.
fn read_and_kill(mut stream: TcpStream, kill: impl Fn() -> Result<()>) -> Result<u64> {
    let (mut kills, mut came) = (0, Vec::new());
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = stream.read(&mut buffer)?;
        came.extend_from_slice(&buffer[..read]);
        if read == 0 {
            break;
        }
        if came.len() as u64 >> 20 > kills {
            kills += 1;
            kill()?;
        }
    }
    let mut sent = (1_000_000..2_000_000_u64).map(|number| number.to_string());
    let text = String::from_utf8(came)?;
    let mut lines = text.lines();
    ensure!(sent.by_ref().all(|number| lines.next() == Some(number.as_str())), "bytes are lost");
    ensure!(lines.next().is_none() && kills >= 5, "after {kills} kills");
    Ok(kills)
}

#[test]
fn a_disk_s_process_is_upgraded_under_load_and_falls_back_from_what_does_not_serve() -> Result<()> {
    let sandbox = Sandbox::start(&["--rootfs", "/"], FIO)?;
    let good = sandbox.folder.path().join("upgraded-blk");
    fs::copy(artifacts::program("nacre-blk")?, &good)?;
    let good = good.display().to_string();
    let upgrade = |binary: &str| sandbox.device(&["upgrade", NAME, "disk-0", "--binary", binary]);
    for _ in 0..3 {
        sandbox.device(&["restart", NAME, "disk-0"])?.code(0)?;
        upgrade(&good)?.code(0)?;
    }
    let fell_back = i32::from(u8::from(DeviceExit::FellBack));
    upgrade("/bin/false")?.code(fell_back)?.tells("ended with code 1")?;
    let mute = sandbox.write_program("mute", "exec sleep 1000")?.display().to_string();
    let begun = Instant::now();
    upgrade(&mute)?.code(fell_back)?.tells("does not become ready")?;
    ensure!(begun.elapsed() < SANDBOX_PATIENCE / 2, "too late: {:?}", begun.elapsed());
    refusals(&sandbox)?;
    let disk = sandbox.listed("disk-0")?;
    ensure!(disk["program"] == good.as_str() && disk["state"] == "serving", "{disk}");
    sandbox.until("verified")?.end()?;
    Ok(())
}

fn refusals(sandbox: &Sandbox) -> Result<()> {
    let refused = i32::from(u8::from(DeviceExit::Refused));
    for (words, why) in [
        (&["upgrade", NAME, "disk-0", "--binary", "/no/program"][..], "no such program"),
        (&["upgrade", NAME, "disk-0", "--binary", "/etc/passwd"], "not an executable file"),
        (&["restart", NAME, "disk-7"], "no device `disk-7`"),
    ] {
        sandbox.device(words)?.code(refused)?.tells(why)?;
    }
    let name = i32::from(u8::from(RunExit::Name));
    sandbox.device(&["restart", "unknown", "disk-0"])?.code(name)?.tells("`unknown`")?;
    Ok(())
}

#[test]
fn a_successor_that_is_killed_on_its_way_is_replaced_and_one_that_never_starts_ends_all()
-> Result<()> {
    let mut sandbox = Sandbox::start(&[], "dd if=/dev/disk-0 of=/dev/null bs=1M count=1")?;
    let parent = sandbox.run.process().id();
    let real = artifacts::program("nacre-blk")?;
    let slow = format!("sleep 1; exec {} \"$@\"", real.display());
    sandbox.write_program("nacre-blk", &slow)?;
    let sandbox = sandbox.until("stays")?;
    for _ in 0..3 {
        kill_child_of(parent, "nacre-blk")?;
        until("the next is there", || Ok(child_of(parent, "nacre-blk")?.is_some()))?;
    }
    until("it serves again", || sandbox.serves("disk-0"))?;
    sandbox
        .user
        .nacre(&["exec", NAME, "dd", "if=/dev/disk-0", "of=/dev/null", "bs=1M"])?
        .code(0)?;

    sandbox.write_program("nacre-blk", "echo no disk today >&2; exit 3")?;
    kill_child_of(parent, "nacre-blk")?;
    let Sandbox { user, run, before, .. } = sandbox;
    let answer = run.wait()?.code(i32::from(u8::from(RunExit::BackendDied)))?;
    let told = "ended with code 3; its last words: no disk today";
    let lines = answer.said.lines().filter(|line| line.starts_with("nacre: nacre-blk of `disk-0`"));
    ensure!(lines.filter(|line| line.ends_with(told)).count() == 1, "{answer:?}");
    before.and_nothing_more(user.state())
}

#[test]
fn a_device_whose_program_starts_no_more_ends_the_sandbox_by_its_name() -> Result<()> {
    for name in ["nacre-fs", "nacre-vsock", "nacre-net"] {
        let mut sandbox = Sandbox::start(&["--net"], "true")?;
        sandbox.write_program(name, "echo gone for good >&2; exit 3")?;
        kill_child_of(sandbox.run.process().id(), name)?;
        let Sandbox { user, run, before, .. } = sandbox;
        let answer = run.wait()?.code(i32::from(u8::from(RunExit::BackendDied)))?;
        let line = format!("nacre: {name} of ");
        let told = answer.said.lines().filter(|said| said.starts_with(&line)).count();
        ensure!(told == 1, "not once {line:?}: {answer:?}");
        before.and_nothing_more(user.state()).with_context(|| format!("after {name}"))?;
    }
    Ok(())
}

#[test]
fn a_disk_that_is_gone_gives_errors_until_it_is_back() -> Result<()> {
    let mut sandbox = Sandbox::start(&[], "true")?;
    let read = ["exec", NAME, "dd", "if=/dev/disk-0", "of=/dev/null", "bs=1M", "count=1"];
    sandbox.user.nacre(&read)?.code(0)?;
    let (disk, away) = (sandbox.folder.path().join("disk.img"), sandbox.folder.path().join("x"));
    fs::rename(&disk, &away)?;
    kill_child_of(sandbox.run.process().id(), "nacre-blk")?;
    until("a stand-in is there", || Ok(sandbox.listed("disk-0")?["state"] == "failing"))?;
    let uncached = "dd if=/dev/disk-0 of=/dev/null bs=4k count=1 skip=4000";
    let answer = sandbox.user.nacre(&["exec", NAME, "sh", "-c", uncached])?;
    ensure!(answer.code == Some(1) && answer.said.contains("Input/output error"), "{answer:?}");
    fs::rename(&away, &disk)?;
    sandbox.device(&["restart", NAME, "disk-0"])?.code(0)?;
    ensure!(sandbox.serves("disk-0")?, "{}", sandbox.listed("disk-0")?);
    sandbox.user.nacre(&["exec", NAME, "sh", "-c", uncached])?.code(0)?;
    sandbox.run.process().signal(Signal::TERM)?;
    sandbox.run.wait()?.code(0)?.tells("from now on its requests fail")?;
    sandbox.before.and_nothing_more(sandbox.user.state())
}
