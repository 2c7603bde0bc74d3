//! Which command is legal when. No effects here: the control loop applies what this decides.
//!
//! ```text
//!                        the VM:  runs  waits in a reset  ends
//! Status, Stop                    yes   yes               yes
//! PowerButton                     yes   yes               no
//! Quiesce, Reconnect              yes   yes               no
//! RemoveDevice                    yes   yes               no
//! AddDevice                       yes   no                no
//! SetCpus                         yes   no                no    from 1 to what there can be, if it
//!                                                               can change
//! SetMemory                       yes   no                no    in steps, from boot RAM to what there
//!                                                               can be, while none is to go
//!
//!             state of the device:   Idle  Active  NeedsReset  Lost  Quiesced  Passthrough  none
//! Quiesce                             yes   yes     yes         no    no        no           no
//! Reconnect                           no    no      no          yes   yes       no           no
//! RemoveDevice                        yes   yes     yes         yes   yes       yes          no
//! RemoveDevice, leaving already       no    no      no          no    no        no           -
//! AddDevice of the same id            no    no      no          no    no        no           yes
//! ```
//!
//! A device that is leaving works until the guest has ejected it, so that its backend may be
//! quiesced and replaced as before. All commands need the number of descriptors that is theirs.
//!
//! More vCPUs while some have yet to go are refused later, by `acpi::cpu_hotplug`: one that is to go
//! can't be called back, as nobody knows how far the guest has come with it. Fewer, or the same
//! number again, tell the guest once more.
//!
//! While RAM is to go nobody knows how far the guest has come with it: it can't be called back, and
//! no other amount be asked for.

use nacre_proto::vmm::{Command, DeviceState, DeviceStatus, NewDevice, NewDeviceKind, State};

use crate::memory::hotplug::Plan;

/// What the control loop is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell how the VM is.
    Report,
    /// End the VM.
    Stop,
    /// Press the power button.
    PressPowerButton,
    /// Have so many vCPUs.
    SetCpus(u32),
    /// Have so much RAM.
    SetMemory(u64),
    /// Give the device of this index the backend whose socket came along.
    Reconnect(usize),
    /// Have the backend of the device of this index stop and hang up.
    Quiesce(usize),
    /// Put this device on a bus, with what came along.
    AddDevice(NewDevice),
    /// Ask the guest for the device of this index.
    RemoveDevice(usize),
}

/// Why a command is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The VM is coming to its end.
    #[error("the VM is ending")]
    Ending,
    /// The VM has no such device.
    #[error("there is no such device")]
    NoDevice,
    /// The device's backend is there.
    #[error("the device has a backend")]
    HasBackend,
    /// The device's backend is not there.
    #[error("the device has no backend")]
    HasNoBackend,
    /// The device is the host's.
    #[error("no process of ours serves the device")]
    NoProcess,
    /// The guest was asked for the device, and still has it.
    #[error("the guest was asked for the device already")]
    Leaving,
    /// Another device has the id.
    #[error("there is a device of this id")]
    IdTaken,
    /// A device needs a name.
    #[error("a device's id is from 1 to {MAX_ID_BYTES} bytes long")]
    Id,
    /// The PCI device id has six bits for it.
    #[error("{0} is no virtio device type from 1 to 63")]
    DeviceType(u16),
    /// The guest's reset is not done.
    #[error("the guest is being reset")]
    Resetting,
    /// No vCPU can be added or removed.
    #[error("the VM began with all the vCPUs that it can have, and keeps them")]
    CpusStay,
    /// A number of vCPUs that the VM can't have.
    #[error("{got} vCPUs are not between 1 and {max}")]
    Cpus {
        /// As asked.
        got: u32,
        /// The most.
        max: u32,
    },
    /// The guest was asked for RAM and has not answered.
    #[error("the guest has yet to give up memory that it was asked for")]
    MemoryLeaving,
    /// Less RAM or more than there can be.
    #[error("{got} bytes of memory are not between {min} and {max}")]
    Memory {
        /// As asked.
        got: u64,
        /// The least: what the VM began with.
        min: u64,
        /// The most.
        max: u64,
    },
    /// RAM that units don't make up.
    #[error("{got} bytes of memory are not {min} and a multiple of {step}")]
    MemoryStep {
        /// As asked.
        got: u64,
        /// What the VM began with.
        min: u64,
        /// What is added and removed at least.
        step: u64,
    },
    /// It can't be done yet.
    #[error("this VMM can't do that yet")]
    NotYet,
    /// Too many or too few descriptors.
    #[error("{got} descriptors came with a request that takes {wanted}")]
    Descriptors {
        /// How many came, as far as they were counted.
        got: usize,
        /// How many the request takes.
        wanted: usize,
    },
}

/// The longest id of a device that is added.
pub const MAX_ID_BYTES: usize = 128;

/// What a command is judged by.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// The VM's.
    pub state: State,
    /// A reset of the guest has begun and not ended.
    pub is_resetting: bool,
    /// All devices.
    pub devices: &'a [DeviceStatus],
    /// How many vCPUs there can be.
    pub max_cpus: u32,
    /// Whether vCPUs can be added and removed.
    pub can_change_cpus: bool,
    /// Which RAM there can be.
    pub memory: Plan,
    /// Whether some of it is to go.
    pub memory_is_leaving: bool,
}

/// What `command`, which came with so many `descriptors`, does to a VM in this `situation`.
///
/// # Errors
///
/// Fails if the command makes no sense in that situation.
pub fn decide(
    situation: &Situation<'_>,
    command: &Command,
    descriptors: usize,
) -> Result<Action, Refusal> {
    let wanted = descriptors_of(command);
    if descriptors != wanted {
        return Err(Refusal::Descriptors { got: descriptors, wanted });
    }
    let devices = situation.devices;
    match (situation.state, command) {
        (State::Running | State::Ending, Command::Status) => Ok(Action::Report),
        (State::Running | State::Ending, Command::Stop) => Ok(Action::Stop),
        (State::Ending, _) => Err(Refusal::Ending),
        (State::Running, Command::PowerButton) => Ok(Action::PressPowerButton),
        (State::Running, Command::Reconnect { device }) => reconnect(devices, device),
        (State::Running, Command::Quiesce { device }) => quiesce(devices, device),
        (State::Running, Command::AddDevice { device }) => add(situation, device),
        (State::Running, Command::RemoveDevice { device }) => match find(devices, device)? {
            index if devices[index].leaving => Err(Refusal::Leaving),
            index => Ok(Action::RemoveDevice(index)),
        },
        (State::Running, Command::SetCpus { cpus }) => set_cpus(situation, *cpus),
        (State::Running, Command::SetMemory { bytes }) => set_memory(situation, *bytes),
    }
}

fn reconnect(devices: &[DeviceStatus], id: &str) -> Result<Action, Refusal> {
    let index = find(devices, id)?;
    match devices[index].state {
        DeviceState::Lost | DeviceState::Quiesced => Ok(Action::Reconnect(index)),
        DeviceState::Idle | DeviceState::Active | DeviceState::NeedsReset => {
            Err(Refusal::HasBackend)
        }
        DeviceState::Passthrough => Err(Refusal::NoProcess),
    }
}

fn quiesce(devices: &[DeviceStatus], id: &str) -> Result<Action, Refusal> {
    let index = find(devices, id)?;
    match devices[index].state {
        DeviceState::Idle | DeviceState::Active | DeviceState::NeedsReset => {
            Ok(Action::Quiesce(index))
        }
        DeviceState::Lost | DeviceState::Quiesced => Err(Refusal::HasNoBackend),
        DeviceState::Passthrough => Err(Refusal::NoProcess),
    }
}

fn set_cpus(situation: &Situation<'_>, cpus: u32) -> Result<Action, Refusal> {
    let max = situation.max_cpus;
    if cpus == 0 || cpus > max {
        Err(Refusal::Cpus { got: cpus, max })
    } else if !situation.can_change_cpus {
        Err(Refusal::CpusStay)
    } else if situation.is_resetting {
        Err(Refusal::Resetting)
    } else {
        Ok(Action::SetCpus(cpus))
    }
}

fn add(situation: &Situation<'_>, new: &NewDevice) -> Result<Action, Refusal> {
    if new.id.is_empty() || new.id.len() > MAX_ID_BYTES {
        return Err(Refusal::Id);
    }
    if find(situation.devices, &new.id).is_ok() {
        return Err(Refusal::IdTaken);
    }
    if situation.is_resetting {
        return Err(Refusal::Resetting);
    }
    match &new.kind {
        NewDeviceKind::Virtio { device_type, .. } if !(1..=63).contains(device_type) => {
            Err(Refusal::DeviceType(*device_type))
        }
        NewDeviceKind::Virtio { .. } | NewDeviceKind::Vfio { .. } => {
            Ok(Action::AddDevice(new.clone()))
        }
    }
}

fn set_memory(situation: &Situation<'_>, bytes: u64) -> Result<Action, Refusal> {
    let plan = situation.memory;
    let (min, max, step) = (plan.boot_bytes(), plan.max_bytes(), plan.unit_bytes());
    if !(min..=max).contains(&bytes) {
        Err(Refusal::Memory { got: bytes, min, max })
    } else if !(bytes - min).is_multiple_of(step) {
        Err(Refusal::MemoryStep { got: bytes, min, step })
    } else if situation.is_resetting {
        Err(Refusal::Resetting)
    } else if situation.memory_is_leaving {
        Err(Refusal::MemoryLeaving)
    } else {
        Ok(Action::SetMemory(bytes))
    }
}

/// How many descriptors come with `command`.
fn descriptors_of(command: &Command) -> usize {
    match command {
        Command::Reconnect { .. } => 1,
        Command::AddDevice { device } => match device.kind {
            NewDeviceKind::Virtio { .. } => 1,
            NewDeviceKind::Vfio { .. } => 3,
        },
        Command::Status
        | Command::Stop
        | Command::PowerButton
        | Command::Quiesce { .. }
        | Command::SetCpus { .. }
        | Command::SetMemory { .. }
        | Command::RemoveDevice { .. } => 0,
    }
}

fn find(devices: &[DeviceStatus], id: &str) -> Result<usize, Refusal> {
    devices.iter().position(|device| device.id == id).ok_or(Refusal::NoDevice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::Ram;

    /// An odd size, in steps of which no amount is a multiple of the step.
    const MIN: u64 = 514 << 20;
    const STEP: u64 = 128 << 20;

    const STATES: [DeviceState; 6] = [
        DeviceState::Idle,
        DeviceState::Active,
        DeviceState::NeedsReset,
        DeviceState::Lost,
        DeviceState::Quiesced,
        DeviceState::Passthrough,
    ];

    /// One in each state, named by its index.
    fn devices() -> Vec<DeviceStatus> {
        let status = |(id, state): (usize, DeviceState)| DeviceStatus {
            id: id.to_string(),
            address: format!("0000:00:{:02x}.0", id + 1),
            state,
            leaving: false,
            reconnects: 0,
        };
        STATES.into_iter().enumerate().map(status).collect()
    }

    fn virtio(id: &str, device_type: u16) -> NewDevice {
        let kind =
            NewDeviceKind::Virtio { device_type, queues: None, queue_size: None, config: None };
        NewDevice { id: id.to_owned(), kind }
    }

    fn add(device: NewDevice) -> Command {
        Command::AddDevice { device }
    }

    fn of_device(id: &str) -> [(Command, usize); 3] {
        let device = || id.to_owned();
        [
            (Command::Quiesce { device: device() }, 0),
            (Command::Reconnect { device: device() }, 1),
            (Command::RemoveDevice { device: device() }, 0),
        ]
    }

    fn situation(state: State, devices: &[DeviceStatus]) -> Situation<'_> {
        let memory = Plan::new(&Ram::of(MIN), MIN + 2 * STEP, 40).unwrap();
        Situation {
            state,
            is_resetting: false,
            devices,
            max_cpus: 4,
            can_change_cpus: true,
            memory,
            memory_is_leaving: false,
        }
    }

    fn running(command: &Command, descriptors: usize) -> Result<Action, Refusal> {
        decide(&situation(State::Running, &devices()), command, descriptors)
    }

    #[test]
    fn the_whole_table_of_a_vm_is_as_written() {
        let new = || virtio("new", 2);
        let (resetting, is_ending) = (Err(Refusal::Resetting), Err(Refusal::Ending));
        let press = || Ok(Action::PressPowerButton);
        let set = || Command::SetMemory { bytes: MIN };
        for (command, wanted, expected) in [
            (Command::Status, 0, [Ok(Action::Report), Ok(Action::Report), Ok(Action::Report)]),
            (Command::Stop, 0, [Ok(Action::Stop), Ok(Action::Stop), Ok(Action::Stop)]),
            (Command::PowerButton, 0, [press(), press(), is_ending.clone()]),
            (add(new()), 1, [Ok(Action::AddDevice(new())), resetting.clone(), is_ending.clone()]),
            (
                Command::SetCpus { cpus: 1 },
                0,
                [Ok(Action::SetCpus(1)), resetting.clone(), is_ending.clone()],
            ),
            (set(), 0, [Ok(Action::SetMemory(MIN)), resetting, is_ending]),
        ] {
            let devices = devices();
            let mut all = [State::Running, State::Running, State::Ending]
                .map(|state| situation(state, &devices));
            all[1].is_resetting = true;
            for (situation, expected) in all.iter().zip(expected) {
                assert_eq!(decide(situation, &command, wanted), expected, "{command:?}");
                for got in (0..5).filter(|got| *got != wanted) {
                    let refused = decide(situation, &command, got);
                    assert_eq!(refused, Err(Refusal::Descriptors { got, wanted }));
                }
            }
        }
        for (command, descriptors) in ["0", "3"].iter().flat_map(|id| of_device(id)) {
            let devices = devices();
            let ending = situation(State::Ending, &devices);
            let mut resetting = situation(State::Running, &devices);
            resetting.is_resetting = true;
            assert_eq!(decide(&ending, &command, descriptors), Err(Refusal::Ending));
            let expected = running(&command, descriptors);
            assert_eq!(decide(&resetting, &command, descriptors), expected, "{command:?}");
        }
    }

    #[test]
    fn the_whole_table_of_a_device_is_as_written() {
        for (index, state) in STATES.into_iter().enumerate() {
            let [quiesced, reconnected, removed] =
                of_device(&index.to_string()).map(|(command, count)| running(&command, count));
            let (on_quiesce, on_reconnect) = match state {
                DeviceState::Idle | DeviceState::Active | DeviceState::NeedsReset => {
                    (Ok(Action::Quiesce(index)), Err(Refusal::HasBackend))
                }
                DeviceState::Lost | DeviceState::Quiesced => {
                    (Err(Refusal::HasNoBackend), Ok(Action::Reconnect(index)))
                }
                DeviceState::Passthrough => (Err(Refusal::NoProcess), Err(Refusal::NoProcess)),
            };
            assert_eq!(quiesced, on_quiesce, "{state:?}");
            assert_eq!(reconnected, on_reconnect, "{state:?}");
            assert_eq!(removed, Ok(Action::RemoveDevice(index)), "{state:?}");
            let again = running(&add(virtio(&index.to_string(), 2)), 1);
            assert_eq!(again, Err(Refusal::IdTaken), "{state:?}");
        }
        for (command, descriptors) in of_device("disk") {
            assert_eq!(running(&command, descriptors), Err(Refusal::NoDevice), "{command:?}");
        }
    }

    #[test]
    fn a_device_that_is_leaving_is_not_asked_for_again_and_is_served_as_before() {
        let mut devices = devices();
        for device in &mut devices {
            device.leaving = true;
        }
        for index in 0..STATES.len() {
            let [quiesce, reconnect, (remove, _none)] = of_device(&index.to_string());
            for (command, descriptors) in [quiesce, reconnect] {
                let leaving = decide(&situation(State::Running, &devices), &command, descriptors);
                assert_eq!(leaving, running(&command, descriptors), "{command:?}");
            }
            let refused = decide(&situation(State::Running, &devices), &remove, 0);
            assert_eq!(refused, Err(Refusal::Leaving));
        }
    }

    #[test]
    fn what_is_added_has_a_name_of_its_own_and_a_type_that_exists() {
        for id in [String::new(), "x".repeat(MAX_ID_BYTES + 1)] {
            assert_eq!(running(&add(virtio(&id, 2)), 1), Err(Refusal::Id));
        }
        let longest = virtio(&"x".repeat(MAX_ID_BYTES), 63);
        assert_eq!(running(&add(longest.clone()), 1), Ok(Action::AddDevice(longest)));
        for number in [0, 64, u16::MAX] {
            let refused = running(&add(virtio("new", number)), 1);
            assert_eq!(refused, Err(Refusal::DeviceType(number)));
        }
        let kind = NewDeviceKind::Vfio { address: "0000:01:00.0".to_owned() };
        let device = NewDevice { id: "gpu".to_owned(), kind };
        let vfio = add(device.clone());
        assert_eq!(running(&vfio, 3), Ok(Action::AddDevice(device)));
        assert_eq!(running(&vfio, 1), Err(Refusal::Descriptors { got: 1, wanted: 3 }));
    }

    #[test]
    fn the_whole_table_of_vcpus_is_as_written() {
        let ask = |change: fn(&mut Situation<'_>), cpus| {
            let mut situation = situation(State::Running, &[]);
            change(&mut situation);
            decide(&situation, &Command::SetCpus { cpus }, 0)
        };
        for cpus in [1, 4] {
            assert_eq!(ask(|_| {}, cpus), Ok(Action::SetCpus(cpus)));
            assert_eq!(ask(|s| s.is_resetting = true, cpus), Err(Refusal::Resetting));
            assert_eq!(ask(|s| s.can_change_cpus = false, cpus), Err(Refusal::CpusStay));
            assert_eq!(ask(|s| s.state = State::Ending, cpus), Err(Refusal::Ending));
        }
        for got in [0, 5, u32::MAX] {
            assert_eq!(ask(|_| {}, got), Err(Refusal::Cpus { got, max: 4 }));
        }
    }

    #[test]
    fn the_whole_table_of_memory_is_as_written() {
        let ask = |change: fn(&mut Situation<'_>), bytes| {
            let mut situation = situation(State::Running, &[]);
            change(&mut situation);
            decide(&situation, &Command::SetMemory { bytes }, 0)
        };
        let max = MIN + 2 * STEP;
        for bytes in [MIN, MIN + STEP, max] {
            assert_eq!(ask(|_| {}, bytes), Ok(Action::SetMemory(bytes)));
            assert_eq!(ask(|s| s.is_resetting = true, bytes), Err(Refusal::Resetting));
            assert_eq!(ask(|s| s.memory_is_leaving = true, bytes), Err(Refusal::MemoryLeaving));
            assert_eq!(ask(|s| s.state = State::Ending, bytes), Err(Refusal::Ending));
        }
        for got in [0, MIN - STEP, max + STEP, u64::MAX] {
            assert_eq!(ask(|_| {}, got), Err(Refusal::Memory { got, min: MIN, max }));
        }
        for got in [MIN + 1, MIN + STEP / 2, 5 * STEP] {
            assert_eq!(ask(|_| {}, got), Err(Refusal::MemoryStep { got, min: MIN, step: STEP }));
        }
    }
}
