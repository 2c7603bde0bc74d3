//! What the sandbox service is told of a pod: the CRI's `PodSandboxConfig`, of which a few fields are
//! read by their numbers. Unknown ones are passed over, as protobuf wants it.
//!
//! Field numbers are those of the CRI API v1 (`api.proto`).

use std::collections::BTreeMap;

use protobuf::CodedInputStream;

use super::guest::{Dns, SandboxSettings};

/// One field of a message: its number, and its value if that is bytes.
struct Field<'a> {
    number: u32,
    bytes: &'a [u8],
}

impl Field<'_> {
    fn text(&self) -> protobuf::Result<String> {
        let mut input = CodedInputStream::from_bytes(self.bytes);
        let len_bytes = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        let text = input.read_raw_bytes(len_bytes)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn each(
    message: &[u8],
    mut take: impl FnMut(&Field<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<()> {
    let mut input = CodedInputStream::from_bytes(message);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let number = tag >> 3;
        let mut bytes = Vec::new();
        match tag & 7 {
            0 => drop(input.read_uint64()?),
            1 => input.skip_raw_bytes(8)?,
            2 => bytes = input.read_bytes()?,
            5 => input.skip_raw_bytes(4)?,
            // Groups, which the CRI has none of: what follows can't be told.
            _ => return Ok(()),
        }
        take(&Field { number, bytes: &bytes })?;
    }
    Ok(())
}

/// Puts what `config` says into `settings`.
///
/// # Errors
///
/// Fails if it is no message.
pub(super) fn read(config: &[u8], settings: &mut SandboxSettings) -> protobuf::Result<()> {
    each(config, |field| {
        match field.number {
            2 => settings.hostname = field.text()?,
            4 => settings.dns = dns(field.bytes)?,
            7 => {
                let (key, value) = pair(field.bytes)?;
                settings.annotations.insert(key, value);
            }
            8 => linux(field.bytes, settings)?,
            _ => {}
        }
        Ok(())
    })
}

fn dns(message: &[u8]) -> protobuf::Result<Dns> {
    let mut dns = Dns::default();
    each(message, |field| {
        match field.number {
            1 => dns.servers.push(field.text()?),
            2 => dns.searches.push(field.text()?),
            3 => dns.options.push(field.text()?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(dns)
}

fn pair(message: &[u8]) -> protobuf::Result<(String, String)> {
    let mut pair = (String::new(), String::new());
    each(message, |field| {
        match field.number {
            1 => pair.0 = field.text()?,
            2 => pair.1 = field.text()?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(pair)
}

fn linux(message: &[u8], settings: &mut SandboxSettings) -> protobuf::Result<()> {
    let mut sysctls = BTreeMap::new();
    each(message, |field| {
        match field.number {
            1 => settings.cgroup_parent = Some(field.text()?).filter(|path| !path.is_empty()),
            3 => {
                let (key, value) = pair(field.bytes)?;
                sysctls.insert(key, value);
            }
            _ => {}
        }
        Ok(())
    })?;
    settings.sysctls = sysctls;
    Ok(())
}

#[cfg(test)]
mod tests {
    use protobuf::CodedOutputStream;

    use super::*;

    fn message(write: impl FnOnce(&mut CodedOutputStream<'_>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut output = CodedOutputStream::vec(&mut bytes);
        write(&mut output);
        output.flush().unwrap();
        drop(output);
        bytes
    }

    #[test]
    fn a_pod_is_read_from_the_fields_that_matter() {
        let dns = message(|out| {
            out.write_string(1, "10.0.0.10").unwrap();
            out.write_string(2, "svc.local").unwrap();
        });
        let sysctl = message(|out| {
            out.write_string(1, "net.ipv4.ip_forward").unwrap();
            out.write_string(2, "1").unwrap();
        });
        let linux = message(|out| {
            out.write_string(1, "/kubepods/pod1").unwrap();
            out.write_bytes(3, &sysctl).unwrap();
            out.write_int64(98, 7).unwrap();
        });
        let config = message(|out| {
            out.write_string(2, "web").unwrap();
            out.write_bytes(4, &dns).unwrap();
            out.write_fixed64(99, 1).unwrap();
            out.write_bytes(8, &linux).unwrap();
        });
        let mut settings = SandboxSettings::default();
        read(&config, &mut settings).unwrap();
        assert_eq!(settings.hostname, "web");
        assert_eq!(settings.dns.servers, ["10.0.0.10"]);
        assert_eq!(settings.dns.searches, ["svc.local"]);
        assert_eq!(settings.cgroup_parent.as_deref(), Some("/kubepods/pod1"));
        assert_eq!(settings.sysctls["net.ipv4.ip_forward"], "1");
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let config = message(|out| out.write_string(2, "web").unwrap());
        assert!(read(&config[..2], &mut SandboxSettings::default()).is_err());
    }
}
