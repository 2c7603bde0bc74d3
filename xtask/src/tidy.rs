//! `cargo xtask tidy`: what the compiler's lints cannot check. Every finding is printed, then it
//! fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::report::say;

/// Which crates of the workspace each crate may depend on.
const CRATE_GRAPH: &[(&str, &[&str])] = &[
    ("nacre-proto", &[]),
    ("backend-daemon", &["nacre-proto"]),
    ("core-vmm", &["nacre-proto", "vfio"]),
    ("vfio", &[]),
    ("backend-blk", &["backend-daemon", "nacre-proto"]),
    ("backend-net", &["backend-daemon", "nacre-proto"]),
    ("backend-fs", &["backend-daemon", "nacre-proto"]),
    ("backend-vsock", &["backend-daemon", "nacre-proto"]),
    ("shim", &["nacre-proto", "vfio"]),
    ("nacre-agent", &["nacre-proto"]),
    ("nacre-tests", &["nacre-proto", "shim", "vfio"]),
    ("xtask", &[]),
];

/// Licences that may be linked; an `OR` needs one of them, an `AND` all.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Packages that name no licence but carry its text, which was read.
const READ_LICENCES: &[(&str, &str)] = &[("rust-criu", "MIT")];

/// File names that say nothing.
const BANNED_NAMES: &[&str] = &["utils", "util", "common", "inner", "manager", "helper", "misc"];

/// The longest source file, in lines. Aim at 120.
const MAX_LINES: usize = 500;

/// Checks the tree at `root`.
///
/// # Errors
///
/// Fails with the number of findings, after having printed each.
pub fn run(root: &Path) -> Result<()> {
    let mut findings = Vec::new();
    let files = tracked_files(root)?;
    for file in files.iter().filter(|file| file.ends_with(".rs")) {
        let text = fs::read_to_string(root.join(file)).with_context(|| file.clone())?;
        findings
            .extend(check_source(file, &text).into_iter().map(|what| format!("{file}: {what}")));
    }
    findings.extend(check_metadata(&metadata(root)?)?);
    let map = fs::read_to_string(root.join("ARCHITECTURE.md")).context("ARCHITECTURE.md")?;
    findings.extend(check_map(root, &map));
    for finding in &findings {
        say(&format!("tidy: {finding}"));
    }
    ensure!(findings.is_empty(), "tidy found {}", findings.len());
    say(&format!("tidy: {} files, nothing found", files.len()));
    Ok(())
}

fn tracked_files(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git ls-files")?;
    ensure!(output.status.success(), "git ls-files failed");
    let listed = String::from_utf8(output.stdout)?;
    Ok(listed.lines().filter(|file| root.join(file).exists()).map(ToOwned::to_owned).collect())
}

fn check_source(file: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let name = Path::new(file).file_stem().unwrap_or_default().to_string_lossy();
    if BANNED_NAMES.contains(&name.as_ref()) {
        findings.push(format!("the name {name} says nothing"));
    }
    if !opens_with_documentation(text) {
        findings.push("does not open with //!".to_owned());
    }
    if !text.is_ascii() {
        let line = text.lines().position(|line| !line.is_ascii()).unwrap_or(0) + 1;
        findings.push(format!("line {line} is not ASCII"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        findings.push(format!("{lines} lines, more than {MAX_LINES}"));
    }
    let guest = file.starts_with("tests/bare-guest/");
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or(line);
        if name != "sys" && !guest && has_unsafe(code) {
            findings.push(format!("line {number}: unsafe outside sys.rs"));
        }
        if line.contains("TODO") && !line.contains("TODO(#") && name != "tidy" {
            findings.push(format!("line {number}: a TODO without an issue number"));
        }
    }
    findings
}

/// The first line, or the one after an inner attribute, is `//!`.
fn opens_with_documentation(text: &str) -> bool {
    let mut rest = text.trim_start();
    while rest.starts_with("#![") {
        let Some(end) = rest.find(")]").or_else(|| rest.find(']')) else { return false };
        rest = rest[end..].trim_start_matches([')', ']']).trim_start();
    }
    rest.starts_with("//!")
}

fn has_unsafe(code: &str) -> bool {
    ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "#[unsafe("]
        .iter()
        .any(|what| code.contains(what) && !code.contains('"'))
}

fn metadata(root: &Path) -> Result<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn check_metadata(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"].as_array().context("packages")?;
    let graph: BTreeMap<_, _> = CRATE_GRAPH.iter().copied().collect();
    let mut findings = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package's name")?;
        if package["source"].is_null() {
            findings.extend(check_dependencies(name, package, &graph));
            continue;
        }
        let read = READ_LICENCES.iter().find(|(package, _)| *package == name);
        let licence = package["license"].as_str().or_else(|| Some(read?.1));
        if !licence.is_some_and(allowed) {
            findings.push(format!("{name}: licence {} is not on the list", package["license"]));
        }
    }
    Ok(findings)
}

fn check_dependencies(name: &str, package: &Value, graph: &BTreeMap<&str, &[&str]>) -> Vec<String> {
    let Some(may) = graph.get(name) else {
        return vec![format!("{name} is not in the crate graph")];
    };
    let used: BTreeSet<_> = package["dependencies"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|dependency| dependency["kind"].is_null())
        .filter_map(|dependency| dependency["name"].as_str())
        .filter(|dependency| graph.contains_key(dependency))
        .collect();
    used.into_iter()
        .filter(|dependency| !may.contains(dependency))
        .map(|dependency| format!("{name} may not depend on {dependency}"))
        .collect()
}

/// Whether an SPDX expression can be met by the list. Parentheses do not nest in practice.
fn allowed(expression: &str) -> bool {
    let flat = expression.replace(['(', ')'], "").replace('/', " OR ");
    flat.split(" AND ").all(|all| all.split(" OR ").any(|one| LICENCES.contains(&one.trim())))
}

/// Every path in backticks that begins with a top-level folder exists.
fn check_map(root: &Path, map: &str) -> Vec<String> {
    map.split('`')
        .skip(1)
        .step_by(2)
        .filter(|quoted| {
            let top = quoted.split('/').next().unwrap_or("");
            quoted.contains('/')
                && !quoted.contains([' ', '*', '<'])
                && root.join(top).is_dir()
                && !top.is_empty()
        })
        .filter(|path| !root.join(path).exists())
        .map(|path| format!("ARCHITECTURE.md: {path} does not exist"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_file_opens_with_its_purpose() {
        assert!(check_source("a/src/b.rs", "//! Why.\n").is_empty());
        assert!(
            check_source("a/src/sys.rs", "#![expect(unsafe_code, reason = \"x\")]\n//! Why.\n")
                .is_empty()
        );
        assert_eq!(check_source("a/src/b.rs", "use std::io;\n").len(), 1);
        assert_eq!(check_source("a/src/utils.rs", "//! Why.\n").len(), 1);
    }

    #[test]
    fn unsafe_is_found_outside_sys_only() {
        let text = "//! Why.\nfn f() { unsafe { g() } }\n";
        assert_eq!(check_source("a/src/b.rs", text).len(), 1);
        assert!(check_source("a/src/sys.rs", text).is_empty());
    }

    #[test]
    fn a_licence_expression_needs_every_and_and_one_or() {
        assert!(allowed("MIT OR GPL-3.0"));
        assert!(allowed("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(!allowed("MIT AND GPL-3.0"));
        assert!(!allowed("LGPL-2.1"));
    }
}
