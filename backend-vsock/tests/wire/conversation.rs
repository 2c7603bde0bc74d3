//! Connections that say at each position what belongs there, both ways, and notice any byte that is
//! missing, repeated or out of its place. Nothing waits: the device may be dead at any time.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use backend_vsock::packet::{Header, Op};

use crate::guest::Stream;

const SEND: u32 = 2;
const BOTH: u32 = 3;
/// The guest's buffer for each connection.
const GUEST_BYTES: u32 = 32 << 10;

/// The bytes of one direction.
struct Flow {
    seed: u64,
    total: usize,
    sent: usize,
    got: usize,
    /// The sender said that it is done, and the receiver heard it.
    ended: (bool, bool),
}

impl Flow {
    fn new(seed: u64, total: usize) -> Self {
        Self { seed, total, sent: 0, got: 0, ended: (false, false) }
    }

    fn next(&self, most: usize) -> Vec<u8> {
        let end = self.total.min(self.sent + most);
        (self.sent..end).map(|at| byte(self.seed, at)).collect()
    }

    fn take(&mut self, bytes: &[u8]) {
        for (at, byte_there) in (self.got..).zip(bytes) {
            assert_eq!(*byte_there, byte(self.seed, at), "byte {at} of {} is wrong", self.seed);
        }
        self.got += bytes.len();
        assert!(self.got <= self.sent, "bytes that nobody sent");
    }

    fn is_sent(&self) -> bool {
        self.sent == self.total
    }
}

/// What belongs at a position: Vigna's splitmix64, eight bytes at a time.
fn byte(seed: u64, at: usize) -> u8 {
    let mut value = (at as u64 / 8).wrapping_add(seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value ^= value >> 27;
    value.to_le_bytes()[at % 8]
}

/// One connection, both its ends.
pub struct Conversation {
    /// The guest's port, which no other has.
    pub port: u32,
    program: UnixStream,
    /// What the program has yet to write of its line, and what it read of the answer.
    line: Vec<u8>,
    answer: Vec<u8>,
    stream: Option<Stream>,
    to_host: Flow,
    to_guest: Flow,
    /// What the guest has read and not told of.
    untold: u32,
    /// Packets that the guest owes.
    owed: Vec<Op>,
    closing: bool,
    over: bool,
}

/// What became of a host program's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Fine,
    /// Its connection broke off before it was granted: it has to ask again.
    Again,
}

impl Conversation {
    /// A program asks for the guest's `port`, to write and to read so many bytes.
    pub fn new(port: u32, program: UnixStream, lengths: (usize, usize)) -> Self {
        program.set_nonblocking(true).unwrap();
        Self {
            port,
            program,
            line: format!("CONNECT {port}\n").into_bytes(),
            answer: Vec::new(),
            stream: None,
            to_guest: Flow::new(2 * u64::from(port), lengths.0),
            to_host: Flow::new(2 * u64::from(port) + 1, lengths.1),
            untold: 0,
            owed: Vec::new(),
            closing: false,
            over: false,
        }
    }

    /// The guest is the one who asks, and has already.
    pub fn by_guest(stream: Stream, program: UnixStream, lengths: (usize, usize)) -> Self {
        let mut new = Self::new(stream.ports.guest, program, lengths);
        new.line.clear();
        new.answer = b"\n".to_vec();
        new.stream = Some(stream);
        new
    }

    /// Whether all bytes arrived and the guest's end is gone.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Whether the guest has heard of it.
    pub fn is_known(&self) -> bool {
        self.stream.is_some()
    }

    /// No more bytes than were sent already.
    pub fn finish(&mut self) {
        for flow in [&mut self.to_guest, &mut self.to_host] {
            flow.total = flow.sent;
        }
    }

    pub fn describe(&self) -> String {
        let flow = |it: &Flow| format!("{}/{}/{} {:?}", it.got, it.sent, it.total, it.ended);
        let (to_guest, to_host) = (flow(&self.to_guest), flow(&self.to_host));
        format!("port {}: to guest {to_guest}, to host {to_host}, {:?}", self.port, self.stream)
    }

    /// The program writes and reads what it can.
    pub fn run_program(&mut self, most: usize) -> Program {
        if self.write_line().is_err() || self.read_answer().is_err() {
            return Program::Again;
        }
        if self.line.is_empty() && self.write(most).is_err() {
            assert!(self.answer.is_empty(), "{}", self.describe());
            return Program::Again;
        }
        if self.answer.last() == Some(&b'\n') {
            self.read(most);
        }
        Program::Fine
    }

    fn write_line(&mut self) -> Result<(), ErrorKind> {
        // In pieces, so that the device sees parts of it.
        while !self.line.is_empty() {
            let piece = self.line.len().min(5);
            match self.program.write(&self.line[..piece]) {
                Ok(len) => drop(self.line.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.kind()),
            }
            if self.line.len().is_multiple_of(2) {
                break;
            }
        }
        Ok(())
    }

    fn read_answer(&mut self) -> Result<(), ErrorKind> {
        while self.line.is_empty() && self.answer.last() != Some(&b'\n') {
            let mut byte = [0];
            match self.program.read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof),
                Ok(_) => self.answer.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.kind()),
            }
        }
        assert!(self.answer.len() <= 1 || self.answer.starts_with(b"OK "), "{:?}", self.answer);
        Ok(())
    }

    fn write(&mut self, most: usize) -> Result<(), ErrorKind> {
        if self.to_guest.ended.0 {
            return Ok(());
        }
        let bytes = self.to_guest.next(most);
        match self.program.write(&bytes) {
            Ok(len) => self.to_guest.sent += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.kind()),
        }
        if self.to_guest.is_sent() {
            self.to_guest.ended.0 = true;
            self.program.shutdown(Shutdown::Write).unwrap();
        }
        Ok(())
    }

    fn read(&mut self, most: usize) {
        let mut bytes = vec![0; most.max(1)];
        match self.program.read(&mut bytes) {
            Ok(0) => {
                assert_eq!(self.to_host.got, self.to_host.total, "{}", self.describe());
                self.to_host.ended.1 = true;
            }
            Ok(len) => self.to_host.take(&bytes[..len]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{}", self.describe()),
        }
    }

    /// The guest got a packet.
    pub fn hear(&mut self, header: &Header, payload: &[u8]) {
        match Op::from_number(header.op).unwrap() {
            Op::Request => {
                assert!(self.stream.is_none(), "asked twice: {}", self.describe());
                self.stream = Some(Stream::asked(header, GUEST_BYTES));
                self.owed.push(Op::Response);
            }
            Op::Reset => {
                assert!(self.closing && !self.over, "reset: {}", self.describe());
                self.over = true;
            }
            op => {
                let ended = self.to_guest.ended.1;
                let stream = self.stream.as_mut().unwrap();
                stream.hear(header);
                match op {
                    Op::Data => {
                        assert!(!ended, "bytes after the end: {}", self.describe());
                        self.to_guest.take(payload);
                        self.untold += header.len_bytes;
                    }
                    Op::CreditRequest => self.owed.push(Op::CreditUpdate),
                    Op::Shutdown if header.flags & SEND != 0 && !ended => {
                        let all = self.to_guest.got == self.to_guest.total;
                        assert!(all && self.to_guest.ended.0, "{}", self.describe());
                        self.to_guest.ended.1 = true;
                    }
                    Op::Response | Op::CreditUpdate | Op::Shutdown => {}
                    other => panic!("{other:?}: {}", self.describe()),
                }
            }
        }
    }

    /// The next packet that the guest sends, with at most so many bytes.
    pub fn say(&mut self, most: usize) -> Option<(Header, Vec<u8>)> {
        let stream = self.stream.as_mut()?;
        if self.over {
            return None;
        }
        if let Some(op) = self.owed.pop() {
            return Some((stream.header(op, 0), Vec::new()));
        }
        let credit = usize::try_from(stream.credit()).unwrap();
        let bytes = self.to_host.next(most.min(credit));
        if !bytes.is_empty() {
            self.to_host.sent += bytes.len();
            self.untold = 0;
            return Some((stream.data(&bytes), bytes));
        }
        if self.untold >= GUEST_BYTES / 4 {
            self.untold = 0;
            return Some((stream.header(Op::CreditUpdate, 0), Vec::new()));
        }
        if self.to_host.is_sent() && !self.to_host.ended.0 {
            self.to_host.ended.0 = true;
            return Some((stream.header(Op::Shutdown, SEND), Vec::new()));
        }
        if self.to_guest.ended.1 && self.to_host.ended.1 && !self.closing {
            self.closing = true;
            return Some((stream.header(Op::Shutdown, BOTH), Vec::new()));
        }
        None
    }
}
