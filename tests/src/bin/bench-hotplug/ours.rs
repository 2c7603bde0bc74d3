//! Our VMM with its guest. A device's process is started as part of the call, as the supervisor does.

use std::time::Instant;

use anyhow::{Context, Result};
use nacre_tests::artifacts;
use nacre_tests::control::Control;
use nacre_tests::machine::Machine;
use nacre_tests::supervised::Supervised;
use tempfile::TempDir;

use crate::Vmm;
use crate::guest::{self, CMDLINE, Console, MEMORY_BYTES, Share, Thing, UNIT_BYTES};

pub(crate) const TAP: &str = "ours0";
/// Device types of the virtio specification, section 5.
const NET: u16 = 1;
const BLK: u16 = 2;

pub(crate) struct Ours {
    control: Control,
    console: Console,
    folder: TempDir,
    /// The process of the device that is there.
    device: Option<Supervised>,
}

impl Ours {
    pub(crate) fn boot() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        guest::disk(&folder.path().join("disk.img"))?;
        let share = Share::new()?;
        let (control, theirs) = Control::new()?;
        let (memory, most) = (MEMORY_BYTES.to_string(), (MEMORY_BYTES + UNIT_BYTES).to_string());
        let (kernel, initramfs) = (artifacts::kernel()?, artifacts::shell_initramfs()?);
        let running = Machine::linux(&kernel, &initramfs, CMDLINE)?
            .with(&["--cpus", "1", "--max-cpus", "2", "--memory", &memory, "--max-memory", &most])
            .device("job", "fs", share.socket())
            .control(theirs)
            .with_input()
            .start()?;
        let console = Console::of(running, share)?;
        Ok(Self { control, console, folder, device: None })
    }

    fn add_device(
        &mut self,
        thing: Thing,
        kind: u16,
        program: &str,
        args: &[&str],
    ) -> Result<Instant> {
        let mut device = Supervised::new(program, args)?;
        let socket = device.start()?;
        let ready = Instant::now();
        self.device = Some(device);
        self.control.add(thing.name(), kind, &socket)?;
        Ok(ready)
    }
}

impl Vmm for Ours {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn add(&mut self, thing: Thing) -> Result<Instant> {
        let called = Instant::now();
        match thing {
            Thing::Cpu => self.control.set_cpus(2).map(|()| called),
            Thing::Memory => self.control.set_memory(MEMORY_BYTES + UNIT_BYTES).map(|()| called),
            Thing::Disk => {
                let image = self.folder.path().join("disk.img").display().to_string();
                self.add_device(thing, BLK, "nacre-blk", &["--disk", &image])
            }
            Thing::Nic => {
                let args = ["--tap", TAP, "--mac", "02:00:00:00:00:07"];
                self.add_device(thing, NET, "nacre-net", &args)
            }
        }
    }

    fn remove(&mut self, thing: Thing) -> Result<()> {
        match thing {
            Thing::Cpu => self.control.set_cpus(1),
            Thing::Memory => self.control.set_memory(MEMORY_BYTES),
            Thing::Disk | Thing::Nic => self.control.remove(thing.name()),
        }
    }

    fn clear(&mut self, thing: Thing) -> Result<()> {
        match thing {
            Thing::Cpu => self.control.cpus_become(1),
            Thing::Memory => {
                while self.control.memory_changed()? != MEMORY_BYTES {}
                Ok(())
            }
            Thing::Disk | Thing::Nic => {
                self.control.removed(thing.name())?;
                self.device.take().context("a device")?.kill().map(drop)
            }
        }
    }
}
