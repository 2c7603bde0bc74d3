//! QEMU with the same guest: its `q35` machine, its own disk and nic behind PCIe root ports, and our
//! share, which holds the guest's script. `NACRE_QEMU` is the command that starts it.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nacre_tests::artifacts;
use nacre_tests::machine::Running;
use nacre_tests::process::Process;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Vmm;
use crate::guest::{self, CMDLINE, Console, MEMORY_BYTES, Share, Thing, UNIT_BYTES};
use crate::qmp::Qmp;

pub(crate) const TAP: &str = "qemu0";

pub(crate) struct Qemu {
    qmp: Qmp,
    console: Console,
    folder: TempDir,
    /// The driver and the place of the processor that can come.
    cpu: Value,
}

impl Qemu {
    pub(crate) fn boot() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        guest::disk(&folder.path().join("disk.img"))?;
        let share = Share::new()?;
        let socket = folder.path().join("qmp");
        let mut command = command(&share, &socket)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let process = Process::start(Path::new("qemu"), &mut command)?;
        let running = Running::heard(process)?;
        let console = Console::of(running, share)?;
        let mut qmp = Qmp::connect(&socket)?;
        let cpu = absent_cpu(&qmp.ask("query-hotpluggable-cpus", Value::Null)?)?;
        Ok(Self { qmp, console, folder, cpu })
    }

    pub(crate) fn version(&mut self) -> Result<String> {
        let version = self.qmp.ask("query-version", Value::Null)?;
        let number = |part: &str| version["qemu"][part].as_u64().context("a version");
        Ok(format!("QEMU {}.{}.{}", number("major")?, number("minor")?, number("micro")?))
    }
}

fn command(share: &Share, qmp: &Path) -> Result<Command> {
    let words = env::var("NACRE_QEMU").context("NACRE_QEMU: run cargo xtask bench hotplug")?;
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().context("NACRE_QEMU is empty")?);
    command.args(words).args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.args(["-accel", "kvm", "-cpu", "host", "-M", "q35,memory-backend=ram"]);
    command.args(["-smp", "1,maxcpus=2"]);
    let most = MEMORY_BYTES + UNIT_BYTES;
    command.args(["-m", &format!("size={MEMORY_BYTES}B,slots=1,maxmem={most}B")]);
    let memory = format!("memory-backend-memfd,id=ram,size={MEMORY_BYTES}B,share=on");
    command.args(["-object", &memory]);
    command.arg("-kernel").arg(artifacts::kernel()?);
    command.arg("-initrd").arg(artifacts::shell_initramfs()?).args(["-append", CMDLINE]);
    command.args(["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]);
    command.args(["-chardev", &format!("socket,id=job,path={}", share.socket().display())]);
    command.args(["-device", "vhost-user-fs-pci,chardev=job,tag=job"]);
    for thing in [Thing::Disk, Thing::Nic] {
        let number = if thing == Thing::Disk { 1 } else { 2 };
        let port = format!("pcie-root-port,id={},chassis={number},slot={number}", port(thing));
        command.args(["-device", &port]);
    }
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
    Ok(command)
}

fn port(thing: Thing) -> String {
    format!("port-{}", thing.name())
}

/// What `device_add` is to be told for the processor that is not there yet.
fn absent_cpu(cpus: &Value) -> Result<Value> {
    let all = cpus.as_array().context("processors")?;
    let absent = all.iter().find(|cpu| cpu.get("qom-path").is_none());
    let absent = absent.context("a processor that can come")?;
    let mut told = absent["props"].as_object().context("its place")?.clone();
    told.insert("driver".to_owned(), absent["type"].clone());
    told.insert("id".to_owned(), Value::from(Thing::Cpu.name()));
    Ok(Value::Object(told))
}

impl Vmm for Qemu {
    fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    fn add(&mut self, thing: Thing) -> Result<Instant> {
        let device = match thing {
            Thing::Cpu => self.cpu.clone(),
            Thing::Memory => {
                let file = json!({"qom-type": "memory-backend-memfd", "id": "unit",
                    "size": UNIT_BYTES, "share": true});
                self.qmp.ask("object-add", file)?;
                json!({"driver": "pc-dimm", "id": thing.name(), "memdev": "unit"})
            }
            Thing::Disk => {
                let path = self.folder.path().join("disk.img");
                let file = json!({"driver": "file", "filename": path.display().to_string()});
                let node = json!({"driver": "raw", "node-name": "image", "file": file});
                self.qmp.ask("blockdev-add", node)?;
                json!({"driver": "virtio-blk-pci", "id": thing.name(), "drive": "image",
                    "bus": port(thing)})
            }
            Thing::Nic => {
                let tap = json!({"type": "tap", "id": "tap", "ifname": TAP, "script": "no",
                    "downscript": "no", "vhost": false});
                self.qmp.ask("netdev_add", tap)?;
                json!({"driver": "virtio-net-pci", "id": thing.name(), "netdev": "tap",
                    "mac": "02:00:00:00:00:08", "romfile": "", "bus": port(thing)})
            }
        };
        let ready = Instant::now();
        self.qmp.ask("device_add", device)?;
        Ok(ready)
    }

    fn remove(&mut self, thing: Thing) -> Result<()> {
        self.qmp.ask("device_del", json!({"id": thing.name()})).map(drop)
    }

    fn clear(&mut self, thing: Thing) -> Result<()> {
        let deleted = self.qmp.event("DEVICE_DELETED", |data| data["device"] == thing.name());
        if let Err(error) = deleted {
            bail!("{error:#}; {:?}", self.qmp.events());
        }
        let done = match thing {
            Thing::Cpu => return Ok(()),
            Thing::Memory => self.qmp.ask("object-del", json!({"id": "unit"})),
            Thing::Disk => self.qmp.ask("blockdev-del", json!({"node-name": "image"})),
            Thing::Nic => self.qmp.ask("netdev_del", json!({"id": "tap"})),
        };
        done.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_that_can_come_is_the_one_without_an_object() {
        let cpus = json!([
            {"props": {"socket-id": 0, "core-id": 1, "thread-id": 0}, "type": "host-x86_64-cpu",
                "vcpus-count": 1},
            {"props": {"socket-id": 0, "core-id": 0, "thread-id": 0}, "type": "host-x86_64-cpu",
                "vcpus-count": 1, "qom-path": "/machine/unattached/device[0]"},
        ]);
        let told = absent_cpu(&cpus).unwrap();
        assert_eq!(
            told,
            json!({"driver": "host-x86_64-cpu", "id": "cpu", "socket-id": 0, "core-id": 1,
                "thread-id": 0})
        );
        let all_there = json!([{"props": {}, "type": "t", "qom-path": "/p"}]);
        assert!(absent_cpu(&all_there).is_err());
    }
}
