//! The last step of a new process, inside its container: seccomp, size, execve.
//!
//! It tells the agent by the status pipe how far it got: nothing is a death before execve, one
//! byte is success (execve closed the pipe), the byte and an error number is execve's refusal.

use std::{
    error::Error,
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::Command,
    sync::Arc,
};

use libc::sock_filter;
use libcontainer::{
    capabilities::drop_privileges,
    oci_spec::runtime::{LinuxCapabilities, Spec},
    syscall::syscall::create_syscall,
    workload::{Executor, ExecutorError, ExecutorValidationError},
};
use rustix::thread::set_no_new_privs;

use crate::{launch::REACHED_EXECVE, process::Size, sys};

/// A seccomp filter that is to be in force when the program runs.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    /// Its instructions.
    pub(crate) program: Vec<sock_filter>,
    /// Flags of seccomp(2).
    pub(crate) flags: u32,
    /// Without no_new_privs a filter needs `CAP_SYS_ADMIN`, so libcontainer left more than the
    /// program is to have, which is this.
    pub(crate) capabilities_after: Option<LinuxCapabilities>,
}

/// Runs the program of a specification.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// Shared because libcontainer clones executors; there is one writer, the new process.
    pub(crate) status: Arc<OwnedFd>,
    /// Absent: no filter.
    pub(crate) filter: Option<Filter>,
    /// For the terminal on standard input.
    pub(crate) size: Option<Size>,
}

impl Program {
    /// Returns only if the program could not be executed.
    fn run(&self, spec: &Spec) -> Result<io::Error, Box<dyn Error + Send + Sync>> {
        let args = spec.process().as_ref().and_then(|process| process.args().as_ref());
        let (program, args) = args.and_then(|args| args.split_first()).ok_or("no program")?;
        if let Some(size) = self.size {
            size.apply(rustix::stdio::stdin())?;
        }
        let mut status = File::from(self.status.try_clone()?);
        if let Some(filter) = &self.filter {
            filter.install()?;
        }
        status.write_all(&[REACHED_EXECVE])?;
        let refusal = Command::new(program).args(args).exec();
        let number = refusal.raw_os_error().unwrap_or(libc::EINVAL);
        status.write_all(&number.to_le_bytes())?;
        Ok(refusal)
    }
}

impl Filter {
    fn install(&self) -> Result<(), Box<dyn Error + Send + Sync>> {
        if self.capabilities_after.is_none() {
            set_no_new_privs(true)?;
        }
        sys::install_seccomp(&self.program, self.flags)?;
        if let Some(capabilities) = &self.capabilities_after {
            drop_privileges(capabilities, create_syscall().as_ref())?;
        }
        Ok(())
    }
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        match self.run(spec) {
            Ok(refusal) => Err(ExecutorError::Other(refusal.to_string())),
            Err(error) => Err(ExecutorError::Other(error.to_string())),
        }
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        // A program that is missing now may be there when the container is started; execve tells.
        Ok(())
    }
}
