//! What a panic does: it is a bug of ours, on whichever thread, and it ends the process.
//!
//! A vCPU that stops for ever or a watchdog that watches no more would be found out much later, by
//! somebody who can't know why. The supervisor tells an end by its code and starts anew.

use std::any::Any;
use std::io::{Write, stderr};
use std::{panic, process, thread};

use nacre_proto::exit::VmmExit;

/// From now on a panic of any thread ends the process with one line and [`VmmExit::Failed`].
pub fn ends_the_process() {
    panic::set_hook(Box::new(|info| {
        let what = text(info.payload());
        let place = info.location().map_or_else(String::new, |place| format!(" at {place}"));
        let thread = thread::current();
        let name = thread.name().unwrap_or("without a name");
        // Without standard error there is still the exit code.
        writeln!(stderr(), "nacre-vmm: a bug on thread {name}{place}: {what}").ok();
        end();
    }));
}

fn text(payload: &(dyn Any + Send)) -> &str {
    let owned = payload.downcast_ref::<String>().map(String::as_str);
    owned.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given")
}

#[expect(clippy::exit, reason = "no thread of a process with a bug is to go on")]
fn end() {
    process::exit(u8::from(VmmExit::Failed).into());
}
