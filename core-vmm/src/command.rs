//! Which command is legal when. No effects here: the control loop applies what this decides.
//!
//! ```text
//!             state of the device:   Idle  Active  NeedsReset  Lost  Quiesced  Passthrough
//! Quiesce                            yes   yes     yes         no    no        no
//! Reconnect                          no    no      no          yes   yes       no
//!
//!             the VM:  runs  waits in a reset  ends
//! Status, Stop         yes   yes               yes
//! PowerButton          yes   yes               no
//! Quiesce, Reconnect   yes   yes               no
//! SetCpus              yes   no                no    from 1 to what there can be, if it can change
//! ```
//!
//! More vCPUs while some have yet to go are refused later, by `acpi::cpu_hotplug`: one that is to go
//! can't be called back, as nobody knows how far the guest has come with it. Fewer, or the same
//! number again, tell the guest once more.

use nacre_proto::vmm::{Command, DeviceState, DeviceStatus, NewDeviceKind, State};

/// What the control loop is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell how the VM is.
    Report,
    /// End the VM.
    Stop,
    /// Press the power button.
    PressPowerButton,
    /// Have so many vCPUs.
    SetCpus(u32),
    /// Give the device of this index the backend whose socket came along.
    Reconnect(usize),
    /// Have the backend of the device of this index stop and hang up.
    Quiesce(usize),
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
}

/// What `command`, which came with so many `descriptors`, does to a VM in this `situation`.
///
/// # Errors
///
/// Fails if the command makes no sense in that state.
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
        (State::Running, Command::PowerButton) => Ok(Action::PressPowerButton),
        (State::Running, Command::Reconnect { device }) => match find(devices, device)? {
            (index, DeviceState::Lost | DeviceState::Quiesced) => Ok(Action::Reconnect(index)),
            (_, DeviceState::Idle | DeviceState::Active | DeviceState::NeedsReset) => {
                Err(Refusal::HasBackend)
            }
            (_, DeviceState::Passthrough) => Err(Refusal::NoProcess),
        },
        (State::Running, Command::Quiesce { device }) => match find(devices, device)? {
            (index, DeviceState::Idle | DeviceState::Active | DeviceState::NeedsReset) => {
                Ok(Action::Quiesce(index))
            }
            (_, DeviceState::Lost | DeviceState::Quiesced) => Err(Refusal::HasNoBackend),
            (_, DeviceState::Passthrough) => Err(Refusal::NoProcess),
        },
        (State::Running, Command::SetCpus { cpus }) => set_cpus(situation, *cpus),
        (
            State::Running,
            Command::SetMemory { .. } | Command::AddDevice { .. } | Command::RemoveDevice { .. },
        ) => Err(Refusal::NotYet),
        (State::Ending, _) => Err(Refusal::Ending),
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

fn find(devices: &[DeviceStatus], id: &str) -> Result<(usize, DeviceState), Refusal> {
    let index = devices.iter().position(|device| device.id == id).ok_or(Refusal::NoDevice)?;
    Ok((index, devices[index].state))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [DeviceState; 6] = [
        DeviceState::Idle,
        DeviceState::Active,
        DeviceState::NeedsReset,
        DeviceState::Lost,
        DeviceState::Quiesced,
        DeviceState::Passthrough,
    ];

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

    fn situation(state: State, devices: &[DeviceStatus]) -> Situation<'_> {
        Situation { state, is_resetting: false, devices, max_cpus: 4, can_change_cpus: true }
    }

    #[test]
    fn the_whole_table_of_a_vm_is_as_written() {
        for (state, command, expected) in [
            (State::Running, Command::Status, Ok(Action::Report)),
            (State::Running, Command::Stop, Ok(Action::Stop)),
            (State::Running, Command::PowerButton, Ok(Action::PressPowerButton)),
            (State::Ending, Command::Status, Ok(Action::Report)),
            (State::Ending, Command::Stop, Ok(Action::Stop)),
            (State::Ending, Command::PowerButton, Err(Refusal::Ending)),
            (State::Ending, Command::Quiesce { device: "0".to_owned() }, Err(Refusal::Ending)),
        ] {
            let devices = devices();
            let mut situation = situation(state, &devices);
            for is_resetting in [false, true] {
                situation.is_resetting = is_resetting;
                assert_eq!(decide(&situation, &command, 0), expected, "{state:?} {command:?}");
            }
            let got = Err(Refusal::Descriptors { got: 1, wanted: 0 });
            assert_eq!(decide(&situation, &command, 1), got);
        }
    }

    #[test]
    fn the_whole_table_of_a_device_is_as_written() {
        let decide = |command: &Command, descriptors| {
            decide(&situation(State::Running, &devices()), command, descriptors)
        };
        for (index, state) in STATES.into_iter().enumerate() {
            let absent = matches!(state, DeviceState::Lost | DeviceState::Quiesced);
            let device = || index.to_string();
            let quiesced = decide(&Command::Quiesce { device: device() }, 0);
            let reconnected = decide(&Command::Reconnect { device: device() }, 1);
            if state == DeviceState::Passthrough {
                assert_eq!(quiesced, Err(Refusal::NoProcess));
                assert_eq!(reconnected, Err(Refusal::NoProcess));
            } else if absent {
                assert_eq!(quiesced, Err(Refusal::HasNoBackend), "{state:?}");
                assert_eq!(reconnected, Ok(Action::Reconnect(index)), "{state:?}");
            } else {
                assert_eq!(quiesced, Ok(Action::Quiesce(index)), "{state:?}");
                assert_eq!(reconnected, Err(Refusal::HasBackend), "{state:?}");
            }
        }
        let unknown = || "disk".to_owned();
        assert_eq!(decide(&Command::Quiesce { device: unknown() }, 0), Err(Refusal::NoDevice));
        assert_eq!(decide(&Command::Reconnect { device: unknown() }, 1), Err(Refusal::NoDevice));
        for got in [0, 2] {
            let refused = decide(&Command::Reconnect { device: "3".to_owned() }, got);
            assert_eq!(refused, Err(Refusal::Descriptors { got, wanted: 1 }));
        }
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
}
