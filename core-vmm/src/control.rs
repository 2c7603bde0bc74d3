//! THE loop: one thread owns the VM, and everything that happens to the VM as a whole happens here.
//!
//! ```text
//! vCPU threads, devices --> mailbox -+
//! SIGTERM and the like --> signalfd -+--> epoll --> Control --> Vm
//! supervisor --> control socket -----+
//! serial input, devices' backends ---+
//! ```
//!
//! It ends with how the VM ended. It waits for its epoll set, for its vCPUs to leave the guest, and,
//! for a limited time, for a backend that is told something.
//!
//! A reset of the VM begins at once; it ends, and the guest runs again, when nobody can write to
//! the guest's memory any more: a backend that was lost has to have ended first, which the
//! supervisor says by giving the device another one.

use std::{
    error::Error,
    fs::File,
    io::{self, Read},
    os::fd::BorrowedFd,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use nacre_proto::{
    exit::VmmExit,
    vmm::{self, MessageError, NewDevice, Outcome, Reply, Request, State, Status, Timing, Told},
};

use crate::{
    acpi::{ged::Event, reminder::Reminder},
    command::{self, Action, Situation},
    config::OnReset,
    devices::DeviceKey,
    error_chain,
    event::GuestEvent,
    hotplug,
    poll::Poller,
    supervisor::{Datagram, Descriptors, Heard, Supervisor},
    timing,
    vcpu::exit,
    vm::{Vm, VmError},
};

const GUEST: u64 = 0;
const SIGNAL: u64 = 1;
const SUPERVISOR: u64 = 2;
const SERIAL_INPUT: u64 = 3;
const SERIAL_DRAINED: u64 = 4;
/// That of the device with the first key; the others follow.
const DEVICES: u64 = 16;

fn device_token(key: DeviceKey) -> u64 {
    DEVICES + key.0
}

/// Why the loop failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A descriptor can't be watched or waited for.
    #[error("the control loop can't watch its descriptors")]
    Poll(#[source] io::Error),
    /// The VM can't go on.
    #[error("the guest can't be reset")]
    Reset(#[from] VmError),
    /// The host failed a vCPU.
    #[error("vCPU {vcpu} failed: {reason}")]
    Vcpu {
        /// Which.
        vcpu: u32,
        /// Why.
        reason: String,
    },
}

/// The control thread's state.
pub struct Control {
    vm: Vm,
    poller: Poller,
    signals: File,
    supervisor: Option<Supervisor>,
    on_reset: OnReset,
    /// The vCPUs hold until every device is still.
    resetting: bool,
    timing: Timing,
    reminder: Reminder,
}

/// Whether the loop goes on.
type Step = Result<Option<VmmExit>, ControlError>;

impl Control {
    /// A loop that will own `vm`.
    ///
    /// # Errors
    ///
    /// Fails if a descriptor can't be watched.
    pub fn new(
        vm: Vm,
        signals: File,
        supervisor: Option<Supervisor>,
        on_reset: OnReset,
        started_ns: u64,
    ) -> Result<Self, ControlError> {
        let poller = Poller::new().map_err(ControlError::Poll)?;
        let timing = Timing { started_ns, first_run_ns: 0 };
        let (resetting, reminder) = (false, Reminder::default());
        let control =
            Self { vm, poller, signals, supervisor, on_reset, resetting, timing, reminder };
        control.watch().map_err(ControlError::Poll)?;
        Ok(control)
    }

    fn watch(&self) -> io::Result<()> {
        self.poller.add(self.vm.parts.mailbox.wake(), GUEST)?;
        self.poller.add(&self.signals, SIGNAL)?;
        if let Some(supervisor) = &self.supervisor {
            self.poller.add(supervisor, SUPERVISOR)?;
        }
        for (key, fd) in self.vm.device_fds() {
            self.poller.add(&fd, device_token(key))?;
        }
        let Some(console) = &self.vm.parts.console else { return Ok(()) };
        self.poller.add(console.port.drained(), SERIAL_DRAINED)?;
        match console.input.as_ref().map(|input| self.poller.add(input, SERIAL_INPUT)) {
            // A file or /dev/null can't be watched and is no console either.
            Some(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            Some(result) => result,
            None => Ok(()),
        }
    }

    /// Lets the guest run until something ends it.
    ///
    /// # Errors
    ///
    /// Fails if the host does.
    pub fn run(mut self) -> Result<VmmExit, ControlError> {
        self.timing.first_run_ns = timing::now_ns();
        self.vm.run();
        loop {
            let look_in = self.remind();
            for token in self.poller.wait(look_in).map_err(ControlError::Poll)? {
                let exit = self.handle(token)?;
                self.tell_events();
                if let Some(exit) = exit {
                    self.log_end(exit);
                    return Ok(exit);
                }
            }
        }
    }

    /// Tells the guest again what it has not looked at, when that is due; gives when to look next.
    fn remind(&mut self) -> Option<Duration> {
        let events = &self.vm.parts.events;
        let due = self.reminder.look(events.is_unread(), Instant::now());
        if due.again
            && let Err(error) = events.raise_again()
        {
            log::error!("can't tell the guest again: {error}");
        }
        due.look_in
    }

    fn handle(&mut self, token: u64) -> Step {
        match token {
            GUEST => self.take_guest_events(),
            SIGNAL => {
                log::info!("a signal ends the VM");
                Ok(Some(VmmExit::Stopped))
            }
            SUPERVISOR => self.take_request(),
            SERIAL_INPUT => self.take_serial_input().map_err(ControlError::Poll),
            SERIAL_DRAINED => self.want_serial_input().map_err(ControlError::Poll),
            device => {
                // One that went in the same batch is found no more.
                self.vm.process_device(DeviceKey(device.saturating_sub(DEVICES)));
                Ok(None)
            }
        }
    }

    fn take_guest_events(&mut self) -> Step {
        while let Some(event) = self.vm.parts.mailbox.take() {
            match event {
                GuestEvent::Cpus => self.vm.process_cpus(),
                GuestEvent::PowerOff => return Ok(Some(VmmExit::PowerOff)),
                GuestEvent::Panic => return Ok(Some(VmmExit::GuestPanic)),
                GuestEvent::Crash { .. } => return Ok(Some(VmmExit::GuestCrash)),
                GuestEvent::Failed { vcpu, reason } => {
                    return Err(ControlError::Vcpu { vcpu, reason });
                }
                GuestEvent::Memory => self.vm.process_memory(),
                // Whoever tells of devices looks for it.
                GuestEvent::PciHotplug => {}
                GuestEvent::Reset if self.on_reset == OnReset::Exit => {
                    return Ok(Some(VmmExit::Reset));
                }
                GuestEvent::Reset => {
                    log::info!("the guest resets");
                    self.vm.begin_reset()?;
                    self.resetting = true;
                    self.go_on_resetting()?;
                }
            }
        }
        Ok(None)
    }

    /// Lets a guest that was reset run once nobody writes to its memory.
    fn go_on_resetting(&mut self) -> Result<(), ControlError> {
        if !self.resetting {
            return Ok(());
        }
        if self.vm.is_still() {
            self.vm.finish_reset()?;
            self.resetting = false;
            self.vm.run();
        } else {
            log::warn!("the guest's reset waits for the end of a backend that was lost");
        }
        Ok(())
    }

    /// Answers one request; the supervisor's end being closed ends the VM.
    fn take_request(&mut self) -> Step {
        let heard = self.supervisor.as_ref().map_or(Ok(Heard::Nothing), Supervisor::hear);
        let (reply, exit) = match heard {
            Ok(Heard::Nothing) => return Ok(None),
            Ok(Heard::Gone) => {
                log::info!("the supervisor is gone");
                return Ok(Some(VmmExit::Stopped));
            }
            // One that was cut is longer than any message, and is refused for that.
            Ok(Heard::Datagram(datagram)) if datagram.len_bytes > datagram.bytes.len() => {
                refuse(&MessageError::TooLong(datagram.len_bytes))
            }
            Ok(Heard::Datagram(datagram)) => self.answer(datagram)?,
            Err(error) => {
                log::error!("can't hear the supervisor: {error}");
                return Ok(Some(VmmExit::Stopped));
            }
        };
        // What was lost over the request is known before what came of it.
        self.tell_events();
        self.tell(&Told::Reply(reply));
        Ok(exit)
    }

    fn answer(&mut self, datagram: Datagram) -> Result<(Reply, Option<VmmExit>), ControlError> {
        let request: Request = match vmm::decode(&datagram.bytes) {
            Ok(request) => request,
            Err(error) => return Ok(refuse(&error)),
        };
        self.vm.look_after_devices();
        // What the guest has done is known before what is decided upon it.
        self.tell_events();
        let devices: Vec<_> = self.vm.device_statuses().collect();
        let count = datagram.descriptors.count();
        let situation = Situation {
            state: State::Running,
            is_resetting: self.resetting,
            devices: &devices,
            max_cpus: self.vm.parts.cpus.possible(),
            can_change_cpus: self.vm.parts.cpus.can_change(),
            memory: *self.vm.parts.memory.plan(),
            memory_is_leaving: self.vm.parts.memory.is_leaving(),
        };
        let (outcome, exit) = match command::decide(&situation, &request.command, count) {
            Ok(action) => self.act(action, datagram.descriptors)?,
            Err(refusal) => (Outcome::Refused(refusal.to_string()), None),
        };
        Ok((Reply { id: request.id, outcome }, exit))
    }

    fn act(
        &mut self,
        action: Action,
        descriptors: Descriptors,
    ) -> Result<(Outcome, Option<VmmExit>), ControlError> {
        let outcome = match action {
            Action::Report => Outcome::Status(self.status()),
            Action::Stop => return Ok((Outcome::Done, Some(VmmExit::Stopped))),
            Action::PressPowerButton => outcome(self.vm.parts.events.raise(Event::PowerButton)),
            Action::SetCpus(cpus) => outcome(self.vm.set_cpus(cpus)),
            Action::SetMemory(bytes) => outcome(self.vm.set_memory(bytes)),
            Action::Quiesce(index) => outcome(self.vm.quiesce_device(index)),
            Action::AddDevice(new) => self.add_device(new, descriptors),
            Action::RemoveDevice(index) => {
                let asked = self.vm.remove_device(index);
                // It says that what served a lost device has ended.
                self.go_on_resetting()?;
                outcome(asked)
            }
            Action::Reconnect(index) => {
                let socket = descriptors.single().map(UnixStream::from);
                let socket = socket.expect("the count of descriptors was checked");
                let reconnected = self.vm.reconnect_device(index, socket);
                self.go_on_resetting()?;
                outcome(reconnected)
            }
        };
        Ok((outcome, None))
    }

    fn add_device(&mut self, new: NewDevice, descriptors: Descriptors) -> Outcome {
        let poller = &self.poller;
        let watch = |key, fd: BorrowedFd<'_>| poller.add(&fd, device_token(key));
        let parts = &mut self.vm.parts;
        let host = (&mut parts.devices, &parts.ram.memory);
        match hotplug::devices::add(host, new, descriptors, watch) {
            Ok(address) => {
                if let Err(error) = parts.events.raise(Event::Pci) {
                    log::error!("can't tell the guest of a device: {error}");
                }
                Outcome::Added { address: address.to_string() }
            }
            Err(error) => Outcome::Refused(error_chain(&error)),
        }
    }

    fn tell(&self, told: &Told) {
        if let Some(supervisor) = &self.supervisor {
            supervisor.tell(told);
        }
    }

    /// Tells which devices lost their backend, and what the guest gave up or would not.
    fn tell_events(&mut self) {
        let losses = self.vm.take_losses().into_iter();
        let losses = losses.map(|(device, reason)| vmm::Event::DeviceLost { device, reason });
        for event in losses.chain(self.vm.take_untold()) {
            self.tell(&Told::Event(event));
        }
    }

    fn status(&self) -> Status {
        let (cpus, memory) = (&self.vm.parts.cpus, &self.vm.parts.memory);
        Status {
            state: State::Running,
            cpus: cpus.present(),
            max_cpus: cpus.possible(),
            memory_bytes: memory.bytes(),
            max_memory_bytes: memory.plan().max_bytes(),
            resets: self.vm.resets(),
            timing: self.timing,
            exits: exit::sum(self.vm.vcpus().exit_counts()),
            kvm: self.vm.parts.statistics.read(),
            devices: self.vm.device_statuses().collect(),
        }
    }

    fn log_end(&self, exit: VmmExit) {
        let ran_ns = timing::now_ns().saturating_sub(self.timing.first_run_ns);
        log::info!(
            "{exit:?} {} ms after the first run, {:?}",
            ran_ns / 1_000_000,
            exit::sum(self.vm.vcpus().exit_counts())
        );
    }

    /// Moves input to the port as far as it has room; then waits until the guest took it.
    fn take_serial_input(&self) -> io::Result<Option<VmmExit>> {
        const MOST_BYTES: usize = 64;
        let Some(console) = &self.vm.parts.console else { return Ok(None) };
        let Some(mut input) = console.input.as_ref() else { return Ok(None) };
        let room = console.port.room().min(MOST_BYTES);
        if room == 0 {
            self.poller.set_enabled(input, SERIAL_INPUT, false)?;
            return Ok(None);
        }
        let mut buffer = [0; MOST_BYTES];
        match input.read(&mut buffer[..room]) {
            Ok(0) => self.poller.remove(input)?,
            Ok(count) => console.port.input(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                log::warn!("serial input ends: {error}");
                self.poller.remove(input)?;
            }
        }
        Ok(None)
    }

    fn want_serial_input(&self) -> io::Result<Option<VmmExit>> {
        if let Some(console) = &self.vm.parts.console {
            console.port.drained().read().ok();
            if let Some(input) = &console.input
                && let Err(error) = self.poller.set_enabled(input, SERIAL_INPUT, true)
            {
                // It ended before.
                log::debug!("no more serial input: {error}");
            }
        }
        Ok(None)
    }
}

fn outcome<E: Error>(result: Result<(), E>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Refused(error_chain(&error)),
    }
}

/// The answer to what is no request.
fn refuse(error: &MessageError) -> (Reply, Option<VmmExit>) {
    (Reply { id: 0, outcome: Outcome::Refused(error_chain(error)) }, None)
}
