//! The device's configuration as the guest knows it, and what a driver wrote into it.
//!
//! A backend in another's place has to have the same configuration. What a driver wrote is not in
//! a new process yet and is written again; what a driver wrote that has reset the device since may
//! be as the new process has it; all the rest has to be equal.

use crate::virtio::pci_registers::ConfigWrite;

/// Who had a byte last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Author {
    /// The backend alone.
    Backend,
    /// A driver that has reset the device since.
    FormerDriver,
    /// The driver.
    Driver,
}

/// The new backend's configuration is not the one that the guest knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("its configuration differs at byte {offset}: {theirs:#04x}, not {ours:#04x}")]
pub struct ConfigDiffers {
    /// The first byte that does.
    pub offset: usize,
    /// What the guest knows.
    pub ours: u8,
    /// What the new backend says; zero behind its end.
    pub theirs: u8,
}

/// A cached configuration.
#[derive(Debug, Default)]
pub struct Configuration {
    bytes: Vec<u8>,
    /// As long as `bytes`.
    authors: Vec<Author>,
}

impl Configuration {
    /// As the backend or the supervisor gave it.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        let authors = vec![Author::Backend; bytes.len()];
        Self { bytes, authors }
    }

    /// The configuration.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The driver wrote something.
    pub(super) fn write(&mut self, write: &ConfigWrite) {
        let start = usize::try_from(write.offset).unwrap_or(usize::MAX);
        for (at, byte) in (start..self.bytes.len()).zip(&write.bytes) {
            self.bytes[at] = *byte;
            self.authors[at] = Author::Driver;
        }
    }

    /// What the backend says that it is now.
    pub(super) fn set(&mut self, bytes: Vec<u8>) {
        self.authors.resize(bytes.len(), Author::Backend);
        self.bytes = bytes;
    }

    /// The driver is gone.
    pub(super) fn forget_driver(&mut self) {
        for author in &mut self.authors {
            if *author == Author::Driver {
                *author = Author::FormerDriver;
            }
        }
    }

    /// The driver's writes that a new backend, whose configuration is `theirs`, has to be told.
    ///
    /// # Errors
    ///
    /// Fails if the configurations differ in what no driver wrote.
    pub(super) fn to_repeat(&self, theirs: &[u8]) -> Result<Vec<ConfigWrite>, ConfigDiffers> {
        let mut repeat = false;
        for (offset, theirs) in self.differences(theirs) {
            match self.authors[offset] {
                Author::Backend => return Err(self.differs(offset, theirs)),
                Author::FormerDriver => {}
                Author::Driver => repeat = true,
            }
        }
        Ok(if repeat { self.written() } else { Vec::new() })
    }

    /// All that the driver wrote, a write for each stretch: a field is not cut in two.
    fn written(&self) -> Vec<ConfigWrite> {
        let mut writes: Vec<ConfigWrite> = Vec::new();
        let mut next = 0;
        for (offset, (byte, author)) in (0..).zip(self.bytes.iter().zip(&self.authors)) {
            if *author != Author::Driver {
                continue;
            }
            match writes.last_mut().filter(|_last| next == offset) {
                Some(last) => last.bytes.push(*byte),
                None => writes.push(ConfigWrite { offset, bytes: vec![*byte] }),
            }
            next = offset + 1;
        }
        writes
    }

    /// Takes over what a new backend, which was told the driver's writes, says.
    ///
    /// # Errors
    ///
    /// Fails if it differs in more than what a former driver wrote.
    pub(super) fn adopt(&mut self, theirs: &[u8]) -> Result<(), ConfigDiffers> {
        let wrong = self
            .differences(theirs)
            .find(|(offset, _theirs)| self.authors[*offset] != Author::FormerDriver);
        if let Some((offset, theirs)) = wrong {
            return Err(self.differs(offset, theirs));
        }
        self.bytes = theirs.iter().copied().take(self.bytes.len()).collect();
        Ok(())
    }

    fn differences<'a>(&'a self, theirs: &'a [u8]) -> impl Iterator<Item = (usize, u8)> + 'a {
        let theirs = theirs.iter().copied().chain(std::iter::repeat(0));
        let pairs = self.bytes.iter().zip(theirs).enumerate();
        pairs.filter_map(|(at, (ours, theirs))| (*ours != theirs).then_some((at, theirs)))
    }

    fn differs(&self, offset: usize, theirs: u8) -> ConfigDiffers {
        ConfigDiffers { offset, ours: self.bytes[offset], theirs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u32, bytes: &[u8]) -> ConfigWrite {
        ConfigWrite { offset, bytes: bytes.to_vec() }
    }

    #[test]
    fn an_equal_configuration_is_taken_and_another_is_refused() {
        let mut config = Configuration::new(b"disk".to_vec());
        assert_eq!(config.to_repeat(b"disk"), Ok(Vec::new()));
        config.adopt(b"disk").unwrap();
        let differs = ConfigDiffers { offset: 2, ours: b's', theirs: b'c' };
        assert_eq!(config.to_repeat(b"dick"), Err(differs));
        assert_eq!(config.to_repeat(b"dis").unwrap_err().theirs, 0);
        assert_eq!(config.bytes(), b"disk");
    }

    #[test]
    fn what_the_driver_wrote_is_written_again() {
        let mut config = Configuration::new(vec![0; 4]);
        config.write(&write(1, &[7, 8]));
        assert_eq!(config.to_repeat(&[0, 0, 8, 0]), Ok(vec![write(1, &[7, 8])]));
        config.adopt(&[0, 7, 8, 0]).unwrap();
        assert_eq!(config.adopt(&[0, 0, 8, 0]).unwrap_err().offset, 1, "it was not taken");
    }

    #[test]
    fn what_a_former_driver_wrote_is_as_the_new_backend_has_it() {
        let mut config = Configuration::new(vec![0; 4]);
        config.write(&write(3, &[9, 9, 9]));
        config.forget_driver();
        assert_eq!(config.to_repeat(&[0; 4]), Ok(Vec::new()));
        config.adopt(&[0; 4]).unwrap();
        assert_eq!(config.bytes(), [0; 4]);
    }
}
