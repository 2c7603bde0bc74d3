//! The real `nacre` program, as far as it gets without a guest: bad input, names, state, images,
//! and that nothing is left behind. Sandboxes that run are tested end to end elsewhere.
#![expect(clippy::unwrap_used, reason = "a test that can't go on says so by a panic")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output},
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A state folder, a kernel and an initramfs that nobody will boot, and a root file system.
struct Ground {
    folder: TempDir,
}

struct Told {
    code: i32,
    output: String,
    error: String,
}

impl From<Output> for Told {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap(),
            output: String::from_utf8(output.stdout).unwrap(),
            error: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ground {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("rootfs/etc")).unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        fs::write(folder.path().join("kernel"), "no kernel").unwrap();
        fs::write(folder.path().join("initramfs"), "no initramfs").unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacre"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env("NACRE_STATE", self.path("state"))
            .env("NACRE_CACHE", self.path("cache"))
            .env("NACRE_KERNEL", self.path("kernel"))
            .env("NACRE_INITRAMFS", self.path("initramfs"));
        command
    }

    fn nacre(&self, arguments: &[&str]) -> Told {
        self.command(arguments).output().unwrap().into()
    }

    /// Runs with an own folder of programs, then says what was told.
    fn run(&self, arguments: &[&str]) -> Told {
        let given =
            [&["run", "--rootfs", "rootfs", "--bin-dir", "bin"], arguments, &["--", "true"]];
        self.nacre(&given.concat())
    }

    /// A program that ends at once.
    fn ending_program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("state")).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Writes the record of a sandbox whose supervisor is a process that never was.
    fn record(&self, name: &str, phase: &Value) {
        let folder = self.path("state").join(name);
        fs::create_dir_all(&folder).unwrap();
        let record = json!({
            "version": 1, "name": name,
            "supervisor": {"name": "supervisor", "pid": i32::MAX, "start_time": 1},
            "phase": phase, "created_s": 1, "command": ["sleep", "1"], "env": [],
            "rootfs": "/", "cpus": 2, "memory_bytes": 536_870_912, "children": [],
            "network": null, "cgroup": null,
        });
        fs::write(folder.join("state.json"), record.to_string()).unwrap();
    }
}

// The exit codes of `nacre_proto::exit::RunExit`, as the README has them.
const USAGE: i32 = 105;
const NAME: i32 = 107;
const BOOT_FILE: i32 = 108;
const ROOT_FS: i32 = 109;
const VOLUME: i32 = 110;
const DISK: i32 = 111;
const MEMORY: i32 = 112;
const CPUS: i32 = 113;
const NETWORK: i32 = 115;
const PROGRAM: i32 = 117;
const BACKEND_START: i32 = 118;
const SETUP: i32 = 125;

/// One line, that begins with the program's name and holds `words`.
fn assert_one_line(told: &Told, code: i32, words: &[&str]) {
    assert_eq!(told.code, code, "{}", told.error);
    assert_eq!(told.error.lines().count(), 1, "{}", told.error);
    assert!(told.error.starts_with("nacre: "), "{}", told.error);
    for word in words {
        assert!(told.error.contains(word), "`{word}` is not in: {}", told.error);
    }
    assert_eq!(told.output, "");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let ground = Ground::new();
    let fails = |arguments: &[&str], code, words: &[&str]| {
        assert_one_line(&ground.run(arguments), code, words);
    };
    fails(&["--kernel", "none"], BOOT_FILE, &["kernel /", "none: No such file"]);
    fs::write(ground.path("empty"), "").unwrap();
    fails(&["--kernel", "empty"], BOOT_FILE, &["/empty: the file is empty"]);
    fails(&["--kernel", "rootfs"], BOOT_FILE, &["/rootfs: not a file"]);
    fails(&["--kernel", "/proc/self/mem"], BOOT_FILE, &["kernel /proc/self/mem: Input/output"]);
    fails(&["--initramfs", "none"], BOOT_FILE, &["initramfs /", "/none: No such file"]);
    fails(&["--disk", "none"], DISK, &["disk /", "none: No such file"]);
    fails(&["--disk", "empty"], DISK, &["disk /", "/empty: the file is empty"]);
    fails(&["--disk", "rootfs"], DISK, &["/rootfs: neither a file nor a block device"]);
    fails(&["--disk", "kernel"], DISK, &["/kernel: its size is no multiple of 512 bytes"]);
    fails(&["-v", "kernel:/k"], VOLUME, &["volume /", "kernel: not a folder"]);
    fails(&["-v", "none:/k"], VOLUME, &["volume /", "none: No such file"]);
    fails(&["-v", "rootfs"], USAGE, &["`rootfs` is no volume"]);
    for (rootfs, words) in [("none", "/none: No such file"), ("kernel", "/kernel: not a folder")] {
        let told = ground.nacre(&["run", "--rootfs", rootfs, "--", "true"]);
        assert_one_line(&told, ROOT_FS, &["root file system /", words]);
    }
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    let ground = Ground::new();
    assert_one_line(&ground.run(&["--memory", "0"]), MEMORY, &["--memory 0"]);
    let words = ["memory of 1T is more than the host's memory and swap"];
    assert_one_line(&ground.run(&["--memory", "1T"]), MEMORY, &words);
    // 2 to the 53rd: no x86 has more than 52 bits.
    let words = ["memory of 8192T is more than", "physical address bits can address"];
    assert_one_line(&ground.run(&["--memory", "8192T"]), MEMORY, &words);
    assert_one_line(&ground.run(&["--cpus", "0"]), CPUS, &["at least one CPU"]);
    assert_eq!(ground.run(&["--memory", "many"]).code, USAGE);
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn unknown_users_and_missing_commands_are_refused() {
    let ground = Ground::new();
    assert_one_line(&ground.run(&["--user", "web"]), USAGE, &["user `web` is not in"]);
    fs::write(ground.path("rootfs/etc/passwd"), "web:x:1:1::/:/bin/sh\n").unwrap();
    // With the user known it gets further: to the first program that is not there.
    assert_one_line(&ground.run(&["--user", "web"]), PROGRAM, &["no such program"]);
    let told = ground.nacre(&["run", "--rootfs", "rootfs"]);
    assert_one_line(&told, USAGE, &["no command"]);
}

#[test]
fn a_backend_that_is_missing_or_ends_at_once_is_told_and_leaves_nothing() {
    let ground = Ground::new();
    assert_one_line(&ground.run(&[]), PROGRAM, &["nacre-vsock of `vsock`: no such program: /"]);
    assert_eq!(ground.names(), [""; 0]);
    ground.ending_program("nacre-vsock", "sleep 1000");
    ground.ending_program("nacre-fs", "echo the folder bites >&2; exit 3");
    let words = ["nacre-fs of `rootfs` ended with code 3", "the folder bites"];
    assert_one_line(&ground.run(&[]), BACKEND_START, &words);
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn a_host_that_gives_no_network_is_told() {
    let ground = Ground::new();
    let mut command =
        ground.command(&["run", "--rootfs", "rootfs", "--bin-dir", "bin", "--net", "--", "true"]);
    // No interface can be made, or at the latest no program be found that gives it an address.
    let told = command.env("PATH", "/nowhere").output().unwrap().into();
    assert_one_line(&told, NETWORK, &["network: "]);
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn a_daemon_that_fails_tells_the_program_that_was_typed() {
    let ground = Ground::new();
    let told = ground.run(&["--detach", "--name", "web"]);
    assert_one_line(&told, PROGRAM, &["nacre-vsock of `vsock`: no such program: /"]);
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn an_early_step_that_fails_leaves_nothing() {
    let ground = Ground::new();
    for step in ["claim", "network", "cgroup", "backends-spawned"] {
        for program in ["nacre-vsock", "nacre-fs"] {
            ground.ending_program(program, "sleep 1000");
        }
        let mut command =
            ground.command(&["run", "--rootfs", "rootfs", "--bin-dir", "bin", "--", "true"]);
        let told = command.env("NACRE_FAIL_AT", step).output().unwrap().into();
        assert_one_line(&told, SETUP, &[&format!("step `{step}` fails")]);
        assert_eq!(ground.names(), [""; 0], "{step}");
    }
}

#[test]
fn a_name_is_checked_and_can_be_used_once() {
    let ground = Ground::new();
    assert_eq!(ground.run(&["--name", "../web"]).code, USAGE);
    ground.record("web", &json!({"exited": {"code": 4}}));
    assert_one_line(&ground.run(&["--name", "web"]), NAME, &["`web` is in use", "nacre rm"]);
    assert_eq!(ground.nacre(&["rm", "web"]).code, 0);
    assert_one_line(&ground.run(&["--name", "web"]), PROGRAM, &["no such program"]);
}

#[test]
fn what_a_dead_supervisor_left_is_listed_and_removed() {
    let ground = Ground::new();
    ground.record("lost", &json!("running"));
    ground.record("done", &json!({"exited": {"code": 4}}));
    let table = ground.nacre(&["ps"]).output;
    let status = |name: &str| {
        let line = table.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!((status("lost").as_str(), status("done").as_str()), ("dead", "exited"));
    let list: Value = serde_json::from_str(&ground.nacre(&["ps", "--json"]).output).unwrap();
    assert_eq!((&list[0]["name"], &list[0]["exit_code"]), (&json!("done"), &json!(4)));
    assert_eq!(ground.nacre(&["rm", "lost", "done"]).code, 0);
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn a_dead_sandboxs_name_is_free_for_the_next_one() {
    let ground = Ground::new();
    ground.record("lost", &json!("running"));
    let told = ground.run(&["--name", "lost"]);
    assert_eq!(told.code, PROGRAM, "{}", told.error);
    assert!(told.error.contains("clears away what a dead supervisor left"), "{}", told.error);
    assert_eq!(ground.names(), [""; 0]);
}

#[test]
fn sandboxes_that_are_not_there_or_do_not_run_are_told_apart() {
    let ground = Ground::new();
    for command in [&["exec", "web", "ls"][..], &["logs", "web"], &["stop", "web"], &["rm", "web"]]
    {
        assert_one_line(&ground.nacre(command), NAME, &["there is no sandbox `web`"]);
    }
    ground.record("web", &json!({"exited": {"code": 4}}));
    assert_one_line(&ground.nacre(&["exec", "web", "ls"]), NAME, &["has ended with code 4"]);
    assert_eq!(ground.nacre(&["stop", "web"]).code, 0);
}

#[test]
fn a_state_of_another_version_is_left_alone() {
    let ground = Ground::new();
    ground.record("web", &json!("running"));
    fs::write(ground.path("state/web/state.json"), r#"{"version": 9}"#).unwrap();
    assert_one_line(&ground.nacre(&["rm", "web"]), SETUP, &["has version 9"]);
    assert_eq!(ground.run(&["--name", "web"]).code, SETUP);
    assert_eq!(ground.names(), ["web"]);
}

#[test]
fn a_log_is_told_apart_into_its_streams() {
    let ground = Ground::new();
    ground.record("web", &json!({"exited": {"code": 0}}));
    assert_one_line(&ground.nacre(&["logs", "web"]), SETUP, &["keeps no log"]);
    let mut log = Vec::new();
    for (stream, bytes) in [(1u8, &b"out\n"[..]), (2, b"err\n"), (1, b"more\n")] {
        log.extend([stream, 0, 0, 0]);
        log.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        log.extend(7u64.to_le_bytes());
        log.extend(bytes);
    }
    fs::write(ground.path("state/web/output.log"), log).unwrap();
    for arguments in [&["logs", "web"][..], &["logs", "-f", "web"]] {
        let told = ground.nacre(arguments);
        assert_eq!((told.code, told.output.as_str()), (0, "out\nmore\n"));
        assert_eq!(told.error, "err\n");
    }
}

#[test]
fn an_image_that_is_none_is_refused_and_leaves_nothing() {
    let ground = Ground::new();
    let run = |image: &str| ground.nacre(&["run", "--image", image, "--", "true"]);
    assert_one_line(&run("none"), ROOT_FS, &["image /", "can't be read"]);
    assert_one_line(&run("rootfs"), ROOT_FS, &["is no OCI layout"]);
    assert_one_line(&run("kernel"), ROOT_FS, &["image /"]);
    assert_eq!(ground.names(), [""; 0]);
}
