//! The command line of `nacre-fs`, checked.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use backend_daemon::process::DaemonArgs;
use clap::{Parser, ValueEnum};
use virtiofsd::passthrough::CachePolicy;

use crate::sandbox::SandboxMode;

/// The length of a tag in the configuration space, in bytes (virtio 1.3, section 5.11.4).
pub const TAG_BYTES: usize = 36;
/// The most request queues; a Linux guest takes one for each vCPU (since 6.12).
pub const MAX_REQUEST_QUEUES: u16 = 64;

/// A vhost-user file system device on a folder.
#[derive(Debug, Parser)]
#[command(name = "nacre-fs", version)]
pub struct Args {
    /// Share this folder with the guest
    #[arg(long, value_name = "DIR", required_unless_present = "print_capabilities")]
    pub shared_dir: Option<PathBuf>,
    /// The name by which the guest mounts the share, of 36 bytes at most
    #[arg(long, value_name = "TAG", required_unless_present = "print_capabilities")]
    pub tag: Option<Tag>,
    /// Refuse all writes
    #[arg(long)]
    pub read_only: bool,
    /// How many queues there are for requests
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_REQUEST_QUEUES)))]
    pub num_request_queues: u16,
    /// What the guest may keep of the share without asking again
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Cache::Auto)]
    pub cache: Cache,
    /// Let the guest use extended attributes
    #[arg(long)]
    pub xattr: bool,
    /// Tell the guest where another file system is mounted below the share
    #[arg(long)]
    pub announce_submounts: bool,
    /// How the process is kept inside the share
    #[arg(long, value_name = "MODE", value_enum, default_value_t = SandboxMode::Namespace)]
    pub sandbox: SandboxMode,
    /// What all backends share
    #[command(flatten)]
    pub daemon: DaemonArgs,
}

/// What the guest may keep of the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Names and attributes for a second, contents from open to close
    Auto,
    /// Nothing: the host may change anything at any time
    Never,
    /// Everything for a day: nobody but this guest changes the share
    Always,
}

impl Cache {
    /// How long names and attributes stay valid.
    #[must_use]
    pub fn timeout(self) -> Duration {
        match self {
            Self::Auto => Duration::from_secs(1),
            Self::Never => Duration::ZERO,
            Self::Always => Duration::from_secs(24 * 60 * 60),
        }
    }

    /// The same in virtiofsd's words.
    #[must_use]
    pub fn policy(self) -> CachePolicy {
        match self {
            Self::Auto => CachePolicy::Auto,
            Self::Never => CachePolicy::Never,
            Self::Always => CachePolicy::Always,
        }
    }
}

/// The name of a share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag(String);

/// Why a text is no tag.
#[derive(Debug, thiserror::Error)]
#[error("a tag has 1 to {TAG_BYTES} bytes without control characters, '{0}' has not")]
pub struct TagError(String);

impl Tag {
    /// As it stands in the configuration space: padded with zeros.
    #[must_use]
    pub fn bytes(&self) -> [u8; TAG_BYTES] {
        let mut bytes = [0; TAG_BYTES];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

impl FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=TAG_BYTES).contains(&text.len());
        if fits && !text.chars().any(char::is_control) {
            Ok(Self(text.to_owned()))
        } else {
            Err(TagError(text.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        let base = ["nacre-fs", "--socket-path", "/s", "--shared-dir", "/d", "--tag", "t"];
        Args::try_parse_from(base.iter().chain(words))
    }

    #[test]
    fn a_tag_fits_the_configuration_space_and_fills_it_with_zeros() {
        let tag: Tag = "root".parse().unwrap();
        assert_eq!(tag.bytes()[..5], *b"root\0");
        assert!("x".repeat(36).parse::<Tag>().is_ok());
        assert!("x".repeat(37).parse::<Tag>().is_err());
        assert!("".parse::<Tag>().is_err());
        assert!("a\nb".parse::<Tag>().is_err());
        assert!("\u{e9}".repeat(19).parse::<Tag>().is_err(), "38 bytes in 19 characters");
    }

    #[test]
    fn the_defaults_are_one_queue_a_sandbox_and_a_writable_share() {
        let args = parse(&[]).unwrap();
        assert_eq!((args.num_request_queues, args.read_only), (1, false));
        assert_eq!((args.cache, args.sandbox), (Cache::Auto, SandboxMode::Namespace));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(parse(&["--num-request-queues", "0"]).is_err());
        assert!(parse(&["--num-request-queues", "65"]).is_err());
        assert!(parse(&["--cache", "sometimes"]).is_err());
        assert!(Args::try_parse_from(["nacre-fs", "--socket-path", "/s", "--tag", "t"]).is_err());
        assert!(Args::try_parse_from(["nacre-fs", "--print-capabilities"]).is_ok());
    }
}
