//! Which command is legal when. No effects here: the control loop applies what this decides.

use nacre_proto::vmm::{Command, State};

/// What the control loop is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell how the VM is.
    Report,
    /// End the VM.
    Stop,
    /// Press the power button.
    PressPowerButton,
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
}

/// What `command` does to a VM in `state`.
///
/// # Errors
///
/// Fails if the command makes no sense in that state.
pub fn decide(state: State, command: &Command) -> Result<Action, Refusal> {
    match (state, command) {
        (State::Running | State::Ending, Command::Status) => Ok(Action::Report),
        (State::Running | State::Ending, Command::Stop) => Ok(Action::Stop),
        (State::Running, Command::PowerButton) => Ok(Action::PressPowerButton),
        (State::Ending, Command::PowerButton) => Err(Refusal::Ending),
        (_, Command::Reconnect { .. } | Command::Quiesce { .. }) => Err(Refusal::NoDevice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_table_is_as_written() {
        for (state, command, expected) in [
            (State::Running, Command::Status, Ok(Action::Report)),
            (State::Running, Command::Stop, Ok(Action::Stop)),
            (State::Running, Command::PowerButton, Ok(Action::PressPowerButton)),
            (State::Ending, Command::Status, Ok(Action::Report)),
            (State::Ending, Command::Stop, Ok(Action::Stop)),
            (State::Ending, Command::PowerButton, Err(Refusal::Ending)),
        ] {
            assert_eq!(decide(state, &command), expected, "{state:?} {command:?}");
        }
    }
}
