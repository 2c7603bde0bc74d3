//! The `nacre` command: sandboxes by hand. Arguments, one action, one line of error, an exit code.

mod args;
mod daemon;
mod device;
mod exec;
mod failure;
mod logger;
mod logs;
mod permission;
mod prepare;
mod ps;
mod resize;
mod run;
mod signals;
mod stop;
mod terminal;

use std::process::ExitCode;

use clap::Parser;
use nacre_proto::exit::RunExit;

use args::{Args, Command};
use failure::Failure;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let is_help = !error.use_stderr();
            if error.print().is_err() || is_help {
                return ExitCode::SUCCESS;
            }
            return ExitCode::from(u8::from(RunExit::Usage));
        }
    };
    logger::init(args.log_level);
    let result = match args.command {
        Command::Run(run) => run::run(*run, args.log_level),
        Command::Ps(ps) => ps::ps(&ps),
        Command::Exec(exec) => exec::exec(&exec),
        Command::Logs(logs) => logs::logs(&logs),
        Command::Stop(stop) => stop::stop(&stop),
        Command::Device(device) => device::device(&device),
        Command::Resize(args) => resize::resize(&args),
        Command::Rm(rm) => stop::remove(&rm),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.print();
            ExitCode::from(failure.code())
        }
    }
}

/// The runtime of a command: one thread, which is the main one, so that the children that it
/// starts live as long as the program does.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::setup("no runtime", error))
}
