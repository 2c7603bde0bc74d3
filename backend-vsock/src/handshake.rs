//! The line by which a host program names the guest's port it wants: `CONNECT 1024\n`.
//!
//! Whatever follows the line belongs to the guest, so a reader must not take a byte too many:
//! it peeks, asks [`Line::take`] how many bytes are the line's, and reads so many.

/// The longest line, in bytes, with its end.
pub const LINE_BYTES: usize = 32;

const COMMAND: &[u8] = b"CONNECT ";

/// The line so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    bytes: Vec<u8>,
}

/// What a look at the next bytes showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All bytes belong to the line, which is not at its end.
    More,
    /// The first `consumed` bytes end the line, which names this guest port.
    Port {
        /// How many of the bytes are the line's.
        consumed: usize,
        /// The guest's port.
        port: u32,
    },
    /// This is no such line.
    Malformed,
}

impl Line {
    /// A line that began with these bytes, if one can.
    #[must_use]
    pub fn restore(bytes: &[u8]) -> Option<Self> {
        (bytes.len() < LINE_BYTES).then(|| Self { bytes: bytes.to_vec() })
    }

    /// What there is of it, without its end.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Looks at the bytes that come next.
    pub fn take(&mut self, next: &[u8]) -> Progress {
        let room = LINE_BYTES - self.bytes.len();
        let end = next.iter().position(|byte| *byte == b'\n');
        match end {
            Some(at) if at < room => {
                self.bytes.extend_from_slice(&next[..at]);
                let port = port(&self.bytes);
                port.map_or(Progress::Malformed, |port| Progress::Port { consumed: at + 1, port })
            }
            None if next.len() < room => {
                self.bytes.extend_from_slice(next);
                Progress::More
            }
            Some(_) | None => Progress::Malformed,
        }
    }
}

fn port(line: &[u8]) -> Option<u32> {
    let (command, port) = line.split_at_checked(COMMAND.len())?;
    let port = port.strip_suffix(b"\r").unwrap_or(port);
    let digits = !port.is_empty() && port.iter().all(u8::is_ascii_digit);
    if !digits || !command.eq_ignore_ascii_case(COMMAND) {
        return None;
    }
    str::from_utf8(port).ok()?.parse().ok()
}

/// The line that tells a host program that it is connected.
#[must_use]
pub fn answer(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_bytes_behind_the_line_are_left_alone() {
        let progress = Line::default().take(b"CONNECT 52\nGET / HTTP/1.1\n");
        assert_eq!(progress, Progress::Port { consumed: 11, port: 52 });
    }

    #[test]
    fn case_and_a_carriage_return_do_not_matter() {
        for line in ["connect 4294967295\n", "Connect 4294967295\r\n"] {
            let progress = Line::default().take(line.as_bytes());
            assert_eq!(progress, Progress::Port { consumed: line.len(), port: u32::MAX });
        }
    }

    #[test]
    fn everything_else_is_malformed() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT  1\n",
            "CONNECT 1 \n",
            "CONNECT 4294967296\n",
            "CONNECT 00000000000000000000000001\n",
            "GET / HTTP/1.1\r\n",
            "CONNECT 1111111111111111111111111111111111",
        ] {
            assert_eq!(Line::default().take(line.as_bytes()), Progress::Malformed, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn a_line_may_come_in_any_pieces(port in any::<u32>(), cuts in prop::collection::vec(1_usize..8, 32)) {
            let text = format!("CONNECT {port}\ndata");
            let mut line = Line::default();
            let mut at = 0;
            for cut in cuts {
                let next = &text.as_bytes()[at..text.len().min(at + cut)];
                match line.take(next) {
                    Progress::More => at += next.len(),
                    Progress::Port { consumed, port: named } => {
                        prop_assert_eq!(&text[at + consumed..], "data");
                        prop_assert_eq!(named, port);
                        return Ok(());
                    }
                    Progress::Malformed => prop_assert!(false, "{:?} at {}", text, at),
                }
            }
            prop_assert!(false, "the line never ended");
        }

        #[test]
        fn garbage_never_makes_the_line_longer_than_its_limit(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let mut line = Line::default();
            for piece in pieces {
                if line.take(&piece) == Progress::Malformed {
                    break;
                }
                prop_assert!(line.bytes.len() < LINE_BYTES);
            }
        }
    }
}
