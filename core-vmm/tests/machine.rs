//! The whole machine on the host's KVM, an emulating one too, with guests assembled by hand: what
//! they print, and how the process ends.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "functions that tests share"
)]

mod assembled;

use std::{
    fs,
    io::{self, Read},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use core_vmm::memory::layout;
use nacre_proto::{
    exit::VmmExit,
    vmm::{self, Command as Ask, Outcome, Reply, Request, State, Told},
};
use rustix::{
    io::{FdFlags, fcntl_setfd},
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
        sockopt::Timeout, sockopt::set_socket_timeout,
    },
};

use self::assembled::Guest;

/// Far more than any of this takes on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A running VMM.
struct Vmm {
    child: Child,
    serial: mpsc::Receiver<u8>,
    printed: Vec<u8>,
    _folder: tempfile::TempDir,
}

/// How a VMM ended.
struct End {
    exit: Option<VmmExit>,
    printed: Vec<u8>,
    log: String,
}

/// The supervisor's end of a control socket.
struct Supervisor(OwnedFd);

impl Supervisor {
    /// A socket, and the VMM's end of it with the number to pass on.
    fn new() -> (Self, OwnedFd, String) {
        let kind = (AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (ours, theirs) = socketpair(kind.0, kind.1, kind.2, None).unwrap();
        fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
        set_socket_timeout(&ours, Timeout::Recv, Some(DEADLINE)).unwrap();
        let number = theirs.as_raw_fd().to_string();
        (Self(ours), theirs, number)
    }

    fn send(&self, bytes: &[u8]) {
        send(&self.0, bytes, SendFlags::NOSIGNAL).unwrap();
    }

    fn reply(&self) -> Reply {
        let mut buffer = vec![0; vmm::MAX_BYTES];
        let (len, _) = recv(&self.0, &mut buffer[..], RecvFlags::empty()).unwrap();
        let Told::Reply(reply) = vmm::decode(&buffer[..len]).unwrap() else { panic!("unasked") };
        reply
    }

    fn ask(&self, id: u64, command: Ask) -> Outcome {
        self.send(&vmm::encode(&Request { id, command }).unwrap());
        let reply = self.reply();
        assert_eq!(reply.id, id);
        reply.outcome
    }
}

/// Whether there is a KVM to run on; says so if not.
fn has_kvm() -> bool {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &kvm {
        eprintln!("SKIPPED: /dev/kvm: {error}");
    }
    kvm.is_ok()
}

impl Vmm {
    fn start(guest: &Guest, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        guest.write(&kernel);
        Self::start_kernel(folder, kernel, args)
    }

    fn start_kernel(folder: tempfile::TempDir, kernel: PathBuf, args: &[&str]) -> Self {
        let serial: &[_] = if args.contains(&"--serial") { &[] } else { &["--serial", "stdio"] };
        let mut child = Command::new(env!("CARGO_BIN_EXE_nacre-vmm"))
            .arg("--kernel")
            .arg(kernel)
            .args(serial)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (sender, serial) = mpsc::channel();
        thread::spawn(move || {
            let mut byte = [0];
            while stdout.read_exact(&mut byte).is_ok() && sender.send(byte[0]).is_ok() {}
        });
        Self { child, serial, printed: Vec::new(), _folder: folder }
    }

    /// Waits until the guest has printed `text` once more.
    fn expect(&mut self, text: &str) {
        let end = Instant::now() + DEADLINE;
        while !self.printed.ends_with(text.as_bytes()) {
            let left = end.saturating_duration_since(Instant::now());
            let byte = self.serial.recv_timeout(left).expect("the guest prints in time");
            self.printed.push(byte);
        }
        self.printed.clear();
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn end(mut self) -> End {
        let end = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                self.child.kill().unwrap();
                panic!("the VMM does not end");
            }
            thread::sleep(Duration::from_millis(5));
        };
        let mut log = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        assert_eq!(status.signal(), None, "killed: {log}");
        let code = u8::try_from(status.code().unwrap()).unwrap();
        self.printed.extend(self.serial.iter());
        End { exit: VmmExit::from_code(code), printed: self.printed, log }
    }
}

#[test]
fn a_guest_prints_and_powers_off() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::new().print("hello, ").print("host").power_off();
    let end = Vmm::start(&guest, &[]).end();
    assert_eq!(end.exit, Some(VmmExit::PowerOff), "{}", end.log);
    assert_eq!(end.printed, b"hello, host");
    assert_eq!(end.log, "");
}

#[test]
fn a_guest_on_four_vcpus_with_memory_beyond_4_gib_ends_as_cleanly() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::new().print("x").power_off();
    let end = Vmm::start(&guest, &["--cpus", "4", "--memory", "6G"]).end();
    assert_eq!(end.exit, Some(VmmExit::PowerOff), "{}", end.log);
    assert_eq!(end.printed, b"x");
}

#[test]
fn a_string_instruction_reaches_one_port_with_every_byte() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::new().print_own_code(5).power_off();
    let end = Vmm::start(&guest, &[]).end();
    assert_eq!(end.printed, [0x66, 0xba, 0xf8, 0x03, 0xbe]);
}

#[test]
fn the_clock_answers_at_once_and_absent_ports_read_as_ones() {
    if !has_kvm() {
        return;
    }
    let guest = Guest::new()
        .print_cmos(0x0a)
        .print_cmos(0x32)
        .print_port(0x64)
        .print_port(0x2f9)
        .power_off();
    let end = Vmm::start(&guest, &[]).end();
    assert_eq!(end.printed, [0x26, 0x20, 0xff, 0xff]);
}

#[test]
fn a_reset_boots_again_in_the_same_process() {
    if !has_kvm() {
        return;
    }
    let mut vmm = Vmm::start(&Guest::new().print("boot;").out(0x602, 1).spin(), &[]);
    for _ in 0..5 {
        vmm.expect("boot;");
    }
    vmm.signal(rustix::process::Signal::TERM);
    assert_eq!(vmm.end().exit, Some(VmmExit::Stopped));
}

#[test]
fn a_reset_can_end_the_process_instead() {
    if !has_kvm() {
        return;
    }
    for (port, value) in [(0x602, 1), (0x64, 0xfe)] {
        let guest = Guest::new().out(port, value).spin();
        let end = Vmm::start(&guest, &["--on-reset", "exit"]).end();
        assert_eq!(end.exit, Some(VmmExit::Reset), "{}", end.log);
    }
}

#[test]
fn a_panic_told_by_the_guest_has_its_own_exit_code() {
    if !has_kvm() {
        return;
    }
    let end = Vmm::start(&Guest::new().out(0x505, 1).spin(), &[]).end();
    assert_eq!(end.exit, Some(VmmExit::GuestPanic), "{}", end.log);
}

#[test]
fn a_triple_fault_is_a_crash_whose_registers_are_logged() {
    if !has_kvm() {
        return;
    }
    // ud2 without an interrupt table
    let end = Vmm::start(&Guest::new().code(&[0x0f, 0x0b]), &[]).end();
    assert_eq!(end.exit, Some(VmmExit::GuestCrash), "{}", end.log);
    assert!(end.log.contains("rip=0x100000"), "{}", end.log);
}

#[test]
fn a_spinning_guest_is_stopped_by_each_termination_signal() {
    if !has_kvm() {
        return;
    }
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut vmm = Vmm::start(&Guest::new().print("up").spin(), &["--cpus", "2"]);
        vmm.expect("up");
        vmm.signal(signal);
        let end = vmm.end();
        assert_eq!(end.exit, Some(VmmExit::Stopped), "{}", end.log);
    }
}

#[test]
fn what_can_not_work_is_refused_with_its_own_exit_code_and_one_line() {
    if !has_kvm() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("empty"), "").unwrap();
    fs::write(path("text"), "no kernel at all").unwrap();
    fs::write(path("cut"), &fs::read("/proc/self/exe").unwrap()[..1000]).unwrap();
    Guest::new().power_off().write(&path("fine"));
    for (kernel, args, exit, says) in [
        ("absent", &[][..], VmmExit::BootFile, "absent"),
        ("empty", &[], VmmExit::BootFile, "empty"),
        ("text", &[], VmmExit::BootFile, "neither an ELF image nor a bzImage"),
        ("cut", &[], VmmExit::BootFile, "cut"),
        ("", &[], VmmExit::BootFile, "no regular file"),
        ("fine", &["--initramfs", "/nowhere/at-all"], VmmExit::BootFile, "/nowhere/at-all"),
        ("fine", &["--memory", "0"], VmmExit::Memory, "--memory is 0"),
        ("fine", &["--memory", "3M"], VmmExit::Memory, "2 MiB"),
        ("fine", &["--memory", "4T"], VmmExit::Memory, "--memory"),
        ("fine", &["--cpus", "5000"], VmmExit::Cpus, "5000 vCPUs"),
        ("fine", &["--max-cpus", "5000"], VmmExit::Cpus, "5000 vCPUs"),
        ("fine", &["--cpus", "3", "--max-cpus", "2"], VmmExit::Usage, "--max-cpus 2"),
        ("fine", &["--cpus", "0"], VmmExit::Usage, "--cpus"),
        ("fine", &["--serial", "telnet"], VmmExit::Usage, "telnet"),
        ("fine", &["--control-fd", "99"], VmmExit::Failed, "control socket"),
        ("fine", &["--vhost-user", "id=disk,fd=99,type=blk"], VmmExit::Backend, "disk"),
        (
            "fine",
            &["--vhost-user", "id=d,socket=/nowhere/s,type=blk"],
            VmmExit::Backend,
            "/nowhere/s",
        ),
    ] {
        let end = Vmm::start_kernel(tempfile::tempdir().unwrap(), path(kernel), args).end();
        assert_eq!(end.exit, Some(exit), "{kernel} {args:?}: {}", end.log);
        assert!(end.log.contains(says), "{kernel} {args:?}: {}", end.log);
        if exit != VmmExit::Usage {
            assert_eq!(end.log.lines().count(), 1, "{kernel} {args:?}: {}", end.log);
        }
    }
}

#[test]
fn the_supervisor_asks_presses_the_button_and_is_told_what_it_may_not_ask() {
    if !has_kvm() {
        return;
    }
    let (supervisor, theirs, number) = Supervisor::new();
    let events = u32::try_from(layout::EVENT_REGISTERS.start).unwrap();
    let guest = Guest::new().print("up").print_when_set(events).power_off();
    let mut vmm = Vmm::start(&guest, &["--memory", "64M", "--cpus", "2", "--control-fd", &number]);
    drop(theirs);
    vmm.expect("up");
    let Outcome::Status(status) = supervisor.ask(1, Ask::Status) else { panic!("no status") };
    assert_eq!((status.state, status.cpus, status.memory_bytes), (State::Running, 2, 64 << 20));
    assert!(status.exits.pio_writes >= 2);
    assert!(status.timing.started_ns < status.timing.first_run_ns);
    supervisor.send(br#"{"id":2,"command":"dance"}"#);
    let Reply { id: 0, outcome: Outcome::Refused(_) } = supervisor.reply() else {
        panic!("not refused")
    };
    supervisor.send(&vec![b' '; vmm::MAX_BYTES + 1]);
    assert!(matches!(supervisor.reply().outcome, Outcome::Refused(_)));
    assert_eq!(supervisor.ask(3, Ask::PowerButton), Outcome::Done);
    let end = vmm.end();
    assert_eq!(end.exit, Some(VmmExit::PowerOff), "{}", end.log);
    assert_eq!(end.printed, [8]);
}

#[test]
fn a_vm_ends_at_the_supervisors_word_and_with_the_supervisor() {
    if !has_kvm() {
        return;
    }
    for says_so in [true, false] {
        let (supervisor, theirs, number) = Supervisor::new();
        let mut vmm = Vmm::start(&Guest::new().print("up").spin(), &["--control-fd", &number]);
        drop(theirs);
        vmm.expect("up");
        if says_so {
            assert_eq!(supervisor.ask(9, Ask::Stop), Outcome::Done);
        }
        drop(supervisor);
        let end = vmm.end();
        assert_eq!(end.exit, Some(VmmExit::Stopped), "{}", end.log);
    }
}

#[test]
fn a_vcpu_that_waits_for_a_reader_of_the_serial_port_is_stopped_too() {
    if !has_kvm() {
        return;
    }
    let (supervisor, theirs, number) = Supervisor::new();
    let (reader, writer) = io::pipe().unwrap();
    fcntl_setfd(&writer, FdFlags::empty()).unwrap();
    let serial = format!("fd={}", writer.as_raw_fd());
    // l: mov al, 'x'; mov dx, 0x3f8; out dx, al; jmp l
    let guest = Guest::new().code(&[0xb0, b'x', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf7]);
    let args = ["--cpus", "2", "--serial", &serial, "--control-fd", &number];
    let vmm = Vmm::start(&guest, &args);
    drop((theirs, writer));
    let full = rustix::io::ioctl_fionread;
    let end = Instant::now() + DEADLINE;
    while full(&reader).unwrap() < 60_000 {
        assert!(Instant::now() < end, "the guest fills the pipe");
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(supervisor.ask(1, Ask::Stop), Outcome::Done);
    let end = vmm.end();
    assert_eq!(end.exit, Some(VmmExit::Stopped), "{}", end.log);
}
