//! `nacre-vmm`: one virtual machine. Arguments, run, error chain, exit code.

use std::{
    io::{Write, stderr},
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};
use core_vmm::{args::Args, bug, error_chain, logger, run};
use nacre_proto::exit::VmmExit;

fn main() -> ExitCode {
    u8::from(end()).into()
}

fn end() -> VmmExit {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            error.print().ok();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => VmmExit::PowerOff,
                _ => VmmExit::Usage,
            };
        }
    };
    logger::start(args.log_level());
    bug::ends_the_process();
    let config = match args.into_config() {
        Ok(config) => config,
        Err(error) => {
            complain(&error_chain(&error));
            return VmmExit::Usage;
        }
    };
    match run(&config) {
        Ok(exit) => exit,
        Err(error) => {
            complain(&error_chain(&error));
            error.exit()
        }
    }
}

fn complain(message: &str) {
    // Without standard error there is still the exit code.
    writeln!(stderr(), "nacre-vmm: {message}").ok();
}
