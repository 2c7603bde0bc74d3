//! What a guest asks of its files, and what it gets.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use backend_daemon::testing::Buffer;

use crate::fuse::{Call, Guest, Op, REQUESTS, ROOT, can_sandbox, serve};

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EROFS: i32 = 30;

#[test]
fn a_file_is_created_written_read_listed_renamed_and_removed() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let daemon = serve(share.path(), &[]);
    let mut guest = Guest::mount(&daemon, 2);

    assert_eq!(guest.lookup(ROOT, "new"), Err(ENOENT));
    let (node, handle) = guest.create(ROOT, "new", 0).unwrap();
    let data: Vec<u8> = (0..10_000_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(guest.write(node, handle, 0, &data), Ok(40_000));
    assert_eq!(fs::read(share.path().join("new")).unwrap(), data);
    assert_eq!(guest.read(node, handle, 4000, 8000).unwrap(), data[4000..12_000]);
    assert_eq!(guest.attributes(node).unwrap().size, 40_000);
    assert_eq!(guest.lookup(ROOT, "new").unwrap().node, node);

    fs::write(share.path().join("other"), "from the host").unwrap();
    let expected = [("new".to_owned(), 40_000), ("other".to_owned(), 13)];
    assert_eq!(guest.list(ROOT), expected);
    guest.call(&Call::new(Op::Mkdir, ROOT).word(0o755).word(0).name("folder")).unwrap();
    let folder = guest.lookup(ROOT, "folder").unwrap().node;
    guest.rename((ROOT, "new"), (folder, "old")).unwrap();
    assert_eq!(guest.list(folder), [("old".to_owned(), 40_000)]);
    assert_eq!(fs::read(share.path().join("folder/old")).unwrap(), data);
    guest.unlink(folder, "old").unwrap();
    assert!(!share.path().join("folder/old").exists());
    assert_eq!(guest.read(node, handle, 0, 4).unwrap(), data[..4], "an open file stays");
    guest.call(&Call::new(Op::Release, node).long(handle).long(0).long(0)).unwrap();
    assert!(guest.call(&Call::new(Op::Statfs, ROOT)).is_ok());
}

#[test]
fn the_configuration_holds_the_tag_and_the_number_of_queues_and_each_queue_serves() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let daemon = serve(share.path(), &["--num-request-queues", "3"]);
    let mut guest = Guest::mount(&daemon, 4);
    let config = guest.driver.config(0, 40);
    assert_eq!(config[..8], *b"share\0\0\0");
    assert_eq!(config[36..], [3, 0, 0, 0]);
    fs::write(share.path().join("file"), "x").unwrap();
    for queue in 0..4 {
        let lookup = Call::new(Op::Lookup, ROOT).name("file");
        assert!(guest.call_on(queue, &lookup).is_ok(), "queue {queue}");
    }
}

#[test]
fn a_read_only_share_refuses_every_change() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    fs::write(share.path().join("file"), "before").unwrap();
    let daemon = serve(share.path(), &["--read-only"]);
    let mut guest = Guest::mount(&daemon, 2);

    let node = guest.lookup(ROOT, "file").unwrap().node;
    let handle = guest.open(node, 0).unwrap();
    assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"before");
    assert_eq!(guest.open(node, 2), Err(EROFS));
    assert_eq!(guest.write(node, handle, 0, b"after"), Err(EROFS));
    assert_eq!(guest.create(ROOT, "new", 0), Err(EROFS));
    assert_eq!(guest.unlink(ROOT, "file"), Err(EROFS));
    assert_eq!(guest.rename((ROOT, "file"), (ROOT, "moved")), Err(EROFS));
    let mkdir = Call::new(Op::Mkdir, ROOT).word(0o755).word(0).name("folder");
    assert_eq!(guest.call(&mkdir), Err(EROFS));
    assert_eq!(fs::read(share.path().join("file")).unwrap(), b"before");
    assert_eq!(fs::read_dir(share.path()).unwrap().count(), 1);
    // Not only virtiofsd says so: the process has no other than a read-only mount.
    let inside = format!("/proc/{}/root/file", daemon.id());
    let refused = fs::OpenOptions::new().write(true).open(inside).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(EROFS));
}

#[test]
fn a_malformed_request_is_refused_and_the_next_one_served() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    fs::write(share.path().join("file"), "x").unwrap();
    let mut daemon = serve(share.path(), &[]);
    let mut guest = Guest::mount(&daemon, 2);
    let lookup = Call::new(Op::Lookup, ROOT).name("file");
    let header = lookup.header(1);
    let read = Call::new(Op::Read, ROOT).long(0).long(0).word(4096).word(0).long(0).long(0);
    let read_header = read.header(3);
    // Longer than it is; shorter than its own header.
    let (mut long_header, mut short_header) = (header.clone(), header.clone());
    long_header[..4].copy_from_slice(&100_000_u32.to_le_bytes());
    short_header[..4].copy_from_slice(&8_u32.to_le_bytes());
    let malformed: [&[Buffer<'_>]; 9] = [
        &[Buffer::Out(&header[..3]), Buffer::In(16)],
        &[Buffer::Out(&header[..39]), Buffer::In(16)],
        &[Buffer::Out(&header), Buffer::In(16)],
        &[Buffer::Out(&header), Buffer::Out(b"no end"), Buffer::In(200)],
        &[Buffer::Out(&long_header), Buffer::Out(b"file\0"), Buffer::In(200)],
        &[Buffer::Out(&short_header), Buffer::Out(b"file\0"), Buffer::In(200)],
        // No room: virtiofsd itself would panic on the last of these.
        &[Buffer::In(16)],
        &[Buffer::Out(&header), Buffer::Out(b"file\0")],
        &[Buffer::Out(&read_header), Buffer::Out(&read.arguments), Buffer::In(15)],
    ];
    for (number, buffers) in malformed.iter().enumerate() {
        let request = guest.driver.submit(REQUESTS, buffers);
        let answer = guest.driver.wait(REQUESTS, request);
        if answer.written_bytes > 0 {
            assert_eq!(answer.written_bytes, 16, "{number}");
            assert_eq!(answer.bytes[4..8], (-EIO).to_le_bytes(), "{number}");
        }
        assert!(guest.lookup(ROOT, "file").is_ok(), "after {number}");
    }
    assert!(daemon.is_running());
    assert!(daemon.log().contains("refused a request"));
}

#[test]
fn what_a_user_of_the_guest_makes_belongs_to_that_user() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    fs::set_permissions(share.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let own = share.path().join("own");
    fs::create_dir(&own).unwrap();
    chown(&own, Some(1234), Some(1234)).unwrap();
    let daemon = serve(share.path(), &[]);
    let mut guest = Guest::mount(&daemon, 2);
    let folder = guest.lookup(ROOT, "own").unwrap().node;

    guest.create(folder, "mine", 1234).unwrap();
    let metadata = fs::metadata(own.join("mine")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 1234));
    // And the next request has its own user again.
    guest.create(folder, "roots", 0).unwrap();
    assert_eq!(fs::metadata(own.join("roots")).unwrap().uid(), 0);
}

#[test]
fn extended_attributes_work_if_asked_for_and_are_unknown_if_not() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    fs::write(share.path().join("file"), "x").unwrap();
    for (more, works) in [(&["--xattr"][..], true), (&[][..], false)] {
        let daemon = serve(share.path(), more);
        let mut guest = Guest::mount(&daemon, 2);
        let node = guest.lookup(ROOT, "file").unwrap().node;
        let set = Call::new(Op::Setxattr, node).word(5).word(0).name("user.test").data(b"value");
        assert_eq!(guest.call(&set).is_ok(), works);
        let get = Call::new(Op::Getxattr, node).word(100).word(0).name("user.test");
        assert_eq!(guest.call(&get).ok(), works.then(|| b"value".to_vec()));
    }
}

#[test]
fn rare_requests_do_not_meet_the_system_call_filter() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let mut daemon = serve(share.path(), &["--xattr", "--announce-submounts"]);
    let mut guest = Guest::mount(&daemon, 2);
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    // WRITE_KILL_PRIV: virtiofsd drops a capability for the length of the request.
    assert_eq!(guest.write_flagged(node, handle, (0, 1 << 2), b"data"), Ok(4));
    // Every opcode there is, with arguments that may be nonsense; 0 to 60 holds all of them.
    let zeros = [0; 4096];
    let mut header = Call::new(Op::Lookup, ROOT).data(&zeros[..128]).header(9);
    for opcode in (0..=60_u32).chain([u32::MAX]) {
        for node_or_root in [ROOT, node] {
            header[4..8].copy_from_slice(&opcode.to_le_bytes());
            header[16..24].copy_from_slice(&node_or_root.to_le_bytes());
            let mut arguments = handle.to_le_bytes().to_vec();
            arguments.extend(&zeros[..120]);
            let out = [header.as_slice(), arguments.as_slice()].concat();
            let buffers = [Buffer::Out(&out), Buffer::In(8192)];
            let request = guest.driver.submit(REQUESTS, &buffers);
            guest.driver.wait(REQUESTS, request);
        }
    }
    assert!(daemon.is_running());
    guest.init();
    assert!(guest.lookup(ROOT, "file").is_ok());
}

#[test]
fn a_frontend_that_comes_back_finds_the_same_files_open() {
    if !can_sandbox() {
        return;
    }
    let share = tempfile::tempdir().unwrap();
    let mut daemon = serve(share.path(), &[]);
    let mut guest = Guest::mount(&daemon, 2);
    let (node, handle) = guest.create(ROOT, "file", 0).unwrap();
    guest.write(node, handle, 0, b"before").unwrap();
    guest.driver.reconnect(&daemon.socket());
    assert_eq!(guest.read(node, handle, 0, 100).unwrap(), b"before");
    // A new mount is a new guest to us: it starts with nothing open.
    guest.init();
    assert!(guest.read(node, handle, 0, 100).is_err());
    assert!(guest.lookup(ROOT, "file").is_ok());
    assert_eq!(daemon.terminate().code(), Some(0));
}
