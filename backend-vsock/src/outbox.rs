//! Bytes of the guest that the host program has not taken yet.
//!
//! The guest's credit bounds them: an outbox never holds more than `credit::BUFFER_BYTES`.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};

/// A queue of bytes on their way to one host program.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: VecDeque<u8>,
}

impl Outbox {
    /// Whether everything was taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds bytes behind those that wait.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Forgets all bytes and their memory: nobody wants them. Says how many they were.
    pub fn clear(&mut self) -> usize {
        let len = self.bytes.len();
        self.bytes = VecDeque::new();
        len
    }

    /// Writes what `to` takes without waiting, and says how many bytes that was.
    ///
    /// # Errors
    ///
    /// What writing gives, but for "not now": that is a success of fewer bytes.
    pub fn flush(&mut self, to: &mut impl Write) -> io::Result<usize> {
        let mut written = 0;
        while !self.bytes.is_empty() {
            let (front, back) = self.bytes.as_slices();
            match to.write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => {
                    self.bytes.drain(..len);
                    written += len;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.bytes.is_empty() {
            self.bytes.shrink_to(4096);
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes so many bytes in each call; 0 stands for "not now".
    struct Sink {
        appetite: Vec<usize>,
        taken: Vec<u8>,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.appetite.pop() {
                None | Some(0) => Err(io::ErrorKind::WouldBlock.into()),
                Some(most) => {
                    let len = most.min(bytes.len());
                    self.taken.extend_from_slice(&bytes[..len]);
                    Ok(len)
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn bytes_come_out_once_and_in_order(
            pieces in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..300), prop::collection::vec(0_usize..200, 0..5)),
                1..30,
            ),
        ) {
            let mut outbox = Outbox::default();
            let mut sink = Sink { appetite: Vec::new(), taken: Vec::new() };
            let mut pushed = Vec::new();
            for (bytes, appetite) in pieces {
                outbox.push(&bytes);
                pushed.extend(bytes);
                sink.appetite = appetite;
                let before = sink.taken.len();
                let written = outbox.flush(&mut sink).unwrap();
                prop_assert_eq!(written, sink.taken.len() - before);
                prop_assert_eq!(outbox.len(), pushed.len() - sink.taken.len());
            }
            prop_assert!(pushed.starts_with(&sink.taken));
            sink.appetite = vec![1 << 20; 4];
            outbox.flush(&mut sink).unwrap();
            prop_assert_eq!(pushed, sink.taken);
            prop_assert!(outbox.is_empty());
        }
    }
}
