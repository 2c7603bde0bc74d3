//! `nacre device`: the devices of a sandbox, by its supervisor's control socket.

use std::{
    io::{self, Write},
    path::{self, Path, PathBuf},
};

use nacre_proto::{
    exit::DeviceExit,
    supervisor::{self, DeviceState},
};
use serde_json::{Value, json};
use shim::{
    devices::{self, DeviceError},
    log_file, paths,
    registry::Registry,
};

use crate::{
    args::{Device, DeviceList},
    failure::Failure,
    runtime,
};

pub(crate) fn device(command: &Device) -> Result<u8, Failure> {
    let registry = Registry::open(paths::state_root())?;
    let name = match command {
        Device::List(args) => &args.name,
        Device::Restart(args) => &args.name,
        Device::Upgrade(args) => &args.name,
    };
    let (_, files) = registry.find_running(name)?;
    let socket = files.control();
    let text = match command {
        Device::List(args) => list(&socket, args)?,
        Device::Restart(args) => replace(&socket, &args.device, None)?,
        Device::Upgrade(args) => replace(&socket, &args.device, args.binary.as_deref())?,
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

/// As the supervisor sees it, whose working folder is another one.
fn absolute(binary: &Path) -> Result<String, Failure> {
    let failed = |error| Failure::setup("the program", error);
    let absolute: PathBuf = path::absolute(binary).map_err(failed)?;
    let not_text = |_path| failed(io::Error::other("its path is no UTF-8"));
    absolute.into_os_string().into_string().map_err(not_text)
}

fn failure(error: &DeviceError) -> Failure {
    let exit = match error {
        DeviceError::FellBack(_) => DeviceExit::FellBack,
        DeviceError::NotBack(_) => DeviceExit::NotBack,
        _ => DeviceExit::Refused,
    };
    Failure::of(error).with_code(exit.into())
}

fn state(device: &supervisor::Device) -> &'static str {
    match device.state {
        DeviceState::Serving => "serving",
        DeviceState::Lost => "lost",
        DeviceState::Starting => "starting",
        DeviceState::Failing => "failing",
    }
}

fn object(device: &supervisor::Device) -> Value {
    json!({
        "id": device.id,
        "kind": device.kind,
        "state": state(device),
        "pid": device.pid,
        "restarts": device.restarts,
        "restartable": device.restartable,
        "program": device.program,
    })
}

fn table(devices: &[supervisor::Device]) -> String {
    let mut text = format!(
        "{:12} {:6} {:9} {:>8} {:>9} PROGRAM\n",
        "DEVICE", "KIND", "STATE", "PID", "RESTARTS"
    );
    for device in devices {
        let supervisor::Device { id, kind, pid, restarts, program, .. } = device;
        let line = format!("{id:12} {kind:6} {:9} {pid:>8} {restarts:>9} ", state(device));
        text.push_str(&line);
        text.push_str(&log_file::printable(program));
        text.push('\n');
    }
    text
}
