//! The guest's name, its clock, the first seed of its random numbers, its name servers.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::fd::AsFd,
};

use nacre_proto::agent::ConfigureSandboxRequest;
use rustix::{
    io::Errno,
    system::sethostname,
    time::{ClockId, Timespec, clock_settime},
};

use crate::sys::{self, SEED_BYTES_MAX};

const RESOLV_CONF: &str = "/run/nacre/resolv.conf";
const SEED_BYTES_MIN: usize = 32;
const HOSTNAME_BYTES_MAX: usize = 64;
const NAMESERVERS_MAX: usize = 32;
const NS_PER_S: u64 = 1_000_000_000;

/// Why the identity could not be taken on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    /// A name that is none.
    #[error("{0:?} is no host name")]
    Hostname(String),
    /// A seed of the wrong size.
    #[error("a seed of {0} bytes: {SEED_BYTES_MIN} to {SEED_BYTES_MAX} are needed")]
    Seed(usize),
    /// A line that is none of resolv.conf.
    #[error("{0:?} is neither an address nor a line of resolv.conf")]
    Nameserver(String),
    /// Too many lines.
    #[error("{0} name servers: at most {NAMESERVERS_MAX} are allowed")]
    TooManyNameservers(usize),
    /// The kernel refuses the name.
    #[error("can't set the host name")]
    SetHostname(#[source] Errno),
    /// The kernel refuses the time.
    #[error("can't set the clock")]
    SetClock(#[source] Errno),
    /// The kernel refuses the seed.
    #[error("can't seed the random numbers")]
    SetSeed(#[source] io::Error),
    /// The file can't be written.
    #[error("can't write {RESOLV_CONF}")]
    Write(#[source] io::Error),
}

impl IdentityError {
    /// Whether it is the request that makes no sense.
    pub(crate) fn is_hosts(&self) -> bool {
        matches!(
            self,
            Self::Hostname(_) | Self::Seed(_) | Self::Nameserver(_) | Self::TooManyNameservers(_)
        )
    }
}

/// What the guest is told about itself.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Absent: left as it is.
    hostname: Option<String>,
    /// Absent: left as it is.
    realtime_ns: Option<u64>,
    /// Absent: none.
    seed: Option<Vec<u8>>,
    /// The text of resolv.conf.
    resolv_conf: String,
}

impl Identity {
    /// Checks what the host gave; what is empty or 0 is left as it is.
    pub(crate) fn parse(request: &ConfigureSandboxRequest) -> Result<Self, IdentityError> {
        let seed = Some(request.random_seed.clone()).filter(|seed| !seed.is_empty());
        let sizes = SEED_BYTES_MIN..=SEED_BYTES_MAX;
        if let Some(seed) = seed.as_ref().filter(|seed| !sizes.contains(&seed.len())) {
            return Err(IdentityError::Seed(seed.len()));
        }
        Ok(Self {
            hostname: hostname(&request.hostname)?,
            realtime_ns: Some(request.realtime_ns).filter(|ns| *ns != 0),
            seed,
            resolv_conf: resolv_conf(&request.nameservers)?,
        })
    }

    /// Takes it on.
    pub(crate) fn apply(&self) -> Result<(), IdentityError> {
        if let Some(hostname) = &self.hostname {
            sethostname(hostname.as_bytes()).map_err(IdentityError::SetHostname)?;
        }
        if let Some(realtime_ns) = self.realtime_ns {
            clock_settime(ClockId::Realtime, timespec(realtime_ns))
                .map_err(IdentityError::SetClock)?;
        }
        if let Some(seed) = &self.seed {
            let random = File::open("/dev/random").map_err(IdentityError::SetSeed)?;
            sys::add_entropy(random.as_fd(), seed).map_err(IdentityError::SetSeed)?;
        }
        fs::write(RESOLV_CONF, &self.resolv_conf).map_err(IdentityError::Write)
    }
}

fn timespec(ns: u64) -> Timespec {
    // Both are far below the largest i64.
    Timespec { tv_sec: (ns / NS_PER_S).cast_signed(), tv_nsec: (ns % NS_PER_S).cast_signed() }
}

fn hostname(name: &str) -> Result<Option<String>, IdentityError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if name.is_empty() {
        Ok(None)
    } else if name.len() <= HOSTNAME_BYTES_MAX && name.bytes().all(allowed) {
        Ok(Some(name.to_owned()))
    } else {
        Err(IdentityError::Hostname(name.to_owned()))
    }
}

fn resolv_conf(servers: &[String]) -> Result<String, IdentityError> {
    if servers.len() > NAMESERVERS_MAX {
        return Err(IdentityError::TooManyNameservers(servers.len()));
    }
    servers.iter().map(|server| resolv_line(server)).collect()
}

fn resolv_line(server: &str) -> Result<String, IdentityError> {
    if server.parse::<IpAddr>().is_ok() {
        return Ok(format!("nameserver {server}\n"));
    }
    let known = ["nameserver ", "search ", "domain ", "options ", "sortlist "];
    let is_line = known.iter().any(|word| server.starts_with(word));
    if is_line && server.len() < 1024 && !server.contains(char::is_control) {
        Ok(format!("{server}\n"))
    } else {
        Err(IdentityError::Nameserver(server.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_addresses_or_lines() {
        let lines = ["10.0.0.1", "nameserver ::1", "search a.b"].map(str::to_owned);
        let text = "nameserver 10.0.0.1\nnameserver ::1\nsearch a.b\n";
        assert_eq!(resolv_conf(&lines).unwrap(), text);
        for bad in ["ns.example", "nameserver 1\noptions x", ""] {
            assert!(resolv_conf(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_name_has_no_odd_characters() {
        assert_eq!(hostname("").unwrap(), None);
        assert_eq!(hostname("web-1.x").unwrap().unwrap(), "web-1.x");
        assert!(hostname("a b").is_err());
        assert!(hostname(&"x".repeat(65)).is_err());
    }

    #[test]
    fn a_short_seed_is_refused() {
        let request =
            ConfigureSandboxRequest { random_seed: vec![1; 31], ..ConfigureSandboxRequest::new() };
        assert!(matches!(Identity::parse(&request), Err(IdentityError::Seed(31))));
    }

    #[test]
    fn nanoseconds_become_a_time() {
        let time = timespec(1_700_000_000_123_456_789);
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_000, 123_456_789));
    }
}
