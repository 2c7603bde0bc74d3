//! A Linux guest that QEMU emulates: it runs a script from a share of ours, and leaves there what it
//! has to say.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::artifacts;
use nacre_tests::backend::Backend;
use nacre_tests::nacre::SANDBOX_PATIENCE;
use nacre_tests::process::Process;

const MEMORY: &str = "256M";

/// A running guest. Its script counts its rounds in `/job/rounds`, notes what went wrong in
/// `/job/errors`, and ends when `/job/enough` is there.
pub(crate) struct Guest {
    job: PathBuf,
    serial: PathBuf,
    qemu: Process,
    _share: Backend,
}

impl Guest {
    /// Starts QEMU with these arguments for the devices that the test is about.
    pub(crate) fn start(dir: &Path, script: &str, devices: &[String]) -> Result<Self> {
        let (job, serial) = (dir.join("job"), dir.join("serial"));
        fs::create_dir(&job)?;
        fs::write(job.join("run.sh"), script)?;
        let share = ["--shared-dir", &job.display().to_string(), "--tag", "job"];
        let share = Backend::start("nacre-fs", dir, &share)?;
        let words = env::var("NACRE_QEMU").context("NACRE_QEMU: run `cargo xtask test interop`")?;
        let mut words = words.split_whitespace();
        let program = PathBuf::from(words.next().context("NACRE_QEMU is empty")?);
        let mut command = Command::new(&program);
        command.args(words);
        command.args(["-accel", "tcg,thread=multi", "-M", "q35,memory-backend=ram", "-cpu", "max"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        let memory = format!("memory-backend-memfd,id=ram,size={MEMORY},share=on");
        command.args(["-m", MEMORY, "-object", &memory]);
        command.arg("-kernel").arg(artifacts::kernel()?);
        command.arg("-initrd").arg(artifacts::shell_initramfs()?);
        command.args(["-append", "console=ttyS0 quiet panic=-1"]);
        command.args(["-serial", &format!("file:{}", serial.display())]);
        let chardev = format!("socket,id=share,path={}", share.socket().display());
        command.args(["-chardev", &chardev]);
        command.args(["-device", "vhost-user-fs-pci,chardev=share,tag=job"]).args(devices);
        let qemu = Process::start(&program, command.stdout(Stdio::null()))?;
        Ok(Self { job, serial, qemu, _share: share })
    }

    fn rounds(&self) -> u32 {
        let said = fs::read_to_string(self.job.join("rounds")).unwrap_or_default();
        said.trim().parse().unwrap_or(0)
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.job.join("errors")).unwrap_or_default()
    }

    /// Waits until the guest has made another round; QEMU has to live meanwhile.
    pub(crate) fn another_round(&mut self) -> Result<()> {
        let (before, deadline) = (self.rounds(), Instant::now() + SANDBOX_PATIENCE);
        while self.rounds() == before {
            let is_late = Instant::now() > deadline;
            if is_late || !self.qemu.is_running()? {
                let said = fs::read_to_string(&self.serial).unwrap_or_default();
                bail!("no round after {before}; {}; the guest said {said}", self.errors());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Has the script end, and checks that nothing went wrong.
    pub(crate) fn finish(self) -> Result<()> {
        fs::write(self.job.join("enough"), "")?;
        let (job, errors) = (self.job.clone(), self.job.join("errors"));
        let (status, said) = self.qemu.wait_for(SANDBOX_PATIENCE)?;
        ensure!(status.success(), "{status}: {said}");
        let errors = fs::read_to_string(errors).unwrap_or_default();
        ensure!(errors.is_empty(), "{errors}");
        ensure!(job.join("result").exists(), "{said}");
        Ok(())
    }
}
