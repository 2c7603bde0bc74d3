//! The virtio port to xtask on the machine.

use crate::host::protocol::{Frame, write_frame};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The port's name, which QEMU is told.
pub(crate) const NAME: &str = "nacre.jobs";
const CLASS: &str = "/sys/class/virtio-ports";

/// The sending half; frames are written whole, so threads share it behind a lock.
#[derive(Debug)]
pub(super) struct Port {
    writer: Mutex<File>,
}

impl Port {
    /// Opens the port; returns its sending and its receiving half.
    pub(super) fn open() -> Result<(Self, File)> {
        for entry in fs::read_dir(CLASS).context("no virtio ports")? {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim_end() == NAME {
                let path = Path::new("/dev").join(entry.file_name());
                let reader = File::options()
                    .read(true)
                    .write(true)
                    .open(&path)
                    .with_context(|| format!("cannot open {}", path.display()))?;
                let writer = Mutex::new(reader.try_clone().context("cannot share the port")?);
                return Ok((Self { writer }, reader));
            }
        }
        bail!("no virtio port is called {NAME}")
    }

    /// Sends one frame.
    pub(super) fn send(&self, job: u32, frame: &Frame) -> Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        write_frame(&mut *writer, job, frame)
    }
}
