//! What xtask and the emulated host say to each other: frames of one job each, over one stream.
//!
//! A frame is its kind (1 byte), its job (4 bytes), the length of its content (4 bytes), all little
//! endian, and the content. Output and input have a window of bytes that may be under way; the
//! receiver gives credit back as it consumes, so that no job can hold up another.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::path::PathBuf;

/// To be counted up when a frame changes; hosts of different versions live side by side.
pub const VERSION: u32 = 2;

/// How many bytes of one stream may be under way at first.
pub const WINDOW_BYTES: u32 = 256 * 1024;

/// The most that one frame of output or input carries.
pub const CHUNK_BYTES: usize = 32 * 1024;

/// The job number of what concerns the host itself.
pub const NO_JOB: u32 = 0;

const CONTENT_MAX_BYTES: usize = 1024 * 1024;

/// A command to run in the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// The folder to run in, as seen in the host.
    pub folder: PathBuf,
    /// Variables beyond the host's own few.
    pub env: Vec<(String, String)>,
    /// Paths of the machine that must be at the same place in the host.
    pub binds: Vec<PathBuf>,
    /// The terminal to give it, instead of pipes.
    pub terminal: Option<TerminalSize>,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

impl Ending {
    /// The exit code that a shell would report.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => u8::try_from(signal).map_or(u8::MAX, |n| n.saturating_add(128)),
        }
    }
}

/// One of a job's three streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard input, towards the job.
    Input,
    /// Standard output, from the job; all of a terminal's.
    Output,
    /// Standard error, from the job.
    Error,
}

/// What one frame says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// The host is up.
    Hello {
        /// Milliseconds from QEMU's start as the server counts them; from the kernel's, as sent
        /// by the executor.
        boot_ms: u32,
    },
    /// The host still lives.
    Heartbeat {
        /// Whether anything runs in it, of a job or left behind by one.
        busy: bool,
    },
    /// Write everything back and stop. Answered by the same.
    Stop,
    /// Start a job.
    Start(JobSpec),
    /// The job could not be started.
    Refused(String),
    /// Bytes of a stream.
    Bytes(Stream, Vec<u8>),
    /// No more input will come.
    InputEnd,
    /// So many more bytes of the stream may be sent.
    Credit(Stream, u32),
    /// Nobody reads this output stream any more: the job shall find it broken.
    OutputClosed(Stream),
    /// The terminal has another size now.
    Resize(TerminalSize),
    /// A signal, for the job's first process or its whole process group.
    Signal {
        /// The number.
        number: i32,
        /// Whether the whole group gets it.
        group: bool,
    },
    /// Whoever asked for the job is gone: end it.
    Hangup,
    /// The job ended.
    Exited(Ending),
}

const KIND_HELLO: u8 = 1;
const KIND_HEARTBEAT: u8 = 2;
const KIND_STOP: u8 = 3;
const KIND_START: u8 = 4;
const KIND_REFUSED: u8 = 5;
const KIND_INPUT: u8 = 6;
const KIND_OUTPUT: u8 = 7;
const KIND_ERROR: u8 = 8;
const KIND_INPUT_END: u8 = 9;
const KIND_CREDIT: u8 = 10;
const KIND_RESIZE: u8 = 11;
const KIND_SIGNAL: u8 = 12;
const KIND_HANGUP: u8 = 13;
const KIND_EXITED: u8 = 14;
const KIND_OUTPUT_CLOSED: u8 = 15;
const HEADER_BYTES: usize = 9;

/// Writes one frame.
///
/// # Errors
/// The stream cannot be written.
pub fn write_frame(stream: &mut impl Write, job: u32, frame: &Frame) -> Result<()> {
    let (kind, content) = encode(frame)?;
    let length = u32::try_from(content.len()).context("a frame of 4 GiB")?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len());
    bytes.push(kind);
    bytes.extend_from_slice(&job.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&content);
    stream.write_all(&bytes).context("cannot write to the host's stream")
}

/// Reads one frame and its job.
///
/// # Errors
/// The stream ends or cannot be read, or does not hold a frame.
pub fn read_frame(stream: &mut impl Read) -> Result<(u32, Frame)> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).context("the host's stream ended")?;
    let [kind, j0, j1, j2, j3, l0, l1, l2, l3] = header;
    let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3]))?;
    if length > CONTENT_MAX_BYTES {
        bail!("a frame of {length} bytes");
    }
    let mut content = vec![0; length];
    stream.read_exact(&mut content).context("the host's stream ended within a frame")?;
    Ok((u32::from_le_bytes([j0, j1, j2, j3]), decode(kind, content)?))
}

fn encode(frame: &Frame) -> Result<(u8, Vec<u8>)> {
    Ok(match frame {
        Frame::Hello { boot_ms } => (KIND_HELLO, boot_ms.to_le_bytes().to_vec()),
        Frame::Heartbeat { busy } => (KIND_HEARTBEAT, vec![u8::from(*busy)]),
        Frame::Stop => (KIND_STOP, Vec::new()),
        Frame::Start(spec) => (KIND_START, serde_json::to_vec(spec)?),
        Frame::Refused(reason) => (KIND_REFUSED, reason.clone().into_bytes()),
        Frame::Bytes(Stream::Input, bytes) => (KIND_INPUT, bytes.clone()),
        Frame::Bytes(Stream::Output, bytes) => (KIND_OUTPUT, bytes.clone()),
        Frame::Bytes(Stream::Error, bytes) => (KIND_ERROR, bytes.clone()),
        Frame::InputEnd => (KIND_INPUT_END, Vec::new()),
        Frame::Credit(stream, bytes) => {
            let mut content = vec![number_of(*stream)];
            content.extend_from_slice(&bytes.to_le_bytes());
            (KIND_CREDIT, content)
        }
        Frame::OutputClosed(stream) => (KIND_OUTPUT_CLOSED, vec![number_of(*stream)]),
        Frame::Resize(size) => (KIND_RESIZE, serde_json::to_vec(size)?),
        Frame::Signal { number, group } => (KIND_SIGNAL, serde_json::to_vec(&(number, group))?),
        Frame::Hangup => (KIND_HANGUP, Vec::new()),
        Frame::Exited(ending) => (KIND_EXITED, serde_json::to_vec(ending)?),
    })
}

fn decode(kind: u8, content: Vec<u8>) -> Result<Frame> {
    Ok(match kind {
        KIND_HELLO => Frame::Hello { boot_ms: word(&content)? },
        KIND_HEARTBEAT => Frame::Heartbeat { busy: byte(&content)? != 0 },
        KIND_STOP => Frame::Stop,
        KIND_START => Frame::Start(serde_json::from_slice(&content).context("bad job")?),
        KIND_REFUSED => Frame::Refused(String::from_utf8_lossy(&content).into_owned()),
        KIND_INPUT => Frame::Bytes(Stream::Input, content),
        KIND_OUTPUT => Frame::Bytes(Stream::Output, content),
        KIND_ERROR => Frame::Bytes(Stream::Error, content),
        KIND_INPUT_END => Frame::InputEnd,
        KIND_CREDIT => {
            let (stream, bytes) = content.split_first().context("empty credit")?;
            Frame::Credit(stream_of(*stream)?, word(bytes)?)
        }
        KIND_OUTPUT_CLOSED => Frame::OutputClosed(stream_of(byte(&content)?)?),
        KIND_RESIZE => Frame::Resize(serde_json::from_slice(&content).context("bad size")?),
        KIND_SIGNAL => {
            let (number, group) = serde_json::from_slice(&content).context("bad signal")?;
            Frame::Signal { number, group }
        }
        KIND_HANGUP => Frame::Hangup,
        KIND_EXITED => Frame::Exited(serde_json::from_slice(&content).context("bad ending")?),
        _ => bail!("a frame of unknown kind {kind}"),
    })
}

fn word(content: &[u8]) -> Result<u32> {
    Ok(u32::from_le_bytes(content.try_into().context("a number that is not 4 bytes")?))
}

fn byte(content: &[u8]) -> Result<u8> {
    let [byte] = content else { bail!("a number that is not 1 byte") };
    Ok(*byte)
}

fn number_of(stream: Stream) -> u8 {
    match stream {
        Stream::Input => 0,
        Stream::Output => 1,
        Stream::Error => 2,
    }
}

fn stream_of(number: u8) -> Result<Stream> {
    Ok(match number {
        0 => Stream::Input,
        1 => Stream::Output,
        2 => Stream::Error,
        _ => bail!("no stream has number {number}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_frame() -> Vec<Frame> {
        let size = TerminalSize { rows: 24, columns: 80 };
        let spec = JobSpec {
            argv: vec!["echo".to_owned(), "hi there".to_owned()],
            folder: PathBuf::from("/somewhere"),
            env: vec![("K".to_owned(), "v=w".to_owned())],
            binds: vec![PathBuf::from("/a")],
            terminal: Some(size),
        };
        vec![
            Frame::Hello { boot_ms: 7 },
            Frame::Heartbeat { busy: false },
            Frame::Heartbeat { busy: true },
            Frame::Stop,
            Frame::Start(spec),
            Frame::Refused("no".to_owned()),
            Frame::Bytes(Stream::Input, vec![1]),
            Frame::Bytes(Stream::Output, vec![0; CHUNK_BYTES]),
            Frame::Bytes(Stream::Error, Vec::new()),
            Frame::InputEnd,
            Frame::Credit(Stream::Input, 1),
            Frame::Credit(Stream::Output, u32::MAX),
            Frame::Credit(Stream::Error, 0),
            Frame::OutputClosed(Stream::Output),
            Frame::OutputClosed(Stream::Error),
            Frame::Resize(size),
            Frame::Signal { number: 15, group: true },
            Frame::Hangup,
            Frame::Exited(Ending::Code(3)),
            Frame::Exited(Ending::Signal(9)),
        ]
    }

    #[test]
    fn every_frame_comes_back_as_it_was_sent() {
        let mut wire = Vec::new();
        for (job, frame) in (0..).zip(every_frame()) {
            write_frame(&mut wire, job, &frame).unwrap();
        }
        let mut rest = wire.as_slice();
        for (job, frame) in (0..).zip(every_frame()) {
            assert_eq!(read_frame(&mut rest).unwrap(), (job, frame));
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let unknown = [99, 0, 0, 0, 0, 0, 0, 0, 0];
        assert!(read_frame(&mut unknown.as_slice()).is_err());
        let too_long = [KIND_OUTPUT, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
        assert!(read_frame(&mut too_long.as_slice()).is_err());
        let cut_short = [KIND_OUTPUT, 0, 0, 0, 0, 5, 0, 0, 0, 1];
        assert!(read_frame(&mut cut_short.as_slice()).is_err());
        let bad_credit = [KIND_CREDIT, 0, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, 0];
        assert!(read_frame(&mut bad_credit.as_slice()).is_err());
    }

    #[test]
    fn a_signal_ends_with_128_and_its_number() {
        assert_eq!(Ending::Signal(9).code(), 137);
        assert_eq!(Ending::Code(3).code(), 3);
    }
}
