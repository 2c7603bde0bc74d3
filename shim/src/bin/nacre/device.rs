//! `nacre device`: the devices of a sandbox, by its supervisor's control socket.

use std::{
    io::{self, Write},
    path::{self, Path, PathBuf},
};

use nacre_proto::{
    exit::DeviceExit,
    supervisor::{self, DeviceState, NewDevice},
};
use serde_json::{Value, json};
use shim::{
    devices::{self, Added, DeviceError},
    log_file,
    passthrough::Function,
    paths,
    plan::Volume,
    registry::Registry,
};

use crate::{
    args::{Device, DeviceKind, DeviceList},
    failure::Failure,
    prepare, runtime,
};

pub(crate) fn device(command: &Device) -> Result<u8, Failure> {
    let registry = Registry::open(paths::state_root())?;
    let name = match command {
        Device::List(args) => &args.name,
        Device::Restart(args) => &args.name,
        Device::Upgrade(args) => &args.name,
        Device::Add(args) => &args.name,
        Device::Remove(args) => &args.name,
    };
    let (_, files) = registry.find_running(name)?;
    let socket = files.control();
    let text = match command {
        Device::List(args) => list(&socket, args)?,
        Device::Restart(args) => replace(&socket, &args.device, None)?,
        Device::Upgrade(args) => replace(&socket, &args.device, args.binary.as_deref())?,
        Device::Add(args) => add(&socket, &args.kind)?,
        Device::Remove(args) => {
            let removed = devices::remove(&socket, args.device.clone());
            runtime()?.block_on(removed).map_err(|error| failure(&error))?;
            format!("{}: removed\n", args.device)
        }
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Failure::setup("standard output", error))?;
    Ok(DeviceExit::Done.into())
}

fn list(socket: &Path, args: &DeviceList) -> Result<String, Failure> {
    let devices = runtime()?.block_on(devices::list(socket)).map_err(|error| failure(&error))?;
    Ok(if args.json {
        let list: Vec<Value> = devices.iter().map(object).collect();
        format!("{:#}\n", Value::from(list))
    } else {
        table(&devices)
    })
}

fn replace(socket: &Path, device: &str, binary: Option<&Path>) -> Result<String, Failure> {
    let program = binary.map(absolute).transpose()?;
    let replaced = devices::replace(socket, device.to_owned(), program);
    let unserved_ms = runtime()?.block_on(replaced).map_err(|error| failure(&error))?;
    Ok(format!("{device}: replaced, not served for {unserved_ms} ms\n"))
}

fn add(socket: &Path, kind: &DeviceKind) -> Result<String, Failure> {
    let new = match kind {
        DeviceKind::Disk { disk } => {
            let disk = prepare::disk(disk)?;
            NewDevice::Disk { path: text(disk.path)?, read_only: disk.read_only }
        }
        DeviceKind::Share { volume } => {
            let Volume { host, guest, read_only } = prepare::volume(volume)?;
            NewDevice::Share { path: text(host)?, guest: text(guest)?, read_only }
        }
        DeviceKind::Net => NewDevice::Network,
        DeviceKind::Vfio { function } => {
            let Function { address, bind, ip } = format!("vfio:{function}").parse()?;
            NewDevice::Vfio { address: address.to_string(), bind, ip }
        }
    };
    let added = runtime()?.block_on(devices::add(socket, new)).map_err(|error| failure(&error))?;
    let Added { device, address, places } = added;
    let places: Vec<String> = places.iter().map(|place| log_file::printable(place)).collect();
    Ok(format!("{device} {address} {}\n", places.join(" ")))
}

/// As the supervisor sees it, whose working folder is another one.
fn absolute(binary: &Path) -> Result<String, Failure> {
    text(path::absolute(binary).map_err(|error| Failure::setup("the program", error))?)
}

fn text(path: PathBuf) -> Result<String, Failure> {
    let not_text =
        |_path| Failure::setup("the command", io::Error::other("a path of it is no UTF-8"));
    path.into_os_string().into_string().map_err(not_text)
}

fn failure(error: &DeviceError) -> Failure {
    let exit = match error {
        DeviceError::FellBack(_) => DeviceExit::FellBack,
        DeviceError::NotBack(_) => DeviceExit::NotBack,
        DeviceError::Kept(_) => DeviceExit::Kept,
        DeviceError::Leaving(_) => DeviceExit::Leaving,
        _ => DeviceExit::Refused,
    };
    Failure::of(error).with_code(exit.into())
}

fn state(device: &supervisor::Device) -> &'static str {
    match device.state {
        _ if device.leaving => "leaving",
        DeviceState::Serving => "serving",
        DeviceState::Lost => "lost",
        DeviceState::Starting => "starting",
        DeviceState::Failing => "failing",
        DeviceState::Passthrough => "given",
    }
}

fn object(device: &supervisor::Device) -> Value {
    json!({
        "id": device.id,
        "kind": device.kind,
        "state": state(device),
        "pid": device.pid,
        "restarts": device.restarts,
        "program": device.program,
        "address": device.address,
        "leaving": device.leaving,
    })
}

fn table(devices: &[supervisor::Device]) -> String {
    let mut text = format!(
        "{:12} {:6} {:9} {:12} {:>8} {:>9} PROGRAM\n",
        "DEVICE", "KIND", "STATE", "ADDRESS", "PID", "RESTARTS"
    );
    for device in devices {
        let supervisor::Device { id, kind, pid, restarts, program, .. } = device;
        let address = device.address.as_deref().unwrap_or("-");
        let state = state(device);
        let line = format!("{id:12} {kind:6} {state:9} {address:12} {pid:>8} {restarts:>9} ");
        text.push_str(&line);
        text.push_str(&log_file::printable(program));
        text.push('\n');
    }
    text
}
