//! The jail, live: a thread of each kind makes a call that it may not, and the kernel ends the
//! whole process; the same thread without such a call lives.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that can't go on says so by a panic"
)]

use std::{
    env,
    fs::File,
    net::TcpStream,
    os::unix::{net::UnixDatagram, process::ExitStatusExt},
    process::{Command, ExitStatus},
    thread,
};

use core_vmm::{jail, seccomp};
use seccompiler::BpfProgram;

/// What the child of a test is to do, as `thread kind.call`.
const ORDER: &str = "NACRE_TEST_JAILED";
/// The signal of a system call that the filter does not allow.
const SIGSYS: i32 = 31;

fn filter(kind: &str) -> BpfProgram {
    match kind {
        "control" => seccomp::control_filter(),
        "vcpu" => seccomp::vcpu_filter(false),
        "watchdog" => seccomp::watchdog_filter(),
        _ => panic!("no kind of thread: {kind}"),
    }
    .unwrap()
}

/// Enters the jail as a thread of that kind does, and makes the call.
fn obey(order: &str) {
    let (kind, call) = order.split_once('.').unwrap();
    let filter = filter(kind);
    let socket = UnixDatagram::unbound().unwrap();
    jail::enter().unwrap();
    seccompiler::apply_filter(&filter).unwrap();
    // What comes back does not matter: it must not come back at all.
    match call {
        "nothing" => {}
        "open" => drop(File::open("/dev/null")),
        "socket" => drop(TcpStream::connect("127.0.0.1:1")),
        "connect" => drop(socket.connect("/nowhere")),
        "thread" => drop(thread::spawn(|| ()).join()),
        "execute" => drop(Command::new("/bin/true").status()),
        _ => panic!("no call: {call}"),
    }
}

const NAME: &str = "a_call_that_a_thread_may_not_make_ends_the_process";

fn end_of(order: &str) -> ExitStatus {
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", NAME]).env(ORDER, order);
    child.output().unwrap().status
}

#[test]
fn a_call_that_a_thread_may_not_make_ends_the_process() {
    if let Ok(order) = env::var(ORDER) {
        return obey(&order);
    }
    for kind in ["control", "vcpu", "watchdog"] {
        for call in ["open", "socket", "connect", "thread", "execute"] {
            let end = end_of(&format!("{kind}.{call}"));
            assert_eq!(end.signal(), Some(SIGSYS), "{kind}.{call}: {end}");
        }
        let end = end_of(&format!("{kind}.nothing"));
        assert!(end.success(), "{kind}: {end}");
    }
}
