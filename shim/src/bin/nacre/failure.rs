//! An error on its way to the user: the exit code and one line, printed in one place.

use std::{
    error::Error,
    io::{self, Write},
};

use nacre_proto::exit::RunExit;
use shim::{
    error_chain,
    image::ImageError,
    passthrough::FunctionError,
    plan::{PlanError, inputs::InputError},
    registry::RegistryError,
    sandbox::{SandboxError, StopError},
};

use crate::{permission::NotPermitted, prepare::Malformed};

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    /// The error and what caused it, in one line.
    line: String,
    /// More lines that help.
    details: Option<String>,
}

impl Failure {
    /// A failure before anything ran.
    pub(crate) fn setup(what: &str, error: impl Error) -> Self {
        Self {
            code: RunExit::Setup.into(),
            line: format!("{what}: {}", error_chain(&error)),
            details: None,
        }
    }

    /// A failure that `error` says all about.
    pub(crate) fn of(error: &dyn Error) -> Self {
        Self { code: RunExit::Setup.into(), line: error_chain(error), details: None }
    }

    /// One that was reported by another process.
    pub(crate) fn told(code: u8, line: String) -> Self {
        Self { code, line, details: None }
    }

    /// Another code for the same failure.
    pub(crate) fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    /// All of it, as it is printed.
    pub(crate) fn text(&self) -> String {
        let details = self.details.as_ref().map(|text| format!("\n{text}")).unwrap_or_default();
        format!("{}{details}", self.line)
    }

    pub(crate) fn print(&self) {
        if writeln!(io::stderr(), "nacre: {}", self.text()).is_err() {
            log::debug!("standard error is closed");
        }
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: exit(&error).into(), line: error_chain(&error), details: None }
    }
}

/// The code of an error that knows what was wrong with the input; of any other, that of a set-up
/// that failed.
fn exit(error: &(dyn Error + 'static)) -> RunExit {
    if let Some(error) = error.downcast_ref::<InputError>() {
        error.exit()
    } else if let Some(error) = error.downcast_ref::<PlanError>() {
        error.exit()
    } else if let Some(error) = error.downcast_ref::<ImageError>() {
        error.exit()
    } else if let Some(error) = error.downcast_ref::<RegistryError>() {
        error.exit()
    } else if let Some(StopError::Registry(error)) = error.downcast_ref() {
        error.exit()
    } else if error.is::<Malformed>() || error.is::<FunctionError>() {
        RunExit::Usage
    } else if error.is::<NotPermitted>() {
        RunExit::NotPermitted
    } else {
        RunExit::Setup
    }
}

/// A failure of the sandbox itself, which knows its code.
pub(crate) fn of_sandbox(error: &SandboxError) -> Failure {
    let by_signal = error.signal().and_then(|signal| u8::try_from(128 + signal).ok());
    Failure {
        code: by_signal.unwrap_or(error.exit().into()),
        line: error_chain(error),
        details: error.details(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_one_line_with_each_cause_once() {
        let error = std::fs::read("/nonexistent/file").unwrap_err();
        let failure = Failure::setup("kernel /x", error);
        assert_eq!(failure.text(), "kernel /x: No such file or directory (os error 2)");
        assert_eq!(failure.code(), 125);
    }

    #[test]
    fn a_signal_before_the_start_gives_its_own_code() {
        assert_eq!(of_sandbox(&SandboxError::Interrupted(2)).code(), 130);
    }
}
