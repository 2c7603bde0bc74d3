//! One job in an emulated host, seen from outside: its input, output, size, signals and end.

use super::protocol::{
    Ending, Frame, JobSpec, NO_JOB, Stream, TerminalSize, read_frame, write_frame,
};
use super::window::Window;
use anyhow::{Context, Result, bail};
use rustix::stdio;
use rustix::termios::tcgetwinsize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// The way to the host; frames are written whole, by several threads.
#[derive(Debug)]
pub(super) struct Client {
    reader: UnixStream,
    writer: Arc<Mutex<UnixStream>>,
    /// How long the host took to come up.
    pub(super) boot_ms: u32,
}

/// A job's streams on our side.
pub(super) struct Streams<'a> {
    /// Where input comes from; the thread that reads it may outlive the job.
    pub(super) input: Option<Box<dyn Read + Send>>,
    /// Where standard output goes.
    pub(super) output: &'a mut dyn Write,
    /// Where standard error goes.
    pub(super) error: &'a mut dyn Write,
}

impl Client {
    /// Waits until the host at the other end is up.
    pub(super) fn greet(stream: UnixStream) -> Result<Self> {
        let writer = Arc::new(Mutex::new(stream.try_clone().context("cannot share a socket")?));
        let mut reader = stream;
        match read_frame(&mut reader).context("the emulated host did not come up")? {
            (_, Frame::Hello { boot_ms }) => Ok(Self { reader, writer, boot_ms }),
            (_, other) => bail!("the emulated host greets with {other:?}"),
        }
    }

    /// Tells the host to stop, and waits until it has.
    pub(super) fn stop(mut self) -> Result<()> {
        send(&self.writer, &Frame::Stop)?;
        while read_frame(&mut self.reader).is_ok() {}
        Ok(())
    }

    /// Passes the signals that end or interrupt a program, and the terminal's size, to the job.
    pub(super) fn pass_signals(&self) -> Result<()> {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH])
            .context("cannot listen to signals")?;
        let writer = Arc::clone(&self.writer);
        thread::spawn(move || {
            for frame in signals.forever().filter_map(frame_of_signal) {
                if send(&writer, &frame).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Runs the job to its end, which ends the connection as well.
    pub(super) fn run(mut self, spec: JobSpec, streams: Streams<'_>) -> Result<Ending> {
        let ending = self.follow(spec, streams);
        // The threads for input and signals hold the connection too. Ended already: no harm.
        drop(self.reader.shutdown(Shutdown::Both));
        ending
    }

    fn follow(&mut self, spec: JobSpec, streams: Streams<'_>) -> Result<Ending> {
        send(&self.writer, &Frame::Start(spec))?;
        let window = Arc::new(Window::new());
        match streams.input {
            Some(input) => {
                let (writer, window) = (Arc::clone(&self.writer), Arc::clone(&window));
                thread::spawn(move || send_input(input, &writer, &window));
            }
            None => send(&self.writer, &Frame::InputEnd)?,
        }
        let mut output = Sink::new(Stream::Output, streams.output);
        let mut error = Sink::new(Stream::Error, streams.error);
        loop {
            match read_frame(&mut self.reader).context("the emulated host is gone")?.1 {
                Frame::Bytes(stream, bytes) => {
                    let to = if stream == Stream::Error { &mut error } else { &mut output };
                    if let Some(closed) = to.write(&bytes) {
                        send(&self.writer, &closed)?;
                    }
                    let credit = u32::try_from(bytes.len()).unwrap_or(0);
                    send(&self.writer, &Frame::Credit(stream, credit))?;
                }
                Frame::Credit(_, bytes) => window.give(bytes),
                Frame::Refused(reason) => bail!("{reason}"),
                Frame::Exited(ending) => return Ok(ending),
                _ => {}
            }
        }
    }
}

fn frame_of_signal(number: i32) -> Option<Frame> {
    if number == SIGWINCH {
        return terminal_size().map(Frame::Resize);
    }
    // A terminal signals the whole group in front.
    Some(Frame::Signal { number, group: matches!(number, SIGINT | SIGQUIT) })
}

/// The size of our terminal, if standard input is one.
pub(super) fn terminal_size() -> Option<TerminalSize> {
    let size = tcgetwinsize(stdio::stdin()).ok()?;
    Some(TerminalSize { rows: size.ws_row, columns: size.ws_col })
}

/// Somewhere to write to; after a first failure the rest is thrown away. Only of a pipe without a
/// reader does the job hear: of a full disk, say, it is told nothing when it runs here either.
struct Sink<'a> {
    stream: Stream,
    to: &'a mut dyn Write,
    open: bool,
}

impl<'a> Sink<'a> {
    fn new(stream: Stream, to: &'a mut dyn Write) -> Self {
        Self { stream, to, open: true }
    }

    /// Writes, and answers with what the job has to be told.
    fn write(&mut self, bytes: &[u8]) -> Option<Frame> {
        if !self.open {
            return None;
        }
        let error = self.to.write_all(bytes).and_then(|()| self.to.flush()).err()?;
        self.open = false;
        (error.kind() == ErrorKind::BrokenPipe).then_some(Frame::OutputClosed(self.stream))
    }
}

fn send_input(mut input: Box<dyn Read + Send>, writer: &Mutex<UnixStream>, window: &Window) {
    while let Some(allowed) = window.take() {
        let mut buffer = vec![0; allowed];
        let read = input.read(&mut buffer).unwrap_or(0);
        window.give(u32::try_from(allowed - read).unwrap_or(0));
        buffer.truncate(read);
        let frame = if read == 0 { Frame::InputEnd } else { Frame::Bytes(Stream::Input, buffer) };
        if send(writer, &frame).is_err() || read == 0 {
            return;
        }
    }
}

fn send(writer: &Mutex<UnixStream>, frame: &Frame) -> Result<()> {
    write_frame(&mut *writer.lock().unwrap_or_else(PoisonError::into_inner), NO_JOB, frame)
}
