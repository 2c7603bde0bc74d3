//! A device of the host's for a sandbox that runs, and back.
//!
//! It has no process: container, group and device are opened here and handed to the VMM, which holds
//! them from then on. What was taken from a driver is written down before, and given back once the
//! VMM has the device no more.

use std::{collections::BTreeMap, os::fd::AsFd};

use nacre_proto::{
    agent::{FunctionUse, device_request::Purpose},
    pci::PciAddress,
    supervisor::Answer,
    vmm::{NewDevice, NewDeviceKind},
};
use tokio::sync::oneshot;
use vfio::{HostAddress, Opened};

use crate::{
    error_chain,
    passthrough::{self, Function, Host},
    plan::passthrough_id,
    sandbox::change::{Errand, Operator, VMM_WITHIN, Why, ending, words},
};

/// How many of them a sandbox may have.
const MOST: usize = 32;

impl Operator {
    pub(super) async fn add_function(
        &self,
        functions: &mut BTreeMap<String, Function>,
        (address, bind, ip): (&str, bool, Vec<String>),
    ) -> Answer {
        let (id, function) = match planned(functions, address, bind, ip) {
            Ok(planned) => planned,
            Err(why) => return Answer::Refused(why),
        };
        let address = match self.plug(&id, &function).await {
            Ok(address) => address,
            Err(why) => {
                self.give_back(function.address).await;
                return Answer::Refused(why);
            }
        };
        functions.insert(id.clone(), function.clone());
        let request = self.request(address, purpose(&function));
        let why = match self.agent.attach(&request).await {
            Ok(places) => {
                return Answer::Added { device: id, address: address.to_string(), places };
            }
            Err(error) => error_chain(&error),
        };
        match self.take_off(&id).await {
            Answer::Removed => {
                functions.remove(&id);
                self.give_back(function.address).await;
                Answer::Refused(why)
            }
            _ => Answer::Leaving(format!("{why}; and it is still there")),
        }
    }

    pub(super) async fn remove_function(
        &self,
        functions: &mut BTreeMap<String, Function>,
        id: &str,
    ) -> Answer {
        let Some(function) = functions.get(id).cloned() else {
            return Answer::Refused(format!("there is no device `{id}`"));
        };
        let address = match self.address_of(id).await {
            Ok(address) => address,
            Err(why) => return Answer::Refused(why),
        };
        let request = self.request(address, purpose(&function));
        let answer = self.withdraw(id, &request).await;
        if matches!(answer, Answer::Removed) {
            functions.remove(id);
            self.give_back(function.address).await;
        }
        answer
    }

    /// Opens the device and puts it on the guest's bus.
    async fn plug(&self, id: &str, function: &Function) -> Result<PciAddress, Why> {
        let (answer, answered) = oneshot::channel();
        self.errand(Errand::OpenDevice(function.clone(), answer)).await?;
        let opened = answered.await.map_err(|_gone| ending())?;
        let Opened { container, group, device } = opened.map_err(|error| error_chain(&error))?;
        let kind = NewDeviceKind::Vfio { address: function.address.to_string() };
        let new = NewDevice { id: id.to_owned(), kind };
        let beside = [container.as_fd(), group.as_fd(), device.as_fd()];
        let added = self.link.add_device(new, &beside, VMM_WITHIN).await;
        added.map_err(|error| words(&error))
    }

    async fn give_back(&self, address: HostAddress) {
        if let Err(why) = self.errand(Errand::GiveBack(address)).await {
            log::debug!("{why}");
        }
        self.settled().await;
    }
}

fn purpose(function: &Function) -> Purpose {
    Purpose::Function(FunctionUse { addresses: function.ip.clone(), ..FunctionUse::default() })
}

/// What the device will be, if the host can give it away.
fn planned(
    functions: &BTreeMap<String, Function>,
    address: &str,
    bind: bool,
    ip: Vec<String>,
) -> Result<(String, Function), Why> {
    let address = address.parse().map_err(|error| error_chain(&error))?;
    if functions.values().any(|function| function.address == address) {
        return Err(format!("the sandbox has the device {address} already"));
    }
    let mut ids = (0..MOST).map(passthrough_id);
    let id = ids.find(|id| !functions.contains_key(id));
    let id = id.ok_or_else(|| format!("a sandbox can have {MOST} devices of the host's"))?;
    let function = Function { address, bind, ip };
    let all: Vec<Function> = functions.values().chain([&function]).cloned().collect();
    passthrough::check(&Host::default(), &all).map_err(|error| error_chain(&error))?;
    Ok((id, function))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_sandbox_has_or_the_host_has_not_is_refused() {
        let function: Function = "vfio:ffff:ff:1f.7".parse().unwrap();
        let has = BTreeMap::from([(passthrough_id(0), function)]);
        let planned = |address: &str| planned(&has, address, false, Vec::new());
        let error = planned("ffff:ff:1f.7").unwrap_err();
        assert_eq!(error, "the sandbox has the device ffff:ff:1f.7 already");
        assert!(planned("ffff:ff:1f.6").is_err() && planned("nowhere").is_err());
    }
}
