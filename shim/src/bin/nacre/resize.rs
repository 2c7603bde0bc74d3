//! `nacre resize`: more or less of what a guest has, by its supervisor's control socket.

use std::io::{self, Write};

use nacre_proto::{exit::ResizeExit, supervisor::Resources};
use shim::{devices, log_file, paths, registry::Registry, size::ByteSize};

use crate::{args::Resize, failure::Failure, runtime};

pub(crate) fn resize(args: &Resize) -> Result<u8, Failure> {
    let (_, files) = Registry::open(paths::state_root())?.find_running(&args.name)?;
    let memory_bytes = args.memory.map(|size| size.0);
    let socket = files.control();
    let resized = devices::resize(&socket, args.cpus, memory_bytes);
    let resized = runtime()?.block_on(resized);
    let (now, why) =
        resized.map_err(|error| Failure::of(&error).with_code(ResizeExit::Refused.into()))?;
    io::stdout()
        .write_all(line(now).as_bytes())
        .map_err(|error| Failure::setup("standard output", error))?;
    match why {
        None => Ok(ResizeExit::Done.into()),
        Some(why) => {
            let why = format!("not all of it came about: {}", log_file::printable(&why));
            Err(Failure::told(ResizeExit::Partly.into(), why))
        }
    }
}

fn line(now: Resources) -> String {
    let Resources { cpus, max_cpus, memory_bytes, max_memory_bytes } = now;
    let (memory, max_memory) = (ByteSize(memory_bytes), ByteSize(max_memory_bytes));
    format!("{cpus} of {max_cpus} CPUs, {memory} of {max_memory} memory\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_there_is_is_told_beside_what_there_can_be() {
        let now =
            Resources { cpus: 2, max_cpus: 4, memory_bytes: 1 << 30, max_memory_bytes: 3 << 29 };
        assert_eq!(line(now), "2 of 4 CPUs, 1G of 1536M memory\n");
    }
}
