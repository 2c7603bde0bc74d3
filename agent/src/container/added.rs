//! The `process` object of an added process: what is absent comes from the container's own.

use libcontainer::oci_spec::runtime::{LinuxCapabilities, Process};
use serde_json::{Map, Value};

use crate::container::{
    capabilities,
    spec::{SPEC_BYTES_MAX, SpecError, amend_process},
};

/// A process that fits its container.
#[derive(Clone, Debug)]
pub(crate) struct Added {
    /// For libcontainer.
    pub(crate) process: Process,
    /// What it is to have once its seccomp filter is installed, if that needs more.
    pub(crate) capabilities_after: Option<LinuxCapabilities>,
}

/// Reads the host's object over `base`, the container's own.
pub(crate) fn complete(
    json: &[u8],
    base: &Value,
    terminal: bool,
    filtered: bool,
) -> Result<Added, SpecError> {
    if json.len() > SPEC_BYTES_MAX {
        return Err(SpecError::TooLarge(json.len()));
    }
    let wanted: Map<String, Value> = serde_json::from_slice(json).map_err(SpecError::Parse)?;
    let given = |key: &str| wanted.get(key).is_some_and(|value| !value.is_null());
    if !given("args") {
        return Err(SpecError::Missing("process.args"));
    }
    let other_user = given("user") && !given("capabilities");
    let mut merged = base.clone();
    if let Some(merged) = merged.as_object_mut() {
        merged.extend(wanted.into_iter().filter(|(_, value)| !value.is_null()));
    }
    let mut process: Process = serde_json::from_value(merged).map_err(SpecError::Parse)?;
    if other_user && process.user().uid() != 0 {
        let ordinary = capabilities::of_ordinary_user(process.capabilities().as_ref());
        process.set_capabilities(Some(ordinary));
    }
    let capabilities_after = amend_process(&mut process, terminal, filtered)?;
    Ok(Added { process, capabilities_after })
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::Capability;
    use serde_json::json;

    use super::*;

    fn base() -> Value {
        json!({
            "args": ["init"], "cwd": "/srv", "env": ["A=1"], "user": { "uid": 0, "gid": 0 },
            "capabilities": { "effective": ["CAP_KILL"], "bounding": ["CAP_KILL"] },
            "noNewPrivileges": true
        })
    }

    fn added(json: &Value) -> Result<Process, SpecError> {
        complete(json.to_string().as_bytes(), &base(), true, false).map(|added| added.process)
    }

    #[test]
    fn what_is_absent_is_inherited() {
        let process = added(&json!({ "args": ["ls"], "cwd": null })).unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["ls"]);
        assert_eq!(process.cwd().to_string_lossy(), "/srv");
        assert_eq!(process.env().as_ref().unwrap(), &["A=1"]);
        assert_eq!(process.no_new_privileges(), Some(true));
        assert_eq!(process.terminal(), Some(true));
        let effective = process.capabilities().as_ref().unwrap().effective().clone().unwrap();
        assert!(effective.contains(&Capability::Kill));
    }

    #[test]
    fn another_user_gets_no_capabilities_of_root() {
        let user = json!({ "args": ["ls"], "user": { "uid": 7, "gid": 7 } });
        let capabilities = added(&user).unwrap().capabilities().clone().unwrap();
        assert!(capabilities.effective().as_ref().unwrap().is_empty());
        assert!(capabilities.bounding().as_ref().unwrap().contains(&Capability::Kill));
    }

    #[test]
    fn without_arguments_there_is_nothing_to_run() {
        assert!(matches!(added(&json!({})), Err(SpecError::Missing(_))));
        assert!(matches!(added(&json!({ "args": [] })), Err(SpecError::Missing(_))));
    }
}
