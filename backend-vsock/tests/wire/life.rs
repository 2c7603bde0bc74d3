//! The process's life: its start, its guests one after the other, its end.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use backend_daemon::testing::{Buffer, Daemon, connect_soon};
use backend_vsock::packet::Op;
use backend_vsock::table::CONNECTIONS_MAX;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::guest::{EVENT, Guest, SILENCE};
use crate::program::{Device, accept, greeted, patient, read, read_all};

const PROGRAM: &str = env!("CARGO_BIN_EXE_nacre-vsock");

fn run(args: &[&OsStr]) -> Output {
    Command::new(PROGRAM).args(args).output().unwrap()
}

fn fails(args: &[&OsStr], code: i32, says: &str) {
    let output = run(args);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(error.contains(says), "{error}");
}

#[test]
fn the_guest_learns_its_context_id() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    assert_eq!(guest.driver.config(0, 8), crate::program::CID.to_le_bytes());
}

#[test]
fn the_end_is_clean_and_leaves_no_socket() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let _stream = guest.grant(4096);
    greeted(&mut program);
    let mode = fs::metadata(device.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let Device { mut daemon, folder } = device;
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert_eq!(read_all(&mut program), b"");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    assert!(!daemon.socket().exists());
}

#[test]
fn a_predecessors_socket_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    drop(UnixListener::bind(&path).unwrap());
    let device = Device::start_in(folder);
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let _stream = guest.grant(4096);
    greeted(&mut program);
}

#[test]
fn a_listening_socket_can_be_handed_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    fcntl_setfd(&listener, FdFlags::empty()).unwrap();
    let number = listener.as_raw_fd().to_string();
    let args = ["--guest-cid", "52", "--uds-fd", &number, "--uds-path"].map(OsStr::new);
    let daemon = Daemon::start(PROGRAM, &[&args[..], &[path.as_os_str()]].concat());
    let device = Device { daemon, folder };
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let _stream = guest.grant(4096);
    greeted(&mut program);
    let other = device.listen(8);
    let _back = guest.dial(8, 1, 0);
    accept(&other);
    device.daemon.signal(Signal::TERM);
    let Device { mut daemon, folder: _folder } = device;
    assert_eq!(daemon.wait().code(), Some(0));
    // It was never this process's to remove.
    assert!(path.exists());
}

#[test]
fn a_path_too_long_for_an_address_serves_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("d".repeat(120));
    fs::create_dir(&deep).unwrap();
    let path = deep.join("v.sock");
    let args = ["--guest-cid".as_ref(), "52".as_ref(), "--uds-path".as_ref(), path.as_os_str()];
    let daemon = Daemon::start(PROGRAM, &args);
    let mut guest = Guest::connect(&daemon.socket());
    let short = folder.path().join("s");
    symlink(&deep, &short).unwrap();
    let listener = UnixListener::bind(short.join("v.sock_1")).unwrap();
    let _stream = guest.dial(1, 1, 0);
    accept(&listener);
}

#[test]
fn bad_arguments_end_it_with_one_line_and_a_code() {
    let folder = tempfile::tempdir().unwrap();
    let inside = |name: &str| folder.path().join(name);
    let vhost = inside("vhost");
    let with = |path: &Path, code, says: &str| {
        let args = ["--guest-cid", "3", "--socket-path"].map(OsStr::new);
        let rest = [vhost.as_os_str(), "--uds-path".as_ref(), path.as_os_str()];
        fails(&[&args[..], &rest].concat(), code, says);
        assert!(!vhost.exists());
    };
    with(&inside("missing/v.sock"), 3, "missing");
    with(Path::new("/"), 3, "names no socket");
    with(&inside(&"n".repeat(100)), 3, "longer than");
    fs::write(inside("file"), "precious").unwrap();
    with(&inside("file"), 3, "is not a socket");
    assert_eq!(fs::read(inside("file")).unwrap(), b"precious");
    let _other = UnixListener::bind(inside("taken")).unwrap();
    with(&inside("taken"), 3, "is in use");
    let path = inside("v.sock");
    let cid = |cid: &str| {
        let args = ["--socket-path", "s", "--guest-cid", cid, "--uds-path"].map(OsStr::new);
        fails(&[&args[..], &[path.as_os_str()]].concat(), 2, "--guest-cid");
    };
    cid("2");
    cid("x");
    fails(&[], 2, "--socket-path");
    let args = ["--socket-path", "s", "--guest-cid", "3", "--uds-fd", "99", "--uds-path"];
    fails(&[&args.map(OsStr::new)[..], &[path.as_os_str()]].concat(), 2, "--uds-fd");
}

#[test]
fn a_process_that_cannot_leave_its_network_serves_only_if_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let inside = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
    // Nobody in here may have a namespace any more.
    let poor = "echo 0 > /proc/sys/user/max_net_namespaces && \
                echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
    let shell = ["--user", "--map-root-user", "sh", "-c", poor, "sh"];
    let served =
        ["--socket-path", &inside("vhost"), "--guest-cid", "3", "--uds-path", &inside("v")];
    let command = |more: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(shell).arg(PROGRAM).args(served).args(more);
        command
    };
    let output = command(&[]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{error}");
    assert!(error.contains("cannot leave the network"), "{error}");
    assert!(!Path::new(&inside("vhost")).exists());
    let own = tempfile::tempdir().unwrap();
    let daemon = Daemon::spawn(command(&["--keep-network"]), own);
    drop(connect_soon(Path::new(&inside("vhost"))));
    assert!(daemon.log().contains("abstract sockets stay in reach"), "{}", daemon.log());
}

#[test]
fn capabilities_are_printed_as_json() {
    let output = run(&["--print-capabilities".as_ref()]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\"type\":\"vsock\""), "{text}");
}

#[test]
fn a_guest_that_lives_on_through_another_session_keeps_its_connections() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    guest.driver.reconnect(&device.daemon.socket());
    stream.send(&mut guest, b"still here?");
    assert_eq!(read(&mut program, 11), b"still here?");
    program.write_all(b"yes").unwrap();
    assert_eq!(stream.read(&mut guest, 3), b"yes");
}

#[test]
fn a_guest_that_outlives_a_process_that_left_nothing_is_told_that_its_connections_are_gone() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let event = guest.driver.submit(EVENT, &[Buffer::In(8)]);
    let mut program = device.ask(1);
    let stream = guest.grant(4096);
    greeted(&mut program);
    assert!(guest.driver.wait_for(EVENT, event, SILENCE).is_none());
    let Device { mut daemon, folder } = device;
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert_eq!(read_all(&mut program), b"");
    let device = Device::start_in(folder);
    guest.driver.reconnect(&device.daemon.socket());
    let told = guest.driver.wait(EVENT, event);
    assert_eq!((told.written_bytes, &told.bytes[..4]), (4, &[0; 4][..]));
    stream.say(&mut guest, Op::CreditUpdate, 0);
    assert_eq!(guest.expect(Op::Reset).ports(), stream.ports);
    let mut program = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    program.write_all(b"again").unwrap();
    assert_eq!(stream.read(&mut guest, 5), b"again");
}

#[test]
fn a_guest_that_starts_anew_has_no_connections_and_hears_of_none() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    stream.send(&mut guest, b"farewell");
    guest.driver.reset();
    guest.forget_posted();
    guest.feed(8);
    let event = guest.driver.submit(EVENT, &[Buffer::In(8)]);
    assert_eq!(read_all(&mut program), b"farewell");
    let mut program = device.ask(2);
    let _stream = guest.grant(4096);
    greeted(&mut program);
    assert!(guest.driver.wait_for(EVENT, event, SILENCE).is_none());
}

#[test]
fn a_paused_guest_keeps_its_connections() {
    let device = Device::start();
    let mut guest = Guest::connect(&device.daemon.socket());
    let mut program = device.ask(1);
    let mut stream = guest.grant(4096);
    greeted(&mut program);
    let bases: Vec<u16> = (0..3).map(|queue| guest.driver.stop_queue(queue)).collect();
    program.write_all(b"while you slept").unwrap();
    for (queue, base) in (0..3).zip(bases) {
        guest.driver.start_queue(queue, base);
    }
    assert_eq!(stream.read(&mut guest, 15), b"while you slept");
    stream.send(&mut guest, b"good morning");
    assert_eq!(read(&mut program, 12), b"good morning");
}

#[test]
fn beyond_the_most_connections_guests_are_refused_and_programs_wait() {
    // This process holds the other ends of them all.
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let device = Device::start();
    let listener = device.listen(1);
    let mut guest = Guest::connect(&device.daemon.socket());
    let most = u32::try_from(CONNECTIONS_MAX).unwrap();
    let mut pairs: Vec<_> = (0..most)
        .map(|port| {
            let stream = guest.dial(1, port, 0);
            (accept(&listener), stream)
        })
        .collect();
    let (_program, last) = pairs.last().unwrap();
    let mut request = last.header(Op::Request, 0);
    request.src_port = most;
    guest.send(request, &[]);
    assert_eq!(guest.expect(Op::Reset).header.dst_port, most);
    let mut waiting = patient(device.ask(7));
    guest.expect_silence();
    let (program, first) = pairs.swap_remove(0);
    drop(program);
    first.say(&mut guest, Op::Reset, 0);
    while guest.next().op() != Op::Request {}
    let mut answer = first.header(Op::Response, 0);
    answer.src_port = 7;
    answer.dst_port = 1 << 30;
    guest.send(answer, &[]);
    assert_eq!(greeted(&mut waiting), 1 << 30);
}
