//! The local ends of a process's streams: descriptors of this process, or a log.
//!
//! Descriptors are read and written by threads of their own. They may be shared with other
//! programs, so they must not be made non-blocking, and a regular file can't be polled at all. The
//! threads end with the program or with their channel.

use std::{
    fs::File,
    io::{Read, Write},
    thread,
};

use tokio::sync::{mpsc, oneshot, watch};

use crate::output_log::{OutputLog, Source};

/// The largest piece that is moved at once, in bytes.
pub const CHUNK_BYTES: usize = 64 << 10;
/// How many pieces wait at most.
const DEPTH: usize = 4;

/// Where a process's standard input comes from.
#[derive(Debug)]
pub struct Input(mpsc::Receiver<Vec<u8>>);

impl Input {
    /// All that can be read from `file`.
    ///
    /// # Errors
    ///
    /// Fails if no thread can be started.
    pub fn from_file(file: File) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel(DEPTH);
        thread::Builder::new().name("stdin".to_owned()).spawn(move || read_all(file, &sender))?;
        Ok(Self(receiver))
    }

    /// What is sent to the answered sender, until it is dropped.
    #[must_use]
    pub fn from_sender() -> (mpsc::Sender<Vec<u8>>, Self) {
        let (sender, receiver) = mpsc::channel(DEPTH);
        (sender, Self(receiver))
    }

    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        self.0.recv().await
    }
}

fn read_all(mut file: File, sender: &mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => {
                if sender.blocking_send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                log::debug!("standard input ends: {error}");
                return;
            }
        }
    }
}

/// Where one of a process's output streams goes.
#[derive(Clone, Debug)]
pub struct Output {
    source: Source,
    sender: mpsc::Sender<(Source, Vec<u8>)>,
    unread: watch::Receiver<bool>,
}

impl Output {
    /// Becomes true when the reader of a pipe is gone, and never for any other trouble.
    #[must_use]
    pub fn unread(&self) -> watch::Receiver<bool> {
        self.unread.clone()
    }

    /// Passes bytes on. Answers whether anybody still takes them.
    pub async fn write(&self, bytes: &[u8]) -> bool {
        self.sender.send((self.source, bytes.to_vec())).await.is_ok()
    }
}

/// The pieces of an output, for a task that passes them on.
#[derive(Debug)]
pub struct Pieces {
    receiver: mpsc::Receiver<(Source, Vec<u8>)>,
    done: oneshot::Sender<()>,
    // Kept so that it stays false: the reader may come back.
    _unread: watch::Sender<bool>,
}

impl Pieces {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        self.receiver.recv().await.map(|(_source, bytes)| bytes)
    }

    /// Says that all of them are written.
    pub fn finish(self) {
        if self.done.send(()).is_err() {
            log::debug!("nobody waits for the output");
        }
    }
}

/// Both output streams.
#[derive(Debug)]
pub struct Outputs {
    /// Standard output.
    pub output: Output,
    /// Standard error.
    pub error: Output,
    /// Done when all that was passed on is written.
    pub written: Written,
}

/// Resolves when the threads of [`Outputs`] have written everything.
#[derive(Debug)]
pub struct Written(Vec<oneshot::Receiver<()>>);

impl Written {
    /// Waits for that. All [`Output`]s have to be dropped before.
    pub async fn wait(self) {
        for thread in self.0 {
            if thread.await.is_err() {
                log::debug!("a writer ended early");
            }
        }
    }
}

impl Outputs {
    /// To two descriptors.
    ///
    /// # Errors
    ///
    /// Fails if no thread can be started.
    pub fn to_files(output: File, error: File) -> std::io::Result<Self> {
        let (output, output_written) = writer(Source::Output, to_file(output))?;
        let (error, error_written) = writer(Source::Error, to_file(error))?;
        Ok(Self { output, error, written: Written(vec![output_written, error_written]) })
    }

    /// To tasks of the caller's: standard output's pieces and standard error's.
    #[must_use]
    pub fn to_receivers() -> (Self, [Pieces; 2]) {
        let (output, out, output_written) = receiver(Source::Output);
        let (error, err, error_written) = receiver(Source::Error);
        let written = Written(vec![output_written, error_written]);
        (Self { output, error, written }, [out, err])
    }

    /// To a log, in the order in which they come.
    ///
    /// # Errors
    ///
    /// Fails if no thread can be started.
    pub fn to_log(mut log: OutputLog) -> std::io::Result<Self> {
        let append = move |source, bytes: &[u8]| log.append(source, bytes);
        let (output, written) = writer(Source::Output, append)?;
        let error = Output { source: Source::Error, ..output.clone() };
        Ok(Self { output, error, written: Written(vec![written]) })
    }
}

fn receiver(source: Source) -> (Output, Pieces, oneshot::Receiver<()>) {
    let (sender, receiver) = mpsc::channel(DEPTH);
    let (done, written) = oneshot::channel();
    let (unread, is_unread) = watch::channel(false);
    let pieces = Pieces { receiver, done, _unread: unread };
    (Output { source, sender, unread: is_unread }, pieces, written)
}

fn to_file(mut file: File) -> impl FnMut(Source, &[u8]) -> std::io::Result<()> + Send + 'static {
    move |_source, bytes| file.write_all(bytes)
}

fn writer(
    source: Source,
    mut write: impl FnMut(Source, &[u8]) -> std::io::Result<()> + Send + 'static,
) -> std::io::Result<(Output, oneshot::Receiver<()>)> {
    let (sender, mut receiver) = mpsc::channel::<(Source, Vec<u8>)>(DEPTH);
    let (done, written) = oneshot::channel();
    let (unread, is_unread) = watch::channel(false);
    thread::Builder::new().name("output".to_owned()).spawn(move || {
        while let Some((source, bytes)) = receiver.blocking_recv() {
            if let Err(error) = write(source, &bytes) {
                // What is printed from here on is dropped. Of a full disk the process in the guest
                // is told nothing.
                log::debug!("output ends: {error}");
                unread.send_replace(error.kind() == std::io::ErrorKind::BrokenPipe);
                return;
            }
        }
        if done.send(()).is_err() {
            log::debug!("nobody waits for the output");
        }
    })?;
    Ok((Output { source, sender, unread: is_unread }, written))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[tokio::test]
    async fn everything_passed_on_is_written_before_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let null = File::options().write(true).open("/dev/null").unwrap();
        let outputs = Outputs::to_files(File::create(&path).unwrap(), null).unwrap();
        let Outputs { output, error, written } = outputs;
        for _ in 0..100 {
            assert!(output.write(b"0123456789").await);
        }
        drop((output, error));
        written.wait().await;
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1000);
    }

    #[tokio::test]
    async fn a_reader_that_went_away_stops_nothing() {
        let (reader, pipe) = std::io::pipe().unwrap();
        drop(reader);
        let null = File::options().write(true).open("/dev/null").unwrap();
        let pipe = File::from(OwnedFd::from(pipe));
        let Outputs { output, error, written } = Outputs::to_files(pipe, null).unwrap();
        while output.write(b"x").await {}
        assert!(*output.unread().borrow() && !*error.unread().borrow());
        drop((output, error));
        written.wait().await;
    }

    #[tokio::test]
    async fn input_is_read_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        std::fs::write(&path, vec![7; 200_000]).unwrap();
        let mut input = Input::from_file(File::open(&path).unwrap()).unwrap();
        let mut bytes = 0;
        while let Some(piece) = input.next().await {
            bytes += piece.len();
        }
        assert_eq!(bytes, 200_000);
    }
}
