//! Adding a process to a running container; it runs when it is started.

use std::sync::{Arc, Mutex};

use crate::{
    container::{
        ADDED_MAX, AddedProcess, ContainerError, Containers, added, create::write_json, lock,
        start::Pending,
    },
    ids::{ExecId, ProcessId},
    launch::CAPABILITIES_SUFFIX,
    process::{
        Process,
        stdio::{Owner, Wiring},
    },
};

/// What the host asks for.
#[derive(Debug)]
pub(crate) struct NewProcess {
    /// Its name.
    pub(crate) id: ProcessId,
    /// The OCI `process` object, unread.
    pub(crate) oci_process: Vec<u8>,
    /// Its streams.
    pub(crate) wiring: Wiring,
}

impl Containers {
    /// Adds a process that is not started.
    pub(crate) fn add(&self, exec: &ExecId, new: &NewProcess) -> Result<(), ContainerError> {
        let container = self.container(&new.id.container)?;
        if !container.init.is_running() {
            return Err(ContainerError::NotRunning(new.id.container.clone()));
        }
        let terminal = new.wiring == Wiring::Terminal;
        let added =
            added::complete(&new.oci_process, &container.base, terminal, container.filtered)?;
        let user = added.process.user();
        let owner = Owner { uid: user.uid(), gid: user.gid() };
        let program = added.process.args().as_ref().and_then(|args| args.first().cloned());

        let mut processes = lock(&container.added);
        if processes.contains_key(exec) {
            return Err(ContainerError::Exists(new.id.clone()));
        }
        if processes.len() >= ADDED_MAX {
            return Err(ContainerError::TooMany { what: "added processes", max: ADDED_MAX });
        }
        let (process, inherited) =
            Process::new(new.id.clone(), new.wiring, owner).map_err(ContainerError::Streams)?;
        let process_file = process_file(exec);
        write_json(&container.bundle, &process_file, &added.process)?;
        if let Some(capabilities) = &added.capabilities_after {
            let name = format!("{process_file}{CAPABILITIES_SUFFIX}");
            write_json(&container.bundle, &name, capabilities)?;
        }
        let pending = Pending { inherited, program: program.unwrap_or_default() };
        let added = AddedProcess {
            process: Arc::new(process),
            pending: Arc::new(Mutex::new(Some(pending))),
        };
        processes.insert(exec.clone(), added);
        Ok(())
    }
}

/// The file that an added process's launch reads, in the bundle.
pub(super) fn process_file(exec: &ExecId) -> String {
    format!("exec-{exec}.json")
}
