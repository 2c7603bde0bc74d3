//! What the process can reach, and how it starts.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};

use crate::fuse::{Call, Guest, Op, ROOT, can_sandbox, serve};

const ENOENT: i32 = 2;

#[test]
fn no_name_and_no_symlink_leads_out_of_the_share() {
    if !can_sandbox() {
        return;
    }
    let outer = tempfile::tempdir().unwrap();
    let share = outer.path().join("share");
    fs::create_dir(&share).unwrap();
    let secret = outer.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::write(share.join("victim"), "harmless").unwrap();
    symlink(outer.path(), share.join("absolute")).unwrap();
    symlink("..", share.join("parent")).unwrap();
    let daemon = serve(&share, &[]);
    let mut guest = Guest::mount(&daemon, 2);

    let outside = [outer.path(), &secret].map(|path| fs::metadata(path).unwrap().ino());
    let names =
        ["..", "../secret", "./../secret", "../../etc/passwd", "absolute/secret", "parent/secret"];
    for name in names {
        let inode = guest.lookup(ROOT, name).map(|entry| entry.inode);
        assert!(!inode.is_ok_and(|inode| outside.contains(&inode)), "{name}");
        let mkdir = Call::new(Op::Mkdir, ROOT).word(0o755).word(0).name(name);
        let link = Call::new(Op::Symlink, ROOT).name(name).name("anywhere");
        // Where such a name leads to inside the share is no secret, only that it stays inside.
        whatever(guest.unlink(ROOT, name));
        whatever(guest.create(ROOT, name, 0));
        whatever(guest.unlink(ROOT, name));
        whatever(guest.call(&mkdir));
        whatever(guest.call(&link));
        whatever(guest.rename((ROOT, "victim"), (ROOT, name)));
    }
    for link in ["absolute", "parent"] {
        let entry = guest.lookup(ROOT, link).unwrap();
        assert!(entry.is_symlink());
        assert!(guest.open(entry.node, 0).is_err(), "{link}");
        assert!(guest.lookup(entry.node, "secret").is_err(), "{link}");
        assert!(guest.call(&Call::new(Op::Opendir, entry.node).word(0).word(0)).is_err(), "{link}");
    }
    // A link of the guest's own making leads nowhere either.
    let link = Call::new(Op::Symlink, ROOT).name("own").name(secret.to_str().unwrap());
    guest.call(&link).unwrap();
    let own = guest.lookup(ROOT, "own").unwrap();
    assert!(guest.open(own.node, 0).is_err());

    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    let listed = |path: &Path| {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(listed(outer.path()), ["secret", "share"]);
    // The whole file system of the process is the share.
    assert_eq!(listed(format!("/proc/{}/root", daemon.id()).as_ref()), listed(&share));
}

/// For requests whose own outcome does not matter, only what they leave behind.
fn whatever<T>(_outcome: Result<T, i32>) {}

#[test]
fn the_process_keeps_only_the_rights_to_files_and_its_threads_are_filtered() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let daemon = serve(share.path(), &[]);
    drop(Guest::mount(&daemon, 2));
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP
    let kept = [0, 1, 3, 4, 6, 7, 27, 31].iter().fold(0_u64, |all, bit| all | 1 << bit);
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let mut threads = 0;
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(field("CapPrm:"), format!("{kept:016x}"));
        assert_eq!(field("CapEff:"), format!("{kept:016x}"));
        assert_eq!(field("CapBnd:"), format!("{:016x}", 0));
        assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
        threads += 1;
    }
    assert!(threads >= 4, "main, protocol and a worker for each queue, not {threads}");
}

/// A mount that is undone at the end of a test.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn what_the_host_mounts_below_the_share_later_arrives() {
    if !can_sandbox() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    mount_bind(folder.path(), folder.path()).unwrap();
    let _share = Mounted(folder.path().to_owned());
    mount_change(folder.path(), MountPropagationFlags::SHARED).unwrap();
    let volume = folder.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let daemon = serve(folder.path(), &["--cache", "never"]);
    let mut guest = Guest::mount(&daemon, 2);
    let node = guest.lookup(ROOT, "volume").unwrap().node;
    assert_eq!(guest.lookup(node, "file"), Err(ENOENT));

    mount("tmpfs", &volume, "tmpfs", MountFlags::empty(), None).unwrap();
    let _volume = Mounted(volume.clone());
    fs::write(volume.join("file"), "x").unwrap();
    let node = guest.lookup(ROOT, "volume").unwrap().node;
    assert!(guest.lookup(node, "file").is_ok());
}

#[test]
fn the_other_sandboxes_serve_too() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    fs::write(share.path().join("file"), "x").unwrap();
    for (mode, root) in [("chroot", share.path()), ("none", Path::new("/"))] {
        let daemon = serve(share.path(), &["--sandbox", mode, "--cache", "always"]);
        let mut guest = Guest::mount(&daemon, 2);
        let node = guest.lookup(ROOT, "file").unwrap().node;
        let handle = guest.open(node, 0).unwrap();
        assert_eq!(guest.read(node, handle, 0, 10).unwrap(), b"x", "{mode}");
        assert_eq!(fs::read_link(format!("/proc/{}/root", daemon.id())).unwrap(), root, "{mode}");
    }
}

/// Runs the program until it ends by itself; gives its exit code and its standard error.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_can_not_be_shared_is_said_in_one_line_with_an_exit_code_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    let program = |shared: &str, tag: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nacre-fs"));
        command.arg("--socket-path").arg(folder.path().join("s")).args(["--log-level", "error"]);
        command.arg("--shared-dir").arg(folder.path().join(shared)).args(["--tag", tag]);
        command
    };
    for shared in ["missing", "file"] {
        let (code, said) = run(&mut program(shared, "t"));
        assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
        assert!(said.contains("cannot share") && said.contains(shared), "{said}");
    }
    let (code, said) = run(&mut program(".", &"x".repeat(37)));
    assert_eq!(code, Some(2), "{said}");
}

#[test]
fn without_the_right_to_a_sandbox_the_process_says_so_and_ends() {
    if !can_sandbox() {
        return;
    }
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    chown(folder.path(), Some(65_534), Some(65_534)).unwrap();
    let program = folder.path().join("nacre-fs");
    fs::copy(env!("CARGO_BIN_EXE_nacre-fs"), &program).unwrap();
    let mut command = Command::new(&program);
    command.uid(65_534).gid(65_534).args(["--tag", "t", "--log-level", "error", "--shared-dir"]);
    command.arg(folder.path()).arg("--socket-path").arg(folder.path().join("s"));
    let (code, said) = run(&mut command);
    assert_eq!((code, said.lines().count()), (Some(4), 1), "{said}");
    assert!(said.contains("run as root") && said.contains("--sandbox none"), "{said}");
    assert!(!folder.path().join("s").exists(), "the socket is left behind");
}
