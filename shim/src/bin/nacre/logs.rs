//! `nacre logs`: what a detached sandbox printed, standard output to standard output and standard
//! error to standard error.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::Duration,
};

use shim::{
    log_file,
    output_log::{Decoder, Source},
    paths,
    registry::{Life, Registry, RegistryError},
};

use crate::{args::Logs, failure::Failure};

/// How often a log that is followed is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The sandbox keeps no log.
#[derive(Debug, thiserror::Error)]
#[error("sandbox `{0}` runs in the foreground and keeps no log")]
struct NoLog(String);

pub(crate) fn logs(args: &Logs) -> Result<u8, Failure> {
    let registry = Registry::open(paths::state_root())?;
    let (_, files) = registry.find(&args.name)?;
    let path = files.output();
    let before = log_file::predecessor(&path);
    if before.exists() {
        print_rest(&mut open(&before)?, &mut Decoder::default())?;
    }
    if !path.exists() {
        return Err(NoLog(args.name.to_string()).into());
    }
    let mut decoder = Decoder::default();
    let mut file = open(&path)?;
    loop {
        // Looked at before reading: what is printed until then is in the log.
        let lives = match registry.find(&args.name) {
            Ok((record, _)) => matches!(Life::of(&record), Life::Creating | Life::Running),
            Err(RegistryError::Unknown(_)) => false,
            Err(error) => return Err(error.into()),
        };
        print_rest(&mut file, &mut decoder)?;
        if !args.follow || !lives {
            return Ok(0);
        }
        if is_replaced(&file, &path) {
            print_rest(&mut file, &mut decoder)?;
            file = open(&path)?;
            decoder = Decoder::default();
        } else {
            thread::sleep(LOOK_EVERY);
        }
    }
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|error| Failure::setup("the log", error))
}

fn is_replaced(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(open), Ok(there)) => open.ino() != there.ino(),
        _ => false,
    }
}

fn print_rest(file: &mut File, decoder: &mut Decoder) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::setup("the log", error);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = file.read(&mut buffer).map_err(failed)?;
        if read == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..read]);
        while let Some((source, bytes)) = decoder.next_chunk()? {
            let printed = match source {
                Source::Output => print(&mut io::stdout(), &bytes),
                Source::Error => print(&mut io::stderr(), &bytes),
            };
            printed.map_err(failed)?;
        }
    }
}

fn print(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
