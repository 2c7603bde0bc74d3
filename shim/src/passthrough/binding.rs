//! Taking a device from the driver that it has, and giving it back.
//!
//! By `driver_override`, which names the one driver that may take the device: with it no other
//! device of the same kind is touched, and nothing races for the device while it has no driver.

use serde::{Deserialize, Serialize};
use vfio::{Group, HostAddress, group::DRIVER};

use crate::passthrough::{
    PassthroughError,
    host::{Host, write},
    in_use,
};

/// How the kernel says that no driver is named.
const NO_OVERRIDE: &str = "(null)";

/// What a device had before it was bound: enough to give it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Where it is.
    pub address: String,
    /// The driver that it had.
    pub driver: Option<String>,
    /// The only driver that was allowed to take it, if one was named.
    pub only: Option<String>,
}

/// Sees a device as bound, whatever it has, so that the others of its group can be judged.
pub(super) fn as_if_bound(group: &mut Group, address: HostAddress) {
    for member in group.members.iter_mut().filter(|member| member.address == address) {
        member.driver = Some(DRIVER.to_owned());
    }
}

/// What is to be written down before [`bind`]; none if the device is bound already.
///
/// # Errors
///
/// Fails if there is no such device, or the host works with it.
pub fn plan(host: &Host, address: HostAddress) -> Result<Option<Binding>, PassthroughError> {
    let driver = host.sysfs().driver(address)?;
    if driver.as_deref() == Some(DRIVER) {
        return Ok(None);
    }
    if let Some(how) = in_use::by_host(host, address) {
        return Err(PassthroughError::InUse { address, how });
    }
    let only = std::fs::read_to_string(host.device(address).join("driver_override"));
    let only = only.unwrap_or_default().trim().to_owned();
    let only = Some(only).filter(|only| !only.is_empty() && only != NO_OVERRIDE);
    Ok(Some(Binding { address: address.to_string(), driver, only }))
}

/// Takes the device from its driver.
///
/// # Errors
///
/// Fails if the kernel refuses. What was done by then is for [`give_back`] to undo.
pub fn bind(host: &Host, address: HostAddress) -> Result<(), PassthroughError> {
    host.load(DRIVER);
    if !host.driver(DRIVER).exists() {
        return Err(PassthroughError::NoDriver);
    }
    let device = host.device(address);
    write(&device.join("driver_override"), DRIVER)?;
    if device.join("driver").exists() {
        write(&device.join("driver/unbind"), &address.to_string())?;
    }
    write(&host.probe(), &address.to_string())?;
    match host.sysfs().driver(address)? {
        Some(driver) if driver == DRIVER => Ok(()),
        _ => Err(PassthroughError::NotTaken { address, driver: DRIVER.to_owned() }),
    }
}

/// Gives a device back. It waits for whoever still has it open. One that is gone, or that
/// somebody gave another driver meanwhile, is left alone.
///
/// # Errors
///
/// Fails if the kernel refuses, or the driver does not take it again.
pub fn give_back(host: &Host, binding: &Binding) -> Result<(), PassthroughError> {
    let Ok(address) = binding.address.parse::<HostAddress>() else { return Ok(()) };
    let device = host.device(address);
    if !device.exists() {
        return Ok(());
    }
    let driver = host.sysfs().driver(address)?;
    if driver.as_deref().is_some_and(|driver| driver != DRIVER) {
        return Ok(());
    }
    // An empty line names none.
    let only = format!("{}\n", binding.only.as_deref().unwrap_or_default());
    write(&device.join("driver_override"), &only)?;
    if driver.is_some() {
        write(&host.driver(DRIVER).join("unbind"), &address.to_string())?;
    }
    let Some(former) = &binding.driver else { return Ok(()) };
    write(&host.driver(former).join("bind"), &address.to_string())?;
    match host.sysfs().driver(address)? {
        Some(now) if now == *former => Ok(()),
        _ => Err(PassthroughError::NotTaken { address, driver: former.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::passthrough::host::tests::tree;

    fn address() -> HostAddress {
        "0000:01:00.0".parse().unwrap()
    }

    /// In a folder that only looks like sysfs nothing follows from what is written.
    fn written(path: std::path::PathBuf) -> String {
        fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn a_device_is_taken_by_name_and_its_driver_written_down_before() {
        let (_root, host) =
            tree(&[("0000:01:00.0", 7, Some("nvme")), ("0000:02:00.0", 8, Some(DRIVER))]);
        let binding = plan(&host, address()).unwrap().unwrap();
        let driver = Some("nvme".to_owned());
        assert_eq!(binding, Binding { address: "0000:01:00.0".to_owned(), driver, only: None });
        assert_eq!(plan(&host, "0000:02:00.0".parse().unwrap()).unwrap(), None);
        let error = bind(&host, address()).unwrap_err();
        assert!(matches!(error, PassthroughError::NotTaken { .. }), "{error}");
        assert_eq!(written(host.device(address()).join("driver_override")), DRIVER);
        assert_eq!(written(host.driver("nvme").join("unbind")), "0000:01:00.0");
        assert_eq!(written(host.probe()), "0000:01:00.0");
    }

    #[test]
    fn a_host_without_the_driver_is_told_so() {
        let (_root, host) = tree(&[("0000:01:00.0", 7, Some("nvme"))]);
        let error = bind(&host, address()).unwrap_err();
        assert!(matches!(error, PassthroughError::NoDriver), "{error}");
        assert_eq!(written(host.device(address()).join("driver_override")), "(null)\n");
    }

    #[test]
    fn a_device_goes_back_to_the_driver_that_it_had() {
        let (_root, host) = tree(&[("0000:01:00.0", 7, Some(DRIVER)), ("0000:02:00.0", 8, None)]);
        fs::create_dir_all(host.driver("nvme")).unwrap();
        let binding = Binding {
            address: "0000:01:00.0".to_owned(),
            driver: Some("nvme".to_owned()),
            only: None,
        };
        let error = give_back(&host, &binding).unwrap_err();
        assert!(matches!(error, PassthroughError::NotTaken { .. }), "{error}");
        assert_eq!(written(host.device(address()).join("driver_override")), "\n");
        assert_eq!(written(host.driver(DRIVER).join("unbind")), "0000:01:00.0");
        assert_eq!(written(host.driver("nvme").join("bind")), "0000:01:00.0");
    }

    #[test]
    fn a_device_that_is_gone_or_somebody_else_s_is_left_alone() {
        let (_root, host) = tree(&[("0000:01:00.0", 7, Some("e1000e"))]);
        let driver = Some("nvme".to_owned());
        for address in ["0000:01:00.0", "0000:09:00.0", "nonsense"] {
            let binding =
                Binding { address: address.to_owned(), driver: driver.clone(), only: None };
            give_back(&host, &binding).unwrap();
        }
        assert_eq!(written(host.device(address()).join("driver_override")), "(null)\n");
    }

    #[test]
    fn a_record_of_it_reads_back() {
        let binding = Binding {
            address: "0000:01:00.0".to_owned(),
            driver: None,
            only: Some("x".to_owned()),
        };
        let text = serde_json::to_string(&binding).unwrap();
        assert_eq!(serde_json::from_str::<Binding>(&text).unwrap(), binding);
    }
}
