//! The last bytes of an output stream, kept so that a lost connection can be resumed.

use std::collections::VecDeque;

/// How much is kept: more than what a dying connection can hold in flight (the guest's and the
/// host's vsock buffers and the host's socket buffer, 256 KiB each by default).
pub(crate) const WINDOW_BYTES: usize = 1 << 20;

/// Bytes of a stream from `start` to `start + bytes.len()`.
#[derive(Debug, Default)]
pub(crate) struct Window {
    bytes: VecDeque<u8>,
    start: u64,
}

/// The offset asked for is not in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream's bytes from {asked} are not kept: {start} to {end} are")]
pub(crate) struct NotKept {
    asked: u64,
    start: u64,
    end: u64,
}

impl Window {
    /// The offset after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Appends what the stream went on with; the oldest bytes go.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let surplus = self.bytes.len().saturating_sub(WINDOW_BYTES);
        self.bytes.drain(..surplus);
        self.start += surplus as u64;
    }

    /// The longest contiguous piece from `offset` on; empty at the end.
    pub(crate) fn piece(&self, offset: u64) -> Result<&[u8], NotKept> {
        let not_kept = NotKept { asked: offset, start: self.start, end: self.end() };
        let skip = offset.checked_sub(self.start).ok_or(not_kept)?;
        let skip = usize::try_from(skip).map_err(|_error| not_kept)?;
        let (first, second) = self.bytes.as_slices();
        if skip < first.len() {
            Ok(&first[skip..])
        } else {
            second.get(skip - first.len()..).ok_or(not_kept)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::any, prelude::proptest};

    use super::*;

    fn from(window: &Window, mut offset: u64) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let piece = window.piece(offset).unwrap();
            if piece.is_empty() {
                return all;
            }
            all.extend(piece);
            offset += piece.len() as u64;
        }
    }

    #[test]
    fn an_offset_outside_is_refused() {
        let mut window = Window::default();
        window.push(b"abc");
        assert_eq!(window.piece(4), Err(NotKept { asked: 4, start: 0, end: 3 }));
        window.push(&vec![0; WINDOW_BYTES]);
        assert!(window.piece(2).is_err());
        assert_eq!(window.end(), WINDOW_BYTES as u64 + 3);
    }

    #[test]
    fn more_than_the_window_leaves_the_last_bytes() {
        let mut window = Window::default();
        let bytes: Vec<u8> =
            (0..WINDOW_BYTES + 100).map(|i| u8::try_from(i % 251).unwrap()).collect();
        window.push(&bytes);
        assert_eq!(from(&window, 100), &bytes[100..]);
    }

    proptest! {
        #[test]
        fn any_offset_gives_the_rest_of_the_stream(
            chunks in vec(vec(any::<u8>(), 0..50), 0..20),
            at in any::<u16>(),
        ) {
            let mut window = Window::default();
            for chunk in &chunks {
                window.push(chunk);
            }
            let all = chunks.concat();
            let at = usize::from(at) % (all.len() + 1);
            assert_eq!(from(&window, at as u64), &all[at..]);
        }
    }
}
