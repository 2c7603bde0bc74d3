//! The guest that both VMMs have: Debian's kernel, busybox, and a script that looks for what it is
//! told to look for and says on the serial port when it is there.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nacre_tests::backend::Backend;
use nacre_tests::machine::Running;
use tempfile::TempDir;

/// A boot on a host that emulates itself, or what takes longest in a guest there.
const PATIENCE: Duration = Duration::from_secs(240);
/// What comes is put where it can be taken from again.
pub(crate) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable";
/// What the guest begins with.
pub(crate) const MEMORY_BYTES: u64 = 512 << 20;
/// What comes to it.
pub(crate) const UNIT_BYTES: u64 = 128 << 20;
/// The disk's first byte, which the guest reads.
pub(crate) const MARK: &[u8] = b"x";
const DISK_BYTES: u64 = 4 << 20;

/// Looks every two milliseconds, with nothing but the shell's own commands: a new process takes many
/// times as long on a host that emulates itself.
const SCRIPT: &str = "cpu=/sys/devices/system/cpu/cpu1
mkfifo /never
exec 3<>/never
nap() { read -t 0.002 nothing <&3; }
total() { read -r word kib rest < /proc/meminfo; }
echo ready
while read order; do
    case $order in
    cpu)
        echo looking
        until test -e $cpu; do nap; done; echo seen
        echo 1 > $cpu/online; echo used ;;
    memory)
        total; had=$kib; echo looking
        until total; test $kib -gt $had; do nap; done; echo seen; echo used ;;
    disk)
        echo looking
        until test -e /sys/block/vda; do nap; done; echo seen
        until test -b /dev/vda && read -n 1 byte < /dev/vda && test $byte = x; do nap; done; echo used ;;
    nic)
        echo looking
        until test -e /sys/class/net/eth0; do nap; done; echo seen; echo used ;;
    no-cpu) echo looking; while test -e $cpu; do nap; done; echo gone ;;
    no-memory) echo looking; until total; test $kib -le $had; do nap; done; echo gone ;;
    no-disk) echo looking; while test -e /sys/block/vda; do nap; done; echo gone ;;
    no-nic) echo looking; while test -e /sys/class/net/eth0; do nap; done; echo gone ;;
    esac
done
";

/// What comes and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thing {
    Cpu,
    Memory,
    Disk,
    Nic,
}

impl Thing {
    pub(crate) const ALL: [Self; 4] = [Self::Cpu, Self::Memory, Self::Disk, Self::Nic];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Nic => "nic",
        }
    }

    /// Whether something is made on the host before the guest can be given it.
    pub(crate) fn needs_the_host(self) -> bool {
        matches!(self, Self::Disk | Self::Nic)
    }

    /// What more has to happen before it can be used, if that is measured.
    pub(crate) fn use_of_it(self) -> Option<&'static str> {
        match self {
            Self::Cpu => Some("online"),
            Self::Disk => Some("read"),
            Self::Memory | Self::Nic => None,
        }
    }
}

/// The guest's serial port, and the share with the script.
#[derive(Debug)]
pub(crate) struct Console {
    running: Running,
    _share: Share,
}

/// A share with the guest's script, and what serves it.
#[derive(Debug)]
pub(crate) struct Share {
    backend: Backend,
    _folders: [TempDir; 2],
}

impl Share {
    pub(crate) fn new() -> Result<Self> {
        let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
        let [folder, share] = [folders[0].path(), folders[1].path()];
        fs::write(share.join("run.sh"), SCRIPT)?;
        let shared = share.display().to_string();
        let backend =
            Backend::start("nacre-fs", folder, &["--shared-dir", &shared, "--tag", "job"])?;
        Ok(Self { backend, _folders: folders })
    }

    pub(crate) fn socket(&self) -> &Path {
        self.backend.socket()
    }
}

impl Console {
    /// Waits until the guest is up.
    pub(crate) fn of(mut running: Running, share: Share) -> Result<Self> {
        running.until_within(PATIENCE, "ready")?;
        Ok(Self { running, _share: share })
    }

    fn order(&mut self, order: &str) -> Result<Instant> {
        let input = self.running.process().child().stdin.as_mut();
        writeln!(input.context("the guest's console")?, "{order}")?;
        self.says("looking")?;
        // From the call, which comes next.
        Ok(Instant::now())
    }

    /// Waits for a word; gives the moment in which it came.
    fn says(&mut self, word: &str) -> Result<Instant> {
        self.running.until_within(PATIENCE, word)?;
        Ok(self.running.heard_at())
    }

    fn says_after(&mut self, since: Instant, word: &str) -> Result<Duration> {
        Ok(self.says(word)?.saturating_duration_since(since))
    }

    /// Has the guest look until a thing is there; gives the moment in which it does.
    pub(crate) fn look_for(&mut self, thing: Thing) -> Result<Instant> {
        self.order(thing.name())
    }

    /// Has the guest look until it is there no more.
    pub(crate) fn look_away(&mut self, thing: Thing) -> Result<Instant> {
        self.order(&format!("no-{}", thing.name()))
    }

    pub(crate) fn sees(&mut self, since: Instant) -> Result<Duration> {
        self.says_after(since, "seen")
    }

    pub(crate) fn uses(&mut self, since: Instant) -> Result<Duration> {
        self.says_after(since, "used")
    }

    pub(crate) fn misses(&mut self, since: Instant) -> Result<Duration> {
        self.says_after(since, "gone")
    }
}

/// Makes the image of a disk.
pub(crate) fn disk(path: &Path) -> Result<()> {
    fs::write(path, MARK)?;
    fs::File::options().write(true).open(path)?.set_len(DISK_BYTES)?;
    Ok(())
}
