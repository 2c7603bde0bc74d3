//! A supervisor's own control socket: one JSON document in one `SOCK_SEQPACKET` datagram, either
//! way, framed as the VMM's are ([`crate::vmm::encode`], [`crate::vmm::decode`]).
//!
//! Whoever connects sends one [`Request`], gets one [`Answer`], and is hung up on.

use serde::{Deserialize, Serialize};

/// From whoever connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What devices there are; answered by [`Answer::Devices`].
    ListDevices,
    /// Replace the device's process in order, without the guest noticing.
    ReplaceDevice {
        /// The device's id.
        device: String,
        /// The absolute path of another program than the one that it is started from; later
        /// processes are then started from it, too.
        program: Option<String>,
    },
    /// Give the guest more or fewer processors, more or less memory. What is not named stays.
    Resize {
        /// How many processors.
        cpus: Option<u32>,
        /// How much memory, all together.
        memory_bytes: Option<u64>,
    },
    /// Give the running sandbox another device.
    AddDevice(NewDevice),
    /// Take a device from the running sandbox.
    RemoveDevice {
        /// The device's id.
        device: String,
    },
}

/// A device that a sandbox is to be given. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NewDevice {
    /// A raw image or a block device.
    Disk {
        /// On the host.
        path: String,
        /// Whether it may only be read.
        read_only: bool,
    },
    /// A folder.
    Share {
        /// On the host.
        path: String,
        /// In the container.
        guest: String,
        /// Whether it may only be read.
        read_only: bool,
    },
    /// A network interface with an address of its own.
    Network,
    /// A device of the host's.
    Vfio {
        /// Its address on the host, such as `0000:01:00.0`.
        address: String,
        /// Whether it may be taken from the driver that it has now.
        bind: bool,
        /// What its interfaces get, in CIDR notation.
        ip: Vec<String>,
    },
}

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The devices, in the order of the VMM's.
    Devices(Vec<Device>),
    /// The device has another process.
    Replaced {
        /// How long the device had none, in milliseconds.
        unserved_ms: u64,
    },
    /// The guest has what was asked for, and uses it.
    Resized(Resources),
    /// The guest has, or uses, less than was asked for, or kept more.
    PartlyResized {
        /// What it has now.
        now: Resources,
        /// Why it is not as asked.
        why: String,
    },
    /// The container has the device.
    Added {
        /// The device's id.
        device: String,
        /// Where it is on the guest's PCI bus.
        address: String,
        /// What the container knows it by: paths, or names of interfaces.
        places: Vec<String>,
    },
    /// The device is gone, with its process and what the host had for it.
    Removed,
    /// The guest does not give the device up, and why; it is as it was.
    Kept(String),
    /// The device was to go and it is not known whether it will, and why.
    Leaving(String),
    /// Nothing was done, and why.
    Refused(String),
    /// The new program does not serve, and why; the old one does again.
    FellBack(String),
    /// The device has no process that serves, and why; the supervisor goes on trying.
    NotBack(String),
}

/// What a guest has of processors and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// Processors.
    pub cpus: u32,
    /// How many there can be.
    pub max_cpus: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// How much there can be.
    pub max_memory_bytes: u64,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// What kind of device it is: the VMM's word.
    pub kind: String,
    /// How it is.
    pub state: DeviceState,
    /// The id of its process, or of its last one.
    pub pid: i32,
    /// What its processes are started from.
    pub program: String,
    /// How many processes came after the first one and served.
    pub restarts: u64,
    /// Where it is on the guest's PCI bus, if the VMM tells.
    pub address: Option<String>,
    /// Whether the guest was asked to let go of it.
    pub leaving: bool,
}

/// How a device is, as its supervisor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceState {
    /// A process serves it.
    Serving,
    /// It has no process and will get one.
    Lost,
    /// A process is being started for it.
    Starting,
    /// What it stands for is gone, and a process fails its requests.
    Failing,
    /// A device of the host's, which no process serves.
    Passthrough,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;
    use crate::vmm::{decode, encode};

    #[test]
    fn requests_have_the_documented_bytes() {
        let device = || "disk-0".to_owned();
        let program = Some("/new".to_owned());
        for (request, text) in [
            (Request::ListDevices, &br#""list-devices""#[..]),
            (
                Request::ReplaceDevice { device: device(), program: None },
                br#"{"replace-device":{"device":"disk-0","program":null}}"#,
            ),
            (
                Request::ReplaceDevice { device: device(), program },
                br#"{"replace-device":{"device":"disk-0","program":"/new"}}"#,
            ),
            (
                Request::Resize { cpus: Some(2), memory_bytes: None },
                br#"{"resize":{"cpus":2,"memory_bytes":null}}"#,
            ),
            (
                Request::AddDevice(NewDevice::Disk { path: "/d".to_owned(), read_only: true }),
                br#"{"add-device":{"disk":{"path":"/d","read_only":true}}}"#,
            ),
            (Request::AddDevice(NewDevice::Network), br#"{"add-device":"network"}"#),
            (
                Request::RemoveDevice { device: device() },
                br#"{"remove-device":{"device":"disk-0"}}"#,
            ),
        ] {
            assert_eq!(encode(&request).unwrap(), text);
            assert_eq!(decode::<Request>(text).unwrap(), request);
        }
    }

    #[test]
    fn answers_have_the_documented_bytes() {
        let device = Device {
            id: "disk-0".to_owned(),
            kind: "blk".to_owned(),
            state: DeviceState::Serving,
            pid: 7,
            program: "/nacre-blk".to_owned(),
            restarts: 2,
            address: Some("0000:00:05.0".to_owned()),
            leaving: false,
        };
        let now = Resources { cpus: 2, max_cpus: 4, memory_bytes: 5, max_memory_bytes: 6 };
        let list = concat!(
            r#"{"devices":[{"id":"disk-0","kind":"blk","state":"serving","pid":7,"#,
            r#""program":"/nacre-blk","restarts":2,"#,
            r#""address":"0000:00:05.0","leaving":false}]}"#
        );
        let partly = concat!(
            r#"{"partly-resized":{"now":{"cpus":2,"max_cpus":4,"memory_bytes":5,"#,
            r#""max_memory_bytes":6},"why":"why"}}"#
        );
        let added = Answer::Added {
            device: "net".to_owned(),
            address: "0000:00:05.0".to_owned(),
            places: vec!["eth0".to_owned()],
        };
        let why = || "why".to_owned();
        for (answer, text) in [
            (Answer::Devices(vec![device]), list),
            (Answer::Replaced { unserved_ms: 12 }, r#"{"replaced":{"unserved_ms":12}}"#),
            (Answer::PartlyResized { now, why: why() }, partly),
            (added, r#"{"added":{"device":"net","address":"0000:00:05.0","places":["eth0"]}}"#),
            (Answer::Removed, r#""removed""#),
            (Answer::Kept(why()), r#"{"kept":"why"}"#),
            (Answer::Leaving(why()), r#"{"leaving":"why"}"#),
            (Answer::Refused(why()), r#"{"refused":"why"}"#),
            (Answer::FellBack(why()), r#"{"fell-back":"why"}"#),
            (Answer::NotBack(why()), r#"{"not-back":"why"}"#),
        ] {
            assert_eq!(encode(&answer).unwrap(), text.as_bytes());
            assert_eq!(decode::<Answer>(text.as_bytes()).unwrap(), answer);
        }
    }

    #[test]
    fn unknown_and_missing_things_are_refused() {
        for text in [
            r#""list""#,
            r#"{"replace-device":{"program":null}}"#,
            r#"{"replace-device":{"device":"a","program":null,"force":true}}"#,
            r#"{"replace-device":{"device":7,"program":null}}"#,
            r#""list-devices" "list-devices""#,
            "",
        ] {
            assert!(decode::<Request>(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_datagram_is_decoded_or_refused_without_panic(bytes: Vec<u8>) {
            decode::<Request>(&bytes).ok();
            decode::<Answer>(&bytes).ok();
        }

        #[test]
        fn any_request_comes_back_as_it_was(device: String, program: Option<String>) {
            let request = Request::ReplaceDevice { device, program };
            assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
        }
    }
}
