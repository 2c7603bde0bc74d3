//! `nacre-fs` is killed, and the guest goes on with what it holds.

use std::fs;
use std::os::unix::fs::FileExt;

use backend_daemon::testing::Options;
use tempfile::TempDir;

use crate::fuse::{Call, Entry, Guest, Op, REQUESTS, ROOT, can_sandbox, long, word};
use crate::keeper::Keeper;

const EBADF: i32 = 9;
const EPROTO: i32 = 71;
const ESTALE: i32 = 116;

pub(crate) fn options() -> Options {
    Options { queues: 4, inflight: true, ..Options::default() }
}

/// A process that serves an empty share, and a guest that has mounted it; nothing where the host
/// does not let it be confined.
fn begin() -> Option<(TempDir, Keeper, Guest)> {
    can_sandbox().then(|| {
        let share = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::start(share.path(), &[]);
        let guest = Guest::mount_with(keeper.daemon(), &options());
        (share, keeper, guest)
    })
}

/// Kills the process, and has the guest's frontend find the next one.
fn restart(keeper: &mut Keeper, guest: &mut Guest) {
    keeper.restart();
    guest.driver.reconnect(&keeper.daemon().socket());
}

fn mkdir(guest: &mut Guest, parent: u64, name: &str) -> u64 {
    let mkdir = Call::new(Op::Mkdir, parent).word(0o755).word(0).name(name);
    Entry::parse(&guest.call(&mkdir).unwrap()).node
}

fn release(guest: &mut Guest, node: u64, handle: u64) {
    guest.call(&Call::new(Op::Release, node).long(handle).long(0).long(0)).unwrap();
}

fn forget(guest: &mut Guest, node: u64, count: u64) {
    let sent = guest.send(0, &Call::new(Op::Forget, node).long(count));
    guest.taken(sent);
}

#[test]
fn open_files_and_known_folders_go_on_through_kill_after_kill() {
    let Some((share, mut keeper, mut guest)) = begin() else { return };
    let outer = mkdir(&mut guest, ROOT, "outer");
    let inner = mkdir(&mut guest, outer, "inner");
    let (node, handle) = guest.create(inner, "file", 0).unwrap();
    guest.write(node, handle, 0, b"one").unwrap();
    for round in 0..4 {
        restart(&mut keeper, &mut guest);
        let expected = format!("one{}", "+".repeat(round));
        assert_eq!(guest.read(node, handle, 0, 100).unwrap(), expected.as_bytes());
        assert_eq!(guest.write(node, handle, expected.len() as u64, b"+"), Ok(1));
        // The same file has the same node, whichever way it is found.
        assert_eq!(guest.lookup(inner, "file").unwrap().node, node);
        assert_eq!(guest.lookup(outer, "inner").unwrap().node, inner);
        // The names change while the files are open, and some are found under the new ones only.
        let folder = format!("outer-{round}");
        let before = if round == 0 { "outer".to_owned() } else { format!("outer-{}", round - 1) };
        guest.rename((ROOT, &before), (ROOT, &folder)).unwrap();
        guest.rename((inner, "file"), (inner, "moved")).unwrap();
        restart(&mut keeper, &mut guest);
        assert_eq!(guest.attributes(node).unwrap().size, expected.len() as u64 + 1);
        guest.rename((inner, "moved"), (inner, "file")).unwrap();
    }
    assert_eq!(fs::read(share.path().join("outer-3/inner/file")).unwrap(), b"one++++");
    release(&mut guest, node, handle);
    assert!(guest.read(node, handle, 0, 1).is_err());
    restart(&mut keeper, &mut guest);
    assert!(guest.read(node, handle, 0, 1).is_err(), "what was closed stays closed");
    assert_eq!(keeper.held(), [0_u64; 0]);
}

#[test]
fn a_file_without_a_name_lives_as_long_as_it_is_open() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let (node, handle) = guest.create(ROOT, "removed", 0).unwrap();
    let (covered, covered_handle) = guest.create(ROOT, "covered", 0).unwrap();
    guest.create(ROOT, "cover", 0).unwrap();
    guest.write(node, handle, 0, b"still here").unwrap();
    guest.write(covered, covered_handle, 0, b"below").unwrap();
    guest.unlink(ROOT, "removed").unwrap();
    guest.rename((ROOT, "cover"), (ROOT, "covered")).unwrap();
    for _ in 0..3 {
        restart(&mut keeper, &mut guest);
        assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"still here");
        assert_eq!(guest.read(covered, covered_handle, 0, 100).unwrap(), b"below");
        assert_eq!(guest.write(node, handle, 10, b"!"), Ok(1));
        assert_eq!(guest.attributes(node).unwrap().size, 11);
        // FATTR_SIZE
        let mut setattr = Call::new(Op::Setattr, node).word(1 << 3).word(0).long(0).long(10);
        setattr.arguments.resize(88, 0);
        guest.call(&setattr).unwrap();
        assert_eq!(guest.attributes(node).unwrap().size, 10);
        let again = guest.open(node, 2).unwrap();
        assert_eq!(guest.read(node, again, 6, 100).unwrap(), b"here");
        release(&mut guest, node, again);
        assert_eq!(keeper.held().len(), 2);
    }
    release(&mut guest, node, handle);
    release(&mut guest, covered, covered_handle);
    forget(&mut guest, node, 1);
    forget(&mut guest, covered, 1);
    keeper.kill();
    assert_eq!(keeper.held(), [0_u64; 0], "the last user is gone");
    keeper.succeed();
    guest.driver.reconnect(&keeper.daemon().socket());
    assert!(guest.attributes(node).is_err());
}

#[test]
fn a_file_without_a_name_takes_every_request_that_an_open_file_takes() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    guest.write(node, handle, 0, &[7; 8192]).unwrap();
    let link = guest.call(&Call::new(Op::Symlink, ROOT).name("link").name("target")).unwrap();
    let link = Entry::parse(&link).node;
    guest.unlink(ROOT, "file").unwrap();
    guest.unlink(ROOT, "link").unwrap();
    let mknod = Call::new(Op::Mknod, ROOT).word(0o010_644).word(0).word(0).word(0).name("fifo");
    let fifo = Entry::parse(&guest.call(&mknod).unwrap()).node;
    guest.unlink(ROOT, "fifo").unwrap();
    restart(&mut keeper, &mut guest);
    for node in [link, fifo] {
        assert_eq!(guest.open(node, 0), Err(EBADF), "to open a fifo would wait");
    }

    // FATTR_MODE, UID, GID, ATIME, MTIME: mode, user and group are behind the times.
    let valid = 1 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5;
    let setattr = Call::new(Op::Setattr, node).word(valid).word(0).long(0).long(0).long(0);
    let setattr = setattr.long(1000).long(2000).long(0).word(5).word(6).word(0);
    let answer = guest.call(&setattr.word(0o640).word(0).word(12).word(34).word(0)).unwrap();
    let attributes = &answer[16..];
    assert_eq!((long(attributes, 24), long(attributes, 32)), (1000, 2000), "times");
    assert_eq!((word(attributes, 48), word(attributes, 52)), (5, 6), "their nanoseconds");
    assert_eq!(word(attributes, 60), 0o100_640);
    assert_eq!((word(attributes, 64), word(attributes, 68), word(attributes, 72)), (0, 12, 34));
    // A hole in the first page (FALLOC_FL_KEEP_SIZE, PUNCH_HOLE), and data behind it (SEEK_DATA).
    let punch = Call::new(Op::Fallocate, node).long(handle).long(0).long(4096).word(1 | 2).word(0);
    guest.call(&punch).unwrap();
    let seek = Call::new(Op::Lseek, node).long(handle).long(0).word(3).word(0);
    assert_eq!(long(&guest.call(&seek).unwrap(), 0), 4096);
    let read = guest.read(node, handle, 4095, 2).unwrap();
    assert_eq!(read, [0, 7]);
    for op in [Op::Fsync, Op::Flush] {
        guest.call(&Call::new(op, node).long(handle).long(0).long(0)).unwrap();
    }
    assert_eq!(guest.call(&Call::new(Op::Readlink, link)).unwrap(), b"target");
    assert!(keeper.daemon().is_running());
    assert!(guest.call(&Call::new(Op::Link, ROOT).long(node).name("again")).is_err());
}

#[test]
fn a_file_that_loses_one_of_its_names_is_found_by_the_other() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let (node, handle) = guest.create(ROOT, "temporary", 0).unwrap();
    let link = Call::new(Op::Link, ROOT).long(node).name("final");
    assert_eq!(Entry::parse(&guest.call(&link).unwrap()).node, node);
    guest.unlink(ROOT, "temporary").unwrap();
    assert_eq!(keeper.held(), [0_u64; 0], "the name that is left will do");
    guest.write(node, handle, 0, b"data").unwrap();
    restart(&mut keeper, &mut guest);
    assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"data");
    // Now the guest loses the one name that it is known by here, and looks up the other one.
    let link = Call::new(Op::Link, ROOT).long(node).name("last");
    guest.call(&link).unwrap();
    guest.unlink(ROOT, "last").unwrap();
    restart(&mut keeper, &mut guest);
    assert_eq!(keeper.held(), [node]);
    assert_eq!(guest.lookup(ROOT, "final").unwrap().node, node);
    keeper.kill();
    assert_eq!(keeper.held(), [0_u64; 0]);
    keeper.succeed();
    guest.driver.reconnect(&keeper.daemon().socket());
    assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"data");
}

#[test]
fn more_files_without_a_name_than_are_kept_cost_the_guest_those_and_nothing_else() {
    const MOST: usize = 1024;
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let mut open = Vec::new();
    for number in 0..MOST + 20 {
        let name = format!("file-{number}");
        open.push(guest.create(ROOT, &name, 0).unwrap());
        guest.unlink(ROOT, &name).unwrap();
    }
    restart(&mut keeper, &mut guest);
    assert_eq!(keeper.held().len(), MOST);
    for (number, (node, handle)) in open.iter().enumerate() {
        let written = guest.write(*node, *handle, 0, b"data");
        assert_eq!(written, if number < MOST { Ok(4) } else { Err(ESTALE) }, "{number}");
    }
    for (node, handle) in open {
        release(&mut guest, node, handle);
        forget(&mut guest, node, 1);
    }
    // There is room for others again.
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    guest.unlink(ROOT, "file").unwrap();
    restart(&mut keeper, &mut guest);
    assert_eq!(keeper.held(), [node]);
    assert_eq!(guest.write(node, handle, 0, b"data"), Ok(4));
}

#[test]
fn a_folder_is_read_on_where_the_last_process_stopped() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    for number in 0..300 {
        fs::write(share.path().join(format!("file-{number}")), "x").unwrap();
    }
    let mut keeper = Keeper::start(share.path(), &[]);
    let mut guest = Guest::mount_with(keeper.daemon(), &options());
    let opened = guest.call(&Call::new(Op::Opendir, ROOT).word(0).word(0)).unwrap();
    let handle = long(&opened, 0);
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let read = Call::new(Op::Readdirplus, ROOT).long(handle).long(offset).word(4096);
        let answer = guest.call(&read.word(0).long(0).long(0).room(4096)).unwrap();
        let mut rest = &answer[..];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let len = word(rest, 144) as usize;
            offset = long(rest, 136);
            names.push(String::from_utf8(rest[152..152 + len].to_vec()).unwrap());
            rest = &rest[(152 + len).next_multiple_of(8)..];
        }
        restart(&mut keeper, &mut guest);
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 302, "every name once, with . and ..");
}

#[test]
fn what_the_host_takes_away_is_stale_and_nothing_else_is() {
    let Some((share, mut keeper, mut guest)) = begin() else { return };
    let (lost, lost_handle) = guest.create(ROOT, "lost", 0).unwrap();
    let (kept, kept_handle) = guest.create(ROOT, "kept", 0).unwrap();
    keeper.kill();
    fs::remove_file(share.path().join("lost")).unwrap();
    keeper.succeed();
    guest.driver.reconnect(&keeper.daemon().socket());
    assert_eq!(guest.read(lost, lost_handle, 0, 1), Err(ESTALE));
    assert_eq!(guest.attributes(lost).map(drop), Err(ESTALE));
    assert_eq!(guest.write(kept, kept_handle, 0, b"fine"), Ok(4));
    release(&mut guest, lost, lost_handle);
}

#[test]
fn a_new_mount_begins_with_nothing_and_leaves_nothing_in_the_store() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    guest.unlink(ROOT, "file").unwrap();
    restart(&mut keeper, &mut guest);
    assert_eq!(keeper.held(), [node]);
    guest.init();
    assert!(guest.read(node, handle, 0, 1).is_err());
    let (other, _) = guest.create(ROOT, "other", 0).unwrap();
    assert_ne!(other, node);
    restart(&mut keeper, &mut guest);
    assert_eq!(keeper.held(), [0_u64; 0]);
    assert!(guest.read(node, handle, 0, 1).is_err());
    assert_eq!(guest.lookup(ROOT, "other").unwrap().node, other);
}

#[test]
fn a_mount_that_was_refused_is_none_for_the_successor_either() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    for version in [(7, 5), (6, 38)] {
        let init = Call::new(Op::Init, 0).word(version.0).word(version.1).word(0).word(0);
        assert_eq!(guest.call(&init.data(&[0; 48])), Err(EPROTO));
        restart(&mut keeper, &mut guest);
        assert!(guest.lookup(ROOT, "file").is_err());
        guest.init();
        guest.create(ROOT, &format!("file-{}", version.1), 0).unwrap();
    }
}

#[test]
fn a_state_of_another_version_is_refused_with_its_own_exit_code_and_left_alone() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    keeper.kill();
    keeper.state().write_all_at(&9_u64.to_ne_bytes(), 8).unwrap();
    keeper.succeed();
    assert_eq!(keeper.wait(), Some(6));
    keeper.state().write_all_at(&1_u64.to_ne_bytes(), 8).unwrap();
    keeper.succeed();
    guest.driver.reconnect(&keeper.daemon().socket());
    assert_eq!(guest.write(node, handle, 0, b"unharmed"), Ok(8));
}

#[test]
fn who_ends_in_peace_is_succeeded_like_who_is_killed() {
    let Some((_share, mut keeper, mut guest)) = begin() else { return };
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    let base = guest.driver.stop_queue(REQUESTS);
    assert_eq!(base, 2);
    keeper.daemon().signal(rustix::process::Signal::TERM);
    assert_eq!(keeper.wait(), Some(0));
    keeper.succeed();
    guest.driver.reconnect(&keeper.daemon().socket());
    assert_eq!(guest.write(node, handle, 0, b"unharmed"), Ok(8));
}
