//! Where the serial port's bytes come from and go to on the host.

use std::{
    fs::File,
    io::{self, stdin, stdout},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use rustix::termios::{LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use crate::{config::SerialConfig, legacy::serial::SerialPort, sys};

/// The serial port and where its input comes from.
pub struct Console {
    /// The device.
    pub port: Arc<SerialPort>,
    /// Input, if there is any.
    pub input: Option<File>,
    _terminal: Option<Terminal>,
}

/// A terminal that hands on every key as it is, but those that end the VMM; as it was before when
/// dropped.
struct Terminal {
    file: File,
    before: Termios,
}

impl Terminal {
    fn take_over(file: &File) -> io::Result<Option<Self>> {
        if !isatty(file) {
            return Ok(None);
        }
        let before = tcgetattr(file)?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.local_modes |= LocalModes::ISIG;
        tcsetattr(file, OptionalActions::Now, &raw)?;
        Ok(Some(Self { file: file.try_clone()?, before }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(&self.file, OptionalActions::Now, &self.before) {
            log::warn!("can't restore the terminal: {error}");
        }
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<File> {
    fd.try_clone_to_owned().map(File::from)
}

impl Console {
    /// Opens what the configuration says; none is fine.
    ///
    /// # Errors
    ///
    /// Fails if the host does not allow it.
    pub fn open(config: &SerialConfig) -> io::Result<Option<Self>> {
        let (output, input) = match config {
            SerialConfig::None => return Ok(None),
            SerialConfig::Stdio => {
                (duplicate(stdout().as_fd())?, Some(duplicate(stdin().as_fd())?))
            }
            SerialConfig::Fd(fd) => {
                let both = File::from(sys::inherited_fd(*fd)?);
                (both.try_clone()?, Some(both))
            }
            SerialConfig::File(path) => (File::create(path)?, None),
        };
        let terminal = input.as_ref().map(Terminal::take_over).transpose()?.flatten();
        Ok(Some(Self { port: Arc::new(SerialPort::new(output)?), input, _terminal: terminal }))
    }
}
