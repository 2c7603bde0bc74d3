//! `cargo xtask fuzz`: the property tests of what reads untrusted bytes, with new random inputs for as
//! long as asked.
//!
//! They run on stable Rust and know nothing of coverage: generators that know the format stand in
//! for it. What fails is shrunk, printed, and kept beside its source as `proptest-regressions`, from
//! where every later run of the tests tries it first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::programs::workspace;
use crate::report::result;
use crate::test::cargo;
use crate::tool::tail;

/// How many inputs the first run of a target tries.
const FIRST_CASES: u32 = 256;
const MOST_CASES: u32 = 1 << 22;
/// A run that takes less is followed by one of twice as many inputs.
const RUN: Duration = Duration::from_secs(1);

/// A target: its name, its package, and its test.
type Target = (&'static str, &'static str, &'static str);

const TARGETS: &[Target] = &[
    ("vmm-message", "nacre-proto", "vmm::tests::any_datagram_is_decoded_or_refused_without_panic"),
    (
        "store-message",
        "nacre-proto",
        "store::tests::any_datagram_is_decoded_to_what_encodes_it_or_refused",
    ),
    (
        "supervisor-message",
        "nacre-proto",
        "supervisor::tests::any_datagram_is_decoded_or_refused_without_panic",
    ),
    ("stream-hello", "nacre-proto", "stream::tests::any_bytes_decode_or_fail_without_panic"),
    (
        "blk-request",
        "backend-blk",
        "request::tests::whatever_is_asked_for_lies_within_the_disk_or_is_refused",
    ),
    (
        "net-header",
        "backend-net",
        "header::tests::whatever_passes_lies_in_its_frame_and_was_negotiated",
    ),
    (
        "net-control",
        "backend-net",
        "control::tests::any_bytes_ask_for_pairs_that_there_are_or_for_nothing",
    ),
    ("vsock-packet", "backend-vsock", "packet::tests::any_44_bytes_survive_decoding_and_encoding"),
    ("vsock-handshake", "backend-vsock", "handshake::tests::a_line_may_come_in_any_pieces"),
    (
        "vsock-connection",
        "backend-vsock",
        "connection::tests::no_order_of_events_brings_a_connection_back_or_makes_it_talk_out_of_turn",
    ),
    (
        "vsock-state",
        "backend-vsock",
        "connections::tests::whatever_stands_in_the_memory_is_taken_up_or_refused",
    ),
    (
        "virtio-registers",
        "core-vmm",
        "virtio::pci_registers::tests::no_sequence_of_writes_breaks_an_invariant",
    ),
    (
        "virtio-function",
        "core-vmm",
        "virtio::function::tests::no_guest_breaks_the_function_or_the_order_of_its_wiring",
    ),
    ("pci-bus", "core-vmm", "pci::tests::no_access_of_any_size_or_place_breaks_the_bus"),
    (
        "pci-config",
        "core-vmm",
        "pci::config_space::tests::writes_of_any_size_and_place_change_only_writable_bits",
    ),
    ("msix", "core-vmm", "pci::msix::tests::no_access_of_any_size_or_place_breaks_the_table"),
    ("layer-entries", "shim", "image::layer::tests::no_order_of_entries_reaches_outside"),
    (
        "layer-archive",
        "shim",
        "image::layer::tests::no_damage_to_an_archive_reaches_outside_or_panics",
    ),
    ("image", "shim", "image::tests::no_damage_to_an_image_makes_more_of_it_than_an_error"),
    (
        "image-accounts",
        "shim",
        "image::accounts::tests::any_files_and_user_give_an_account_or_an_error",
    ),
];

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub struct FuzzArguments {
    /// The targets; all if none is named, and a list of them if there is no such target
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each of them runs
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

/// What a target came to.
struct Outcome {
    cases: u64,
    /// What the test said, if it failed.
    failure: Option<String>,
}

impl FuzzArguments {
    /// Runs the targets; a line for each. The answer tells whether nothing was found.
    ///
    /// # Errors
    /// A target is unknown, does not build, or is no test any more.
    pub fn run(&self) -> Result<bool> {
        let mut clean = true;
        let chosen = self.chosen()?;
        let programs = build()?;
        for (name, package, test) in chosen {
            let program = programs.get(&package.replace('-', "_"));
            let program = program.with_context(|| format!("cargo built no tests of {package}"))?;
            let start = Instant::now();
            let outcome = run(program, test, Duration::from_secs(self.seconds))
                .with_context(|| format!("target {name}: {test}"))?;
            let (cases, seconds) = (outcome.cases, start.elapsed().as_secs_f64());
            match outcome.failure {
                None => result(&format!(
                    "fuzz {name}: {cases} inputs in {seconds:.1} s, nothing found"
                ))?,
                Some(said) => {
                    clean = false;
                    result(&format!("fuzz {name}: FAILED:\n{}", tail(&said)))?;
                }
            }
        }
        Ok(clean)
    }

    fn chosen(&self) -> Result<Vec<Target>> {
        if self.targets.is_empty() {
            return Ok(TARGETS.to_vec());
        }
        let find = |wanted: &String| {
            let found = TARGETS.iter().find(|(name, ..)| name == wanted);
            found.copied().with_context(|| {
                let names: Vec<_> = TARGETS.iter().map(|(name, ..)| *name).collect();
                format!("no target is called {wanted}; there are {}", names.join(", "))
            })
        };
        self.targets.iter().map(find).collect()
    }
}

/// A test program, and the folder of its package.
type Program = (PathBuf, PathBuf);

/// Builds the unit tests of all libraries, as the tests' first layer does; gives their programs by
/// the libraries' names.
fn build() -> Result<BTreeMap<String, Program>> {
    let mut command = cargo(workspace()?);
    command.args(["test", "--quiet", "--locked", "--workspace", "--lib", "--no-run"]);
    command.args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = command.output().context("cannot start cargo")?;
    ensure!(output.status.success(), "the tests do not build");
    let text = String::from_utf8(output.stdout)?;
    let built = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["profile"]["test"] == true)
        .filter_map(|message| {
            let program = PathBuf::from(message["executable"].as_str()?);
            let folder = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
            Some((message["target"]["name"].as_str()?.to_owned(), (program, folder)))
        });
    Ok(built.collect())
}

/// Runs the test again and again, each time with other inputs.
fn run((program, folder): &Program, test: &str, time: Duration) -> Result<Outcome> {
    let end = Instant::now() + time;
    let (mut next, mut cases) = (FIRST_CASES, 0);
    loop {
        let start = Instant::now();
        let mut command = Command::new(program);
        command.args(["--exact", test]).env("PROPTEST_CASES", next.to_string());
        let output = command.current_dir(folder).output().context("cannot start the tests")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            return Ok(Outcome { cases, failure: Some(said) });
        }
        if !said.contains(" 1 passed") {
            bail!("there is no such test any more");
        }
        cases += u64::from(next);
        if Instant::now() >= end {
            return Ok(Outcome { cases, failure: None });
        }
        if start.elapsed() < RUN {
            next = (next * 2).min(MOST_CASES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_target_is_a_test_that_the_sources_have() {
        for (name, package, test) in TARGETS {
            let folder = package.trim_start_matches("nacre-");
            let words: Vec<_> = test.rsplitn(3, "::").collect();
            let [function, _, module] = words[..] else { panic!("{name}: {test}") };
            let stem =
                workspace().unwrap().join(folder).join("src").join(module.replace("::", "/"));
            let last = stem.file_name().unwrap().to_string_lossy().into_owned();
            let files = [
                stem.with_extension("rs"),
                stem.join("mod.rs"),
                stem.join("tests.rs"),
                stem.with_file_name(format!("{last}_tests.rs")),
                stem.join(format!("{last}_tests.rs")),
            ];
            let has = |file: &PathBuf| {
                fs::read_to_string(file).is_ok_and(|text| text.contains(&format!("fn {function}(")))
            };
            assert!(files.iter().any(has), "{name}: no {test}");
        }
    }

    #[test]
    fn an_unknown_target_is_answered_with_those_there_are() {
        let arguments = FuzzArguments { targets: vec!["nothing".to_owned()], seconds: 1 };
        let told = format!("{:#}", arguments.chosen().unwrap_err());
        assert!(told.contains("nothing") && told.contains("vmm-message, store-message"), "{told}");
    }
}
